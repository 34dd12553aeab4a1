//! The run folder: whether a run may use it, and what it writes there at its start.

use super::arguments::{TrainArgs, method_command};
use super::metrics_log::remove_events;
use crate::adapter_folder::IDENTITY_FILE;
use crate::adapters::hooks::MethodEntry;
use crate::adapters::storage::{CONFIG_FILE, WEIGHTS_FILE};
use crate::atomic::check_writable;
use crate::cli::compare::is_comparison;
use crate::cli::placement::settled as settled_placement;
use crate::cli::run_file;
use crate::model::Placement;
use crate::report::metrics::METRICS_FILE;
use crate::train::{Checkpoints, TrainOptions};
use crate::{Context, Error, Result};
use clap::{ArgMatches, Args, Command};
use std::path::Path;
use toml::Value;

/// Refuses a run folder that holds its adapter, and no checkpoint to go on from.
pub(super) fn refuse_finished(run: &Path) -> Result<()> {
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

/// The folder must be writable before anything is computed, and must not hold another run's work.
pub(super) fn check_folder(arguments: &TrainArgs) -> Result<()> {
    let out = &arguments.out;
    if is_comparison(out) {
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

/// Clears away what another run left there, once all that was asked for is known to be possible.
pub(super) fn clear_folder(out: &Path) -> Result<()> {
    let checkpoints = Checkpoints::of_run(out);
    // Checkpoints alone would be taken for this run's.
    let used = out.join(run_file::RUN_FILE).exists()
        || out.join(CONFIG_FILE).exists()
        || checkpoints.newest_folder()?.is_some();
    if !used {
        return Ok(());
    }
    checkpoints.remove()?;
    for left in [METRICS_FILE, CONFIG_FILE, WEIGHTS_FILE, IDENTITY_FILE] {
        let file = out.join(left);
        if file.exists() {
            std::fs::remove_file(&file).at(file.display())?;
        }
    }
    remove_events(out)
}

/// Writes `run.toml`: the options as typed, and what was settled since.
pub(super) fn write_run_file(
    entry: &MethodEntry,
    matches: &ArgMatches,
    arguments: &TrainArgs,
    options: &TrainOptions,
    placement: &Placement,
) -> Result<()> {
    let command = match arguments.init_adapter {
        None => method_command(entry),
        // The adapter says what the method's own options would.
        Some(_) => TrainArgs::augment_args(Command::new(entry.name)),
    };
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
    settled.extend(arguments.base.settled_date());
    let file = arguments.out.join(run_file::RUN_FILE);
    run_file::write(&file, entry.name, &command, matches, &settled)
}
