//! The AdamW step, in place, and the norm of a gradient.

use super::buffers::Lent;
#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::{Floats, expect_shape};
use super::kernels::square_sum;
use super::vectorised::vectorised;
use super::verdict::{Reaction, StepLimits, Verdict};
use crate::{Error, Result};
#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{Tensor, Var};
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

/// A weight with what moves it.
#[derive(Clone, Copy)]
pub struct TrainedWeight<'a> {
    /// The weight itself.
    pub weight: &'a Var,
    /// The gradient of the loss for it.
    pub gradient: &'a Tensor,
    /// The mean of its gradients so far.
    pub first: &'a Var,
    /// The mean of their squares.
    pub second: &'a Var,
}

impl<'a> TrainedWeight<'a> {
    /// Weight, first and second moment.
    fn lend(&self) -> Result<[Lent<'a>; 3]> {
        Ok([
            Lent::of(self.weight)?,
            Lent::of(self.first)?,
            Lent::of(self.second)?,
        ])
    }
}

/// One AdamW step of all these weights, in place, in the order of `torch.optim.AdamW`:
///
/// ```text
/// gradient ·= scale
/// weight ·= 1 - rate · weight_decay
/// first  += (1 - beta1) · (gradient - first)
/// second  = beta2 · second + (1 - beta2) · gradient²
/// weight -= rate / (1 - beta1ᵗ) · first / (√second / √(1 - beta2ᵗ) + epsilon)
/// ```
///
/// Before that the step is judged by the sum of its `losses`, f32 scalars, and the norm of all gradients, both summed in
/// f64: the verdict says by what the gradients are scaled. Nothing at all is changed by a step that is not taken.
///
/// All four tensors of a weight are f32 of one shape; the moments begin as zeros. The gradient itself stays as it is. On
/// a GPU the verdict is reached there, and read when the whole step has been launched.
pub fn adamw(
    weights: &[TrainedWeight<'_>],
    losses: &[Tensor],
    limits: &StepLimits,
    s: &AdamWStep,
) -> Result<Verdict> {
    let mut gradients = Vec::with_capacity(weights.len());
    for weight in weights {
        check(weight, s)?;
        gradients.push(weight.gradient.detach().contiguous()?);
    }
    let factors = Factors::of(s);
    #[cfg(feature = "cuda")]
    if let Some(Device::Cuda(device)) = weights.first().map(|first| first.weight.device()) {
        let weights: Vec<_> = weights
            .iter()
            .zip(&gradients)
            .map(|(weight, gradient)| TrainedWeight {
                gradient,
                ..*weight
            })
            .collect();
        return cuda::adamw(device, &weights, losses, limits, &factors);
    }
    let gradients = gradients
        .iter()
        .map(|gradient| Floats::of(NAME, "the gradient", gradient))
        .collect::<Result<Vec<_>>>()?;
    let (mut loss_sum, mut squares) = (0.0, 0.0);
    for loss in losses {
        loss_sum += f64::from(loss.to_scalar::<f32>()?);
    }
    for gradient in &gradients {
        squares += sum_of_squares(gradient);
    }
    let verdict = limits.judge(loss_sum, squares);
    if verdict.reaction != Reaction::Take {
        return Ok(verdict);
    }
    let mut lent = weights
        .iter()
        .map(TrainedWeight::lend)
        .collect::<Result<Vec<_>>>()?;
    let mut tasks = Vec::new();
    for ([weight, first, second], gradient) in lent.iter_mut().zip(&gradients) {
        let moments = first
            .values()
            .chunks_mut(TASK_VALUES)
            .zip(second.values().chunks_mut(TASK_VALUES));
        let weights = weight.values().chunks_mut(TASK_VALUES);
        tasks.extend(weights.zip(gradient.chunks(TASK_VALUES)).zip(moments));
    }
    let scale = verdict.gradient_scale;
    tasks
        .into_par_iter()
        .for_each(|((weight, gradient), (first, second))| {
            update(weight, gradient, scale, first, second, &factors);
        });
    Ok(verdict)
}

fn check(
    TrainedWeight {
        weight,
        gradient,
        first,
        second,
    }: &TrainedWeight<'_>,
    s: &AdamWStep,
) -> Result<()> {
    let (first, second) = (first.as_tensor(), second.as_tensor());
    for (name, tensor) in [
        ("the gradient", *gradient),
        ("the first moment", first),
        ("the second moment", second),
    ] {
        expect_shape(NAME, name, tensor, weight.dims(), "the shape of the weight")?;
    }
    if s.step == 0 {
        return Err(Error::new("`adamw` counts its steps from 1, this one is 0"));
    }
    Ok(())
}

/// The numbers of a step in the form in which the formula uses them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Factors {
    pub(super) keep: f32,
    pub(super) rate: f32,
    pub(super) beta1_rest: f32,
    pub(super) beta2: f32,
    pub(super) beta2_rest: f32,
    pub(super) correction: f32,
    pub(super) epsilon: f32,
}

