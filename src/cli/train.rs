//! `retune train <method>` and `retune resume`.

use super::args::{LoopArgs, ModelArgs, RecordArgs, check_warm_up};
use super::memory_limit::{MemoryLimit, fitted};
use super::note;
use super::output::print_line;
use super::placement::settled as settled_placement;
use super::progress::{Progress, Show};
use super::{interrupt, run_file, run_lock};
use crate::adapter_folder::{self, Adapter, IDENTITY_FILE, OtherBase};
use crate::adapters::METHODS;
use crate::adapters::hooks::{AdapterMethod, MethodEntry};
use crate::adapters::storage::{AdapterWeights, CONFIG_FILE, WEIGHTS_FILE, write_bytes};
use crate::atomic::{check_writable, remove_half_written};
use crate::data::{Dataset, Order, Tokenizer};
use crate::inspect::broken_weights;
use crate::model::checkpoint::Checkpoint;
use crate::model::inventory::inventory;
use crate::model::{self, Model, Placement};
use crate::plan;
use crate::report::format;
use crate::report::loss_plot::loss_svg;
use crate::report::metrics::{self, METRICS_FILE, Metric, MetricsFile};
use crate::report::model_card::{BaseModel, DataFiles, ModelCard, Purpose, Results, Task};
use crate::report::tensorboard::EventFile;
use crate::train::{
    Budget, CacheType, Checkpoints, Control, Event, Inputs, OnSpike, Outcome, TrainOptions,
    TrainState, Trainer,
};
use crate::{Context, Error, ErrorKind, Result};
use candle_core::DType;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use serde_json::json;
use std::path::{Path, PathBuf};
use toml::Value;

/// What every method's `train` command takes beside the method's own options.
#[derive(Debug, Clone, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    pub(super) base: ModelArgs,

    /// Training data: JSON lines or a JSON array, plain or .gz; several files are read one after the other
    #[arg(long, required = true, num_args = 1.., value_name = "FILE", help_heading = "Data")]
    pub(super) data: Vec<PathBuf>,

    /// Folder for the adapter and the run's records
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,

    /// What the adapter calls its base, such as the hub id of a folder [default: `--model` as typed]
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,

    #[command(flatten)]
    pub(super) records: RecordArgs,

    /// Held-out data that is only scored; the adapter with the lowest loss on it is kept
    #[arg(long, num_args = 1.., value_name = "FILE", conflicts_with = "eval_fraction", help_heading = "Data")]
    pub(super) eval_data: Vec<PathBuf>,

    /// Hold out this share of the training data instead, chosen by the seed
    #[arg(long, value_name = "SHARE", help_heading = "Data")]
    pub(super) eval_fraction: Option<f64>,

    /// Visit the examples in this order: one index a line, the first example is 0 [default: shuffled by the seed]
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    order: Option<PathBuf>,

    #[command(flatten)]
    pub(super) training: LoopArgs,

    /// What to do about a step whose loss lies far above those of the steps before it
    #[arg(long, value_enum, default_value_t = OnSpike::Warn, value_name = "WHAT", help_heading = "Training")]
    on_spike: OnSpike,

    /// Start from this adapter instead of a new one; its own options replace the method's
    #[arg(long, value_name = "DIR", help_heading = "Training")]
    init_adapter: Option<PathBuf>,

    /// Go on although `--init-adapter` was trained on another base
    #[arg(long, requires = "init_adapter", help_heading = "Training")]
    allow_other_base: bool,

    /// Steps between checkpoints to resume from; 0 saves only where it is interrupted or a step fails
    #[arg(
        long,
        default_value_t = 0,
        value_name = "N",
        help_heading = "Run folder"
    )]
    save_every: usize,

    /// Number of checkpoints to keep
    #[arg(
        long,
        default_value_t = 2,
        value_name = "N",
        help_heading = "Run folder"
    )]
    keep: usize,

    /// Write TensorBoard event files too
    #[arg(long, help_heading = "Run folder")]
    tensorboard: bool,

    /// Replace what an earlier run left in the folder
    #[arg(long, help_heading = "Run folder")]
    overwrite: bool,

    /// Steps between progress lines where no bar can be drawn
    #[arg(long, default_value_t = 10, value_name = "N")]
    log_every: usize,

    /// Say nothing but errors and the result
    #[arg(long)]
    pub(super) quiet: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Which run to go on with.
