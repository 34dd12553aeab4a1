//! The folder of a training run: what was asked for, how far it is, what it has learned.

use super::{AdapterFacts, InspectOptions, RUN_FILE, adapter, files, one_line};
use crate::adapters::storage::read_text;
use crate::report::metrics::{self, EvalReport, Metric, StepReport};
use crate::{Context, Error, Result};
use serde::Serialize;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// What is known of a run.
#[derive(Debug, Clone, Serialize)]
pub struct RunFacts {
    /// Where it is.
    pub folder: PathBuf,
    /// The method that is trained.
    pub method: Option<String>,
    /// The options of `retune train`, from `run.toml`.
    pub options: Map<String, Value>,
    /// Whether it came to its end: the adapter is there.
    pub finished: bool,
    /// Optimizer steps taken, as far as they were recorded.
    pub steps: u64,
    /// Optimizer steps of the whole run, if that can be told.
    pub total_steps: Option<u64>,
    /// The first recorded step.
    pub first_step: Option<StepReport>,
    /// The last recorded step.
    pub last_step: Option<StepReport>,
    /// The last evaluation.
    pub last_eval: Option<EvalReport>,
    /// The evaluation with the lowest loss.
    pub best_eval: Option<EvalReport>,
    /// What can be resumed from, oldest first.
    pub checkpoints: Vec<SavedCheckpoint>,
    /// The adapter, if there is one.
    pub adapter: Option<AdapterFacts>,
    /// What is wrong.
    pub problems: Vec<String>,
}

/// A checkpoint of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SavedCheckpoint {
    /// Its folder.
    pub folder: PathBuf,
    /// Size of its files.
    pub bytes: u64,
}

pub(super) fn inspect(folder: &Path, options: &InspectOptions) -> Result<RunFacts> {
    let mut asked = read_options(&folder.join(RUN_FILE))?;
    let method = asked
        .remove("method")
        .and_then(|method| Some(method.as_str()?.to_owned()));
    let mut facts = RunFacts {
        folder: folder.to_owned(),
        method,
        options: asked,
        finished: folder.join("adapter_config.json").is_file(),
        steps: 0,
        total_steps: None,
        first_step: None,
        last_step: None,
        last_eval: None,
        best_eval: None,
        checkpoints: checkpoints(&folder.join("checkpoints"))?,
        adapter: None,
        problems: Vec::new(),
    };
    let records = folder.join("metrics.jsonl");
    if records.is_file() {
        match metrics::read(&records) {
            Ok(records) => facts.look_at_records(records),
            Err(error) => facts.problems.push(one_line(&error)),
        }
    }
    if facts.finished {
        facts.adapter = Some(adapter::inspect(folder, options)?);
    }
    Ok(facts)
}

impl RunFacts {
    fn look_at_records(&mut self, records: Vec<Metric>) {
        for record in records {
            self.steps = self.steps.max(record.step());
            match record {
                Metric::Step(report) => {
                    if !report.loss.is_finite() {
                        self.problems.push(format!(
                            "the loss of step {} is {}",
                            report.step, report.loss
                        ));
                    }
                    self.first_step.get_or_insert_with(|| report.clone());
                    self.last_step = Some(report);
                }
                Metric::Eval(report) => {
                    let best = self
                        .best_eval
                        .as_ref()
                        .map_or(f64::INFINITY, |best| best.eval_loss);
                    if report.eval_loss < best {
                        self.best_eval = Some(report.clone());
                    }
                    self.last_eval = Some(report);
                }
            }
        }
        let number = |name: &str| self.options.get(name).and_then(Value::as_f64);
        self.total_steps = match (number("steps"), &self.last_step) {
            (Some(steps), _) => Some(steps as u64),
            // Without a number of steps it is epochs, and how long one is shows in the records.
            (None, Some(last)) if last.epoch > 0.0 => {
                let epochs = number("epochs").unwrap_or(3.0);
                Some(
                    (epochs * last.step as f64 / last.epoch - 1e-6)
                        .ceil()
                        .max(1.0) as u64,
                )
            }
            _ => None,
        };
    }
}

fn read_options(path: &Path) -> Result<Map<String, Value>> {
    let text = read_text(path).at(path.display())?;
    let table: toml::Table = text
        .parse()
        .map_err(|error: toml::de::Error| {
            Error::new(format!("not valid TOML: {}", error.message()))
        })
        .at(path.display())?;
    match serde_json::to_value(table).at(path.display())? {
        Value::Object(options) => Ok(options),
        _ => Ok(Map::new()),
    }
}

fn checkpoints(folder: &Path) -> Result<Vec<SavedCheckpoint>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).at(folder.display())? {
        let path = entry.at(folder.display())?.path();
        let is_step = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("step-"));
        if is_step && path.is_dir() {
            found.push(SavedCheckpoint {
                bytes: files(&path)?.iter().map(|file| file.bytes).sum(),
                folder: path,
            });
        }
    }
    found.sort_by(|left, right| left.folder.cmp(&right.folder));
    Ok(found)
}
