//! Weights in NF4 on the device, widened when a product needs them.

use super::compiler::{Kernel, Source};
use super::launch::{Grid, launch, long};
use super::memory::{Address, Output, Real, device_of};
use super::upload::upload;
use crate::Result;
use crate::ops::nf4;
use candle_core::{CudaDevice, DType, Tensor};

/// A weight in NF4, and the type that it is widened to.
pub(in crate::ops) struct Nf4 {
    /// Eight codes in each u32.
    codes: Tensor,
    /// The magnitude of each block.
    largest: Tensor,
    real: Real,
}

impl Nf4 {
    /// Brings `values` to the device, to be widened to `dtype`, bf16 or else f32.
    pub(in crate::ops) fn upload(
        device: &CudaDevice,
        values: &nf4::Nf4,
        dtype: DType,
    ) -> Result<Self> {
        Ok(Self {
            codes: upload(device, values.codes())?,
            largest: upload(device, values.largest())?,
            real: match dtype {
                DType::BF16 => Real::Bf16,
                _ => Real::F32,
            },
        })
    }

    /// The type that it is widened to.
    pub(in crate::ops) fn dtype(&self) -> DType {
        self.real.dtype()
    }

    /// All values, in memory that goes back to the device's pool with the tensor: at one time one weight has any.
    pub(in crate::ops) fn widen(&self, (rows, columns): (usize, usize)) -> Result<Tensor> {
        const NAME: &str = "widening";
        let device = device_of(NAME, &self.codes)?;
        let n = rows * columns;
        let values = Output::new(device, n, self.real.dtype())?;
        launch(
            device,
            Kernel::new(Source::Nf4, self.real, "widen_nf4"),
            Grid::stride(n),
            &[
                Address::of(NAME, "the codes", &self.codes, DType::U32)?.into(),
                Address::of(NAME, "the magnitudes", &self.largest, DType::F32)?.into(),
                values.address().into(),
                long(n),
            ],
        )?;
        Ok(values.into_tensor((rows, columns)))
    }
}
