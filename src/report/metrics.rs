//! `metrics.jsonl`: one JSON line for each logged training step and each evaluation.

use crate::adapters::storage::read_bytes;
use crate::atomic;
use crate::train::run_folder::has_own_file;
use crate::{Context, Error, Result};
use serde::{Deserialize, Deserializer, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Optimizer steps so far, this one included: the first is 1.
    pub step: u64,
    /// Mean loss of the step's target tokens, in nats.
    #[serde(deserialize_with = "number_or_null")]
    pub loss: f64,
    /// Learning rate of this step.
    #[serde(deserialize_with = "number_or_null")]
    pub learning_rate: f64,
    /// Euclidean norm of the gradient before clipping.
    #[serde(deserialize_with = "number_or_null")]
    pub gradient_norm: f64,
    /// Tokens of this step that the loss counts.
    pub target_tokens: u64,
    /// Tokens of all kinds that went through the model each second.
    #[serde(deserialize_with = "number_or_null")]
    pub tokens_per_second: f64,
    /// The most memory the process has had so far.
    pub peak_memory_bytes: u64,
    /// Passes over the training data so far: 1.5 is the middle of the second.
    #[serde(deserialize_with = "number_or_null")]
    pub epoch: f64,
}

/// One evaluation on held-out data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// Optimizer steps before this evaluation.
    pub step: u64,
    /// Mean loss of the evaluation's target tokens, in nats.
    #[serde(deserialize_with = "number_or_null")]
    pub eval_loss: f64,
    /// Tokens that the loss counts.
    pub eval_tokens: u64,
    /// Share of right answers, for tasks that have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Passes over the training data so far.
    #[serde(deserialize_with = "number_or_null")]
    pub epoch: f64,
}

/// One line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Metric {
    /// A training step.
    Step(StepReport),
    /// An evaluation.
    Eval(EvalReport),
}

impl Metric {
    /// Optimizer steps so far.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(report) => report.step,
            Self::Eval(report) => report.step,
        }
    }
}

/// Name of the file in a run folder.
pub(crate) const METRICS_FILE: &str = "metrics.jsonl";

/// The file of a run in progress. Each line is handed to the system as it is written.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Starts an empty file; what stood there is lost. A link or a pipe in its place is an error.
    pub fn create(path: &Path) -> Result<Self> {
        has_own_file(path)?;
        let file = File::create(path).at(path.display())?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
        })
    }

    /// Goes on with the file of a run that is resumed after `step`.
    ///
    /// Later lines are cut off, for these steps will be made again: the file has each step once. A file that is missing
    /// is started. A link or a pipe in its place is an error.
    pub fn append(path: &Path, step: u64) -> Result<Self> {
        let text = match has_own_file(path)? {
            true => read_bytes(path).at(path.display())?,
            false => Vec::new(),
        };
        let mut kept = Vec::with_capacity(text.len());
        for (line, metric) in parse(path, &text)? {
            if metric.step() <= step {
                kept.extend_from_slice(line);
                kept.push(b'\n');
            }
        }
        if kept != text {
            atomic::write_bytes(path, &kept)?;
        }
        let file = File::options()
            .append(true)
            .create(true)
            .open(path)
            .at(path.display())?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
        })
    }

    /// Adds a training step.
    pub fn step(&mut self, report: &StepReport) -> Result<()> {
        self.line(report)
    }

    /// Adds an evaluation.
    pub fn eval(&mut self, report: &EvalReport) -> Result<()> {
        self.line(report)
    }

    /// Makes the lines so far survive a power failure: to be called when a checkpoint is saved.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_all().at(self.path.display())
    }

    fn line(&mut self, report: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(report).at(self.path.display())?;
        line.push(b'\n');
        // One call, so that a reader never sees half a line of a living run.
        self.file.write_all(&line).at(self.path.display())
    }
}

/// Reads the file of a run. A half-written last line, as a killed run may leave it, is passed over.
pub fn read(path: &Path) -> Result<Vec<Metric>> {
    let text = read_bytes(path).at(path.display())?;
    let lines = parse(path, &text)?;
    Ok(lines.into_iter().map(|(_, metric)| metric).collect())
}

