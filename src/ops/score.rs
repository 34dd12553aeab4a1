//! Log-probabilities of given targets, without gradients.

use super::cross_entropy::{check_targets, row_sum, task_rows};
#[cfg(feature = "cuda")]
use super::cuda;
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
    #[cfg(feature = "cuda")]
    if cuda::takes(&hidden, head) {
        return cuda::score_hidden(&hidden, &cuda::head(NAME, head)?, targets);
    }
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
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        return cuda::score(&logits, targets);
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear_cross_entropy;
    use crate::ops::testing::{check_threads, frozen_weights, random};
    use candle_core::{D, Device};

    #[test]
    fn scores_are_the_loss_of_each_row() -> Result<()> {
        let (rows, features, classes) = (101, 33, 1009);
        let hidden = random(1, &[rows, features]);
        let targets: Vec<u32> = (0..rows as u32).collect();
        for head in frozen_weights(2, classes, features) {
            let scores = score_targets(&hidden, &head, &targets)?;
            let sum: f64 = scores
                .iter()
                .map(|score| f64::from(score.log_probability))
                .sum();
            let loss = linear_cross_entropy(&hidden, &head, &targets)?.to_scalar::<f32>()?;
            assert!(
                (sum + f64::from(loss)).abs() < 1e-6 * sum.abs(),
                "{sum} against {loss}"
            );
            let logits = hidden.matmul(&head.to_f32()?.t()?)?;
            let greedy: Vec<u32> = scores.iter().map(|score| score.greedy).collect();
            assert_eq!(greedy, logits.argmax(D::Minus1)?.to_vec1::<u32>()?);
            let given = score_logits(&logits, &targets)?;
            for (a, b) in scores.iter().zip(given) {
                assert_eq!(a.greedy, b.greedy);
                assert!((a.log_probability - b.log_probability).abs() < 2e-6);
            }
            check_threads(|| {
                let scores = score_targets(&hidden, &head, &targets).expect("scores");
                scores
                    .iter()
                    .map(|score| score.log_probability.to_bits())
                    .collect()
            });
        }
        Ok(())
    }

    #[test]
    fn the_first_of_equals_is_greedy() -> Result<()> {
        let logits = Tensor::new(&[[1f32, 3.0, 3.0]], &Device::Cpu)?;
        assert_eq!(score_logits(&logits, &[0])?[0].greedy, 1);
        Ok(())
    }
}
