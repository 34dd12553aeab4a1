//! What a training step costs on this machine: a base with random weights, random tokens, the real training loop.

use crate::adapters::hooks::{AdapterMethod, layer_of};
use crate::adapters::storage::{AdapterWeights, generator};
use crate::data::{DataReport, Dataset, Example, Order};
use crate::model::{ModelConfig, Placement, inventory, random};
use crate::ops::clock::{self, Kind};
use crate::ops::{self, FrozenWeight};
use crate::plan::{self, Load, StepShape, Work, work_of_step};
use crate::report::{format, memory};
use crate::train::{Budget, Event, Recompute, Schedule, TrainOptions, Trainer};
use crate::{Control, Error, Result};
use candle_core::{DType, Device, Tensor};
use rand::RngExt;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BenchOptions {
    /// The type that the base is stored in.
    pub dtype: DType,
    /// Examples of a step.
    pub batch: usize,
    /// Tokens of an example; all but the first have a target.
    pub length: usize,
    /// Keeping or recomputing activations.
    pub recompute: Recompute,
    /// Whether hidden states below the lowest trained block are kept from step to step, as in epochs after the first.
    pub later_epoch: bool,
    /// Steps that are counted.
    pub steps: usize,
    /// Steps before them that are not.
    pub warm_up: usize,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchReport {
    /// Weights of the base.
    pub base_parameters: u64,
    /// Weights that are trained.
    pub trained_parameters: u64,
    /// Tokens of the data in a second: the median step.
    pub tokens_per_second: f64,
    /// The slowest step.
    pub lowest_tokens_per_second: f64,
    /// The fastest step.
    pub highest_tokens_per_second: f64,
    /// Seconds of the median step.
    pub step_seconds: f64,
    /// Operations in a second of products alone and warm, on the CPU of the model's own sizes, on a GPU of large squares:
    /// the faster of the median before and the median after the steps.
    pub gemm_peak_flops: f64,
    /// Share of it that the median step reaches, what is computed twice left out.
    pub gemm_fraction: f64,
    /// Operations of a step.
    pub work: Work,
    /// Most resident memory of the process while it trains. On a GPU the most of its pool that is in use at a time, the base
    /// included, as `torch.cuda.max_memory_allocated` says it; where there is no pool, what is taken of the GPU.
    pub peak_memory_bytes: u64,
    /// Seconds of a step by kind of operation, the mean of the counted ones; on a GPU between the moments at which it comes to
    /// their beginnings and ends, of steps of their own.
    pub by_op: BTreeMap<&'static str, f64>,
    /// Loss of the first and of the last step.
    pub losses: (f64, f64),
}

/// Steps after the counted ones in which a GPU's time is told apart by operation, which takes some time itself.
const STEPS_BY_OP: usize = 2;

/// Trains `method` for a few steps on a base of shape `config`. `on_step` hears of each step, those of the warm-up too.
///
/// Fails before anything is made if there is not the memory for it, as far as the system says what is free.
pub fn bench(
    placement: &Placement,
    config: &ModelConfig,
    method: &dyn AdapterMethod,
    options: &BenchOptions,
    on_step: &mut dyn FnMut(usize),
) -> Result<BenchReport> {
    let rows = options.batch * options.length;
    let counted = options.warm_up + options.steps;
    let on_gpu = placement.device.is_cuda();
    let total = counted + if on_gpu { STEPS_BY_OP } else { 0 };
    let by_op_after = if on_gpu { counted } else { options.warm_up };
    let training = TrainOptions {
        budget: Budget::Steps(total),
        batch_size: options.batch,
        tokens_per_pass: usize::MAX,
        learning_rate: 1e-3,
        schedule: Schedule::Constant,
        recompute: options.recompute,
        activation_cache_bytes: if options.later_epoch { usize::MAX } else { 0 },
        ..TrainOptions::default()
    };
    refuse_beyond_memory(placement, config, method, options, &training)?;
    let taken_by_others = placement
        .device_memory()
        .map_or(0, |(free, all)| all.saturating_sub(free));
    let before = gemm_speed(placement, config, rows)?;
    let weights = AdapterWeights::fresh(0, &placement.device);
    let model = random(placement, config.clone(), options.dtype, method, weights)?;
    // What making the weights took is not what training takes.
    placement.reset_peak();
    let data = random_data(config, options);
    let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, &training)?;
    let (mut seconds, mut seconds_by_op, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    trainer.run(
        &data,
        &mut Order::as_stored(data.len()),
        None,
        None,
        &mut |event| {
            if let Event::Step(report) = event {
                let step = report.step as usize;
                let took = rows as f64 / report.tokens_per_second;
                if step == by_op_after {
                    clock::start();
                }
                if step > by_op_after {
                    seconds_by_op.push(took);
                }
                if step > options.warm_up && step <= counted {
                    seconds.push(took);
                }
                if step <= counted {
                    losses.push(report.loss);
                    on_step(step);
                }
            }
            Ok(Control::Continue)
        },
    )?;
    let by_op = clock::stop();
    let peak_memory = placement.peak_in_use().or_else(|| {
        let taken = placement.peak_memory()?;
        Some(taken.saturating_sub(taken_by_others))
    });
    let gemm_peak_flops = before.max(gemm_speed(placement, config, rows)?);

    let prompt_rows = model.decoder.soft_prompt().map_or(0, |prompt| prompt.len());
    let length = (options.length + prompt_rows) as f64;
    let work = work_of_step(
        config,
        method,
        &StepShape {
            rows: length * options.batch as f64,
            targets: (rows - options.batch) as f64,
            length,
            recompute: options.recompute,
            cached: options.later_epoch,
        },
    )?;
    let step_seconds = median(&mut seconds)?;
    let speed = |seconds: Option<&f64>| seconds.map_or(0.0, |seconds| rows as f64 / seconds);
    Ok(BenchReport {
        base_parameters: inventory(config)
            .iter()
            .map(|parameter| parameter.count() as u64)
            .sum(),
        trained_parameters: model.weights.parameter_count() as u64,
        tokens_per_second: rows as f64 / step_seconds,
        lowest_tokens_per_second: speed(seconds.last()),
        highest_tokens_per_second: speed(seconds.first()),
        step_seconds,
        gemm_peak_flops,
        gemm_fraction: work.useful() / step_seconds / gemm_peak_flops,
        work,
        peak_memory_bytes: peak_memory.unwrap_or(0),
        by_op: by_kind(by_op, &seconds_by_op),
        losses: (
            losses.first().copied().unwrap_or(f64::NAN),
            losses.last().copied().unwrap_or(f64::NAN),
        ),
    })
}

/// Refuses what there is not the memory for: the configuration may be a stranger's, and whatever it says would be made.
fn refuse_beyond_memory(
    placement: &Placement,
    config: &ModelConfig,
    method: &dyn AdapterMethod,
    options: &BenchOptions,
    training: &TrainOptions,
) -> Result<()> {
    let length = options.length as f64;
    let load = Load {
        tokens_per_example: length,
        most_tokens_per_example: length,
        target_share: (length - 1.0) / length,
        examples: options.batch,
        held_out_tokens: 0,
    };
    let run = plan::memory(placement, config, options.dtype, method, training, &load)?;
    // They run once more beside the model.
    let products = Products::of(placement, config, options.batch * options.length);
    let needed = run.peak().saturating_add(products.bytes());
    let Some((free, _)) = placement.device_memory() else {
        return refuse_more(needed, memory::available_bytes(), "the machine");
    };
    refuse_more(needed, Some(free), "the GPU")?;
    // The weights of a block, which are those of all, and what is not in blocks come from main memory.
    let made: u64 = inventory(config)
        .iter()
        .filter(|parameter| layer_of(&parameter.name).is_none_or(|layer| layer == 0))
        .map(|parameter| parameter.count() as u64)
        .sum();
    let made = made * options.dtype.size_in_bytes() as u64;
    refuse_more(made, memory::available_bytes(), "the machine")
}

fn refuse_more(needed: u64, free: Option<u64>, owner: &str) -> Result<()> {
    match free {
        Some(free) if needed > free => Err(Error::new(format!(
            "the bench needs about {}, {owner} has free {}",
            format::bytes(needed),
            format::bytes(free)
        ))
        .hint("name a smaller `--shape`, or ask for less by `--batch`, `--length`, `--dtype bf16` or `--recompute`")),
        _ => Ok(()),
    }
}

fn by_kind(
    spent: [(Kind, Duration); Kind::ALL.len()],
    seconds: &[f64],
) -> BTreeMap<&'static str, f64> {
    let steps = seconds.len() as f64;
    let mut by_op: BTreeMap<_, _> = spent
        .into_iter()
        .map(|(kind, spent)| (kind.name(), spent.as_secs_f64() / steps))
        .collect();
    let counted: f64 = by_op.values().sum();
    let mean = seconds.iter().sum::<f64>() / steps;
    by_op.insert("everything else", (mean - counted).max(0.0));
    by_op
}

