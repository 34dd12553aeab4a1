//! Numbers that are none, and results that are not what they should be: reported with step and examples, the same again from
//! the run folder, and never left behind.

use super::files::json_lines;
use super::golden::golden;
use super::program::{process, refused};
use super::{Place, RUNS, WEIGHTS, base_copy, finish, said};
use candle_core::Device;
use retune::adapter_folder::Adapter;
use retune::adapters::lora::Lora;
use retune::adapters::storage::AdapterWeights;
use retune::data::{DataReport, Dataset, Example, Order};
use retune::merge::{MergeOptions, MergeProgress, merge};
use retune::train::{Budget, Checkpoints, Control, TrainOptions, Trainer};
use retune::{Context, Result};
use safetensors::SafeTensors;
use serde_json::Value;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The token whose embedding is no number, and its text.
const POISON: (usize, &str) = (63, "w60");

/// Where the values of a tensor lie in a safetensors file.
fn place_of(tensor: &str, file: &[u8]) -> Range<usize> {
    let tensors = SafeTensors::deserialize(file).expect("tensors");
    let values = tensors.tensor(tensor).expect("a tensor").data();
    let start = values.as_ptr() as usize - file.as_ptr() as usize;
    start..start + values.len()
}

/// A base on which all goes well as long as that token does not come.
fn poisoned(place: &Place) -> PathBuf {
    /// Bytes of an embedding, which is 32 numbers.
    const WIDTH: usize = 4 * 32;
    let base = base_copy(place);
    let file = base.join("model.safetensors");
    let mut bytes = fs::read(&file).expect("the weights");
    let start = place_of("model.embed_tokens.weight", &bytes).start + POISON.0 * WIDTH;
    for value in bytes[start..start + WIDTH].chunks_exact_mut(4) {
        value.copy_from_slice(&f32::NAN.to_le_bytes());
    }
    fs::write(&file, bytes).expect("written");
    base
}

#[test]
fn steps_that_are_not_finite_are_named_with_their_examples_and_repeat_from_the_run_folder() {
    const EXAMPLES: &str = "examples [8, 9, 10, 11]";
    let place = Place::new();
    let base = poisoned(&place);
    let records: Vec<String> = (0..20)
        .map(|index| {
            let word = if index == 11 { POISON.1 } else { "w5" };
            format!(
                r#"{{"prompt": "w{} w{} {word}", "completion": " w{} w7"}}"#,
                index % 9,
                index % 7,
                index % 5
            )
        })
        .collect();
    fs::write(&place.data, records.join("\n")).expect("written");
    let order = place.path("order.txt");
    let indices: String = (0..20).map(|index| format!("{index}\n")).collect();
    fs::write(&order, indices).expect("written");
    let train = |out: &Path, on_nonfinite: &str| {
        let mut command = place.train(RUNS[0], out);
        command.arg("--model").arg(&base).arg("--order").arg(&order);
        command.args(["--on-nonfinite", on_nonfinite, "--json"]);
        command
    };
    let adapter = |out: &Path| fs::read(out.join(WEIGHTS)).expect("an adapter");
    let left_out = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| line.contains("was left out"));
        lines.map(str::to_owned).collect()
    };

    let skipping = place.path("skipping");
    let skipped = said(train(&skipping, "skip")).done();
    // Twenty examples in steps of four: the odd one comes in the third and in the eighth.
    let warnings = left_out(&skipped.err);
    assert_eq!(warnings.len(), 2, "{}", skipped.err);
    for (warning, step) in warnings.iter().zip([3, 8]) {
        let start = format!("warning: step {step} is not finite");
        assert!(
            warning.starts_with(&start) && warning.contains(EXAMPLES),
            "{warning}"
        );
    }
    assert_eq!(skipped.json()["skipped_steps"], 2);
    let card = fs::read_to_string(skipping.join("README.md")).expect("a model card");
    assert!(card.contains("12 steps, 2 of them left out"), "{card}");
    let metrics = fs::read_to_string(skipping.join("metrics.jsonl")).expect("the records");
    let steps = json_lines(&metrics);
    let without_loss = steps.iter().filter(|step| step["loss"].is_null());
    let without_loss: Vec<&Value> = without_loss.map(|step| &step["step"]).collect();
    assert_eq!(without_loss, [3, 8]);

    let again = place.path("again");
    let mut repeat = process();
    repeat
        .args(["train", "--config"])
        .arg(skipping.join("run.toml"))
        .arg("--out")
        .arg(&again);
    let repeated = said(repeat).done();
    assert_eq!(left_out(&repeated.err), warnings);
    assert!(adapter(&again) == adapter(&skipping));

    // What is saved of a run that ends at such a step goes on when it is told to leave them out.
    let stopping = place.path("stopping");
    let named = ["error: step 3 is not finite", EXAMPLES, "hint: "];
    refused(&said(train(&stopping, "stop")), 1, &named);
    assert!(!stopping.join(WEIGHTS).exists());
    assert!(stopping.join("checkpoints/step-000002").exists());
    let file = stopping.join("run.toml");
    let options = fs::read_to_string(&file).expect("the options");
    let told = options.replace("on-nonfinite = \"stop\"", "on-nonfinite = \"skip\"");
    assert!(told != options, "{options}");
    fs::write(&file, told).expect("written");
    assert!(finish(&place, RUNS[0], &stopping) == adapter(&skipping));
}

