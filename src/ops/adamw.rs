//! The AdamW step, in place, and the norm of a gradient.

use super::floats::{Floats, expect_shape};
use super::kernels::square_sum;
use super::vectorised::vectorised;
use crate::{Error, Result};
use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Tensor, Var};
use rayon::prelude::*;

/// Values that one task works on.
const TASK_VALUES: usize = 1 << 15;

/// The numbers of one AdamW step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Part of the weight, times the rate, that each step takes away.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
}

/// One AdamW step, in place, in the order of `torch.optim.AdamW`:
///
/// ```text
/// weight ·= 1 - rate · weight_decay
/// first  += (1 - beta1) · (gradient - first)
/// second  = beta2 · second + (1 - beta2) · gradient²
/// weight -= rate / (1 - beta1ᵗ) · first / (√second / √(1 - beta2ᵗ) + epsilon)
/// ```
///
/// All four are f32 of one shape; the moments begin as zeros.
pub fn adamw(
    weight: &Var,
    gradient: &Tensor,
    first: &Var,
    second: &Var,
    s: &AdamWStep,
) -> Result<()> {
    for (name, tensor) in [
        ("the gradient", gradient),
        ("the first moment", first),
        ("the second moment", second),
    ] {
        expect_shape(NAME, name, tensor, weight.dims(), "the shape of the weight")?;
    }
    if s.step == 0 {
        return Err(Error::new("`adamw` counts its steps from 1, this one is 0"));
    }
    let gradient = &gradient.detach().contiguous()?;
    first.inplace_op2(
        gradient,
        &First {
            rest: (1.0 - s.beta1) as f32,
        },
    )?;
    second.inplace_op2(
        gradient,
        &Second {
            beta: s.beta2 as f32,
            rest: (1.0 - s.beta2) as f32,
        },
    )?;
    let step = s.step as f64;
    let update = Update {
        keep: (1.0 - s.learning_rate * s.weight_decay) as f32,
        rate: (-s.learning_rate / (1.0 - s.beta1.powf(step))) as f32,
        correction: (1.0 - s.beta2.powf(step)).sqrt() as f32,
        epsilon: s.epsilon as f32,
    };
    weight.inplace_op3(first, second, &update)?;
    Ok(())
}

/// `Σ gᵢ²`, in f64 and in a fixed order.
pub fn squared_norm(gradient: &Tensor) -> Result<f64> {
    let gradient = gradient.detach().contiguous()?;
    let values = Floats::of("squared norm", "the gradient", &gradient)?;
    let partial: Vec<f64> = values.par_chunks(TASK_VALUES).map(square_sum).collect();
    Ok(partial.iter().sum())
}

const NAME: &str = "adamw";

struct First {
    rest: f32,
}

impl InplaceOp2 for First {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        first: &mut CpuStorage,
        first_layout: &Layout,
        gradient: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        let (first, gradient) = (writable(first, first_layout)?, readable(gradient, layout)?);
        first
            .par_chunks_mut(TASK_VALUES)
            .zip(gradient.par_chunks(TASK_VALUES))
            .for_each(|(first, gradient)| update_first(first, gradient, self.rest));
        Ok(())
    }
}

struct Second {
    beta: f32,
    rest: f32,
}

impl InplaceOp2 for Second {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        second: &mut CpuStorage,
        second_layout: &Layout,
        gradient: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        let (second, gradient) = (
            writable(second, second_layout)?,
            readable(gradient, layout)?,
        );
        second
            .par_chunks_mut(TASK_VALUES)
            .zip(gradient.par_chunks(TASK_VALUES))
            .for_each(|(second, gradient)| update_second(second, gradient, self.beta, self.rest));
        Ok(())
    }
}

struct Update {
    keep: f32,
    rate: f32,
    correction: f32,
    epsilon: f32,
}

impl InplaceOp3 for Update {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        weight: &mut CpuStorage,
        weight_layout: &Layout,
        first: &CpuStorage,
        first_layout: &Layout,
        second: &CpuStorage,
        second_layout: &Layout,
    ) -> candle_core::Result<()> {
        let weight = writable(weight, weight_layout)?;
        let (first, second) = (
            readable(first, first_layout)?,
            readable(second, second_layout)?,
        );
        let moments = first
            .par_chunks(TASK_VALUES)
            .zip(second.par_chunks(TASK_VALUES));
        weight
            .par_chunks_mut(TASK_VALUES)
            .zip(moments)
            .for_each(|(weight, (first, second))| {
                update_weight(
                    weight,
                    first,
                    second,
                    self.keep,
                    self.rate,
                    self.correction,
                    self.epsilon,
                );
            });
        Ok(())
    }
}

fn writable<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => Err(candle_core::Error::msg(
            "`adamw` needs its weight and moments contiguous in f32",
        )),
    }
}

fn readable<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => Err(candle_core::Error::msg(
            "`adamw` needs its gradient and moments contiguous in f32",
        )),
    }
}

vectorised! {
    fn update_first(first: &mut [f32], gradient: &[f32], rest: f32) {
        for (first, gradient) in first.iter_mut().zip(gradient) {
            // torch's `lerp`
            *first = if rest.abs() < 0.5 {
                rest.mul_add(gradient - *first, *first)
            } else {
                (rest - 1.0).mul_add(gradient - *first, *gradient)
            };
        }
    }

    fn update_second(second: &mut [f32], gradient: &[f32], beta: f32, rest: f32) {
        for (second, gradient) in second.iter_mut().zip(gradient) {
            *second = *second * beta + rest * gradient * gradient;
        }
    }

    fn update_weight(
        weight: &mut [f32],
        first: &[f32],
        second: &[f32],
        keep: f32,
        rate: f32,
        correction: f32,
        epsilon: f32,
    ) {
        for ((weight, first), second) in weight.iter_mut().zip(first).zip(second) {
            *weight = *weight * keep + rate * first / (second.sqrt() / correction + epsilon);
        }
    }
}
