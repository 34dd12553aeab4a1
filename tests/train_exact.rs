//! Training against PEFT and `torch.optim.AdamW`, against itself cut up and stopped in other ways, and what it tells its
//! caller.

mod golden;

use candle_core::{Device, Tensor, Var};
use golden::golden;
use retune::adapter_folder::{Adapter, OtherBase};
use retune::adapters::hooks::{
    AdapterMethod, BaseLinear, InputSite, LinearAdapter, LinearSite, Mode, ModelShape, SoftPrompt,
};
use retune::adapters::lora::Lora;
use retune::adapters::prompt::{Prompt, PromptStart};
use retune::adapters::storage::{
    AdapterWeights, Init, PeftConfig, PeftFolder, read_adapter_tensors,
};
use retune::data::{DataOptions, DataReport, Dataset, Example, Order, Tokenizer};
use retune::evaluate::evaluate;
use retune::model::{Model, Placement, load_adapted};
use retune::ops::Quantization;
use retune::report::metrics::{EvalReport, StepReport};
use retune::train::{
    Budget, CacheType, Checkpoints, Control, Event, OnNonfinite, OnSpike, Outcome, Recompute,
    Schedule, TrainOptions, TrainState, Trainer,
};
use retune::{Context, Result};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tempfile::TempDir;

#[derive(Deserialize)]
struct Expected {
    learning_rate: f64,
    weight_decay: f64,
    epsilon: f64,
    max_gradient_norm: f64,
    batch_size: usize,
    losses: Vec<f64>,
    gradient_norms: Vec<f64>,
}

struct Run {
    losses: Vec<f64>,
    norms: Vec<f64>,
    model: Model,
}

fn expected(method: &str) -> Result<Expected> {
    expected_in(method, "expected.json")
}

fn expected_in(method: &str, file: &str) -> Result<Expected> {
    let path = golden("train").join(method).join(file);
    serde_json::from_slice(&std::fs::read(&path).at(path.display())?).at(path.display())
}

fn options(expected: &Expected) -> TrainOptions {
    TrainOptions {
        budget: Budget::Steps(expected.losses.len()),
        batch_size: expected.batch_size,
        learning_rate: expected.learning_rate,
        schedule: Schedule::Constant,
        weight_decay: expected.weight_decay,
        epsilon: expected.epsilon,
        max_gradient_norm: expected.max_gradient_norm,
        ..TrainOptions::default()
    }
}

fn train(method: &str, options: &TrainOptions) -> Result<Run> {
    train_from(&initial(method), method, options)
}

/// The adapter that the method's golden run starts from.
fn initial(method: &str) -> PathBuf {
    golden("train").join(method).join("initial")
}

fn train_from(initial: &Path, method: &str, options: &TrainOptions) -> Result<Run> {
    train_on(&Placement::default(), initial, method, options)
}

fn train_on(
    placement: &Placement,
    initial: &Path,
    method: &str,
    options: &TrainOptions,
) -> Result<Run> {
    let folder = golden("train").join(method);
    let base = golden("models/llama");
    let tokenizer = Tokenizer::load(&base)?;
    let data = Dataset::load(
        &[folder.join("data.jsonl")],
        &tokenizer,
        &DataOptions::default(),
    )?;
    let mut order = Order::from_file(&folder.join("order.txt"), data.len())?;
    let adapter = Adapter::open(initial)?;
    let model = load_adapted(
        placement,
        &base,
        &adapter,
        Some(&tokenizer),
        OtherBase::Refuse,
    )?;
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    let mut on_event = |event: Event| {
        if let Event::Step(step) = event {
            losses.push(step.loss);
            norms.push(step.gradient_norm);
        }
        Ok(Control::Continue)
    };
    Trainer::new(model.decoder.as_ref(), &model.weights, options)?.run(
        &data,
        &mut order,
        None,
        None,
        &mut on_event,
    )?;
    Ok(Run {
        losses,
        norms,
        model,
    })
}

fn default_learning_rate(method: &str) -> Result<f64> {
    let adapter = Adapter::open(&initial(method))?;
    Ok(adapter.method.default_learning_rate())
}

fn relative(left: &[f64], right: &[f64]) -> f64 {
    assert_eq!(left.len(), right.len());
    left.iter()
        .zip(right)
        .map(|(left, right)| (left - right).abs() / right.abs())
        .fold(0.0, f64::max)
}

const METHODS: [&str; 3] = ["lora", "prompt", "last-layers"];

#[test]
fn twenty_steps_equal_pefts() -> Result<()> {
    for method in METHODS {
        let expected = expected(method)?;
        let run = train(method, &options(&expected))?;
        let losses = relative(&run.losses, &expected.losses);
        assert!(
            losses < 1e-4,
            "{method}: losses differ by {losses}: {:?}",
            run.losses
        );
        let norms = relative(&run.norms, &expected.gradient_norms);
        assert!(norms < 1e-3, "{method}: gradient norms differ by {norms}");

        let last = read_adapter_tensors(
            &golden("train")
                .join(method)
                .join("final/adapter_model.safetensors"),
        )?;
        assert_eq!(last.len(), run.model.weights.iter().count());
        for (name, var) in run.model.weights.iter() {
            let difference = (var.as_tensor() - &last[name])?
                .abs()?
                .flatten_all()?
                .max(0)?
                .to_scalar::<f32>()?;
            assert!(
                difference < 1e-4,
                "{method}: `{name}` differs by {difference}"
            );
        }
    }
    Ok(())
}

