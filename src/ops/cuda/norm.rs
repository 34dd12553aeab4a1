//! Normalisation over the last dimension, and its gradients.

use super::compiler::{Kernel, Source};
use super::launch::{Grid, THREADS, int, launch};
use super::memory::{Address, Output, Real, device_of, sum};
use crate::Result;
use candle_core::{CudaDevice, DType, Tensor};

const RMS: &str = "rms norm";
const LAYER: &str = "layer norm";

/// Partial sums over rows, about: more are not faster, fewer leave parts of the device idle.
const PARTS: usize = 256;
/// Rows of a partial sum, at least.
const FEWEST_ROWS: usize = 16;
/// Threads of a warp.
const WARP: usize = 32;
/// Rows that share a block where a warp is enough for each, as for the heads of queries and keys.
const NARROW_ROWS: usize = 8;

/// Rows of one partial sum of a sum over `rows`.
pub(super) fn rows_per_part(rows: usize) -> usize {
    rows.div_ceil(PARTS).max(FEWEST_ROWS)
}

/// `(parts, columns)` partial sums, added up in order.
pub(super) fn add_partials(
    device: &CudaDevice,
    partial: &Output,
    parts: usize,
    columns: usize,
) -> Result<Output> {
    let sums = Output::new(device, columns, DType::F32)?;
    launch(
        device,
        Kernel::new(Source::Sums, Real::F32, "add_partials"),
        Grid::blocks(columns.div_ceil(THREADS)),
        &[
            partial.address().into(),
            sums.address().into(),
            int(parts)?,
            int(columns)?,
        ],
    )?;
    Ok(sums)
}

/// `x` as rows of `features`.
struct Rows<'a> {
    device: &'a CudaDevice,
    real: Real,
    x: Address<'a>,
    count: usize,
    features: usize,
}

impl<'a> Rows<'a> {
    fn of(name: &str, x: &'a Tensor, features: usize) -> Result<Self> {
        let real = Real::of(name, "x", x)?;
        Ok(Self {
            device: device_of(name, x)?,
            real,
            x: Address::of(name, "x", x, real.dtype())?,
            count: x.elem_count() / features,
            features,
        })
    }

    /// Threads that hold a row in their registers.
    fn threads(&self) -> usize {
        (self.features / 16)
            .next_multiple_of(WARP)
            .clamp(WARP, 16 * WARP)
    }

    /// A grid in which each row has its threads.
    fn row_grid(&self) -> Grid {
        let threads = self.threads();
        let rows = if threads == WARP { NARROW_ROWS } else { 1 };
        Grid::of((self.count.div_ceil(rows), 1, 1), threads).rows(rows)
    }

    fn kernel(&self, name: &'static str) -> Kernel {
        Kernel::new(Source::Norm, self.real, name)
    }

    /// Room for a value for each of `x`.
    fn output(&self) -> Result<Output> {
        Output::new(self.device, self.count * self.features, self.real.dtype())
    }

    /// `dx`, added to `onto` where there is one.
    fn input_gradient(
        &self,
        (name, kernel): (&str, &'static str),
        weight: &Tensor,
        dy: &Tensor,
        epsilon: f32,
        onto: Option<Tensor>,
        shape: &[usize],
    ) -> Result<Tensor> {
        let (dx, add) = sum(name, onto, self.device, shape, self.real)?;
        launch(
            self.device,
            self.kernel(kernel),
            self.row_grid(),
            &[
                self.x.into(),
                Address::of(name, "the weight", weight, DType::F32)?.into(),
                Address::of(name, "the gradient", dy, self.real.dtype())?.into(),
                Address::of(name, "the sum of gradients", &dx, self.real.dtype())?.into(),
                int(self.count)?,
                int(self.features)?,
                epsilon.into(),
                add.into(),
            ],
        )?;
        Ok(dx)
    }

    /// The gradient of the weight, f32.
    fn weight_gradient(
        &self,
        (name, kernel): (&str, &'static str),
        dy: &Tensor,
        epsilon: f32,
    ) -> Result<Tensor> {
        // Each block goes through its rows one by one.
        let rows_per_block = rows_per_part(self.count);
        let parts = self.count.div_ceil(rows_per_block);
        let partial = Output::new(self.device, parts * self.features, DType::F32)?;
        launch(
            self.device,
            self.kernel(kernel),
            Grid::of((parts, 1, 1), self.threads()),
            &[
                self.x.into(),
                Address::of(name, "the gradient", dy, self.real.dtype())?.into(),
                partial.address().into(),
                int(self.count)?,
                int(self.features)?,
                epsilon.into(),
                int(rows_per_block)?,
            ],
        )?;
        let sums = add_partials(self.device, &partial, parts, self.features)?;
        Ok(sums.into_tensor(self.features))
    }
}

/// `x · r · weight`, all contiguous.
pub(in crate::ops) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Output> {
    let rows = Rows::of(RMS, x, weight.elem_count())?;
    let y = rows.output()?;
    launch(
        rows.device,
        rows.kernel("rms_norm"),
        rows.row_grid(),
        &[
            rows.x.into(),
            Address::of(RMS, "the weight", weight, DType::F32)?.into(),
            y.address().into(),
            int(rows.count)?,
            int(rows.features)?,
            epsilon.into(),
        ],
    )?;
    Ok(y)
}

pub(in crate::ops) fn rms_norm_input_gradient(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    dy: &Tensor,
    onto: Option<Tensor>,
) -> Result<Tensor> {
    Rows::of(RMS, x, weight.elem_count())?.input_gradient(
        (RMS, "rms_norm_input_gradient"),
        weight,
        dy,
        epsilon,
        onto,
        x.dims(),
    )
}

pub(in crate::ops) fn rms_norm_weight_gradient(
    x: &Tensor,
    features: usize,
    epsilon: f32,
    dy: &Tensor,
) -> Result<Tensor> {
    Rows::of(RMS, x, features)?.weight_gradient((RMS, "rms_norm_weight_gradient"), dy, epsilon)
}

/// `(x - mean) · r · weight + bias`, all contiguous.
pub(in crate::ops) fn layer_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    epsilon: f32,
) -> Result<Output> {
    let rows = Rows::of(LAYER, x, weight.elem_count())?;
    let y = rows.output()?;
    launch(
        rows.device,
        rows.kernel("layer_norm"),
        rows.row_grid(),
        &[
            rows.x.into(),
            Address::of(LAYER, "the weight", weight, DType::F32)?.into(),
            Address::of_optional(LAYER, "the bias", bias, DType::F32)?.into(),
            y.address().into(),
            int(rows.count)?,
            int(rows.features)?,
            epsilon.into(),
        ],
    )?;
    Ok(y)
}

pub(in crate::ops) fn layer_norm_input_gradient(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    dy: &Tensor,
) -> Result<Tensor> {
    Rows::of(LAYER, x, weight.elem_count())?.input_gradient(
        (LAYER, "layer_norm_input_gradient"),
        weight,
        dy,
        epsilon,
        None,
        x.dims(),
    )
}

/// The gradient of the weight alone; the bias's is a column sum.
pub(in crate::ops) fn layer_norm_weight_gradient(
    x: &Tensor,
    features: usize,
    epsilon: f32,
    dy: &Tensor,
) -> Result<Tensor> {
    Rows::of(LAYER, x, features)?.weight_gradient(
        (LAYER, "layer_norm_weight_gradient"),
        dy,
        epsilon,
    )
}
