//! What a run will need, from `config.json` and the data alone: no weight is loaded.
//!
//! Memory is added up from what is kept; time is measured on one block and the head, with random weights.

mod pace;
mod trained;
mod work;

pub use work::{StepShape, Work};

use crate::Result;
use crate::adapters::hooks::{AdapterMethod, layer_of};
use crate::model::inventory::inventory;
use crate::model::{ModelConfig, Placement};
use crate::ops;
use crate::report::memory::available_bytes;
use crate::train::{Recompute, TrainOptions};
use candle_core::DType;
use pace::Pace;
use serde::Serialize;
use trained::Trained;

/// Program, tokenizer, threads and allocator, before any model: measured on small models.
const PROCESS_BYTES: u64 = 36 << 20;
/// What a GPU holds beside the model: the context of CUDA, its libraries, the workspace of products, kernels, and what
/// its allocator loses between blocks. An estimate, which no measurement has confirmed yet.
const GPU_BYTES: u64 = 600 << 20;

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
    /// The base's weights: mapped as stored, or on a GPU in the type it computes in.
    pub base_bytes: u64,
    /// Trained weights, their gradients, and the optimizer's two moments.
    pub training_bytes: u64,
    /// What the passes of a step, or of an evaluation, keep and work in.
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
    let trained = Trained::by(method, config, &inventory(config))?;
    let memory = memory(placement, config, dtype, method, options, load)?;
    let recomputing = TrainOptions {
        recompute: Recompute::Blocks,
        ..options.clone()
    };
    let length = load.tokens_per_example + trained.prompt_rows as f64;
    let rows = length * options.batch_size as f64;
    let targets = load.tokens_per_example * load.target_share * options.batch_size as f64;

    let pass = largest_pass(rows, length, options);
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
    let later = match kept_between_epochs(config, &trained, options, load) {
        0 => 0,
        _ => steps - load.examples / options.batch_size,
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
        training_bytes: memory.training,
        activation_bytes: memory.activations,
        peak_memory_bytes: memory.peak(),
        recomputing_peak_memory_bytes: self::memory(
            placement,
            config,
            dtype,
            method,
            &recomputing,
            load,
        )?
        .peak(),
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

/// Resident memory at the peak of a run, or that of the GPU, by what it is for, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// What is there without a model.
    pub process: u64,
    /// The base's weights: mapped as stored, or on a GPU in the type it computes in.
    pub base: u64,
    /// Trained weights, their gradients, the optimizer's moments, and the best weights so far.
    pub training: u64,
    /// What the largest pass keeps and works in.
    pub activations: u64,
}

impl Memory {
    /// All of it.
    pub fn peak(&self) -> u64 {
        [self.base, self.training, self.activations]
            .into_iter()
            .fold(self.process, u64::saturating_add)
    }
}

/// Whether there is the memory to run one block, the head and the adapter on random weights.
fn can_be_measured(
    placement: &Placement,
    config: &ModelConfig,
    dtype: DType,
    trained: &Trained,
    pass_rows: f64,
) -> bool {
    let weights: u64 = inventory(config)
        .iter()
        .filter(|parameter| layer_of(&parameter.name).is_none_or(|layer| layer == 0))
        .map(|parameter| parameter.count() as u64)
        .sum();
    let (hidden, inner) = (config.hidden_size as f64, config.intermediate_size as f64);
    let rows = pass_rows.min(pace::ENOUGH_ROWS as f64);
    let width = placement.activations().size_in_bytes() as f64;
    let working = rows * (block_floats(config) + 3.0 * inner + 8.0 * hidden) * width
        + head_bytes(placement, config, rows);
    let bytes = |weight: DType| weights as f64 * weight.size_in_bytes() as f64;
    let computing = bytes(placement.weights(dtype)) + 4.0 * trained.weights as f64 + working;
    let fits = |bytes: f64, free: Option<u64>| free.is_none_or(|free| bytes <= free as f64);
    match placement.device_memory() {
        // The weights are made in main memory.
        Some((free, _)) => fits(computing, Some(free)) && fits(bytes(dtype), available_bytes()),
        None => fits(computing, available_bytes()),
    }
}

