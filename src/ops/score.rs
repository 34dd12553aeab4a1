//! Log-probabilities of given targets, without gradients.

use super::cross_entropy::{check_targets, row_sum, task_rows};
use super::floats::{Floats, matrix_shape};
use super::frozen_weight::FrozenWeight;
use super::kernels;
use super::linear::check_input;
use super::linear_cross_entropy::{Head, for_each_chunk};
use crate::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// How the model saw one target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// Natural logarithm of the target's probability.
    pub log_probability: f32,
    /// The most probable class; the first of equals.
    pub greedy: u32,
}

/// The score of each target under `softmax(hidden · headᵀ)`, in chunks of rows.
///
/// `hidden` is `(rows, features)`, `head` `(classes, features)`, one target per row.
pub fn score_targets(
    hidden: &Tensor,
    head: &FrozenWeight,
    targets: &[u32],
) -> Result<Vec<TokenScore>> {
    const NAME: &str = "score";
    let rows = check_input(NAME, hidden, head.rows(), head.columns())?;
    check_targets(NAME, targets, rows, head.rows())?;
    let hidden = hidden.detach().contiguous()?;
    let mut scores = Vec::with_capacity(rows);
    for_each_chunk(
        &Floats::of(NAME, "the hidden states", &hidden)?,
        rows,
        Head::Frozen(head),
        |range, logits| {
            scores.extend(score_rows(logits, &targets[range]));
        },
    );
    Ok(scores)
}

/// The score of each target under `softmax(logits)`: `logits` is `(rows, classes)`.
pub fn score_logits(logits: &Tensor, targets: &[u32]) -> Result<Vec<TokenScore>> {
    const NAME: &str = "score";
    let (rows, classes) = matrix_shape(NAME, "the logits", logits)?;
    check_targets(NAME, targets, rows, classes)?;
    let logits = logits.detach().contiguous()?;
    Ok(score_rows(
        &Floats::of(NAME, "the logits", &logits)?,
        targets,
    ))
}

fn score_rows(logits: &[f32], targets: &[u32]) -> Vec<TokenScore> {
    let classes = logits.len() / targets.len().max(1);
    logits
        .par_chunks(classes.max(1))
        .with_min_len(task_rows(classes))
        .zip(targets)
        .map(|(logits, &target)| {
            let sum = row_sum(logits);
            let largest = kernels::maximum(logits);
            TokenScore {
                log_probability: sum.log_probability(logits[target as usize]) as f32,
                greedy: logits
                    .iter()
                    .position(|&logit| logit == largest)
                    .unwrap_or_default() as u32,
            }
        })
        .collect()
}
