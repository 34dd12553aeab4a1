//! The token embedding: rows of a frozen (or trained) matrix, adapted where a method asked for it.

use super::linear::LinearWeight;
use super::placement::Placement;
use crate::Result;
use crate::adapters::hooks::{EmbeddingAdapter, LowRank};
use crate::ops;
use candle_core::{DType, Tensor};

/// `(vocabulary, hidden)` rows by token id.
pub(super) struct Embedding {
    weight: LinearWeight,
    adapter: Option<Box<dyn EmbeddingAdapter>>,
    placement: Placement,
}

impl Embedding {
    pub(super) fn new(
        weight: LinearWeight,
        adapter: Option<Box<dyn EmbeddingAdapter>>,
        placement: &Placement,
    ) -> Self {
        Self {
            weight,
            adapter,
            placement: placement.clone(),
        }
    }

    /// The rows of `tokens`, `(tokens, hidden)`, in the type of activations.
    pub(super) fn forward(&self, tokens: &[u32]) -> Result<Tensor> {
        let rows = match &self.weight {
            LinearWeight::Frozen(weight) => weight.gather(tokens)?,
            LinearWeight::Trained(weight) => ops::look_up(weight, tokens)?,
        };
        let Some(adapter) = &self.adapter else {
            return Ok(rows.to_dtype(self.placement.activations())?);
        };
        // Trained weights are f32, and so is what a method is given.
        let base = rows.to_dtype(DType::F32)?;
        let rows = match adapter.low_rank() {
            Some(LowRank { a, b, scale, .. }) => {
                let inner = ops::look_up(&a.t()?, tokens)?; // (tokens, rank)
                (base + (inner.matmul(&b.t()?)? * scale)?)?
            }
            None => adapter.forward(&Tensor::new(tokens, &self.placement.device)?, &base)?,
        };
        Ok(rows.to_dtype(self.placement.activations())?)
    }

    /// The rows of `tokens` in the base alone, f32.
    pub(super) fn base_rows(&self, tokens: &[u32]) -> Result<Tensor> {
        match &self.weight {
            LinearWeight::Frozen(weight) => Ok(weight.gather(tokens)?.to_dtype(DType::F32)?),
            LinearWeight::Trained(weight) => ops::look_up(&weight.detach(), tokens),
        }
    }

    pub(super) fn trains(&self) -> bool {
        self.adapter.is_some() || matches!(self.weight, LinearWeight::Trained(_))
    }

    pub(super) fn weight(&self) -> &LinearWeight {
        &self.weight
    }
}
