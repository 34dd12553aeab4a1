//! Several methods on one task: the same data, order, budget and seeds, one table.

mod finished;

use crate::adapter_folder::{self, Adapter, IDENTITY_FILE, OtherBase};
use crate::adapters::hooks::{AdapterMethod, NoAdapter};
use crate::adapters::storage::{AdapterWeights, CONFIG_FILE, WEIGHTS_FILE};
use crate::atomic::{parent, sync_folder};
use crate::data::{Dataset, Order, Tokenizer};
use crate::evaluate::{Evaluation, evaluate};
use crate::model::{self, Model, Placement};
use crate::report::memory;
use crate::report::metrics::{
    self, EvalReport, METRICS_FILE, Metric, MetricsFile, StepReport, number_or_null,
};
use crate::train::run_folder::make_folder;
use crate::train::{
    Checkpoints, Control, Damaged, Event, FaultyStep, Inputs, Moved, Outcome, TrainOptions,
    Trainer, sum_of_file,
};
use crate::{Context, Error, ErrorKind, Result};
use finished::{FinishedRows, Sources};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What the first row is called.
const BASE: &str = "base";
/// The files that are an adapter.
const ADAPTER_FILES: [&str; 3] = [CONFIG_FILE, WEIGHTS_FILE, IDENTITY_FILE];

/// What every method is given.
pub struct Task<'a> {
    /// Hugging Face folder of the base.
    pub base: &'a Path,
    /// Where to compute, and in what type.
    pub placement: &'a Placement,
    /// How the base is called in what is written.
    pub base_name: &'a str,
    /// The base's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// What is learned from.
    pub data: &'a Dataset,
    /// What is scored.
    pub held_out: &'a Dataset,
    /// Text of another kind, on which a method should not get worse.
    pub unrelated: Option<&'a Dataset>,
    /// Scores the share of right answers, where the task has one.
    pub exact_match: Option<&'a ExactMatchScore<'a>>,
    /// How many held-out examples that score is of; 0 without it.
    pub answers: usize,
}

/// The share of held-out examples that a model answers exactly.
pub type ExactMatchScore<'a> = dyn Fn(&Model) -> Result<f64> + 'a;

/// One method to try, with its own options.
pub struct Contender {
    /// Name in the table, unique.
    pub label: String,
    /// The method.
    pub method: Box<dyn AdapterMethod>,
    /// Budget and optimizer; only the learning rate differs from contender to contender.
    pub options: TrainOptions,
    /// Folder for its adapter, and for its checkpoints while it is trained.
    pub out: PathBuf,
}

/// One line of the table: a method trained once. Of one that failed, only what was asked for is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name in the table; `base` for the untrained one.
    pub method: String,
    /// Seed of the run.
    pub seed: u64,
    /// Name of the folder that holds its adapter; none for the base.
    pub adapter: Option<String>,
    /// SHA-256 of each file of its adapter; none in rows that were made before it was recorded.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub adapter_sha256: BTreeMap<String, String>,
    /// Number of trained values.
    pub trainable_parameters: usize,
    /// Size of `adapter_model.safetensors`.
    pub adapter_bytes: u64,
    /// Learning rate of the run.
    pub learning_rate: f64,
    /// Lowest loss on the held-out data; the adapter that is kept.
    #[serde(deserialize_with = "number_or_null")]
    pub best_eval_loss: f64,
    /// Optimizer steps before it.
    pub best_step: usize,
    /// Loss on the held-out data after the last step.
    #[serde(deserialize_with = "number_or_null")]
    pub final_eval_loss: f64,
    /// Share of held-out tokens that the kept adapter holds for the likeliest.
    #[serde(deserialize_with = "number_or_null")]
    pub token_accuracy: f64,
    /// Share of held-out examples answered exactly.
    pub exact_match: Option<f64>,
    /// Loss on unrelated text with the kept adapter.
    pub unrelated_loss: Option<f64>,
    /// How much that loss rose above the base's: forgetting.
    pub forgetting: Option<f64>,
    /// Tokens through the model each second of training.
    #[serde(deserialize_with = "number_or_null")]
    pub tokens_per_second: f64,
    /// Seconds of training, evaluation apart.
    pub seconds: f64,
    /// Most resident memory while training.
    pub peak_memory_bytes: u64,
    /// Held-out loss by optimizer step.
    #[serde(deserialize_with = "numbers_or_null")]
    pub curve: Vec<(usize, f64)>,
    /// Why it came to nothing, if it did: a loss or a gradient that was no number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Row {
    /// The row of a contender that came to nothing.
    fn failed(contender: &Contender, reason: String) -> Self {
        Self {
            method: contender.label.clone(),
            seed: contender.options.seed,
            adapter: None,
            adapter_sha256: BTreeMap::new(),
            trainable_parameters: 0,
            adapter_bytes: 0,
            learning_rate: contender.options.learning_rate,
            best_eval_loss: f64::NAN,
            best_step: 0,
            final_eval_loss: f64::NAN,
            token_accuracy: f64::NAN,
            exact_match: None,
            unrelated_loss: None,
            forgetting: None,
            tokens_per_second: 0.0,
            seconds: 0.0,
            peak_memory_bytes: 0,
            curve: Vec::new(),
            failed: Some(reason),
        }
    }

    fn is_of(&self, contender: &Contender) -> bool {
        self.method == contender.label && self.seed == contender.options.seed
    }
}

