//! What a run will need, from `config.json` and the data alone: no weight is loaded.

use crate::adapters::hooks::{AdapterMethod, BaseLinear, Injector, TextRows, layer_of};
use crate::adapters::storage::AdapterWeights;
use crate::model::ModelConfig;
use crate::model::inventory::{Parameter, ParameterKind, inventory};
use crate::ops::{self, FrozenWeight};
use crate::train::{Recompute, TrainOptions};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use std::time::Instant;

/// Program, tokenizer, threads and allocator, before any model: measured on small models.
const PROCESS_BYTES: u64 = 48 << 20;

/// Share of the measured product speed that whole training steps reach.
const STEP_EFFICIENCY: f64 = 0.6;

/// The tokens that steps hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// Mean tokens of an example.
    pub tokens_per_example: f64,
    /// Share of them that has a target.
    pub target_share: f64,
    /// Examples in one epoch.
    pub examples: usize,
    /// Whether held-out data is scored, for which the best weights are kept.
    pub evaluates: bool,
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
    /// What the backward pass needs of the largest pass.
    pub activation_bytes: u64,
    /// Resident memory at its peak.
    pub peak_memory_bytes: u64,
    /// Operations of a step.
    pub step_flops: f64,
    /// Product speed of this machine, measured now, in operations per second.
    pub product_speed: f64,
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
    let trained = trained_weights(config, &parameters, method)?;
    let trained_parameters = trained.weights.parameter_count() as u64;
    let base_parameters: u64 = parameters
        .iter()
        .map(|parameter| parameter.count() as u64)
        .sum();
    let base_bytes = base_parameters * dtype.size_in_bytes() as u64;

    let rows_per_example = load.tokens_per_example + trained.prompt_rows as f64;
    let tokens_per_step = rows_per_example * options.batch_size as f64;
    let pass_rows = tokens_per_step.min((options.tokens_per_pass as f64).max(rows_per_example));
    let (kept_blocks, activation_bytes) =
        activations(config, &trained, options.recompute, pass_rows);
    let logit_rows = (pass_rows * load.target_share).min(HEAD_CHUNK_ROWS);
    let logit_bytes = (logit_rows * config.vocabulary as f64 * 4.0) as u64;
    // Weight, gradient, two moments; the best weights of the evaluations so far.
    let copies = if load.evaluates { 5 } else { 4 };
    let training_bytes = trained_parameters * 4 * copies;

    let step_flops = flops(
        config,
        &parameters,
        &trained,
        kept_blocks,
        options.recompute,
        tokens_per_step,
        load,
    );
    let product_speed = measure_products(config)?;
    let step_seconds = step_flops / (product_speed * STEP_EFFICIENCY);
    let steps = options.budget.steps(load.examples, options.batch_size);
    Ok(Plan {
        base_parameters,
        trained_parameters,
        adapter_bytes: trained_parameters * 4,
        steps,
        tokens_per_step,
        base_bytes,
        training_bytes,
        activation_bytes,
        peak_memory_bytes: PROCESS_BYTES
            + base_bytes
            + training_bytes
            + activation_bytes
            + logit_bytes,
        step_flops,
        product_speed,
        step_seconds,
        seconds: step_seconds * steps as f64,
    })
}

/// Rows whose logits exist at once in the fused loss.
const HEAD_CHUNK_ROWS: f64 = 512.0;

struct Trained {
    weights: AdapterWeights,
    prompt_rows: usize,
    /// Blocks from this one on take part in the backward pass.
    lowest_block: usize,
}

/// Asks the method at every site of a model that is not there.
fn trained_weights(
    config: &ModelConfig,
    parameters: &[Parameter],
    method: &dyn AdapterMethod,
) -> Result<Trained> {
    let weights = AdapterWeights::fresh(0, &Device::Cpu);
    let mut injector = Injector::new(method, weights, config.shape())?;
    let zeros = |shape: &[usize]| Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?);
    for parameter in parameters {
        let shape = &parameter.shape;
        injector.parameter(&parameter.name, || zeros(shape))?;
        match parameter.kind {
            ParameterKind::Embedding => {
                injector.adapt_embedding(parameter.module(), &|| zeros(shape))?;
            }
            ParameterKind::Linear | ParameterKind::Head => {
                injector.adapt_linear(parameter.module(), &Absent(shape))?;
            }
            ParameterKind::Norm | ParameterKind::Bias => {}
        }
    }
    let prompt = injector.soft_prompt(&AbsentRows(config.hidden_size))?;
    let prompt_rows = prompt.map_or(0, |prompt| prompt.len());
    let weights = injector.finish()?;
    let below_blocks = |name: &str| name.contains("embed_tokens") || name == "prompt_embeddings";
    let lowest_block = weights
        .iter()
        .map(|(name, _)| {
            if below_blocks(name) {
                0
            } else {
                layer_of(name).unwrap_or(config.layers)
            }
        })
        .min()
        .ok_or_else(|| Error::new("the method trains nothing on this model"))?;
    Ok(Trained {
        weights,
        prompt_rows,
        lowest_block,
    })
}

