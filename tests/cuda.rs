//! The GPU against the CPU: training, resuming, scoring and generating on the same tiny models; and a GPU without memory.
#![cfg(feature = "cuda")]

#[path = "cuda/bench.rs"]
mod bench;
mod golden;
#[path = "cuda/kept_rows.rs"]
mod kept_rows;
#[path = "cuda/messages.rs"]
mod messages;
#[path = "cuda/waits.rs"]
mod waits;

use candle_core::Device;
use golden::golden;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use retune::adapter_folder::{Adapter, OtherBase, save};
use retune::adapters::hooks::{AdapterMethod, NoAdapter};
use retune::adapters::lora::Lora;
use retune::adapters::storage::{AdapterWeights, WEIGHTS_FILE};
use retune::data::{DataOptions, Dataset, Order, Tokenizer};
use retune::evaluate::evaluate;
use retune::generate::{Control, GenerationOptions, Generator, Sampling};
use retune::model::{Model, Placement, cuda_device, load_adapted, load_on};
use retune::ops::{ComputeType, Quantization};
use retune::train::{
    Budget, Checkpoints, Event, Outcome, Recompute, Schedule, TrainOptions, Trainer,
};
use retune::{Context, Result};
use std::path::Path;
use std::process::{Command, Output};

const METHODS: [&str; 3] = ["lora", "prompt", "last-layers"];
const STEPS: usize = 20;

fn gpu(compute: ComputeType) -> Result<Placement> {
    if let Some(toolkit) = std::env::var_os("CUDA_HOME") {
        retune::ops::set_cuda_toolkit(toolkit.into());
    }
    Ok(Placement {
        device: cuda_device(0)?,
        compute,
        quantization: None,
    })
}

fn options(method: &dyn AdapterMethod, recompute: Recompute) -> TrainOptions {
    TrainOptions {
        budget: Budget::Steps(STEPS),
        batch_size: 4,
        // Several passes a step.
        tokens_per_pass: 24,
        learning_rate: method.default_learning_rate(),
        schedule: Schedule::Constant,
        recompute,
        ..TrainOptions::default()
    }
}

fn data(method: &str) -> Result<Dataset> {
    let tokenizer = Tokenizer::load(&golden("models/llama"))?;
    let file = golden("train").join(method).join("data.jsonl");
    Dataset::load(&[file], &tokenizer, &DataOptions::default())
}

/// The base with the adapter that the method's golden run starts from.
fn initial(method: &str, placement: &Placement) -> Result<(Model, Adapter)> {
    let adapter = Adapter::open(&golden("train").join(method).join("initial"))?;
    let base = golden("models/llama");
    let model = load_adapted(placement, &base, &adapter, None, OtherBase::Refuse)?;
    Ok((model, adapter))
}

/// Trains until the end, or until `stop_after` steps; from a checkpoint in `run` if there is one. Returns the losses.
fn train(
    model: &Model,
    data: &Dataset,
    options: &TrainOptions,
    run: Option<&Path>,
    stop_after: Option<u64>,
) -> Result<(Vec<f64>, Outcome)> {
    let checkpoints = run.map(Checkpoints::of_run);
    let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, options)?;
    if let Some(checkpoints) = &checkpoints
        && checkpoints.newest_folder()?.is_some()
    {
        trainer.resume(checkpoints)?;
    }
    let mut losses = Vec::new();
    let mut order = Order::shuffled(data.len(), 1);
    let outcome = trainer.run(data, &mut order, None, checkpoints.as_ref(), &mut |event| {
        let mut control = Control::Continue;
        if let Event::Step(report) = event {
            losses.push(report.loss);
            if Some(report.step) == stop_after {
                control = Control::Stop;
            }
        }
        Ok(control)
    })?;
    Ok((losses, outcome))
}

fn assert_close(what: &str, left: &[f64], right: &[f64], tolerance: f64) {
    assert_eq!(left.len(), right.len(), "{what}");
    assert!(left.first() != left.last(), "{what}: nothing was learned");
    for (step, (left, right)) in left.iter().zip(right).enumerate() {
        let difference = (left - right).abs() / right.abs().max(1.0);
        assert!(
            difference < tolerance,
            "{what}: step {step}: {left} and {right}"
        );
    }
}

