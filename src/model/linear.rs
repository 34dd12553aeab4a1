//! A linear layer: the frozen (or trained) weight, and the adapter beside it.

use super::backward::{GradientSink, refuse_frozen, source};
use super::placement::Placement;
use crate::Result;
use crate::adapters::hooks::{BaseLinear, LinearAdapter, Mode};
use crate::ops::clock::{Kind, timed};
use crate::ops::{self, FrozenWeight};
use candle_core::{DType, Tensor, TensorId};
use std::sync::{Arc, Mutex};

/// `y = x Wᵀ + b`, adapted where a method asked for it.
pub struct Linear {
    base: DenseLinear,
    adapter: Option<Box<dyn LinearAdapter>>,
}

impl Linear {
    pub(super) fn new(base: DenseLinear, adapter: Option<Box<dyn LinearAdapter>>) -> Self {
        Self { base, adapter }
    }

    /// Moves a frozen weight to where `place` puts it.
    pub(super) fn place(
        &mut self,
        place: impl FnOnce(&FrozenWeight) -> Result<FrozenWeight>,
    ) -> Result<()> {
        if let LinearWeight::Frozen(weight) = &mut self.base.weight {
            *weight = place(weight)?;
        }
        Ok(())
    }

    /// [`Linear::forward`] without history, in memory of its own.
    pub(super) fn forward_detached(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let output = timed(Kind::Linear, || self.forward(x, mode))?.detach();
        match &self.adapter {
            // A method may return what it, or somebody else, still holds.
            Some(adapter) if adapter.low_rank(mode).is_none() => Ok(output.copy()?),
            _ => Ok(output),
        }
    }

    /// The adapted output, `(rows, out)`, for `x` of `(rows, in)`.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let Some(adapter) = &self.adapter else {
            return self.base.forward(x);
        };
        match (adapter.low_rank(mode), &self.base.weight) {
            (Some(update), LinearWeight::Frozen(weight)) => {
                ops::low_rank_linear(x, weight, self.base.bias.as_ref(), &update)
            }
            _ => {
                // Trained weights are f32, and so is what a method is given.
                let output = adapter.forward(&x.to_dtype(DType::F32)?, &self.base, mode)?;
                Ok(output.to_dtype(x.dtype())?)
            }
        }
    }

    /// Whether anything in it is trained.
    pub(super) fn trains(&self) -> bool {
        self.adapter.is_some()
            || matches!(self.base.weight, LinearWeight::Trained(_))
            || self.base.trained_bias().is_some()
    }

    /// The backward of [`Linear::forward`] on `x`, given the gradient of its output: that of `x`, if it is wanted, added
    /// to `onto` where there is one.
    ///
    /// What a method computes beside the layer with candle's operations is computed again here, to be differentiated.
    pub(super) fn backward(
        &self,
        x: &Tensor,
        gradient: &Tensor,
        mode: Mode,
        wants_input: bool,
        onto: Option<Tensor>,
        sink: &mut GradientSink<'_>,
    ) -> Result<Option<Tensor>> {
        let Some(adapter) = &self.adapter else {
            return self.base.backward(x, gradient, wants_input, onto, sink);
        };
        if let (Some(update), LinearWeight::Frozen(weight)) =
            (adapter.low_rank(mode), &self.base.weight)
        {
            self.base.bias_backward(gradient, sink)?;
            let (dx, da, db) =
                ops::low_rank_linear_gradients(x, gradient, weight, update, wants_input, onto)?;
            sink.add(update.a, da)?;
            sink.add(update.b, db)?;
            return Ok(dx);
        }
        let x = source(x, wants_input)?;
        let output = self.forward(&x, mode)?;
        if !output.track_op() {
            return Ok(onto);
        }
        let mut store = ops::seed_gradient(&output, gradient)?.backward()?;
        sink.collect(&mut store)?;
        refuse_frozen(&store, &self.base.handed_out)?;
        match (store.remove(&x).filter(|_| wants_input), onto) {
            (Some(dx), Some(onto)) => ops::add_onto(onto, &dx).map(Some),
            (dx, onto) => Ok(dx.or(onto)),
        }
    }

    /// The gradient of the input, added to `onto` where there is one, of a layer in which nothing is trained.
    pub(super) fn input_gradient(&self, gradient: &Tensor, onto: Option<Tensor>) -> Result<Tensor> {
        debug_assert!(!self.trains());
        self.base.input_gradient(gradient, onto)
    }

    /// The weight alone, when nothing stands beside it.
    pub fn plain_weight(&self) -> Option<&LinearWeight> {
        let plain = self.adapter.is_none() && self.base.bias.is_none();
        plain.then_some(&self.base.weight)
    }
}

