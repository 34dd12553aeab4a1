//! Cross-entropy of given logits.

#[cfg(feature = "cuda")]
use super::cuda;
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
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        let (loss, backward) = cuda::cross_entropy(logits, targets)?;
        return record([logits], loss, (), backward);
    }
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
        let maximum = maximum_inline::<V>(logits);
        let mut sum = 0f64;
        let mut block = [0f32; 1024];
        for logits in logits.chunks(block.len()) {
            let block = &mut block[..logits.len()];
            block.copy_from_slice(logits);
            sum += exp_sum_inline::<V>(block, 1.0, maximum);
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::ops::testing::{check, random, variable};
    use candle_core::D;

    /// `Σ (log Σ eˣ - x[target])`, with candle's own operations.
    pub(in crate::ops) fn slow(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
        let targets = Tensor::new(targets, &Device::Cpu)?.unsqueeze(1)?;
        let maximum = logits.detach().max_keepdim(D::Minus1)?;
        let shifted = logits.broadcast_sub(&maximum)?;
        let sums = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        Ok((sums - shifted.gather(&targets, D::Minus1)?)?.sum_all()?)
    }

    #[test]
    fn equals_its_composition() {
        for (rows, classes) in [(1, 1), (1, 2), (3, 1009), (401, 3), (17, 40_009)] {
            let targets: Vec<u32> = (0..rows as u32)
                .map(|row| row * 7919 % classes as u32)
                .collect();
            let logits = [variable(1, &[rows, classes])];
            let fast = |t: &[Tensor]| cross_entropy(&(&t[0] * 5.0)?, &targets);
            check(&logits, &fast, &|t| slow(&(&t[0] * 5.0)?, &targets), 1e-5);
        }
    }

    #[test]
    fn the_sum_is_exact_to_one_f32() -> Result<()> {
        let logits = (random(1, &[3, 50_021]) * 20.0)?;
        let exact: f64 = logits
            .to_vec2::<f32>()?
            .iter()
            .map(|row| {
                row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln() - f64::from(row[5])
            })
            .sum();
        let ours = f64::from(cross_entropy(&logits, &[5, 5, 5])?.to_scalar::<f32>()?);
        assert!((ours / exact - 1.0).abs() < 1e-7, "{ours} against {exact}");
        Ok(())
    }

    #[test]
    fn large_logits_and_impossible_classes_are_fine() -> Result<()> {
        let logits = Tensor::new(&[[1e30f32, -1e30, f32::NEG_INFINITY]], &Device::Cpu)?;
        assert_eq!(cross_entropy(&logits, &[0])?.to_scalar::<f32>()?, 0.0);
        assert_eq!(
            cross_entropy(&logits, &[2])?.to_scalar::<f32>()?,
            f32::INFINITY
        );
        Ok(())
    }

    #[test]
    fn nan_gives_nan() -> Result<()> {
        for place in 0..3 {
            let mut row = [1.0f32, 2.0, 3.0];
            row[place] = f32::NAN;
            let logits = Tensor::new(&[row], &Device::Cpu)?;
            assert!(cross_entropy(&logits, &[0])?.to_scalar::<f32>()?.is_nan());
        }
        Ok(())
    }

    #[test]
    fn targets_that_do_not_fit_are_an_error() {
        let message = |targets: &[u32]| {
            cross_entropy(&random(1, &[2, 3]), targets)
                .expect_err("refused")
                .to_string()
        };
        assert_eq!(message(&[0]), "`cross-entropy`: 2 rows but 1 targets");
        assert_eq!(
            message(&[0, 3]),
            "`cross-entropy`: target 3 of row 1 is outside 3 classes"
        );
    }
}
