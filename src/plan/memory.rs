//! The memory of a run, added up from what is kept.

use super::Load;
use super::pace::ENOUGH_ROWS;
use super::trained::Trained;
use crate::Result;
use crate::adapters::hooks::{AdapterMethod, layer_of};
use crate::model::inventory::{Parameter, ParameterKind, inventory};
use crate::model::{ModelConfig, Placement};
use crate::ops::{self, ComputeType};
use crate::report::memory::available_bytes;
use crate::train::{Recompute, TrainOptions};
use candle_core::DType;
use half::bf16;

/// The program's code and what it holds before any model, with the block of a weight that is widened at a time: measured.
const PROCESS_BYTES: u64 = 18 << 20;
/// What a token of the vocabulary takes in the tokenizer, measured with 32 to 128 thousand of them. What reading it has left
/// free is used by the run.
const TOKENIZER_BYTES: u64 = 300;
/// The same at most while the tokenizer is read, which is before the base is.
const READING_TOKENIZER_BYTES: u64 = 1600;
/// A token of the data: its number, whether it is learned, and the text of an answer.
const DATA_TOKEN_BYTES: u64 = 10;
/// What a product packs on each thread for each row that takes part in it, and at most: the second-level cache.
const PACKED_ROW_BYTES: f64 = 1024.0;
const MOST_PACKED_BYTES: f64 = (1 << 20) as f64;
/// Queries whose scores and their gradients a thread makes at a time.
const ATTENTION_BLOCK: f64 = 64.0;
/// Queries that add to one part of the gradients of keys and values, at least, and the parts of an example in one head, at
/// most.
const ATTENTION_STRETCH: f64 = 512.0;
const MOST_ATTENTION_STRETCHES: f64 = 8.0;
/// A buffer is handed on to who needs at least so much of it.
const LEAST_SHARED_BUFFER: f64 = 0.8;
/// Rows that make one part of the gradients of a low-rank update.
const UPDATE_ROWS: f64 = 192.0;
/// The largest block that glibc's allocator keeps for itself when it is freed, and how many times the largest of them may
/// lie free at the end of its heap (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
const LARGEST_KEPT_BLOCK: f64 = (32 << 20) as f64;
const KEPT_BLOCKS: f64 = 2.0;
/// What a GPU holds beside the model: the context of CUDA, its libraries, the workspace of products, kernels, and what
/// its allocator loses between blocks. An estimate, which no measurement has confirmed yet.
const GPU_BYTES: u64 = 600 << 20;

/// Resident memory at the peak of a run, or that of the GPU, by what it is for, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// What is there without a model: the program, its threads, the tokenizer and the data.
    pub process: u64,
    /// What there is for a moment while the tokenizer is read, before anything of the following.
    pub reading: u64,
    /// The base's weights: mapped as stored, quantised, or on a GPU in the type it computes in.
    pub base: u64,
    /// Trained weights, their gradients, the optimizer's moments, and the best weights so far.
    pub training: u64,
    /// What the largest pass keeps and works in, and what is kept from epoch to epoch.
    pub activations: u64,
}

