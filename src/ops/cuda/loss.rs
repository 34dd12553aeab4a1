//! Cross-entropy and scores, whose sums stay on the device until somebody asks for them.

use super::compiler::{Kernel, Source};
use super::elementwise::{cast, narrowed, upload, widened};
use super::launch::{Grid, int, launch};
use super::memory::{Address, Output, Real, device_of};
use super::products::{Destination, Matrix, multiply};
use crate::Result;
use crate::ops::TokenScore;
use crate::ops::graph::Backward;
use candle_core::{CudaDevice, DType, Tensor};
use std::ops::Range;

const NAME: &str = "cross-entropy";

/// Logits that exist at one time, about: 256 MiB, and half of it again for their gradient in bf16.
const CHUNK_VALUES: usize = 64 << 20;
/// Rows of a chunk: fewer and the products are slow, more and only memory is lost.
const CHUNK_ROWS: Range<usize> = 256..8192;

/// Rows whose logits exist at one time when `rows` go through a head of `classes`.
fn chunk_rows(rows: usize, classes: usize) -> usize {
    let limit = (CHUNK_VALUES / classes.max(1)).clamp(CHUNK_ROWS.start, CHUNK_ROWS.end);
    rows.div_ceil(rows.div_ceil(limit).max(1)).max(1)
}

/// A block for each row, with as many threads as many classes keep busy.
fn grid(rows: usize, classes: usize) -> Grid {
    let threads = if classes < 8192 { 256 } else { 1024 };
    Grid::of((rows, 1, 1), threads)
}

/// The sum of `count` values in f64, rounded to f32 once.
fn total(device: &CudaDevice, values: &Output, count: usize) -> Result<Output> {
    sum_doubles(device, values, count)?.rounded_scalar()
}

/// The sum of `count` values in f64.
pub(super) fn sum_doubles(device: &CudaDevice, values: &Output, count: usize) -> Result<Output> {
    let sum = Output::new(device, 1, DType::F64)?;
    launch(
        device,
        Kernel::new(Source::Sums, Real::F32, "add_doubles"),
        Grid::blocks(1),
        &[values.address().into(), int(count)?, sum.address().into()],
    )?;
    Ok(sum)
}

/// The sum of the losses of contiguous `hidden` under a contiguous `head`, and the gradients of those that are `wanted`,
/// the head's in f32.
pub(in crate::ops) fn linear_cross_entropy(
    hidden: &Tensor,
    head: &Tensor,
    targets: &[u32],
    [wants_hidden, wants_head]: [bool; 2],
) -> Result<(Output, [Option<Tensor>; 2])> {
    let device = device_of(NAME, hidden)?;
    let real = Real::of(NAME, "the hidden states", hidden)?;
    let head = narrowed(NAME, "the head", head, real)?;
    let ((rows, features), classes) = (hidden.dims2()?, head.dim(0)?);
    let targets = upload(device, targets)?;
    let losses = Output::new(device, rows, DType::F64)?;
    let hidden_gradient = match wants_hidden {
        true => Some(Output::new(device, rows * features, real.dtype())?),
        false => None,
    };
    let head_gradient = match wants_head {
        true => Some(Output::zeros(device, classes * features, DType::F32)?),
        false => None,
    };
    let chunk = chunk_rows(rows, classes);
    let logits = Output::new(device, chunk * classes, DType::F32)?;
    let tracked = wants_hidden || wants_head;
    let errors = match (tracked, real) {
        (true, Real::Bf16) => Some(Output::new(device, chunk * classes, real.dtype())?),
        // In f32 the gradient takes the place of the logits.
        _ => None,
    };
    let errors = tracked.then(|| errors.as_ref().unwrap_or(&logits).address());

    let targets = Address::of(NAME, "the targets", &targets, DType::U32)?;
    let x = Address::of(NAME, "the hidden states", hidden, real.dtype())?;
    let w = Address::of(NAME, "the head", &head, real.dtype())?;
    let w = Matrix::new(w, classes, features);
    for start in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - start);
        let x = Matrix::new(x.at(start * features), count, features);
        multiply(
            device,
            Destination::overwrite(logits.address(), Real::F32),
            x,
            w.transposed(),
            real,
            1.0,
        )?;
        launch(
            device,
            Kernel::new(Source::CrossEntropy, real, "cross_entropy"),
            grid(count, classes),
            &[
                logits.address().into(),
                targets.at(start).into(),
                losses.address().at(start).into(),
                errors.into(),
                int(classes)?,
                1f32.into(),
            ],
        )?;
        let Some(errors) = errors else { continue };
        let errors = Matrix::new(errors, count, classes);
        if let Some(gradient) = &hidden_gradient {
            let destination = Destination::overwrite(gradient.address().at(start * features), real);
            multiply(device, destination, errors, w, real, 1.0)?;
        }
        if let Some(gradient) = &head_gradient {
            let destination = Destination::add(gradient.address(), Real::F32);
            multiply(device, destination, errors.transposed(), x, real, 1.0)?;
        }
    }
    let loss = total(device, &losses, rows)?;
    let gradients = [
        hidden_gradient.map(|gradient| gradient.into_tensor((rows, features))),
        head_gradient.map(|gradient| gradient.into_tensor((classes, features))),
    ];
    Ok((loss, gradients))
}

