//! Options that several commands share.

use super::memory_limit::refuse_large_base;
use super::note;
use super::placement::PlacementArgs;
use super::progress::Show;
use crate::adapter_folder::{Adapter, OtherBase};
use crate::adapters::hooks::NoAdapter;
use crate::adapters::storage::AdapterWeights;
use crate::data::{DataOptions, Dataset, Learn, TemplateDate, Tokenizer};
use crate::inspect::unused_weights;
use crate::model::checkpoint::Checkpoint;
use crate::model::{self, Model, ModelConfig, Placement};
use crate::train::{Budget, CacheType, OnNonfinite, Recompute, Schedule, TrainOptions};
use crate::{Error, Result};
use candle_core::{DType, Device};
use clap::Args;
use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use toml::Value;

/// The base model and the machine.
#[derive(Debug, Clone, Args)]
pub(super) struct ModelArgs {
    /// Base model: a Hugging Face folder, or a hub id such as `org/name` or `org/name@revision`
    #[arg(long, value_name = "DIR|ID")]
    pub(super) model: String,

    /// Jinja chat template to use instead of the model's own
    #[arg(long, value_name = "FILE")]
    pub(super) chat_template: Option<PathBuf>,

    /// Date and time that chat templates read, such as 2026-11-22T10:00:00 [default: now, in UTC]
    #[arg(long, value_name = "DATE")]
    template_date: Option<TemplateDate>,

    /// The date, once there is a template that reads it.
    #[arg(skip)]
    date_read: OnceLock<TemplateDate>,

    #[command(flatten)]
    placement: PlacementArgs,

    /// Number of threads; results do not depend on it [default: all cores]
    #[arg(long, value_name = "N", value_parser = thread_count)]
    pub(super) threads: Option<usize>,
}

/// Parses `--threads`: at least one, and not so many that starting them takes longer than the work.
pub(super) fn thread_count(text: &str) -> std::result::Result<usize, String> {
    const MOST: usize = 1024;
    match text.parse() {
        Ok(count @ 1..=MOST) => Ok(count),
        _ => Err(format!("expected 1 to {MOST}")),
    }
}

/// Parses a number of things of which there must be one.
pub(super) fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("expected a whole number".to_owned()),
    }
}

/// Computes on so many threads from now on, or on one for each core.
pub(super) fn set_threads(threads: Option<usize>) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0));
    match pool.build_global() {
        Err(error) if error.source().is_some() => Err(Error::new(format!(
            "the threads cannot be started: {error}"
        ))
        .hint("fewer may fit: `--threads 1`")),
        // The pool exists already, with the size of the same option.
        _ => Ok(()),
    }
}

impl ModelArgs {
    /// The base's folder; downloads it first if it is a hub id. Sets up threads as well.
    pub(super) fn folder(&self, show: Show) -> Result<PathBuf> {
        set_threads(self.threads)?;
        self.placement.check()?;
        super::hub::resolve(&self.model, show)
    }

    /// Where to compute, and in what type, for the base in `folder`. What is unusual about the base is said here.
    pub(super) fn placement(&self, folder: &Path, show: Show) -> Result<Placement> {
        // What is wrong with the configuration is said when the base is loaded.
        let config = ModelConfig::read(folder).ok();
        if let Some(config) = &config {
            warn_of_base(folder, config, show);
        }
        let stored = config.and_then(|config| config.dtype);
        self.placement.open(stored.unwrap_or(DType::F32), show)
    }

    /// The base's tokenizer, with the chat template and the date that were asked for.
    pub(super) fn tokenizer(&self, folder: &Path) -> Result<Tokenizer> {
        let mut tokenizer = Tokenizer::load(folder)?;
        if let Some(file) = &self.chat_template {
            tokenizer.set_chat_template_file(file)?;
        }
        if let Some(date) = self.template_date {
            tokenizer.set_template_date(date);
        }
        match (date_read(&tokenizer), self.template_date) {
            (Some(date), _) => {
                self.date_read.get_or_init(|| date);
            }
            (None, None) => {}
            (None, Some(_)) => {
                return Err(Error::usage(
                    "`--template-date` has no effect: the model has no chat template that reads the date",
                )
                .hint("leave it out"));
            }
        }
        Ok(tokenizer)
    }

    /// What a run file says of the date that the template of [`Self::tokenizer`] reads, if it reads one, so that the run
    /// renders the same when it goes on.
    pub(super) fn settled_date(&self) -> Option<(&'static str, Value)> {
        let date = self.date_read.get()?;
        Some(("template-date", Value::String(date.to_string())))
    }
}

/// The date that the tokenizer's chat template reads, if it does.
fn date_read(tokenizer: &Tokenizer) -> Option<TemplateDate> {
    tokenizer.chat_template().ok()?.date_read()
}

/// Says what is unusual about the base in `folder`, which has this configuration.
pub(super) fn warn_of_base(folder: &Path, config: &ModelConfig, show: Show) {
    for text in &config.notes {
        note(show, &format!("warning: {text}"));
    }
    let checkpoint = Checkpoint::open(folder).ok();
    if let Some(text) = checkpoint.and_then(|checkpoint| unused_weights(&checkpoint, config)) {
        note(
            show,
            &format!("warning: {text}; what `config.json` does not ask for is not used"),
        );
    }
}

