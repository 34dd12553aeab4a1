//! What a run will need, from `config.json` and the data alone: no weight is loaded.
//!
//! Memory is added up from what is kept; time is measured on one block and the head, with random weights.

mod pace;
mod trained;
mod work;

pub use work::Work;

use crate::Result;
use crate::adapters::hooks::AdapterMethod;
use crate::model::ModelConfig;
use crate::model::inventory::inventory;
use crate::ops;
use crate::train::{Recompute, TrainOptions};
use candle_core::DType;
use pace::Pace;
use serde::Serialize;
use trained::Trained;

/// Program, tokenizer, threads and allocator, before any model: measured on small models.
const PROCESS_BYTES: u64 = 36 << 20;

/// The tokens that steps hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// Mean tokens of an example.
    pub tokens_per_example: f64,
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
    /// The base's weights as stored, mapped.
    pub base_bytes: u64,
    /// Trained weights, their gradients, and the optimizer's two moments.
    pub training_bytes: u64,
    /// What the passes of a step, or of an evaluation, keep and work in.
    pub activation_bytes: u64,
    /// Resident memory at its peak.
    pub peak_memory_bytes: u64,
    /// Operations of a step.
    pub work: Work,
    /// Seconds of a step.
    pub step_seconds: f64,
    /// Seconds of all steps.
    pub seconds: f64,
}

/// Estimates a run of `method` on a base of shape `config`, whose weights are stored as `dtype`.
pub fn plan(
    config: &ModelConfig,
    dtype: DType,
    method: &dyn AdapterMethod,
    options: &TrainOptions,
    load: &Load,
) -> Result<Plan> {
    let parameters = inventory(config);
    let trained = Trained::by(method, config, &parameters)?;
    let base_parameters: u64 = parameters
        .iter()
        .map(|parameter| parameter.count() as u64)
        .sum();
    let base_bytes = base_parameters * dtype.size_in_bytes() as u64;

    let length = load.tokens_per_example + trained.prompt_rows as f64;
    let rows = length * options.batch_size as f64;
    let targets = load.tokens_per_example * load.target_share * options.batch_size as f64;
    let pass_rows = rows.min((options.tokens_per_pass as f64).max(length));
    let activation_bytes =
        peak_floats(config, &trained, options, load, pass_rows, targets / rows) * 4.0;
    // Weight, gradient, two moments; the best weights of the evaluations so far.
    let copies = if load.held_out_tokens > 0 { 5 } else { 4 };
    let training_bytes = trained.weights * 4 * copies;

    let pace = Pace::measure(
        config,
        dtype,
        method,
        pass_rows as usize,
        load.tokens_per_example.round() as usize,
        (load.tokens_per_example * load.target_share).round() as usize,
    )?;
    let below = trained.lowest_block.min(config.layers);
    let step_seconds = pace.step(
        rows,
        targets,
        below,
        config.layers - below,
        options.recompute,
        trained.weights,
    );
    let steps = options.budget.steps(load.examples, options.batch_size);
    Ok(Plan {
        base_parameters,
        trained_parameters: trained.weights,
        adapter_bytes: trained.weights * 4,
        steps,
        tokens_per_step: rows,
        base_bytes,
        training_bytes,
        activation_bytes: activation_bytes as u64,
        peak_memory_bytes: PROCESS_BYTES + base_bytes + training_bytes + activation_bytes as u64,
        work: work_of_step(config, method, options, length, rows, targets)?,
        step_seconds,
        seconds: step_seconds * steps as f64,
    })
}

/// The arithmetic of a step of `rows` rows in segments of `length`, `targets` of them with a target.
pub fn work_of_step(
    config: &ModelConfig,
    method: &dyn AdapterMethod,
    options: &TrainOptions,
    length: f64,
    rows: f64,
    targets: f64,
) -> Result<Work> {
    let parameters = inventory(config);
    let trained = Trained::by(method, config, &parameters)?;
    Ok(Work::of(
        config,
        &parameters,
        &trained,
        options.recompute,
        rows,
        targets,
        length,
    ))
}

/// Floats that the largest pass keeps and works in.
fn peak_floats(
    config: &ModelConfig,
    trained: &Trained,
    options: &TrainOptions,
    load: &Load,
    pass_rows: f64,
    target_share: f64,
) -> f64 {
    let (hidden, inner) = (config.hidden_size as f64, config.intermediate_size as f64);
    let block = block_floats(config);
    let above = (config.layers - trained.lowest_block.min(config.layers)) as f64;
    let kept = match options.recompute {
        Recompute::Never => block * above,
        Recompute::Blocks => hidden * above + block,
    };
    // The gated activation and its three gradients; a norm's output and gradients; embedded rows and the top's.
    let working = 3.0 * inner + 8.0 * hidden;
    let logits = |rows: f64| {
        (ops::head_chunk_rows(rows as usize, config.vocabulary) * config.vocabulary) as f64
    };
    let training = pass_rows * (kept + working) + logits(pass_rows * target_share);
    let scored_rows = load.held_out_tokens.min(options.tokens_per_pass) as f64;
    let scoring = scored_rows * (block + inner + 4.0 * hidden) + logits(scored_rows * target_share);
    training.max(scoring)
}

/// What a block keeps of each row: its input and the residual between its halves; rotated queries and keys, values and
/// what attention made of them; gate and up.
fn block_floats(config: &ModelConfig) -> f64 {
    let (hidden, inner) = (config.hidden_size as f64, config.intermediate_size as f64);
    let queries = (config.attention_heads * config.head_dim) as f64;
    let keys = (config.key_value_heads * config.head_dim) as f64;
    let unnormed = if config.query_key_norm {
        queries + keys
    } else {
        0.0
    };
    2.0 * (hidden + queries + keys + inner + config.attention_heads as f64) + unnormed
}
