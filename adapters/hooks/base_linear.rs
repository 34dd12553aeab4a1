//! The frozen linear layer as a method sees it.

use crate::Result;
use candle_core::Tensor;

/// A frozen linear layer `y = x Wᵀ + b`, whatever its weight is stored as.
pub trait BaseLinear {
    /// `x Wᵀ + b`: `x` is `(rows, in_features)`, the result `(rows, out_features)`, both f32. Differentiable in `x`.
    fn forward(&self, x: &Tensor) -> Result<Tensor>;

    /// The frozen weight in f32, `(out_features, in_features)`: made anew on each call, so keep it out of hot paths.
    fn weight(&self) -> Result<Tensor>;

    /// Length of an input row.
    fn in_features(&self) -> usize;

    /// Length of an output row.
    fn out_features(&self) -> usize;
}