#[derive(Debug, Args)]
pub(super) struct ResumeArgs {
    /// Run folder, as given to `--out`
    run: PathBuf,

    /// Train the rows of a comparison that failed again, too
    #[arg(long)]
    retry_failed: bool,
}

/// `retune train` with one subcommand for each row of `METHODS`.
pub(super) fn command() -> Command {
    let methods = METHODS.iter().map(method_command);
    Command::new("train")
        .about("Train an adapter on a frozen base")
        .display_order(0)
        .after_help(
            "`retune train <method> --help` lists a method's options.\n\
             `retune train --config run.toml` repeats a run; options typed beside it win.",
        )
        .subcommand_required(true)
        .arg_required_else_help(true)
        .args_override_self(true)
        .subcommands(methods)
}

fn method_command(entry: &MethodEntry) -> Command {
    let command = (entry.command)(TrainArgs::augment_args(Command::new(entry.name)));
    command
        .about(entry.about)
        .long_about(entry.about)
        .args_override_self(true)
        .allow_negative_numbers(true)
        .after_help(format!(
            "Example:\n  retune train {} --model ./base --data train.jsonl --eval-fraction 0.1 --out my-adapter",
            entry.name
        ))
}

/// Runs `retune train <method>`.
pub(super) fn train(matches: &ArgMatches) -> Result<()> {
    let (entry, matches) = chosen(matches)?;
    let arguments = parsed(matches)?;
    // What was typed must make sense before anything is touched.
    let method = (entry.from_args)(matches)?;
    arguments.options(method.default_learning_rate(), 1)?;
    arguments.check(entry, matches)?;
    check_folder(&arguments)?;
    run(entry, matches, &arguments, Start::Fresh)
}

/// Runs `retune resume`.
pub(super) fn resume(arguments: &ResumeArgs) -> Result<()> {
    if super::compare::is_comparison(&arguments.run) {
        return super::compare::resume(&arguments.run, arguments.retry_failed);
    }
    if arguments.retry_failed {
        return Err(Error::usage("`--retry-failed` is for comparisons")
            .at(arguments.run.display())
            .hint("leave it out to go on with a run"));
    }
    if super::pretrain::is_pretraining(&arguments.run) {
        return Err(Error::new("the folder holds a run of `retune pretrain`")
            .at(arguments.run.display())
            .hint("go on with it by the same command as then, and `--resume`"));
    }
    let (method, mut options) = run_file::read(&arguments.run.join(run_file::RUN_FILE))
        .map_err(|error| error.hint("give the folder that the run's `--out` named"))?;
    refuse_finished(&arguments.run)?;
    options.insert(0, method.clone());
    options.push(format!("--out={}", arguments.run.display()));
    let matches = command()
        .no_binary_name(true)
        .try_get_matches_from(options)
        .map_err(|error| {
            Error::new(format!("the run file does not fit this version: {error}"))
                .at(arguments.run.display())
        })?;
    let (entry, matches) = chosen(&matches)?;
    run(entry, matches, &parsed(matches)?, Start::Checkpoint)
}

/// The method that was named, and its options.
pub(super) fn chosen(matches: &ArgMatches) -> Result<(&'static MethodEntry, &ArgMatches)> {
    let (name, matches) = matches
        .subcommand()
        .ok_or_else(|| Error::usage("which method? try `retune train --help`"))?;
    let entry = METHODS
        .iter()
        .find(|entry| entry.name == name)
        .ok_or_else(|| Error::usage(format!("`{name}` is not a method")))?;
    Ok((entry, matches))
}

/// The method's own options and their values, as typed or by default.
fn own_options(
    entry: &MethodEntry,
    matches: &ArgMatches,
    arguments: &TrainArgs,
) -> Vec<(String, String)> {
    if let Some(adapter) = &arguments.init_adapter {
        let name = adapter.file_name().unwrap_or_default().to_string_lossy();
        return vec![("started from the adapter".to_owned(), name.into_owned())];
    }
    let command = (entry.command)(Command::new(entry.name));
    let named = command.get_arguments().filter_map(|argument| {
        let values = matches.try_get_raw(argument.get_id().as_str()).ok()??;
        let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
        Some((argument.get_long()?.replace('-', " "), values.join(", ")))
    });
    named.collect()
}

