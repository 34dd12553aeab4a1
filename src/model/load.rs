//! Loads a checkpoint with one method injected: adapting happens while loading, not after.

use super::base_weights::{BaseWeights, RandomWeights};
use super::causal_lm::CausalLm;
use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use super::decoder::Decoder;
use super::linear::HandedOut;
use super::placement::Placement;
use super::scope::Scope;
use crate::adapter_folder::{Adapter, OtherBase};
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

impl Model {
    /// Rows that a soft prompt puts before each sequence.
    pub fn prompt_rows(&self) -> usize {
        self.decoder.soft_prompt().map_or(0, |prompt| prompt.len())
    }
}

/// Loads the Hugging Face folder `folder`, asking `method` at every site. `weights` says whether the adapter is new
/// or read from a file; `tokenizer` is what a prompt that starts from a text needs.
pub fn load(
    folder: &Path,
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
    tokenizer: Option<&Tokenizer>,
) -> Result<Model> {
    load_on(&Placement::default(), folder, method, weights, tokenizer)
}

/// As [`load`], to compute on another device or in another type. Each weight goes to the device as it is read: no more
/// than one of them is in main memory. The trained weights go there too, wherever `weights` was to be.
pub fn load_on(
    placement: &Placement,
    folder: &Path,
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
    tokenizer: Option<&Tokenizer>,
) -> Result<Model> {
    let config = ModelConfig::read(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    let base = (&checkpoint as &dyn BaseWeights, folder);
    let (decoder, weights) = build(placement, &config, base, method, weights, tokenizer)?;
    Ok(Model {
        decoder,
        weights,
        fingerprint: checkpoint.fingerprint()?,
        config,
    })
}

/// Loads the base in `folder` with a saved adapter on it, as [`Adapter::load_onto`] does on the CPU in f32.
pub fn load_adapted(
    placement: &Placement,
    folder: &Path,
    adapter: &Adapter,
    tokenizer: Option<&Tokenizer>,
    other: OtherBase,
) -> Result<Model> {
    adapter.check_base(&Checkpoint::open(folder)?.fingerprint()?, other)?;
    let (method, weights) = (adapter.method.as_ref(), adapter.weights());
    load_on(placement, folder, method, weights, tokenizer).context(format!(
        "the adapter `{}` cannot be applied",
        adapter.folder().display()
    ))
}

/// A base of this shape with random weights in `dtype`, to measure what a method costs on it. For a GPU all blocks have the
/// same values, each in memory of its own: making others would take longer than what is measured.
pub fn random(
    placement: &Placement,
    config: ModelConfig,
    dtype: DType,
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
) -> Result<Model> {
    let base = match placement.device.is_cpu() {
        true => RandomWeights::new(dtype),
        false => RandomWeights::copied(dtype),
    };
    made(placement, config, &base, method, weights)
}

/// As [`random`], but with the same weights in every block, in the memory of one.
pub fn repeated(
    placement: &Placement,
    config: ModelConfig,
    dtype: DType,
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
) -> Result<Model> {
    let base = RandomWeights::repeated(dtype);
    made(placement, config, &base, method, weights)
}

fn made(
    placement: &Placement,
    config: ModelConfig,
    base: &RandomWeights,
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
) -> Result<Model> {
    let base = (base as &dyn BaseWeights, Path::new("random weights"));
    let (decoder, weights) = build(placement, &config, base, method, weights, None)?;
    Ok(Model {
        decoder,
        weights,
        fingerprint: String::new(),
        config,
    })
}

fn build(
    placement: &Placement,
    config: &ModelConfig,
    (base, place): (&dyn BaseWeights, &Path),
    method: &dyn AdapterMethod,
    weights: AdapterWeights,
    tokenizer: Option<&Tokenizer>,
) -> Result<(Box<dyn CausalLm>, AdapterWeights)> {
    let weights = weights.on(&placement.device);
    let injector = RefCell::new(Injector::new(method, weights, config.shape())?);
    let handed_out = HandedOut::default();
    let scope = Scope::root(base, &injector, &handed_out, placement);
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
