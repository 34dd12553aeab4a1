//! Layer normalisation.

use super::buffers;
#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::{Floats, expect_shape};
use super::graph::{Backward, record};
use super::kernels::dot_inline;
use super::lanes::{Lanes, WIDTH};
use super::linear::bias_gradient;
use super::rows::{sum_tasks, task_values};
use super::vectorised::vectorised;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// `y = w · (x - mean(x)) / √(variance(x) + epsilon) + b` over the last dimension, the variance divided by `features`.
///
/// `x` is `(…, features)`, `w` and `b` are `(features)`. With `r = 1 / √(variance(x) + epsilon)` and
/// `n = r·(x - mean(x))` the gradients are `dx = r·(w·dy - mean(w·dy) - n·mean(w·dy·n))`, `dw = Σ n·dy` and `db = Σ dy`
/// over the rows, each only where it is tracked. Nothing is saved but the arguments; the mean and `r` are made again.
pub fn layer_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    epsilon: f64,
) -> Result<Tensor> {
    const ONE_EACH: &str = "one value per feature";
    let features = weight.elem_count();
    expect_shape(NAME, "the weight", weight, &[features], ONE_EACH)?;
    if features == 0 || x.dims().last() != Some(&features) {
        return Err(Error::new(format!(
            "`{NAME}`: x is {:?} but the weight is ({features}): the last dimension must be the weight's",
            x.dims()
        )));
    }
    if let Some(bias) = bias {
        expect_shape(NAME, "the bias", bias, &[features], ONE_EACH)?;
    }
    let (x, weight) = (&x.contiguous()?, &weight.contiguous()?);
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let epsilon = epsilon as f32;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let y = cuda::layer_norm(x, weight, bias.as_ref(), epsilon)?;
        let backward = LayerNorm { epsilon };
        return match &bias {
            Some(bias) => record([x, weight, bias], y, x.shape(), backward),
            None => record([x, weight], y, x.shape(), backward),
        };
    }
    let mut y = buffers::take(x.elem_count());
    {
        let (x, weight) = (
            Floats::of(NAME, "x", x)?,
            Floats::of(NAME, "the weight", weight)?,
        );
        let bias = bias
            .as_ref()
            .map(|bias| Floats::of(NAME, "the bias", bias))
            .transpose()?;
        let task = task_values(features);
        x.par_chunks(task)
            .zip(y.par_chunks_mut(task))
            .for_each(|(x, y)| normalise(x, &weight, bias.as_deref(), epsilon, y));
    }
    let backward = LayerNorm { epsilon };
    match &bias {
        Some(bias) => record([x, weight, bias], y, x.shape(), backward),
        None => record([x, weight], y, x.shape(), backward),
    }
}

const NAME: &str = "layer norm";

struct LayerNorm {
    epsilon: f32,
}

impl Backward<2> for LayerNorm {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        [x, weight]: [&Tensor; 2],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let gradient = &gradient.contiguous()?;
        let dx = match x.track_op() {
            true => Some(self.input_gradient(x, weight, gradient)?),
            false => None,
        };
        let dw = match weight.track_op() {
            true => Some(self.weight_gradient(x, weight, gradient)?),
            false => None,
        };
        Ok([dx, dw])
    }
}

impl Backward<3> for LayerNorm {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let [dx, dw] = Backward::<2>::gradients(self, [x, weight], result, gradient)?;
        let db = match bias.track_op() {
            true => Some(bias_gradient(&gradient.reshape(((), bias.elem_count()))?)?),
            false => None,
        };
        Ok([dx, dw, db])
    }
}

impl LayerNorm {
    /// The gradient for `x`, of its shape.
    fn input_gradient(&self, x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::layer_norm_input_gradient(x, weight, self.epsilon, dy);
        }
        let mut dx = buffers::take(x.elem_count());
        {
            let x = Floats::of(NAME, "x", x)?;
            let w = Floats::of(NAME, "the weight", weight)?;
            let dy = Floats::of(NAME, "the gradient", dy)?;
            let task = task_values(w.len());
            x.par_chunks(task)
                .zip(dy.par_chunks(task))
                .zip(dx.par_chunks_mut(task))
                .for_each(|((x, dy), dx)| input_gradient(x, &w, dy, self.epsilon, dx));
        }
        Ok(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)
    }

    /// The gradient for the weight, of its shape.
    fn weight_gradient(&self, x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let features = weight.elem_count();
            return cuda::layer_norm_weight_gradient(x, features, self.epsilon, dy);
        }
        let (x, dy) = (
            Floats::of(NAME, "x", x)?,
            Floats::of(NAME, "the gradient", dy)?,
        );
        let features = weight.elem_count();
        let task = task_values(features);
        let tasks = x.par_chunks(task).zip(dy.par_chunks(task));
        let dw = sum_tasks(tasks, features, |dw, (x, dy)| {
            weight_gradient(x, dy, self.epsilon, dw);
        });
        Ok(Tensor::from_vec(dw, weight.shape(), &Device::Cpu)?)
    }
}

/// The mean of one row.
///
/// In f64: where a row lies far from zero, the mean's rounding would be an error of every value in it.
#[inline(always)]
fn mean(x: &[f32]) -> f64 {
    let mut lanes = [0f64; WIDTH];
    let (blocks, tail) = x.as_chunks::<WIDTH>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane += f64::from(*x);
        }
    }
    let tail: f64 = tail.iter().map(|&x| f64::from(x)).sum();
    (lanes.iter().sum::<f64>() + tail) / x.len() as f64
}

