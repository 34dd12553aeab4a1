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
use crate::atomic::{AtomicFolder, Existing};
use crate::data::{DataOptions, Dataset, Learn, Order, Tokenizer};
use crate::digest::hexadecimal;
use crate::model::{self, Model, Placement};
use crate::train::{
    Checkpoints, Control, Event, Moved, Outcome, TrainOptions, TrainState, Trainer,
};
use crate::{Context, Error, Result};
use candle_core::{DType, Device, Tensor};
use everything::Everything;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use vocabulary::write_json;

/// What a run begins as: a file in its folder, by which the run is known.
pub(crate) const RUN_FILE: &str = "run.json";

/// The model that is wanted, and the text it is to learn from.
#[derive(Debug, Clone, PartialEq)]
pub struct PretrainOptions {
    /// The model and its tokenizer.
    pub shape: Shape,
    /// Data files, read one after the other: every token of every record is learned.
    pub data: Vec<PathBuf>,
    /// How many records may be unusable.
    pub skip_bad: usize,
    /// Tokens of a segment.
    pub length: usize,
    /// Share of the documents that is only scored.
    pub eval_fraction: Option<f64>,
    /// Seed of everything random.
    pub seed: u64,
}

/// A base that has its tokenizer and its text, and no weights yet.
pub struct Pretraining {
    options: PretrainOptions,
    folder: AtomicFolder,
    tokenizer: Tokenizer,
    /// Bytes of text in the data, without special tokens.
    pub text_bytes: usize,
    /// The segments to learn from.
    pub data: Dataset,
    /// The segments that are only scored.
    pub held_out: Option<Dataset>,
}

/// Whether a run begins or goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// From random weights.
    Fresh,
    /// From the newest checkpoint. Tokenizer and data were made again, and came out as they were.
    Checkpoint,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Pretrained {
    /// Number of weights.
    pub parameters: usize,
    /// Whether there is a base: an interrupted run leaves a checkpoint only.
    pub outcome: Outcome,
    /// Where the run stands.
    pub state: TrainState,
}

impl Pretraining {
    /// Learns a tokenizer from the text and cuts the text into segments. The base will be the folder `out`, which
    /// appears when it is finished.
    pub fn prepare(options: PretrainOptions, out: &Path) -> Result<Self> {
        let longest = options.shape.max_positions;
        if options.length < 2 || options.length > longest {
            return Err(Error::usage(format!(
                "`--length` is {}, expected 2 to {longest} (`max_positions` of the shape)",
                options.length
            )));
        }
        let folder = AtomicFolder::create(out, Existing::Refuse)?;
        let texts = vocabulary::texts(&options.shape, &options.data)?;
        let text_bytes = texts.pieces.iter().map(String::len).sum();
        vocabulary::write_tokenizer(folder.path(), &options.shape, texts)?;
        let tokenizer = Tokenizer::load(folder.path())?;
        let (data, held_out) = segments(&options, &tokenizer)?;
        Ok(Self {
            options,
            folder,
            tokenizer,
            text_bytes,
            data,
            held_out,
        })
    }

    /// Trains all weights and gives the folder its name; checkpoints go to the folder `run`.
    pub fn train(
        self,
        training: &TrainOptions,
        run: &Path,
        start: Start,
        on_event: &mut dyn FnMut(Event) -> Result<Control>,
    ) -> Result<Pretrained> {
        let model = random_model(self.folder.path(), &self.options, &self.tokenizer)?;
        let mut order = Order::shuffled(self.data.len(), training.seed);
        let checkpoints = Checkpoints::of_run(run);
        self.check_run(training, run, start)?;
        let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, training)?;
        if start == Start::Checkpoint {
            trainer.resume(&checkpoints)?;
        }
        let outcome = trainer.run(
            &self.data,
            &mut order,
            self.held_out.as_ref(),
            Some(&checkpoints),
            on_event,
        )?;
        let pretrained = Pretrained {
            parameters: model.weights.parameter_count(),
            outcome,
            state: trainer.state().clone(),
        };
        if outcome != Outcome::Interrupted {
            let folder = self.folder.path();
            write_base(folder, &self.options.shape, &self.tokenizer, &model)?;
            let card = card::model_card(&self.options, training, &pretrained);
            write_bytes(&folder.join("README.md"), card.as_bytes())?;
            self.folder.finish()?;
        }
        Ok(pretrained)
    }

    /// Notes what a run begins as, and makes sure that it goes on as that.
    fn check_run(&self, training: &TrainOptions, run: &Path, start: Start) -> Result<()> {
        check_run_folder(run, start)?;
        let file = run.join(RUN_FILE);
        let identity = self.identity(training)?;
        match start {
            Start::Fresh => {
                std::fs::create_dir_all(run).at(run.display())?;
                write_json(&file, &identity)
            }
            Start::Checkpoint => {
                let text = std::fs::read(&file).at(file.display())?;
                let begun: Value = serde_json::from_slice(&text).at(file.display())?;
                let other: Vec<&str> = ["model", "text", "seed", "training"]
                    .into_iter()
                    .filter(|part| begun[*part] != identity[*part])
                    .collect();
                if other.is_empty() {
                    return Ok(());
                }
                Err(Error::new(format!(
                    "the run was begun with another {}",
                    other.join(" and another ")
                ))
                .at(file.display())
                .hint("give the same files and options as then, beside `--resume`"))
            }
        }
    }

    /// All that the weights depend on.
    fn identity(&self, training: &TrainOptions) -> Result<Value> {
        let mut hash = Sha256::new();
        for data in [Some(&self.data), self.held_out.as_ref()]
            .into_iter()
            .flatten()
        {
            for token in data.examples.iter().flat_map(|example| &example.tokens) {
                hash.update(token.to_le_bytes());
            }
            hash.update([0xff; 8]);
        }
        let hash = hexadecimal(&hash.finalize());
        let identity = json!({
            "model": initial::config_json(&self.options.shape, &self.tokenizer, DType::F32)?,
            "text": { "segments": self.data.len(), "length": self.options.length, "sha256": hash },
            "seed": self.options.seed,
            "training": serde_json::to_value(training).context("cannot write the options")?,
            "machine": Placement::default().machine(),
        });
        // Numbers as they come back from a file.
        let text = identity.to_string();
        serde_json::from_str(&text).context("cannot write the options")
    }
}

