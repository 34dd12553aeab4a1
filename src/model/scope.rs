//! A place in the model tree while it loads: path, base weights, method.

use super::base_weights::BaseWeights;
use super::embedding::Embedding;
use super::linear::{DenseLinear, HandedOut, Linear, LinearWeight};
use super::placement::Placement;
use crate::Result;
use crate::adapters::hooks::Injector;
use candle_core::Tensor;
use std::cell::RefCell;

/// Reads the weights below one module path, and asks the method at each of them. Model files see nothing of adapters.
pub(super) struct Scope<'a, 'm> {
    base: &'a dyn BaseWeights,
    injector: &'a RefCell<Injector<'m>>,
    handed_out: &'a HandedOut,
    placement: &'a Placement,
    path: String,
}

impl<'a, 'm> Scope<'a, 'm> {
    pub(super) fn root(
        base: &'a dyn BaseWeights,
        injector: &'a RefCell<Injector<'m>>,
        handed_out: &'a HandedOut,
        placement: &'a Placement,
    ) -> Self {
        Self {
            base,
            injector,
            handed_out,
            placement,
            path: String::new(),
        }
    }

    /// Where the model computes.
    pub(super) fn placement(&self) -> &'a Placement {
        self.placement
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
        let name = self.name("weight");
        let weight = self.matrix(&name, out_features, in_features)?;
        let bias = if bias {
            Some(self.vector("bias", out_features)?)
        } else {
            None
        };
        let mut linear = self.adapted(weight, bias, in_features, out_features)?;
        // Only now: what the method asked of the weight was to be answered from the file, unrounded.
        linear.place(|weight| self.base.place(&name, weight, self.placement))?;
        Ok(linear)
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
            placement: self.placement.clone(),
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
        let weight = match trained {
            Some(trained) => LinearWeight::Trained(trained),
            None => LinearWeight::Frozen(self.base.place(stored, &frozen, self.placement)?),
        };
        Ok(Embedding::new(weight, adapter, self.placement))
    }

    /// The f32 vector `name` here: a norm's weight or a bias. Tracked when the method trains it.
    pub(super) fn vector(&self, name: &str, length: usize) -> Result<Tensor> {
        let name = self.name(name);
        let frozen = self.base.vector(&name, length)?;
        let trained = self
            .injector
            .borrow_mut()
            .parameter(&name, || Ok(frozen.clone()))?;
        match trained {
            Some(trained) => Ok(trained),
            None => Ok(frozen.to_device(&self.placement.device)?),
        }
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
