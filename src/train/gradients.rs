//! Loss and gradients of one pass, with activations kept or computed again block by block.

use super::activation_cache::ActivationCache;
use super::options::Recompute;
use crate::Result;
use crate::adapters::hooks::Mode;
use crate::adapters::storage::AdapterWeights;
use crate::data::Batch;
use crate::model::backward::{BlockBackward, GradientSink, Gradients, refuse_frozen, source};
use crate::model::causal_lm::{CausalLm, Flow, Pass, enter, filled_up};
use crate::ops::clock::{Kind, timed};
use crate::ops::{self, seed_gradient};
use crate::task::causal_lm::loss_sum;
use candle_core::Tensor;

/// Adds the gradients of the loss summed over `batch`'s target tokens to `gradients`, and returns that sum.
///
/// Below the lowest trained weight there is no backward pass, and nothing is kept for one. Fails if a frozen weight got a
/// gradient: work and memory that a method wastes by mistake.
pub fn accumulate(
    model: &dyn CausalLm,
    weights: &AdapterWeights,
    batch: &Batch,
    mode: Mode,
    recompute: Recompute,
    gradients: &mut Gradients,
) -> Result<f64> {
    let loss = accumulate_unread(model, weights, batch, mode, recompute, gradients, None)?;
    Ok(f64::from(loss.to_scalar::<f32>()?))
}

/// As [`accumulate`], the loss as an f32 scalar: reading it waits for a GPU, which works on while the next pass is made
/// ready for it. What lies below the lowest trained block is taken from `cache`, which knows the batch's examples by these
/// numbers, or left there.
pub(super) fn accumulate_unread(
    model: &dyn CausalLm,
    weights: &AdapterWeights,
    batch: &Batch,
    mode: Mode,
    recompute: Recompute,
    gradients: &mut Gradients,
    cache: Option<(&mut ActivationCache, &[usize])>,
) -> Result<Tensor> {
    let sink = &mut GradientSink::new(weights, gradients);
    let flow = timed(Kind::Embedding, || enter(model, batch, mode))?;
    let trained_input = flow.hidden.track_op();
    let blocks = model.block_count();
    let lowest = lowest_trained_block(model);
    let mut hidden = flow.hidden.detach();
    if trained_input {
        // What made the embedded rows may need them for its own backward.
        hidden = hidden.copy()?;
    }
    hidden = match cache {
        None => below(model, hidden, &flow)?,
        Some((cache, examples)) => match cache.rows(examples, &hidden)? {
            Some(rows) => rows,
            None => {
                let hidden = below(model, hidden, &flow)?;
                cache.keep(examples, &batch.segments, hidden)?
            }
        },
    };
    let mut steps = Vec::with_capacity(blocks - lowest);
    for index in lowest..blocks {
        let (output, step) = match recompute {
            Recompute::Never => {
                let (output, backward) = model.block_with_backward(index, hidden, &flow.pass)?;
                (output, Step::Run(backward))
            }
            Recompute::Blocks => {
                let output = model.block(index, &hidden, &flow.pass, None)?;
                (output, Step::Input(hidden))
            }
        };
        steps.push(step);
        hidden = output;
    }

    let wanted = lowest < blocks || trained_input;
    let top = source(&hidden, wanted)?;
    if wanted {
        ops::recycle(hidden);
    }
    let (loss, mut gradient) = timed(Kind::Head, || -> Result<_> {
        let loss = loss_sum(model, &top, &flow, batch)?;
        let mut gradient = None;
        if loss.track_op() {
            let mut store = loss.backward()?;
            sink.collect(&mut store)?;
            refuse_frozen(&store, model.handed_out())?;
            gradient = store.remove(&top);
        }
        Ok((loss.detach(), gradient))
    })?;
    drop(top);

    for (index, step) in (lowest..blocks).zip(steps).rev() {
        let Some(arrived) = gradient.take() else {
            break;
        };
        let backward = match step {
            Step::Run(backward) => backward,
            Step::Input(input) => {
                let (output, backward) = model.block_with_backward(index, input, &flow.pass)?;
                ops::recycle(output);
                backward
            }
        };
        gradient = backward.run(arrived, index > lowest || trained_input, sink)?;
    }
    if let (true, Some(gradient)) = (trained_input, gradient) {
        let mut store = timed(Kind::Embedding, || -> Result<_> {
            Ok(seed_gradient(&flow.hidden, &gradient)?.backward()?)
        })?;
        sink.collect(&mut store)?;
    }
    Ok(loss)
}

/// Keeps in `cache`, which knows the batch's examples by these numbers, what [`accumulate_unread`] would.
pub(super) fn keep_below(
    model: &dyn CausalLm,
    batch: &Batch,
    mode: Mode,
    cache: &mut ActivationCache,
    examples: &[usize],
) -> Result<()> {
    let flow = enter(model, batch, mode)?;
    let hidden = below(model, flow.hidden.detach(), &flow)?;
    cache.keep(examples, &batch.segments, hidden)?;
    Ok(())
}

/// The hidden states that come to the lowest trained block, made of the embedded rows.
///
/// On the CPU the bits of an example's rows do not depend on the pass that it is in: a run has the same whether it keeps
/// them, and whether it was interrupted since it did.
fn below(model: &dyn CausalLm, hidden: Tensor, flow: &Flow) -> Result<Tensor> {
    let lowest = lowest_trained_block(model);
    let rows = hidden.dim(0)?;
    if lowest == 0 || rows >= ops::MANY_ROWS || !model.placement().device.is_cpu() {
        return through_blocks(model, lowest, hidden, &flow.pass);
    }
    let (filled, pass) = filled_up(model, &hidden, &flow.pass, ops::MANY_ROWS)?;
    let hidden = through_blocks(model, lowest, filled, &pass)?;
    Ok(hidden.narrow(0, 0, rows)?.copy()?)
}

/// What the blocks below `end` make of these rows.
fn through_blocks(
    model: &dyn CausalLm,
    end: usize,
    mut hidden: Tensor,
    pass: &Pass,
) -> Result<Tensor> {
    for index in 0..end {
        let output = model.block(index, &hidden, pass, None)?;
        ops::recycle(std::mem::replace(&mut hidden, output));
    }
    Ok(hidden)
}

/// The lowest block with something trained in it or below; the number of blocks if there is none.
pub(super) fn lowest_trained_block(model: &dyn CausalLm) -> usize {
    let blocks = model.block_count();
    match model.input_trains() {
        true => 0,
        false => (0..blocks)
            .find(|index| model.block_trains(*index))
            .unwrap_or(blocks),
    }
}

/// What is kept of a block for its backward pass.
enum Step<'a> {
    /// All that it needs.
    Run(Box<dyn BlockBackward + 'a>),
    /// Its input, to run it again.
    Input(Tensor),
}
