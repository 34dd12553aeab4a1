//! How long a step takes on this machine, found by running one block and the head on random weights.

use crate::adapters::hooks::{AdapterMethod, Mode};
use crate::adapters::storage::AdapterWeights;
use crate::data::{Batch, Example, collate};
use crate::model::backward::{GradientSink, Gradients, source};
use crate::model::causal_lm::{CausalLm, Flow, enter};
use crate::model::{ModelConfig, Placement, repeated};
use crate::ops;
use crate::task::causal_lm::loss_sum;
use crate::train::Recompute;
use crate::{Error, Result};
use candle_core::DType;
use std::time::{Duration, Instant};

/// Least number of times that each part is run; the median counts.
const RUNS: usize = 3;
/// Parts that take little are run more often, for so long.
const LONG_ENOUGH: Duration = Duration::from_millis(300);
/// Rows are enough to measure with: time grows in step with them from here on.
pub(super) const ENOUGH_ROWS: usize = 2048;
/// Seconds that clipping and AdamW take for a weight on the CPU: they are bound by memory.
const SECONDS_PER_TRAINED_WEIGHT: f64 = 4e-9;
/// The same on a GPU, whose memory is a hundred times as fast.
const GPU_SECONDS_PER_TRAINED_WEIGHT: f64 = 4e-11;

/// Seconds of the parts of a pass, for one row of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    input: f64,
    forward: f64,
    both_ways: f64,
    head: f64,
    /// Seconds of clipping and AdamW for one weight.
    trained_weight: f64,
}

impl Pace {
    /// Measures passes of examples of `length` tokens, `targets` of them with a target, at most `rows` rows at once.
    pub(super) fn measure(
        placement: &Placement,
        config: &ModelConfig,
        dtype: DType,
        method: &dyn AdapterMethod,
        rows: usize,
        length: usize,
        targets: usize,
    ) -> Result<Self> {
        let weights = AdapterWeights::fresh(0, &placement.device);
        let model = repeated(placement, config.clone(), dtype, method, weights)?;
        let decoder = model.decoder.as_ref();
        let batch = batch(config, rows.min(ENOUGH_ROWS), length, targets);
        let mode = Mode::Train {
            seed: 0,
            first_row: 0,
        };
        let flow = enter(decoder, &batch, mode)?;
        let rows = flow.hidden.dim(0)? as f64;
        let trained = (0..config.layers).rfind(|block| decoder.block_trains(*block));
        let mut probe = Probe {
            decoder,
            weights: &model.weights,
            flow: &flow,
            batch: &batch,
        };
        let last = config.layers - 1;
        let time = |run: &mut dyn FnMut() -> Result<()>| {
            median(&mut || {
                run()?;
                // A GPU only takes note of what it is to do.
                Ok(placement.device.synchronize()?)
            })
        };
        let forward = time(&mut || probe.forward(last))? / rows;
        Ok(Self {
            input: time(&mut || probe.input(mode))? / rows,
            forward,
            both_ways: time(&mut || probe.both_ways(trained.unwrap_or(last)))? / rows,
            head: time(&mut || probe.head())? / batch.target_tokens as f64,
            trained_weight: match placement.device.is_cuda() {
                true => GPU_SECONDS_PER_TRAINED_WEIGHT,
                false => SECONDS_PER_TRAINED_WEIGHT,
            },
        })
    }

    /// Seconds of a step of `rows` rows, `targets` of them with a target.
    pub(super) fn step(
        &self,
        rows: f64,
        targets: f64,
        blocks_below: usize,
        blocks_above: usize,
        recompute: Recompute,
        trained_weights: u64,
    ) -> f64 {
        let again = match recompute {
            Recompute::Never => 0.0,
            Recompute::Blocks => self.forward,
        };
        rows * (self.input
            + blocks_below as f64 * self.forward
            + blocks_above as f64 * (self.both_ways + again))
            + targets * self.head
            + trained_weights as f64 * self.trained_weight
    }
}

/// Whole examples of the wanted length, at least one.
fn batch(config: &ModelConfig, rows: usize, length: usize, targets: usize) -> Batch {
    let length = length.clamp(2, rows.max(2));
    let tokens: Vec<u32> = (0..length)
        .map(|position| (position * 7919 % config.vocabulary) as u32)
        .collect();
    let learn = (0..length).map(|position| position >= length - targets.clamp(1, length - 1));
    let example = Example::new(tokens, learn.collect());
    collate(&vec![&example; (rows / length).max(1)])
}

struct Probe<'a> {
    decoder: &'a dyn CausalLm,
    weights: &'a AdapterWeights,
    flow: &'a Flow,
    batch: &'a Batch,
}

impl Probe<'_> {
    /// Embedding, and the backward of what is trained there.
    fn input(&mut self, mode: Mode) -> Result<()> {
        let flow = enter(self.decoder, self.batch, mode)?;
        if flow.hidden.track_op() {
            ops::seed_gradient(&flow.hidden, &flow.hidden)?.backward()?;
        }
        Ok(())
    }

    fn forward(&mut self, block: usize) -> Result<()> {
        let output =
            self.decoder
                .block(block, &self.flow.hidden.detach(), &self.flow.pass, None)?;
        ops::recycle(output);
        Ok(())
    }

    fn both_ways(&mut self, block: usize) -> Result<()> {
        let mut gradients = Gradients::new();
        let mut sink = GradientSink::new(self.weights, &mut gradients);
        let hidden = self.flow.hidden.detach().copy()?;
        let (output, backward) =
            self.decoder
                .block_with_backward(block, hidden, &self.flow.pass)?;
        if let Some(gradient) = backward.run(output, true, &mut sink)? {
            ops::recycle(gradient);
        }
        Ok(())
    }

    fn head(&mut self) -> Result<()> {
        let top = source(&self.flow.hidden.detach(), true)?;
        loss_sum(self.decoder, &top, self.flow, self.batch)?.backward()?;
        Ok(())
    }
}

/// The median time of some runs in seconds, after one that does not count.
fn median(run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let (begin, mut seconds) = (Instant::now(), Vec::new());
    while seconds.len() < RUNS || begin.elapsed() < LONG_ENOUGH {
        let started = Instant::now();
        run()?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    seconds
        .get(seconds.len() / 2)
        .copied()
        .ok_or_else(|| Error::new("nothing was measured"))
}
