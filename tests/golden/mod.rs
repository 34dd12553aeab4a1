//! The fixtures beside this file, made by `make_golden.py` with transformers and PEFT.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several tests, each of which uses a part of it"
)]

use retune::data::{Example, collate};
use retune::model::Model;
use retune::task::causal_lm::score;
use retune::{Context, Result};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// A path below `tests/golden/`.
pub fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

/// The folders of one kind of fixture, in order.
pub fn names(kind: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(golden(kind)).at(kind)? {
        names.push(entry.at(kind)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    assert!(!names.is_empty(), "no fixtures of kind {kind}");
    Ok(names)
}

/// `score.json`: what the reference gives.
#[derive(Deserialize)]
pub struct ScoreFile {
    pub records: Vec<ScoreRecord>,
}

#[derive(Deserialize)]
pub struct ScoreRecord {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<Option<f32>>,
}

impl ScoreFile {
    pub fn read(folder: &Path) -> Result<Self> {
        Self::read_file(&folder.join("score.json"))
    }

    pub fn read_file(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).at(path.display())?;
        serde_json::from_slice(&text).at(path.display())
    }
}

/// The largest difference of any log-probability, with all records in one flat batch.
pub fn score_difference(model: &Model, expected: &ScoreFile) -> Result<f32> {
    let examples: Vec<Example> = expected
        .records
        .iter()
        .map(|record| Example::new(record.tokens.clone(), vec![true; record.tokens.len()]))
        .collect();
    let scores = score(
        model.decoder.as_ref(),
        &collate(&examples.iter().collect::<Vec<_>>()),
    )?;
    let wanted: Vec<f32> = expected
        .records
        .iter()
        .flat_map(|record| record.logprobs.iter().copied().flatten())
        .collect();
    assert_eq!(scores.len(), wanted.len());
    Ok(scores
        .iter()
        .zip(wanted)
        .map(|(score, wanted)| (score.log_probability - wanted).abs())
        .fold(0.0, f32::max))
}
