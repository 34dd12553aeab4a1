//! A decoder in the steps that training must tell apart, and what is the same for every decoder.

use super::backward::BlockBackward;
use super::kv_cache::{BlockCache, KvCache};
use super::linear::{HandedOut, Linear};
use super::placement::Placement;
use super::rotary::Positions;
use crate::adapters::hooks::{Mode, ModelShape, SoftPrompt};
use crate::data::{Batch, IGNORE};
use crate::ops::{self, RotaryTable, Segment};
use crate::{Error, Result};
use candle_core::Tensor;
use std::sync::Arc;

/// A frozen decoder with one method injected: `embed`, the blocks, `finish`, `head`.
///
/// Hidden states are flat, `(rows, hidden)`: the segments of a batch laid end to end. Their type is the placement's.
pub trait CausalLm: Send + Sync {
    /// Sizes that methods and reports ask for.
    fn shape(&self) -> &ModelShape;

    /// The embedded tokens.
    fn embed(&self, tokens: &[u32]) -> Result<Tensor>;

    /// Number of blocks.
    fn block_count(&self) -> usize;

    /// Block `index`, without history; `cache` holds the keys and values of earlier rows and takes the new ones.
    fn block(
        &self,
        index: usize,
        hidden: &Tensor,
        pass: &Pass,
        cache: Option<&mut BlockCache>,
    ) -> Result<Tensor>;

    /// Block `index` on `hidden`, which it keeps, together with what its backward pass needs.
    fn block_with_backward<'a>(
        &'a self,
        index: usize,
        hidden: Tensor,
        pass: &'a Pass,
    ) -> Result<(Tensor, Box<dyn BlockBackward + 'a>)>;

    /// Whether anything before the blocks is trained: the embedding, or rows in front of it.
    fn input_trains(&self) -> bool;

    /// Whether anything in block `index` is trained.
    fn block_trains(&self, index: usize) -> bool;

    /// The norm after the last block.
    fn finish(&self, hidden: &Tensor) -> Result<Tensor>;

    /// What turns a finished hidden state into logits.
    fn head(&self) -> &Linear;

    /// The learned rows before every segment, if the method has any.
    fn soft_prompt(&self) -> Option<&dyn SoftPrompt>;

    /// Rotations for the rows of these sequences, end to end, where it computes.
    fn rotary(&self, sequences: &[Positions]) -> Result<RotaryTable>;

    /// Whether rotations change when a sequence grows to `length`, so that cached keys would be stale.
    fn rotary_depends_on_length(&self, length: usize) -> bool;

    /// An empty cache for `capacity` rows, those of a soft prompt included.
    fn cache(&self, capacity: usize) -> Result<KvCache>;

    /// Where it lies, and the type that it computes in.
    fn placement(&self) -> &Placement;

    /// The frozen weights that methods asked for as tensors.
    fn handed_out(&self) -> &HandedOut;
}

/// What all blocks of one pass share.
pub struct Pass {
    /// Rotations of the pass's rows.
    pub rotary: RotaryTable,
    /// Which rows attend to which.
    pub segments: Arc<[Segment]>,
    /// Training or use.
    pub mode: Mode,
}

/// A batch on its way through the model: rows are laid out, the prompt's among them.
pub struct Flow {
    /// Embedded rows, prompt rows first in each segment.
    pub hidden: Tensor,
    /// Shared by the blocks.
    pub pass: Pass,
    prompt_rows: usize,
    boundaries: Vec<usize>,
}

/// Embeds a batch and puts the soft prompt at the head of each segment.
pub fn enter(model: &dyn CausalLm, batch: &Batch, mode: Mode) -> Result<Flow> {
    let embedded = model.embed(&batch.tokens)?;
    let prompt_rows = model.soft_prompt().map_or(0, |prompt| prompt.len());
    let hidden = match model.soft_prompt() {
        None => embedded,
        Some(prompt) => {
            let rows = prompt.rows()?;
            let activations = model.placement().activations();
            let mut pieces = Vec::new();
            for pair in batch.segments.windows(2) {
                // Rounded anew for each, so that their gradients are added up in f32.
                pieces.push(rows.to_dtype(activations)?);
                pieces.push(embedded.narrow(0, pair[0], pair[1] - pair[0])?);
            }
            Tensor::cat(&pieces, 0)?
        }
    };
    let boundaries: Vec<usize> = batch
        .segments
        .iter()
        .enumerate()
        .map(|(index, start)| start + index * prompt_rows)
        .collect();
    let pass = pass_over(model, &boundaries, mode)?;
    Ok(Flow {
        hidden,
        pass,
        prompt_rows,
        boundaries: batch.segments.clone(),
    })
}