/// Which records to learn from, and how.
#[derive(Debug, Clone, Args)]
pub(super) struct RecordArgs {
    /// What the loss counts: `completions` (assistant turns and completions) or `all` tokens
    #[arg(long, value_enum, default_value_t = LearnChoice::Completions, value_name = "WHAT", help_heading = "Data")]
    pub(super) learn: LearnChoice,

    /// Cut examples to this many tokens; how many were cut is reported [default: the model's longest]
    #[arg(long, value_name = "TOKENS", help_heading = "Data")]
    pub(super) max_length: Option<usize>,

    /// Go on although up to this many records cannot be used
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Data")]
    pub(super) skip_bad_records: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum LearnChoice {
    Completions,
    All,
}

impl RecordArgs {
    /// Reads `files` into examples, cut to `longest` tokens unless told otherwise.
    pub(super) fn load(
        &self,
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        longest: usize,
        show: Show,
    ) -> Result<Dataset> {
        let options = DataOptions {
            learn: match self.learn {
                LearnChoice::Completions => Learn::Completions,
                LearnChoice::All => Learn::All,
            },
            max_length: Some(self.max_length.unwrap_or(longest)),
            skip_bad: self.skip_bad_records,
        };
        let data = Dataset::load(files, tokenizer, &options)?;
        let report = &data.report;
        let mut line = format!(
            "data: {} examples, {} tokens, {} of them learned",
            data.len(),
            report.tokens,
            report.target_tokens
        );
        if report.truncated > 0 {
            line += &format!(
                "; {} cut to {} tokens",
                report.truncated,
                options.max_length.unwrap_or(longest)
            );
        }
        if report.skipped > 0 {
            line += &format!("; {} records skipped", report.skipped);
        }
        if report.unknown_tokens > 0 {
            line += &format!(
                "; {} tokens stand for text that the vocabulary lacks",
                report.unknown_tokens
            );
        }
        if report.rewritten_turns > 0 {
            line += &format!(
                "; {} learned turns are as the chat template rewrites them, since others follow",
                report.rewritten_turns
            );
        }
        if report.unended_turns > 0 {
            line += &format!(
                "; {} learned turns have no special token at their end, so the model does not learn to stop there",
                report.unended_turns
            );
        }
        if let Some(date) = date_read(tokenizer) {
            line += &format!("; the chat template reads the date, {date}");
        }
        note(show, &line);
        Ok(data)
    }
}

/// The training loop.
#[derive(Debug, Clone, Args)]
pub(super) struct LoopArgs {
    /// Passes over the data; parts are allowed [default: 3]
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "steps",
        help_heading = "Training"
    )]
    epochs: Option<f64>,

    /// Optimizer steps, instead of epochs
    #[arg(long, value_name = "N", help_heading = "Training")]
    steps: Option<usize>,

    /// Examples per optimizer step
    #[arg(long, default_value_t = 8, value_name = "N", help_heading = "Training")]
    batch_size: usize,

    /// Most tokens in memory at once: cuts a step into passes, which shows in the last bits of the result alone
    #[arg(
        long,
        default_value_t = 8192,
        value_name = "N",
        help_heading = "Training"
    )]
    pub(super) tokens_per_pass: usize,

    /// Highest learning rate [default: the method's own]
    #[arg(long, value_name = "X", help_heading = "Training")]
    pub(super) learning_rate: Option<f64>,

    /// How the learning rate moves after the warm-up
    #[arg(long, value_enum, default_value_t = Schedule::Cosine, value_name = "NAME", help_heading = "Training")]
    schedule: Schedule,

    /// Optimizer steps until the learning rate is reached [default: 3 % of all steps]
    #[arg(long, value_name = "N", help_heading = "Training")]
    warmup_steps: Option<usize>,

    /// AdamW's weight decay
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "X",
        help_heading = "Training"
    )]
    weight_decay: f64,

    /// AdamW's decay of the mean gradient
    #[arg(
        long,
        default_value_t = 0.9,
        value_name = "X",
        help_heading = "Training"
    )]
    beta1: f64,

    /// AdamW's decay of the mean squared gradient
    #[arg(
        long,
        default_value_t = 0.999,
        value_name = "X",
        help_heading = "Training"
    )]
    beta2: f64,

    /// AdamW's guard against division by zero
    #[arg(
        long,
        default_value_t = 1e-8,
        value_name = "X",
        help_heading = "Training"
    )]
    epsilon: f64,

    /// Scale gradients longer than this down to it; 0 leaves them alone
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "X",
        help_heading = "Training"
    )]
    max_gradient_norm: f64,

    /// What to do about a step whose loss or gradient is not finite
    #[arg(long, value_enum, default_value_t = OnNonfinite::Stop, value_name = "WHAT", help_heading = "Training")]
    on_nonfinite: OnNonfinite,

    /// Compute each block again in the backward pass instead of keeping it: slower, far less memory, same gradients
    #[arg(long, help_heading = "Training")]
    recompute: bool,

    /// Keep hidden states below the lowest trained block from epoch to epoch: so many MiB of them in memory, the rest in a
    /// file; 0 keeps none. Later epochs run the trained blocks alone, with the same losses. On a GPU they stay in its
    /// memory, by default in at most half of what the run leaves free, and the rest is computed again
    #[arg(
        long,
        default_value_t = 1024,
        value_name = "MIB",
        help_heading = "Training"
    )]
    activation_cache: usize,

    /// Number type of these hidden states: bf16 takes half the room and rounds what the trained blocks see
    #[arg(long, value_enum, default_value_t = CacheType::F32, value_name = "TYPE", help_heading = "Training")]
    activation_cache_type: CacheType,

    /// Most memory to use: blocks are computed again, and passes made smaller, if more would be needed
    /// [default: what the machine has free]
    #[arg(long, value_name = "MIB", help_heading = "Training")]
    pub(super) memory_limit: Option<u64>,

    /// Seed of everything random
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Training")]
    pub(super) seed: u64,

    /// Steps between evaluations on held-out data; 0 evaluates at the start and the end [default: 10 times in all]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub(super) eval_every: Option<usize>,

    /// Stop after this many evaluations without a lower loss; 0 never does
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Training")]
    pub(super) patience: usize,
}

