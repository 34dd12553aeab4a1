//! `retune train <method>` and `retune resume`.

use super::args::{LoopArgs, ModelArgs, RecordArgs};
use super::note;
use super::output::print_line;
use super::progress::{Progress, Show};
use super::{interrupt, run_file};
use crate::adapter_folder::{self, Adapter, OtherBase};
use crate::adapters::METHODS;
use crate::adapters::hooks::{AdapterMethod, MethodEntry};
use crate::adapters::storage::{AdapterWeights, WEIGHTS_FILE, write_bytes};
use crate::atomic::check_writable;
use crate::data::{Dataset, Order};
use crate::model::inventory::inventory;
use crate::model::{self, Model};
use crate::report::format;
use crate::report::loss_plot::loss_svg;
use crate::report::metrics::{self, Metric, MetricsFile};
use crate::report::model_card::{BaseModel, DataFile, ModelCard, Purpose, Results, Task};
use crate::report::tensorboard::EventFile;
use crate::train::{
    Budget, Checkpoints, Control, Event, Outcome, TrainOptions, TrainState, Trainer,
};
use crate::{Context, Error, Result};
use candle_core::Device;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

const METRICS_FILE: &str = "metrics.jsonl";

/// What every method's `train` command takes beside the method's own options.
#[derive(Debug, Clone, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    pub(super) base: ModelArgs,

    /// Training data: JSON lines or a JSON array, plain or .gz; several files are read one after the other
    #[arg(long, required = true, num_args = 1.., value_delimiter = ',', value_name = "FILE", help_heading = "Data")]
    pub(super) data: Vec<PathBuf>,

    /// Folder for the adapter and the run's records
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,

    #[command(flatten)]
    pub(super) records: RecordArgs,

    /// Held-out data that is only scored; the adapter with the lowest loss on it is kept
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "FILE", conflicts_with = "eval_fraction", help_heading = "Data")]
    pub(super) eval_data: Vec<PathBuf>,

    /// Hold out this share of the training data instead, chosen by the seed
    #[arg(long, value_name = "SHARE", help_heading = "Data")]
    pub(super) eval_fraction: Option<f64>,

    /// Visit the examples in this order: one index a line, the first example is 0 [default: shuffled by the seed]
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    order: Option<PathBuf>,

    #[command(flatten)]
    pub(super) training: LoopArgs,

    /// Start from this adapter instead of a new one; its own options replace the method's
    #[arg(long, value_name = "DIR", help_heading = "Training")]
    init_adapter: Option<PathBuf>,

    /// Go on although `--init-adapter` was trained on another base
    #[arg(long, help_heading = "Training")]
    allow_other_base: bool,

    /// Steps between checkpoints to resume from; 0 saves only when interrupted
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
    arguments
        .training
        .options(method.default_learning_rate(), 1)?;
    prepare_folder(&arguments)?;
    run_file::write(
        &arguments.out.join(run_file::RUN_FILE),
        entry.name,
        &method_command(entry),
        matches,
    )?;
    run(entry, matches, &arguments, Start::Fresh)
}

