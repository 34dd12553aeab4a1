//! `--model`: a folder, or a hub id that is downloaded.

use crate::{Error, Result};
use std::path::PathBuf;

pub(super) fn resolve(model: &str) -> Result<PathBuf> {
    let folder = PathBuf::from(model);
    if folder.is_dir() {
        return Ok(folder);
    }
    Err(Error::new(format!("`{model}` is no folder")))
}