impl LoopArgs {
    /// What they mean for a method that learns best at `default_rate`, over `examples` examples.
    pub(super) fn options(&self, default_rate: f64, examples: usize) -> Result<TrainOptions> {
        let budget = match (self.epochs, self.steps) {
            (_, Some(steps)) => Budget::Steps(steps),
            (epochs, None) => Budget::Epochs(epochs.unwrap_or(3.0)),
        };
        let steps = budget.steps(examples, self.batch_size.max(1));
        if self.activation_cache == 0 && self.activation_cache_type != CacheType::F32 {
            return Err(Error::usage(
                "`--activation-cache-type` has no effect with `--activation-cache 0`, which keeps no hidden states",
            )
            .hint("leave one of them out"));
        }
        let options = TrainOptions {
            budget,
            batch_size: self.batch_size,
            tokens_per_pass: self.tokens_per_pass,
            learning_rate: self.learning_rate.unwrap_or(default_rate),
            schedule: self.schedule,
            warmup_steps: self.warmup_steps.unwrap_or(match self.schedule {
                Schedule::Constant => 0,
                _ => steps.div_ceil(33),
            }),
            weight_decay: self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            max_gradient_norm: self.max_gradient_norm,
            on_nonfinite: self.on_nonfinite,
            recompute: if self.recompute {
                Recompute::Blocks
            } else {
                Recompute::Never
            },
            activation_cache_bytes: self.activation_cache.saturating_mul(1 << 20),
            activation_cache_type: self.activation_cache_type,
            seed: self.seed,
            eval_every: self.eval_every.unwrap_or(steps.div_ceil(10)),
            patience: self.patience,
            ..TrainOptions::default()
        }
        .validated()?;
        // How many steps there are in epochs is not known before the data is.
        if let Budget::Steps(_) = budget {
            check_warm_up(&options, examples)?;
        }
        Ok(options)
    }
}

/// Refuses a warm-up that lasts longer than the whole run over `examples` examples.
pub(super) fn check_warm_up(options: &TrainOptions, examples: usize) -> Result<()> {
    let steps = options.budget.steps(examples, options.batch_size);
    if options.warmup_steps <= steps {
        return Ok(());
    }
    Err(Error::usage(format!(
        "`--warmup-steps` is {}, and the run has {steps} steps: the learning rate would never be reached",
        options.warmup_steps
    ))
    .hint("give a lower one; the default is 3 % of all steps, and a run file names that of its own run"))
}

/// An adapter to put on the base.
#[derive(Debug, Clone, Args)]
pub(super) struct AdapterArgs {
    /// Adapter folder, written by retune or PEFT [default: the bare base]
    #[arg(long, value_name = "DIR")]
    pub(super) adapter: Option<PathBuf>,

    /// Go on although the adapter was trained on another base
    #[arg(long, requires = "adapter")]
    pub(super) allow_other_base: bool,
}

impl AdapterArgs {
    /// The base in `folder` with the adapter on it, where `placement` says.
    pub(super) fn load_onto(
        &self,
        folder: &Path,
        tokenizer: &Tokenizer,
        placement: &Placement,
    ) -> Result<Model> {
        let other = if self.allow_other_base {
            OtherBase::Allow
        } else {
            OtherBase::Refuse
        };
        let config = ModelConfig::read(folder)?;
        refuse_large_base(placement, &config, config.dtype.unwrap_or(DType::F32))?;
        match &self.adapter {
            Some(adapter) => {
                let adapter = Adapter::open(adapter)?;
                model::load_adapted(placement, folder, &adapter, Some(tokenizer), other)
            }
            None => model::load_on(
                placement,
                folder,
                &NoAdapter,
                AdapterWeights::fresh(0, &Device::Cpu),
                Some(tokenizer),
            ),
        }
    }
}