impl Memory {
    /// The most that there is at a time.
    pub fn peak(&self) -> u64 {
        let running = [self.base, self.training, self.activations]
            .into_iter()
            .fold(self.process, u64::saturating_add);
        running.max(self.reading)
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
    let heaviest = Load {
        tokens_per_example: load.most_tokens_per_example,
        ..*load
    };
    let length = heaviest.tokens_per_example + trained.prompt_rows as f64;
    let rows = length * options.batch_size as f64;
    let rows = largest_pass(rows, length, &heaviest, options);
    let largest = Pass {
        rows,
        odd_rows: odd_examples(&heaviest, options) * length,
        targets: rows * load.target_share * heaviest.tokens_per_example / length,
        length,
    };
    let on_gpu = placement.device.is_cuda();
    // Weight, gradient, two moments; the best weights of the evaluations so far.
    let copies = if load.held_out_tokens > 0 { 5 } else { 4 };
    let (process, reading) = match on_gpu {
        true => (GPU_BYTES, 0),
        false => (
            process_bytes(config, load, &largest),
            PROCESS_BYTES + config.vocabulary as u64 * READING_TOKENIZER_BYTES,
        ),
    };
    let activations = peak_bytes(placement, config, &trained, options, &heaviest, &largest) as u64;
    Ok(Memory {
        process,
        reading,
        base: base_bytes(placement, &parameters, &trained, dtype),
        training: trained.weights.saturating_mul(4 * copies),
        activations: activations
            .saturating_add(kept_between_epochs(placement, config, &trained, options, load).bytes),
    })
}

/// What a base takes on the device before any text goes through it; all of its weights are held as `placement` says.
pub fn memory_of_base(placement: &Placement, config: &ModelConfig, dtype: DType) -> u64 {
    let beside = match placement.device.is_cuda() {
        true => GPU_BYTES,
        false => PROCESS_BYTES,
    };
    inventory(config)
        .iter()
        .map(|parameter| placement.bytes(parameter.kind, parameter.count() as u64, dtype))
        .fold(beside, u64::saturating_add)
}

/// Bytes of the base's weights. What is trained whole stays as it is stored, and does not go to a GPU.
fn base_bytes(
    placement: &Placement,
    parameters: &[Parameter],
    trained: &Trained,
    dtype: DType,
) -> u64 {
    let all: u64 = parameters
        .iter()
        .map(|parameter| placement.bytes(parameter.kind, parameter.count() as u64, dtype))
        .sum();
    let others = trained.whole - trained.whole_linear;
    let whole = placement.bytes(ParameterKind::Linear, trained.whole_linear, dtype)
        + placement.bytes(ParameterKind::Head, others, dtype);
    let stored = match placement.device.is_cuda() {
        true => 0,
        false => trained.whole * dtype.size_in_bytes() as u64,
    };
    all.saturating_sub(whole) + stored
}

/// What the largest pass of a run holds.
struct Pass {
    rows: f64,
    /// Rows of the last pass of a step, where it is smaller by so much that it has buffers of its own.
    odd_rows: f64,
    /// Rows that have a target.
    targets: f64,
    /// Rows of an example.
    length: f64,
}

/// Bytes of the program, its threads, the tokenizer and the data, without a model.
fn process_bytes(config: &ModelConfig, load: &Load, pass: &Pass) -> u64 {
    let tokens = load.tokens_per_example * load.examples as f64 + load.held_out_tokens as f64;
    let packed = (pass.rows * PACKED_ROW_BYTES).min(MOST_PACKED_BYTES);
    // Scores and their gradients.
    let scores = 2.0 * ATTENTION_BLOCK * pass.length * size_of::<f32>() as f64;
    let threads = rayon::current_num_threads() as f64 * (packed + scores);
    [
        config.vocabulary as u64 * TOKENIZER_BYTES,
        (tokens * DATA_TOKEN_BYTES as f64) as u64,
        threads as u64,
    ]
    .into_iter()
    .fold(PROCESS_BYTES, u64::saturating_add)
}

/// Hidden states below the lowest trained block that are kept from epoch to epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeptBetweenEpochs {
    /// Those in memory: the GPU's if that is where the run is.
    pub(super) bytes: u64,
    /// Whether later epochs are spared the blocks below: all are kept, if not in memory then in a file, which a GPU has not.
    pub(super) all: bool,
}

/// What is kept from epoch to epoch.
pub(super) fn kept_between_epochs(
    placement: &Placement,
    config: &ModelConfig,
    trained: &Trained,
    options: &TrainOptions,
    load: &Load,
) -> KeptBetweenEpochs {
    let steps = options.budget.steps(load.examples, options.batch_size);
    let limit = options.activation_cache_bytes as u64;
    let again = steps.saturating_mul(options.batch_size) > load.examples;
    if trained.lowest_block == 0 || limit == 0 || !again {
        return KeptBetweenEpochs {
            bytes: 0,
            all: false,
        };
    }
    let rows = load.tokens_per_example * load.examples as f64;
    let number = options.activation_cache_type;
    let size = number.dtype(placement.activations()).size_in_bytes() as f64;
    let bytes = (rows * config.hidden_size as f64 * size) as u64;
    KeptBetweenEpochs {
        bytes: bytes.min(limit),
        all: bytes <= limit || placement.device.is_cpu(),
    }
}

/// Rows of the largest pass of a step of `rows` rows. Those of a soft prompt are not among the tokens by which it is cut.
pub(super) fn largest_pass(rows: f64, length: f64, load: &Load, options: &TrainOptions) -> f64 {
    let examples = options.tokens_per_pass as f64 / load.tokens_per_example;
    rows.min(examples.max(1.0) * length)
}

/// Examples of the last pass of a step, if they are so few that it has buffers of its own beside those of the others, which
/// wait for the next step; else 0.
fn odd_examples(load: &Load, options: &TrainOptions) -> f64 {
    let batch = options.batch_size as f64;
    let in_pass = (options.tokens_per_pass as f64 / load.tokens_per_example).floor();
    let in_pass = in_pass.max(1.0);
    let rest = batch % in_pass;
    match batch > in_pass && rest < LEAST_SHARED_BUFFER * in_pass {
        true => rest,
        false => 0.0,
    }
}

