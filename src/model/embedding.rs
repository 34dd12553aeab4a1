//! The token embedding: rows of a frozen (or trained) matrix, adapted where a method asked for it.

use super::linear::LinearWeight;
use super::placement::Placement;
use crate::adapters::hooks::EmbeddingAdapter;
use crate::{Error, Result};
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
        let ids = || Tensor::new(tokens, &self.placement.device);
        let rows = match &self.weight {
            LinearWeight::Frozen(weight) => weight.gather(tokens)?,
            LinearWeight::Trained(weight) => {
                let vocabulary = weight.dim(0)?;
                if let Some(token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
                    return Err(Error::new(format!(
                        "token {token} is outside the vocabulary of {vocabulary}"
                    )));
                }
                weight.index_select(&ids()?, 0)?
            }
        };
        let rows = match &self.adapter {
            // Trained weights are f32, and so is what a method is given.
            Some(adapter) => adapter.forward(&ids()?, &rows.to_dtype(DType::F32)?)?,
            None => rows,
        };
        Ok(rows.to_dtype(self.placement.activations())?)
    }

    /// The rows of `tokens` in the base alone, f32.
    pub(super) fn base_rows(&self, tokens: &[u32]) -> Result<Tensor> {
        match &self.weight {
            LinearWeight::Frozen(weight) => Ok(weight.gather(tokens)?.to_dtype(DType::F32)?),
            LinearWeight::Trained(weight) => Ok(weight
                .detach()
                .index_select(&Tensor::new(tokens, &self.placement.device)?, 0)?),
        }
    }

    pub(super) fn trains(&self) -> bool {
        self.adapter.is_some() || matches!(self.weight, LinearWeight::Trained(_))
    }

    pub(super) fn weight(&self) -> &LinearWeight {
        &self.weight
    }
}
