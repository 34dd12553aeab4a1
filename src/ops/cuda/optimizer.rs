//! The optimizer's step over all weights in one launch, after a verdict that is reached on the device, and the norm of
//! gradients.

use super::compiler::{Kernel, Source};
use super::launch::{Argument, Grid, double, int, launch};
use super::loss::sum_doubles;
use super::memory::{Address, Output, Real, device_of};
use super::upload::upload;
use crate::ops::adamw::Factors;
use crate::ops::{Fault, Reaction, StepLimits, TrainedWeight, Verdict};
use crate::{Error, Result};
use candle_core::{CudaDevice, DType, Tensor};

const ADAMW: &str = "adamw";
const NORM: &str = "squared norm";

/// Values that one block works on.
const CHUNK_VALUES: usize = 1 << 15;
/// Words of a chunk in the table that the kernels read.
const CHUNK_WORDS: usize = 6;

/// Where the chunks are: the addresses of what belongs together, in the order in which the kernels expect it.
#[derive(Default)]
struct Table(Vec<i64>);

impl Table {
    /// Cuts `length` values into chunks.
    fn push(&mut self, addresses: [Option<Address<'_>>; 4], length: usize) {
        for start in (0..length).step_by(CHUNK_VALUES) {
            let at = |address: Option<Address<'_>>| {
                address.map_or(0, |address| address.at(start).number()) as i64
            };
            self.0.extend(addresses.map(at));
            let values = CHUNK_VALUES.min(length - start);
            self.0.extend([values as i64, 0]);
        }
    }

    fn chunks(&self) -> usize {
        self.0.len() / CHUNK_WORDS
    }
}

fn address<'a>(name: &str, tensor: &'a Tensor) -> Result<Option<Address<'a>>> {
    Address::of(ADAMW, name, tensor, DType::F32).map(Some)
}

/// Judges a step and moves all weights, whose shapes have been checked, if it is taken. Gradients are contiguous. Reading
/// the verdict, when all of this is in the stream, is where a step waits for the device.
pub(in crate::ops) fn adamw(
    device: &CudaDevice,
    weights: &[TrainedWeight<'_>],
    losses: &[Tensor],
    limits: &StepLimits,
    factors: &Factors,
) -> Result<Verdict> {
    let mut table = Table::default();
    for weight in weights {
        table.push(
            [
                address("the weight", weight.weight)?,
                address("the gradient", weight.gradient)?,
                address("the first moment", weight.first)?,
                address("the second moment", weight.second)?,
            ],
            weight.weight.elem_count(),
        );
    }
    let chunks = table.chunks();
    let mut words = table.0;
    for loss in losses {
        words.push(Address::of(ADAMW, "the loss", loss, DType::F32)?.number() as i64);
    }
    let words = upload(device, &words)?;
    let table = Address::of(ADAMW, "the table", &words, DType::I64)?;
    let squares = squared_norms(device, table, chunks)?;
    let verdict = Output::new(device, VERDICT_NUMBERS, DType::F64)?;
    launch(
        device,
        Kernel::new(Source::AdamW, Real::F32, "judge"),
        Grid::of((1, 1, 1), 32),
        &[
            table.at(chunks * CHUNK_WORDS).into(),
            int(losses.len())?,
            squares.address().into(),
            double(limits.target_tokens as f64),
            double(limits.gradient_norm),
            // No loss is above it.
            double(limits.loss.unwrap_or(f64::INFINITY)),
            Argument::Int(limits.on_nonfinite as i32),
            Argument::Int(limits.on_spike as i32),
            verdict.address().into(),
        ],
    )?;
    launch(
        device,
        Kernel::new(Source::AdamW, Real::F32, "adamw"),
        Grid::blocks(chunks),
        &[
            table.into(),
            int(CHUNK_VALUES)?,
            verdict.address().into(),
            factors.keep.into(),
            factors.rate.into(),
            factors.beta1_rest.into(),
            factors.beta2.into(),
            factors.beta2_rest.into(),
            factors.correction.into(),
            factors.epsilon.into(),
        ],
    )?;
    read(&verdict, limits)
}

/// Numbers of a verdict on the device, all of them f64.
const VERDICT_NUMBERS: usize = 5;

/// Waits for the verdict.
fn read(verdict: &Output, limits: &StepLimits) -> Result<Verdict> {
    let numbers = verdict.read::<f64>(VERDICT_NUMBERS)?;
    let nonsense = || Error::new(format!("the GPU's verdict over a step is {numbers:?}"));
    let &[loss, gradient_norm, gradient_scale, fault, reaction] = numbers.as_slice() else {
        return Err(nonsense());
    };
    let spike = limits.loss.map(|bound| Fault::Spike { bound });
    let faults = [None, Some(Fault::NotFinite), spike];
    let reactions = [Reaction::Take, Reaction::LeaveOut, Reaction::EndRun];
    let (Some(fault), Some(reaction)) = (numbered(faults, fault), numbered(reactions, reaction))
    else {
        return Err(nonsense());
    };
    Ok(Verdict {
        loss,
        gradient_norm,
        gradient_scale: gradient_scale as f32,
        fault,
        reaction,
    })
}

/// The one that the kernel knows by this number: its place in the list.
fn numbered<T>(list: [T; 3], number: f64) -> Option<T> {
    let mut places = (0..3).map(f64::from).zip(list);
    places.find_map(|(place, value)| (place == number).then_some(value))
}

/// `Σ gᵢ²` over contiguous values, as an f64 scalar on the device.
pub(in crate::ops) fn squared_norm(gradient: &Tensor) -> Result<Tensor> {
    let device = device_of(NORM, gradient)?;
    let mut table = Table::default();
    let values = Address::of(NORM, "the gradient", gradient, DType::F32)?;
    table.push([None, Some(values), None, None], gradient.elem_count());
    let words = upload(device, &table.0)?;
    let words = Address::of(NORM, "the table", &words, DType::I64)?;
    Ok(squared_norms(device, words, table.chunks())?.into_tensor(()))
}

/// `Σ gᵢ²` over the gradients of all chunks, as one f64.
fn squared_norms(device: &CudaDevice, table: Address<'_>, chunks: usize) -> Result<Output> {
    let partial = Output::new(device, chunks, DType::F64)?;
    launch(
        device,
        Kernel::new(Source::Sums, Real::F32, "squared_norms"),
        Grid::blocks(chunks),
        &[table.into(), partial.address().into()],
    )?;
    sum_doubles(device, &partial, chunks)
}
