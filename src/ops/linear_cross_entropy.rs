//! Output head and loss as one operation: the logits of the whole batch never exist.

use super::compute_type::ComputeType;
use super::cross_entropy::{check_targets, into_gradient, row_sum};
#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::{Floats, matrix_shape};
use super::frozen_weight::FrozenWeight;
use super::gemm::{Destination, Matrix, MatrixMut, even_part, multiply_parallel};
use super::graph::{Backward, record};
use super::linear::check_input;
use super::{buffers, products};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Logits that exist at one time, about: 24 MiB.
const CHUNK_VALUES: usize = 6 << 20;
/// Rows of a chunk: fewer and the products are slow, more and only memory is lost.
const CHUNK_ROWS: Range<usize> = 48..512;
/// The same on a GPU: 256 MiB, and half of it again for their gradient in bf16.
const GPU_CHUNK_VALUES: usize = 64 << 20;
const GPU_CHUNK_ROWS: Range<usize> = 256..8192;

/// The sum over rows of `-log softmax(hidden · headᵀ)[target]`, the head frozen.
///
/// `hidden` is `(rows, features)`, `head` `(classes, features)`, one target per row; the result is an f32 scalar, added
/// up in f64. It works on chunks of rows. If `hidden` is tracked its gradient `(softmax - onehot) · head` is made in the
/// same pass and is all that is saved.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    head: &FrozenWeight,
    targets: &[u32],
) -> Result<Tensor> {
    const NAME: &str = "linear cross-entropy";
    let rows = check_input(NAME, hidden, head.rows(), head.columns())?;
    check_targets(NAME, targets, rows, head.rows())?;
    let hidden = &hidden.contiguous()?;
    #[cfg(feature = "cuda")]
    if cuda::takes(hidden, head) {
        let head = &cuda::head(NAME, head)?;
        let wanted = [hidden.track_op(), false];
        let (loss, [gradient, _]) = cuda::linear_cross_entropy(hidden, head, targets, wanted)?;
        return record([hidden], loss, (), KnownGradients([gradient]));
    }
    let values = Floats::of(NAME, "the hidden states", hidden)?;
    let mut gradient = hidden.track_op().then(|| vec![0f32; values.len()]);
    let mut losses = Vec::with_capacity(rows);
    for_each_chunk(&values, rows, Head::Frozen(head), |range, logits| {
        let features = head.columns();
        losses.extend(chunk_losses(
            logits,
            &targets[range.clone()],
            gradient.is_some(),
        ));
        if let Some(gradient) = &mut gradient {
            let gradient = &mut gradient[range.start * features..range.end * features];
            products::input_gradient(
                gradient,
                Destination::Overwrite,
                logits,
                range.len(),
                head,
                None,
            );
        }
    });
    drop(values);
    let loss: f64 = losses.iter().sum();
    let hidden_gradient = tensor(gradient, hidden)?;
    record(
        [hidden],
        vec![loss as f32],
        (),
        KnownGradients([hidden_gradient]),
    )
}

/// As [`linear_cross_entropy`], with a head that is trained: its gradient `(softmax - onehot)ᵀ · hidden` is made in the
/// same pass and saved too.
pub fn trained_linear_cross_entropy(
    hidden: &Tensor,
    head: &Tensor,
    targets: &[u32],
) -> Result<Tensor> {
    const NAME: &str = "trained linear cross-entropy";
    let (classes, features) = matrix_shape(NAME, "the head", head)?;
    let rows = check_input(NAME, hidden, classes, features)?;
    check_targets(NAME, targets, rows, classes)?;
    let (hidden, head) = (&hidden.contiguous()?, &head.contiguous()?);
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        let wanted = [hidden.track_op(), head.track_op()];
        let (loss, gradients) = cuda::linear_cross_entropy(hidden, head, targets, wanted)?;
        return record([hidden, head], loss, (), KnownGradients(gradients));
    }
    let x = Floats::of(NAME, "the hidden states", hidden)?;
    let w = Floats::of(NAME, "the head", head)?;
    let mut hidden_gradient = hidden.track_op().then(|| vec![0f32; x.len()]);
    let mut head_gradient = head.track_op().then(|| vec![0f32; w.len()]);
    let tracked = hidden_gradient.is_some() || head_gradient.is_some();
    let mut losses = Vec::with_capacity(rows);
    let w = Matrix::new(&w, classes, features);
    for_each_chunk(&x, rows, Head::Trained(w), |range, logits| {
        losses.extend(chunk_losses(logits, &targets[range.clone()], tracked));
        let errors = Matrix::new(logits, range.len(), classes);
        let part = range.start * features..range.end * features;
        if let Some(gradient) = &mut hidden_gradient {
            let gradient = MatrixMut::new(&mut gradient[part.clone()], range.len(), features);
            multiply_parallel(gradient, Destination::Overwrite, errors, w);
        }
        if let Some(gradient) = &mut head_gradient {
            let gradient = MatrixMut::new(gradient, classes, features);
            multiply_parallel(
                gradient,
                Destination::Add,
                errors.transposed(),
                Matrix::new(&x[part], range.len(), features),
            );
        }
    });
    let loss: f64 = losses.iter().sum();
    let gradients = [
        tensor(hidden_gradient, hidden)?,
        tensor(head_gradient, head)?,
    ];
    record(
        [hidden, head],
        vec![loss as f32],
        (),
        KnownGradients(gradients),
    )
}