/// Number of blocks with a backward pass, and the bytes that are kept for it at its peak.
fn activations(
    config: &ModelConfig,
    trained: &Trained,
    recompute: Recompute,
    rows: f64,
) -> (usize, u64) {
    let (hidden, inner) = (config.hidden_size as f64, config.intermediate_size as f64);
    let block = block_floats(config);
    let blocks = config.layers - trained.lowest_block.min(config.layers);
    let kept = match recompute {
        Recompute::Never => block * blocks as f64,
        Recompute::Blocks => hidden * config.layers as f64 + block,
    };
    // Gradients on their way down, and what the head's operation makes.
    let passing = 2.0 * inner + 6.0 * hidden;
    (blocks, ((kept + passing) * rows * 4.0) as u64)
}

/// What the operations of a block hold for each row: residual, norms and projections; q and k before and after the
/// rotation, v, the mixed values; gate, up and their product.
fn block_floats(config: &ModelConfig) -> f64 {
    let (hidden, inner) = (config.hidden_size as f64, config.intermediate_size as f64);
    let queries = (config.attention_heads * config.head_dim) as f64;
    let keys = (config.key_value_heads * config.head_dim) as f64;
    let norms = if config.query_key_norm {
        queries + keys
    } else {
        0.0
    };
    6.0 * hidden + 3.0 * queries + 3.0 * keys + norms + 3.0 * inner
}

fn flops(
    config: &ModelConfig,
    parameters: &[Parameter],
    trained: &Trained,
    kept_blocks: usize,
    recompute: Recompute,
    tokens: f64,
    load: &Load,
) -> f64 {
    let block_weights: f64 = parameters
        .iter()
        .filter(|parameter| parameter.kind == ParameterKind::Linear)
        .map(|parameter| parameter.count() as f64)
        .sum();
    let head = (config.vocabulary * config.hidden_size) as f64 * load.target_share;
    let backward_share = kept_blocks as f64 / config.layers as f64;
    let again = if recompute == Recompute::Blocks {
        1.0
    } else {
        0.0
    };
    let products = block_weights * (1.0 + again + backward_share) + 2.0 * head;
    let length = load.tokens_per_example + trained.prompt_rows as f64;
    let queries = (config.attention_heads * config.head_dim) as f64;
    // Scores and mixing, of which the causal half is computed; the backward pass has five products for two.
    let attention =
        2.0 * queries * length / 2.0 * config.layers as f64 * (1.0 + again + 2.5 * backward_share);
    // Whole trained weights also need the product of gradient and input.
    let whole: f64 = trained
        .weights
        .iter()
        .filter(|(name, _)| name.ends_with("_proj.weight"))
        .map(|(_, var)| var.elem_count() as f64)
        .sum();
    2.0 * tokens * (products + attention + whole)
}

/// Operations per second of this machine in products of the model's size, from a fifth of a second's work.
fn measure_products(config: &ModelConfig) -> Result<f64> {
    let (rows, hidden, inner) = (512, config.hidden_size, config.intermediate_size);
    let weight =
        FrozenWeight::from_tensor(&Tensor::ones((inner, hidden), DType::F32, &Device::Cpu)?)?;
    let x = Tensor::ones((rows, hidden), DType::F32, &Device::Cpu)?;
    ops::linear(&x, &weight, None)?;
    let (started, mut runs) = (Instant::now(), 0);
    while started.elapsed().as_millis() < 200 {
        ops::linear(&x, &weight, None)?;
        runs += 1;
    }
    Ok((runs * 2 * rows * hidden * inner) as f64 / started.elapsed().as_secs_f64())
}

/// A layer of which only the shape is known.
struct Absent<'a>(&'a [usize]);

impl BaseLinear for Absent<'_> {
    fn forward(&self, _x: &Tensor) -> Result<Tensor> {
        Err(Error::new("a plan computes nothing"))
    }

    fn weight(&self) -> Result<Tensor> {
        Ok(Tensor::zeros(self.0, DType::F32, &Device::Cpu)?)
    }

    fn in_features(&self) -> usize {
        self.0[1]
    }

    fn out_features(&self) -> usize {
        self.0[0]
    }
}

/// Embedding rows of which only the length is known.
struct AbsentRows(usize);

impl TextRows for AbsentRows {
    fn tokens(&self, _text: &str) -> Result<Vec<u32>> {
        Ok(vec![0])
    }

    fn rows(&self, tokens: &[u32]) -> Result<Tensor> {
        Ok(Tensor::zeros(
            (tokens.len(), self.0),
            DType::F32,
            &Device::Cpu,
        )?)
    }
}
