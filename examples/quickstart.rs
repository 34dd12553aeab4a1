//! The main job in one minute, offline: a frozen base learns a domain with LoRA; the adapter is saved, merged, verified.
//!
//! `cargo run --release --example quickstart`

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use candle_core::Device;
use retune::Result;
use retune::adapter_folder::{self, Adapter};
use retune::adapters::hooks::{AdapterMethod, NoAdapter};
use retune::adapters::lora::Lora;
use retune::adapters::storage::AdapterWeights;
use retune::data::{DataOptions, Dataset, Order, Tokenizer};
use retune::evaluate::evaluate;
use retune::generate::{Control, ExactMatchOptions, GenerationConfig, exact_match};
use retune::merge::{MergeOptions, merge};
use retune::model::{self, Model};
use retune::train::{Budget, Event, TrainOptions, Trainer};
use std::path::{Path, PathBuf};

const BASE: &str = "examples/base/model";

fn main() -> Result<()> {
    let base = Path::new(BASE);
    let tokenizer = Tokenizer::load(base)?;
    let read = |name: &str| {
        let file = PathBuf::from("examples/data/domain").join(name);
        Dataset::load(&[file], &tokenizer, &DataOptions::default())
    };
    let (tickets, held_out) = (read("train.jsonl")?, read("eval.jsonl")?);

    println!("The base has never seen a support ticket:");
    let untouched = model::load(
        base,
        &NoAdapter,
        AdapterWeights::fresh(0, &Device::Cpu),
        None,
    )?;
    report(&untouched, &tokenizer, &held_out)?;

    let method = Lora {
        rank: 16,
        ..Lora::default()
    };
    let adapted = model::load(base, &method, AdapterWeights::fresh(0, &Device::Cpu), None)?;
    let options = TrainOptions {
        budget: Budget::Steps(STEPS),
        batch_size: 16,
        learning_rate: 4e-3,
        warmup_steps: 10,
        ..TrainOptions::default()
    };
    println!(
        "\nTraining {} of its weights on {} tickets:",
        adapted.weights.parameter_count(),
        tickets.len()
    );
    let mut order = Order::shuffled(tickets.len(), options.seed);
    let mut trainer = Trainer::new(adapted.decoder.as_ref(), &adapted.weights, &options)?;
    trainer.run(&tickets, &mut order, None, None, &mut |event| {
        if let Event::Step(step) = event
            && step.step.is_multiple_of(STEPS as u64 / 4)
        {
            println!(
                "  step {:3}  loss {:.4}  {:.0} tokens/s",
                step.step, step.loss, step.tokens_per_second
            );
        }
        Ok(Control::Continue)
    })?;

    println!("\nThe same base with the adapter:");
    report(&adapted, &tokenizer, &held_out)?;

    let out = Path::new("target/quickstart");
    let _ = std::fs::remove_dir_all(out);
    let (adapter, merged) = (out.join("adapter"), out.join("merged"));
    adapter_folder::save(&adapter, &adapted, &method as &dyn AdapterMethod, BASE)?;
    let result = merge(
        base,
        &[(Adapter::open(&adapter)?, 1.0)],
        &merged,
        &MergeOptions::default(),
        &mut |_| Ok(()),
    )?;
    println!(
        "\nSaved {} and merged it into {}: logits differ by at most {:.1e}, rounding to the base's type explains {:.1e}.",
        adapter.display(),
        merged.display(),
        result.probe.difference,
        result.probe.bound
    );
    println!(
        "Next:\n  cargo run --release -- chat --model {BASE} --adapter {}\n  \
         cargo run --release -- compare --model {BASE} --data examples/data/domain/train.jsonl --out target/comparison",
        adapter.display()
    );
    Ok(())
}

const STEPS: usize = 260;

/// Loss and exact match on held-out tickets, and one answer.
fn report(model: &Model, tokenizer: &Tokenizer, held_out: &Dataset) -> Result<()> {
    let loss = evaluate(model.decoder.as_ref(), held_out, 8192, &mut |_| {})?.loss;
    let generation = GenerationConfig::read(Path::new(BASE), &model.config)?.options(tokenizer);
    let answers = exact_match(
        model,
        tokenizer,
        &held_out.examples[..held_out.len().min(100)],
        &ExactMatchOptions::new(generation),
        &mut |_| Ok(Control::Continue),
    )?;
    println!("  loss {loss:.4} on {} held-out tickets", held_out.len());
    println!(
        "  {} of {} replies are exactly right, such as",
        answers.right, answers.of
    );
    let sample = &answers.answers[0];
    println!("    ticket   {}", plain(&sample.prompt));
    println!("    reply    {}", sample.answer.trim());
    println!("    expected {}", sample.reference.trim());
    Ok(())
}

/// A prompt without the marks of the chat template.
fn plain(prompt: &str) -> &str {
    let text = prompt.trim().trim_start_matches("<|user|>");
    text.split("<|end|>").next().unwrap_or(text)
}