/// The memory of a run; no weight is loaded, and nothing is measured.
pub fn memory(
    placement: &Placement,
    config: &ModelConfig,
    dtype: DType,
    method: &dyn AdapterMethod,
    options: &TrainOptions,
    load: &Load,
) -> Result<Memory> {
    let parameters = inventory(config);
    let trained = Trained::by(method, config, &parameters)?;
    let weights: u64 = parameters
        .iter()
        .map(|parameter| parameter.count() as u64)
        .sum();
    let length = load.tokens_per_example + trained.prompt_rows as f64;
    let rows = length * options.batch_size as f64;
    let share = load.target_share * load.tokens_per_example / length;
    let pass = largest_pass(rows, length, options);
    let activations = peak_bytes(placement, config, &trained, options, load, pass, share);
    let on_gpu = placement.device.is_cuda();
    // Weight, gradient, two moments; the best weights of the evaluations so far.
    let copies = if load.held_out_tokens > 0 { 5 } else { 4 };
    Ok(Memory {
        process: if on_gpu { GPU_BYTES } else { PROCESS_BYTES },
        // What is trained whole does not go to a GPU as it was.
        base: (weights - if on_gpu { trained.whole } else { 0 })
            * placement.weights(dtype).size_in_bytes() as u64,
        training: trained.weights * 4 * copies,
        // What is kept from epoch to epoch is in main memory always.
        activations: match on_gpu {
            true => activations as u64,
            false => activations as u64 + kept_between_epochs(config, &trained, options, load),
        },
    })
}

/// Bytes of the hidden states below the lowest trained block that stay in memory from epoch to epoch.
fn kept_between_epochs(
    config: &ModelConfig,
    trained: &Trained,
    options: &TrainOptions,
    load: &Load,
) -> u64 {
    let steps = options.budget.steps(load.examples, options.batch_size);
    if trained.lowest_block == 0 || steps.saturating_mul(options.batch_size) <= load.examples {
        return 0;
    }
    let rows = load.tokens_per_example * load.examples as f64;
    let size = options.activation_cache_type.size() as f64;
    let bytes = (rows * config.hidden_size as f64 * size) as u64;
    bytes.min(options.activation_cache_bytes as u64)
}

/// Rows of the largest pass of a step of `rows` rows.
fn largest_pass(rows: f64, length: f64, options: &TrainOptions) -> f64 {
    rows.min((options.tokens_per_pass as f64).max(length))
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

/// Bytes that the largest pass keeps and works in.
fn peak_bytes(
    placement: &Placement,
    config: &ModelConfig,
    trained: &Trained,
    options: &TrainOptions,
    load: &Load,
    pass_rows: f64,
    target_share: f64,
) -> f64 {
    let width = placement.activations().size_in_bytes() as f64;
    let (hidden, inner) = (config.hidden_size as f64, config.intermediate_size as f64);
    let block = block_floats(config);
    let above = (config.layers - trained.lowest_block.min(config.layers)) as f64;
    let kept = match options.recompute {
        Recompute::Never => block * above,
        Recompute::Blocks => hidden * above + block,
    };
    // The gated activation and its three gradients; a norm's output and gradients; embedded rows and the top's.
    let working = 3.0 * inner + 8.0 * hidden;
    let logits = |rows: f64| head_bytes(placement, config, rows * target_share);
    let training = pass_rows * (kept + working) * width + logits(pass_rows);
    let scored_rows = load.held_out_tokens.min(options.tokens_per_pass) as f64;
    let scoring = scored_rows * (block + inner + 4.0 * hidden) * width + logits(scored_rows);
    training.max(scoring)
}

/// Bytes of the logits, with their gradient, that exist at one time when `rows` rows have a target.
fn head_bytes(placement: &Placement, config: &ModelConfig, rows: f64) -> f64 {
    ops::head_chunk_bytes(
        rows as usize,
        config.vocabulary,
        placement.device.is_cuda(),
        placement.compute,
    ) as f64
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
