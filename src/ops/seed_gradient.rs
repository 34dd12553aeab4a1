//! A loss whose gradient is already known.

#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::expect_shape;
use super::graph::{Backward, record};
use crate::Result;
use candle_core::{DType, Tensor};

/// A scalar whose `backward()` delivers `gradient` to `output`.
///
/// Recomputation runs a block again, with history, when the gradient of its output has arrived from above: this starts
/// the backward of that block alone. The scalar's value is 0; `gradient` has the shape of `output` and is what is saved.
pub fn seed_gradient(output: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    expect_shape(
        NAME,
        "the gradient",
        gradient,
        output.dims(),
        "the shape of the output",
    )?;
    let gradient = gradient.detach();
    #[cfg(feature = "cuda")]
    if output.device().is_cuda() {
        let zero = cuda::zero(output.device())?;
        return record([output], zero, (), Seed { gradient });
    }
    record([output], vec![0f32], (), Seed { gradient })
}

const NAME: &str = "seed gradient";

struct Seed {
    gradient: Tensor,
}

impl Backward<1> for Seed {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        _: [&Tensor; 1],
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        #[cfg(feature = "cuda")]
        if upstream.device().is_cuda() {
            return Ok([Some(cuda::times(&self.gradient, upstream)?)]);
        }
        let factor = upstream.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        Ok([Some(if factor == 1.0 {
            self.gradient.clone()
        } else {
            (&self.gradient * factor)?
        })])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{random, variable};

    #[test]
    fn the_gradient_arrives_as_it_was_given() -> Result<()> {
        let (x, gradient) = (variable(1, &[3, 5]), random(2, &[3, 5]));
        let output = (x.as_tensor() * 2.0)?;
        let wanted = (&gradient * 2.0)?.to_vec2::<f32>()?;
        let seed = seed_gradient(&output, &gradient)?;
        assert_eq!(seed.to_scalar::<f32>()?, 0.0);
        let store = seed.backward()?;
        assert_eq!(
            store.get(&x).expect("x is tracked").to_vec2::<f32>()?,
            wanted
        );
        let half = (seed * 0.5)?.backward()?;
        assert_eq!(
            half.get(&x).expect("x is tracked").to_vec2::<f32>()?,
            gradient.to_vec2::<f32>()?
        );
        Ok(())
    }

    #[test]
    fn a_gradient_of_another_shape_is_an_error() {
        assert!(seed_gradient(&random(1, &[3, 5]), &random(2, &[5, 3])).is_err());
    }
}
