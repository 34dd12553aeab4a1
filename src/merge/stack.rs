//! Several adapters on one base, each with a weight: `W + Σ weight · (W adapted by it - W)`.

use crate::adapter_folder::Adapter;
use crate::adapters::hooks::{
    AdapterMethod, BaseLinear, EmbeddingAdapter, EmbeddingSite, InputSite, LinearAdapter,
    LinearSite, Mode, ModelShape, ParameterSite, TextRows,
};
use crate::adapters::storage::{AdapterWeights, PeftConfig};
use crate::model::Parameter;
use crate::{Context, Error, Result};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One method made of several adapters that were read from folders.
///
/// Adapters beside a layer keep their own tensors here, for two of them use the same names. Weights that an adapter
/// replaces as a whole are handed to the model through [`Stack::replaced`].
pub(super) struct Stack<'a> {
    parts: Vec<Part<'a>>,
    replaced: BTreeMap<String, Tensor>,
}

struct Part<'a> {
    adapter: &'a Adapter,
    weight: f64,
    weights: Mutex<AdapterWeights>,
}

impl<'a> Stack<'a> {
    /// The adapters on a base with these `parameters`, whose values `base` gives in f32.
    pub(super) fn new(
        adapters: &[(&'a Adapter, f64)],
        shape: &ModelShape,
        parameters: &[Parameter],
        base: &dyn Fn(&str) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut trained_by: BTreeMap<&str, &Adapter> = BTreeMap::new();
        let mut twice = Vec::new();
        let mut replaced = BTreeMap::new();
        let mut parts = Vec::new();
        for (adapter, weight) in adapters {
            let mut own = adapter.saved.tensors.clone();
            for Parameter { name, .. } in parameters {
                if !adapter.method.trains(&ParameterSite { name, model: shape }) {
                    continue;
                }
                if let Some(first) = trained_by.insert(name, adapter) {
                    twice.push((name, first, adapter));
                }
                let saved_name = format!("base_model.model.{name}");
                if let Some(trained) = own.remove(&saved_name) {
                    let trained = weighted(trained, *weight, || base(name)).at(name)?;
                    replaced.insert(saved_name, trained);
                }
            }
            parts.push(Part {
                adapter,
                weight: *weight,
                weights: Mutex::new(AdapterWeights::loaded(own, &Device::Cpu)),
            });
        }
        if let Some((name, first, second)) = twice.first() {
            let more = match twice.len() {
                1 => String::new(),
                count => format!(" and {} other weights", count - 1),
            };
            return Err(Error::new(format!(
                "`{}` and `{}` both replace `{name}`{more}",
                first.folder().display(),
                second.folder().display(),
            ))
            .hint("whole weights cannot be added up; merge one of the two"));
        }
        Ok(Self { parts, replaced })
    }

    /// The weights that stand in for the base's own, for the model that this method is injected into.
    pub(super) fn replaced(&self) -> AdapterWeights {
        AdapterWeights::loaded(self.replaced.clone(), &Device::Cpu)
    }

    /// Refuses soft prompts, which no weight of the model can hold.
    pub(super) fn refuse_soft_prompts(&self, shape: &ModelShape) -> Result<()> {
        for part in &self.parts {
            if let Some(rows) = part.soft_prompt_rows(shape)? {
                return Err(Error::new(format!(
                    "a soft prompt of {rows} rows stands before the tokens, and no weight of the model can hold it"
                ))
                .at(part.adapter.folder().display())
                .hint("give it with `--adapter` wherever the model is used; it needs no merging to be fast"));
            }
        }
        Ok(())
    }

    /// Whether one of the adapters is a soft prompt.
    pub(super) fn has_soft_prompt(&self, shape: &ModelShape) -> Result<bool> {
        for part in &self.parts {
            if part.soft_prompt_rows(shape)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// After every site was asked: refuses adapters with tensors that are left over or missing.
    pub(super) fn finish(&self) -> Result<()> {
        for part in &self.parts {
            let mut weights = part.weights();
            let empty = AdapterWeights::fresh(0, &Device::Cpu);
            *weights = std::mem::replace(&mut *weights, empty)
                .finish()
                .context(part.not_applicable())?;
        }
        Ok(())
    }
}

impl Part<'_> {
    fn weights(&self) -> MutexGuard<'_, AdapterWeights> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn not_applicable(&self) -> String {
        format!(
            "the adapter `{}` cannot be applied",
            self.adapter.folder().display()
        )
    }

    /// How many rows it puts before the tokens, if it does.
    fn soft_prompt_rows(&self, shape: &ModelShape) -> Result<Option<usize>> {
        let site = InputSite {
            text: &NoText,
            model: shape,
        };
        let prompt = self.ask(|method, weights| method.soft_prompt(&site, weights))?;
        Ok(prompt.map(|(prompt, _)| prompt.len()))
    }

    /// Asks this part's method with its own tensors.
    fn ask<T>(
        &self,
        hook: impl FnOnce(&dyn AdapterMethod, &mut AdapterWeights) -> Result<Option<T>>,
    ) -> Result<Option<(T, f64)>> {
        let answer = hook(self.adapter.method.as_ref(), &mut self.weights())
            .context(self.not_applicable())?;
        Ok(answer.map(|answer| (answer, self.weight)))
    }
}

/// `base + weight · (tensor - base)`; a tensor of another shape is left for the model to refuse.
fn weighted(tensor: Tensor, weight: f64, base: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
    if weight == 1.0 {
        return Ok(tensor);
    }
    let base = base()?;
    if base.shape() != tensor.shape() {
        return Ok(tensor);
    }
    moved(base.clone(), &base, &tensor, weight)
}

/// `sum + weight · (adapted - base)`.
fn moved(sum: Tensor, base: &Tensor, adapted: &Tensor, weight: f64) -> Result<Tensor> {
    Ok((sum + ((adapted - base)? * weight)?)?)
}

impl AdapterMethod for Stack<'_> {
    fn name(&self) -> &'static str {
        "stack"
    }

