//! Checkpoints of a run: everything that the rest of it depends on.
//!
//! `checkpoints/step-000040/` holds `weights.safetensors`, `optimizer.safetensors`, `best.safetensors` (when held-out
//! data is scored), `state.json`, which also says how long these are, and `SHA256SUMS` over all of them, which
//! `sha256sum -c` checks too. A folder is written under another name and renamed when all of it is on the disk; it is
//! read only after every file has been found to be what was written. Beside them, `inputs.json` says what the run began on,
//! which counts until there is a checkpoint.

mod integrity;
mod reading;
mod state;
#[cfg(test)]
mod tests;
mod writing;

pub use integrity::Damaged;
pub(crate) use integrity::sum_of_file;
pub(super) use reading::expect_tensor;
pub(super) use state::Best;
pub use state::TrainState;

use super::inputs::Inputs;
use super::optimizer::AdamW;
use super::run_folder::{has_own_file, has_own_folder, make_folder, refuse_link};
use crate::adapters::storage::{AdapterWeights, read_small, write_bytes};
use crate::atomic::{parent, swap, sync_folder};
use crate::{Context, Error, Result};
use candle_core::Tensor;
use integrity::{Fault, intact};
use reading::Saved;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use writing::Writing;

const WEIGHTS: &str = "weights.safetensors";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
const BEST: &str = "best.safetensors";
const STATE: &str = "state.json";
const SUMS: &str = "SHA256SUMS";
const BEGUN: &str = "inputs.json";

/// How the name of a folder begins that is not complete.
const WRITING: &str = ".writing-";

/// The checkpoints of one run folder.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    inputs: Option<Inputs>,
}

impl Checkpoints {
    /// The checkpoints below `run`, which need not exist yet.
    pub fn of_run(run: &Path) -> Self {
        Self {
            folder: run.join("checkpoints"),
            inputs: None,
        }
    }

    /// The same, of a run on these inputs: they are saved with each checkpoint, and one of a run on others is refused.
    pub fn on(self, inputs: Inputs) -> Self {
        Self {
            inputs: Some(inputs),
            ..self
        }
    }

    /// Writes a checkpoint and removes all but the newest `keep`, of which those do not count that were found `damaged`.
    ///
    /// When it returns, the checkpoint survives a power failure. An earlier one of the same step changes places with it,
    /// and nothing is removed before.
    pub fn save(
        &self,
        state: &TrainState,
        weights: &AdapterWeights,
        optimizer: &AdamW,
        best: &BTreeMap<String, Tensor>,
        keep: usize,
        damaged: &[Damaged],
    ) -> Result<()> {
        make_folder(&self.folder)?;
        sync_folder(parent(&self.folder))?;
        let weights: BTreeMap<String, Tensor> = weights
            .iter()
            .map(|(name, var)| (name.to_owned(), var.as_tensor().clone()))
            .collect();
        let mut writing = Writing::begin(&self.folder)?;
        writing.tensors(WEIGHTS, &weights)?;
        writing.tensors(OPTIMIZER, &optimizer.state().0)?;
        if !best.is_empty() {
            writing.tensors(BEST, best)?;
        }
        let complete = writing.finish(state, self.inputs.clone())?;

        let folder = self.folder.join(format!("step-{:06}", state.step));
        let placed = if folder.exists() {
            swap(complete.path(), &folder)
        } else {
            fs::rename(complete.path(), &folder)
        };
        placed.at(folder.display())?;
        sync_folder(&self.folder)?;
        // Under the temporary name is nothing any more, or what was replaced, which goes with the other remains.
        drop(complete.keep());
        self.remove_old(state.step, keep, damaged)
    }

    /// Writes down what the run begins on, so that it starts again on nothing else if it ends before its first checkpoint.
    pub fn begin(&self) -> Result<()> {
        let Some(inputs) = &self.inputs else {
            return Ok(());
        };
        make_folder(&self.folder)?;
        sync_folder(parent(&self.folder))?;
        let text =
            serde_json::to_vec_pretty(inputs).context("cannot write what the run begins on")?;
        write_bytes(&self.folder.join(BEGUN), &text)
    }

    /// Fails if the run began on other inputs, as far as it has said on which.
    pub fn refuse_other_beginning(&self) -> Result<()> {
        let file = self.folder.join(BEGUN);
        let Some(found) = &self.inputs else {
            return Ok(());
        };
        if !has_own_file(&file)? {
            return Ok(());
        }
        let text = read_small(&file).at(file.display())?;
        let begun: Inputs = serde_json::from_slice(&text)
            .at(file.display())
            .map_err(|error| error.hint("start the run again, with `--overwrite`"))?;
        begun.refuse_others(found).at(file.display())
    }

    /// The run folder, if it exists yet.
    pub fn run(&self) -> Option<&Path> {
        self.folder.parent().filter(|run| run.is_dir())
    }

