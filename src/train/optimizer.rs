//! AdamW over the trained weights, with a state that can be saved (Loshchilov & Hutter 2017, <https://arxiv.org/abs/1711.05101>).

use super::checkpoint::expect_tensor;
use super::options::TrainOptions;
use crate::adapters::storage::AdapterWeights;
use crate::model::backward::Gradients;
use crate::ops::{self, AdamWStep, Reaction, StepLimits, TrainedWeight, Verdict};
use crate::{Error, Result};
use candle_core::{DType, Tensor, Var};
use std::collections::BTreeMap;

/// Mean and mean square of every weight's gradient, f32, and the number of steps taken.
pub struct AdamW {
    moments: BTreeMap<String, Moments>,
    steps: u64,
}

struct Moments {
    first: Var,
    second: Var,
}

impl AdamW {
    /// A state that has seen nothing.
    pub fn new(weights: &AdapterWeights) -> Result<Self> {
        let zeros = |var: &Var| Var::zeros(var.shape(), DType::F32, var.device());
        let moments = weights
            .iter()
            .map(|(name, var)| {
                Ok((
                    name.to_owned(),
                    Moments {
                        first: zeros(var)?,
                        second: zeros(var)?,
                    },
                ))
            })
            .collect::<Result<_>>()?;
        Ok(Self { moments, steps: 0 })
    }

    /// Judges the step by `limits`, and if it is taken moves every weight against its gradient. `losses` are the sums of
    /// its passes, f32 scalars, and `gradients` the gradients of all of them.
    pub fn step(
        &mut self,
        weights: &AdapterWeights,
        losses: &[Tensor],
        gradients: &Gradients,
        limits: &StepLimits,
        learning_rate: f64,
        options: &TrainOptions,
    ) -> Result<Verdict> {
        let step = AdamWStep {
            learning_rate,
            beta1: options.beta1,
            beta2: options.beta2,
            epsilon: options.epsilon,
            weight_decay: options.weight_decay,
            step: self.steps + 1,
        };
        let mut trained = Vec::with_capacity(self.moments.len());
        for (name, weight) in weights.iter() {
            let (Some(gradient), Some(moments)) = (gradients.get(name), self.moments.get(name))
            else {
                return Err(Error::new(format!("`{name}` has no gradient")));
            };
            trained.push(TrainedWeight {
                weight,
                gradient,
                first: &moments.first,
                second: &moments.second,
            });
        }
        let verdict = ops::adamw(&trained, losses, limits, &step)?;
        if verdict.reaction == Reaction::Take {
            self.steps = step.step;
        }
        Ok(verdict)
    }

    /// The state as tensors: `first.<name>` and `second.<name>`, and the number of steps.
    pub fn state(&self) -> (BTreeMap<String, Tensor>, u64) {
        let mut tensors = BTreeMap::new();
        for (name, moments) in &self.moments {
            tensors.insert(format!("first.{name}"), moments.first.as_tensor().clone());
            tensors.insert(format!("second.{name}"), moments.second.as_tensor().clone());
        }
        (tensors, self.steps)
    }

    /// Takes up a saved state.
    pub fn restore(&mut self, tensors: &BTreeMap<String, Tensor>, steps: u64) -> Result<()> {
        for (name, moments) in &self.moments {
            for (part, var) in [("first", &moments.first), ("second", &moments.second)] {
                let key = format!("{part}.{name}");
                var.set(expect_tensor(tensors, &key, var.shape())?)?;
            }
        }
        self.steps = steps;
        Ok(())
    }
}