/// Runs `retune resume`.
pub(super) fn resume(arguments: &ResumeArgs) -> Result<()> {
    let (method, mut options) = run_file::read(&arguments.run.join(run_file::RUN_FILE))
        .map_err(|error| error.hint("give the folder that the run's `--out` named"))?;
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

/// The options that all methods share.
pub(super) fn parsed(matches: &ArgMatches) -> Result<TrainArgs> {
    TrainArgs::from_arg_matches(matches).map_err(|error| Error::usage(error.to_string()))
}

#[derive(Clone, Copy, PartialEq)]
enum Start {
    Fresh,
    Checkpoint,
}

/// The folder must be writable before anything is computed, and must not hold another run.
fn prepare_folder(arguments: &TrainArgs) -> Result<()> {
    let out = &arguments.out;
    let taken = [run_file::RUN_FILE, "adapter_config.json", "config.json"];
    if let Some(file) = taken.iter().find(|file| out.join(file).exists()) {
        if !arguments.overwrite || *file == "config.json" {
            return Err(Error::new(format!("the folder already holds `{file}`"))
                .at(out.display())
                .hint("go on with that run by `retune resume`, replace it with `--overwrite`, or name another folder"));
        }
        Checkpoints::of_run(out).remove()?;
        for left in [
            METRICS_FILE,
            "adapter_config.json",
            "adapter_model.safetensors",
            "retune.json",
        ] {
            let _ = std::fs::remove_file(out.join(left));
        }
    }
    std::fs::create_dir_all(out).at(out.display())?;
    check_writable(out)
}

fn run(
    entry: &'static MethodEntry,
    matches: &ArgMatches,
    arguments: &TrainArgs,
    start: Start,
) -> Result<()> {
    interrupt::watch()?;
    let show = Show::on_stderr(arguments.quiet);
    let folder = arguments.base.folder(show)?;
    let tokenizer = arguments.base.tokenizer(&folder)?;
    let config = model::ModelConfig::read(&folder)?;
    let (data, held_out) = load_data(arguments, &tokenizer, config.max_positions, show)?;

    let method: Box<dyn AdapterMethod>;
    let model = match &arguments.init_adapter {
        Some(adapter) => {
            let adapter = Adapter::open(adapter)?;
            let other = if arguments.allow_other_base {
                OtherBase::Allow
            } else {
                OtherBase::Refuse
            };
            let model = adapter.load_onto(&folder, Some(&tokenizer), other)?;
            if adapter.method.name() != entry.name {
                return Err(Error::usage(format!(
                    "`--init-adapter` is of method `{}`, not `{}`",
                    adapter.method.name(),
                    entry.name
                )));
            }
            method = adapter.method;
            model
        }
        None => {
            method = (entry.from_args)(matches)?;
            let weights = AdapterWeights::fresh(arguments.training.seed, &Device::Cpu);
            model::load(&folder, method.as_ref(), weights, Some(&tokenizer))?
        }
    };
    let mut order = match &arguments.order {
        Some(file) => Order::from_file(file, data.len())?,
        None => Order::shuffled(data.len(), arguments.training.seed),
    };
    let options = TrainOptions {
        save_every: arguments.save_every,
        keep: arguments.keep,
        ..arguments
            .training
            .options(method.default_learning_rate(), order.epoch_len())?
    };
    let checkpoints = Checkpoints::of_run(&arguments.out);
    let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?;
    let first_step = match start {
        Start::Fresh => 0,
        Start::Checkpoint => trainer.resume(&checkpoints)?,
    };
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

    let mut records = Records::open(&arguments.out.join(METRICS_FILE), arguments, first_step)?;
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
    )?;
    let step = trainer.state().step;
    bar.finish(&format!("trained to step {step}"));
    if outcome == Outcome::Interrupted {
        return Err(
            Error::interrupted(format!("stopped after step {step}; everything is saved")).hint(
                format!("go on with `retune resume {}`", arguments.out.display()),
            ),
        );
    }
    if arguments.save_every == 0 {
        checkpoints.remove()?;
    }
    Finished {
        entry,
        arguments,
        folder: &folder,
        model: &model,
        method: method.as_ref(),
        options: &options,
        state: trainer.state(),
        data: &data,
        held_out: held_out.as_ref(),
        outcome,
    }
    .write()
}

fn load_data(
    arguments: &TrainArgs,
    tokenizer: &crate::data::Tokenizer,
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
    fn open(metrics: &Path, arguments: &TrainArgs, first_step: usize) -> Result<Self> {
        let folder = arguments.out.join("tensorboard");
        if arguments.tensorboard {
            std::fs::create_dir_all(&folder).at(folder.display())?;
        }
        let events = match (arguments.tensorboard, first_step) {
            (false, _) => None,
            (true, 0) => Some(EventFile::create(&folder)?),
            (true, step) => Some(EventFile::resume(&folder, step as u64)?),
        };
        let metrics = match first_step {
            0 => MetricsFile::create(metrics)?,
            step => MetricsFile::append(metrics, step as u64)?,
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
}

impl Finished<'_> {
    fn write(&self) -> Result<()> {
        let out = &self.arguments.out;
        adapter_folder::save(out, self.model, self.method, &self.arguments.base.model)?;
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
        self.print(&metrics)
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
        let files = |paths: &[PathBuf], purpose, data: &Dataset| -> Vec<DataFile> {
            // Counts are of all files together: they stand with the first.
            paths
                .iter()
                .enumerate()
                .map(|(index, path)| {
                    let counted = |count: usize| if index == 0 { count as u64 } else { 0 };
                    DataFile {
                        path: path.clone(),
                        purpose,
                        examples: counted(data.len()),
                        tokens: counted(data.report.tokens),
                        target_tokens: counted(data.report.target_tokens),
                    }
                })
                .collect()
        };
        let mut data = files(&self.arguments.data, Purpose::Training, self.data);
        if let Some(held_out) = self.held_out {
            data.extend(files(
                &self.arguments.eval_data,
                Purpose::Evaluation,
                held_out,
            ));
        }
        let threads = rayon::current_num_threads();
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
            hyperparameters: hyperparameters
                .map(|(name, value)| (name.to_owned(), value))
                .to_vec(),
            results: Results::of(metrics),
            duration: Duration::from_secs_f64(self.state.seconds),
            device: format!("CPU, {threads} threads"),
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
                "final_eval_loss": state.final_eval_loss, "tokens_per_second": speed, "seconds": state.seconds,
                "peak_memory_bytes": crate::report::memory::peak_bytes(),
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