impl Factors {
    fn of(s: &AdamWStep) -> Self {
        let step = s.step as f64;
        Self {
            keep: (1.0 - s.learning_rate * s.weight_decay) as f32,
            rate: (-s.learning_rate / (1.0 - s.beta1.powf(step))) as f32,
            beta1_rest: (1.0 - s.beta1) as f32,
            beta2: s.beta2 as f32,
            beta2_rest: (1.0 - s.beta2) as f32,
            correction: (1.0 - s.beta2.powf(step)).sqrt() as f32,
            epsilon: s.epsilon as f32,
        }
    }
}

/// `Σ gᵢ²`, in f64 and in a fixed order.
pub fn squared_norm(gradient: &Tensor) -> Result<f64> {
    let gradient = gradient.detach().contiguous()?;
    #[cfg(feature = "cuda")]
    if gradient.device().is_cuda() {
        return Ok(cuda::squared_norm(&gradient)?.to_scalar()?);
    }
    let values = Floats::of("squared norm", "the gradient", &gradient)?;
    Ok(sum_of_squares(&values))
}

fn sum_of_squares(values: &[f32]) -> f64 {
    let partial: Vec<f64> = values.par_chunks(TASK_VALUES).map(square_sum).collect();
    partial.iter().sum()
}

const NAME: &str = "adamw";

