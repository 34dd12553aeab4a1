//! Scores on held-out data: loss, perplexity, token accuracy.

use crate::data::{Dataset, passes};
use crate::model::causal_lm::CausalLm;
use crate::ops::begin_pass;
use crate::task::causal_lm::score;
use crate::{Error, Result};
use serde::Serialize;
use std::fmt::Display;

/// What a model makes of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean loss of the target tokens, in nats.
    pub loss: f64,
    /// e to the loss: how many tokens the model hesitates between.
    pub perplexity: f64,
    /// Share of target tokens that the model holds for the likeliest.
    pub accuracy: f64,
    /// Number of target tokens.
    pub tokens: usize,
    /// Number of examples.
    pub examples: usize,
}

impl Evaluation {
    /// The same, if its loss is a number. Otherwise the error is of kind `NotFinite`.
    pub fn finite(self) -> Result<Self> {
        match self.loss.is_finite() {
            true => Ok(self),
            false => Err(no_number("the loss", self.loss)),
        }
    }
}

/// The error of a score that is no number, with the way to find out why.
pub(crate) fn no_number(what: impl Display, value: impl Display) -> Error {
    Error::not_finite(format!("{what} is {value}, which is no number")).hint(
        "`retune inspect` names weights with NaN or infinite values, of bases and of adapters",
    )
}

/// Scores every target token of `data`, at most `tokens_per_pass` tokens at once. `on_examples` hears how many
/// examples each pass finished.
pub fn evaluate(
    model: &dyn CausalLm,
    data: &Dataset,
    tokens_per_pass: usize,
    on_examples: &mut dyn FnMut(usize),
) -> Result<Evaluation> {
    let examples: Vec<_> = data.examples.iter().collect();
    let (mut loss, mut right, mut tokens) = (0.0, 0, 0);
    for pass in passes(&examples, tokens_per_pass) {
        begin_pass(pass.tokens.len());
        let scores = score(model, &pass)?;
        let targets = pass
            .targets
            .iter()
            .filter(|target| **target != crate::data::IGNORE);
        for (score, target) in scores.iter().zip(targets) {
            loss -= f64::from(score.log_probability);
            right += usize::from(score.greedy == *target);
            tokens += 1;
        }
        on_examples(pass.segments.len() - 1);
    }
    if tokens == 0 {
        return Err(Error::new("the data has no target token to score"));
    }
    let loss = loss / tokens as f64;
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        accuracy: right as f64 / tokens as f64,
        tokens,
        examples: examples.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn a_loss_that_is_no_number_is_an_error_of_its_kind() {
        let evaluation = |loss: f64| Evaluation {
            loss,
            perplexity: loss.exp(),
            accuracy: 0.5,
            tokens: 2,
            examples: 1,
        };
        assert!(evaluation(2.0).finite().is_ok());
        for loss in [f64::NAN, f64::INFINITY] {
            let error = evaluation(loss).finite().expect_err("no number");
            assert_eq!(error.kind(), ErrorKind::NotFinite);
            assert!(error.hint_text().is_some());
        }
    }
}