    /// The newest intact checkpoint.
    ///
    /// A damaged one is passed over for the one before it, and the result says so. One of another version or of a run on
    /// other inputs is an error, however many there are before it.
    pub fn latest(&self) -> Result<Saved> {
        let mut damaged = Vec::new();
        for (_, folder) in self.folders()?.into_iter().rev() {
            match intact(&folder) {
                Ok(file) => {
                    let mut moved = None;
                    if let (Some(saved), Some(found)) = (&file.inputs, &self.inputs) {
                        saved.refuse_others(found).at(folder.display())?;
                        moved = saved.moved(found);
                    }
                    return Saved::read(folder, file, damaged, moved);
                }
                Err(Fault::Damaged(reason)) => damaged.push(Damaged { folder, reason }),
                Err(Fault::Refused(error)) => return Err(error),
            }
        }
        if damaged.is_empty() {
            return Err(Error::new("no checkpoint to resume from")
                .at(self.folder.display())
                .hint(
                    "a run leaves checkpoints with `--save-every N`, and where it is interrupted or a step fails",
                ));
        }
        let each: Vec<String> = damaged.iter().map(ToString::to_string).collect();
        Err(
            Error::new(format!("no checkpoint is intact: {}", each.join("; "))).hint(
                "put the files back from a copy, or remove these folders and start the run again",
            ),
        )
    }

    /// The folder of the newest checkpoint, intact or not.
    pub fn newest_folder(&self) -> Result<Option<PathBuf>> {
        Ok(self.folders()?.pop().map(|(_, folder)| folder))
    }

    /// The folder of the newest checkpoint whose files are what was written.
    pub fn newest_intact(&self) -> Result<Option<PathBuf>> {
        let mut folders = self.folders()?.into_iter().map(|(_, folder)| folder);
        Ok(folders.rfind(|folder| intact(folder).is_ok()))
    }

    /// Removes all checkpoints, and their folder unless something else lies there.
    pub fn remove(&self) -> Result<()> {
        // Out of sight first: half of a checkpoint would be taken for a damaged one.
        for (step, folder) in self.folders()? {
            let hidden = self.folder.join(format!("{WRITING}{step}"));
            fs::rename(&folder, &hidden).at(folder.display())?;
        }
        let begun = self.folder.join(BEGUN);
        if has_own_file(&begun)? {
            fs::remove_file(&begun).at(begun.display())?;
        }
        let mut others = false;
        for (name, path) in self.entries()? {
            match name.starts_with(WRITING) {
                true => remove_entry(&path).at(path.display())?,
                false => others = true,
            }
        }
        if !others && has_own_folder(&self.folder)? {
            fs::remove_dir(&self.folder).at(self.folder.display())?;
        }
        Ok(())
    }

    /// Removes what the checkpoint of `step`, just saved, leaves without use: all but the newest `keep` up to it, those
    /// found `damaged` that still are, what a killed process left behind, and later ones. Had these been intact, the run
    /// would have gone on from them.
    fn remove_old(&self, step: usize, keep: usize, damaged: &[Damaged]) -> Result<()> {
        let is_damaged = |folder: &Path| {
            damaged.iter().any(|damaged| damaged.folder == folder) && intact(folder).is_err()
        };
        let (kept, useless): (Vec<_>, Vec<_>) = self
            .folders()?
            .into_iter()
            .partition(|(other, folder)| *other == step || (*other < step && !is_damaged(folder)));
        let surplus = kept.len().saturating_sub(keep.max(1));
        let removed = useless.into_iter().chain(kept.into_iter().take(surplus));
        let removed = removed.map(|(_, folder)| folder);
        let remains = self.entries()?.into_iter();
        let remains = remains.filter(|(name, _)| name.starts_with(WRITING));
        for folder in removed.chain(remains.map(|(_, folder)| folder)) {
            remove_entry(&folder).at(folder.display())?;
        }
        Ok(())
    }

    /// Step and folder of every checkpoint, oldest first. None of them may be a link: what is old is removed.
    fn folders(&self) -> Result<Vec<(usize, PathBuf)>> {
        let mut folders: Vec<_> = self
            .entries()?
            .into_iter()
            .filter_map(|(_, path)| Some((step_of(&path)?, path)))
            .collect();
        folders.sort();
        folders
            .iter()
            .try_for_each(|(_, folder)| refuse_link(folder))?;
        Ok(folders)
    }

    /// Name and path of everything that lies among the checkpoints.
    fn entries(&self) -> Result<Vec<(String, PathBuf)>> {
        if !has_own_folder(&self.folder)? {
            return Ok(Vec::new());
        }
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.folder).at(self.folder.display())? {
            let entry = entry.at(self.folder.display())?;
            let name = entry.file_name().to_string_lossy().into_owned();
            entries.push((name, entry.path()));
        }
        Ok(entries)
    }
}

/// The step that the name of a checkpoint's folder says.
fn step_of(folder: &Path) -> Option<usize> {
    let name = folder.file_name()?.to_str()?;
    name.strip_prefix("step-")?.parse().ok()
}

/// Removes what lies among the checkpoints, be it a folder or a stray file.
fn remove_entry(path: &Path) -> io::Result<()> {
    match path.symlink_metadata()?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}