/// Sorts, and returns the middle one.
fn median(values: &mut [f64]) -> Result<f64> {
    values.sort_by(f64::total_cmp);
    values
        .get(values.len() / 2)
        .copied()
        .ok_or_else(|| Error::usage("nothing was measured: at least one step must be counted"))
}

fn random_data(config: &ModelConfig, options: &BenchOptions) -> Dataset {
    let mut generator = generator(1, "bench");
    let vocabulary = config.vocabulary as u32;
    let example = |_| {
        let tokens = (0..options.length)
            .map(|_| generator.random_range(0..vocabulary))
            .collect();
        Example::new(tokens, vec![true; options.length])
    };
    Dataset {
        examples: (0..options.batch).map(example).collect(),
        report: DataReport::default(),
    }
}

/// How long the products are run: long enough for the clock frequency to settle.
const GEMM_TIME: Duration = Duration::from_millis(1200);

/// Rows and columns of a GPU's squares, at most: beyond, its speed grows no more.
const LARGEST_SQUARE: usize = 8192;
/// Products that a GPU is given before it is waited for.
const SQUARES: usize = 16;

/// The products whose speed is what a step is measured by.
struct Products {
    rows: usize,
    /// Inputs and outputs of each.
    sizes: Vec<(usize, usize)>,
    /// How often all of them run before the device is waited for.
    times: usize,
}