/// Rows whose logits exist at one time when `rows` go through a head of `classes`.
fn chunk_rows(rows: usize, classes: usize) -> usize {
    let limit = (CHUNK_VALUES / classes.max(1)).clamp(CHUNK_ROWS.start, CHUNK_ROWS.end);
    even_part(rows, limit, 1)
}

/// The same on a GPU.
pub(super) fn gpu_chunk_rows(rows: usize, classes: usize) -> usize {
    let limit = GPU_CHUNK_VALUES / classes.max(1);
    even_part(
        rows,
        limit.clamp(GPU_CHUNK_ROWS.start, GPU_CHUNK_ROWS.end),
        1,
    )
}

/// Bytes of the logits that exist at one time, and of their gradient where it does not take their place, when `rows` go
/// through a head of `classes`.
pub(crate) fn head_chunk_bytes(
    rows: usize,
    classes: usize,
    on_gpu: bool,
    compute: ComputeType,
) -> usize {
    let rows = match on_gpu {
        true => gpu_chunk_rows(rows, classes),
        false => chunk_rows(rows, classes),
    };
    let gradient = match compute {
        ComputeType::Bf16 if on_gpu => size_of::<bf16>(),
        _ => 0,
    };
    rows * classes * (size_of::<f32>() + gradient)
}

