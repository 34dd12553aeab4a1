//! Training against PEFT and `torch.optim.AdamW`, and against itself cut up in other ways.

mod golden;

use candle_core::{Device, Tensor, Var};
use golden::golden;
use retune::adapter_folder::{Adapter, OtherBase};
use retune::adapters::hooks::{
    AdapterMethod, BaseLinear, LinearAdapter, LinearSite, Mode, ModelShape,
};
use retune::adapters::lora::Lora;
use retune::adapters::storage::{
    AdapterWeights, Init, PeftConfig, PeftFolder, read_adapter_tensors,
};
use retune::data::{DataOptions, DataReport, Dataset, Example, Order, Tokenizer};
use retune::model::Model;
use retune::train::{
    Budget, Checkpoints, Control, Event, OnNonfinite, OnSpike, Recompute, Schedule, TrainOptions,
    Trainer,
};
use retune::{Context, Result};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::path::Path;
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
    let path = golden("train").join(method).join("expected.json");
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
    train_from(
        &golden("train").join(method).join("initial"),
        method,
        options,
    )
}

fn train_from(initial: &Path, method: &str, options: &TrainOptions) -> Result<Run> {
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
    let model = adapter.load_onto(&base, Some(&tokenizer), OtherBase::Refuse)?;
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
    let adapter = Adapter::open(&golden("train").join(method).join("initial"))?;
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
fn dropout_does_not_depend_on_how_a_step_is_cut() -> Result<()> {
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

#[test]
fn the_number_of_threads_does_not_change_a_bit() -> Result<()> {
    for method in METHODS {
        let options = options(&expected(method)?);
        let bytes = |threads: usize| -> Result<Vec<u8>> {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a pool");
            let run = pool.install(|| train(method, &options))?;
            let folder = tempfile::tempdir().at("a temporary folder")?;
            let config = Adapter::open(&golden("train").join(method).join("initial"))?
                .saved
                .config;
            PeftFolder::save(folder.path(), &config, &run.model.weights)?;
            std::fs::read(folder.path().join("adapter_model.safetensors")).at("adapter")
        };
        assert!(bytes(1)? == bytes(3)?, "{method}");
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

/// Trains LoRA on `base`, one example of `data` a step: up to the step `stop_after`, or to the end, from the checkpoint in
/// `runs` if there is to be one. Returns the weights, and the examples of the steps that were unlike the others.
fn trained_with_faults(
    base: &Path,
    data: &Dataset,
    options: TrainOptions,
    stop_after: Option<u64>,
    runs: Option<&Path>,
) -> Result<(Vec<Vec<f32>>, Vec<usize>)> {
    let options = TrainOptions {
        budget: Budget::Steps(data.len()),
        batch_size: 1,
        schedule: Schedule::Constant,
        ..options
    };
    let weights = AdapterWeights::fresh(0, &Device::Cpu);
    let model = retune::model::load(base, &Lora::default(), weights, None)?;
    let checkpoints = runs.map(Checkpoints::of_run);
    let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?;
    if let Some(checkpoints) = &checkpoints
        && stop_after.is_none()
    {
        trainer.resume(checkpoints)?;
    }
    let mut unlike = Vec::new();
    trainer.run(
        data,
        &mut Order::as_stored(data.len()),
        None,
        checkpoints.as_ref(),
        &mut |event| {
            let step = match event {
                Event::Step(report) => report.step,
                Event::Skipped(step) | Event::Spiked(step) => {
                    unlike.extend(step.examples.clone());
                    step.report.step
                }
                _ => 0,
            };
            Ok(match Some(step) == stop_after {
                true => Control::Stop,
                false => Control::Continue,
            })
        },
    )?;
    let bytes = |(_, var): (&str, &Var)| Ok(var.as_tensor().flatten_all()?.to_vec1::<f32>()?);
    let weights: Vec<Vec<f32>> = model.weights.iter().map(bytes).collect::<Result<_>>()?;
    Ok((weights, unlike))
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
    let dataset = |without: Option<usize>| Dataset {
        examples: (0..8)
            .filter(|index| Some(*index) != without)
            .map(example)
            .collect(),
        report: DataReport::default(),
    };
    let run = |data: &Dataset, on_nonfinite, stop_after, runs: Option<&Path>| {
        let options = TrainOptions {
            on_nonfinite,
            ..TrainOptions::default()
        };
        trained_with_faults(base.path(), data, options, stop_after, runs)
    };

    let error = run(&dataset(None), OnNonfinite::Stop, None, None).map(drop);
    let message = error.expect_err("a NaN").to_string();
    assert!(
        message.contains("step 5 is not finite") && message.contains("examples [4]"),
        "{message}"
    );

    let (without, none) = run(&dataset(Some(POISONED)), OnNonfinite::Stop, None, None)?;
    let (skipping, skipped) = run(&dataset(None), OnNonfinite::Skip, None, None)?;
    assert!(none.is_empty());
    assert_eq!(skipped, [POISONED]);
    assert!(without == skipping, "the step left a trace");

    let runs = tempfile::tempdir().context("a folder")?;
    run(
        &dataset(None),
        OnNonfinite::Skip,
        Some(6),
        Some(runs.path()),
    )?;
    let (resumed, _) = run(&dataset(None), OnNonfinite::Skip, None, Some(runs.path()))?;
    assert!(resumed == skipping, "the optimizer's steps were miscounted");
    Ok(())
}

#[test]
fn a_loss_far_above_those_before_it_is_reported_left_out_or_ends_the_run() -> Result<()> {
    const ODD: usize = 60;
    let example = |index: usize| {
        let first = if index == ODD { 60 } else { 5 };
        Example::new((first..first + 8).collect(), vec![true; 8])
    };
    let dataset = |without: Option<usize>| Dataset {
        examples: (0..66)
            .filter(|index| Some(*index) != without)
            .map(example)
            .collect(),
        report: DataReport::default(),
    };
    let run = |data: &Dataset, on_spike, stop_after, runs: Option<&Path>| {
        let options = TrainOptions {
            learning_rate: 1e-2,
            on_spike,
            ..TrainOptions::default()
        };
        trained_with_faults(&golden("models/llama"), data, options, stop_after, runs)
    };

    let error = run(&dataset(None), OnSpike::Stop, None, None).map(drop);
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

    let (without, none) = run(&dataset(Some(ODD)), OnSpike::Stop, None, None)?;
    let (skipping, skipped) = run(&dataset(None), OnSpike::Skip, None, None)?;
    assert!(none.is_empty());
    assert_eq!(skipped, [ODD]);
    assert!(without == skipping, "the step left a trace");
    let (warned, spiked) = run(&dataset(None), OnSpike::Warn, None, None)?;
    assert_eq!(spiked.first(), Some(&ODD));
    assert!(warned != skipping, "the step was not taken");

    // So few steps before it that it is seen by the losses of the checkpoint alone.
    let runs = tempfile::tempdir().context("a folder")?;
    run(&dataset(None), OnSpike::Skip, Some(55), Some(runs.path()))?;
    let (resumed, skipped) = run(&dataset(None), OnSpike::Skip, None, Some(runs.path()))?;
    assert_eq!(skipped, [ODD]);
    assert!(
        resumed == skipping,
        "the losses before the checkpoint were forgotten"
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
