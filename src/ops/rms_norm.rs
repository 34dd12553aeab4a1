//! Root-mean-square normalisation.

use super::buffers;
#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::{Floats, expect_shape};
use super::gemm::Destination;
use super::graph::{Backward, record};
use super::kernels::dot_inline;
use super::lanes::Lanes;
use super::rows::{sum_tasks, task_values};
use super::vectorised::vectorised;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// `y = w · x / √(mean(x²) + epsilon)` over the last dimension.
///
/// `x` is `(…, features)` and `w` `(features)`: rows may be tokens or heads. With `r = 1 / √(mean(x²) + epsilon)` the
/// gradients are `dx = r·w·dy - x·r³·mean(w·dy·x)` and `dw = Σ r·x·dy` over the rows, each only where it is tracked.
/// Nothing is saved but the arguments; `r` is made again.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    let features = weight.elem_count();
    expect_shape(
        NAME,
        "the weight",
        weight,
        &[features],
        "one value per feature",
    )?;
    if features == 0 || x.dims().last() != Some(&features) {
        return Err(Error::new(format!(
            "`{NAME}`: x is {:?} but the weight is ({features}): the last dimension must be the weight's",
            x.dims()
        )));
    }
    let (x, weight) = (&x.contiguous()?, &weight.contiguous()?);
    let epsilon = epsilon as f32;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let y = cuda::rms_norm(x, weight, epsilon)?;
        return record([x, weight], y, x.shape(), RmsNorm { epsilon });
    }
    let mut y = buffers::take(x.elem_count());
    {
        let (x, weight) = (
            Floats::of(NAME, "x", x)?,
            Floats::of(NAME, "the weight", weight)?,
        );
        let task = task_values(features);
        x.par_chunks(task)
            .zip(y.par_chunks_mut(task))
            .for_each(|(x, y)| normalise(x, &weight, epsilon, y));
    }
    record([x, weight], y, x.shape(), RmsNorm { epsilon })
}

const NAME: &str = "rms norm";

struct RmsNorm {
    epsilon: f32,
}

impl Backward<2> for RmsNorm {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        [x, weight]: [&Tensor; 2],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let dx = match x.track_op() {
            true => Some(rms_norm_input_gradient(
                x,
                weight,
                self.epsilon,
                gradient,
                None,
            )?),
            false => None,
        };
        let dw = match weight.track_op() {
            true => Some(rms_norm_weight_gradient(x, weight, self.epsilon, gradient)?),
            false => None,
        };
        Ok([dx, dw])
    }
}

/// The gradient of [`rms_norm`] for `x`, of its shape, added to `onto` where there is one.
pub(crate) fn rms_norm_input_gradient(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    dy: &Tensor,
    onto: Option<Tensor>,
) -> Result<Tensor> {
    let (x, dy) = (x.contiguous()?, dy.contiguous()?);
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::rms_norm_input_gradient(&x, weight, epsilon, &dy, onto);
    }
    let (mut dx, destination) = buffers::sum(onto, x.elem_count())?;
    {
        let x = Floats::of(NAME, "x", &x)?;
        let w = Floats::of(NAME, "the weight", weight)?;
        let dy = Floats::of(NAME, "the gradient", &dy)?;
        let task = task_values(w.len());
        x.par_chunks(task)
            .zip(dy.par_chunks(task))
            .zip(dx.par_chunks_mut(task))
            .for_each(|((x, dy), dx)| match destination {
                Destination::Overwrite => input_gradient(x, &w, dy, epsilon, dx),
                Destination::Add => add_input_gradient(x, &w, dy, epsilon, dx),
            });
    }
    Ok(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)
}

/// The gradient of [`rms_norm`] for its weight, of the weight's shape.
pub(crate) fn rms_norm_weight_gradient(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    dy: &Tensor,
) -> Result<Tensor> {
    let (x, dy) = (x.contiguous()?, dy.contiguous()?);
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::rms_norm_weight_gradient(&x, weight.elem_count(), epsilon, &dy);
    }
    let (x, dy) = (
        Floats::of(NAME, "x", &x)?,
        Floats::of(NAME, "the gradient", &dy)?,
    );
    let features = weight.elem_count();
    let task = task_values(features);
    let tasks = x.par_chunks(task).zip(dy.par_chunks(task));
    let dw = sum_tasks(tasks, features, |dw, (x, dy)| {
        weight_gradient(x, dy, epsilon, dw);
    });
    Ok(Tensor::from_vec(dw, weight.shape(), &Device::Cpu)?)
}