impl TrainArgs {
    fn base_name(&self) -> &str {
        self.base_name.as_deref().unwrap_or(&self.base.model)
    }

    /// Whether there is data that is only scored.
    fn holds_out(&self) -> bool {
        !self.eval_data.is_empty() || self.eval_fraction.is_some()
    }

    /// The order in which a run visits `examples` examples.
    pub(super) fn order(&self, examples: usize) -> Result<Order> {
        match &self.order {
            Some(file) => Order::from_file(file, examples),
            None => Ok(Order::shuffled(examples, self.training.seed)),
        }
    }

    /// What they mean for a method that learns best at `default_rate`, over `examples` examples.
    fn options(&self, default_rate: f64, examples: usize) -> Result<TrainOptions> {
        let training = self.training.options(default_rate, examples)?;
        TrainOptions {
            save_every: self.save_every,
            keep: self.keep,
            on_spike: self.on_spike,
            eval_every: if self.holds_out() {
                training.eval_every
            } else {
                0
            },
            ..training
        }
        .validated()
    }

    /// Refuses options that would be typed in vain.
    fn check(&self, entry: &MethodEntry, matches: &ArgMatches) -> Result<()> {
        if let Some(adapter) = &self.init_adapter {
            if let (Ok(adapter), Ok(out)) = (adapter.canonicalize(), self.out.canonicalize())
                && adapter == out
            {
                return Err(
                    Error::usage("`--init-adapter` and `--out` name the same folder")
                        .hint("name another folder with `--out`"),
                );
            }
            let command = (entry.command)(Command::new(entry.name));
            let typed = command.get_arguments().find(|argument| {
                let source = matches.value_source(argument.get_id().as_str());
                source == Some(ValueSource::CommandLine)
            });
            if let Some(name) = typed.and_then(Arg::get_long) {
                return Err(Error::usage(format!(
                    "`--{name}` cannot be changed: the adapter of `--init-adapter` has it already"
                )));
            }
        }
        let for_held_out = [
            ("--patience", self.training.patience > 0),
            ("--eval-every", self.training.eval_every.is_some()),
        ];
        if let Some((name, _)) = for_held_out.iter().find(|(_, typed)| *typed)
            && !self.holds_out()
        {
            return Err(Error::usage(format!("`{name}` needs held-out data"))
                .hint("name some by `--eval-data` or `--eval-fraction`"));
        }
        if self.records.max_length == Some(0) {
            return Err(Error::usage("`--max-length` must be at least 1"));
        }
        Ok(())
    }
}

/// The options that all methods share.
pub(super) fn parsed(matches: &ArgMatches) -> Result<TrainArgs> {
    TrainArgs::from_arg_matches(matches).map_err(|error| Error::usage(error.to_string()))
}

#[derive(Clone, Copy, PartialEq)]
enum Start {
    Fresh,
    Checkpoint,
}

/// Whether a run folder holds its adapter, and no checkpoint to go on from.
fn refuse_finished(run: &Path) -> Result<()> {
    let resumable = Checkpoints::of_run(run).newest_folder()?.is_some();
    if run.join(CONFIG_FILE).exists() && !resumable {
        return Err(
            Error::new("the run is finished: there is nothing to resume")
                .at(run.display())
                .hint("train on from its adapter with `--init-adapter`"),
        );
    }
    Ok(())
}

/// Removes TensorBoard's files of a run that starts again.
fn remove_events(run: &Path) -> Result<()> {
    let events = run.join("tensorboard");
    if events.exists() {
        std::fs::remove_dir_all(&events).at(events.display())?;
    }
    Ok(())
}