/// What the backward of [`cross_entropy`] needs besides the logits.
pub(in crate::ops) struct CrossEntropy {
    targets: Tensor,
}

impl CrossEntropy {
    /// The loss of each row, and the gradient for the logits, in their type, if it is wanted.
    fn run(&self, logits: &Tensor, wants_gradient: bool) -> Result<(Output, Option<Output>)> {
        let device = device_of(NAME, logits)?;
        let real = Real::of(NAME, "the logits", logits)?;
        let (rows, classes) = logits.dims2()?;
        let wide = widened(NAME, "the logits", logits)?;
        let losses = Output::new(device, rows, DType::F64)?;
        let gradient = match wants_gradient {
            true => Some(Output::new(device, rows * classes, real.dtype())?),
            false => None,
        };
        launch(
            device,
            Kernel::new(Source::CrossEntropy, real, "cross_entropy"),
            grid(rows, classes),
            &[
                Address::of(NAME, "the logits", &wide, DType::F32)?.into(),
                Address::of(NAME, "the targets", &self.targets, DType::U32)?.into(),
                losses.address().into(),
                gradient.as_ref().map(Output::address).into(),
                int(classes)?,
                1f32.into(),
            ],
        )?;
        Ok((losses, gradient))
    }
}

/// The sum of the losses of contiguous `logits`, and its backward.
pub(in crate::ops) fn cross_entropy(
    logits: &Tensor,
    targets: &[u32],
) -> Result<(Output, CrossEntropy)> {
    let device = device_of(NAME, logits)?;
    let backward = CrossEntropy {
        targets: upload(device, targets)?,
    };
    let (losses, _) = backward.run(logits, false)?;
    Ok((total(device, &losses, targets.len())?, backward))
}

impl Backward<1> for CrossEntropy {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        [logits]: [&Tensor; 1],
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        let (_, gradient) = self.run(logits, true)?;
        let gradient = gradient.map(|gradient| gradient.into_tensor(logits.shape()));
        Ok([gradient
            .map(|gradient| times(&gradient, upstream))
            .transpose()?])
    }
}

/// `gradient` times a scalar that is on the device as well, so that nobody waits for it.
pub(in crate::ops) fn times(gradient: &Tensor, upstream: &Tensor) -> Result<Tensor> {
    Ok(gradient.broadcast_mul(&cast(upstream, gradient.dtype())?)?)
}

/// The score of each target under a head on the device; `hidden` is contiguous.
pub(in crate::ops) fn score_hidden(
    hidden: &Tensor,
    head: &Tensor,
    targets: &[u32],
) -> Result<Vec<TokenScore>> {
    let device = device_of(NAME, hidden)?;
    let real = Real::of(NAME, "the hidden states", hidden)?;
    let ((rows, features), classes) = (hidden.dims2()?, head.dim(0)?);
    let chunk = chunk_rows(rows, classes);
    let x = Address::of(NAME, "the hidden states", hidden, real.dtype())?;
    let w = Address::of(NAME, "the head", head, real.dtype())?;
    let mut scores = Vec::with_capacity(rows);
    for start in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - start);
        let logits = Output::new(device, count * classes, DType::F32)?;
        multiply(
            device,
            Destination::overwrite(logits.address(), Real::F32),
            Matrix::new(x.at(start * features), count, features),
            Matrix::new(w, classes, features).transposed(),
            real,
            1.0,
        )?;
        let logits = logits.into_tensor((count, classes));
        scores.extend(score(&logits, &targets[start..start + count])?);
    }
    Ok(scores)
}

/// The score of each target under `softmax(logits)`, contiguous.
pub(in crate::ops) fn score(logits: &Tensor, targets: &[u32]) -> Result<Vec<TokenScore>> {
    let device = device_of(NAME, logits)?;
    let (rows, classes) = logits.dims2()?;
    let logits = widened(NAME, "the logits", logits)?;
    let targets = upload(device, targets)?;
    let log_probabilities = Output::new(device, rows, DType::F32)?;
    let best = Output::new(device, rows, DType::U32)?;
    launch(
        device,
        Kernel::new(Source::CrossEntropy, Real::F32, "score"),
        grid(rows, classes),
        &[
            Address::of(NAME, "the logits", &logits, DType::F32)?.into(),
            Address::of(NAME, "the targets", &targets, DType::U32)?.into(),
            log_probabilities.address().into(),
            best.address().into(),
            int(classes)?,
        ],
    )?;
    let log_probabilities = log_probabilities.into_tensor(rows).to_vec1::<f32>()?;
    let best = best.into_tensor(rows).to_vec1::<u32>()?;
    Ok(log_probabilities
        .into_iter()
        .zip(best)
        .map(|(log_probability, greedy)| TokenScore {
            log_probability,
            greedy,
        })
        .collect())
}
