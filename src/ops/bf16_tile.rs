//! The innermost part of a product of bf16 factors: one tile of the result, kept in registers.

#![expect(
    unsafe_code,
    reason = "instructions beyond the target's baseline; arrays of the right length are loaded"
)]

use super::gemm::Destination;
use super::vectorised::vectorised;

/// Rows of a tile.
pub(super) const ROWS: usize = 8;
/// Columns of a tile: three registers of AVX-512.
pub(super) const COLUMNS: usize = 48;

/// Two bf16 values that follow each other in depth, the first in the low half: 32 bits that travel as an f32.
pub(super) type Pair = f32;

/// The rows of one tile of a product, in f32.
pub(super) type Tile<'a> = [&'a mut [f32; COLUMNS]; ROWS];

/// Rounds two values to the nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(super) fn pair(first: f32, second: f32) -> Pair {
    f32::from_bits(rounded(first) | rounded(second) << 16)
}

/// The bits of the nearest bf16.
#[inline(always)]
pub(super) fn rounded(value: f32) -> u32 {
    let bits = value.to_bits();
    let even = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
    let nearest = if value.is_nan() {
        bits | 0x0040_0000
    } else {
        even
    };
    nearest >> 16
}

/// `tile = a b` or `tile += a b` with `a` the pairs of eight rows and `b` those of 48 columns, both in order of depth.
pub(super) fn multiply(
    tile: Tile<'_>,
    destination: Destination,
    a: &[[Pair; ROWS]],
    b: &[[Pair; COLUMNS]],
) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the machine has just been found to have these instructions.
        return unsafe { avx512_bf16(tile, destination, a, b) };
    }
    widened(tile, destination, a, b);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn avx512_bf16(
    tile: Tile<'_>,
    destination: Destination,
    a: &[[Pair; ROWS]],
    b: &[[Pair; COLUMNS]],
) {
    use std::arch::x86_64::{
        __m512, __m512bh, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };
    const REGISTERS: usize = COLUMNS / 16;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn pairs(values: __m512) -> __m512bh {
        // SAFETY: both are the same 64 bytes.
        unsafe { std::mem::transmute(values) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn load(values: &[f32; COLUMNS], register: usize) -> __m512 {
        let values: &[f32; 16] = &values.as_chunks().0[register];
        // SAFETY: an array of sixteen values is loaded.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    let mut sums = [[_mm512_setzero_ps(); REGISTERS]; ROWS];
    if destination == Destination::Add {
        for (sums, row) in sums.iter_mut().zip(&tile) {
            *sums = std::array::from_fn(|register| load(row, register));
        }
    }
    for (a, b) in a.iter().zip(b) {
        let b: [__m512bh; REGISTERS] = std::array::from_fn(|register| pairs(load(b, register)));
        for (sums, &a) in sums.iter_mut().zip(a) {
            let a = pairs(_mm512_set1_ps(a));
            for (sum, &b) in sums.iter_mut().zip(&b) {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
    }
    for (row, sums) in tile.into_iter().zip(sums) {
        let registers: &mut [[f32; 16]] = row.as_chunks_mut().0;
        for (values, sum) in registers.iter_mut().zip(sums) {
            // SAFETY: sixteen values are stored in an array of sixteen.
            unsafe { _mm512_storeu_ps(values.as_mut_ptr(), sum) };
        }
    }
}

vectorised! {
    /// The same sums in f32, for machines without products of bf16.
    fn widened(tile: Tile<'_>, destination: Destination, a: &[[Pair; ROWS]], b: &[[Pair; COLUMNS]]) {
        let mut sums = [[0f32; COLUMNS]; ROWS];
        if destination == Destination::Add {
            for (sums, row) in sums.iter_mut().zip(&tile) {
                *sums = **row;
            }
        }
        for (a, b) in a.iter().zip(b) {
            let mut low = [0f32; COLUMNS];
            let mut high = [0f32; COLUMNS];
            for ((low, high), b) in low.iter_mut().zip(&mut high).zip(b) {
                *low = f32::from_bits(b.to_bits() << 16);
                *high = f32::from_bits(b.to_bits() & 0xFFFF_0000);
            }
            for (row, a) in sums.iter_mut().zip(a) {
                let first = f32::from_bits(a.to_bits() << 16);
                let second = f32::from_bits(a.to_bits() & 0xFFFF_0000);
                for ((sum, low), high) in row.iter_mut().zip(&low).zip(&high) {
                    *sum = first.mul_add(*low, second.mul_add(*high, *sum));
                }
            }
        }
        for (row, sums) in tile.into_iter().zip(sums) {
            *row = sums;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_half() {
        for i in 0..1_000_000u32 {
            let value = f32::from_bits(i.wrapping_mul(4_294_967_291));
            let wanted = half::bf16::from_f32(value);
            match value.is_nan() {
                true => assert!(half::bf16::from_bits(rounded(value) as u16).is_nan()),
                false => assert_eq!(rounded(value), u32::from(wanted.to_bits()), "{value}"),
            }
        }
    }

    #[test]
    fn machines_without_the_instruction_get_the_same_to_rounding() {
        let a: Vec<[Pair; ROWS]> = (0..50)
            .map(|k| std::array::from_fn(|row| pair((k * row) as f32 * 0.1, k as f32 - 20.0)))
            .collect();
        let b: Vec<[Pair; COLUMNS]> = (0..50)
            .map(|k| std::array::from_fn(|column| pair(column as f32 * 0.3, 7.0 - k as f32)))
            .collect();
        let (mut ours, mut theirs) = ([[1.0; COLUMNS]; ROWS], [[1.0; COLUMNS]; ROWS]);
        for destination in [Destination::Overwrite, Destination::Add] {
            multiply(ours.each_mut(), destination, &a, &b);
            widened(theirs.each_mut(), destination, &a, &b);
            for (ours, theirs) in ours.as_flattened().iter().zip(theirs.as_flattened()) {
                assert!((ours - theirs).abs() <= 1e-5 * theirs.abs().max(1e3));
            }
        }
    }
}