vectorised! {
    fn update(
        weight: &mut [f32],
        gradient: &[f32],
        scale: f32,
        first: &mut [f32],
        second: &mut [f32],
        by: &Factors,
    ) {
        let rest = by.beta1_rest;
        let moments = first.iter_mut().zip(second);
        for ((weight, gradient), (first, second)) in weight.iter_mut().zip(gradient).zip(moments) {
            let gradient = gradient * scale;
            // torch's `lerp`
            *first = if rest.abs() < 0.5 {
                rest.mul_add(gradient - *first, *first)
            } else {
                (rest - 1.0).mul_add(gradient - *first, gradient)
            };
            *second = *second * by.beta2 + by.beta2_rest * gradient * gradient;
            *weight = *weight * by.keep + by.rate * *first / (second.sqrt() / by.correction + by.epsilon);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Fault;
    use crate::ops::testing::{check_threads, random, variable};
    use candle_core::Device;

    const STEP: AdamWStep = AdamWStep {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 1,
    };
    const UNLIMITED: StepLimits = StepLimits {
        target_tokens: 3,
        gradient_norm: 0.0,
        loss: None,
        on_nonfinite: Reaction::EndRun,
        on_spike: Reaction::Take,
    };

    fn zeros(shape: &[usize]) -> Var {
        Var::zeros(shape, candle_core::DType::F32, &Device::Cpu).expect("a shape")
    }

    #[test]
    fn ten_steps_equal_the_formula_in_f64() -> Result<()> {
        let shape = [331, 211];
        let (weight, first, second) = (variable(1, &shape), zeros(&shape), zeros(&shape));
        let mut exact: Vec<(f64, f64, f64)> = weight
            .flatten_all()?
            .to_vec1::<f32>()?
            .iter()
            .map(|&w| (f64::from(w), 0.0, 0.0))
            .collect();
        for step in 1..=10 {
            let gradient = random(step, &shape);
            let s = AdamWStep { step, ..STEP };
            let trained = TrainedWeight {
                weight: &weight,
                gradient: &gradient,
                first: &first,
                second: &second,
            };
            let verdict = adamw(&[trained], &[], &UNLIMITED, &s)?;
            assert_eq!(verdict.gradient_scale, 1.0 / 3.0);
            let corrections = (
                1.0 - s.beta1.powi(step as i32),
                1.0 - s.beta2.powi(step as i32),
            );
            for ((w, m, v), g) in exact
                .iter_mut()
                .zip(gradient.flatten_all()?.to_vec1::<f32>()?)
            {
                let g = f64::from(g) / 3.0;
                *m = s.beta1 * *m + (1.0 - s.beta1) * g;
                *v = s.beta2 * *v + (1.0 - s.beta2) * g * g;
                *w -= s.learning_rate * s.weight_decay * *w;
                *w -= s.learning_rate * (*m / corrections.0)
                    / ((*v / corrections.1).sqrt() + s.epsilon);
            }
        }
        for (ours, (exact, ..)) in weight.flatten_all()?.to_vec1::<f32>()?.iter().zip(exact) {
            assert!(
                (f64::from(*ours) - exact).abs() < 5e-7,
                "{ours} against {exact}"
            );
        }
        Ok(())
    }

    #[test]
    fn several_weights_move_as_each_alone_and_stay_whole_after_an_error() -> Result<()> {
        let shapes: [&[usize]; 3] = [&[70_001], &[3, 5], &[1]];
        let run = |together: bool| -> Result<Vec<Vec<f32>>> {
            let weights = shapes.map(|shape| (variable(1, shape), zeros(shape), zeros(shape)));
            let gradients = shapes.map(|shape| random(2, shape));
            let all: Vec<_> = weights
                .iter()
                .zip(&gradients)
                .map(|((weight, first, second), gradient)| TrainedWeight {
                    weight,
                    gradient,
                    first,
                    second,
                })
                .collect();
            let step = |weights: &[TrainedWeight<'_>]| adamw(weights, &[], &UNLIMITED, &STEP);
            match together {
                true => step(&all).map(drop)?,
                false => all.iter().try_for_each(|one| step(&[*one]).map(drop))?,
            }
            let wrong = TrainedWeight {
                gradient: &gradients[1],
                ..all[0]
            };
            assert!(step(&[all[1], wrong]).is_err());
            let all = weights.iter().flat_map(|(a, b, c)| [a, b, c]);
            all.map(|var| Ok(var.flatten_all()?.to_vec1()?)).collect()
        };
        assert_eq!(run(true)?, run(false)?);
        check_threads(|| {
            let values = run(true).expect("a step").concat();
            values.into_iter().map(f32::to_bits).collect()
        });
        Ok(())
    }

    #[test]
    fn a_step_that_is_not_taken_leaves_no_trace() -> Result<()> {
        let variables = [variable(1, &[5]), zeros(&[5]), zeros(&[5])];
        let gradient = Tensor::new(&[1f32, 1.0, 1.0, 1.0, 0.0], &Device::Cpu)?;
        let trained = TrainedWeight {
            weight: &variables[0],
            gradient: &gradient,
            first: &variables[1],
            second: &variables[2],
        };
        let values = || -> Result<Vec<Vec<f32>>> {
            variables.iter().map(|var| Ok(var.to_vec1()?)).collect()
        };
        let limits = StepLimits {
            target_tokens: 2,
            loss: Some(3.0),
            on_spike: Reaction::LeaveOut,
            ..UNLIMITED
        };
        let step = |first: f32, second: f32| -> Result<Verdict> {
            let losses = [
                Tensor::new(first, &Device::Cpu)?,
                Tensor::new(second, &Device::Cpu)?,
            ];
            adamw(&[trained], &losses, &limits, &STEP)
        };
        let before = values()?;
        let spike = step(2.0, 4.5)?;
        assert_eq!((spike.loss, spike.gradient_norm), (3.25, 1.0));
        assert_eq!(spike.fault, Some(Fault::Spike { bound: 3.0 }));
        assert_eq!(spike.reaction, Reaction::LeaveOut);
        assert_eq!(step(2.0, f32::NAN)?.reaction, Reaction::EndRun);
        assert_eq!(values()?, before);
        assert_eq!(step(2.0, 4.0)?.reaction, Reaction::Take);
        assert_ne!(values()?, before);
        Ok(())
    }

    #[test]
    fn the_norm_is_summed_in_f64() -> Result<()> {
        let gradient = random(1, &[100_003]);
        let exact: f64 = gradient
            .to_vec1::<f32>()?
            .iter()
            .map(|&g| f64::from(g) * f64::from(g))
            .sum();
        assert!((squared_norm(&gradient)? / exact - 1.0).abs() < 1e-12);
        assert!(squared_norm(&Tensor::new(&[1.0f32, f32::NAN], &Device::Cpu)?)?.is_nan());
        check_threads(|| vec![squared_norm(&gradient).expect("a norm").to_bits() as u32]);
        Ok(())
    }

    #[test]
    fn wrong_shapes_and_steps_are_errors() {
        let (weight, moment) = (variable(1, &[2, 3]), zeros(&[2, 3]));
        let message = |gradient: &Tensor, s: &AdamWStep| {
            let trained = TrainedWeight {
                weight: &weight,
                gradient,
                first: &moment,
                second: &moment,
            };
            adamw(&[trained], &[], &UNLIMITED, s)
                .expect_err("refused")
                .to_string()
        };
        assert_eq!(
            message(&random(1, &[3, 2]), &STEP),
            "`adamw` needs the gradient of shape [2, 3] (the shape of the weight), its shape is [3, 2]"
        );
        assert_eq!(
            message(&random(1, &[2, 3]), &AdamWStep { step: 0, ..STEP }),
            "`adamw` counts its steps from 1, this one is 0"
        );
    }
}
