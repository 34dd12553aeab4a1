//! What a run will need, from `config.json` and the data alone: no weight is loaded.
//!
//! Memory is added up from what is kept; time is measured on one block and the head, with random weights. Every example is
//! taken to be as long as their mean: where lengths differ, steps do, and the largest of them takes more.

mod memory;
mod pace;
mod trained;
mod work;

pub use memory::{Memory, memory, memory_of_base};
pub use work::{StepShape, Work};

use crate::Result;
use crate::adapters::hooks::AdapterMethod;
use crate::model::inventory::inventory;
use crate::model::{ModelConfig, Placement};
use crate::train::{Recompute, TrainOptions};
use candle_core::DType;
use memory::{can_be_measured, kept_between_epochs, largest_pass};
use pace::Pace;
use serde::Serialize;
use trained::Trained;

/// The tokens that steps hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// Mean tokens of an example.
    pub tokens_per_example: f64,
    /// The same of the examples in the step that has most tokens.
    pub most_tokens_per_example: f64,
    /// Share of them that has a target.
    pub target_share: f64,
    /// Examples in one epoch.
    pub examples: usize,
    /// Tokens of the held-out data that is scored, for which the best weights are kept; 0 if there is none.
    pub held_out_tokens: usize,
}

/// An estimate of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Plan {
    /// Weights of the base.
    pub base_parameters: u64,
    /// Weights that are trained.
    pub trained_parameters: u64,
    /// Size of the adapter's weights in its file.
    pub adapter_bytes: u64,
    /// Optimizer steps.
    pub steps: usize,
    /// Tokens of a step, those of a soft prompt included.
    pub tokens_per_step: f64,
    /// The base's weights: mapped as stored, quantised, or on a GPU in the type it computes in.
    pub base_bytes: u64,
    /// The program, its threads, the tokenizer and the data, or what a GPU holds beside the model.
    pub process_bytes: u64,
    /// Trained weights, their gradients, and the optimizer's two moments.
    pub training_bytes: u64,
    /// What the passes of a step, or of an evaluation, keep and work in, and what is kept from epoch to epoch.
    pub activation_bytes: u64,
    /// Resident memory at its peak, or that of the GPU.
    pub peak_memory_bytes: u64,
    /// The same if each block is computed again in the backward pass.
    pub recomputing_peak_memory_bytes: u64,
    /// Operations of a step.
    pub work: Work,
    /// Seconds of a step; `None` if not even one block fits into the memory that is free, so that nothing was measured.
    pub step_seconds: Option<f64>,
    /// Seconds of all steps.
    pub seconds: Option<f64>,
}

/// Estimates a run of `method` on a base of shape `config`, whose weights are stored as `dtype`.
pub fn plan(
    placement: &Placement,
    config: &ModelConfig,
    dtype: DType,
    method: &dyn AdapterMethod,
    options: &TrainOptions,
    load: &Load,
) -> Result<Plan> {
    options.check_length(load.examples)?;
    let trained = Trained::by(method, config, &inventory(config))?;
    let memory_with =
        |options: &TrainOptions| memory(placement, config, dtype, method, options, load);
    let memory = memory_with(options)?;
    let recomputing = memory_with(&TrainOptions {
        recompute: Recompute::Blocks,
        ..options.clone()
    })?;
    let length = load.tokens_per_example + trained.prompt_rows as f64;
    let rows = length * options.batch_size as f64;
    let targets = load.tokens_per_example * load.target_share * options.batch_size as f64;

    let pass = largest_pass(rows, length, load, options);
    let pace = match can_be_measured(placement, config, dtype, &trained, pass) {
        false => None,
        true => Some(Pace::measure(
            placement,
            config,
            dtype,
            method,
            pass as usize,
            load.tokens_per_example.round() as usize,
            (load.tokens_per_example * load.target_share).round() as usize,
        )?),
    };
    let lowest = trained.lowest_block.min(config.layers);
    let step = |below| {
        Some(pace?.step(
            rows,
            targets,
            below,
            config.layers - lowest,
            options.recompute,
            trained.weights,
        ))
    };
    let step_seconds = step(lowest);
    let steps = options.budget.steps(load.examples, options.batch_size);
    let later = match kept_between_epochs(placement, config, &trained, options, load).all {
        true => steps - load.examples / options.batch_size,
        false => 0,
    };
    Ok(Plan {
        base_parameters: inventory(config)
            .iter()
            .map(|parameter| parameter.count() as u64)
            .sum(),
        trained_parameters: trained.weights,
        adapter_bytes: trained.weights * 4,
        steps,
        tokens_per_step: rows,
        base_bytes: memory.base,
        process_bytes: memory.process,
        training_bytes: memory.training,
        activation_bytes: memory.activations,
        peak_memory_bytes: memory.peak(),
        recomputing_peak_memory_bytes: recomputing.peak(),
        work: work_of_step(
            config,
            method,
            &StepShape {
                rows,
                targets,
                length,
                recompute: options.recompute,
                cached: false,
            },
        )?,
        step_seconds,
        seconds: step_seconds
            .zip(step(0))
            .map(|(first, again)| first * (steps - later) as f64 + again * later as f64),
    })
}

/// Makes sure that `method` finds what it is to train on a base of shape `config`: it is asked at every site, and no weight
/// is loaded.
pub fn check_sites(method: &dyn AdapterMethod, config: &ModelConfig) -> Result<()> {
    Trained::by(method, config, &inventory(config)).map(drop)
}

/// The arithmetic of a step.
pub fn work_of_step(
    config: &ModelConfig,
    method: &dyn AdapterMethod,
    step: &StepShape,
) -> Result<Work> {
    let parameters = inventory(config);
    let trained = Trained::by(method, config, &parameters)?;
    Ok(Work::of(config, &parameters, &trained, step))
}