impl Products {
    /// On the CPU those of a block with `rows` rows. On a GPU those of squares, as large as may be.
    fn of(placement: &Placement, config: &ModelConfig, rows: usize) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        if placement.device.is_cuda() {
            let square = (4 * hidden).min(LARGEST_SQUARE);
            return Self {
                rows: square,
                sizes: vec![(square, square)],
                times: SQUARES,
            };
        }
        Self {
            rows,
            sizes: vec![(hidden, inner), (inner, hidden), (hidden, hidden)],
            times: 1,
        }
    }

    /// Bytes of factors and products in f32.
    fn bytes(&self) -> u64 {
        let rows = self.rows as f64;
        let floats = self.sizes.iter().map(|(inputs, outputs)| {
            let (inputs, outputs) = (*inputs as f64, *outputs as f64);
            rows * inputs + inputs * outputs + rows * outputs
        });
        (4.0 * floats.sum::<f64>()) as u64
    }
}

/// Operations in a second of frozen products alone, on all threads or on the GPU: the median round.
fn gemm_speed(placement: &Placement, config: &ModelConfig, rows: usize) -> Result<f64> {
    let Products { rows, sizes, times } = Products::of(placement, config, rows);
    let mut products = Vec::new();
    for (inputs, outputs) in &sizes {
        let x = factor(placement, rows, *inputs)?
            .to_device(&placement.device)?
            .to_dtype(placement.activations())?;
        let weight = FrozenWeight::from_tensor(&factor(placement, *outputs, *inputs)?)?;
        products.push((x, placement.place(&weight)?));
    }
    let once: usize = sizes.iter().map(|(i, o)| 2 * rows * i * o).sum();
    let (begin, mut rounds) = (Instant::now(), Vec::new());
    while rounds.len() < 3 || begin.elapsed() < GEMM_TIME {
        let started = Instant::now();
        for _ in 0..times {
            for (x, weight) in &products {
                ops::recycle(ops::linear(x, weight, None)?);
            }
        }
        placement.device.synchronize()?;
        rounds.push((times * once) as f64 / started.elapsed().as_secs_f64());
    }
    median(&mut rounds)
}

/// A factor of the products, f32 `(rows, columns)`: random for a GPU, which runs faster on numbers that are all the same
/// than it ever will on others.
fn factor(placement: &Placement, rows: usize, columns: usize) -> Result<Tensor> {
    let shape = (rows, columns);
    if placement.device.is_cpu() {
        return Ok(Tensor::ones(shape, DType::F32, &Device::Cpu)?);
    }
    let mut generator = generator(2, "products");
    let values: Vec<f32> = (0..rows * columns)
        .map(|_| generator.random_range(-1.0..1.0))
        .collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::lora::Lora;
    use crate::model::named_shape;

    #[test]
    fn a_small_shape_is_measured() -> Result<()> {
        let mut config = named_shape("stories15m")?;
        (config.layers, config.vocabulary) = (2, 100);
        config.sliding_windows.truncate(2);
        let options = BenchOptions {
            dtype: DType::BF16,
            batch: 2,
            length: 8,
            recompute: Recompute::Never,
            later_epoch: false,
            steps: 3,
            warm_up: 1,
        };
        let mut heard = 0;
        let report = bench(
            &Placement::default(),
            &config,
            &Lora::default(),
            &options,
            &mut |_| heard += 1,
        )?;
        assert_eq!(heard, 4);
        assert!(report.losses.1 < report.losses.0, "{:?}", report.losses);
        assert!(report.lowest_tokens_per_second <= report.tokens_per_second);
        assert!(report.tokens_per_second <= report.highest_tokens_per_second);
        assert!((0.0..1.5).contains(&report.gemm_fraction));
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_sizes() {
        let error = refuse_more(3 << 30, Some(1 << 30), "the GPU").expect_err("too much");
        assert_eq!(
            error.to_string(),
            "the bench needs about 3.00 GiB, the GPU has free 1.00 GiB"
        );
        assert!(
            error
                .hint_text()
                .is_some_and(|hint| hint.contains("--shape"))
        );
        for free in [Some(3 << 30), None] {
            assert!(refuse_more(3 << 30, free, "the machine").is_ok());
        }
    }
}