/// As [`number_or_null`], for each point.
fn numbers_or_null<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<(usize, f64)>, D::Error> {
    let points: Vec<(usize, Option<f64>)> = Vec::deserialize(deserializer)?;
    Ok(points
        .into_iter()
        .map(|(step, loss)| (step, loss.unwrap_or(f64::NAN)))
        .collect())
}

/// What a comparison tells its caller while it goes on.
pub enum ComparisonEvent<'a> {
    /// The rows that are finished were computed elsewhere than those to come.
    Moved(&'a Moved),
    /// A row was finished, and its adapter is not what was written any more: it is trained again.
    Lost {
        /// Its name in the table.
        label: &'a str,
        /// The file that shows it, and how.
        reason: &'a Error,
    },
    /// A contender starts.
    Started {
        /// Its name in the table.
        label: &'a str,
        /// Its number of steps.
        steps: usize,
        /// How many of them are behind it, if it goes on from a checkpoint.
        resumed: Option<usize>,
        /// Newer checkpoints, which it could not go on from.
        damaged: &'a [Damaged],
        /// Where it was before, if it goes on elsewhere.
        moved: Option<&'a Moved>,
    },
    /// An optimizer step was taken.
    Step(&'a StepReport),
    /// A step was left out.
    Skipped(&'a FaultyStep),
    /// A step was taken whose loss lies far above those before it.
    Spiked(&'a FaultyStep),
    /// The held-out data was scored.
    Evaluated(&'a EvalReport),
    /// A row is complete.
    Finished(&'a Row),
}

/// The base's row, then a row for each contender.
///
/// A row is in the file `rows` as soon as it is finished, and those that are there already are taken as they are; a
/// contender with checkpoints in its folder goes on from them. So a comparison that was interrupted, however that was,
/// ends with the same rows and adapters as one that was not. A row whose adapter is not what was written any more is
/// trained again. The file is the caller's to remove.
///
/// A contender whose loss or gradients are no numbers any more is a row that says so; the others are trained all the
/// same. It stays as it is until [`forget_failed`] takes it out of the file.
///
/// `on_event` may stop the comparison: what the row in training goes on from is saved then, and the error is of kind
/// `Interrupted`. It is an error, too, if rows or checkpoints were made from another base or other data, or with other
/// options that move bits.
pub fn compare(
    task: &Task,
    contenders: &[Contender],
    rows: &Path,
    on_event: &mut dyn FnMut(ComparisonEvent) -> Result<Control>,
) -> Result<Vec<Row>> {
    let tokens_per_pass = contenders
        .first()
        .map_or(8192, |contender| contender.options.tokens_per_pass);
    let sources = Sources::of(task, contenders)?;
    let weights = sources.weights().to_owned();
    let mut finished = FinishedRows::open(rows, sources)?;
    finished.refuse_unasked(contenders)?;
    finished.refuse_other_rates(contenders)?;
    let mut control = match &finished.moved {
        Some(moved) => on_event(ComparisonEvent::Moved(moved))?,
        None => Control::Continue,
    };
    if finished.rows.is_empty() {
        let row = base_row(task, tokens_per_pass)?;
        finished.add(row.clone())?;
        control = on_event(ComparisonEvent::Finished(&row))?;
    }
    for contender in contenders {
        if let Some(reason) = finished.forget_lost(contender)? {
            let label = &contender.label;
            let reason = &reason;
            if on_event(ComparisonEvent::Lost { label, reason })? == Control::Stop {
                control = Control::Stop;
            }
        }
    }
    let unrelated_before = finished.rows.first().and_then(|base| base.unrelated_loss);
    for contender in contenders {
        let label = &contender.label;
        if !finished.has(label, contender.options.seed) {
            if control == Control::Stop {
                return Err(Error::interrupted(format!(
                    "stopped before `{label}`; everything is saved"
                )));
            }
            let row = match train(task, contender, &weights, unrelated_before, on_event) {
                Err(error) if error.kind() == ErrorKind::NotFinite => {
                    Row::failed(contender, error.to_string())
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
                trained => trained.context(format!("`{label}` failed"))?,
            };
            finished.add(row.clone())?;
            control = on_event(ComparisonEvent::Finished(&row))?;
        }
        // Here for those, too, that a comparison left which was killed right after the row.
        Checkpoints::of_run(&contender.out).remove()?;
    }
    // A row that was trained again comes last in the file. The base, which is no contender's, stays first.
    finished
        .rows
        .sort_by_key(|row| contenders.iter().position(|contender| row.is_of(contender)));
    Ok(finished.rows)
}

/// Takes the rows that failed out of the file `rows`: the next [`compare`] trains them again, from their start.
pub fn forget_failed(rows: &Path) -> Result<()> {
    FinishedRows::forget_failed(rows)
}

fn base_row(task: &Task, tokens_per_pass: usize) -> Result<Row> {
    let model = model::load_on(
        task.placement,
        task.base,
        &NoAdapter,
        AdapterWeights::fresh(0, &task.placement.device),
        Some(task.tokenizer),
    )?;
    let scores = Scores::of(task, &model, tokens_per_pass)?;
    Ok(Row {
        method: BASE.to_owned(),
        seed: 0,
        adapter: None,
        adapter_sha256: BTreeMap::new(),
        trainable_parameters: 0,
        adapter_bytes: 0,
        learning_rate: 0.0,
        best_eval_loss: scores.held_out.loss,
        best_step: 0,
        final_eval_loss: scores.held_out.loss,
        token_accuracy: scores.held_out.accuracy,
        exact_match: scores.exact_match,
        unrelated_loss: scores.unrelated,
        forgetting: scores.unrelated.map(|_| 0.0),
        tokens_per_second: 0.0,
        seconds: 0.0,
        peak_memory_bytes: task.placement.peak_memory().unwrap_or(0),
        curve: Vec::new(),
        failed: None,
    })
}

fn train(
    task: &Task,
    contender: &Contender,
    weights_digest: &str,
    unrelated_before: Option<f64>,
    on_event: &mut dyn FnMut(ComparisonEvent) -> Result<Control>,
) -> Result<Row> {
    let options = &contender.options;
    // Each row's own peak, where the system can forget the one before.
    memory::reset_peak();
    let weights = AdapterWeights::fresh(options.seed, &task.placement.device);
    let model = model::load_on(
        task.placement,
        task.base,
        contender.method.as_ref(),
        weights,
        Some(task.tokenizer),
    )?;
    let mut order = Order::shuffled(task.data.len(), options.seed);
    let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, options)?;
    make_folder(&contender.out)?;
    sync_folder(parent(&contender.out))?;
    let (method, held_out) = (contender.method.as_ref(), Some(task.held_out));
    let inputs = Inputs::of(
        &model,
        weights_digest,
        method,
        options,
        task.data,
        held_out,
        &order,
    )?;
    let checkpoints = Checkpoints::of_run(&contender.out).on(inputs);
    let resumed = match checkpoints.newest_folder()? {
        Some(_) => Some(trainer.resume(&checkpoints)?),
        None => None,
    };
    on_event(ComparisonEvent::Started {
        label: &contender.label,
        steps: trainer.total_steps(&order),
        resumed,
        damaged: trainer.damaged(),
        moved: trainer.moved(),
    })?;
    let metrics_path = contender.out.join(METRICS_FILE);
    let mut metrics_file = match resumed {
        None => MetricsFile::create(&metrics_path)?,
        Some(step) => MetricsFile::append(&metrics_path, step as u64)?,
    };
    sync_folder(&contender.out)?;
    let outcome = trainer.run(
        task.data,
        &mut order,
        Some(task.held_out),
        Some(&checkpoints),
        &mut |event| match event {
            Event::Step(report) => {
                metrics_file.step(report)?;
                on_event(ComparisonEvent::Step(report))
            }
            Event::Skipped(skipped) => {
                metrics_file.step(&skipped.report)?;
                on_event(ComparisonEvent::Skipped(skipped))
            }
            Event::Spiked(spiked) => on_event(ComparisonEvent::Spiked(spiked)),
            Event::Evaluated(report) => {
                metrics_file.eval(report)?;
                on_event(ComparisonEvent::Evaluated(report))
            }
            Event::Saving(_) => {
                metrics_file.sync()?;
                Ok(Control::Continue)
            }
            Event::Saved(_) => Ok(Control::Continue),
        },
    )?;
    if outcome == Outcome::Interrupted {
        return Err(Error::interrupted(format!(
            "stopped after step {} of `{}`; everything is saved",
            trainer.state().step,
            contender.label
        )));
    }
    let curve = curve(&metrics_path)?;
    let peak_memory_bytes = task.placement.peak_memory().unwrap_or(0);
    let state = trainer.state().clone();
    adapter_folder::save(
        &contender.out,
        &model,
        contender.method.as_ref(),
        task.base_name,
    )?;
    let trainable_parameters = model.weights.parameter_count();
    drop(model);

    // Scored from the disk: what counts is the adapter that was written.
    let model = model::load_adapted(
        task.placement,
        task.base,
        &Adapter::open(&contender.out)?,
        Some(task.tokenizer),
        OtherBase::Refuse,
    )?;
    let scores = Scores::of(task, &model, options.tokens_per_pass)?;
    let weights_file = contender.out.join(WEIGHTS_FILE);
    Ok(Row {
        method: contender.label.clone(),
        seed: options.seed,
        adapter: contender
            .out
            .file_name()
            .map(|name| name.to_string_lossy().into_owned()),
        adapter_sha256: adapter_sums(&contender.out)?,
        trainable_parameters,
        adapter_bytes: std::fs::metadata(weights_file).map_or(0, |file| file.len()),
        learning_rate: options.learning_rate,
        best_eval_loss: scores.held_out.loss,
        best_step: state.best.map_or(state.step, |best| best.step),
        final_eval_loss: curve.last().map_or(scores.held_out.loss, |(_, loss)| *loss),
        token_accuracy: scores.held_out.accuracy,
        exact_match: scores.exact_match,
        unrelated_loss: scores.unrelated,
        forgetting: scores
            .unrelated
            .zip(unrelated_before)
            .map(|(after, before)| after - before),
        tokens_per_second: state.tokens as f64 / state.seconds,
        seconds: state.seconds,
        peak_memory_bytes,
        curve,
        failed: None,
    })
}

/// The SHA-256 of each file of the adapter in `folder`.
fn adapter_sums(folder: &Path) -> Result<BTreeMap<String, String>> {
    let sum = |name: &str| -> Result<_> {
        let path = folder.join(name);
        Ok((name.to_owned(), sum_of_file(&path).at(path.display())?))
    };
    ADAPTER_FILES.into_iter().map(sum).collect()
}

/// Held-out loss by optimizer step, from the records of a training.
fn curve(metrics_file: &Path) -> Result<Vec<(usize, f64)>> {
    let metrics = metrics::read(metrics_file)?.into_iter();
    let points = metrics.filter_map(|metric| match metric {
        Metric::Eval(report) => Some((report.step as usize, report.eval_loss)),
        Metric::Step(_) => None,
    });
    Ok(points.collect())
}

struct Scores {
    held_out: Evaluation,
    unrelated: Option<f64>,
    exact_match: Option<f64>,
}

impl Scores {
    fn of(task: &Task, model: &Model, tokens_per_pass: usize) -> Result<Self> {
        let score = |data: &Dataset, place: &str| {
            evaluate(model.decoder.as_ref(), data, tokens_per_pass, &mut |_| {})?
                .finite()
                .at(place)
        };
        Ok(Self {
            held_out: score(task.held_out, "held-out data")?,
            unrelated: task
                .unrelated
                .map(|data| Ok::<_, Error>(score(data, "unrelated data")?.loss))
                .transpose()?,
            exact_match: task
                .exact_match
                .map(|exact_match| exact_match(model))
                .transpose()?,
        })
    }
}
