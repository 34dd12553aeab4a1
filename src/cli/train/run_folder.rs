//! The run folder: whether a run may use it, and what it writes there at its start.

use super::arguments::{TrainArgs, method_command};
use super::metrics_log::{EVENT_FOLDER, remove_events};
use crate::adapter_folder::IDENTITY_FILE;
use crate::adapters::METHODS;
use crate::adapters::hooks::MethodEntry;
use crate::adapters::storage::{CONFIG_FILE, WEIGHTS_FILE, read_text};
use crate::atomic::check_writable;
use crate::cli::compare::is_comparison;
use crate::cli::placement::settled as settled_placement;
use crate::cli::pretrain::is_pretraining;
use crate::cli::{run_file, taken};
use crate::model::Placement;
use crate::report::metrics::METRICS_FILE;
use crate::train::run_folder::{has_own_folder, remove_own_file};
use crate::train::{Checkpoints, TrainOptions};
use crate::{Error, Result};
use clap::{ArgMatches, Args, Command};
use std::path::Path;
use toml::Value;

/// The card of an adapter.
const CARD_FILE: &str = "README.md";
/// What a run has written before its end, beside its checkpoints.
const BEFORE_THE_END: [&str; 4] = [run_file::RUN_FILE, METRICS_FILE, "loss.svg", IDENTITY_FILE];
/// What it writes at its end.
const AT_THE_END: [&str; 3] = [CARD_FILE, WEIGHTS_FILE, CONFIG_FILE];

/// Works of other commands, of which some files have the names of a run's.
const OTHER_WORKS: [taken::Work; 2] = [
    ("a comparison", is_comparison),
    ("a run of `retune pretrain`", is_pretraining),
];

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

/// The folder must be writable before anything is computed, and must hold neither another run's work nor somebody's own.
pub(super) fn check_folder(arguments: &TrainArgs) -> Result<()> {
    let out = &arguments.out;
    taken::refuse_works(out, &OTHER_WORKS)?;
    if out.join("config.json").exists() {
        return Err(
            Error::new("the folder holds a model, with its `config.json`")
                .at(out.display())
                .hint("an adapter needs a folder of its own: name another one with `--out`"),
        );
    }
    if !arguments.overwrite {
        refuse_taken(out)?;
    }
    refuse_obstacles(out)?;
    check_writable(out)
}

/// Fails by whatever stands where a run writes or removes, and is not what a run has put there.
pub(super) fn refuse_obstacles(out: &Path) -> Result<()> {
    taken::refuse_obstacles(out, &[&BEFORE_THE_END[..], &AT_THE_END].concat())?;
    Checkpoints::of_run(out).newest_folder()?;
    has_own_folder(&out.join(EVENT_FOLDER)).map(drop)
}

/// Refuses to take the place of work that is worth something, or of files that no run explains.
fn refuse_taken(out: &Path) -> Result<()> {
    // Not the run file alone: a run that ended before its first checkpoint has left nothing to lose.
    let begun = is_begun(out);
    let is_explained = |name: &str| {
        let is_own_card = || name == CARD_FILE && is_card(&out.join(name));
        begun && (BEFORE_THE_END.contains(&name) || is_own_card())
    };
    let mut taken = taken::files(out, &[&AT_THE_END[..], &BEFORE_THE_END].concat());
    taken.retain(|name| !is_explained(name));
    let finished = taken.contains(&CONFIG_FILE);
    let resumable = Checkpoints::of_run(out).newest_folder()?.is_some();
    if resumable {
        taken.insert(0, "checkpoints");
    }
    if taken.is_empty() {
        return Ok(());
    }
    const OTHERWISE: &str = "replace it with `--overwrite`, or name another folder with `--out`";
    let hint = match begun && (resumable || !finished) {
        true => format!(
            "go on with that run by `retune resume {}`, {OTHERWISE}",
            out.display()
        ),
        false => OTHERWISE.to_owned(),
    };
    Err(taken::error(out, &taken).hint(hint))
}

/// Whether a run was begun in the folder: its options are there, as `retune train` writes them.
fn is_begun(out: &Path) -> bool {
    let file = out.join(run_file::RUN_FILE);
    // Somebody may have written one by hand, and it would be replaced by what it means.
    let is_written = |text: String| text.starts_with(&format!("# {} ", run_file::REPEATS));
    read_text(&file).is_ok_and(is_written)
        && run_file::read(&file)
            .is_ok_and(|(method, _)| METHODS.iter().any(|entry| entry.name == method))
}

/// Whether this is the card that a run has written: each has the same tag.
fn is_card(file: &Path) -> bool {
    read_text(file)
        .is_ok_and(|text| text.starts_with("---\n") && text.contains("\ntags:\n- retune\n"))
}

/// Clears away what another run left there, once all that was asked for is known to be possible.
pub(super) fn clear_folder(out: &Path) -> Result<()> {
    let checkpoints = Checkpoints::of_run(out);
    // Checkpoints alone would be taken for this run's.
    let used = run_file::is_run(out)
        || out.join(CONFIG_FILE).exists()
        || checkpoints.newest_folder()?.is_some();
    if !used {
        return Ok(());
    }
    checkpoints.remove()?;
    for left in [METRICS_FILE, CONFIG_FILE, WEIGHTS_FILE, IDENTITY_FILE] {
        remove_own_file(&out.join(left))?;
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
    if placement.device.is_cuda() {
        // So does what is kept from epoch to epoch.
        let mebibytes = options.activation_cache_bytes >> 20;
        settled.push(("activation-cache", run_file::count(mebibytes)));
    }
    if arguments.holds_out() {
        settled.push(("eval-every", run_file::count(options.eval_every)));
    }
    settled.extend(settled_placement(placement));
    settled.extend(arguments.base.settled_date());
    let file = arguments.out.join(run_file::RUN_FILE);
    run_file::write(&file, entry.name, &command, matches, &settled)
}
