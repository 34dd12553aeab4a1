//! Checkpoints of a run: everything that the rest of it depends on.
//!
//! `checkpoints/step-000040/` holds `weights.safetensors`, `optimizer.safetensors`, `best.safetensors` (when held-out
//! data is scored) and `state.json`. A folder is written under another name and renamed when it is complete.

use super::optimizer::AdamW;
use crate::adapters::storage::{AdapterWeights, read_adapter_tensors, write_bytes};
use crate::{Context, Error, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Version of the layout; a reader refuses others.
const VERSION: u32 = 1;

/// Where a run stands. Random streams and the data cursor follow from the step and the run's seed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Optimizer steps taken.
    pub step: usize,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// The newest evaluation's loss.
    pub final_eval_loss: Option<f64>,
    /// Evaluations since the best one.
    pub evaluations_without_gain: usize,
    /// Seconds spent in steps.
    pub seconds: f64,
    /// Tokens that went through the model in steps.
    pub tokens: u64,
}

/// The evaluation with the lowest loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps before it.
    pub step: usize,
    /// Its loss.
    pub loss: f64,
}

/// The checkpoints of one run folder.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    inputs: Option<Inputs>,
}

/// What a run must find unchanged to be resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// Fingerprint of the base.
    pub base: String,
    /// Digest of the training data.
    pub data: String,
    /// Digest of the held-out data, if there is any.
    pub held_out: Option<String>,
}

/// One checkpoint, read back.
pub struct Saved {
    /// Where it lies.
    pub folder: PathBuf,
    /// Where the run stood.
    pub state: TrainState,
    /// The trained weights.
    pub weights: BTreeMap<String, Tensor>,
    /// AdamW's moments.
    pub optimizer: BTreeMap<String, Tensor>,
    /// The weights of the best evaluation.
    pub best: BTreeMap<String, Tensor>,
}

impl Inputs {
    fn refuse_others(&self, found: &Self) -> Result<()> {
        let changed = if self.base != found.base {
            "the base"
        } else if self.data != found.data {
            "the training data"
        } else if self.held_out != found.held_out {
            "the held-out data"
        } else {
            return Ok(());
        };
        Err(Error::new(format!("{changed} has changed since the run was interrupted"))
            .hint("put back what it was, or start another run; `--init-adapter` can start from this one's weights"))
    }
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    version: u32,
    state: TrainState,
    #[serde(default)]
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

    /// Writes a checkpoint and removes all but the newest `keep`.
    pub fn save(
        &self,
        state: &TrainState,
        weights: &AdapterWeights,
        optimizer: &AdamW,
        best: &BTreeMap<String, Tensor>,
        keep: usize,
    ) -> Result<()> {
        fs::create_dir_all(&self.folder).at(self.folder.display())?;
        let temporary = tempfile::Builder::new()
            .prefix(".writing-")
            .tempdir_in(&self.folder)
            .at(self.folder.display())?;
        let weights: BTreeMap<String, Tensor> = weights
            .iter()
            .map(|(name, var)| (name.to_owned(), var.as_tensor().clone()))
            .collect();
        write_tensors(&temporary.path().join("weights.safetensors"), &weights)?;
        write_tensors(
            &temporary.path().join("optimizer.safetensors"),
            &optimizer.state().0,
        )?;
        if !best.is_empty() {
            write_tensors(&temporary.path().join("best.safetensors"), best)?;
        }
        let state_file = StateFile {
            version: VERSION,
            state: state.clone(),
            inputs: self.inputs.clone(),
        };
        let json = serde_json::to_vec_pretty(&state_file).context("cannot write the state")?;
        write_bytes(&temporary.path().join("state.json"), &json)?;
        let folder = self.folder.join(format!("step-{:06}", state.step));
        if folder.exists() {
            fs::remove_dir_all(&folder).at(folder.display())?;
        }
        fs::rename(temporary.keep(), &folder).at(folder.display())?;
        fs::File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .at(self.folder.display())?;
        for old in self.folders()?.iter().rev().skip(keep) {
            fs::remove_dir_all(old).at(old.display())?;
        }
        Ok(())
    }

    /// The run folder, if it exists yet.
    pub fn run(&self) -> Option<&Path> {
        self.folder.parent().filter(|run| run.is_dir())
    }

    /// The newest complete checkpoint.
    pub fn latest(&self) -> Result<Saved> {
        let folder = self.newest_folder()?.ok_or_else(|| {
            Error::new("no checkpoint to resume from")
                .at(self.folder.display())
                .hint("a run leaves checkpoints with `--save-every N`, and when it is interrupted")
        })?;
        let state_path = folder.join("state.json");
        let text = fs::read(&state_path).at(state_path.display())?;
        let file: StateFile = serde_json::from_slice(&text).at(state_path.display())?;
        if file.version != VERSION {
            return Err(
                Error::new(format!("layout version {} is not known here", file.version))
                    .at(state_path.display())
                    .hint("resume with the version of retune that wrote it"),
            );
        }
        if let (Some(saved), Some(found)) = (&file.inputs, &self.inputs) {
            saved.refuse_others(found).at(folder.display())?;
        }
        let best = folder.join("best.safetensors");
        Ok(Saved {
            state: file.state,
            weights: read_adapter_tensors(&folder.join("weights.safetensors"))?,
            optimizer: read_adapter_tensors(&folder.join("optimizer.safetensors"))?,
            best: if best.exists() {
                read_adapter_tensors(&best)?
            } else {
                BTreeMap::new()
            },
            folder,
        })
    }

    /// The folder of the newest complete checkpoint.
    pub fn newest_folder(&self) -> Result<Option<PathBuf>> {
        Ok(self.folders()?.pop())
    }

    /// Removes all checkpoints.
    pub fn remove(&self) -> Result<()> {
        if self.folder.exists() {
            fs::remove_dir_all(&self.folder).at(self.folder.display())?;
        }
        Ok(())
    }

    fn folders(&self) -> Result<Vec<PathBuf>> {
        if !self.folder.exists() {
            return Ok(Vec::new());
        }
        let mut folders = Vec::new();
        for entry in fs::read_dir(&self.folder).at(self.folder.display())? {
            let path = entry.at(self.folder.display())?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if let Some(step) = name
                .strip_prefix("step-")
                .and_then(|step| step.parse::<usize>().ok())
            {
                folders.push((step, path));
            }
        }
        folders.sort();
        Ok(folders.into_iter().map(|(_, path)| path).collect())
    }
}

fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let bytes = safetensors::serialize(tensors.iter(), None).at(path.display())?;
    write_bytes(path, &bytes)
}
