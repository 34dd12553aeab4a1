//! Loads a checkpoint with one method injected: adapting happens while loading, not after.

use super::causal_lm::CausalLm;
use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use super::decoder::Decoder;
use super::linear::HandedOut;
use super::scope::Scope;
use crate::adapters::hooks::{AdapterMethod, Injector, TextRows};
use crate::adapters::storage::AdapterWeights;
use crate::data::{AddSpecial, Tokenizer};
use crate::{Context, Error, Result};
use candle_core::Tensor;
use std::cell::RefCell;
use std::path::Path;

/// A base with an adapter in it.
pub struct Model {
    /// The decoder.
    pub decoder: Box<dyn CausalLm>,
    /// What is trained, or was.
    pub weights: AdapterWeights,
    /// What config.json says.
    pub config: ModelConfig,
    /// Identity of the base's weights, for the adapter folder.
    pub fingerprint: String,
}

/// Loads the Hugging Face folder `folder`, asking `method` at every site. `weights` says whether the adapter is new
/// or read from a file; `tokenizer` is what a prompt that starts from a text needs.
pub fn load(
    folder: &Path,
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
    tokenizer: Option<&Tokenizer>,
) -> Result<Model> {
    let config = ModelConfig::read(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    let injector = RefCell::new(Injector::new(method, weights, config.shape())?);
    let handed_out = HandedOut::default();
    let scope = Scope::root(&checkpoint, &injector, &handed_out);
    let mut decoder = Decoder::load(&config, &scope, handed_out.clone()).at(folder.display())?;
    let mut injector = injector.into_inner();
    decoder.soft_prompt = injector.soft_prompt(&TokenRows {
        decoder: &decoder,
        tokenizer,
    })?;
    Ok(Model {
        decoder: Box::new(decoder),
        weights: injector.finish()?,
        fingerprint: checkpoint.fingerprint()?,
        config,
    })
}

struct TokenRows<'a> {
    decoder: &'a Decoder,
    tokenizer: Option<&'a Tokenizer>,
}

impl TextRows for TokenRows<'_> {
    fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer.ok_or_else(|| {
            Error::new("a prompt that starts from a text needs the model's tokenizer")
        })?;
        tokenizer.encode(text, AddSpecial::No)
    }

    fn rows(&self, tokens: &[u32]) -> Result<Tensor> {
        self.decoder.base_rows(tokens)
    }
}