/// Writes `x - mean(x)` of one row and returns `1 / √(variance(x) + epsilon)`.
#[inline(always)]
fn centre<V: Lanes>(x: &[f32], epsilon: f32, centred: &mut [f32]) -> f32 {
    let mean = mean(x);
    for (centred, x) in centred.iter_mut().zip(x) {
        *centred = (f64::from(*x) - mean) as f32;
    }
    1.0 / (dot_inline::<V>(centred, centred) / x.len() as f32 + epsilon).sqrt()
}

vectorised! {
    fn normalise(x: &[f32], w: &[f32], bias: Option<&[f32]>, epsilon: f32, y: &mut [f32]) {
        for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
            let r = centre::<V>(x, epsilon, y);
            for (y, w) in y.iter_mut().zip(w) {
                *y *= r * w;
            }
            if let Some(bias) = bias {
                for (y, bias) in y.iter_mut().zip(bias) {
                    *y += bias;
                }
            }
        }
    }

    fn input_gradient(x: &[f32], w: &[f32], dy: &[f32], epsilon: f32, dx: &mut [f32]) {
        let features = w.len();
        let mut centred = vec![0f32; features];
        let rows = x.chunks_exact(features).zip(dy.chunks_exact(features));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(features)) {
            let r = centre::<V>(x, epsilon, &mut centred);
            for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(w) {
                *dx = dy * w;
            }
            let level = mean(dx) as f32;
            let along = dot_inline::<V>(dx, &centred) * r * r / features as f32;
            for (dx, centred) in dx.iter_mut().zip(&centred) {
                *dx = (*dx - level - centred * along) * r;
            }
        }
    }

    fn weight_gradient(x: &[f32], dy: &[f32], epsilon: f32, dw: &mut [f32]) {
        let mut centred = vec![0f32; dw.len()];
        for (x, dy) in x.chunks_exact(dw.len()).zip(dy.chunks_exact(dw.len())) {
            let r = centre::<V>(x, epsilon, &mut centred);
            for ((dw, centred), dy) in dw.iter_mut().zip(&centred).zip(dy) {
                *dw += centred * r * dy;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, check, random, variable};
    use candle_core::{D, DType};

    fn fast(t: &[Tensor]) -> Result<Tensor> {
        layer_norm(&t[0], &t[1], t.get(2), 0.1)
    }

    fn slow(t: &[Tensor]) -> Result<Tensor> {
        let centred = t[0].broadcast_sub(&t[0].mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let y = centred
            .broadcast_div(&(variance + 0.1)?.sqrt()?)?
            .broadcast_mul(&t[1])?;
        Ok(match t.get(2) {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    #[test]
    fn equals_its_composition() {
        for shape in [
            &[1, 1][..],
            &[1, 7],
            &[5, 64],
            &[203, 67],
            &[1100, 33],
            &[3, 5, 31],
        ] {
            let features = shape[shape.len() - 1];
            let arguments = [
                variable(1, shape),
                variable(2, &[features]),
                variable(3, &[features]),
            ];
            check(&arguments[..2], &fast, &slow, 1e-5);
            check(&arguments, &fast, &slow, 1e-5);
        }
    }

    #[test]
    fn a_large_common_offset_costs_no_accuracy() -> Result<()> {
        let arguments = [
            (random(1, &[7, 1001]) + 1000.0)?,
            random(2, &[1001]),
            random(3, &[1001]),
        ];
        let mut exact = Vec::new();
        for argument in &arguments {
            exact.push(argument.to_dtype(DType::F64)?);
        }
        let exact = slow(&exact)?.to_dtype(DType::F32)?;
        assert_close(
            "value",
            &fast(&arguments)?.flatten_all()?.to_vec1::<f32>()?,
            &exact.flatten_all()?.to_vec1::<f32>()?,
            1e-5,
        );
        Ok(())
    }

    #[test]
    fn a_view_is_taken_as_it_is_seen() -> Result<()> {
        let (x, weight, bias) = (random(1, &[7, 5]), random(2, &[7]), random(3, &[7]));
        let seen = layer_norm(&x.t()?, &weight, Some(&bias), 1e-6)?;
        let copied = layer_norm(&x.t()?.contiguous()?, &weight, Some(&bias), 1e-6)?;
        assert_eq!(seen.to_vec2::<f32>()?, copied.to_vec2::<f32>()?);
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_agree_are_an_error() {
        let x = random(1, &[3, 5]);
        let message = |weight: &[usize], bias: Option<&Tensor>| {
            layer_norm(&x, &random(2, weight), bias, 1e-6)
                .expect_err("refused")
                .to_string()
        };
        assert_eq!(
            message(&[4], None),
            "`layer norm`: x is [3, 5] but the weight is (4): the last dimension must be the weight's"
        );
        assert_eq!(
            message(&[5, 1], None),
            "`layer norm` needs the weight of shape [5] (one value per feature), its shape is [5, 1]"
        );
        assert_eq!(
            message(&[5], Some(&random(3, &[4]))),
            "`layer norm` needs the bias of shape [5] (one value per feature), its shape is [4]"
        );
    }

    #[test]
    fn nan_is_passed_on() -> Result<()> {
        let x = Tensor::new(&[[1f32, f32::NAN, 2.0]], &Device::Cpu)?;
        for bias in [None, Some(&random(3, &[3]))] {
            let y = layer_norm(&x, &random(2, &[3]), bias, 1e-6)?;
            assert!(
                y.flatten_all()?
                    .to_vec1::<f32>()?
                    .iter()
                    .all(|y| y.is_nan())
            );
        }
        Ok(())
    }
}