/// The folder must be writable before anything is computed, and must not hold another run's work.
fn check_folder(arguments: &TrainArgs) -> Result<()> {
    let out = &arguments.out;
    if super::compare::is_comparison(out) {
        return Err(Error::new("the folder holds a comparison")
            .at(out.display())
            .hint("name another folder with `--out`"));
    }
    // Not the run file alone: a run that ended before its first checkpoint has left nothing to lose.
    let resumable = Checkpoints::of_run(out).newest_folder()?.is_some();
    let taken = match resumable {
        true => Some("checkpoints"),
        false => [CONFIG_FILE, "config.json"]
            .into_iter()
            .find(|file| out.join(file).exists()),
    };
    if let Some(taken) = taken
        && (!arguments.overwrite || taken == "config.json")
    {
        return Err(Error::new(format!("the folder already holds `{taken}`"))
            .at(out.display())
            .hint("go on with that run by `retune resume`, replace it with `--overwrite`, or name another folder"));
    }
    check_writable(out)
}

/// Clears away what another run left there: only now that all that was asked for is known to be
/// possible.
fn prepare_folder(
    entry: &MethodEntry,
    matches: &ArgMatches,
    arguments: &TrainArgs,
    options: &TrainOptions,
    placement: &Placement,
) -> Result<()> {
    let out = &arguments.out;
    let checkpoints = Checkpoints::of_run(out);
    // Checkpoints alone would be taken for this run's.
    if out.join(run_file::RUN_FILE).exists()
        || out.join(CONFIG_FILE).exists()
        || checkpoints.newest_folder()?.is_some()
    {
        checkpoints.remove()?;
        for left in [METRICS_FILE, CONFIG_FILE, WEIGHTS_FILE, IDENTITY_FILE] {
            let file = out.join(left);
            if file.exists() {
                std::fs::remove_file(&file).at(file.display())?;
            }
        }
        remove_events(out)?;
    }
    let mut command = method_command(entry);
    if arguments.init_adapter.is_some() {
        // The adapter says what the method's own options would.
        command = TrainArgs::augment_args(Command::new(entry.name));
    }
    let mut settled = vec![
        ("learning-rate", Value::Float(options.learning_rate)),
        ("warmup-steps", run_file::count(options.warmup_steps)),
        // The run file has the folder in full, the adapter what was typed.
        ("base-name", Value::String(arguments.base_name().to_owned())),
        // How a step is cut into passes shows in the last bits, and must not depend on the memory free today.
        ("tokens-per-pass", run_file::count(options.tokens_per_pass)),
    ];
    if arguments.holds_out() {
        settled.push(("eval-every", run_file::count(options.eval_every)));
    }
    settled.extend(settled_placement(placement));
    let file = out.join(run_file::RUN_FILE);
    run_file::write(&file, entry.name, &command, matches, &settled)
}

