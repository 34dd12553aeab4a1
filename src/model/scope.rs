//! A place in the model tree while it loads: path, base weights, method.

use super::base_weights::BaseWeights;
use super::embedding::Embedding;
use super::linear::{DenseLinear, HandedOut, Linear, LinearWeight};
use crate::Result;
use crate::adapters::hooks::Injector;
use candle_core::Tensor;
use std::cell::RefCell;

/// Reads the weights below one module path, and asks the method at each of them. Model files see nothing of adapters.
pub(super) struct Scope<'a, 'm> {
    base: &'a dyn BaseWeights,
    injector: &'a RefCell<Injector<'m>>,
    handed_out: &'a HandedOut,
    path: String,
}

impl<'a, 'm> Scope<'a, 'm> {
    pub(super) fn root(
        base: &'a dyn BaseWeights,
        injector: &'a RefCell<Injector<'m>>,
        handed_out: &'a HandedOut,
    ) -> Self {
        Self {
            base,
            injector,
            handed_out,
            path: String::new(),
        }
    }

    /// The scope of the child `name`.
    pub(super) fn enter(&self, name: impl std::fmt::Display) -> Self {
        Self {
            path: self.name(name),
            ..*self
        }
    }

    fn name(&self, child: impl std::fmt::Display) -> String {
        if self.path.is_empty() {
            child.to_string()
        } else {
            format!("{}.{child}", self.path)
        }
    }

    /// The linear layer here, `in_features` to `out_features`.
    pub(super) fn linear(
        &self,
        in_features: usize,
        out_features: usize,
        bias: bool,
    ) -> Result<Linear> {
        let weight = self.matrix(&self.name("weight"), out_features, in_features)?;
        let bias = if bias {
            Some(self.vector("bias", out_features)?)
        } else {
            None
        };
        self.adapted(weight, bias, in_features, out_features)
    }

    /// The output head when it is the embedding matrix itself.
    pub(super) fn tied_head(
        &self,
        embedding: &LinearWeight,
        hidden: usize,
        vocabulary: usize,
    ) -> Result<Linear> {
        self.adapted(embedding.clone(), None, hidden, vocabulary)
    }

    fn adapted(
        &self,
        weight: LinearWeight,
        bias: Option<Tensor>,
        in_features: usize,
        out_features: usize,
    ) -> Result<Linear> {
        let base = DenseLinear {
            path: self.path.clone(),
            weight,
            bias,
            handed_out: self.handed_out.clone(),
            in_features,
            out_features,
        };
        let adapter = self.injector.borrow_mut().adapt_linear(&self.path, &base)?;
        Ok(Linear::new(base, adapter))
    }

    /// The token embedding here, `(vocabulary, hidden)`. A tied model may store it only under the head's name.
    pub(super) fn embedding(
        &self,
        vocabulary: usize,
        hidden: usize,
        tied_name: Option<&str>,
    ) -> Result<Embedding> {
        let name = self.name("weight");
        let stored = match tied_name {
            Some(tied) if !self.base.contains(&name) => tied,
            _ => &name,
        };
        let frozen = self.base.matrix(stored, vocabulary, hidden)?;
        let trained = self
            .injector
            .borrow_mut()
            .parameter(&name, || frozen.to_f32())?;
        let adapter = self
            .injector
            .borrow_mut()
            .adapt_embedding(&self.path, &|| frozen.to_f32())?;
        let weight = trained.map_or(LinearWeight::Frozen(frozen), LinearWeight::Trained);
        Ok(Embedding::new(weight, adapter))
    }

    /// The f32 vector `name` here: a norm's weight or a bias. Tracked when the method trains it.
    pub(super) fn vector(&self, name: &str, length: usize) -> Result<Tensor> {
        let name = self.name(name);
        let frozen = self.base.vector(&name, length)?;
        let trained = self
            .injector
            .borrow_mut()
            .parameter(&name, || Ok(frozen.clone()))?;
        Ok(trained.unwrap_or(frozen))
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<LinearWeight> {
        let frozen = self.base.matrix(name, rows, columns)?;
        let trained = self
            .injector
            .borrow_mut()
            .parameter(name, || frozen.to_f32())?;
        Ok(trained.map_or(LinearWeight::Frozen(frozen), LinearWeight::Trained))
    }
}
