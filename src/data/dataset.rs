//! All examples of a run, and a report of what became of its records.

use std::path::PathBuf;

use crate::data::{Example, Learn, Tokenizer};
use crate::{Error, Result};

/// How data files become examples.
#[derive(Debug, Clone, Default)]
pub struct DataOptions {
    /// Which tokens the loss counts.
    pub learn: Learn,
    /// The most tokens an example may have; the head is kept. No limit if `None`.
    pub max_length: Option<usize>,
    /// How many records may be unusable before loading fails.
    pub skip_bad: usize,
}

/// What became of the records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataReport {
    /// How many records the files hold, usable or not.
    pub records: usize,
    /// How many of them were unusable and skipped.
    pub skipped: usize,
    /// How many examples were cut at the maximum length.
    pub truncated: usize,
    /// How many tokens the examples have together.
    pub tokens: usize,
    /// How many of them the loss counts.
    pub target_tokens: usize,
    /// The tokens of the longest example.
    pub longest: usize,
}

/// All examples of a run.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    /// The examples, in the order of the files.
    pub examples: Vec<Example>,
    /// What became of the records.
    pub report: DataReport,
}

impl Dataset {
    /// Reads the files one after the other and makes examples of their records.
    pub fn load(files: &[PathBuf], tokenizer: &Tokenizer, options: &DataOptions) -> Result<Self> {
        let _ = (tokenizer, options);
        Err(Error::new(format!(
            "reading {} data files is not written yet",
            files.len()
        )))
    }

    /// The number of examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Whether there is no example.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }
}
