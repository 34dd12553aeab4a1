//! Carries one method through a model while it loads, or through the tensors of a checkpoint while it is merged.

use super::{
    AdapterMethod, BaseLinear, EmbeddingAdapter, EmbeddingSite, InputSite, LinearAdapter,
    LinearSite, ModelShape, ParameterSite, SoftPrompt, TextRows, suggest,
};
use crate::storage::{AdapterWeights, Init};
use crate::{Context, Error, Result};
use candle_core::Tensor;
use std::collections::BTreeSet;

/// Asks one method at every site and remembers the sites, so that "nothing matched" can say what there was.
pub struct Injector<'a> {
    method: &'a dyn AdapterMethod,
    weights: AdapterWeights,
    model: ModelShape,
    paths: Vec<String>,
}

impl<'a> Injector<'a> {
    /// Starts a walk through a model of shape `model`.
    pub fn new(
        method: &'a dyn AdapterMethod,
        weights: AdapterWeights,
        model: ModelShape,
    ) -> Result<Self> {
        method.check(&model)?;
        Ok(Self {
            method,
            weights,
            model,
            paths: Vec::new(),
        })
    }

    /// Asks the method at the linear layer `path`.
    pub fn adapt_linear(
        &mut self,
        path: &str,
        base: &dyn BaseLinear,
    ) -> Result<Option<Box<dyn LinearAdapter>>> {
        self.paths.push(path.to_owned());
        let site = LinearSite {
            path,
            base,
            model: &self.model,
        };
        self.method.adapt_linear(&site, &mut self.weights).at(path)
    }

    /// Asks the method at the token embedding `path`.
    pub fn adapt_embedding(
        &mut self,
        path: &str,
        weight: &dyn Fn() -> Result<Tensor>,
    ) -> Result<Option<Box<dyn EmbeddingAdapter>>> {
        self.paths.push(path.to_owned());
        let site = EmbeddingSite {
            path,
            weight,
            model: &self.model,
        };
        self.method
            .adapt_embedding(&site, &mut self.weights)
            .at(path)
    }

    /// The trained tensor that stands in for the base weight `name`, if the method trains it: f32, starting from
    /// what `base` gives. Stored whole under its own name, as PEFT stores `modules_to_save`.
    pub fn parameter(
        &mut self,
        name: &str,
        base: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Option<Tensor>> {
        let site = ParameterSite {
            name,
            model: &self.model,
        };
        if !self.method.trains(&site) {
            return Ok(None);
        }
        let base = base().at(name)?;
        self.weights
            .var(
                &format!("base_model.model.{name}"),
                base.dims(),
                Init::Values(&base),
            )
            .map(Some)
            .at(name)
    }

    /// Asks the method for rows to put in front of the tokens.
    pub fn soft_prompt(&mut self, text: &dyn TextRows) -> Result<Option<Box<dyn SoftPrompt>>> {
        let site = InputSite {
            text,
            model: &self.model,
        };
        self.method.soft_prompt(&site, &mut self.weights)
    }

    /// Ends the walk: every pattern must have matched, and a loaded adapter must have been used up exactly.
    pub fn finish(self) -> Result<AdapterWeights> {
        let unmatched = match self.weights.seed() {
            Some(_) => self.method.unmatched(&self.paths),
            None => Vec::new(), // a loaded adapter says by its tensors what it fits
        };
        if !unmatched.is_empty() {
            let names: BTreeSet<&str> = self
                .paths
                .iter()
                .filter_map(|path| path.rsplit('.').next())
                .collect();
            let mut near: BTreeSet<&str> = unmatched
                .iter()
                .flat_map(|wanted| suggest(wanted, names.iter().copied()))
                .collect();
            if near.is_empty() {
                near = names;
            }
            return Err(
                Error::new(format!("no layer matches {}", quoted(&unmatched)))
                    .hint(format!("the model has {}", quoted(near))),
            );
        }
        if self.weights.seed().is_some() {
            self.method.check_paths(&self.paths)?;
        }
        self.weights.finish()
    }
}

/// `a`, `b` and so on, in backticks.
pub(crate) fn quoted(names: impl IntoIterator<Item = impl AsRef<str>>) -> String {
    let quoted: Vec<String> = names
        .into_iter()
        .map(|name| format!("`{}`", name.as_ref()))
        .collect();
    quoted.join(", ")
}
