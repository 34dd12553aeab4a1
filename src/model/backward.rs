//! The backward pass of a block, and where it leaves the gradients of trained weights.

use super::linear::HandedOut;
use crate::adapters::storage::AdapterWeights;
use crate::ops;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, TensorId, Var};
use std::collections::{BTreeMap, HashMap};

/// The gradient of each trained weight, by its name in the adapter's file.
pub type Gradients = BTreeMap<String, Tensor>;

/// A block that has run and can give the gradients of what it did.
pub trait BlockBackward {
    /// Takes the gradient of the block's output, adds those of its trained weights to `sink`, and returns that of its
    /// input where it is wanted.
    fn run(
        self: Box<Self>,
        gradient: Tensor,
        wants_input: bool,
        sink: &mut GradientSink<'_>,
    ) -> Result<Option<Tensor>>;
}

/// Adds up the gradients of trained weights.
pub struct GradientSink<'a> {
    names: HashMap<TensorId, &'a str>,
    weights: &'a AdapterWeights,
    gradients: &'a mut Gradients,
}

impl<'a> GradientSink<'a> {
    /// A sink for the gradients of `weights`, which are added to `gradients`.
    pub fn new(weights: &'a AdapterWeights, gradients: &'a mut Gradients) -> Self {
        Self {
            names: weights.iter().map(|(name, var)| (var.id(), name)).collect(),
            weights,
            gradients,
        }
    }

    /// Adds `gradient` to that of `weight`: a trained weight, or something a method made of trained weights.
    pub(super) fn add(&mut self, weight: &Tensor, gradient: Tensor) -> Result<()> {
        if let Some(name) = self.names.get(&weight.id()) {
            return add(self.gradients, name, gradient);
        }
        if weight.track_op() {
            let mut store = ops::seed_gradient(weight, &gradient)?.backward()?;
            self.collect(&mut store)?;
        }
        Ok(())
    }

    /// Takes the gradients of trained weights out of `store`.
    pub fn collect(&mut self, store: &mut GradStore) -> Result<()> {
        for (name, var) in self.weights.iter() {
            if let Some(gradient) = store.remove(var) {
                add(self.gradients, name, gradient)?;
            }
        }
        Ok(())
    }
}

fn add(gradients: &mut Gradients, name: &str, gradient: Tensor) -> Result<()> {
    let sum = match gradients.remove(name) {
        Some(sum) => {
            let sum = ops::add_onto(sum, &gradient)?;
            ops::recycle(gradient);
            sum
        }
        None => gradient,
    };
    gradients.insert(name.to_owned(), sum);
    Ok(())
}

/// Fails if a frozen weight that a method asked for as a tensor got a gradient: work and memory wasted by mistake.
pub(crate) fn refuse_frozen(store: &GradStore, handed_out: &HandedOut) -> Result<()> {
    let handed_out = handed_out
        .lock()
        .map(|mut ids| std::mem::take(&mut *ids))
        .unwrap_or_default();
    let frozen: Vec<String> = handed_out
        .into_iter()
        .filter(|(id, _)| store.get_id(*id).is_some())
        .map(|(_, path)| format!("`{path}`"))
        .collect();
    if frozen.is_empty() {
        return Ok(());
    }
    Err(Error::new(format!(
        "a gradient was computed for the frozen weight of {}",
        frozen.join(", ")
    ))
    .hint("the method multiplies by `base.weight()`; call `base.forward(x)` instead"))
}

/// `tensor` as the start of a new graph, tracked if its gradient is wanted.
pub(crate) fn source(tensor: &Tensor, wanted: bool) -> Result<Tensor> {
    if wanted {
        Ok(Var::from_tensor(tensor)?.into_inner())
    } else {
        Ok(tensor.detach())
    }
}