/// The weight of a linear layer or an embedding, `(out, in)`.
#[derive(Clone)]
pub enum LinearWeight {
    /// As stored in the checkpoint; never changes.
    Frozen(FrozenWeight),
    /// An f32 tensor that is being trained.
    Trained(Tensor),
}

impl LinearWeight {
    /// The weight in f32, on the device where it is; a trained one keeps its history.
    pub fn widened(&self) -> Result<Tensor> {
        match self {
            Self::Frozen(weight) => weight.widened(),
            Self::Trained(weight) => Ok(weight.clone()),
        }
    }
}

/// Frozen weights that were handed out as tensors, with the path of their layer: none of them may get a gradient.
pub type HandedOut = Arc<Mutex<Vec<(TensorId, String)>>>;

/// What an adapter sees of the layer it adapts.
pub(super) struct DenseLinear {
    pub(super) path: String,
    pub(super) weight: LinearWeight,
    pub(super) bias: Option<Tensor>,
    pub(super) handed_out: HandedOut,
    pub(super) in_features: usize,
    pub(super) out_features: usize,
    /// Where the products are made, and in what; a method may hand in f32.
    pub(super) placement: Placement,
}

impl DenseLinear {
    fn trained_bias(&self) -> Option<&Tensor> {
        self.bias.as_ref().filter(|bias| bias.track_op())
    }

    fn bias_backward(&self, gradient: &Tensor, sink: &mut GradientSink<'_>) -> Result<()> {
        match self.trained_bias() {
            Some(bias) => sink.add(bias, ops::bias_gradient(gradient)?),
            None => Ok(()),
        }
    }

    fn backward(
        &self,
        x: &Tensor,
        gradient: &Tensor,
        wants_input: bool,
        onto: Option<Tensor>,
        sink: &mut GradientSink<'_>,
    ) -> Result<Option<Tensor>> {
        self.bias_backward(gradient, sink)?;
        if let LinearWeight::Trained(weight) = &self.weight {
            let dw = timed(Kind::WeightGradients, || ops::weight_gradient(x, gradient))?;
            sink.add(weight, dw)?;
        }
        match wants_input {
            true => self.input_gradient(gradient, onto).map(Some),
            false => Ok(onto),
        }
    }

    fn input_gradient(&self, gradient: &Tensor, onto: Option<Tensor>) -> Result<Tensor> {
        timed(Kind::Linear, || match &self.weight {
            LinearWeight::Frozen(weight) => ops::linear_input_gradient(gradient, weight, onto),
            LinearWeight::Trained(weight) => {
                ops::trained_linear_input_gradient(gradient, weight, onto)
            }
        })
    }
}

impl BaseLinear for DenseLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.to_dtype(self.placement.activations())?;
        let bias = self.bias.as_ref();
        let output = match &self.weight {
            LinearWeight::Trained(weight) => ops::trained_linear(&rows, weight, bias)?,
            LinearWeight::Frozen(weight) => ops::linear(&rows, weight, bias)?,
        };
        Ok(output.to_dtype(x.dtype())?)
    }

    fn weight(&self) -> Result<Tensor> {
        // A method may ask while the model is loaded, when the weight is not where it will be.
        let weight = self.weight.widened()?.to_device(&self.placement.device)?;
        if matches!(self.weight, LinearWeight::Frozen(_))
            && let Ok(mut handed_out) = self.handed_out.lock()
        {
            handed_out.push((weight.id(), self.path.clone()));
        }
        Ok(weight)
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.out_features
    }
}
