//! What an adapter makes of each weight, found without building a model.

use super::stack::Stack;
use crate::adapters::hooks::{BaseLinear, EmbeddingAdapter, Injector, LinearAdapter, ModelShape};
use crate::model::checkpoint::Checkpoint;
use crate::model::{Parameter, ParameterKind};
use crate::{Context, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// What becomes of one weight of the base.
pub(super) struct Change {
    /// What stands in for it.
    pub(super) replaced: Option<Tensor>,
    /// What is folded into it.
    pub(super) adapter: Option<Adapted>,
}

pub(super) enum Adapted {
    Linear(Box<dyn LinearAdapter>),
    Embedding(Box<dyn EmbeddingAdapter>),
}

impl Change {
    /// The merged weight in f32, for the base weight that `base` gives in f32.
    pub(super) fn apply(&self, base: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let weight = match &self.replaced {
            Some(replaced) => replaced.clone(),
            None => base()?,
        };
        match &self.adapter {
            None => Ok(weight),
            Some(Adapted::Linear(adapter)) => adapter.merged_weight(&weight),
            Some(Adapted::Embedding(adapter)) => adapter.merged_weight(&weight),
        }
    }
}

/// The changes by the weight's name, and whether a tied head becomes a matrix of its own.
pub(super) struct Changes {
    pub(super) by_name: BTreeMap<String, Change>,
    pub(super) unties_head: bool,
}

/// The base's tensors under the names that a model of this configuration has.
pub(super) struct Base<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) shape: ModelShape,
    pub(super) parameters: Vec<Parameter>,
}

impl Base<'_> {
    /// Name of the token embedding.
    pub(super) fn embedding_name(&self) -> &str {
        self.parameters
            .iter()
            .find(|parameter| parameter.kind == ParameterKind::Embedding)
            .map_or("", |parameter| &parameter.name)
    }

    /// Name of the output head's matrix.
    pub(super) fn head_name(&self) -> String {
        format!("{}.weight", self.shape.head_path)
    }

    /// Under which name the file holds the weight `name`: a tied model may store its embedding as the head alone.
    pub(super) fn stored_name(&self, name: &str) -> String {
        let is_embedding = name == self.embedding_name();
        if self.shape.tied_head && is_embedding && !self.checkpoint.contains(name) {
            return self.head_name();
        }
        name.to_owned()
    }

    /// The weight `name` in f32.
    pub(super) fn values(&self, name: &str) -> Result<Tensor> {
        self.checkpoint
            .get(&self.stored_name(name))?
            .to_f32_tensor()
    }
}

/// Asks the adapters at every site of the base, in the words the model itself uses while it loads.
pub(super) fn find_changes(base: &Base, stack: &Stack) -> Result<Changes> {
    stack.refuse_soft_prompts(&base.shape)?;
    let mut injector = Injector::new(stack, stack.replaced(), base.shape.clone())?;
    let mut changes = Changes {
        by_name: BTreeMap::new(),
        unties_head: false,
    };
    for parameter in &base.parameters {
        let name = parameter.name.as_str();
        let replaced = injector.parameter(name, || base.values(name))?;
        let site = StoredLinear::at(base, name, replaced.as_ref());
        let mut adapter = None;
        match parameter.kind {
            ParameterKind::Norm | ParameterKind::Bias => {}
            ParameterKind::Linear | ParameterKind::Head => {
                adapter = injector
                    .adapt_linear(parameter.module(), &site)?
                    .map(Adapted::Linear);
            }
            ParameterKind::Embedding => {
                adapter = injector
                    .adapt_embedding(parameter.module(), &|| site.weight())?
                    .map(Adapted::Embedding);
                if base.shape.tied_head {
                    let head = injector.adapt_linear(base.shape.head_path, &site)?;
                    if adapter.is_some() || head.is_some() {
                        changes.unties_head = true;
                        changes.insert(base.head_name(), &replaced, head.map(Adapted::Linear));
                    }
                }
            }
        }
        changes.insert(name.to_owned(), &replaced, adapter);
    }
    injector.finish()?;
    stack.finish()?;
    Ok(changes)
}

impl Changes {
    fn insert(&mut self, name: String, replaced: &Option<Tensor>, adapter: Option<Adapted>) {
        if replaced.is_some() || adapter.is_some() {
            let replaced = replaced.clone();
            self.by_name.insert(name, Change { replaced, adapter });
        }
    }
}

/// A weight in the file, as a method sees a frozen layer.
pub(super) struct StoredLinear<'a> {
    base: &'a Base<'a>,
    /// Name of its weight.
    name: &'a str,
    shape: &'a [usize],
    /// What stands in for the base's weight.
    replaced: Option<&'a Tensor>,
}

impl<'a> StoredLinear<'a> {
    /// The layer of the weight `name`; a tied head is the embedding.
    pub(super) fn at(base: &'a Base<'a>, name: &'a str, replaced: Option<&'a Tensor>) -> Self {
        let named = |name: &str| {
            base.parameters
                .iter()
                .find(|parameter| parameter.name == name)
        };
        let parameter = named(name).or_else(|| named(base.embedding_name()));
        Self {
            base,
            name: parameter.map_or(name, |parameter| &parameter.name),
            shape: parameter.map_or(&[], |parameter| &parameter.shape),
            replaced,
        }
    }
}

impl BaseLinear for StoredLinear<'_> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight()?.t()?)?;
        let module = self.name.strip_suffix(".weight").unwrap_or(self.name);
        let bias = format!("{module}.bias");
        if !self.base.checkpoint.contains(&bias) {
            return Ok(y);
        }
        Ok(y.broadcast_add(&self.base.values(&bias)?)?)
    }

    fn weight(&self) -> Result<Tensor> {
        match self.replaced {
            Some(replaced) => Ok(replaced.clone()),
            None => self.base.values(self.name).at(self.name),
        }
    }

    fn in_features(&self) -> usize {
        self.shape.last().copied().unwrap_or_default()
    }

    fn out_features(&self) -> usize {
        self.shape.first().copied().unwrap_or_default()
    }
}