/// The CPU in f32, the base in NF4.
fn in_nf4() -> Placement {
    Placement {
        quantization: Some(Quantization::Nf4),
        ..Placement::default()
    }
}

#[test]
fn twenty_steps_on_a_base_in_nf4_equal_pefts() -> Result<()> {
    for method in METHODS {
        let expected = expected_in(method, "expected-nf4.json")?;
        let run = train_on(&in_nf4(), &initial(method), method, &options(&expected))?;
        let losses = relative(&run.losses, &expected.losses);
        assert!(
            losses < 1e-4,
            "{method}: losses differ by {losses}: {:?}",
            run.losses
        );
        let norms = relative(&run.norms, &expected.gradient_norms);
        assert!(norms < 1e-3, "{method}: gradient norms differ by {norms}");
    }
    Ok(())
}

#[test]
fn how_a_step_is_cut_and_computed_changes_nothing() -> Result<()> {
    for method in METHODS {
        // At the rate that the method is used with: the fixtures' rates, chosen for a steep fall, make AdamW blow
        // rounding up tenfold within the twenty steps.
        let plain = TrainOptions {
            learning_rate: default_learning_rate(method)?,
            ..options(&expected(method)?)
        };
        let whole = train(method, &plain)?.losses;
        let variants = [
            (
                "one example a pass",
                TrainOptions {
                    tokens_per_pass: 1,
                    ..plain.clone()
                },
            ),
            (
                "two examples a pass",
                TrainOptions {
                    tokens_per_pass: 30,
                    ..plain.clone()
                },
            ),
            (
                "recomputing",
                TrainOptions {
                    recompute: Recompute::Blocks,
                    ..plain.clone()
                },
            ),
            (
                "recomputing in passes",
                TrainOptions {
                    recompute: Recompute::Blocks,
                    tokens_per_pass: 30,
                    ..plain.clone()
                },
            ),
        ];
        for (name, options) in variants {
            let difference = relative(&train(method, &options)?.losses, &whole);
            assert!(difference < 1e-6, "{method}, {name}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn keeping_hidden_states_from_epoch_to_epoch_changes_no_bit() -> Result<()> {
    let plain = options(&expected("last-layers")?);
    let losses = |activation_cache_bytes| -> Result<Vec<u64>> {
        let options = TrainOptions {
            activation_cache_bytes,
            ..plain.clone()
        };
        let losses = train("last-layers", &options)?.losses;
        Ok(losses.into_iter().map(f64::to_bits).collect())
    };
    let without = losses(0)?;
    assert!(without == losses(usize::MAX)?);
    // Some of them alone.
    assert!(without == losses(3000)?);
    Ok(())
}

#[test]
fn keeping_hidden_states_of_short_passes_changes_no_bit() -> Result<()> {
    // One example or two to a pass, as they come: after the first epoch an example shares a pass with another one, and
    // products of so few rows take their sums in another order.
    for tokens_per_pass in [1, 12, 30] {
        let losses = |activation_cache_bytes| -> Result<Vec<u64>> {
            let options = TrainOptions {
                activation_cache_bytes,
                tokens_per_pass,
                ..options(&expected("last-layers")?)
            };
            let losses = train("last-layers", &options)?.losses;
            Ok(losses.into_iter().map(f64::to_bits).collect())
        };
        let without = losses(0)?;
        assert!(without == losses(usize::MAX)?, "{tokens_per_pass}");
        assert!(without == losses(1000)?, "{tokens_per_pass}");
    }
    Ok(())
}

#[test]
fn hidden_states_are_kept_only_where_that_saves_work() -> Result<()> {
    // Those kept in bf16 are rounded from the first step on: its loss tells whether any are.
    let first_loss = |method: &str, steps, bytes, activation_cache_type| -> Result<f64> {
        let options = TrainOptions {
            budget: Budget::Steps(steps),
            activation_cache_bytes: bytes,
            activation_cache_type,
            ..options(&expected(method)?)
        };
        Ok(train(method, &options)?.losses[0])
    };
    // Three steps see each of the twelve examples once.
    for (method, steps, bytes, kept) in [
        ("last-layers", 4, usize::MAX, true),
        ("last-layers", 3, usize::MAX, false),
        ("last-layers", 4, 0, false),
        ("lora", 4, usize::MAX, false),
        ("prompt", 4, usize::MAX, false),
    ] {
        let exact = first_loss(method, steps, bytes, CacheType::F32)?;
        let rounded = first_loss(method, steps, bytes, CacheType::Bf16)?;
        assert_eq!(rounded != exact, kept, "{method}, {steps} steps, {bytes}");
    }
    Ok(())
}

/// A copy of the golden LoRA before its first step, with dropout.
fn with_dropout() -> Result<TempDir> {
    let initial = golden("train/lora/initial");
    let folder = tempfile::tempdir().at("a temporary folder")?;
    for entry in std::fs::read_dir(&initial).at(initial.display())? {
        let entry = entry.at(initial.display())?;
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).at("a copy")?;
    }
    let path = folder.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&path).at(path.display())?;
    let mut config: serde_json::Value = serde_json::from_str(&text).at(path.display())?;
    config["lora_dropout"] = 0.3.into();
    std::fs::write(&path, config.to_string()).at(path.display())?;
    Ok(folder)
}

#[test]
fn dropout_does_not_depend_on_how_a_step_is_cut() -> Result<()> {
    let folder = with_dropout()?;
    let plain = options(&expected("lora")?);
    let whole = train_from(folder.path(), "lora", &plain)?.losses;
    assert!(
        relative(&whole, &expected("lora")?.losses) > 1e-4,
        "no dropout"
    );
    for (tokens_per_pass, recompute) in [
        (1, Recompute::Never),
        (30, Recompute::Never),
        (30, Recompute::Blocks),
    ] {
        let options = TrainOptions {
            tokens_per_pass,
            recompute,
            ..plain.clone()
        };
        let losses = train_from(folder.path(), "lora", &options)?.losses;
        let difference = relative(&losses, &whole);
        assert!(difference < 2e-5, "{tokens_per_pass} a pass: {difference}");
    }
    Ok(())
}

/// LoRA behind a learned prompt.
struct LoraBehindPrompt {
    lora: Lora,
    prompt: Prompt,
}

impl AdapterMethod for LoraBehindPrompt {
    fn name(&self) -> &'static str {
        "lora-behind-prompt"
    }

    fn adapt_linear(
        &self,
        site: &LinearSite,
        weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn LinearAdapter>>> {
        self.lora.adapt_linear(site, weights)
    }

    fn soft_prompt(
        &self,
        site: &InputSite,
        weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn SoftPrompt>>> {
        self.prompt.soft_prompt(site, weights)
    }

    fn peft_config(&self, _: &ModelShape, _: &AdapterWeights) -> Result<PeftConfig> {
        Ok(PeftConfig::new("LORA"))
    }

    fn default_learning_rate(&self) -> f64 {
        1e-3
    }
}

#[test]
fn dropout_behind_a_prompt_does_not_depend_on_how_a_step_is_cut() -> Result<()> {
    let data = examples(12);
    // No more than two examples fit into twelve tokens: the prompt's rows are not counted.
    let losses = |tokens_per_pass| -> Result<Vec<f64>> {
        let options = TrainOptions {
            batch_size: 4,
            tokens_per_pass,
            ..one_example_a_step(6)
        };
        let method = LoraBehindPrompt {
            lora: Lora {
                dropout: 0.3,
                ..Lora::default()
            },
            prompt: Prompt {
                virtual_tokens: 3,
                start: PromptStart::Random,
                start_text: None,
            },
        };
        let task = Task {
            method: Box::new(method),
            ..Task::of(&data, &options)
        };
        Ok(task.run(None, "")?.losses())
    };
    let whole = losses(8192)?;
    for tokens_per_pass in [1, 12] {
        let difference = relative(&losses(tokens_per_pass)?, &whole);
        assert!(difference < 1e-4, "{tokens_per_pass} a pass: {difference}");
    }
    Ok(())
}

#[test]
fn dropout_differs_from_step_to_step_and_from_seed_to_seed() -> Result<()> {
    let folder = with_dropout()?;
    let data = examples(1);
    // The same example at a rate that moves nothing: it is dropout alone that tells the losses apart.
    let losses = |seed| -> Result<Vec<u64>> {
        let adapter = Adapter::open(folder.path())?;
        let model = adapter.load_onto(&golden("models/llama"), None, OtherBase::Refuse)?;
        let options = TrainOptions {
            seed,
            learning_rate: 1e-30,
            ..one_example_a_step(3)
        };
        let mut losses = Vec::new();
        Trainer::new(model.decoder.as_ref(), &model.weights, &options)?.run(
            &data,
            &mut Order::as_stored(data.len()),
            None,
            None,
            &mut |event| {
                if let Event::Step(step) = event {
                    losses.push(step.loss.to_bits());
                }
                Ok(Control::Continue)
            },
        )?;
        Ok(losses)
    };
    let (first, second) = (losses(1)?, losses(2)?);
    let different: BTreeSet<u64> = first.iter().chain(&second).copied().collect();
    assert_eq!(different.len(), 6);
    assert_eq!(losses(1)?, first);
    Ok(())
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() -> Result<()> {
    let places = [Placement::default(), in_nf4()];
    for (method, placement) in METHODS
        .into_iter()
        .flat_map(|method| places.iter().map(move |placement| (method, placement)))
    {
        let options = options(&expected(method)?);
        let bytes = |threads: usize| -> Result<Vec<u8>> {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a pool");
            let run = pool.install(|| train_on(placement, &initial(method), method, &options))?;
            let folder = tempfile::tempdir().at("a temporary folder")?;
            let config = Adapter::open(&initial(method))?.saved.config;
            PeftFolder::save(folder.path(), &config, &run.model.weights)?;
            std::fs::read(folder.path().join("adapter_model.safetensors")).at("adapter")
        };
        let one = bytes(1)?;
        assert!(one == bytes(2)? && one == bytes(3)?, "{method}");
    }
    Ok(())
}

/// A copy of the golden llama in which one token's embedding is not a number.
fn with_a_poisoned_token(token: usize) -> Result<TempDir> {
    let folder = tempfile::tempdir().context("a folder")?;
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(golden("models/llama").join(file), folder.path().join(file)).at(file)?;
    }
    let path = golden("models/llama/model.safetensors");
    let mut bytes = std::fs::read(&path).at(path.display())?;
    let name = "model.embed_tokens.weight";
    let row = {
        let tensors = SafeTensors::deserialize(&bytes).at(path.display())?;
        let embedding = tensors.tensor(name).at(name)?;
        let start = embedding.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let width = embedding.data().len() / embedding.shape()[0];
        start + token * width..start + (token + 1) * width
    };
    for value in bytes[row].chunks_exact_mut(4) {
        value.copy_from_slice(&f32::NAN.to_le_bytes());
    }
    std::fs::write(folder.path().join("model.safetensors"), bytes).at("the copy")?;
    Ok(folder)
}

/// Different examples of four to six tokens.
fn examples(count: u32) -> Dataset {
    let example = |index: u32| {
        let tokens: Vec<u32> = (0..4 + index % 3)
            .map(|position| (5 + 7 * index + position) % 40)
            .collect();
        let learn = vec![true; tokens.len()];
        Example::new(tokens, learn)
    };
    dataset((0..count).map(example))
}

fn dataset(examples: impl IntoIterator<Item = Example>) -> Dataset {
    Dataset {
        examples: examples.into_iter().collect(),
        report: DataReport::default(),
    }
}

fn one_example_a_step(steps: usize) -> TrainOptions {
    TrainOptions {
        budget: Budget::Steps(steps),
        batch_size: 1,
        learning_rate: 1e-2,
        schedule: Schedule::Constant,
        ..TrainOptions::default()
    }
}

/// A method to be trained on a base by the examples in the order in which they stand.
struct Task<'a> {
    base: PathBuf,
    method: Box<dyn AdapterMethod>,
    data: &'a Dataset,
    held_out: Option<&'a Dataset>,
    options: &'a TrainOptions,
}

/// What a run told its caller and left behind.
struct Journal {
    /// In the order in which it was told, such as `step 3`, `evaluated after 3`, `saving after 3` and
    /// `saved after 3`.
    told: Vec<String>,
    steps: Vec<StepReport>,
    evaluations: Vec<EvalReport>,
    /// The examples of the steps that were unlike those before them.
    unlike: Vec<usize>,
    /// The step that it went on from.
    begun_after: usize,
    /// The checkpoints that it could not go on from.
    damaged: Vec<PathBuf>,
    outcome: Outcome,
    state: TrainState,
    model: Model,
}

impl<'a> Task<'a> {
    /// LoRA on the golden llama.
    fn of(data: &'a Dataset, options: &'a TrainOptions) -> Self {
        Self {
            base: golden("models/llama"),
            method: Box::new(Lora::default()),
            data,
            held_out: None,
            options,
        }
    }

    /// Runs until `stop_at` has been told, or to the end. In `folder` it leaves its checkpoints, and goes on from the
    /// newest that it finds there.
    fn run(&self, folder: Option<&Path>, stop_at: &str) -> Result<Journal> {
        let weights = AdapterWeights::fresh(0, &Device::Cpu);
        let model = retune::model::load(&self.base, self.method.as_ref(), weights, None)?;
        let checkpoints = folder.map(Checkpoints::of_run);
        let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, self.options)?;
        let begun_after = match &checkpoints {
            Some(saved) if saved.newest_folder()?.is_some() => trainer.resume(saved)?,
            _ => 0,
        };
        let damaged = trainer.damaged().iter();
        let damaged = damaged.map(|damaged| damaged.folder.clone()).collect();
        let (mut told, mut unlike) = (Vec::new(), Vec::new());
        let (mut steps, mut evaluations) = (Vec::new(), Vec::new());
        let outcome = trainer.run(
            self.data,
            &mut Order::as_stored(self.data.len()),
            self.held_out,
            checkpoints.as_ref(),
            &mut |event| {
                let now = match event {
                    Event::Step(report) => {
                        steps.push(report.clone());
                        format!("step {}", report.step)
                    }
                    Event::Skipped(step) => {
                        unlike.extend(step.examples.clone());
                        format!("skipped {}", step.report.step)
                    }
                    Event::Spiked(step) => {
                        unlike.extend(step.examples.clone());
                        format!("spiked {}", step.report.step)
                    }
                    Event::Evaluated(report) => {
                        evaluations.push(report.clone());
                        format!("evaluated after {}", report.step)
                    }
                    Event::Saving(state) => format!("saving after {}", state.step),
                    Event::Saved(state) => format!("saved after {}", state.step),
                };
                let stop = now == stop_at;
                told.push(now);
                Ok(match stop {
                    true => Control::Stop,
                    false => Control::Continue,
                })
            },
        )?;
        let state = trainer.state().clone();
        Ok(Journal {
            told,
            steps,
            evaluations,
            unlike,
            begun_after,
            damaged,
            outcome,
            state,
            model,
        })
    }
}

