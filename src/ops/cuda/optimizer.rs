//! The optimizer's step over all weights in one launch, and the norm of all gradients.

use super::compiler::{Kernel, Source};
use super::launch::{Grid, int, launch};
use super::loss::sum_doubles;
use super::memory::{Address, Output, Real, device_of};
use crate::Result;
use crate::ops::TrainedWeight;
use crate::ops::adamw::Factors;
use candle_core::{CudaDevice, DType, Device, Tensor};

const ADAMW: &str = "adamw";
const NORM: &str = "squared norm";

/// Values that one block works on.
const CHUNK_VALUES: usize = 1 << 15;
/// Words of a chunk in the table that the kernels read.
const CHUNK_WORDS: usize = 6;

/// Where the chunks are: the addresses of what belongs together, in the order in which the kernels expect it.
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

    fn upload(&self, device: &CudaDevice) -> Result<Tensor> {
        Tensor::from_slice(&self.0, self.0.len(), &Device::Cuda(device.clone()))
            .map_err(crate::Error::from)
    }
}

fn address<'a>(name: &str, tensor: &'a Tensor) -> Result<Option<Address<'a>>> {
    Address::of(ADAMW, name, tensor, DType::F32).map(Some)
}

/// One step of all weights, whose shapes have been checked. Gradients are contiguous.
pub(in crate::ops) fn adamw(weights: &[TrainedWeight<'_>], factors: &Factors) -> Result<()> {
    let Some(first) = weights.first() else {
        return Ok(());
    };
    let device = device_of(ADAMW, first.weight)?;
    let mut table = Table(Vec::new());
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
    if table.chunks() == 0 {
        return Ok(());
    }
    let words = table.upload(device)?;
    launch(
        device,
        Kernel::new(Source::AdamW, Real::F32, "adamw"),
        Grid::blocks(table.chunks()),
        &[
            Address::of(ADAMW, "the table", &words, DType::I64)?.into(),
            int(CHUNK_VALUES)?,
            factors.scale.into(),
            factors.keep.into(),
            factors.rate.into(),
            factors.beta1_rest.into(),
            factors.beta2.into(),
            factors.beta2_rest.into(),
            factors.correction.into(),
            factors.epsilon.into(),
        ],
    )
}

/// `Σ gᵢ²` over all of these, contiguous, as one f64 on the device.
pub(in crate::ops) fn squared_norm(gradients: &[Tensor]) -> Result<Option<Tensor>> {
    let Some(first) = gradients.first() else {
        return Ok(None);
    };
    let device = device_of(NORM, first)?;
    let mut table = Table(Vec::new());
    for gradient in gradients {
        let address = Address::of(NORM, "the gradient", gradient, DType::F32)?;
        table.push([None, Some(address), None, None], gradient.elem_count());
    }
    if table.chunks() == 0 {
        return Ok(None);
    }
    let words = table.upload(device)?;
    let partial = Output::new(device, table.chunks(), DType::F64)?;
    launch(
        device,
        Kernel::new(Source::Sums, Real::F32, "squared_norms"),
        Grid::blocks(table.chunks()),
        &[
            Address::of(NORM, "the table", &words, DType::I64)?.into(),
            partial.address().into(),
        ],
    )?;
    let sum = sum_doubles(device, &partial, table.chunks())?;
    Ok(Some(sum.into_tensor(1)))
}
