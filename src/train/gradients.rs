//! Loss and gradients of one pass, with activations kept or computed again block by block.

use super::optimizer::Gradients;
use super::options::Recompute;
use crate::adapters::hooks::Mode;
use crate::adapters::storage::AdapterWeights;
use crate::data::Batch;
use crate::model::causal_lm::{CausalLm, enter};
use crate::ops::seed_gradient;
use crate::task::causal_lm::loss_sum;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

/// Adds the gradients of the loss summed over `batch`'s target tokens to `gradients`, and returns that sum.
///
/// Fails if a frozen weight got a gradient: work and memory that a method wastes by mistake.
pub fn accumulate(
    model: &dyn CausalLm,
    weights: &AdapterWeights,
    batch: &Batch,
    mode: Mode,
    recompute: Recompute,
    gradients: &mut Gradients,
) -> Result<f64> {
    let mut pass = Backward {
        model,
        weights,
        gradients,
    };
    match recompute {
        Recompute::Never => pass.keeping(batch, mode),
        Recompute::Blocks => pass.recomputing(batch, mode),
    }
}

struct Backward<'a> {
    model: &'a dyn CausalLm,
    weights: &'a AdapterWeights,
    gradients: &'a mut Gradients,
}

impl Backward<'_> {
    fn keeping(&mut self, batch: &Batch, mode: Mode) -> Result<f64> {
        let flow = enter(self.model, batch, mode)?;
        let mut hidden = flow.hidden.clone();
        for index in 0..self.model.block_count() {
            hidden = self.model.block(index, &hidden, &flow.pass, None)?;
        }
        let loss = loss_sum(self.model, &hidden, &flow, batch)?;
        self.collect(&loss, None)?;
        value(&loss)
    }

    fn recomputing(&mut self, batch: &Batch, mode: Mode) -> Result<f64> {
        let flow = enter(self.model, batch, mode)?;
        let blocks = self.model.block_count();
        // `reached[i]`: something trained lies at or below the input of block i, so its gradient is wanted.
        let mut reached = vec![flow.hidden.track_op()];
        let mut inputs = vec![flow.hidden.detach()];
        for index in 0..blocks {
            let output = self.model.block(index, &inputs[index], &flow.pass, None)?;
            reached.push(reached[index] || output.track_op());
            inputs.push(output.detach());
        }

        let top = source(&inputs[blocks], reached[blocks])?;
        let loss = loss_sum(self.model, &top, &flow, batch)?;
        let mut gradient = self.collect(&loss, reached[blocks].then_some(&top))?;
        inputs.pop();
        for index in (0..blocks).rev() {
            let (Some(output_gradient), Some(input)) = (gradient.take(), inputs.pop()) else {
                break;
            };
            let input = source(&input, reached[index])?;
            let output = self.model.block(index, &input, &flow.pass, None)?;
            if output.track_op() {
                let seeded = seed_gradient(&output, &output_gradient)?;
                gradient = self.collect(&seeded, reached[index].then_some(&input))?;
            }
        }
        if let (true, Some(gradient)) = (reached[0], gradient) {
            self.collect(&seed_gradient(&flow.hidden, &gradient)?, None)?;
        }
        value(&loss)
    }

    /// Runs backward from `scalar`, adds what the weights got, and returns what `wanted` got.
    fn collect(&mut self, scalar: &Tensor, wanted: Option<&Tensor>) -> Result<Option<Tensor>> {
        if !scalar.track_op() {
            return Ok(None);
        }
        let mut store = scalar.backward()?;
        for (name, var) in self.weights.iter() {
            let Some(gradient) = store.remove(var) else {
                continue;
            };
            let sum = match self.gradients.remove(name) {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            };
            self.gradients.insert(name.to_owned(), sum);
        }
        self.refuse_frozen(&store)?;
        Ok(wanted.and_then(|tensor| store.remove(tensor)))
    }

    fn refuse_frozen(&self, store: &GradStore) -> Result<()> {
        let frozen: Vec<String> = self
            .model
            .take_handed_out()
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
}

/// `tensor` as the start of a new graph, tracked if its gradient is wanted.
fn source(tensor: &Tensor, wanted: bool) -> Result<Tensor> {
    if wanted {
        Ok(Var::from_tensor(tensor)?.into_inner())
    } else {
        Ok(tensor.clone())
    }
}

fn value(loss: &Tensor) -> Result<f64> {
    Ok(f64::from(loss.to_scalar::<f32>()?))
}