impl Journal {
    fn losses(&self) -> Vec<f64> {
        self.steps.iter().map(|step| step.loss).collect()
    }

    /// The trained values.
    fn weights(&self) -> Result<Vec<Vec<f32>>> {
        let values =
            |(_, var): (&str, &Var)| Ok(var.as_tensor().flatten_all()?.to_vec1::<f32>()?);
        self.model.weights.iter().map(values).collect()
    }
}

#[test]
fn a_step_that_is_not_finite_is_left_out_or_ends_the_run_and_never_touches_the_weights()
-> Result<()> {
    const POISONED: usize = 4;
    let base = with_a_poisoned_token(50)?;
    let example = |index: usize| {
        let tokens = (0..6).map(|position| match (index, position) {
            (POISONED, 3) => 50,
            _ => (5 + 7 * index + position) as u32 % 40,
        });
        Example::new(tokens.collect(), vec![true; 6])
    };
    let data = |without: Option<usize>| {
        let indices = (0..8).filter(move |index| Some(*index) != without);
        dataset(indices.map(example))
    };
    let run = |data: &Dataset, on_nonfinite, folder: Option<&Path>, stop_at: &str| {
        let options = TrainOptions {
            on_nonfinite,
            ..one_example_a_step(data.len())
        };
        let task = Task {
            base: base.path().to_owned(),
            ..Task::of(data, &options)
        };
        task.run(folder, stop_at)
    };

    let error = run(&data(None), OnNonfinite::Stop, None, "").map(drop);
    let message = error.expect_err("a NaN").to_string();
    assert!(
        message.contains("step 5 is not finite") && message.contains("examples [4]"),
        "{message}"
    );

    let without = run(&data(Some(POISONED)), OnNonfinite::Stop, None, "")?;
    let skipping = run(&data(None), OnNonfinite::Skip, None, "")?;
    assert!(without.unlike.is_empty());
    assert_eq!(skipping.unlike, [POISONED]);
    assert_eq!(skipping.state.skipped, 1);
    assert!(
        without.weights()? == skipping.weights()?,
        "the step left a trace"
    );

    let runs = tempfile::tempdir().context("a folder")?;
    run(&data(None), OnNonfinite::Skip, Some(runs.path()), "step 6")?;
    let resumed = run(&data(None), OnNonfinite::Skip, Some(runs.path()), "")?;
    assert!(
        resumed.weights()? == skipping.weights()?,
        "the optimizer's steps were miscounted"
    );

    let stopped = tempfile::tempdir().context("a folder")?;
    let error = run(&data(None), OnNonfinite::Stop, Some(stopped.path()), "").map(drop);
    assert!(error.is_err(), "a NaN");
    let going_on = run(&data(None), OnNonfinite::Skip, Some(stopped.path()), "")?;
    assert_eq!(going_on.begun_after, POISONED, "what was trained is saved");
    assert!(going_on.weights()? == skipping.weights()?);
    Ok(())
}

