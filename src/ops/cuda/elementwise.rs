//! What is done value by value.

use super::compiler::{Kernel, Source};
use super::launch::{Argument, Grid, THREADS, int, launch, long};
use super::memory::{Address, Output, Real, device_of};
use super::upload::upload;
use crate::Result;
use crate::adapters::hooks::Dropout;
use crate::ops::Activation;
use candle_core::{CudaDevice, DType, Device, Tensor};
use std::sync::OnceLock;

/// `onto += x`, in the memory of `onto`.
pub(in crate::ops) fn add_onto(onto: Tensor, x: &Tensor) -> Result<Tensor> {
    const NAME: &str = "addition";
    let device = device_of(NAME, &onto)?;
    let real = Real::of(NAME, "the first", &onto)?;
    let x = x.contiguous()?;
    let n = onto.elem_count();
    launch(
        device,
        Kernel::new(Source::Elementwise, real, "add_onto"),
        Grid::stride(n),
        &[
            Address::of(NAME, "the first", &onto, real.dtype())?.into(),
            Address::of(NAME, "the second", &x, real.dtype())?.into(),
            long(n),
        ],
    )?;
    Ok(onto)
}

/// `y += bias` in every row.
pub(super) fn add_bias(
    device: &CudaDevice,
    y: Address<'_>,
    bias: Address<'_>,
    rows: usize,
    columns: usize,
    real: Real,
) -> Result<()> {
    launch(
        device,
        Kernel::new(Source::Elementwise, real, "add_bias"),
        Grid::stride(rows * columns),
        &[y.into(), bias.into(), int(rows)?, int(columns)?],
    )
}

/// A contiguous tensor in the type of the activations that it meets: itself, if it is that already. Without history.
pub(super) fn narrowed(operation: &str, name: &str, x: &Tensor, real: Real) -> Result<Tensor> {
    if x.dtype() == real.dtype() {
        return Ok(x.detach());
    }
    let n = x.elem_count();
    let device = device_of(operation, x)?;
    let output = Output::new(device, n, real.dtype())?;
    launch(
        device,
        Kernel::new(Source::Elementwise, real, "narrow_floats"),
        Grid::stride(n),
        &[
            Address::of(operation, name, x, DType::F32)?.into(),
            output.address().into(),
            long(n),
        ],
    )?;
    Ok(output.into_tensor(x.shape()))
}

/// A contiguous tensor in f32: itself, if it is that already. Without history.
pub(super) fn widened(operation: &str, name: &str, x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F32 {
        return Ok(x.detach());
    }
    let n = x.elem_count();
    let device = device_of(operation, x)?;
    let real = Real::of(operation, name, x)?;
    let output = Output::new(device, n, DType::F32)?;
    launch(
        device,
        Kernel::new(Source::Elementwise, real, "widen_reals"),
        Grid::stride(n),
        &[
            Address::of(operation, name, x, real.dtype())?.into(),
            output.address().into(),
            long(n),
        ],
    )?;
    Ok(output.into_tensor(x.shape()))
}

const DROPOUT: &str = "dropout";