    fn check(&self, model: &ModelShape) -> Result<()> {
        self.parts.iter().try_for_each(|part| {
            part.adapter
                .method
                .check(model)
                .context(part.not_applicable())
        })
    }

    fn adapt_linear(
        &self,
        site: &LinearSite,
        _weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn LinearAdapter>>> {
        let mut answers = Vec::new();
        for part in &self.parts {
            answers.extend(part.ask(|method, weights| method.adapt_linear(site, weights))?);
        }
        Ok(single(&mut answers).or_else(|| match answers.len() {
            0 => None,
            _ => Some(Box::new(LinearSum(answers))),
        }))
    }

    fn adapt_embedding(
        &self,
        site: &EmbeddingSite,
        _weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn EmbeddingAdapter>>> {
        let mut answers = Vec::new();
        for part in &self.parts {
            answers.extend(part.ask(|method, weights| method.adapt_embedding(site, weights))?);
        }
        Ok(single(&mut answers).or_else(|| match answers.len() {
            0 => None,
            _ => Some(Box::new(EmbeddingSum(answers))),
        }))
    }

    fn trains(&self, site: &ParameterSite) -> bool {
        self.parts
            .iter()
            .any(|part| part.adapter.method.trains(site))
    }

    fn peft_config(&self, _model: &ModelShape, _weights: &AdapterWeights) -> Result<PeftConfig> {
        Err(Error::new(
            "several adapters have no configuration in common",
        ))
    }

    fn default_learning_rate(&self) -> f64 {
        0.0
    }
}

/// The only adapter at a site, if it counts in full: then nothing is added up, and nothing rounded.
fn single<T>(answers: &mut Vec<(T, f64)>) -> Option<T> {
    match answers.as_slice() {
        [(_, 1.0)] => answers.pop().map(|(adapter, _)| adapter),
        _ => None,
    }
}

struct LinearSum(Vec<(Box<dyn LinearAdapter>, f64)>);

impl LinearAdapter for LinearSum {
    fn forward(&self, x: &Tensor, base: &dyn BaseLinear, mode: Mode) -> Result<Tensor> {
        let plain = base.forward(x)?;
        self.0
            .iter()
            .try_fold(plain.clone(), |sum, (adapter, weight)| {
                moved(sum, &plain, &adapter.forward(x, base, mode)?, *weight)
            })
    }

    fn merged_weight(&self, base: &Tensor) -> Result<Tensor> {
        self.0
            .iter()
            .try_fold(base.clone(), |sum, (adapter, weight)| {
                moved(sum, base, &adapter.merged_weight(base)?, *weight)
            })
    }
}

struct EmbeddingSum(Vec<(Box<dyn EmbeddingAdapter>, f64)>);

impl EmbeddingAdapter for EmbeddingSum {
    fn forward(&self, tokens: &Tensor, base: &Tensor) -> Result<Tensor> {
        self.0
            .iter()
            .try_fold(base.clone(), |sum, (adapter, weight)| {
                moved(sum, base, &adapter.forward(tokens, base)?, *weight)
            })
    }

    fn merged_weight(&self, base: &Tensor) -> Result<Tensor> {
        self.0
            .iter()
            .try_fold(base.clone(), |sum, (adapter, weight)| {
                moved(sum, base, &adapter.merged_weight(base)?, *weight)
            })
    }
}

/// A loaded prompt has its rows; only a fresh one starts from text.
struct NoText;

impl TextRows for NoText {
    fn tokens(&self, _text: &str) -> Result<Vec<u32>> {
        Err(Error::new("a merge has no tokenizer"))
    }

    fn rows(&self, _tokens: &[u32]) -> Result<Tensor> {
        Err(Error::new("a merge has no embedded text"))
    }
}
