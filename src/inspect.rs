//! What a folder is: a checkpoint, an adapter, or a run; what is in it, and whether it is whole.
//!
//! Problems are facts here, not errors: a damaged checkpoint is described as far as it can be read.

mod adapter;
mod checkpoint;
mod run;
mod values;

pub use adapter::{AdapterFacts, Group, UpdateSize};
pub use checkpoint::{CheckpointFacts, Shape, TypeCount, broken_weights, unused_weights};
pub use run::{RunFacts, SavedCheckpoint};
pub use values::Values;

use crate::adapters::storage::PICKLE_FILE;
use crate::{Error, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Name of the file that a run folder is known by.
const RUN_FILE: &str = "run.toml";

/// How closely to look.
#[derive(Debug, Clone, Copy, Default)]
pub struct InspectOptions<'a> {
    /// The base of an adapter, to measure its update against. `None` takes the folder that the adapter names, if any.
    pub base: Option<&'a Path>,
    /// What to read of a checkpoint's weights.
    pub weights: ReadWeights,
}

/// What to read of a checkpoint's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadWeights {
    /// Every value: finds those that are not finite.
    #[default]
    All,
    /// Names, types and shapes.
    Headers,
}

/// What a folder is.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "there is one of it in a process")]
pub enum Inspection {
    /// A model.
    Checkpoint(CheckpointFacts),
    /// An adapter, written by retune or PEFT.
    Adapter(AdapterFacts),
    /// The output of `retune train`.
    Run(RunFacts),
}

impl Inspection {
    /// What is wrong: nothing that is named here works as it should.
    pub fn problems(&self) -> Vec<&str> {
        let (own, adapter) = match self {
            Self::Checkpoint(facts) => (&facts.problems, None),
            Self::Adapter(facts) => (&facts.problems, None),
            Self::Run(facts) => (&facts.problems, facts.adapter.as_ref()),
        };
        let adapter = adapter.into_iter().flat_map(|facts| &facts.problems);
        own.iter().chain(adapter).map(String::as_str).collect()
    }
}

/// A file and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileFacts {
    /// Its name within the folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// A tensor and its values.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorFacts {
    /// Its name in the file.
    pub name: String,
    /// The type it is stored in.
    pub dtype: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its values, if they were read.
    pub values: Option<Values>,
}

/// Looks at `folder`. `on_bytes` hears how many bytes of weights have been read, and of how many.
pub fn inspect(
    folder: &Path,
    options: &InspectOptions,
    on_bytes: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Inspection> {
    if !folder.is_dir() {
        let fact = match folder.exists() {
            true => "expected a folder, found a file",
            false => "no such folder",
        };
        return Err(Error::new(fact).at(folder.display()).hint(
            "point to a checkpoint with a `config.json`, an adapter with an `adapter_config.json`, or the output of `retune train`",
        ));
    }
    let has = |name: &str| folder.join(name).is_file();
    if has(RUN_FILE) {
        return run::inspect(folder, options).map(Inspection::Run);
    }
    if has("adapter_config.json") || has("adapter_model.safetensors") || has(PICKLE_FILE) {
        return adapter::inspect(folder, options).map(Inspection::Adapter);
    }
    let files = files(folder)?;
    if has("config.json") || files.iter().any(|file| file.name.ends_with(".safetensors")) {
        return checkpoint::inspect(folder, files, options, on_bytes).map(Inspection::Checkpoint);
    }
    Err(
        Error::new("neither a checkpoint nor an adapter nor a run: there is no `config.json`, no `adapter_config.json` and no `run.toml`")
            .at(folder.display())
            .hint("if it holds such folders, name one of them"),
    )
}

/// The files directly in `folder`, by name.
fn files(folder: &Path) -> Result<Vec<FileFacts>> {
    use crate::Context;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).at(folder.display())? {
        let path: PathBuf = entry.at(folder.display())?.path();
        // Links are followed: a download cache links to its files.
        if let (Ok(metadata), Some(name)) = (path.metadata(), path.file_name())
            && metadata.is_file()
        {
            files.push(FileFacts {
                name: name.to_string_lossy().into_owned(),
                bytes: metadata.len(),
            });
        }
    }
    files.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(files)
}

/// An error with its causes, on one line.
fn one_line(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

/// The same with what to do about it, where the fact alone leaves one without a way out.
fn with_hint(error: &Error) -> String {
    match error.hint_text() {
        Some(hint) => format!("{}; {hint}", one_line(error)),
        None => one_line(error),
    }
}