/// Runs a kernel on the values of a matrix and the mask of `dropout` over it.
fn launch_masked(
    kernel: &'static str,
    x: &Tensor,
    [from, to]: [Address<'_>; 2],
    dropout: &Dropout,
) -> Result<()> {
    let (rows, columns) = x.dims2()?;
    launch(
        device_of(DROPOUT, x)?,
        Kernel::new(Source::Elementwise, Real::of(DROPOUT, "x", x)?, kernel),
        Grid::stride(rows * columns),
        &[
            from.into(),
            to.into(),
            int(rows)?,
            int(columns)?,
            dropout.stream().into(),
            dropout.threshold().into(),
            dropout.kept().into(),
            Argument::Word(dropout.first_row() as u64),
        ],
    )
}

/// `x`, `(rows, columns)`, with the mask of `dropout` over it.
pub(super) fn dropped(x: &Tensor, dropout: &Dropout) -> Result<Tensor> {
    let real = Real::of(DROPOUT, "x", x)?;
    let output = Output::new(device_of(DROPOUT, x)?, x.elem_count(), real.dtype())?;
    let from = Address::of(DROPOUT, "x", x, real.dtype())?;
    launch_masked("dropout", x, [from, output.address()], dropout)?;
    Ok(output.into_tensor(x.shape()))
}

/// `onto += x`, in the memory of `onto`, with the mask of `dropout` over `x`; both are `(rows, columns)`.
pub(super) fn add_dropped(onto: Tensor, x: &Tensor, dropout: &Dropout) -> Result<Tensor> {
    let real = Real::of(DROPOUT, "x", x)?;
    let sum = Address::of(DROPOUT, "the sum", &onto, real.dtype())?;
    let from = Address::of(DROPOUT, "x", x, real.dtype())?;
    launch_masked("add_dropped", x, [sum, from], dropout)?;
    Ok(onto)
}

/// Cosines and sines of a batch on the device, put there when they are first asked for, and kept.
#[derive(Default)]
pub(in crate::ops) struct Angles(OnceLock<(Tensor, Tensor)>);

impl Angles {
    pub(in crate::ops) fn on(
        &self,
        device: &CudaDevice,
        cos: &[f32],
        sin: &[f32],
    ) -> Result<(Tensor, Tensor)> {
        let target = Device::Cuda(device.clone());
        if let Some((cos, sin)) = self
            .0
            .get()
            .filter(|(cos, _)| cos.device().same_device(&target))
        {
            return Ok((cos.clone(), sin.clone()));
        }
        let both = (upload(device, cos)?, upload(device, sin)?);
        // Whoever was first has put the same numbers there.
        let _ = self.0.set(both.clone());
        Ok(both)
    }
}

/// `x`, `(rows, heads · head_dim)`, turned by the angles of each row, or back.
pub(in crate::ops) fn rope(
    x: &Tensor,
    cos: &[f32],
    sin: &[f32],
    angles: &Angles,
    head_dim: usize,
    backward: bool,
) -> Result<Output> {
    const NAME: &str = "rope";
    let device = device_of(NAME, x)?;
    let real = Real::of(NAME, "x", x)?;
    let (rows, features) = x.dims2()?;
    let (cos, sin) = angles.on(device, cos, sin)?;
    let output = Output::new(device, rows * features, real.dtype())?;
    launch(
        device,
        Kernel::new(Source::Rope, real, "rope"),
        // a warp for each row
        Grid::blocks(rows.div_ceil(THREADS / 32)),
        &[
            Address::of(NAME, "x", x, real.dtype())?.into(),
            Address::of(NAME, "the cosines", &cos, DType::F32)?.into(),
            Address::of(NAME, "the sines", &sin, DType::F32)?.into(),
            output.address().into(),
            int(rows)?,
            int(features / head_dim)?,
            int(head_dim)?,
            backward.into(),
        ],
    )?;
    Ok(output)
}

/// The number by which the kernels know an activation.
fn kind(a: Activation) -> Argument {
    Argument::Int(match a {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
    })
}

/// `activation(gate) · up`; both are contiguous and of one shape.
pub(in crate::ops) fn gated_activation(
    gate: &Tensor,
    up: &Tensor,
    a: Activation,
) -> Result<Output> {
    const NAME: &str = "gated activation";
    let device = device_of(NAME, gate)?;
    let real = Real::of(NAME, "the gate", gate)?;
    let n = gate.elem_count();
    let output = Output::new(device, n, real.dtype())?;
    launch(
        device,
        Kernel::new(Source::GatedActivation, real, "gated_activation"),
        Grid::stride(n),
        &[
            Address::of(NAME, "the gate", gate, real.dtype())?.into(),
            Address::of(NAME, "the second argument", up, real.dtype())?.into(),
            output.address().into(),
            long(n),
            kind(a),
        ],
    )?;
    Ok(output)
}

/// The gradients of gate and `up`; all are contiguous and of one shape.
pub(in crate::ops) fn gated_activation_gradients(
    gate: &Tensor,
    up: &Tensor,
    a: Activation,
    dy: &Tensor,
) -> Result<(Tensor, Tensor)> {
    const NAME: &str = "gated activation";
    let device = device_of(NAME, gate)?;
    let real = Real::of(NAME, "the gate", gate)?;
    let n = gate.elem_count();
    let (dgate, dup) = (
        Output::new(device, n, real.dtype())?,
        Output::new(device, n, real.dtype())?,
    );
    launch(
        device,
        Kernel::new(Source::GatedActivation, real, "gated_activation_gradients"),
        Grid::stride(n),
        &[
            Address::of(NAME, "the gate", gate, real.dtype())?.into(),
            Address::of(NAME, "the second argument", up, real.dtype())?.into(),
            Address::of(NAME, "the gradient", dy, real.dtype())?.into(),
            dgate.address().into(),
            dup.address().into(),
            long(n),
            kind(a),
        ],
    )?;
    Ok((
        dgate.into_tensor(gate.shape()),
        dup.into_tensor(gate.shape()),
    ))
}
