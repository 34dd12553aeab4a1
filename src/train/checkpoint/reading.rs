//! Reading a checkpoint back.

use super::integrity::Damaged;
use super::state::{StateFile, TrainState};
use super::{BEST, OPTIMIZER, WEIGHTS};
use crate::adapters::storage::read_adapter_tensors;
use crate::train::inputs::Moved;
use crate::{Error, Result};
use candle_core::{Shape, Tensor};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// One checkpoint, read back.
#[derive(Debug)]
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
    /// Newer checkpoints that were passed over, newest first.
    pub damaged: Vec<Damaged>,
    /// Where the run was, if that is not where it goes on.
    pub moved: Option<Moved>,
}

impl Saved {
    /// Reads the files of an intact checkpoint with this state file.
    pub(super) fn read(
        folder: PathBuf,
        file: StateFile,
        damaged: Vec<Damaged>,
        moved: Option<Moved>,
    ) -> Result<Self> {
        Ok(Self {
            state: file.state,
            weights: read_adapter_tensors(&folder.join(WEIGHTS))?,
            optimizer: read_adapter_tensors(&folder.join(OPTIMIZER))?,
            best: if file.bytes.contains_key(BEST) {
                read_adapter_tensors(&folder.join(BEST))?
            } else {
                BTreeMap::new()
            },
            damaged,
            moved,
            folder,
        })
    }

    /// The trained weight `name` as it was saved, in the shape that it has now; so is its best value, if one is kept.
    pub(in crate::train) fn weight(&self, name: &str, now: &Tensor) -> Result<&Tensor> {
        if !self.best.is_empty() {
            expect_tensor(&self.best, name, now.shape())
                .map_err(|error| self.not_the_runs(BEST, error))?;
        }
        expect_tensor(&self.weights, name, now.shape())
            .map_err(|error| self.not_the_runs(WEIGHTS, error))
    }

    /// The error of a file whose checksum is right, and which holds something else than the run.
    pub(in crate::train) fn not_the_runs(&self, file: &str, error: Error) -> Error {
        error.at(self.folder.join(file).display()).hint(
            "the checkpoint is of another run, or someone changed it: remove its folder, and the one before is used",
        )
    }
}

/// The tensor `name`, which must be there and have this shape.
pub(in crate::train) fn expect_tensor<'a>(
    tensors: &'a BTreeMap<String, Tensor>,
    name: &str,
    shape: &Shape,
) -> Result<&'a Tensor> {
    match tensors.get(name) {
        Some(tensor) if tensor.shape() == shape => Ok(tensor),
        Some(tensor) => Err(Error::new(format!(
            "`{name}` is {:?}, the run has {:?}",
            tensor.dims(),
            shape.dims()
        ))),
        None => Err(Error::new(format!("there is no `{name}` in it"))),
    }
}
