//! A method defined outside both crates: every linear layer's output is scaled by a learned vector.
//!
//! `y = l ⊙ (W x)` with `l` of `(out)`, starting at one; the idea of IA3 (Liu et al. 2022, <https://arxiv.org/abs/2205.05638>).
//! Only candle operations are used: autograd carries them.
//!
//! `cargo run --release --example custom_method`

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use candle_core::{Device, Tensor};
use retune::adapters::hooks::{
    AdapterMethod, BaseLinear, LinearAdapter, LinearSite, Mode, ModelShape,
};
use retune::adapters::storage::{AdapterWeights, Init, PeftConfig, PeftFolder};
use retune::data::{DataOptions, Dataset, Order, Tokenizer};
use retune::evaluate::evaluate;
use retune::model;
use retune::train::{Budget, Control, Event, TrainOptions, Trainer};
use retune::{Error, Result};
use std::path::{Path, PathBuf};

struct ScaleOutputs;

impl AdapterMethod for ScaleOutputs {
    fn name(&self) -> &'static str {
        "scale-outputs"
    }

    fn adapt_linear(
        &self,
        site: &LinearSite,
        weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn LinearAdapter>>> {
        if site.is_head() {
            return Ok(None);
        }
        let scale = weights.var(
            &site.peft_name("scale"),
            site.base.out_features(),
            Init::Ones,
        )?;
        Ok(Some(Box::new(Scaled(scale))))
    }

    fn peft_config(&self, _model: &ModelShape, _weights: &AdapterWeights) -> Result<PeftConfig> {
        Ok(PeftConfig::new("SCALE_OUTPUTS"))
    }

    fn default_learning_rate(&self) -> f64 {
        2e-2
    }
}

struct Scaled(Tensor);

impl LinearAdapter for Scaled {
    fn forward(&self, x: &Tensor, base: &dyn BaseLinear, _mode: Mode) -> Result<Tensor> {
        Ok(base.forward(x)?.broadcast_mul(&self.0)?)
    }

    fn merged_weight(&self, base: &Tensor) -> Result<Tensor> {
        Ok(base.broadcast_mul(&self.0.unsqueeze(1)?)?)
    }
}

fn main() -> Result<()> {
    let base = Path::new("examples/base/model");
    let tokenizer = Tokenizer::load(base)?;
    let file = PathBuf::from("examples/data/domain/train.jsonl");
    let data = Dataset::load(&[file], &tokenizer, &DataOptions::default())?;
    let (data, held_out) = data.split(0.05, 0)?;
    let model = model::load(
        base,
        &ScaleOutputs,
        AdapterWeights::fresh(0, &Device::Cpu),
        None,
    )?;
    let loss = |model: &model::Model| {
        evaluate(model.decoder.as_ref(), &held_out, 8192, &mut |_| {}).map(|scores| scores.loss)
    };
    let before = loss(&model)?;

    let options = TrainOptions {
        budget: Budget::Steps(30),
        learning_rate: ScaleOutputs.default_learning_rate(),
        ..TrainOptions::default()
    };
    let mut order = Order::shuffled(data.len(), options.seed);
    Trainer::new(model.decoder.as_ref(), &model.weights, &options)?.run(
        &data,
        &mut order,
        None,
        None,
        &mut |event| {
            if let Event::Step(step) = event
                && step.step.is_multiple_of(10)
            {
                println!("step {:2}  loss {:.4}", step.step, step.loss);
            }
            Ok(Control::Continue)
        },
    )?;
    let after = loss(&model)?;
    println!(
        "{} trained weights: held-out loss {before:.4} -> {after:.4}",
        model.weights.parameter_count()
    );

    let folder = Path::new("target/custom-adapter");
    std::fs::create_dir_all(folder).map_err(|error| Error::new(error.to_string()))?;
    PeftFolder::save(
        folder,
        &ScaleOutputs.peft_config(model.decoder.shape(), &model.weights)?,
        &model.weights,
    )?;
    let saved = AdapterWeights::loaded(PeftFolder::load(folder)?.tensors, &Device::Cpu);
    let again = loss(&model::load(base, &ScaleOutputs, saved, None)?)?;
    println!("saved and loaded again: {again:.4}");
    Ok(())
}
