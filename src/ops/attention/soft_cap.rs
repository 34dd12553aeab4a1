//! The soft cap of scores: `cap · tanh(s / cap)` is about `s` near zero and never passes `cap`.
//!
//! Both passes work on `t = tanh(s / cap)`: the softmax multiplies by `cap` as it does by the scale without a cap.

use crate::ops::kernels::exp;
use crate::ops::vectorised::vectorised;

/// `tanh x` to about two units in the last place; NaN for NaN.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    // From here on the nearest f32 is 1, and `exp` is far from infinity.
    let x = x.clamp(-10.0, 10.0);
    let square = x * x;
    // Lambert's continued fraction `x / (1 + x² / (3 + x² / (5 + …)))` down to the 9, where `e²ˣ - 1` would cancel.
    let near = (
        x * (square + 105.0).mul_add(square, 945.0),
        square.mul_add(15.0, 420.0).mul_add(square, 945.0),
    );
    let power = exp(2.0 * x);
    let far = (power - 1.0, power + 1.0);
    let (numerator, denominator) = if square < 0.5 { near } else { far };
    numerator / denominator
}

vectorised! {
    /// Turns each value `x` into `tanh(factor · x)`.
    pub(super) fn forward(values: &mut [f32], factor: f32) {
        for value in values {
            *value = tanh(*value * factor);
        }
    }

    /// Turns the gradient of each `t = tanh(factor · x)` into that of `x`.
    pub(super) fn backward(gradients: &mut [f32], tanhs: &[f32], factor: f32) {
        for (gradient, t) in gradients.iter_mut().zip(tanhs) {
            *gradient *= (1.0 - t * t) * factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tanh_is_accurate_to_a_few_units() {
        let mut worst = 0f64;
        for i in (-120_000..120_000).filter(|&i| i != 0) {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).tanh();
            worst = worst.max((f64::from(tanh(x)) / exact - 1.0).abs());
        }
        assert!(
            worst < 3.0 * f64::from(f32::EPSILON),
            "relative error {worst:e}"
        );
    }

    #[test]
    fn tanh_at_the_ends() {
        assert_eq!(tanh(0.0), 0.0);
        assert_eq!(tanh(1e30), 1.0);
        assert_eq!(tanh(f32::INFINITY), 1.0);
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert!(tanh(f32::NAN).is_nan());
    }
}