#[test]
fn a_loss_far_above_those_before_it_is_reported_left_out_or_ends_the_run() -> Result<()> {
    const ODD: usize = 60;
    let example = |index: usize| {
        let first = if index == ODD { 60 } else { 5 };
        Example::new((first..first + 8).collect(), vec![true; 8])
    };
    let data = |without: Option<usize>| {
        let indices = (0..66).filter(move |index| Some(*index) != without);
        dataset(indices.map(example))
    };
    let run = |data: &Dataset, on_spike, folder: Option<&Path>, stop_at: &str| {
        let options = TrainOptions {
            on_spike,
            ..one_example_a_step(data.len())
        };
        Task::of(data, &options).run(folder, stop_at)
    };

    let error = run(&data(None), OnSpike::Stop, None, "").map(drop);
    let error = error.expect_err("a spike");
    let message = error.to_string();
    assert!(
        message.contains("the loss of step 61 is ") && message.contains("examples [60]"),
        "{message}"
    );
    assert!(
        error
            .hint_text()
            .is_some_and(|hint| hint.contains("--on-spike skip"))
    );

    let without = run(&data(Some(ODD)), OnSpike::Stop, None, "")?;
    let skipping = run(&data(None), OnSpike::Skip, None, "")?;
    assert!(without.unlike.is_empty());
    assert_eq!(skipping.unlike, [ODD]);
    assert_eq!(skipping.state.skipped, 1);
    assert!(
        without.weights()? == skipping.weights()?,
        "the step left a trace"
    );
    let warned = run(&data(None), OnSpike::Warn, None, "")?;
    assert_eq!(warned.unlike.first(), Some(&ODD));
    assert_eq!((warned.state.skipped, warned.steps.len()), (0, 66));
    assert!(
        warned.weights()? != skipping.weights()?,
        "the step was not taken"
    );

    // So few steps before it that it is seen by the losses of the checkpoint alone.
    let runs = tempfile::tempdir().context("a folder")?;
    run(&data(None), OnSpike::Skip, Some(runs.path()), "step 55")?;
    let resumed = run(&data(None), OnSpike::Skip, Some(runs.path()), "")?;
    assert_eq!(resumed.unlike, [ODD]);
    assert!(
        resumed.weights()? == skipping.weights()?,
        "the losses before the checkpoint were forgotten"
    );
    Ok(())
}

