//! Cross-entropy and scores, whose sums stay on the device until somebody asks for them.

use super::compiler::{Kernel, Source};
use super::elementwise::{narrowed, widened};
use super::launch::{Grid, int, launch};
use super::memory::{Address, Output, Real, device_of};
use super::products::{Destination, Matrix, multiply};
use super::upload::upload;
use crate::Result;
use crate::ops::TokenScore;
use crate::ops::graph::Backward;
use crate::ops::linear_cross_entropy::gpu_chunk_rows;
use candle_core::{CudaDevice, DType, Tensor};

const NAME: &str = "cross-entropy";

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
    let chunk = gpu_chunk_rows(rows, classes);
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
    Ok(gradient.broadcast_mul(&upstream.to_dtype(gradient.dtype())?)?)
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
    let chunk = gpu_chunk_rows(rows, classes);
    let logits = Output::new(device, chunk * classes, DType::F32)?;
    let x = Address::of(NAME, "the hidden states", hidden, real.dtype())?;
    let w = Address::of(NAME, "the head", head, real.dtype())?;
    let scores = Scores::new(device, targets)?;
    for start in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - start);
        multiply(
            device,
            Destination::overwrite(logits.address(), Real::F32),
            Matrix::new(x.at(start * features), count, features),
            Matrix::new(w, classes, features).transposed(),
            real,
            1.0,
        )?;
        scores.put(start, logits.address(), count, classes)?;
    }
    scores.read()
}

/// The score of each target under `softmax(logits)`, contiguous.
pub(in crate::ops) fn score(logits: &Tensor, targets: &[u32]) -> Result<Vec<TokenScore>> {
    let device = device_of(NAME, logits)?;
    let (rows, classes) = logits.dims2()?;
    let logits = widened(NAME, "the logits", logits)?;
    let scores = Scores::new(device, targets)?;
    let values = Address::of(NAME, "the logits", &logits, DType::F32)?;
    scores.put(0, values, rows, classes)?;
    scores.read()
}

/// The scores of targets on the device: whoever reads them waits, once for all.
struct Scores<'a> {
    device: &'a CudaDevice,
    count: usize,
    targets: Tensor,
    log_probabilities: Output,
    best: Output,
}

impl<'a> Scores<'a> {
    fn new(device: &'a CudaDevice, targets: &[u32]) -> Result<Self> {
        let count = targets.len();
        Ok(Self {
            device,
            count,
            targets: upload(device, targets)?,
            log_probabilities: Output::new(device, count, DType::F32)?,
            best: Output::new(device, count, DType::U32)?,
        })
    }

    /// Scores `rows` targets from `start` on under these logits, f32 `(rows, classes)`.
    fn put(&self, start: usize, logits: Address<'_>, rows: usize, classes: usize) -> Result<()> {
        let targets = Address::of(NAME, "the targets", &self.targets, DType::U32)?;
        launch(
            self.device,
            Kernel::new(Source::CrossEntropy, Real::F32, "score"),
            grid(rows, classes),
            &[
                logits.into(),
                targets.at(start).into(),
                self.log_probabilities.address().at(start).into(),
                self.best.address().at(start).into(),
                int(classes)?,
            ],
        )
    }

    fn read(self) -> Result<Vec<TokenScore>> {
        let log_probabilities = self.log_probabilities.into_tensor(self.count);
        let best = self.best.into_tensor(self.count);
        Ok(log_probabilities
            .to_vec1::<f32>()?
            .into_iter()
            .zip(best.to_vec1::<u32>()?)
            .map(|(log_probability, greedy)| TokenScore {
                log_probability,
                greedy,
            })
            .collect())
    }
}