impl Flow {
    /// The rows of `hidden` at which `batch` has a target, and those targets. Prompt rows fall away here.
    pub fn supervised(&self, hidden: &Tensor, batch: &Batch) -> Result<(Tensor, Vec<u32>)> {
        let mut rows = Vec::with_capacity(batch.target_tokens);
        let mut targets = Vec::with_capacity(batch.target_tokens);
        for (index, pair) in self.boundaries.windows(2).enumerate() {
            for row in pair[0]..pair[1] {
                if batch.targets[row] != IGNORE {
                    rows.push((row + (index + 1) * self.prompt_rows) as u32);
                    targets.push(batch.targets[row]);
                }
            }
        }
        if rows.is_empty() {
            return Err(Error::new("a pass without a single target token"));
        }
        if rows.len() == hidden.dim(0)? {
            return Ok((hidden.clone(), targets));
        }
        Ok((ops::select_rows(hidden, &rows)?, targets))
    }
}

/// `hidden` with zeros after it, a sequence of their own, so that there are `rows` rows, and `pass` over both.
pub fn filled_up(
    model: &dyn CausalLm,
    hidden: &Tensor,
    pass: &Pass,
    rows: usize,
) -> Result<(Tensor, Pass)> {
    let (own, width) = hidden.dims2()?;
    let zeros = Tensor::zeros((rows - own, width), hidden.dtype(), hidden.device())?;
    let starts = pass.segments.iter().map(|segment| segment.queries.start);
    let boundaries: Vec<usize> = starts.chain([own, rows]).collect();
    let filled = Tensor::cat(&[hidden, &zeros], 0)?;
    Ok((filled, pass_over(model, &boundaries, pass.mode)?))
}

/// Rotations and segments of sequences that start at `boundaries` (the last one is the end).
fn pass_over(model: &dyn CausalLm, boundaries: &[usize], mode: Mode) -> Result<Pass> {
    let (mut sequences, mut segments) = (Vec::new(), Vec::new());
    for pair in boundaries.windows(2) {
        let length = pair[1] - pair[0];
        // Each sequence by its own length: the result must not depend on which others share the pass.
        sequences.push(Positions {
            range: 0..length,
            length,
        });
        segments.push(Segment {
            queries: pair[0]..pair[1],
            keys: pair[0]..pair[1],
        });
    }
    Ok(Pass {
        rotary: model.rotary(&sequences)?,
        segments: segments.into(),
        mode,
    })
}

/// Puts `tokens`, which follow what `cache` already holds, there as well. The soft prompt goes in when it is empty.
pub fn take_in(model: &dyn CausalLm, tokens: &[u32], cache: &mut KvCache) -> Result<()> {
    on_its_thread(model, || hidden_after(model, tokens, cache).map(|_| ()))
}

/// The same, and the logits after the last of `tokens`: `(vocabulary)`, in the type of the activations.
pub fn next_logits(model: &dyn CausalLm, tokens: &[u32], cache: &mut KvCache) -> Result<Tensor> {
    on_its_thread(model, || {
        let hidden = hidden_after(model, tokens, cache)?;
        let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?.contiguous()?;
        let last = model.finish(&last)?.detach();
        let logits = model.head().forward(&last, Mode::Infer)?.detach();
        Ok(logits.flatten_all()?)
    })
}

/// On the CPU on a thread of the pool: each of the many small parallel loops would otherwise wake one and wait for it. A
/// GPU has no such loops, and weights are held by the thread that asked for it.
fn on_its_thread<T: Send>(
    model: &dyn CausalLm,
    compute: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    match model.placement().device.is_cuda() {
        true => compute(),
        false => rayon::scope(|_| compute()),
    }
}

/// The hidden states of `tokens` after the last block.
fn hidden_after(model: &dyn CausalLm, tokens: &[u32], cache: &mut KvCache) -> Result<Tensor> {
    let mut hidden = model.embed(tokens)?.detach();
    if let (0, Some(prompt)) = (cache.len(), model.soft_prompt()) {
        let rows = prompt.rows()?.detach().to_dtype(hidden.dtype())?;
        hidden = Tensor::cat(&[rows, hidden], 0)?;
    }
    let (past, new) = (cache.len(), hidden.dim(0)?);
    let pass = Pass {
        rotary: model.rotary(&[Positions {
            range: past..past + new,
            length: past + new,
        }])?,
        segments: [Segment {
            queries: 0..new,
            keys: 0..past + new,
        }]
        .into(),
        mode: Mode::Infer,
    };
    for index in 0..model.block_count() {
        hidden = model
            .block(index, &hidden, &pass, Some(cache.block(index)))?
            .detach();
    }
    cache.advance(new);
    Ok(hidden)
}
