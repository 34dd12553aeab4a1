//! Vector kernels that several operations share.
//!
//! Sums run in [`LANES`] accumulators and long ones end in f64, so their value depends on the length alone.

use super::vectorised::vectorised;
use half::bf16;

/// Accumulators of a sum: two AVX-512 registers.
pub(super) const LANES: usize = 32;

/// Values summed in f32 before the sum goes on in f64.
const SUM_BLOCK: usize = 1024;

/// `eˣ` to about one unit in the last place; 0 below -87, infinity above 88.7, NaN for NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5·2²³ rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts: the first has few enough bits that its product with an integer is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Comparisons that are false for NaN keep it.
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -88.0 { -88.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let integer = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let whole = shifted - ROUND;
    let rest = whole.mul_add(-LN2_LOW, whole.mul_add(-LN2_HIGH, clamped));
    let series = 1.987_569_2e-4f32;
    let series = series.mul_add(rest, 1.398_199_9e-3);
    let series = series.mul_add(rest, 8.333_452e-3);
    let series = series.mul_add(rest, 4.166_579_6e-2);
    let series = series.mul_add(rest, 0.166_666_65);
    let series = series.mul_add(rest, 0.500_000_06);
    let power = (series * rest).mul_add(rest, rest) + 1.0;
    // 2ⁿ as 2ⁿ⁻¹·2, since 2¹²⁸ has no f32.
    let half_scale = f32::from_bits((integer.wrapping_add(126) as u32) << 23);
    let result = power * half_scale * 2.0;
    if x < -87.0 { 0.0 } else { result }
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The lanes of a sum, added pairwise.
#[inline(always)]
pub(super) fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ aᵢ bᵢ`, to be inlined in a vectorised function.
#[inline(always)]
pub(super) fn dot_inline(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_blocks
        .remainder()
        .iter()
        .zip(b_blocks.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    fold(lanes) + tail
}

/// The largest value, to be inlined in a vectorised function; NaN is passed over.
#[inline(always)]
pub(super) fn maximum_inline(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let blocks = values.chunks_exact(LANES);
    let mut largest = f32::NEG_INFINITY;
    for &value in blocks.remainder() {
        largest = if value > largest { value } else { largest };
    }
    for block in blocks {
        for i in 0..LANES {
            lanes[i] = if block[i] > lanes[i] {
                block[i]
            } else {
                lanes[i]
            };
        }
    }
    for lane in lanes {
        largest = if lane > largest { lane } else { largest };
    }
    largest
}

/// Turns each value `x` into `e^(scale·x - shift)` and returns their sum; to be inlined in a vectorised function.
#[inline(always)]
pub(super) fn exp_sum_inline(values: &mut [f32], scale: f32, shift: f32) -> f64 {
    let mut total = 0f64;
    for block in values.chunks_mut(SUM_BLOCK) {
        let mut lanes = [0f32; LANES];
        let mut vectors = block.chunks_exact_mut(LANES);
        for vector in vectors.by_ref() {
            for i in 0..LANES {
                vector[i] = exp(vector[i] * scale - shift);
                lanes[i] += vector[i];
            }
        }
        let mut tail = 0f32;
        for value in vectors.into_remainder() {
            *value = exp(*value * scale - shift);
            tail += *value;
        }
        total += f64::from(fold(lanes) + tail);
    }
    total
}

vectorised! {
    /// `Σ aᵢ bᵢ`.
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        dot_inline(a, b)
    }

    /// `Σ aᵢ bᵢ` with `a` widened on the way.
    pub(super) fn dot_bf16(a: &[bf16], b: &[f32]) -> f32 {
        let mut lanes = [0f32; LANES];
        let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let tail: f32 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(a, b)| a.to_f32() * b).sum();
        for (a, b) in a_blocks.zip(b_blocks) {
            for i in 0..LANES {
                lanes[i] = f32::from_bits(u32::from(a[i].to_bits()) << 16).mul_add(b[i], lanes[i]);
            }
        }
        fold(lanes) + tail
    }

    /// Widens bf16 values; a NaN stays one.
    pub(super) fn widen_bf16(values: &[bf16], wide: &mut [f32]) {
        for (wide, value) in wide.iter_mut().zip(values) {
            *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
        }
    }

    /// `target += source`.
    pub(super) fn add_assign(target: &mut [f32], source: &[f32]) {
        for (target, source) in target.iter_mut().zip(source) {
            *target += source;
        }
    }

    /// `values *= factor`.
    pub(super) fn scale(values: &mut [f32], factor: f32) {
        for value in values {
            *value *= factor;
        }
    }

    /// The largest value; NaN is passed over.
    pub(super) fn maximum(values: &[f32]) -> f32 {
        maximum_inline(values)
    }

    /// Turns each value `x` into `e^(scale·x - shift)` and returns their sum.
    pub(super) fn exp_sum(values: &mut [f32], scale: f32, shift: f32) -> f64 {
        exp_sum_inline(values, scale, shift)
    }

    /// `Σ xᵢ²` in f64.
    pub(super) fn square_sum(values: &[f32]) -> f64 {
        let mut lanes = [0f64; 16];
        let blocks = values.chunks_exact(16);
        let tail: f64 = blocks.remainder().iter().map(|&value| f64::from(value) * f64::from(value)).sum();
        for block in blocks {
            for i in 0..16 {
                lanes[i] = f64::from(block[i]).mul_add(f64::from(block[i]), lanes[i]);
            }
        }
        lanes.iter().sum::<f64>() + tail
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_to_about_one_unit() {
        let mut worst = 0f64;
        for i in -860_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / exact - 1.0).abs());
        }
        assert!(
            worst < 1.2 * f64::from(f32::EPSILON),
            "relative error {worst:e}"
        );
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
    }

    #[test]
    fn sums_of_every_length_are_complete() {
        for length in 0..200 {
            let ones = vec![1f32; length];
            assert_eq!(dot(&ones, &ones), length as f32);
            assert_eq!(square_sum(&ones), length as f64);
            let mut values = ones.clone();
            assert_eq!(exp_sum(&mut values, 1.0, 1.0), length as f64);
            let wide: Vec<bf16> = ones.iter().map(|&one| bf16::from_f32(one)).collect();
            assert_eq!(dot_bf16(&wide, &ones), length as f32);
        }
    }

    #[test]
    fn the_maximum_is_found_wherever_it_is() {
        for length in 1..100 {
            for place in 0..length {
                let mut values = vec![-3f32; length];
                values[place] = -1.0;
                assert_eq!(maximum(&values), -1.0);
            }
        }
    }
}