fn run(
    entry: &'static MethodEntry,
    matches: &ArgMatches,
    arguments: &TrainArgs,
    start: Start,
) -> Result<()> {
    interrupt::watch()?;
    let show = Show::on_stderr(arguments.quiet);
    let beginning = Beginning::of(entry, matches, arguments)?;
    let folder = arguments.base.folder(show)?;
    let tokenizer = arguments.base.tokenizer(&folder)?;
    let config = model::ModelConfig::read(&folder)?;
    let (data, held_out) = load_data(arguments, &tokenizer, config.max_positions, show)?;
    let placement = arguments.base.placement(&folder, show)?;

    let mut order = arguments.order(data.len())?;
    let options = arguments.options(
        beginning.method().default_learning_rate(),
        order.epoch_len(),
    )?;
    if start == Start::Fresh {
        check_warm_up(&options, order.epoch_len())?;
    }
    let dtype = config.dtype.unwrap_or(DType::F32);
    let held_out_tokens = held_out.as_ref().map_or(0, super::plan::tokens);
    let load = super::plan::load(&data, &mut order, &options, held_out_tokens);
    let smallest_pass = match start {
        Start::Fresh => data.longest(),
        // A run that goes on keeps its passes: with others its last bits would differ.
        Start::Checkpoint => options.tokens_per_pass,
    };
    let fit = |options: TrainOptions| {
        let limit = MemoryLimit::of(arguments.training.memory_limit, &placement);
        let method = beginning.method();
        let peak = |options: &TrainOptions| -> Result<u64> {
            Ok(plan::memory(&placement, &config, dtype, method, options, &load)?.peak())
        };
        fitted(options, smallest_pass, limit, &peak, show)
    };
    // A GPU must have room before anything is put there; what the machine has free is known best beside the mapped base.
    let on_gpu = placement.device.is_cuda();
    let options = if on_gpu { fit(options)? } else { options };
    // Before it is loaded: all threads read it, where loading reads one weight after the other.
    let weights = Checkpoint::open(&folder)?.digest();
    let model = beginning.load(arguments, &placement, &folder, &tokenizer)?;
    let options = if on_gpu { options } else { fit(options)? };
    let held_out_longest = held_out.as_ref().map_or(0, Dataset::longest);
    let longest = data.longest().max(held_out_longest);
    super::warn_of_length(show, &config, longest, model.prompt_rows());
    let method = beginning.method();
    if options.activation_cache_type != CacheType::F32
        && !super::plan::leaves_blocks_alone(&config, method)?
    {
        note(
            show,
            "note: `--activation-cache-type` has no effect: nothing lies below what is trained, so no hidden states are kept",
        );
    }
    let inputs = Inputs::of(
        &model,
        &weights,
        method,
        &options,
        &data,
        held_out.as_ref(),
        &order,
    )?;
    let checkpoints = Checkpoints::of_run(&arguments.out).on(inputs);
    let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?;
    std::fs::create_dir_all(&arguments.out).at(arguments.out.display())?;
    let _lock = run_lock::hold(&arguments.out)?;
    remove_half_written(&arguments.out)?;
    let resumed = match start {
        // Another process may have come and gone since this was asked first.
        Start::Checkpoint => {
            refuse_finished(&arguments.out)?;
            match checkpoints.newest_folder()? {
                Some(_) => Some(trainer.resume(&checkpoints)?),
                None => {
                    note(show, "no checkpoint was saved: the run starts again");
                    remove_events(&arguments.out)?;
                    None
                }
            }
        }
        Start::Fresh => {
            check_folder(arguments)?;
            None
        }
    };
    super::warn_of_damage(trainer.damaged(), trainer.state().step);
    note(
        show,
        &format!(
            "training {} weights of {} with {}, {} steps at learning rate {}",
            model.weights.parameter_count(),
            arguments.base.model,
            entry.name,
            trainer.total_steps(&order),
            options.learning_rate
        ),
    );

    if start == Start::Fresh {
        prepare_folder(entry, matches, arguments, &options, &placement)?;
    }
    let mut records = Records::open(&arguments.out.join(METRICS_FILE), arguments, resumed)?;
    let bar = Progress::training(
        show,
        trainer.total_steps(&order) as u64,
        arguments.log_every as u64,
    );
    let outcome = trainer.run(
        &data,
        &mut order,
        held_out.as_ref(),
        Some(&checkpoints),
        &mut |event| {
            match event {
                Event::Step(report) => {
                    records.step(report)?;
                    bar.step(report);
                }
                Event::Evaluated(report) => {
                    records.eval(report)?;
                    bar.eval(report);
                }
                Event::Skipped(skipped) => {
                    records.step(&skipped.report)?;
                    bar.message(&format!("warning: {skipped}; it was left out"));
                }
                Event::Spiked(spiked) => bar.message(&format!("warning: {spiked}")),
                Event::Saved(state) => {
                    records.sync()?;
                    bar.message(&format!("checkpoint after step {}", state.step));
                }
            }
            Ok(if interrupt::asked() {
                Control::Stop
            } else {
                Control::Continue
            })
        },
    );
    let outcome = outcome.map_err(|error| match error.kind() {
        ErrorKind::NotFinite => blamed_on_base(error, &folder),
        _ => match checkpoints.newest_intact() {
            Ok(Some(_)) => with_resume(error, &arguments.out),
            _ => error,
        },
    })?;
    let step = trainer.state().step;
    bar.finish(&format!("trained to step {step}"));
    if outcome == Outcome::Interrupted {
        return Err(
            Error::interrupted(format!("stopped after step {step}; everything is saved")).hint(
                format!("go on with `retune resume {}`", arguments.out.display()),
            ),
        );
    }
    let finished = Finished {
        entry,
        arguments,
        folder: &folder,
        model: &model,
        method,
        options: &options,
        state: trainer.state(),
        data: &data,
        held_out: held_out.as_ref(),
        outcome,
        own_options: own_options(entry, matches, arguments),
    };
    let written = finished.write().map_err(|error| {
        // The work of the run must not be lost with the folder.
        match trainer.save_now(&checkpoints) {
            Ok(()) => error.hint(format!(
                "what was trained is in a checkpoint: when that is put right, `retune resume {}` writes the adapter",
                arguments.out.display()
            )),
            Err(_) => error,
        }
    })?;
    if arguments.save_every == 0 {
        checkpoints.remove()?;
    }
    finished.print(&written)
}