#[test]
fn a_held_out_loss_that_is_no_number_is_no_result() -> Result<()> {
    let place = Place::new();
    let base = poisoned(&place);
    let data = |last: u32| Dataset {
        examples: vec![Example::new(vec![5, 6, last], vec![true; 3])],
        report: DataReport::default(),
    };
    let weights = AdapterWeights::fresh(0, &Device::Cpu);
    let model = retune::model::load(&base, &Lora::default(), weights, None)?;
    let options = TrainOptions {
        budget: Budget::Steps(4),
        batch_size: 1,
        ..TrainOptions::default()
    };
    let folder = place.path("run");
    let checkpoints = Checkpoints::of_run(&folder);
    let error = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?
        .run(
            &data(7),
            &mut Order::as_stored(1),
            Some(&data(POISON.0 as u32)),
            Some(&checkpoints),
            &mut |_| Ok(Control::Continue),
        )
        .map(drop)
        .expect_err("a NaN");
    // Before the first step, which would have been for nothing.
    assert_eq!(
        error.to_string(),
        "the held-out loss after step 0 is NaN, which is no number"
    );
    let hint = error.hint_text().unwrap_or_default();
    assert!(hint.contains("`retune inspect`"), "{hint}");
    Ok(())
}

#[test]
fn the_last_good_state_is_kept_and_named_where_a_loss_is_no_number() -> Result<()> {
    const ODD: u32 = 4;
    let place = Place::new();
    let base = poisoned(&place);
    let example = |index: u32| {
        let mut tokens: Vec<u32> = (index + 5..index + 10).collect();
        if index == ODD {
            tokens[2] = POISON.0 as u32;
        }
        Example::new(tokens, vec![true; 5])
    };
    let data = Dataset {
        examples: (0..6).map(example).collect(),
        report: DataReport::default(),
    };
    for save_every in [0, 3] {
        let weights = AdapterWeights::fresh(0, &Device::Cpu);
        let model = retune::model::load(&base, &Lora::default(), weights, None)?;
        let options = TrainOptions {
            budget: Budget::Steps(data.len()),
            batch_size: 1,
            save_every,
            ..TrainOptions::default()
        };
        let folder = place.path(&format!("run-{save_every}"));
        let checkpoints = Checkpoints::of_run(&folder);
        let error = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?
            .run(
                &data,
                &mut Order::as_stored(data.len()),
                None,
                Some(&checkpoints),
                &mut |_| Ok(Control::Continue),
            )
            .map(drop)
            .expect_err("a NaN");
        let message = error.to_string();
        assert!(
            message.contains("step 5 is not finite") && message.contains("examples [4]"),
            "{message}"
        );
        let newest = folder.join("checkpoints/step-000004");
        let named = format!("the last good state is in `{}`", newest.display());
        let hint = error.hint_text().unwrap_or_default();
        assert!(hint.contains(&named), "{hint}");
        assert_eq!(checkpoints.latest()?.state.step, 4);
    }
    Ok(())
}

#[test]
fn a_merge_that_is_not_what_base_and_adapter_are_fails_and_leaves_nothing() -> Result<()> {
    let home = tempfile::tempdir().context("a folder")?;
    // As if the disk had not kept what was written to it.
    let merge_with_damage_to = |tensor: &str| -> Result<()> {
        let adapters = [(Adapter::open(&golden("adapters/lora-llama"))?, 1.0)];
        let damage = || {
            let mut entries = fs::read_dir(home.path()).expect("a folder");
            let written = entries.next().expect("a checkpoint").expect("an entry");
            let file = written.path().join("model.safetensors");
            let mut bytes = fs::read(&file).expect("the weights");
            let start = place_of(tensor, &bytes).start;
            bytes[start..start + 4].copy_from_slice(&100f32.to_le_bytes());
            fs::write(&file, bytes).expect("written");
        };
        merge(
            &golden("models/llama"),
            &adapters,
            &home.path().join("out"),
            &MergeOptions::default(),
            &mut |progress| {
                if let MergeProgress::Checking { .. } = progress {
                    damage();
                }
                Ok(())
            },
        )
        .map(drop)
    };
    // A weight that is merged is tried by itself, all others by what the model says.
    for (tensor, fact) in [
        (
            "model.layers.0.self_attn.q_proj.weight",
            "does not do what base and adapter do",
        ),
        (
            "model.norm.weight",
            "the merged model is not the adapted one",
        ),
    ] {
        let error = merge_with_damage_to(tensor).expect_err(fact);
        assert!(error.to_string().contains(fact), "{error}");
        let left = fs::read_dir(home.path()).expect("a folder").count();
        assert_eq!(left, 0, "{tensor}");
    }
    Ok(())
}
