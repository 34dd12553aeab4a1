//! Products with weights, and sums over rows.

use super::compiler::{Kernel, Source};
use super::elementwise::{add_bias, add_dropped, dropped, narrowed};
use super::launch::{Grid, THREADS, int, launch};
use super::memory::{Address, Output, Real, device_of, sum};
use super::norm::{add_partials, rows_per_part};
use super::products::{Destination, Matrix, multiply};
use crate::adapters::hooks::LowRank;
use crate::ops::FrozenWeight;
use crate::{Error, Result};
use candle_core::{DType, Tensor, TensorId};
use std::cell::RefCell;
use std::collections::HashMap;

const FROZEN: &str = "linear";
const TRAINED: &str = "trained linear";
const LOW_RANK: &str = "low-rank linear";

/// A contiguous matrix of `real`, which `operation` knows as `name`.
fn matrix<'a>(operation: &str, name: &str, t: &'a Tensor, real: Real) -> Result<Matrix<'a>> {
    let (rows, columns) = t.dims2()?;
    let address = Address::of(operation, name, t, real.dtype())?;
    Ok(Matrix::new(address, rows, columns))
}

/// The values of a frozen weight, which must be on the device as `x` is; a quantised one is widened.
pub(super) fn on_device(operation: &str, w: &FrozenWeight) -> Result<Tensor> {
    w.device_values()?.ok_or_else(|| {
        Error::new(format!(
            "`{operation}` runs on the GPU but the weight is in main memory"
        ))
    })
}

