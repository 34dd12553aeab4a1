//! The gate of a feed-forward layer: `activation(gate) · up`.

use super::buffers;
#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::{Floats, expect_shape};
use super::graph::{Backward, record};
use super::kernels::{exp, sigmoid};
use super::vectorised::vectorised;
use crate::Result;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// Values that one task works on.
const TASK_VALUES: usize = 1 << 15;

/// The function on the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU: Hugging Face's `gelu_pytorch_tanh` and `gelu_new`.
    GeluTanh,
    /// `x · Φ(x)` with the normal distribution's Φ: Hugging Face's `gelu`.
    Gelu,
}

/// `y = activation(gate) · up`, value by value.
///
/// Both arguments have one shape, the result's. The gradients are `dgate = dy · up · activation'(gate)` and
/// `dup = dy · activation(gate)`, each only where it is tracked; nothing is saved but the arguments.
pub fn gated_activation(gate: &Tensor, up: &Tensor, a: Activation) -> Result<Tensor> {
    expect_shape(
        NAME,
        "the second argument",
        up,
        gate.dims(),
        "the shape of the gate",
    )?;
    let (gate, up) = (&gate.contiguous()?, &up.contiguous()?);
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() {
        let y = cuda::gated_activation(gate, up, a)?;
        return record([gate, up], y, gate.shape(), Gated(a));
    }
    let mut y = buffers::take(gate.elem_count());
    {
        let (gate, up) = (
            Floats::of(NAME, "the gate", gate)?,
            Floats::of(NAME, "the second argument", up)?,
        );
        gate.par_chunks(TASK_VALUES)
            .zip(up.par_chunks(TASK_VALUES))
            .zip(y.par_chunks_mut(TASK_VALUES))
            .for_each(|((gate, up), y)| match a {
                Activation::Silu => silu_forward(gate, up, y),
                Activation::GeluTanh => gelu_tanh_forward(gate, up, y),
                Activation::Gelu => gelu_forward(gate, up, y),
            });
    }
    record([gate, up], y, gate.shape(), Gated(a))
}

const NAME: &str = "gated activation";

struct Gated(Activation);

impl Backward<2> for Gated {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        [gate, up]: [&Tensor; 2],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        // Both come out of one pass: whether one is tracked without the other matters to nobody's model.
        let (dgate, dup) = gated_activation_gradients(gate, up, self.0, gradient)?;
        Ok([
            gate.track_op().then_some(dgate),
            up.track_op().then_some(dup),
        ])
    }
}

/// The gradients of [`gated_activation`], of the gate and of `up`, given `dy`; all have the same shape.
pub(crate) fn gated_activation_gradients(
    gate: &Tensor,
    up: &Tensor,
    a: Activation,
    dy: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let dy = dy.contiguous()?;
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return cuda::gated_activation_gradients(gate, up, a, &dy);
    }
    let (mut dgate, mut dup) = (
        buffers::take(dy.elem_count()),
        buffers::take(dy.elem_count()),
    );
    {
        let dy = Floats::of(NAME, "the gradient", &dy)?;
        let gate = Floats::of(NAME, "the gate", gate)?;
        let up = Floats::of(NAME, "the second argument", up)?;
        gate.par_chunks(TASK_VALUES)
            .zip(up.par_chunks(TASK_VALUES))
            .zip(dy.par_chunks(TASK_VALUES))
            .zip(
                dgate
                    .par_chunks_mut(TASK_VALUES)
                    .zip(dup.par_chunks_mut(TASK_VALUES)),
            )
            .for_each(|(((gate, up), dy), (dgate, dup))| match a {
                Activation::Silu => silu_backward(gate, up, dy, dgate, dup),
                Activation::GeluTanh => gelu_tanh_backward(gate, up, dy, dgate, dup),
                Activation::Gelu => gelu_backward(gate, up, dy, dgate, dup),
            });
    }
    let tensor = |values| Tensor::from_vec(values, gate.shape(), &Device::Cpu);
    Ok((tensor(dgate)?, tensor(dup)?))
}

/// Value and slope of `x · sigmoid(x)`.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    (x * s, s * (1.0 + x * (1.0 - s)))
}

/// Value and slope of `x · sigmoid(2z)`, `z = √(2/π) (x + 0.044715 x³)`: the same as `x · (1 + tanh z) / 2`.
#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    const TWICE_ROOT: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715;
    let square = x * x;
    let s = sigmoid(TWICE_ROOT * x * (1.0 + CUBIC * square));
    let slope_of_z = TWICE_ROOT * (1.0 + 3.0 * CUBIC * square);
    (x * s, s + x * s * (1.0 - s) * slope_of_z)
}

