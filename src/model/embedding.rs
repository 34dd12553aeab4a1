//! The token embedding: rows of a frozen (or trained) matrix, adapted where a method asked for it.

use super::linear::LinearWeight;
use crate::adapters::hooks::EmbeddingAdapter;
use crate::{Error, Result};
use candle_core::{Device, Tensor};

/// `(vocabulary, hidden)` rows by token id.
pub(super) struct Embedding {
    weight: LinearWeight,
    adapter: Option<Box<dyn EmbeddingAdapter>>,
}

impl Embedding {
    pub(super) fn new(weight: LinearWeight, adapter: Option<Box<dyn EmbeddingAdapter>>) -> Self {
        Self { weight, adapter }
    }

    /// The rows of `tokens`, f32 `(tokens, hidden)`.
    pub(super) fn forward(&self, tokens: &[u32]) -> Result<Tensor> {
        let ids = || Tensor::new(tokens, &Device::Cpu);
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
        match &self.adapter {
            Some(adapter) => adapter.forward(&ids()?, &rows),
            None => Ok(rows),
        }
    }

    /// The rows of `tokens` in the base alone.
    pub(super) fn base_rows(&self, tokens: &[u32]) -> Result<Tensor> {
        match &self.weight {
            LinearWeight::Frozen(weight) => weight.gather(tokens),
            LinearWeight::Trained(weight) => Ok(weight
                .detach()
                .index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?),
        }
    }

    pub(super) fn trains(&self) -> bool {
        self.adapter.is_some() || matches!(self.weight, LinearWeight::Trained(_))
    }

    pub(super) fn weight(&self) -> &LinearWeight {
        &self.weight
    }
}