/// Bytes that the largest pass keeps and works in.
fn peak_bytes(
    placement: &Placement,
    config: &ModelConfig,
    trained: &Trained,
    options: &TrainOptions,
    load: &Load,
    pass: &Pass,
) -> f64 {
    let width = placement.activations().size_in_bytes() as f64;
    let (hidden, inner) = (config.hidden_size as f64, config.intermediate_size as f64);
    let on_gpu = placement.device.is_cuda();
    let block = block_floats(config);
    let above = (config.layers - trained.lowest_block.min(config.layers)) as f64;
    // What attention returns is kept where the output projection is trained; a GPU needs it for the softmax as well.
    let unmixed = match on_gpu {
        true => 0.0,
        false => above - (trained.outputs as f64).min(above),
    };
    let queries = (config.attention_heads * config.head_dim) as f64;
    let kept = match options.recompute {
        Recompute::Never => block * above - queries * unmixed,
        Recompute::Blocks => hidden * above + block,
    };
    let scored = load.held_out_tokens.min(options.tokens_per_pass) as f64;
    let scored_targets = scored * pass.targets / pass.rows;
    let scoring = scored * (block + inner + 4.0 * hidden) * width;
    if on_gpu {
        // The gated activation and its three gradients; a norm's output and gradients; embedded rows and the top's.
        let working = 3.0 * inner + 8.0 * hidden;
        let training = pass.rows * (kept + working) * width;
        return (training + head_bytes(placement, config, pass.targets))
            .max(scoring + head_bytes(placement, config, scored_targets))
            + widened_bytes(placement, config);
    }
    let packed = |rows: f64| match placement.compute {
        ComputeType::F32 => 0.0,
        ComputeType::Bf16 => packed_bytes(config, rows),
    };
    let beside = |rows: f64, targets: f64| {
        let logits = head_bytes(placement, config, targets);
        let packed_logits = match placement.compute {
            ComputeType::F32 => 0.0,
            ComputeType::Bf16 => logits / 2.0,
        };
        logits + packed_logits + packed(rows) + allocator_bytes(config, rows)
    };
    let buffers = (kept + recycled_floats(config, trained)) * width;
    let odd = pass.odd_rows * buffers + packed(pass.odd_rows);
    let training = pass.rows * buffers + passing_bytes(config, trained, pass) + odd;
    (training + beside(pass.rows, pass.targets)).max(scoring + beside(scored, scored_targets))
}

/// Bytes of a quantised weight that is widened for its product on a GPU: of the largest one.
fn widened_bytes(placement: &Placement, config: &ModelConfig) -> f64 {
    let linear = |parameter: &Parameter| match parameter.kind {
        ParameterKind::Linear => parameter.count(),
        _ => 0,
    };
    let largest = inventory(config).iter().map(linear).max().unwrap_or(0);
    match placement.quantization {
        Some(_) => (largest * placement.activations().size_in_bytes()) as f64,
        None => 0.0,
    }
}

/// Floats of each row in which the CPU works beside what blocks keep: buffers that go from one operation to the next.
fn recycled_floats(config: &ModelConfig, trained: &Trained) -> f64 {
    let (hidden, inner) = (config.hidden_size as f64, config.intermediate_size as f64);
    let queries = (config.attention_heads * config.head_dim) as f64;
    let keys = (config.key_value_heads * config.head_dim) as f64;
    // The gated activation and its gradients; a norm's output; gradients of queries, keys and values, before they are
    // turned and after.
    let mut buffers = 3.0 * inner + hidden + 2.0 * (queries + keys);
    if trained.input {
        // Embedded rows, and with what is trained among them: candle's graph holds both.
        buffers += 2.0 * hidden;
    }
    if trained.drops {
        buffers += inner;
    }
    buffers
}

/// Bytes of a pass on the CPU that are in no buffer: at one time those of the head, of attention's gradients, or of a
/// low-rank update's.
fn passing_bytes(config: &ModelConfig, trained: &Trained, pass: &Pass) -> f64 {
    let hidden = config.hidden_size as f64;
    let queries = (config.attention_heads * config.head_dim) as f64;
    let (rows, targets) = (pass.rows, pass.targets);
    // Candle's graph from the top of the blocks to the loss, with a gradient beside each tensor, and zeros to which it is
    // added.
    let head = hidden * (rows + 5.0 * targets).max(3.0 * (rows + targets));
    // Each stretch of an example has gradients for the keys that it sees, in every head; beside them is that of the output.
    let stretches = (pass.length / ATTENTION_STRETCH).ceil();
    let stretches = stretches.clamp(1.0, MOST_ATTENTION_STRETCHES);
    let attention = rows * (queries * (stretches + 1.0) + hidden);
    let update = (rows / UPDATE_ROWS).ceil() * trained.widest_update as f64;
    head.max(attention).max(update) * size_of::<f32>() as f64
}

/// Bytes of the left factors of products in bf16: of the widest input and of the hidden state, each a buffer of its own.
fn packed_bytes(config: &ModelConfig, rows: f64) -> f64 {
    let widths = config.intermediate_size + config.hidden_size;
    rows * widths as f64 * size_of::<bf16>() as f64
}

/// Bytes that are free and that the allocator has not given back to the system: they follow from the largest tensor.
fn allocator_bytes(config: &ModelConfig, rows: f64) -> f64 {
    let largest = rows * config.intermediate_size as f64 * size_of::<f32>() as f64;
    KEPT_BLOCKS * largest.min(LARGEST_KEPT_BLOCK)
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

/// Whether there is the memory to run one block, the head and the adapter on random weights.
pub(super) fn can_be_measured(
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
    let rows = pass_rows.min(ENOUGH_ROWS as f64);
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