#[test]
fn a_caller_is_told_of_each_step_evaluation_and_checkpoint_in_its_turn() -> Result<()> {
    let (data, held_out) = (examples(3), examples(1));
    let told = |options: &TrainOptions| -> Result<Vec<String>> {
        let folder = tempfile::tempdir().context("a folder")?;
        let task = Task {
            held_out: Some(&held_out),
            ..Task::of(&data, options)
        };
        let run = task.run(Some(folder.path()), "")?;
        assert_eq!(run.outcome, Outcome::Finished);
        Ok(run.told)
    };
    let never = one_example_a_step(3);
    assert_eq!(
        told(&never)?,
        [
            "evaluated after 0",
            "step 1",
            "step 2",
            "step 3",
            "evaluated after 3"
        ]
    );
    let now_and_then = TrainOptions {
        eval_every: 2,
        save_every: 3,
        ..one_example_a_step(5)
    };
    assert_eq!(
        told(&now_and_then)?,
        [
            "evaluated after 0",
            "step 1",
            "step 2",
            "evaluated after 2",
            "step 3",
            "saving after 3",
            "saved after 3",
            "step 4",
            "evaluated after 4",
            "step 5",
            "evaluated after 5"
        ]
    );
    Ok(())
}

#[test]
fn a_run_that_was_stopped_anywhere_goes_on_without_doing_anything_twice() -> Result<()> {
    let (data, held_out) = (examples(3), examples(1));
    let options = TrainOptions {
        eval_every: 2,
        save_every: 3,
        ..one_example_a_step(5)
    };
    let task = Task {
        held_out: Some(&held_out),
        ..Task::of(&data, &options)
    };
    let timeless = |state: TrainState| TrainState {
        seconds: 0.0,
        ..state
    };
    let whole = task.run(None, "")?;
    for (stop_at, reached) in [
        ("evaluated after 0", 0),
        ("step 1", 1),
        ("step 2", 2),
        ("evaluated after 2", 2),
        ("saving after 3", 3),
        ("saved after 3", 3),
        ("step 4", 4),
    ] {
        let folder = tempfile::tempdir().context("a folder")?;
        let begun = task.run(Some(folder.path()), stop_at)?;
        assert_eq!(begun.outcome, Outcome::Interrupted, "{stop_at}");
        assert_eq!(begun.state.step, reached, "{stop_at}");
        let rest = task.run(Some(folder.path()), "")?;
        assert_eq!(rest.outcome, Outcome::Finished, "{stop_at}");
        assert_eq!(rest.begun_after, reached, "{stop_at}");
        assert!(rest.damaged.is_empty(), "{stop_at}");
        let mut told = [begun.told.clone(), rest.told.clone()].concat();
        told.retain(|now| !now.starts_with("sav"));
        assert_eq!(told, whole.told, "{stop_at}");
        let losses = [begun.losses(), rest.losses()].concat();
        assert_eq!(losses, whole.losses(), "{stop_at}");
        assert!(rest.weights()? == whole.weights()?, "{stop_at}");
        assert!(rest.state.seconds > begun.state.seconds, "{stop_at}");
        assert_eq!(
            timeless(rest.state),
            timeless(whole.state.clone()),
            "{stop_at}"
        );
    }
    Ok(())
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_gone_on_from() -> Result<()> {
    let data = examples(3);
    let options = TrainOptions {
        save_every: 2,
        ..one_example_a_step(6)
    };
    let task = Task::of(&data, &options);
    let folder = tempfile::tempdir().context("a folder")?;
    task.run(Some(folder.path()), "step 5")?;
    let newest = folder.path().join("checkpoints/step-000005");
    std::fs::remove_file(newest.join("weights.safetensors")).at(newest.display())?;
    let rest = task.run(Some(folder.path()), "")?;
    assert_eq!((rest.begun_after, rest.damaged), (4, vec![newest]));
    assert_eq!(
        rest.told,
        ["step 5", "step 6", "saving after 6", "saved after 6"]
    );
    Ok(())
}

#[test]
fn reports_and_state_say_what_a_run_has_done() -> Result<()> {
    const STEPS: usize = 4;
    let (data, held_out) = (examples(5), examples(3));
    let options = TrainOptions {
        batch_size: 2,
        schedule: Schedule::Linear,
        warmup_steps: 2,
        eval_every: 3,
        ..one_example_a_step(STEPS)
    };
    let task = Task {
        held_out: Some(&held_out),
        ..Task::of(&data, &options)
    };
    let begun = Instant::now();
    let run = task.run(None, "")?;
    let lasted = begun.elapsed().as_secs_f64();

    assert_eq!(run.steps.len(), STEPS);
    let (mut tokens, mut seconds) = (0, 0.0);
    for (step, report) in (1usize..).zip(&run.steps) {
        let positions = 2 * (step - 1)..2 * step;
        let examples: Vec<&Example> = positions
            .map(|position| &data.examples[position % data.len()])
            .collect();
        let count: usize = examples.iter().map(|example| example.tokens.len()).sum();
        assert_eq!(report.step, step as u64);
        assert_eq!(report.target_tokens, (count - examples.len()) as u64);
        assert_eq!(report.epoch, (2 * step) as f64 / 5.0);
        let rate = Schedule::Linear.learning_rate(options.learning_rate, step, 2, STEPS);
        assert_eq!(report.learning_rate, rate);
        tokens += count;
        seconds += count as f64 / report.tokens_per_second;
    }
    assert_eq!((run.state.step, run.state.skipped), (STEPS, 0));
    assert_eq!(run.state.tokens, tokens as u64);
    assert_eq!(run.state.recent_losses, run.losses());
    assert!((run.state.seconds / seconds - 1.0).abs() < 1e-9);
    assert!(0.0 < seconds && seconds < lasted, "{seconds} of {lasted}");

    let evaluations = run.evaluations.iter();
    let evaluations: Vec<_> = evaluations
        .map(|report| (report.step, report.epoch, report.eval_tokens))
        .collect();
    assert_eq!(evaluations, [(0, 0.0, 12), (3, 1.2, 12), (4, 1.6, 12)]);
    let last = run.evaluations.last().map(|report| report.eval_loss);
    assert_eq!(run.state.final_eval_loss, last);
    Ok(())
}

#[test]
fn the_weights_afterwards_are_the_best_ones_seen() -> Result<()> {
    // What is held out is learned at first, and then what contradicts it.
    let next = |token| Example::new(vec![5, token], vec![true; 2]);
    let data = dataset((0..18).map(|index| next(if index < 6 { 6 } else { 20 })));
    let held_out = dataset([next(6)]);
    let options = TrainOptions {
        eval_every: 1,
        ..one_example_a_step(data.len())
    };
    let task = Task {
        held_out: Some(&held_out),
        ..Task::of(&data, &options)
    };
    let loss_after = |run: &Journal| -> Result<f64> {
        let evaluation = evaluate(run.model.decoder.as_ref(), &held_out, 64, &mut |_| {})?;
        Ok(evaluation.loss)
    };
    let whole = task.run(None, "")?;
    let losses = whole.evaluations.iter().map(|report| report.eval_loss);
    let losses: Vec<f64> = losses.collect();
    let best = whole.state.best.expect("it was evaluated");
    assert!(
        0 < best.step && best.step < data.len(),
        "nothing to tell apart: {losses:?}"
    );
    assert_eq!(losses[best.step], best.loss);
    assert!(losses.iter().all(|loss| *loss >= best.loss), "{losses:?}");
    assert_eq!(loss_after(&whole)?, best.loss);

    // Not yet when it is interrupted.
    let folder = tempfile::tempdir().context("a folder")?;
    let begun = task.run(Some(folder.path()), "step 16")?;
    assert_eq!(loss_after(&begun)?, losses[16]);
    let rest = task.run(Some(folder.path()), "")?;
    assert_eq!(rest.state.best, Some(best));
    assert_eq!(loss_after(&rest)?, best.loss);
    Ok(())
}

#[test]
fn a_run_ends_after_as_many_evaluations_without_gain_as_it_has_patience() -> Result<()> {
    let (data, held_out) = (examples(3), examples(1));
    // A rate that moves nothing: all evaluations are equal, and the first is the best.
    let options = TrainOptions {
        learning_rate: 1e-30,
        eval_every: 2,
        patience: 2,
        ..one_example_a_step(9)
    };
    let task = Task {
        held_out: Some(&held_out),
        ..Task::of(&data, &options)
    };
    let folder = tempfile::tempdir().context("a folder")?;
    let run = task.run(Some(folder.path()), "")?;
    assert_eq!(run.outcome, Outcome::StoppedEarly);
    assert_eq!(
        run.told,
        [
            "evaluated after 0",
            "step 1",
            "step 2",
            "evaluated after 2",
            "step 3",
            "step 4",
            "evaluated after 4",
            "saving after 4",
            "saved after 4"
        ]
    );
    assert_eq!(run.state.best.map(|best| best.step), Some(0));
    // It does not come back.
    let again = task.run(Some(folder.path()), "")?;
    assert_eq!(again.outcome, Outcome::StoppedEarly);
    assert_eq!(again.told, ["saving after 4", "saved after 4"]);
    Ok(())
}

#[test]
fn a_last_step_that_ruins_the_weights_is_an_error() -> Result<()> {
    let options = TrainOptions {
        budget: Budget::Steps(1),
        learning_rate: 1e300,
        ..options(&expected("lora")?)
    };
    let error = train("lora", &options).map(drop);
    let message = error.expect_err("no numbers").to_string();
    assert!(
        message.contains("holds values that are no numbers after step 1"),
        "{message}"
    );
    Ok(())
}

#[test]
fn a_base_that_gives_no_number_at_all_ends_the_run() -> Result<()> {
    let base = with_a_poisoned_token(7)?;
    let data = Dataset {
        examples: (0..30)
            .map(|_| Example::new(vec![7, 8, 9], vec![true; 3]))
            .collect(),
        report: DataReport::default(),
    };
    let weights = AdapterWeights::fresh(0, &Device::Cpu);
    let model = retune::model::load(base.path(), &Lora::default(), weights, None)?;
    let options = TrainOptions {
        batch_size: 1,
        on_nonfinite: OnNonfinite::Skip,
        ..TrainOptions::default()
    };
    let error = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?
        .run(
            &data,
            &mut Order::as_stored(data.len()),
            None,
            None,
            &mut |_| Ok(Control::Continue),
        )
        .map(drop)
        .expect_err("nothing is left");
    assert!(error.to_string().contains("10 steps in a row"), "{error}");
    Ok(())
}

#[test]
fn a_batch_that_cannot_be_made_ends_the_run_at_its_step() -> Result<()> {
    let weights = AdapterWeights::fresh(0, &Device::Cpu);
    let model = retune::model::load(&golden("models/llama"), &Lora::default(), weights, None)?;
    let data = Dataset {
        examples: vec![Example::new(vec![1, 2, 3], vec![true; 3])],
        report: DataReport::default(),
    };
    let options = TrainOptions {
        budget: Budget::Steps(4),
        batch_size: 1,
        ..TrainOptions::default()
    };
    let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?;
    // An order of more examples than there are.
    let order = &mut Order::as_stored(2);
    let error = trainer
        .run(&data, order, None, None, &mut |_| Ok(Control::Continue))
        .map(drop)
        .expect_err("there is no second example");
    let message = error.to_string();
    assert!(message.starts_with("the batch of step 2 "), "{message}");
    assert_eq!(trainer.state().step, 1);
    Ok(())
}

/// Asks for a weight and computes without it.
struct Forgetful;

struct Unchanged;

impl AdapterMethod for Forgetful {
    fn name(&self) -> &'static str {
        "forgetful"
    }

    fn adapt_linear(
        &self,
        site: &LinearSite,
        weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn LinearAdapter>>> {
        weights.var(&format!("{}.forgotten", site.path), (2, 2), Init::Zeros)?;
        Ok(Some(Box::new(Unchanged)))
    }

    fn peft_config(&self, _: &ModelShape, _: &AdapterWeights) -> Result<PeftConfig> {
        Ok(PeftConfig::new("LORA"))
    }

    fn default_learning_rate(&self) -> f64 {
        1e-3
    }
}

impl LinearAdapter for Unchanged {
    fn forward(&self, x: &Tensor, base: &dyn BaseLinear, _: Mode) -> Result<Tensor> {
        base.forward(x)
    }

    fn merged_weight(&self, base: &Tensor) -> Result<Tensor> {
        Ok(base.clone())
    }
}

#[test]
fn a_trained_weight_without_a_gradient_ends_the_run() -> Result<()> {
    let base = golden("models/llama");
    let weights = AdapterWeights::fresh(0, &Device::Cpu);
    let model = retune::model::load(&base, &Forgetful, weights, None)?;
    let data = Dataset {
        examples: vec![Example::new(vec![1, 2, 3], vec![true; 3])],
        report: DataReport::default(),
    };
    let options = TrainOptions::default();
    let error = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?
        .run(&data, &mut Order::as_stored(1), None, None, &mut |_| {
            Ok(Control::Continue)
        })
        .map(drop)
        .expect_err("nothing can be learned");
    let message = format!("{error:#} {:?}", error.hint_text());
    for part in [
        "no gradient in the first step",
        "q_proj.forgotten",
        "does not use them",
    ] {
        assert!(message.contains(part), "no `{part}` in {message}");
    }
    Ok(())
}

#[test]
fn without_a_limit_gradients_are_not_clipped() -> Result<()> {
    let plain = expected("lora")?;
    let run = |max_gradient_norm| {
        let options = TrainOptions {
            max_gradient_norm,
            ..options(&plain)
        };
        train("lora", &options)
    };
    let (none, far) = (run(0.0)?, run(1e9)?);
    assert_eq!(none.losses, far.losses);
    assert!(
        none.losses.first() != none.losses.last(),
        "nothing was learned"
    );
    Ok(())
}

#[test]
fn weights_that_are_no_numbers_are_not_saved_and_their_step_is_named() -> Result<()> {
    let data = Dataset {
        examples: (0..8)
            .map(|first| Example::new((first..first + 6).collect(), vec![true; 6]))
            .collect(),
        report: DataReport::default(),
    };
    for (save_every, last_good) in [(1, Some(2)), (0, None)] {
        let weights = AdapterWeights::fresh(0, &Device::Cpu);
        let model = retune::model::load(&golden("models/llama"), &Lora::default(), weights, None)?;
        let options = TrainOptions {
            budget: Budget::Steps(5),
            batch_size: 1,
            save_every,
            ..TrainOptions::default()
        };
        let run = tempfile::tempdir().context("a folder")?;
        let checkpoints = Checkpoints::of_run(run.path());
        let error = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?
            .run(
                &data,
                &mut Order::as_stored(data.len()),
                None,
                Some(&checkpoints),
                &mut |event| {
                    if let Event::Step(report) = event
                        && report.step == 3
                    {
                        // As at too high a rate: the step's own loss is that of the weights before it.
                        for (_, var) in model.weights.iter() {
                            var.set(&var.as_tensor().affine(0.0, f64::NAN)?)?;
                        }
                    }
                    Ok(Control::Continue)
                },
            )
            .map(drop)
            .expect_err("no numbers are left");
        assert_eq!(error.kind(), retune::ErrorKind::NotFinite);
        let message = error.to_string();
        assert!(message.contains("no numbers after step 3"), "{message}");
        let saved = match checkpoints.newest_folder()? {
            Some(_) => Some(checkpoints.latest()?.state.step),
            None => None,
        };
        assert_eq!(saved, last_good);
        let hint = error.hint_text().unwrap_or_default();
        assert_eq!(hint.contains("step-000002"), last_good.is_some(), "{hint}");
    }
    Ok(())
}