/// The complete lines of `text`, as they stand and as what they mean.
fn parse<'a>(path: &Path, text: &'a [u8]) -> Result<Vec<(&'a [u8], Metric)>> {
    let mut metrics = Vec::new();
    let mut lines = text.split(|&byte| byte == b'\n').enumerate().peekable();
    while let Some((index, line)) = lines.next() {
        // After the last line feed comes either nothing or a line that was cut short.
        if lines.peek().is_none() || line.trim_ascii().is_empty() {
            continue;
        }
        match serde_json::from_slice(line) {
            Ok(metric) => metrics.push((line, metric)),
            // A power failure can leave zeros where the end of the file should be.
            Err(_) if line.contains(&0) => break,
            Err(error) => {
                return Err(Error::new("neither a training step nor an evaluation")
                    .at(format_args!("{}:{}", path.display(), index + 1))
                    .hint("the file was edited or damaged: remove the line, or the file, to go on")
                    .caused_by(error));
            }
        }
    }
    Ok(metrics)
}

/// JSON has no NaN and no infinity; they are written as null.
pub(crate) fn number_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn step(step: u64) -> StepReport {
        StepReport {
            step,
            loss: 1.0 / step as f64,
            learning_rate: 2e-4,
            gradient_norm: 0.1 + 0.2,
            target_tokens: 512,
            tokens_per_second: 1234.5,
            peak_memory_bytes: 3 << 30,
            epoch: step as f64 / 100.0,
        }
    }

    fn eval(step: u64) -> EvalReport {
        EvalReport {
            step,
            eval_loss: 0.75,
            eval_tokens: 4096,
            accuracy: None,
            epoch: 0.5,
        }
    }

    fn steps(metrics: &[Metric]) -> Vec<u64> {
        metrics.iter().map(Metric::step).collect()
    }

    #[test]
    fn reads_what_was_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::create(&path).expect("a new file");
        file.step(&step(1)).expect("written");
        file.eval(&eval(1)).expect("written");
        file.step(&step(3)).expect("written");
        file.sync().expect("synced");
        // Without closing the file: every line is there at once.
        let metrics = read(&path).expect("readable");
        assert_eq!(
            metrics,
            [
                Metric::Step(step(1)),
                Metric::Eval(eval(1)),
                Metric::Step(step(3))
            ]
        );
        let text = fs::read_to_string(&path).expect("readable");
        assert_eq!(
            text.lines().next(),
            Some(
                r#"{"step":1,"loss":1.0,"learning_rate":0.0002,"gradient_norm":0.30000000000000004,"target_tokens":512,"tokens_per_second":1234.5,"peak_memory_bytes":3221225472,"epoch":0.01}"#
            )
        );
        assert_eq!(
            text.lines().nth(1),
            Some(r#"{"step":1,"eval_loss":0.75,"eval_tokens":4096,"epoch":0.5}"#)
        );
    }

    #[test]
    fn a_loss_that_is_not_finite_is_read_back_as_nan() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::create(&path).expect("a new file");
        let report = StepReport {
            loss: f64::INFINITY,
            ..step(1)
        };
        file.step(&report).expect("written");
        match &read(&path).expect("readable")[..] {
            [Metric::Step(report)] => assert!(report.loss.is_nan()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_half_written_last_line_is_passed_over() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::create(&path).expect("a new file");
        for index in 1..=2 {
            file.step(&step(index)).expect("written");
        }
        let whole = fs::read(&path).expect("readable");
        let first_line = whole
            .iter()
            .position(|&byte| byte == b'\n')
            .expect("a line")
            + 1;
        for length in first_line..whole.len() {
            fs::write(&path, &whole[..length]).expect("written");
            assert_eq!(
                steps(&read(&path).expect("readable")),
                [1],
                "{length} bytes"
            );
        }
        let mut zeros = whole[..first_line].to_vec();
        zeros.extend([0; 64]);
        zeros.push(b'\n');
        fs::write(&path, &zeros).expect("written");
        assert_eq!(steps(&read(&path).expect("readable")), [1]);
    }

    #[test]
    fn a_damaged_line_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "\n{\"step\": 1}\n\n").expect("written");
        let error = read(&path).expect_err("no loss").to_string();
        assert!(error.contains("metrics.jsonl:2: neither"), "{error}");
    }

    #[test]
    fn resuming_cuts_what_will_be_made_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::append(&path, 0).expect("started when missing");
        for index in 1..=5 {
            file.step(&step(index)).expect("written");
            file.eval(&eval(index)).expect("written");
        }
        drop(file);
        let uninterrupted = fs::read(&path).expect("readable");
        let mut killed = uninterrupted.clone();
        killed.extend(b"{\"step\":6,\"lo");
        fs::write(&path, killed).expect("written");

        let mut file = MetricsFile::append(&path, 3).expect("resumed");
        assert_eq!(steps(&read(&path).expect("readable")), [1, 1, 2, 2, 3, 3]);
        for index in 4..=5 {
            file.step(&step(index)).expect("written");
            file.eval(&eval(index)).expect("written");
        }
        assert_eq!(fs::read(&path).expect("readable"), uninterrupted);
    }
}
