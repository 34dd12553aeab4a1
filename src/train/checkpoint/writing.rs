//! Writing a checkpoint, under a temporary name until all of it is on the disk.

use super::state::{StateFile, TrainState};
use super::{STATE, SUMS, WRITING};
use crate::adapters::storage::write_bytes;
use crate::digest::hexadecimal;
use crate::train::Inputs;
use crate::{Context, Result};
use candle_core::Tensor;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

/// A checkpoint under its temporary name.
pub(super) struct Writing {
    folder: TempDir,
    /// Length of each file so far.
    bytes: BTreeMap<String, u64>,
    /// What `SHA256SUMS` will say.
    sums: String,
}

impl Writing {
    pub(super) fn begin(beside: &Path) -> Result<Self> {
        Ok(Self {
            folder: tempfile::Builder::new()
                .prefix(WRITING)
                .tempdir_in(beside)
                .at(beside.display())?,
            bytes: BTreeMap::new(),
            sums: String::new(),
        })
    }

    pub(super) fn tensors(&mut self, name: &str, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let bytes = safetensors::serialize(tensors.iter(), None).at(name)?;
        self.file(name, &bytes)
    }

    /// The checksum is of what is meant to be written, so that it tells when something else is read.
    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let sum = hexadecimal(&Sha256::digest(bytes));
        self.sums.push_str(&format!("{sum}  {name}\n"));
        self.bytes.insert(name.to_owned(), bytes.len() as u64);
        write_bytes(&self.folder.path().join(name), bytes)
    }

    /// Adds the state and the checksums. Each file and its name in the folder are on the disk then.
    pub(super) fn finish(mut self, state: &TrainState, inputs: Option<Inputs>) -> Result<TempDir> {
        let state_file = StateFile::new(state.clone(), inputs, self.bytes.clone());
        let json = serde_json::to_vec_pretty(&state_file).context("cannot write the state")?;
        self.file(STATE, &json)?;
        write_bytes(&self.folder.path().join(SUMS), self.sums.as_bytes())?;
        Ok(self.folder)
    }
}
