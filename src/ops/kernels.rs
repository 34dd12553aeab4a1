//! Vector kernels that several operations share.
//!
//! Sums run in fixed lanes and long ones end in f64, so their value depends on the values alone.

use super::lanes::{Lanes, WIDTH};
use super::vectorised::vectorised;
use half::bf16;

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

/// Calls `step` with four lanes of each slice at a time and an accumulator that the next three calls leave alone, and
/// the values that remain with `tail`.
#[inline(always)]
fn reduce<V: Lanes>(
    values: &[f32],
    start: V,
    step: impl Fn(V, V) -> V,
    join: impl Fn(V, V) -> V,
) -> (V, &[f32]) {
    let (vectors, tail) = values.as_chunks::<WIDTH>();
    let (blocks, rest) = vectors.as_chunks::<4>();
    let mut lanes = [start; 4];
    for block in blocks {
        for (lanes, values) in lanes.iter_mut().zip(block) {
            *lanes = step(V::load(values), *lanes);
        }
    }
    for (lanes, values) in lanes.iter_mut().zip(rest) {
        *lanes = step(V::load(values), *lanes);
    }
    let [a, b, c, d] = lanes;
    (join(join(a, b), join(c, d)), tail)
}

/// `Σ aᵢ bᵢ`, to be inlined in a vectorised function.
#[inline(always)]
pub(super) fn dot_inline<V: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    let ((a_vectors, a_tail), (b_vectors, b_tail)) =
        (a.as_chunks::<WIDTH>(), b.as_chunks::<WIDTH>());
    let ((a_blocks, a_rest), (b_blocks, b_rest)) =
        (a_vectors.as_chunks::<4>(), b_vectors.as_chunks::<4>());
    let mut lanes = [V::splat(0.0); 4];
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for i in 0..4 {
            lanes[i] = V::load(&a[i]).mul_add(V::load(&b[i]), lanes[i]);
        }
    }
    for (lanes, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lanes = V::load(a).mul_add(V::load(b), *lanes);
    }
    let [first, second, third, fourth] = lanes;
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum();
    first.add(second).add(third.add(fourth)).sum() + tail
}

/// The sum, to be inlined in a vectorised function.
#[inline(always)]
fn sum_inline<V: Lanes>(values: &[f32]) -> f32 {
    let (lanes, tail) = reduce(values, V::splat(0.0), V::add, V::add);
    lanes.sum() + tail.iter().sum::<f32>()
}

/// The largest value, to be inlined in a vectorised function; NaN is passed over.
#[inline(always)]
pub(super) fn maximum_inline<V: Lanes>(values: &[f32]) -> f32 {
    let (lanes, tail) = reduce(values, V::splat(f32::NEG_INFINITY), V::larger, V::larger);
    let lanes = lanes.to_array();
    let values = lanes.iter().chain(tail);
    values.fold(f32::NEG_INFINITY, |largest, &value| {
        if value > largest { value } else { largest }
    })
}

/// Turns each value `x` into `e^(scale·x - shift)` and returns their sum; to be inlined in a vectorised function.
#[inline(always)]
pub(super) fn exp_sum_inline<V: Lanes>(values: &mut [f32], scale: f32, shift: f32) -> f64 {
    let mut total = 0f64;
    for block in values.chunks_mut(SUM_BLOCK) {
        for value in block.iter_mut() {
            *value = exp(*value * scale - shift);
        }
        total += f64::from(sum_inline::<V>(block));
    }
    total
}

/// Values widened at a time on the way into a dot product.
const DOT_BLOCK: usize = 256;

#[inline(always)]
fn widen_inline(values: &[bf16], wide: &mut [f32]) {
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
}

vectorised! {
    /// `Σ aᵢ bᵢ`.
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        dot_inline::<V>(a, b)
    }

    /// `Σ aᵢ bᵢ` with `a` widened on the way.
    pub(super) fn dot_bf16(a: &[bf16], b: &[f32]) -> f32 {
        let mut wide = [0f32; DOT_BLOCK];
        let mut sum = 0f32;
        for (a, b) in a.chunks(DOT_BLOCK).zip(b.chunks(DOT_BLOCK)) {
            let wide = &mut wide[..a.len()];
            widen_inline(a, wide);
            sum += dot_inline::<V>(wide, b);
        }
        sum
    }

    /// Widens bf16 values; a NaN stays one.
    pub(super) fn widen_bf16(values: &[bf16], wide: &mut [f32]) {
        widen_inline(values, wide);
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
        maximum_inline::<V>(values)
    }

    /// Turns each value `x` into `e^(scale·x - shift)` and returns their sum.
    pub(super) fn exp_sum(values: &mut [f32], scale: f32, shift: f32) -> f64 {
        exp_sum_inline::<V>(values, scale, shift)
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
