//! Next-token prediction: the cross-entropy of the supervised tokens.

use crate::Result;
use crate::adapters::hooks::Mode;
use crate::data::Batch;
use crate::model::causal_lm::{CausalLm, Flow, enter};
use crate::model::linear::LinearWeight;
use crate::ops;
use candle_core::{DType, Tensor};

/// The loss summed over the batch's target tokens: a differentiable f32 scalar.
pub fn loss_sum(
    model: &dyn CausalLm,
    hidden: &Tensor,
    flow: &Flow,
    batch: &Batch,
) -> Result<Tensor> {
    let (hidden, targets) = flow.supervised(hidden, batch)?;
    let hidden = model.finish(&hidden)?;
    match model.head().plain_weight() {
        Some(LinearWeight::Frozen(weight)) => ops::linear_cross_entropy(&hidden, weight, &targets),
        Some(LinearWeight::Trained(weight)) => {
            ops::trained_linear_cross_entropy(&hidden, weight, &targets)
        }
        None => {
            let logits = model.head().forward(&hidden, flow.pass.mode)?;
            ops::cross_entropy(&logits.to_dtype(DType::F32)?, &targets)
        }
    }
}

/// The score of every target token of a batch, in the order of the batch's rows. Keeps no history.
pub fn score(model: &dyn CausalLm, batch: &Batch) -> Result<Vec<ops::TokenScore>> {
    let mut flow = enter(model, batch, Mode::Infer)?;
    let mut hidden = flow.hidden.detach();
    flow.hidden = hidden.clone();
    for index in 0..model.block_count() {
        hidden = model.block(index, &hidden, &flow.pass, None)?.detach();
    }
    let (hidden, targets) = flow.supervised(&hidden, batch)?;
    let hidden = model.finish(&hidden)?.detach();
    match model.head().plain_weight() {
        Some(LinearWeight::Frozen(weight)) => ops::score_targets(&hidden, weight, &targets),
        _ => {
            let logits = model.head().forward(&hidden, Mode::Infer)?.detach();
            ops::score_logits(&logits.to_dtype(DType::F32)?, &targets)
        }
    }
}
