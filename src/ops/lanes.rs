//! Sixteen f32 values that are worked on together.
//!
//! The compiler vectorises plain loops over slices by itself, but keeps the accumulators of a sum in vector registers
//! only if it is told to. All versions do the same arithmetic in the same order.

#![expect(
    unsafe_code,
    reason = "vector instructions; only `vectorised!` names these types, where they exist"
)]

/// Values in one [`Lanes`].
pub(super) const WIDTH: usize = 16;

/// Sixteen f32 values.
pub(super) trait Lanes: Copy {
    /// The same value sixteen times.
    fn splat(value: f32) -> Self;
    /// Reads sixteen values.
    fn load(values: &[f32; WIDTH]) -> Self;
    /// The values as an array.
    fn to_array(self) -> [f32; WIDTH];
    /// `self + other`.
    fn add(self, other: Self) -> Self;
    /// `self · factor + summand`, rounded once.
    fn mul_add(self, factor: Self, summand: Self) -> Self;
    /// The larger of each two values; `other` where `self` is NaN.
    fn larger(self, other: Self) -> Self;

    /// The sum of the values, added pairwise.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut values = self.to_array();
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                values[i] += values[i + half];
            }
        }
        values[0]
    }
}

/// Without special instructions.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; WIDTH]);

impl Portable {
    #[inline(always)]
    fn each(value: impl FnMut(usize) -> f32) -> Self {
        Self(std::array::from_fn(value))
    }
}

impl Lanes for Portable {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; WIDTH])
    }

    #[inline(always)]
    fn load(values: &[f32; WIDTH]) -> Self {
        Self(*values)
    }

    #[inline(always)]
    fn to_array(self) -> [f32; WIDTH] {
        self.0
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self::each(|i| self.0[i] + other.0[i])
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, summand: Self) -> Self {
        Self::each(|i| self.0[i].mul_add(factor.0[i], summand.0[i]))
    }

    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        Self::each(|i| {
            if self.0[i] > other.0[i] {
                self.0[i]
            } else {
                other.0[i]
            }
        })
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

// Every block below is sound for the same reason: these types are named only inside the functions that `vectorised!`
// compiles for their instructions and calls after finding them on the machine, and unaligned loads and stores are given
// arrays of the right length.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, WIDTH};
    use std::arch::x86_64::{
        __m256, __m512, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_movehl_ps, _mm_shuffle_ps,
        _mm256_add_ps, _mm256_castps256_ps128, _mm256_extractf128_ps, _mm256_fmadd_ps,
        _mm256_loadu_ps, _mm256_max_ps, _mm256_set1_ps, _mm256_storeu_ps, _mm512_add_ps,
        _mm512_castps512_ps256, _mm512_extractf32x8_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
        _mm512_max_ps, _mm512_set1_ps, _mm512_storeu_ps,
    };

    /// One register of AVX-512.
    #[derive(Clone, Copy)]
    pub(in crate::ops) struct Avx512(__m512);

    impl Lanes for Avx512 {
        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_set1_ps(value) })
        }

        #[inline(always)]
        fn load(values: &[f32; WIDTH]) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_loadu_ps(values.as_ptr()) })
        }

        #[inline(always)]
        fn to_array(self) -> [f32; WIDTH] {
            let mut values = [0.0; WIDTH];
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(values.as_mut_ptr(), self.0) };
            values
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn mul_add(self, factor: Self, summand: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, summand.0) })
        }

        #[inline(always)]
        fn larger(self, other: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_max_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: see above; AVX-512 includes AVX2.
            unsafe {
                Avx2(
                    _mm512_castps512_ps256(self.0),
                    _mm512_extractf32x8_ps::<1>(self.0),
                )
                .sum()
            }
        }
    }

    /// Two registers of AVX2.
    #[derive(Clone, Copy)]
    pub(in crate::ops) struct Avx2(__m256, __m256);

    impl Lanes for Avx2 {
        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: see above.
            let half = unsafe { _mm256_set1_ps(value) };
            Self(half, half)
        }

        #[inline(always)]
        fn load(values: &[f32; WIDTH]) -> Self {
            let (low, high) = values.split_at(WIDTH / 2);
            // SAFETY: see above.
            unsafe {
                Self(
                    _mm256_loadu_ps(low.as_ptr()),
                    _mm256_loadu_ps(high.as_ptr()),
                )
            }
        }

        #[inline(always)]
        fn to_array(self) -> [f32; WIDTH] {
            let mut values = [0.0; WIDTH];
            let (low, high) = values.split_at_mut(WIDTH / 2);
            // SAFETY: see above.
            unsafe {
                _mm256_storeu_ps(low.as_mut_ptr(), self.0);
                _mm256_storeu_ps(high.as_mut_ptr(), self.1);
            }
            values
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe {
                Self(
                    _mm256_add_ps(self.0, other.0),
                    _mm256_add_ps(self.1, other.1),
                )
            }
        }

        #[inline(always)]
        fn mul_add(self, factor: Self, summand: Self) -> Self {
            // SAFETY: see above.
            unsafe {
                Self(
                    _mm256_fmadd_ps(self.0, factor.0, summand.0),
                    _mm256_fmadd_ps(self.1, factor.1, summand.1),
                )
            }
        }

        #[inline(always)]
        fn larger(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe {
                Self(
                    _mm256_max_ps(self.0, other.0),
                    _mm256_max_ps(self.1, other.1),
                )
            }
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: see above.
            unsafe {
                let eight = _mm256_add_ps(self.0, self.1);
                let four = _mm_add_ps(
                    _mm256_castps256_ps128(eight),
                    _mm256_extractf128_ps::<1>(eight),
                );
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }
    }
}