/// Where the run in the folder `run` was begun, if that is elsewhere than here and known.
pub fn moved(run: &Path) -> Result<Option<Moved>> {
    let file = run.join(RUN_FILE);
    let text = std::fs::read(&file).at(file.display())?;
    let begun: Value = serde_json::from_slice(&text).at(file.display())?;
    let from = begun["machine"].as_str().map(str::to_owned);
    Ok(Moved::between(&from, &Some(Placement::default().machine())))
}

/// Makes sure that a run begins in a folder without checkpoints, and goes on from one.
pub fn check_run_folder(run: &Path, start: Start) -> Result<()> {
    let newest = Checkpoints::of_run(run).newest_folder()?;
    match (start, newest) {
        (Start::Fresh, Some(_)) => {
            Err(Error::new("the folder holds checkpoints of an earlier run")
                .at(run.display())
                .hint("go on with them by `--resume`, or remove the folder"))
        }
        (Start::Checkpoint, None) => Err(Error::new("no checkpoint to resume from")
            .at(run.display())
            .hint("a run leaves checkpoints with `--save-every N`, and when it is interrupted")),
        _ => Ok(()),
    }
}

/// The training segments and those that are only scored. Documents are told apart before they are cut.
fn segments(
    options: &PretrainOptions,
    tokenizer: &Tokenizer,
) -> Result<(Dataset, Option<Dataset>)> {
    let records = DataOptions {
        learn: Learn::All,
        max_length: None,
        skip_bad: options.skip_bad,
    };
    let end = tokenizer
        .eos()
        .ok_or_else(|| Error::new("the tokenizer has no end-of-text token"))?;
    let documents = Dataset::load(&options.data, tokenizer, &records)?;
    let Some(share) = options.eval_fraction else {
        return Ok((packing::packed(documents, options.length, end)?, None));
    };
    let (documents, held_out) = documents.split(share, options.seed)?;
    let held_out =
        packing::packed(held_out, options.length, end).context("too little text is held out")?;
    Ok((
        packing::packed(documents, options.length, end)?,
        Some(held_out),
    ))
}

/// The model with random weights, all of them trained. Its f32 folder lies inside `folder` while it is read.
fn random_model(folder: &Path, options: &PretrainOptions, tokenizer: &Tokenizer) -> Result<Model> {
    let start = tempfile::Builder::new()
        .prefix(".start-")
        .tempdir_in(folder)
        .at(folder.display())?;
    let config = initial::config_json(&options.shape, tokenizer, DType::F32)?;
    write_json(&start.path().join("config.json"), &config)?;
    initial::write_random_weights(start.path(), options.seed)?;
    let weights = AdapterWeights::fresh(options.seed, &Device::Cpu);
    let model = model::load(start.path(), &Everything, weights, None)?;
    start.close().at(folder.display())?;
    Ok(model)
}

/// Writes configuration and weights beside the tokenizer.
fn write_base(folder: &Path, shape: &Shape, tokenizer: &Tokenizer, model: &Model) -> Result<()> {
    let config = initial::config_json(shape, tokenizer, shape.dtype)?;
    write_json(&folder.join("config.json"), &config)?;
    let generation = initial::generation_config_json(shape, tokenizer)?;
    write_json(&folder.join("generation_config.json"), &generation)?;
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