/// What the trained weights start from.
enum Beginning {
    /// The method's own start.
    New(Box<dyn AdapterMethod>),
    /// An adapter that was trained before.
    Adapter(Adapter),
}

impl Beginning {
    /// That of a run of `entry`'s method: an adapter that it is to start from must be of this method.
    fn of(entry: &MethodEntry, matches: &ArgMatches, arguments: &TrainArgs) -> Result<Self> {
        let Some(folder) = &arguments.init_adapter else {
            return Ok(Self::New((entry.from_args)(matches)?));
        };
        let adapter = Adapter::open(folder)?;
        let method = adapter.method.name();
        if method != entry.name {
            return Err(Error::usage(format!(
                "`--init-adapter` is of method `{method}`, not `{}`",
                entry.name
            )));
        }
        Ok(Self::Adapter(adapter))
    }

    fn method(&self) -> &dyn AdapterMethod {
        match self {
            Self::New(method) => method.as_ref(),
            Self::Adapter(adapter) => adapter.method.as_ref(),
        }
    }

    /// The base in `folder` with the weights in it.
    fn load(
        &self,
        arguments: &TrainArgs,
        placement: &Placement,
        folder: &Path,
        tokenizer: &Tokenizer,
    ) -> Result<Model> {
        match self {
            Self::New(method) => {
                let weights = AdapterWeights::fresh(arguments.training.seed, &placement.device);
                let method = method.as_ref();
                model::load_on(placement, folder, method, weights, Some(tokenizer))
            }
            Self::Adapter(adapter) => {
                let other = if arguments.allow_other_base {
                    OtherBase::Allow
                } else {
                    OtherBase::Refuse
                };
                model::load_adapted(placement, folder, adapter, Some(tokenizer), other)
            }
        }
    }
}

/// The same error of work that `retune resume` goes on with, where the command itself would be refused: the hint says so.
pub(super) fn with_resume(error: Error, out: &Path) -> Error {
    const AGAIN: &str = "run the command again";
    let resume = format!("go on with `retune resume {}`", out.display());
    let hint = match error.hint_text() {
        None => format!("{resume} when that is put right"),
        Some(hint) if hint.contains(AGAIN) => hint.replace(AGAIN, &resume),
        Some(hint) => format!("{resume} when that is put right: {hint}"),
    };
    error.hint(hint)
}

/// The same error, with what is wrong with the base's own weights as its hint if anything is.
fn blamed_on_base(error: Error, folder: &Path) -> Error {
    match broken_weights(folder) {
        Ok(lines) if !lines.is_empty() => error.hint(format!(
            "the base itself is damaged: {}; download it again, or ask who made it",
            lines.join("; ")
        )),
        _ => error,
    }
}

fn load_data(
    arguments: &TrainArgs,
    tokenizer: &Tokenizer,
    longest: usize,
    show: Show,
) -> Result<(Dataset, Option<Dataset>)> {
    let data = arguments
        .records
        .load(&arguments.data, tokenizer, longest, show)?;
    if let Some(share) = arguments.eval_fraction {
        let (data, held_out) = data.split(share, arguments.training.seed)?;
        return Ok((data, Some(held_out)));
    }
    if arguments.eval_data.is_empty() {
        return Ok((data, None));
    }
    let held_out = arguments
        .records
        .load(&arguments.eval_data, tokenizer, longest, show)?;
    Ok((data, Some(held_out)))
}

/// What a run writes down while it goes on.
struct Records {
    metrics: MetricsFile,
    events: Option<EventFile>,
}