/// Value and slope of `x · Φ(x)`.
#[inline(always)]
fn gelu(x: f32) -> (f32, f32) {
    const ROOT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
    const DENSITY: f32 = 0.398_942_3;
    let phi = 0.5 * erfc(-x * ROOT_HALF);
    (x * phi, phi + x * DENSITY * exp(-0.5 * x * x))
}

/// `1 - erf(z)`, to 1.2e-7 of its value (Press et al., Numerical Recipes, 6.2).
#[inline(always)]
fn erfc(z: f32) -> f32 {
    let size = z.abs();
    let t = 1.0 / (1.0 + 0.5 * size);
    let series = 0.170_872_77f32;
    let series = series.mul_add(t, -0.822_152_23);
    let series = series.mul_add(t, 1.488_515_9);
    let series = series.mul_add(t, -1.135_204);
    let series = series.mul_add(t, 0.278_868_07);
    let series = series.mul_add(t, -0.186_288_06);
    let series = series.mul_add(t, 0.096_784_18);
    let series = series.mul_add(t, 0.374_091_96);
    let series = series.mul_add(t, 1.000_023_7);
    let series = series.mul_add(t, -1.265_512_2);
    let tail = t * exp(series - size * size);
    if z < 0.0 { 2.0 - tail } else { tail }
}

/// The loops over one activation, forward and backward.
macro_rules! gated {
    ($forward:ident, $backward:ident, $activation:ident) => {
        vectorised! {
            fn $forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
                for ((gate, up), y) in gate.iter().zip(up).zip(y) {
                    *y = $activation(*gate).0 * up;
                }
            }

            fn $backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
                let gradients = dgate.iter_mut().zip(dup);
                for (((gate, up), dy), (dgate, dup)) in gate.iter().zip(up).zip(dy).zip(gradients) {
                    let (value, slope) = $activation(*gate);
                    *dgate = dy * up * slope;
                    *dup = dy * value;
                }
            }
        }
    };
}
gated!(silu_forward, silu_backward, silu);
gated!(gelu_tanh_forward, gelu_tanh_backward, gelu_tanh);
gated!(gelu_forward, gelu_backward, gelu);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, random, variable};

    #[test]
    fn equals_its_composition() {
        for shape in [&[1, 1][..], &[1, 37], &[211, 331]] {
            let arguments = [variable(1, shape), variable(2, shape)];
            for a in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
                let slow = |t: &[Tensor]| -> Result<Tensor> {
                    let gate = (&t[0] * 4.0)?;
                    let gate = match a {
                        Activation::Silu => gate.silu()?,
                        Activation::GeluTanh => gate.gelu()?,
                        Activation::Gelu => gate.gelu_erf()?,
                    };
                    Ok((gate * &t[1])?)
                };
                check(
                    &arguments,
                    &|t| gated_activation(&(&t[0] * 4.0)?, &t[1], a),
                    &slow,
                    2e-6,
                );
            }
        }
    }

    #[test]
    fn both_tails_are_accurate() {
        // Φ(-5) and Φ(-1), to nine digits
        for (x, phi) in [
            (-5f32, 2.866_515_7e-7f32),
            (-1.0, 0.158_655_25),
            (0.0, 0.5),
            (5.0, 0.999_999_7),
        ] {
            let (value, _) = gelu(x);
            assert!(
                (value - x * phi).abs() <= 1e-6 * (x * phi).abs(),
                "gelu({x}) = {value}"
            );
        }
        for x in [-1e10f32, -200.0, 200.0] {
            for activation in [silu, gelu, gelu_tanh] {
                let (value, slope) = activation(x);
                assert_eq!(
                    (value, slope),
                    if x < 0.0 { (0.0, 0.0) } else { (x, 1.0) },
                    "at {x}"
                );
            }
        }
    }

    #[test]
    fn shapes_that_do_not_agree_are_an_error() {
        let error = gated_activation(&random(1, &[2, 3]), &random(1, &[3, 2]), Activation::Silu);
        assert_eq!(
            error.expect_err("shapes differ").to_string(),
            "`gated activation` needs the second argument of shape [2, 3] (the shape of the gate), its shape is [3, 2]"
        );
    }
}
