//! The command line: one file for each command. The only folder that prints or reads the environment.

mod args;
mod bench;
mod chat;
mod compare;
mod evaluate;
mod generate;
mod hub;
mod inspect;
mod interrupt;
mod memory_limit;
mod merge;
mod output;
mod placement;
mod plan;
mod pretrain;
mod progress;
mod run_file;
mod run_lock;
mod score;
mod table;
mod taken;
mod train;

use crate::bounded;
use crate::data::{Dataset, Tokenizer};
use crate::generate::{
    Control, ExactMatch, ExactMatchOptions, GenerationConfig, exact_match as count_exact_matches,
};
use crate::guard;
use crate::model::{Model, ModelConfig};
use crate::train::{Damaged, Moved};
use crate::{Error, ErrorKind, Result};
use clap::{Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use output::say;
use std::error::Error as _;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

/// Fine-tune a frozen base model by training a small adapter, merge adapters, compare methods.
#[derive(Parser)]
#[command(name = "retune", version, arg_required_else_help = true, args_override_self = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Commands,
}

#[derive(Subcommand)]
enum Commands {
    /// Fold one or several adapters into a checkpoint of its own
    Merge(merge::MergeArgs),
    /// Say what a checkpoint, an adapter or a run is, and whether it is whole
    Inspect(inspect::InspectArgs),
    /// Go on with an interrupted run or comparison exactly where it stopped
    Resume(train::ResumeArgs),
    /// Score held-out data: loss, perplexity, accuracy, exact match
    Evaluate(evaluate::EvaluateArgs),
    /// Print the log-probability of every token, as JSON lines
    Score(score::ScoreArgs),
    /// Let the model go on from a text, or answer one
    Generate(generate::GenerateArgs),
    /// Talk with the model
    Chat(chat::ChatArgs),
    /// Train a small base from scratch: tokenizer, random weights, all of them trained
    Pretrain(pretrain::PretrainArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// Which shell to complete in.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  retune completions bash > ~/.local/share/bash-completion/completions/retune"
)]
struct CompletionsArgs {
    /// The shell
    shell: clap_complete::Shell,
}

fn print_completions(shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "retune", &mut script);
    output::write(&String::from_utf8_lossy(&script)).map(drop)
}

const EXAMPLES: &str = "\
Examples:
  retune train lora --model ./base --data train.jsonl --out my-adapter
  retune evaluate --model ./base --adapter my-adapter --data eval.jsonl
  retune generate --model ./base --adapter my-adapter --prompt \"Hello\"
  retune merge --model ./base --adapter my-adapter --out merged
  retune compare --model ./base --data train.jsonl --out comparison

`retune <command> --help` is the manual of a command.";

/// Says which checkpoints a run could not go on from, and whether it was elsewhere before; even a quiet one, for steps were
/// lost, and bits may be.
fn warn_of_departures(damaged: &[Damaged], moved: Option<&Moved>, step: usize) {
    for damaged in damaged {
        let damaged = printable(&damaged.to_string());
        say!("warning: {damaged}; going on after step {step} instead");
    }
    if let Some(moved) = moved {
        say!("warning: {}", printable(&moved.to_string()));
    }
}

/// Says that the longest sequence goes beyond the positions that the model was made for. It is computed as transformers
/// does; `generate` refuses it.
fn warn_of_length(
    show: progress::Show,
    config: &ModelConfig,
    longest_example: usize,
    prompt_rows: usize,
) {
    let positions = config.context();
    if longest_example.saturating_add(prompt_rows) <= positions {
        return;
    }
    let before = match prompt_rows {
        0 => String::new(),
        rows => format!(" after {rows} rows of a soft prompt"),
    };
    note(
        show,
        &format!(
            "warning: the longest example has {longest_example} tokens{before}, and the model was made for {positions} \
             positions; a lower `--max-length` keeps within them"
        ),
    );
}

/// Parses the process's arguments, runs the command, reports an error, and says how it went.
pub fn main() -> ExitCode {
    guard::watch_threads();
    bounded::watch();
    match run(std::env::args_os().collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(match error.kind() {
                ErrorKind::Failed | ErrorKind::NotFinite => 1,
                ErrorKind::Usage => 2,
                ErrorKind::Interrupted => 130,
            })
        }
    }
}