impl Records {
    /// The records of a new run, or of one that is `resumed` after so many steps, which may be none.
    fn open(metrics: &Path, arguments: &TrainArgs, resumed: Option<usize>) -> Result<Self> {
        let folder = arguments.out.join("tensorboard");
        if arguments.tensorboard {
            std::fs::create_dir_all(&folder).at(folder.display())?;
        }
        let events = match (arguments.tensorboard, resumed) {
            (false, _) => None,
            (true, None) => Some(EventFile::create(&folder)?),
            (true, Some(step)) => Some(EventFile::resume(&folder, step as u64)?),
        };
        let metrics = match resumed {
            None => MetricsFile::create(metrics)?,
            Some(step) => MetricsFile::append(metrics, step as u64)?,
        };
        Ok(Self { metrics, events })
    }

    fn step(&mut self, report: &metrics::StepReport) -> Result<()> {
        self.metrics.step(report)?;
        self.events
            .as_mut()
            .map_or(Ok(()), |events| events.step(report))
    }

    fn eval(&mut self, report: &metrics::EvalReport) -> Result<()> {
        self.metrics.eval(report)?;
        self.events
            .as_mut()
            .map_or(Ok(()), |events| events.eval(report))
    }

    fn sync(&mut self) -> Result<()> {
        self.metrics.sync()
    }
}

/// A run that is over, ready to be written down.
struct Finished<'a> {
    entry: &'static MethodEntry,
    arguments: &'a TrainArgs,
    folder: &'a Path,
    model: &'a Model,
    method: &'a dyn AdapterMethod,
    options: &'a TrainOptions,
    state: &'a TrainState,
    data: &'a Dataset,
    held_out: Option<&'a Dataset>,
    outcome: Outcome,
    own_options: Vec<(String, String)>,
}