/// Twenty steps of every method on the GPU in `compute`, and on the CPU in f32.
fn twenty_steps_equal_the_cpus(
    compute: ComputeType,
    quantization: Option<Quantization>,
    tolerance: f64,
) -> Result<()> {
    let quantized = |placement| Placement {
        quantization,
        ..placement
    };
    let (cpu, gpu) = (quantized(Placement::default()), quantized(gpu(compute)?));
    for method in METHODS {
        let data = data(method)?;
        let losses = |placement: &Placement, recompute| -> Result<Vec<f64>> {
            let (model, adapter) = initial(method, placement)?;
            let options = options(adapter.method.as_ref(), recompute);
            Ok(train(&model, &data, &options, None, None)?.0)
        };
        let expected = losses(&cpu, Recompute::Never)?;
        for recompute in [Recompute::Never, Recompute::Blocks] {
            let found = losses(&gpu, recompute)?;
            assert_close(method, &found, &expected, tolerance);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn twenty_steps_in_f32_equal_the_cpus() -> Result<()> {
    twenty_steps_equal_the_cpus(ComputeType::F32, None, 1e-4)
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn twenty_steps_in_bf16_are_near_the_cpus() -> Result<()> {
    twenty_steps_equal_the_cpus(ComputeType::Bf16, None, 2e-2)
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn twenty_steps_on_a_quantised_base_equal_the_cpus() -> Result<()> {
    twenty_steps_equal_the_cpus(ComputeType::F32, Some(Quantization::Nf4), 1e-4)?;
    twenty_steps_equal_the_cpus(ComputeType::Bf16, Some(Quantization::Nf4), 2e-2)
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn what_is_dropped_on_the_gpu_is_dropped_on_the_cpu() -> Result<()> {
    let method = Lora {
        dropout: 0.3,
        targets: "q_proj,down_proj,embed_tokens".parse()?,
        ..Lora::default()
    };
    let data = data("lora")?;
    let losses = |placement: &Placement| -> Result<Vec<f64>> {
        let weights = AdapterWeights::fresh(3, &Device::Cpu);
        let model = load_on(placement, &golden("models/llama"), &method, weights, None)?;
        let options = options(&method, Recompute::Never);
        Ok(train(&model, &data, &options, None, None)?.0)
    };
    let found = losses(&gpu(ComputeType::F32)?)?;
    assert_close("dropout", &found, &losses(&Placement::default())?, 1e-4);
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn a_run_that_is_resumed_on_the_gpu_ends_with_the_same_bytes() -> Result<()> {
    for compute in [ComputeType::F32, ComputeType::Bf16] {
        let gpu = gpu(compute)?;
        for method in METHODS {
            let data = data(method)?;
            let bytes = |stop_after: Option<u64>| -> Result<Vec<u8>> {
                let folder = tempfile::tempdir().context("a folder")?;
                let run = Some(folder.path());
                if stop_after.is_some() {
                    let (model, adapter) = initial(method, &gpu)?;
                    let options = options(adapter.method.as_ref(), Recompute::Never);
                    let (_, outcome) = train(&model, &data, &options, run, stop_after)?;
                    assert_eq!(outcome, Outcome::Interrupted);
                }
                let (model, adapter) = initial(method, &gpu)?;
                let options = options(adapter.method.as_ref(), Recompute::Never);
                let (_, outcome) = train(&model, &data, &options, run, None)?;
                assert_eq!(outcome, Outcome::Finished);
                save(folder.path(), &model, adapter.method.as_ref(), "base")?;
                std::fs::read(folder.path().join(WEIGHTS_FILE)).context("the adapter")
            };
            let whole = bytes(None)?;
            assert!(whole == bytes(None)?, "{method}: two runs differ");
            assert!(
                whole == bytes(Some(7))?,
                "{method}: the resumed run differs"
            );
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn every_model_scores_and_generates_as_on_the_cpu() -> Result<()> {
    let gpu = gpu(ComputeType::F32)?;
    for name in golden::names("models")? {
        let base = golden("models").join(&name);
        let tokenizer = Tokenizer::load(&base)?;
        let expected = golden::ScoreFile::read(&base)?;
        let prompt = expected.records[0].tokens.clone();
        let texts = |placement: &Placement| -> Result<Vec<Vec<u32>>> {
            let weights = AdapterWeights::fresh(0, &Device::Cpu);
            let model = load_on(placement, &base, &NoAdapter, weights, None)?;
            let difference = golden::score_difference(&model, &expected)?;
            assert!(difference < 1e-3, "{name}: scores differ by {difference}");
            let mut generator = Generator::new(&model, &tokenizer)?;
            let options = GenerationOptions {
                max_tokens: 24,
                ..GenerationOptions::default()
            };
            // The second text goes on from what the cache holds of the first.
            let mut texts = Vec::new();
            for length in [prompt.len() / 2 + 1, prompt.len()] {
                let generation = generator
                    .generate(&prompt[..length], &options, &mut |_| Ok(Control::Continue))?;
                texts.push(generation.tokens);
            }
            Ok(texts)
        };
        assert_eq!(texts(&gpu)?, texts(&Placement::default())?, "{name}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn texts_are_drawn_on_the_gpu_as_on_the_cpu() -> Result<()> {
    let tokenizer = Tokenizer::load(&golden("models/llama"))?;
    let drawn = Sampling {
        temperature: 1.0,
        ..Sampling::default()
    };
    let samplings = [
        drawn,
        Sampling {
            top_k: 0,
            top_p: 0.9,
            ..drawn
        },
        Sampling {
            temperature: 0.8,
            top_k: 20,
            top_p: 0.95,
            min_p: 0.05,
            repetition_penalty: 1.2,
            ..drawn
        },
    ];
    for method in METHODS {
        let texts = |placement: &Placement| -> Result<Vec<Vec<u32>>> {
            let (model, _) = initial(method, placement)?;
            let mut generator = Generator::new(&model, &tokenizer)?;
            let mut texts = Vec::new();
            for (seed, sampling) in (0..).zip(samplings) {
                let options = GenerationOptions {
                    max_tokens: 24,
                    sampling: Sampling { seed, ..sampling },
                    ..GenerationOptions::default()
                };
                let generation = generator
                    .generate(&[23, 2, 1, 58], &options, &mut |_| Ok(Control::Continue))?;
                texts.push(generation.tokens);
            }
            Ok(texts)
        };
        let ours = texts(&gpu(ComputeType::F32)?)?;
        assert_eq!(ours, texts(&Placement::default())?, "{method}");
        assert_ne!(ours[0], ours[1]);
        // In bf16 there is nothing to compare with but itself.
        let gpu = gpu(ComputeType::Bf16)?;
        assert_eq!(texts(&gpu)?, texts(&gpu)?, "{method}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn held_out_data_is_scored_as_on_the_cpu() -> Result<()> {
    for method in METHODS {
        let data = data(method)?;
        let loss = |placement: &Placement| -> Result<f64> {
            let (model, _) = initial(method, placement)?;
            Ok(evaluate(model.decoder.as_ref(), &data, 64, &mut |_| {})?.loss)
        };
        let expected = loss(&Placement::default())?;
        for (compute, tolerance) in [(ComputeType::F32, 1e-4), (ComputeType::Bf16, 2e-2)] {
            let found = loss(&gpu(compute)?)?;
            let difference = (found - expected).abs() / expected;
            assert!(difference < tolerance, "{method}: {found} and {expected}");
        }
    }
    Ok(())
}

/// A method, and options that have memory taken in more places: beside the weights, for held-out data, for the rows of
/// earlier epochs.
type Run = (&'static str, &'static [&'static str]);

const RUNS: [Run; 3] = [
    ("lora", &["--dropout", "0.2", "--recompute"]),
    ("prompt", &["--eval-fraction", "0.2", "--eval-every", "1"]),
    ("last-layers", &["--blocks", "1", "--activation-cache", "1"]),
];

/// The program on a stand-in whose allocation of this number finds no memory; with 0 none fails, and it says how many
/// there were.
fn retune(failing: u64) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_retune"));
    command
        .env_remove("RUST_BACKTRACE")
        .env("STAND_IN_FAILURE", failing.to_string());
    command
}

fn start((method, options): Run, out: &Path, failing: u64) -> Command {
    let mut command = retune(failing);
    command
        .args(["train", method, "--device", "cuda", "--model"])
        .arg(golden("models/llama"))
        .arg("--data")
        .arg(golden("train").join(method).join("data.jsonl"))
        .arg("--out")
        .arg(out)
        // Several passes a step, and more steps than there are in an epoch.
        .args(["--steps", "5", "--batch-size", "4", "--save-every", "1"])
        .args(["--tokens-per-pass", "24"])
        .args(options);
    command
}

/// Goes on with the run in `out`, or starts it if it has not come so far as to be one.
fn go_on(run: Run, out: &Path, failing: u64) -> Result<Output> {
    let mut command = match out.join("run.toml").exists() {
        true => {
            let mut command = retune(failing);
            command.arg("resume").arg(out);
            command
        }
        false => start(run, out, failing),
    };
    command.output().context("retune")
}

fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    text
}

/// How many allocations there were; nothing from a GPU, which fails when it must and not when it is told to.
fn allocations(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| {
        let said = line.strip_prefix("cuda stand-in: ")?;
        said.strip_suffix(" allocations")
    })?;
    line.parse().ok()
}

fn adapter(out: &Path) -> Result<Vec<u8>> {
    std::fs::read(out.join(WEIGHTS_FILE)).context("the adapter")
}

#[test]
#[ignore = "needs the stand-in of tests/cuda_stand_in"]
fn a_gpu_without_memory_ends_a_run_that_goes_on_to_the_same_bytes() -> Result<()> {
    let place = tempfile::tempdir().context("a folder")?;
    let mut random = ChaCha8Rng::seed_from_u64(17);
    let mut failed_in_a_step = 0;
    for run in RUNS {
        let whole = place.path().join(run.0);
        let output = go_on(run, &whole, 0)?;
        let text = said(&output);
        assert!(output.status.success(), "{text}");
        let Some(all) = allocations(&text) else {
            return Ok(());
        };
        let expected = adapter(&whole)?;
        for attempt in 0..10 {
            let out = place.path().join(format!("{}-{attempt}", run.0));
            // What goes on after the first failure fails too, if it takes so much.
            for _ in 0..2 {
                let failing = 1 + random.next_u64() % all;
                let output = go_on(run, &out, failing)?;
                let text = said(&output);
                let what = format!("{}, allocation {failing} of {all}: {text}", run.0);
                if output.status.success() {
                    break;
                }
                assert_eq!(output.status.code(), Some(1), "{what}");
                for part in [
                    "the GPU's memory is used up",
                    "--tokens-per-pass",
                    "--recompute",
                ] {
                    assert!(text.contains(part), "no `{part}`: {what}");
                }
                assert!(!out.join(WEIGHTS_FILE).exists(), "half an adapter: {what}");
                if out.join("checkpoints").exists() {
                    failed_in_a_step += 1;
                }
            }
            let output = go_on(run, &out, 0)?;
            let text = said(&output);
            assert!(output.status.success(), "{text}");
            assert!(!text.contains("damaged"), "{text}");
            assert!(
                adapter(&out)? == expected,
                "{}: other bytes in run {attempt}",
                run.0
            );
        }
    }
    assert!(failed_in_a_step > 0, "there was always enough memory");
    Ok(())
}

#[test]
#[ignore = "needs the stand-in of tests/cuda_stand_in"]
fn a_run_that_a_gpu_has_no_room_for_is_refused_before_it_begins() -> Result<()> {
    let place = tempfile::tempdir().context("a folder")?;
    let out = place.path().join("out");
    let output = start(RUNS[0], &out, 0)
        .env("STAND_IN_MEMORY", "256M")
        .output()
        .context("retune")?;
    let text = said(&output);
    if allocations(&text).is_none() {
        return Ok(());
    }
    assert_eq!(output.status.code(), Some(1), "{text}");
    for part in ["the run needs about", "the GPU has free", "--device"] {
        assert!(text.contains(part), "no `{part}`: {text}");
    }
    assert!(!out.join("run.toml").exists());
    Ok(())
}

#[test]
#[ignore = "needs the stand-in of tests/cuda_stand_in"]
fn what_a_gpu_has_no_room_for_is_refused_by_every_command_before_it_loads() -> Result<()> {
    let place = tempfile::tempdir().context("a folder")?;
    let model = golden("models/llama");
    let data = place.path().join("data.jsonl");
    let record = "{\"prompt\": \"w1 w2\", \"completion\": \" w3\"}\n";
    std::fs::write(&data, record.repeat(4)).context("data")?;
    let out = place.path().join("comparison");
    let text = |path: &Path| path.display().to_string();
    let (model, data, comparison) = (text(&model), text(&data), text(&out));
    let scored = ["--model", &model, "--data", &data];
    let compared = ["--methods", "lora", "--steps", "1", "--out", &comparison];
    for (command, options, needs) in [
        ("evaluate", scored.to_vec(), "the base needs about"),
        ("score", scored.to_vec(), "the base needs about"),
        (
            "generate",
            vec!["--model", &model, "--prompt", "w1"],
            "the base needs about",
        ),
        (
            "compare",
            [&scored[..], &compared].concat(),
            "training `lora` needs about",
        ),
    ] {
        let output = retune(0)
            .arg(command)
            .args(options)
            .args(["--device", "cuda"])
            .env("STAND_IN_MEMORY", "256M")
            .output()
            .context("retune")?;
        let text = said(&output);
        if allocations(&text).is_none() {
            return Ok(());
        }
        assert_eq!(output.status.code(), Some(1), "{text}");
        for part in [needs, "the GPU has free", "--quantize nf4"] {
            assert!(text.contains(part), "no `{part}`: {text}");
        }
    }
    assert!(!out.exists());
    Ok(())
}