/// `1 / √(mean(x²) + epsilon)` of one row.
#[inline(always)]
fn inverse_rms<V: Lanes>(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (dot_inline::<V>(x, x) / x.len() as f32 + epsilon).sqrt()
}

vectorised! {
    fn normalise(x: &[f32], w: &[f32], epsilon: f32, y: &mut [f32]) {
        for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
            let r = inverse_rms::<V>(x, epsilon);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = x * r * w;
            }
        }
    }

    fn input_gradient(x: &[f32], w: &[f32], dy: &[f32], epsilon: f32, dx: &mut [f32]) {
        let features = w.len();
        let rows = x.chunks_exact(features).zip(dy.chunks_exact(features));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(features)) {
            let r = inverse_rms::<V>(x, epsilon);
            for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(w) {
                *dx = dy * w;
            }
            let along = dot_inline::<V>(dx, x) * r * r * r / features as f32;
            for (dx, x) in dx.iter_mut().zip(x) {
                *dx = *dx * r - x * along;
            }
        }
    }

    fn add_input_gradient(x: &[f32], w: &[f32], dy: &[f32], epsilon: f32, dx: &mut [f32]) {
        let features = w.len();
        let mut scaled = vec![0f32; features];
        let rows = x.chunks_exact(features).zip(dy.chunks_exact(features));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(features)) {
            let r = inverse_rms::<V>(x, epsilon);
            for ((scaled, dy), w) in scaled.iter_mut().zip(dy).zip(w) {
                *scaled = dy * w;
            }
            let along = dot_inline::<V>(&scaled, x) * r * r * r / features as f32;
            for ((dx, scaled), x) in dx.iter_mut().zip(&scaled).zip(x) {
                *dx += scaled * r - x * along;
            }
        }
    }

    fn weight_gradient(x: &[f32], dy: &[f32], epsilon: f32, dw: &mut [f32]) {
        for (x, dy) in x.chunks_exact(dw.len()).zip(dy.chunks_exact(dw.len())) {
            let r = inverse_rms::<V>(x, epsilon);
            for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                *dw += x * r * dy;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, random, variable};
    use candle_core::D;

    fn slow(arguments: &[Tensor]) -> Result<Tensor> {
        let [x, weight] = arguments else {
            unreachable!("two arguments")
        };
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        Ok(x.broadcast_div(&(mean + 0.1)?.sqrt()?)?
            .broadcast_mul(weight)?)
    }

    #[test]
    fn equals_its_composition() {
        for shape in [
            &[1, 1][..],
            &[1, 7],
            &[5, 64],
            &[203, 67],
            &[600, 33],
            &[3, 5, 31],
        ] {
            let features = shape[shape.len() - 1];
            let arguments = [variable(1, shape), variable(2, &[features])];
            check(&arguments, &|t| rms_norm(&t[0], &t[1], 0.1), &slow, 1e-5);
        }
    }

    #[test]
    fn a_view_is_taken_as_it_is_seen() -> Result<()> {
        let (x, weight) = (random(1, &[7, 5]), random(2, &[7]));
        let seen = rms_norm(&x.t()?, &weight, 1e-6)?;
        let copied = rms_norm(&x.t()?.contiguous()?, &weight, 1e-6)?;
        assert_eq!(seen.to_vec2::<f32>()?, copied.to_vec2::<f32>()?);
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_agree_are_an_error() {
        let error = rms_norm(&random(1, &[3, 5]), &random(2, &[4]), 1e-6).expect_err("5 is not 4");
        assert_eq!(
            error.to_string(),
            "`rms norm`: x is [3, 5] but the weight is (4): the last dimension must be the weight's"
        );
    }

    #[test]
    fn nan_is_passed_on() -> Result<()> {
        let x = Tensor::new(&[[1f32, f32::NAN, 2.0]], &Device::Cpu)?;
        let y = rms_norm(&x, &random(2, &[3]), 1e-6)?;
        assert!(
            y.flatten_all()?
                .to_vec1::<f32>()?
                .iter()
                .all(|y| y.is_nan())
        );
        Ok(())
    }
}
