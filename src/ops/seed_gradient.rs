//! A loss whose gradient is already known.

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
    record([output], vec![0.0], (), Seed { gradient })
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
        let factor = upstream.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        Ok([Some(if factor == 1.0 {
            self.gradient.clone()
        } else {
            (&self.gradient * factor)?
        })])
    }
}
