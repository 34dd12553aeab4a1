//! Logits of a few fixed sequences: the proof that the merged model is the adapted one.

use crate::Result;
use crate::adapters::hooks::Mode;
use crate::adapters::storage::generator;
use crate::data::{Example, collate};
use crate::model::Model;
use crate::model::causal_lm::enter;
use rand::RngExt;

/// Lengths of the probe sequences.
const LENGTHS: [usize; 3] = [3, 17, 32];

/// The logits at every token of every probe sequence.
pub(super) fn logits(model: &Model) -> Result<Vec<f32>> {
    let mut generator = generator(0, "merge probe");
    let mut all = Vec::new();
    for length in LENGTHS {
        let length = length.min(model.config.max_positions);
        let tokens = (0..length)
            .map(|_| generator.random_range(0..model.config.vocabulary as u32))
            .collect();
        let batch = collate(&[&Example::new(tokens, vec![true; length])]);
        let decoder = model.decoder.as_ref();
        let flow = enter(decoder, &batch, Mode::Infer)?;
        let mut hidden = flow.hidden.detach();
        for index in 0..decoder.block_count() {
            hidden = decoder.block(index, &hidden, &flow.pass, None)?.detach();
        }
        let finished = decoder.finish(&hidden)?.detach();
        let logits = decoder.head().forward(&finished, Mode::Infer)?.detach();
        all.extend(logits.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(all)
}

/// The largest difference of two logits at the same place; infinite if they cannot be compared.
pub(super) fn largest_difference(left: &[f32], right: &[f32]) -> f64 {
    if left.len() != right.len() {
        return f64::INFINITY;
    }
    left.iter()
        .zip(right)
        .map(|(left, right)| f64::from((left - right).abs()))
        .map(|difference| {
            if difference.is_nan() {
                f64::INFINITY
            } else {
                difference
            }
        })
        .fold(0.0, f64::max)
}

/// The quadratic mean of logits: their usual size.
pub(super) fn scale(logits: &[f32]) -> f64 {
    let squares: f64 = logits.iter().map(|logit| f64::from(*logit).powi(2)).sum();
    (squares / logits.len().max(1) as f64).sqrt()
}
