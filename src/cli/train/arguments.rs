//! The options of `retune train` and `retune resume`.

use crate::adapters::METHODS;
use crate::adapters::hooks::MethodEntry;
use crate::cli::args::{LoopArgs, ModelArgs, RecordArgs};
use crate::data::Order;
use crate::train::{OnSpike, TrainOptions};
use crate::{Error, Result};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use std::path::PathBuf;

/// What every method's `train` command takes beside the method's own options.
#[derive(Debug, Clone, Args)]
pub(in crate::cli) struct TrainArgs {
    #[command(flatten)]
    pub(in crate::cli) base: ModelArgs,

    /// Training data: JSON lines or a JSON array, plain or .gz; several files are read one after the other
    #[arg(long, required = true, num_args = 1.., value_name = "FILE", help_heading = "Data")]
    pub(in crate::cli) data: Vec<PathBuf>,

    /// Folder for the adapter and the run's records
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,

    /// What the adapter calls its base, such as the hub id of a folder [default: `--model` as typed]
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,

    #[command(flatten)]
    pub(in crate::cli) records: RecordArgs,

    /// Held-out data that is only scored; the adapter with the lowest loss on it is kept
    #[arg(long, num_args = 1.., value_name = "FILE", conflicts_with = "eval_fraction", help_heading = "Data")]
    pub(in crate::cli) eval_data: Vec<PathBuf>,

    /// Hold out this share of the training data instead, chosen by the seed
    #[arg(long, value_name = "SHARE", help_heading = "Data")]
    pub(in crate::cli) eval_fraction: Option<f64>,

    /// Visit the examples in this order: one index a line, the first example is 0 [default: shuffled by the seed]
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    order: Option<PathBuf>,

    #[command(flatten)]
    pub(in crate::cli) training: LoopArgs,

    /// What to do about a step whose loss lies far above those of the steps before it
    #[arg(long, value_enum, default_value_t = OnSpike::Warn, value_name = "WHAT", help_heading = "Training")]
    on_spike: OnSpike,

    /// Start from this adapter instead of a new one; its own options replace the method's
    #[arg(long, value_name = "DIR", help_heading = "Training")]
    pub(super) init_adapter: Option<PathBuf>,

    /// Go on although `--init-adapter` was trained on another base
    #[arg(long, requires = "init_adapter", help_heading = "Training")]
    pub(super) allow_other_base: bool,

    /// Steps between checkpoints to resume from; 0 saves only where it is interrupted or a step fails
    #[arg(
        long,
        default_value_t = 0,
        value_name = "N",
        help_heading = "Run folder"
    )]
    pub(super) save_every: usize,

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
    pub(super) tensorboard: bool,

    /// Replace what an earlier run left in the folder, and other files of the names that a run writes
    #[arg(long, help_heading = "Run folder")]
    pub(super) overwrite: bool,

    /// Steps between progress lines where no bar can be drawn
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub(super) log_every: usize,

    /// Say nothing but errors and the result
    #[arg(long)]
    pub(super) quiet: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub(in crate::cli) json: bool,
}

/// Which run to go on with.
#[derive(Debug, Args)]
pub(in crate::cli) struct ResumeArgs {
    /// Run folder, as given to `--out`
    pub(super) run: PathBuf,

    /// Train the rows of a comparison that failed again, too
    #[arg(long)]
    pub(super) retry_failed: bool,
}

/// `retune train` with one subcommand for each row of `METHODS`.
pub(in crate::cli) fn command() -> Command {
    let methods = METHODS.iter().map(method_command);
    Command::new("train")
        .about("Train an adapter on a frozen base")
        .display_order(0)
        .after_help(
            "`retune train <method> --help` lists a method's options.\n\
             `retune train --config run.toml` repeats a run; options typed beside it win,\n\
             and `--recompute=false` takes back a flag.",
        )
        .subcommand_required(true)
        .arg_required_else_help(true)
        .args_override_self(true)
        .subcommands(methods)
}

/// The command of one method.
pub(super) fn method_command(entry: &MethodEntry) -> Command {
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

/// The method that was named, and its options.
pub(in crate::cli) fn chosen(matches: &ArgMatches) -> Result<(&'static MethodEntry, &ArgMatches)> {
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
pub(in crate::cli) fn parsed(matches: &ArgMatches) -> Result<TrainArgs> {
    TrainArgs::from_arg_matches(matches).map_err(|error| Error::usage(error.to_string()))
}

/// The method's own options and their values, as typed or by default.
pub(super) fn own_options(
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
    /// What the adapter calls its base.
    pub(super) fn base_name(&self) -> &str {
        self.base_name.as_deref().unwrap_or(&self.base.model)
    }

    /// Whether there is data that is only scored.
    pub(super) fn holds_out(&self) -> bool {
        !self.eval_data.is_empty() || self.eval_fraction.is_some()
    }

    /// The order in which a run visits `examples` examples.
    pub(in crate::cli) fn order(&self, examples: usize) -> Result<Order> {
        match &self.order {
            Some(file) => Order::from_file(file, examples),
            None => Ok(Order::shuffled(examples, self.training.seed)),
        }
    }

    /// What they mean for a method that learns best at `default_rate`, over `examples` examples.
    pub(super) fn options(&self, default_rate: f64, examples: usize) -> Result<TrainOptions> {
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
    pub(super) fn check(&self, entry: &MethodEntry, matches: &ArgMatches) -> Result<()> {
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
