//! Cross-entropy of given logits.

use super::floats::{Floats, matrix_shape};
use super::graph::{Backward, record};
use super::kernels::{self, exp, exp_sum_inline, maximum_inline};
use super::vectorised::vectorised;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Logits that one task works on.
const TASK_VALUES: usize = 1 << 15;

/// The sum over rows of `-log softmax(logits)[target]`.
///
/// `logits` is `(rows, classes)` with one target per row; the result is an f32 scalar, added up in f64. The gradient is
/// `softmax(logits) - onehot(target)`; the maximum and the sum of exponentials of each row are saved for it.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let (rows, classes) = matrix_shape(NAME, "the logits", logits)?;
    check_targets(NAME, targets, rows, classes)?;
    let logits = &logits.contiguous()?;
    let (loss, rows) = {
        let values = Floats::of(NAME, "the logits", logits)?;
        let sums: Vec<RowSum> = values
            .par_chunks(classes.max(1))
            .with_min_len(task_rows(classes))
            .map(row_sum)
            .collect();
        let losses = sums.iter().zip(targets).enumerate();
        let loss: f64 = losses
            .map(|(row, (sum, &target))| {
                -sum.log_probability(values[row * classes + target as usize])
            })
            .sum();
        (loss, sums)
    };
    let backward = CrossEntropy {
        targets: targets.into(),
        rows,
    };
    record([logits], vec![loss as f32], (), backward)
}

const NAME: &str = "cross-entropy";

struct CrossEntropy {
    targets: Box<[u32]>,
    rows: Vec<RowSum>,
}

impl Backward<1> for CrossEntropy {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        [logits]: [&Tensor; 1],
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        let upstream = upstream.to_dtype(DType::F32)?.to_scalar::<f32>()?;
        let classes = logits.dim(1)?;
        let mut gradient = vec![0f32; logits.elem_count()];
        let values = Floats::of(NAME, "the logits", logits)?;
        gradient
            .par_chunks_mut(classes.max(1))
            .with_min_len(task_rows(classes))
            .zip(values.par_chunks(classes.max(1)))
            .zip(self.rows.par_iter().zip(&self.targets))
            .for_each(|((gradient, logits), (sum, &target))| {
                logit_gradient(gradient, logits, *sum, upstream);
                gradient[target as usize] -= upstream;
            });
        Ok([Some(Tensor::from_vec(
            gradient,
            logits.shape(),
            &Device::Cpu,
        )?)])
    }
}

/// `Σ e^(x - maximum)` of the logits `x` of a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowSum {
    pub(super) maximum: f32,
    pub(super) sum: f64,
}

impl RowSum {
    /// The logarithm of the probability of the class with this logit.
    pub(super) fn log_probability(&self, logit: f32) -> f64 {
        f64::from(logit) - f64::from(self.maximum) - self.sum.ln()
    }
}

/// Rows of so many logits that one task works on.
pub(super) fn task_rows(classes: usize) -> usize {
    (TASK_VALUES / classes.max(1)).max(1)
}

/// Refuses targets that do not belong to the rows or the classes.
pub(super) fn check_targets(
    operation: &str,
    targets: &[u32],
    rows: usize,
    classes: usize,
) -> Result<()> {
    if targets.len() != rows {
        return Err(Error::new(format!(
            "`{operation}`: {rows} rows but {} targets",
            targets.len()
        )));
    }
    match targets
        .iter()
        .position(|&target| target as usize >= classes)
    {
        Some(row) => Err(Error::new(format!(
            "`{operation}`: target {} of row {row} is outside {classes} classes",
            targets[row]
        ))),
        None => Ok(()),
    }
}

/// Turns the logits of a row into the gradient of its loss and returns the loss.
pub(super) fn into_gradient(logits: &mut [f32], target: usize) -> f64 {
    let maximum = kernels::maximum(logits);
    let logit = logits[target];
    let sum = kernels::exp_sum(logits, 1.0, maximum);
    kernels::scale(logits, (1.0 / sum) as f32);
    logits[target] -= 1.0;
    -RowSum { maximum, sum }.log_probability(logit)
}

vectorised! {
    /// Maximum and sum of a row.
    pub(super) fn row_sum(logits: &[f32]) -> RowSum {
        let maximum = maximum_inline(logits);
        let mut sum = 0f64;
        let mut block = [0f32; 1024];
        for logits in logits.chunks(block.len()) {
            let block = &mut block[..logits.len()];
            block.copy_from_slice(logits);
            sum += exp_sum_inline(block, 1.0, maximum);
        }
        RowSum { maximum, sum }
    }

    fn logit_gradient(gradient: &mut [f32], logits: &[f32], sum: RowSum, upstream: f32) {
        let factor = (f64::from(upstream) / sum.sum) as f32;
        for (gradient, logit) in gradient.iter_mut().zip(logits) {
            *gradient = exp(logit - sum.maximum) * factor;
        }
    }
}
