//! A base from scratch: tokenizer, random weights, training of all of them, a Hugging Face folder.
//!
//! This is how the bundled base was made. It is meant for small models: the text is held in memory, and everything is
//! computed by the [`Trainer`] that trains adapters, with a method that answers "train it" at every weight.

mod card;
mod everything;
mod initial;
mod packing;
mod shape;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use shape::{Shape, SpecialTokens};

use crate::adapters::storage::{AdapterWeights, write_bytes};
use crate::atomic::{AtomicFolder, Existing, check_writable};
use crate::data::{DataOptions, Dataset, Learn, Order, Tokenizer};
use crate::model::{self, Model};
use crate::train::{Checkpoints, Control, Event, Outcome, TrainOptions, TrainState, Trainer};
use crate::{Context, Error, Result};
use candle_core::{DType, Device, Tensor};
use everything::Everything;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use vocabulary::write_json;

/// Everything that decides what a base becomes, apart from the folder it goes to.
#[derive(Debug, Clone, PartialEq)]
pub struct PretrainOptions {
    /// The model and its tokenizer.
    pub shape: Shape,
    /// Data files, read one after the other: `text` and `messages` records, every token of which is learned.
    pub data: Vec<PathBuf>,
    /// How many records may be unusable.
    pub skip_bad: usize,
    /// Tokens of a segment.
    pub length: usize,
    /// Share of the documents that is only scored.
    pub eval_fraction: Option<f64>,
    /// The training loop; its examples are segments.
    pub training: TrainOptions,
}

/// Whether a run begins or goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// From random weights.
    Fresh,
    /// From the newest checkpoint: tokenizer and data are made again, and come out as they were.
    Checkpoint,
}

/// What a run tells its caller while it goes on.
pub enum Progress<'a> {
    /// A line on what was done.
    Message(&'a str),
    /// The loop begins: its last step, and the one it starts after.
    Training {
        /// Optimizer steps of the whole run.
        steps: usize,
        /// Steps that were taken before.
        done: usize,
    },
    /// Training goes on.
    Event(Event<'a>),
}

/// A finished base.
#[derive(Debug, Clone, PartialEq)]
pub struct Pretrained {
    /// Number of weights.
    pub parameters: usize,
    /// Tokens of the training segments: one epoch.
    pub tokens: usize,
    /// How the run went.
    pub state: TrainState,
    /// Steps of the run.
    pub outcome: Outcome,
}

/// Makes a base and puts it into the folder `out`; checkpoints go to `run`.
///
/// An interrupted run leaves a checkpoint and no base: [`Outcome::Interrupted`] says so.
pub fn pretrain(
    options: &PretrainOptions,
    out: &Path,
    run: &Path,
    start: Start,
    on_progress: &mut dyn FnMut(Progress) -> Result<Control>,
) -> Result<Pretrained> {
    check_length(options)?;
    check_writable(run)?;
    let mut tell = |line: String| on_progress(Progress::Message(&line)).map(drop);
    let folder = AtomicFolder::create(out, Existing::Refuse)?;
    let shape = &options.shape;

    let texts = vocabulary::texts(shape, &options.data)?;
    let bytes: usize = texts.iter().map(String::len).sum();
    vocabulary::write_tokenizer(folder.path(), shape, texts)?;
    let tokenizer = Tokenizer::load(folder.path())?;
    tell(format!("tokenizer: {} tokens learned from {bytes} bytes of text", shape.vocabulary))?;

    let (data, held_out) = segments(options, &tokenizer)?;
    tell(format!(
        "data: {} segments of {} tokens, {:.2} bytes a token; {} held out",
        data.len(),
        options.length,
        bytes as f64 / (data.report.tokens + held_out.as_ref().map_or(0, |held_out| held_out.report.tokens)) as f64,
        held_out.as_ref().map_or(0, Dataset::len),
    ))?;

    let model = random_model(folder.path(), options, &tokenizer)?;
    let parameters = model.weights.parameter_count();
    let mut order = Order::shuffled(data.len(), options.training.seed);
    let checkpoints = Checkpoints::of_run(run);
    let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, &options.training)?;
    let done = match start {
        Start::Fresh => 0,
        Start::Checkpoint => trainer.resume(&checkpoints)?,
    };
    let steps = trainer.total_steps(&order);
    tell(format!(
        "model: {parameters} weights, {} epochs of {} tokens",
        steps as f64 * options.training.batch_size as f64 / data.len() as f64,
        data.report.tokens
    ))?;
    on_progress(Progress::Training { steps, done })?;
    let outcome = trainer.run(&data, &mut order, held_out.as_ref(), Some(&checkpoints), &mut |event| {
        on_progress(Progress::Event(event))
    })?;
    let pretrained = Pretrained {
        parameters,
        tokens: data.report.tokens,
        state: trainer.state().clone(),
        outcome,
    };
    if outcome != Outcome::Interrupted {
        write_base(folder.path(), options, &tokenizer, &model)?;
        write_bytes(&folder.path().join("README.md"), card::model_card(options, &pretrained).as_bytes())?;
        folder.finish()?;
    }
    Ok(pretrained)
}