fn run(arguments: Vec<OsString>) -> Result<()> {
    let arguments = run_file::expand(arguments)?;
    let matches = match command().try_get_matches_from(arguments) {
        Ok(matches) => matches,
        // Help and version are errors to clap too; it prints each where it belongs and knows the exit code.
        Err(error) => error.exit(),
    };
    match matches.subcommand() {
        Some(("train", matches)) => train::train(matches),
        Some(("plan", matches)) => plan::plan(matches),
        Some(("bench", matches)) => bench::bench(matches),
        Some(("compare", matches)) => compare::compare(matches),
        _ => {
            let cli =
                Cli::from_arg_matches(&matches).map_err(|error| Error::usage(error.to_string()))?;
            match cli.command {
                Commands::Merge(arguments) => merge::merge(&arguments),
                Commands::Inspect(arguments) => inspect::inspect(&arguments),
                Commands::Resume(arguments) => train::resume(&arguments),
                Commands::Evaluate(arguments) => evaluate::evaluate(&arguments),
                Commands::Score(arguments) => score::score(&arguments),
                Commands::Generate(arguments) => generate::generate(&arguments),
                Commands::Chat(arguments) => chat::chat(&arguments),
                Commands::Pretrain(arguments) => pretrain::pretrain(&arguments),
                Commands::Completions(arguments) => print_completions(arguments.shell),
            }
        }
    }
}

/// The whole command line. A method's options come from its own file, and those of a run or a comparison are written to
/// one, so these commands are built, not derived.
fn command() -> Command {
    Cli::command()
        .subcommand(train::command())
        .subcommand(plan::command())
        .subcommand(bench::command())
        .subcommand(compare::command())
}

/// `error:`, what caused it, and what to do about it.
fn report(error: &Error) {
    say!("error: {}", printable(&error.to_string()));
    let mut source = error.source();
    while let Some(cause) = source {
        say!("  caused by: {}", printable(&cause.to_string()));
        source = cause.source();
    }
    if let Some(hint) = error.hint_text() {
        say!("\nhint: {}", printable(hint));
    }
}

/// A text that may quote a stranger's file, of a length to read, and without what a terminal would obey.
fn printable(text: &str) -> String {
    const LONGEST: usize = 4000;
    let spelt = output::spelt_out(text);
    let mut starts = spelt.char_indices().map(|(start, _)| start);
    match starts.find(|start| *start > LONGEST) {
        Some(end) => format!("{}…", &spelt[..end]),
        None => spelt.into_owned(),
    }
}

/// A line for the user on standard error, unless nothing is to be shown.
fn note(show: progress::Show, text: &str) {
    if show != progress::Show::Nothing {
        say!("{}", printable(text));
    }
}

/// Lets `model` answer the first `count` examples that have an answer, greedily.
fn exact_match(
    model: &Model,
    tokenizer: &Tokenizer,
    folder: &Path,
    data: &Dataset,
    count: usize,
    show: progress::Show,
) -> Result<ExactMatch> {
    let options = GenerationConfig::read(folder, &model.config)?.options(tokenizer);
    let examples = &data.examples[..count.min(data.len())];
    let bar = progress::Progress::items(show, "answering", examples.len() as u64);
    let result = count_exact_matches(
        model,
        tokenizer,
        examples,
        &ExactMatchOptions::new(options),
        &mut |_| {
            bar.advance(1);
            Ok(Control::Continue)
        },
    )?;
    bar.finish();
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_fit_a_terminal() {
        for line in EXAMPLES.lines() {
            assert!(line.chars().count() < 80, "{line}");
        }
    }

    /// Fails by a paragraph whose own line ends come beside those that a terminal of 80 columns makes.
    fn wraps_evenly(command: &Command) {
        for command in command.get_subcommands() {
            wraps_evenly(command);
        }
        let help = command.get_after_help().map(ToString::to_string);
        let help = help.unwrap_or_default();
        let lines: Vec<&str> = help.lines().collect();
        for pair in lines.windows(2) {
            let goes_on = pair[1].starts_with(|first: char| !first.is_whitespace());
            let fits = pair[0].chars().count() <= 80;
            assert!(fits || !goes_on, "{}: {}", command.get_name(), pair[0]);
        }
    }

    #[test]
    fn long_help_is_not_wrapped_twice() {
        wraps_evenly(&command());
    }

    #[test]
    fn what_is_printed_is_of_a_length_to_read() {
        assert_eq!(printable("a\u{1b}b\n"), "a\\u{1b}b\n");
        let printed = printable(&"ü".repeat(100_000));
        assert!((4000..4010).contains(&printed.len()), "{}", printed.len());
        assert!(printed.ends_with("ü…"));
        let whole = "x".repeat(4000);
        assert_eq!(printable(&whole), whole);
    }
}