/// The head of a model in either form.
#[derive(Clone, Copy)]
pub(super) enum Head<'a> {
    Frozen(&'a FrozenWeight),
    Trained(Matrix<'a>),
}

/// Calls `body` with the logits of one chunk of rows after the other, `(range.len(), classes)`.
pub(super) fn for_each_chunk(
    hidden: &[f32],
    rows: usize,
    head: Head<'_>,
    mut body: impl FnMut(Range<usize>, &mut [f32]),
) {
    if rows == 0 {
        return;
    }
    let classes = match head {
        Head::Frozen(weight) => weight.rows(),
        Head::Trained(weight) => weight.row_count(),
    };
    let features = hidden.len() / rows;
    let chunk = chunk_rows(rows, classes);
    let mut logits = buffers::take(chunk * classes);
    for start in (0..rows).step_by(chunk) {
        let range = start..(start + chunk).min(rows);
        let logits = &mut logits[..range.len() * classes];
        let x = &hidden[range.start * features..range.end * features];
        match head {
            Head::Frozen(weight) => products::forward(logits, x, range.len(), weight, None),
            Head::Trained(weight) => multiply_parallel(
                MatrixMut::new(logits, range.len(), classes),
                Destination::Overwrite,
                Matrix::new(x, range.len(), features),
                weight.transposed(),
            ),
        }
        body(range, logits);
    }
    buffers::give(logits);
}

/// The loss of each row; with `gradient` its logits become the gradient of that loss.
fn chunk_losses(logits: &mut [f32], targets: &[u32], gradient: bool) -> Vec<f64> {
    let classes = logits.len() / targets.len().max(1);
    logits
        .par_chunks_mut(classes.max(1))
        .with_min_len(super::cross_entropy::task_rows(classes))
        .zip(targets)
        .map(|(logits, &target)| match gradient {
            true => into_gradient(logits, target as usize),
            false => -row_sum(logits).log_probability(logits[target as usize]),
        })
        .collect()
}

fn tensor(gradient: Option<Vec<f32>>, argument: &Tensor) -> Result<Option<Tensor>> {
    Ok(match gradient {
        Some(values) => Some(Tensor::from_vec(values, argument.shape(), &Device::Cpu)?),
        None => None,
    })
}

/// Gradients made in the forward pass.
struct KnownGradients<const N: usize>([Option<Tensor>; N]);

impl<const N: usize> Backward<N> for KnownGradients<N> {
    const NAME: &'static str = "linear cross-entropy";

    fn gradients(
        &self,
        _: [&Tensor; N],
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        let mut gradients = self.0.clone();
        #[cfg(feature = "cuda")]
        if upstream.device().is_cuda() {
            for gradient in gradients.iter_mut().flatten() {
                *gradient = cuda::times(gradient, upstream)?;
            }
            return Ok(gradients);
        }
        let factor = upstream.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        if factor != 1.0 {
            for gradient in gradients.iter_mut().flatten() {
                *gradient = (&*gradient * factor)?;
            }
        }
        Ok(gradients)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cross_entropy::tests::slow;
    use crate::ops::testing::{check, frozen_weights, random, variable};

    const SHAPES: [(usize, usize, usize); 4] =
        [(1, 3, 2), (7, 33, 1009), (601, 5, 67), (3, 16, 30_011)];

    fn targets(rows: usize, classes: usize) -> Vec<u32> {
        (0..rows as u32)
            .map(|row| row * 7919 % classes as u32)
            .collect()
    }

    #[test]
    fn a_frozen_head_equals_its_composition() -> Result<()> {
        for (rows, features, classes) in SHAPES {
            let targets = targets(rows, classes);
            let hidden = [variable(1, &[rows, features])];
            for head in frozen_weights(2, classes, features) {
                let dense = head.to_f32()?;
                let slow = |t: &[Tensor]| slow(&t[0].matmul(&dense.t()?)?, &targets);
                check(
                    &hidden,
                    &|t| linear_cross_entropy(&t[0], &head, &targets),
                    &slow,
                    2e-5,
                );
            }
        }
        Ok(())
    }

    #[test]
    fn a_trained_head_equals_its_composition() {
        for (rows, features, classes) in SHAPES {
            let targets = targets(rows, classes);
            let arguments = [
                variable(1, &[rows, features]),
                variable(2, &[classes, features]),
            ];
            let slow = |t: &[Tensor]| slow(&t[0].matmul(&t[1].t()?)?, &targets);
            check(
                &arguments,
                &|t| trained_linear_cross_entropy(&t[0], &t[1], &targets),
                &slow,
                2e-5,
            );
        }
    }

    #[test]
    fn the_logits_of_a_chunk_are_counted_as_they_are_made() {
        let (few, many) = (1000, 100_000);
        let bytes = |rows, on_gpu, compute| head_chunk_bytes(rows, 128_256, on_gpu, compute);
        for compute in [ComputeType::F32, ComputeType::Bf16] {
            assert_eq!(bytes(many, false, compute), 49 * 128_256 * 4);
        }
        // A chunk is of at most 523 rows.
        assert_eq!(bytes(few, true, ComputeType::F32), 500 * 128_256 * 4);
        assert_eq!(bytes(few, true, ComputeType::Bf16), 500 * 128_256 * 6);
        let most = bytes(many, true, ComputeType::Bf16);
        assert!((380 << 20..=384 << 20).contains(&most), "{most}");
    }

    #[test]
    fn no_rows_lose_nothing() -> Result<()> {
        let head = &frozen_weights(2, 5, 3)[0];
        assert_eq!(
            linear_cross_entropy(&random(1, &[0, 3]), head, &[])?.to_scalar::<f32>()?,
            0.0
        );
        Ok(())
    }

    #[test]
    fn a_head_that_does_not_fit_is_an_error() {
        let head = &frozen_weights(2, 5, 3)[0];
        let error = linear_cross_entropy(&random(1, &[2, 4]), head, &[0, 0]).expect_err("refused");
        assert_eq!(
            error.to_string(),
            "`linear cross-entropy`: x is (2, 4) but the weight is (5, 3)"
        );
    }
}