fn check_length(options: &PretrainOptions) -> Result<()> {
    let longest = options.shape.max_positions;
    if options.length < 2 || options.length > longest {
        return Err(Error::usage(format!("`--length` is {}, expected 2 to {longest} (`max_positions`)", options.length)));
    }
    Ok(())
}

/// The training segments and those that are only scored. Documents are told apart before they are cut.
fn segments(options: &PretrainOptions, tokenizer: &Tokenizer) -> Result<(Dataset, Option<Dataset>)> {
    let records = DataOptions {
        learn: Learn::All,
        max_length: None,
        skip_bad: options.skip_bad,
    };
    let eos = tokenizer.eos().ok_or_else(|| Error::new("the tokenizer has no end-of-text token"))?;
    let documents = Dataset::load(&options.data, tokenizer, &records)?;
    match options.eval_fraction {
        None => Ok((packing::packed(documents, options.length, eos)?, None)),
        Some(share) => {
            let (documents, held_out) = documents.split(share, options.training.seed)?;
            let held_out = packing::packed(held_out, options.length, eos).context("too little text is held out")?;
            Ok((packing::packed(documents, options.length, eos)?, Some(held_out)))
        }
    }
}

/// The model with random weights, all of them trained. Its f32 folder lies inside `folder` while it is read.
fn random_model(folder: &Path, options: &PretrainOptions, tokenizer: &Tokenizer) -> Result<Model> {
    let start = tempfile::Builder::new().prefix(".start-").tempdir_in(folder).at(folder.display())?;
    let config = initial::config_json(&options.shape, tokenizer, DType::F32)?;
    write_json(&start.path().join("config.json"), &config)?;
    initial::write_random_weights(start.path(), options.training.seed)?;
    let weights = AdapterWeights::fresh(options.training.seed, &Device::Cpu);
    model::load(start.path(), &Everything, weights, None)
}

/// Writes configuration and weights beside the tokenizer.
fn write_base(folder: &Path, options: &PretrainOptions, tokenizer: &Tokenizer, model: &Model) -> Result<()> {
    let shape = &options.shape;
    write_json(&folder.join("config.json"), &initial::config_json(shape, tokenizer, shape.dtype)?)?;
    write_json(&folder.join("generation_config.json"), &initial::generation_config_json(shape, tokenizer)?)?;
    let tensors = model
        .weights
        .iter()
        .map(|(name, var)| {
            let name = name.strip_prefix("base_model.model.").unwrap_or(name);
            Ok((name.to_owned(), var.as_tensor().to_dtype(shape.dtype)?))
        })
        .collect::<Result<_>>()?;
    write_weights(folder, &tensors)
}

fn write_weights(folder: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let file = folder.join("model.safetensors");
    // transformers refuses a file that does not say this.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let bytes = safetensors::serialize(tensors, Some(metadata)).at(file.display())?;
    write_bytes(&file, &bytes)
}