impl Finished<'_> {
    /// Writes the adapter, its card and its chart; returns what was measured.
    fn write(&self) -> Result<Vec<Metric>> {
        let out = &self.arguments.out;
        let metrics = metrics::read(&out.join(METRICS_FILE))?;
        let title = format!("{} on {}", self.entry.name, self.base_name());
        write_bytes(
            &out.join("loss.svg"),
            loss_svg(&title, &metrics)?.as_bytes(),
        )?;
        write_bytes(
            &out.join("README.md"),
            self.card(&metrics).to_markdown().as_bytes(),
        )?;
        // Last: a folder with an adapter is a finished run.
        adapter_folder::save(out, self.model, self.method, self.arguments.base_name())?;
        Ok(metrics)
    }

    fn base_name(&self) -> String {
        match BaseModel::in_folder(self.folder) {
            BaseModel::Hub(name) | BaseModel::Folder(name) => name,
        }
    }

    fn card(&self, metrics: &[Metric]) -> ModelCard {
        let options = self.options;
        let budget = match options.budget {
            Budget::Epochs(epochs) => format!("{epochs} epochs, {} steps", self.state.step),
            Budget::Steps(_) => format!("{} steps", self.state.step),
        };
        let hyperparameters = [
            ("budget", budget),
            ("batch size", format!("{} examples", options.batch_size)),
            ("learning rate", options.learning_rate.to_string()),
            ("schedule", format!("{:?}", options.schedule).to_lowercase()),
            ("warm-up", format!("{} steps", options.warmup_steps)),
            ("weight decay", options.weight_decay.to_string()),
            ("gradient clipping", options.max_gradient_norm.to_string()),
            ("seed", options.seed.to_string()),
        ];
        let files = |paths: &[PathBuf], purpose, data: &Dataset| DataFiles {
            paths: paths.to_vec(),
            purpose,
            examples: data.len() as u64,
            tokens: data
                .examples
                .iter()
                .map(|example| example.tokens.len() as u64)
                .sum(),
            target_tokens: data
                .examples
                .iter()
                .map(|example| example.target_tokens() as u64)
                .sum(),
        };
        let mut data = vec![files(&self.arguments.data, Purpose::Training, self.data)];
        if let Some(held_out) = self.held_out {
            // A share of the training data was held out where no other data was named.
            let paths = match self.arguments.eval_fraction {
                Some(_) => &self.arguments.data,
                None => &self.arguments.eval_data,
            };
            data.push(files(paths, Purpose::Evaluation, held_out));
        }
        let placement = self.model.decoder.placement();
        let device = match placement.device.is_cpu() {
            true => format!("CPU, {} threads", rayon::current_num_threads()),
            false => format!("GPU, {}", placement.compute.name()),
        };
        ModelCard {
            title: self
                .arguments
                .out
                .file_name()
                .map_or("adapter".to_owned(), |name| {
                    name.to_string_lossy().into_owned()
                }),
            base_model: BaseModel::in_folder(self.folder),
            task: Task::TextGeneration,
            method: self.entry.name.to_owned(),
            about_method: self.entry.about.to_owned(),
            trained_parameters: self.model.weights.parameter_count() as u64,
            base_parameters: inventory(&self.model.config)
                .iter()
                .map(|parameter| parameter.count() as u64)
                .sum(),
            data,
            hyperparameters: self
                .own_options
                .iter()
                .cloned()
                .chain(hyperparameters.map(|(name, value)| (name.to_owned(), value)))
                .collect(),
            results: Results::of(metrics),
            duration: format::seconds(self.state.seconds),
            device,
            picture: Some("loss.svg".to_owned()),
            loads_with_peft: true,
            merges: self.model.decoder.soft_prompt().is_none(),
            versions: vec![("retune".to_owned(), env!("CARGO_PKG_VERSION").to_owned())],
        }
    }

    fn print(&self, metrics: &[Metric]) -> Result<()> {
        let (out, state) = (&self.arguments.out, self.state);
        let training = Results::of(metrics)
            .training
            .ok_or_else(|| Error::new("the run took no step"))?;
        let (first, last) = (training.first.1, training.last.1);
        let size = std::fs::metadata(out.join(WEIGHTS_FILE)).map_or(0, |file| file.len());
        let speed = state.tokens as f64 / state.seconds;
        let trained = self.model.weights.parameter_count();
        if self.arguments.json {
            let result = json!({
                "out": out, "method": self.entry.name, "steps": state.step,
                "stopped_early": self.outcome == Outcome::StoppedEarly,
                "trained_weights": trained, "adapter_bytes": size, "first_loss": first, "last_loss": last,
                "best_eval_loss": state.best.map(|best| best.loss), "best_step": state.best.map(|best| best.step),
                "final_eval_loss": state.final_eval_loss, "skipped_steps": state.skipped, "tokens_per_second": speed, "seconds": state.seconds,
                "peak_memory_bytes": self.model.decoder.placement().peak_memory(),
            });
            print_line!("{result}")?;
            return Ok(());
        }
        if self.outcome == Outcome::StoppedEarly {
            print_line!(
                "stopped after step {}: the held-out loss had not improved for {} evaluations",
                state.step,
                self.options.patience
            )?;
        }
        print_line!(
            "loss {first:.4} -> {last:.4} in {} steps, {speed:.0} tokens/s",
            state.step
        )?;
        if state.skipped > 0 {
            print_line!(
                "{} of these steps were left out: not finite, or far above those before them",
                state.skipped
            )?;
        }
        if let Some(best) = state.best {
            print_line!(
                "held-out loss {:.4}, the best, after step {}: this adapter is kept",
                best.loss,
                best.step
            )?;
        }
        print_line!(
            "adapter: {} ({}, {} weights)",
            out.display(),
            format::bytes(size),
            format::whole(trained as u64)
        )?;
        print_line!(
            "next: retune generate --model {} --adapter {} --prompt \"...\"",
            self.arguments.base.model,
            out.display()
        )?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IntoError;

    #[test]
    fn work_that_was_saved_is_gone_on_with_and_not_begun_again() {
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull).into_error();
        let hint = |error: Error| {
            let error = with_resume(error, Path::new("out"));
            error.hint_text().expect("a way out").to_owned()
        };
        assert!(
            full()
                .hint_text()
                .is_some_and(|hint| hint.contains("run the command again")),
            "it is what is to be replaced"
        );
        assert_eq!(
            hint(full()),
            "free some space and go on with `retune resume out`; nothing half-written was left"
        );
        assert_eq!(
            hint(Error::new("fact")),
            "go on with `retune resume out` when that is put right"
        );
        assert_eq!(
            hint(Error::new("fact").hint("a way out")),
            "go on with `retune resume out` when that is put right: a way out"
        );
    }
}
