//! Loads a checkpoint with one method injected: adapting happens while loading, not after.

use super::base_weights::{BaseWeights, RandomWeights};
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
use candle_core::{DType, Tensor};
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
    let (decoder, weights) = build(&config, (&checkpoint, folder), method, weights, tokenizer)?;
    Ok(Model {
        decoder,
        weights,
        fingerprint: checkpoint.fingerprint()?,
        config,
    })
}

/// A base of this shape with random weights in `dtype`, to measure what a method costs on it.
pub fn random(
    config: ModelConfig,
    dtype: DType,
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
) -> Result<Model> {
    made(config, &RandomWeights::new(dtype), method, weights)
}

/// As [`random`], but with the same weights in every block, in the memory of one.
pub fn repeated(
    config: ModelConfig,
    dtype: DType,
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
) -> Result<Model> {
    made(config, &RandomWeights::repeated(dtype), method, weights)
}

fn made(
    config: ModelConfig,
    base: &RandomWeights,
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
) -> Result<Model> {
    let nowhere = Path::new("random weights");
    let (decoder, weights) = build(&config, (base, nowhere), method, weights, None)?;
    Ok(Model {
        decoder,
        weights,
        fingerprint: String::new(),
        config,
    })
}

fn build(
    config: &ModelConfig,
    (base, place): (&dyn BaseWeights, &Path),
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
    tokenizer: Option<&Tokenizer>,
) -> Result<(Box<dyn CausalLm>, AdapterWeights)> {
    let injector = RefCell::new(Injector::new(method, weights, config.shape())?);
    let handed_out = HandedOut::default();
    let scope = Scope::root(base, &injector, &handed_out);
    let mut decoder = Decoder::load(config, &scope, handed_out.clone()).at(place.display())?;
    let mut injector = injector.into_inner();
    decoder.soft_prompt = injector.soft_prompt(&TokenRows {
        decoder: &decoder,
        tokenizer,
    })?;
    Ok((Box::new(decoder), injector.finish()?))
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