/// `x weightᵀ + bias`: all contiguous, the weight of the type of `x`.
fn forward(operation: &str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Output> {
    let device = device_of(operation, x)?;
    let real = Real::of(operation, "x", x)?;
    let y = Output::new(device, x.dim(0)? * weight.dim(0)?, real.dtype())?;
    forward_into(
        operation,
        Destination::overwrite(y.address(), real),
        x,
        weight,
        bias,
    )?;
    Ok(y)
}

/// [`forward`] into memory that is there.
fn forward_into(
    operation: &str,
    y: Destination<'_>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<()> {
    let device = device_of(operation, x)?;
    let real = y.real;
    let (rows, outputs) = (x.dim(0)?, weight.dim(0)?);
    multiply(
        device,
        y,
        matrix(operation, "x", x, real)?,
        matrix(operation, "the weight", weight, real)?.transposed(),
        real,
        1.0,
    )?;
    match bias {
        Some(bias) => {
            let bias = Address::of(operation, "the bias", bias, DType::F32)?;
            add_bias(device, y.values, bias, rows, outputs, real)
        }
        None => Ok(()),
    }
}

/// `x wᵀ + bias` with a frozen weight; `x` and the bias are contiguous.
pub(in crate::ops) fn linear(
    x: &Tensor,
    w: &FrozenWeight,
    bias: Option<&Tensor>,
) -> Result<Output> {
    forward(FROZEN, x, &on_device(FROZEN, w)?, bias)
}

/// `x wᵀ + bias` with an f32 weight that is trained; all are contiguous.
pub(in crate::ops) fn trained_linear(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Output> {
    let real = Real::of(TRAINED, "x", x)?;
    let w = narrowed(TRAINED, "the weight", w, real)?;
    forward(TRAINED, x, &w, bias)
}

/// `dy w`, added to `onto` where there is one, for a frozen weight; `dy` is contiguous.
pub(in crate::ops) fn input_gradient(
    dy: &Tensor,
    w: &FrozenWeight,
    onto: Option<Tensor>,
) -> Result<Tensor> {
    backward(FROZEN, dy, &on_device(FROZEN, w)?, onto, 1.0)
}

/// As [`input_gradient`], for an f32 weight that is trained.
pub(in crate::ops) fn trained_input_gradient(
    dy: &Tensor,
    w: &Tensor,
    onto: Option<Tensor>,
) -> Result<Tensor> {
    let real = Real::of(TRAINED, "the gradient", dy)?;
    let w = narrowed(TRAINED, "the weight", w, real)?;
    backward(TRAINED, dy, &w, onto, 1.0)
}

/// `scale · dy weight`, added to `onto` where there is one; both are contiguous.
fn backward(
    operation: &str,
    dy: &Tensor,
    weight: &Tensor,
    onto: Option<Tensor>,
    scale: f32,
) -> Result<Tensor> {
    let device = device_of(operation, dy)?;
    let real = Real::of(operation, "the gradient", dy)?;
    let shape = [dy.dim(0)?, weight.dim(1)?];
    let (dx, add) = sum(operation, onto, device, &shape, real)?;
    let destination = Destination {
        values: Address::of(operation, "the sum of gradients", &dx, real.dtype())?,
        real,
        add,
    };
    multiply(
        device,
        destination,
        matrix(operation, "the gradient", dy, real)?,
        matrix(operation, "the weight", weight, real)?,
        real,
        scale,
    )?;
    Ok(dx)
}

/// `scale · leftᵀ right` in f32: a gradient of a trained matrix. Both are contiguous, with as many rows.
fn outer(operation: &str, left: &Tensor, right: &Tensor, scale: f32) -> Result<Tensor> {
    let device = device_of(operation, left)?;
    let real = Real::of(operation, "the gradient", left)?;
    let shape = (left.dim(1)?, right.dim(1)?);
    let output = Output::new(device, shape.0 * shape.1, DType::F32)?;
    multiply(
        device,
        Destination::overwrite(output.address(), Real::F32),
        matrix(operation, "the gradient", left, real)?.transposed(),
        matrix(operation, "x", right, real)?,
        real,
        scale,
    )?;
    Ok(output.into_tensor(shape))
}

/// `dyᵀ x`, f32; both are contiguous.
pub(in crate::ops) fn weight_gradient(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    outer(TRAINED, dy, x, 1.0)
}

/// The column sums of `dy`, f32; it is contiguous.
pub(in crate::ops) fn bias_gradient(dy: &Tensor) -> Result<Tensor> {
    let device = device_of(TRAINED, dy)?;
    let real = Real::of(TRAINED, "the gradient", dy)?;
    let (rows, columns) = dy.dims2()?;
    let rows_per_block = rows_per_part(rows);
    let parts = rows.div_ceil(rows_per_block);
    let partial = Output::new(device, parts * columns, DType::F32)?;
    launch(
        device,
        Kernel::new(Source::Sums, real, "column_sums"),
        Grid::of((columns.div_ceil(THREADS), parts, 1), THREADS),
        &[
            Address::of(TRAINED, "the gradient", dy, real.dtype())?.into(),
            partial.address().into(),
            int(rows)?,
            int(columns)?,
            int(rows_per_block)?,
        ],
    )?;
    Ok(add_partials(device, &partial, parts, columns)?.into_tensor(columns))
}

thread_local! {
    /// Trained factors in the type of the activations, while weights are held on this thread.
    static FACTORS: RefCell<Option<HashMap<TensorId, Tensor>>> = const { RefCell::new(None) };
}

/// Begins with no factor to keep all that are made, or ends to.
pub(in crate::ops) fn hold_weights(held: bool) {
    FACTORS.set(held.then(HashMap::new));
}

/// A factor of an update in the type of the activations.
fn factor(name: &str, weight: &Tensor, real: Real) -> Result<Tensor> {
    // What a method makes of trained weights is another tensor each time.
    if weight.dtype() == real.dtype() || !weight.is_variable() {
        return narrowed(LOW_RANK, name, weight, real);
    }
    let kept = FACTORS.with_borrow(|factors| factors.as_ref()?.get(&weight.id()).cloned());
    if let Some(kept) = kept {
        return Ok(kept);
    }
    let narrow = narrowed(LOW_RANK, name, weight, real)?;
    FACTORS.with_borrow_mut(|factors| {
        if let Some(factors) = factors {
            factors.insert(weight.id(), narrow.clone());
        }
    });
    Ok(narrow)
}

/// A low-rank update in the type of the activations.
struct Update {
    a: Tensor,
    b: Tensor,
    scale: f32,
}

impl Update {
    fn of(update: &LowRank<'_>, real: Real) -> Result<Self> {
        Ok(Self {
            a: factor("A", update.a, real)?,
            b: factor("B", update.b, real)?,
            scale: update.scale as f32,
        })
    }
}

/// What goes into the update: `x`, or what dropout leaves of it.
fn update_input(x: &Tensor, update: &LowRank<'_>) -> Result<Tensor> {
    match &update.dropout {
        Some(dropout) => dropped(x, dropout),
        None => Ok(x.detach()),
    }
}

/// `x wᵀ + bias + scale · (x Aᵀ) Bᵀ`, all contiguous. The update is never merged into the weight, where bf16 would lose
/// most of it.
pub(in crate::ops) fn low_rank_linear(
    x: &Tensor,
    w: &FrozenWeight,
    bias: Option<&Tensor>,
    update: &LowRank<'_>,
) -> Result<Output> {
    let device = device_of(LOW_RANK, x)?;
    let real = Real::of(LOW_RANK, "x", x)?;
    let weight = on_device(LOW_RANK, w)?;
    let rows = x.dim(0)?;
    let Update { a, b, scale } = Update::of(update, real)?;
    let input = update_input(x, update)?;
    let hidden = forward(LOW_RANK, &input, &a, None)?.into_tensor((rows, a.dim(0)?));
    let y = Output::new(device, rows * weight.dim(0)?, real.dtype())?;
    // The update comes first: added to a base that is rounded already, it would be lost below half of its last bit.
    multiply(
        device,
        Destination::overwrite(y.address(), real),
        matrix(LOW_RANK, "x Aᵀ", &hidden, real)?,
        matrix(LOW_RANK, "B", &b, real)?.transposed(),
        real,
        scale,
    )?;
    forward_into(
        LOW_RANK,
        Destination::add(y.address(), real),
        x,
        &weight,
        bias,
    )?;
    Ok(y)
}

/// The way back through [`low_rank_linear`], all arguments contiguous: what the gradients of the factors and that of the input
/// share.
pub(in crate::ops) struct LowRankBackward<'a> {
    x: &'a Tensor,
    dy: &'a Tensor,
    update: &'a LowRank<'a>,
    factors: Update,
    /// `dy B`, `(rows, rank)`.
    error: Tensor,
}

impl<'a> LowRankBackward<'a> {
    pub(in crate::ops) fn of(
        x: &'a Tensor,
        dy: &'a Tensor,
        update: &'a LowRank<'a>,
    ) -> Result<Self> {
        let factors = Update::of(update, Real::of(LOW_RANK, "the gradient", dy)?)?;
        let error = backward(LOW_RANK, dy, &factors.b, None, 1.0)?;
        Ok(Self {
            x,
            dy,
            update,
            factors,
            error,
        })
    }

    /// `dA` and `dB`.
    pub(in crate::ops) fn factor_gradients(&self) -> Result<(Tensor, Tensor)> {
        let Update { a, scale, .. } = &self.factors;
        let input = update_input(self.x, self.update)?;
        let shape = (self.x.dim(0)?, a.dim(0)?);
        let hidden = forward(LOW_RANK, &input, a, None)?.into_tensor(shape);
        let da = outer(LOW_RANK, &self.error, &input, *scale)?;
        Ok((da, outer(LOW_RANK, self.dy, &hidden, *scale)?))
    }

    /// `dx`, added to `onto` where there is one.
    pub(in crate::ops) fn input_gradient(
        &self,
        w: &FrozenWeight,
        onto: Option<Tensor>,
    ) -> Result<Tensor> {
        let Update { a, scale, .. } = &self.factors;
        let weight = on_device(LOW_RANK, w)?;
        match &self.update.dropout {
            // The update first, as in the forward.
            None => {
                let dx = backward(LOW_RANK, &self.error, a, onto, *scale)?;
                backward(LOW_RANK, self.dy, &weight, Some(dx), 1.0)
            }
            Some(dropout) => {
                let dx = backward(LOW_RANK, self.dy, &weight, onto, 1.0)?;
                let update = backward(LOW_RANK, &self.error, a, None, *scale)?;
                add_dropped(dx, &update, dropout)
            }
        }
    }
}
