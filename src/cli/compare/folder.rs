//! The folder of a comparison and those of its rows: what stands in the way, and what is cleared away.

use super::contenders::row_folders;
use super::{
    CHART_FILE, COMPARE_FILE, CompareArgs, RESULTS_FILE, ROWS_FILE, Start, command, is_comparison,
    parsed, recorded, settled,
};
use crate::adapter_folder::IDENTITY_FILE;
use crate::adapters::storage::{CONFIG_FILE, WEIGHTS_FILE};
use crate::atomic::{check_writable, sync_folder};
use crate::cli::pretrain::is_pretraining;
use crate::cli::{run_file, run_lock, taken};
use crate::compare::Contender;
use crate::model::Placement;
use crate::report::metrics::METRICS_FILE;
use crate::train::Checkpoints;
use crate::train::run_folder::{has_own_folder, make_folder, remove_own_file};
use crate::{Error, Result};
use clap::ArgMatches;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What a comparison writes into its folder, and into that of each row beside the checkpoints.
const WRITTEN: [&str; 4] = [COMPARE_FILE, ROWS_FILE, RESULTS_FILE, CHART_FILE];
const WRITTEN_BY_A_ROW: [&str; 4] = [CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, IDENTITY_FILE];

/// Whether nothing is left to do: the rows go when the results have been written.
fn is_finished(out: &Path) -> bool {
    out.join(RESULTS_FILE).exists() && !out.join(ROWS_FILE).exists()
}

/// What was typed must make sense, and no earlier work may be lost by it, before anything is touched.
pub(super) fn check_folder(arguments: &CompareArgs, start: Start) -> Result<()> {
    let out = &arguments.out;
    let folders = row_folders(arguments)?;
    match start {
        Start::Unfinished | Start::WithoutFailed if is_finished(out) => {
            return Err(
                Error::new("the comparison is finished: there is nothing to resume")
                    .at(out.display())
                    .hint("replace it by `retune compare --overwrite`"),
            );
        }
        Start::Unfinished | Start::WithoutFailed => {}
        Start::Fresh => {
            taken::refuse_works(out, &OTHER_WORKS)?;
            refuse_obstacles(arguments)?;
            if !arguments.overwrite {
                refuse_taken(out, &folders)?;
            }
        }
    }
    check_writable(out)
}

/// Works of other commands, of which some files have the names of a comparison's.
const OTHER_WORKS: [taken::Work; 2] = [
    ("a run of `retune train`", run_file::is_run),
    ("a run of `retune pretrain`", is_pretraining),
];

/// Fails by whatever stands where the comparison writes or removes, and is not what a comparison has put there.
fn refuse_obstacles(arguments: &CompareArgs) -> Result<()> {
    taken::refuse_obstacles(&arguments.out, &WRITTEN)?;
    for row in existing_rows(arguments)? {
        taken::refuse_works(&row, &OTHER_WORKS)?;
        taken::refuse_obstacles(&row, &WRITTEN_BY_A_ROW)?;
        Checkpoints::of_run(&row).newest_folder()?;
    }
    Ok(())
}

/// The folders that are there of the rows asked for, and of those of an earlier comparison.
fn existing_rows(arguments: &CompareArgs) -> Result<Vec<PathBuf>> {
    let out = &arguments.out;
    let mut rows = row_folders(arguments)?;
    if is_comparison(out) {
        let earlier = recorded(out)
            .and_then(|earlier| row_folders(&parsed(&earlier)?))
            .map_err(|error| error.hint("name another folder with `--out`, or remove this one"))?;
        rows.extend(earlier);
    }
    let mut existing = Vec::new();
    for row in rows {
        if has_own_folder(&row)? {
            existing.push(row);
        }
    }
    Ok(existing)
}

fn refuse_taken(out: &Path, row_folders: &BTreeSet<PathBuf>) -> Result<()> {
    const OTHERWISE: &str = "replace it with `--overwrite`, or name another folder with `--out`";
    if is_finished(out) {
        return Err(Error::new("the folder already holds a comparison")
            .at(out.display())
            .hint(OTHERWISE));
    }
    if is_comparison(out) {
        return Err(
            Error::new("the folder already holds an unfinished comparison")
                .at(out.display())
                .hint(format!(
                    "go on with it by `retune resume {}`, {OTHERWISE}",
                    out.display()
                )),
        );
    }
    let files = taken::files(out, &WRITTEN);
    if !files.is_empty() {
        return Err(taken::error(out, &files).hint(OTHERWISE));
    }
    match row_folders.iter().find(|folder| folder.exists()) {
        Some(folder) => Err(Error::new("a row of the table would be written here")
            .at(folder.display())
            .hint(OTHERWISE)),
        None => Ok(()),
    }
}

/// Clears away what an earlier comparison left, and nothing else, and writes down what is asked of this one: only now
/// that all of it is known to be possible.
pub(super) fn prepare_folder(
    matches: &ArgMatches,
    arguments: &CompareArgs,
    contenders: &[Contender],
    placement: &Placement,
) -> Result<()> {
    let out = &arguments.out;
    let rows = existing_rows(arguments)?;
    // A run of `retune train` may be at work in one of them.
    let _locks = run_lock::hold_all(rows.iter().map(PathBuf::as_path))?;
    check_folder(arguments, Start::Fresh)?;
    // First of all, and on the disk: as long as a row is in these, its folder is taken to be whole.
    for left in [ROWS_FILE, RESULTS_FILE, CHART_FILE] {
        remove_own_file(&out.join(left))?;
    }
    sync_folder(out)?;
    for row in rows {
        Checkpoints::of_run(&row).remove()?;
        for left in WRITTEN_BY_A_ROW {
            remove_own_file(&row.join(left))?;
        }
        // Stays if something else is in it.
        let _ = std::fs::remove_dir(row);
    }
    run_file::write_options(
        &out.join(COMPARE_FILE),
        "What was compared; `retune resume` goes on by it where the comparison stopped",
        &command(),
        matches,
        &settled(arguments, contenders, placement),
    )
}

/// Keeps other runs out of the folders of all rows, for as long as the locks live.
pub(super) fn lock_rows(contenders: &[Contender]) -> Result<Vec<run_lock::RunLock>> {
    for contender in contenders {
        make_folder(&contender.out)?;
    }
    run_lock::hold_all(contenders.iter().map(|contender| contender.out.as_path()))
}
