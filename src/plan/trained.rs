//! What a method trains on a model that is not there.

use crate::adapters::hooks::{AdapterMethod, BaseLinear, Injector, Mode, TextRows, layer_of};
use crate::adapters::storage::AdapterWeights;
use crate::model::ModelConfig;
use crate::model::inventory::{Parameter, ParameterKind};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeSet;

/// The trained weights of a method on a model of some shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Trained {
    /// All of them.
    pub(super) weights: u64,
    /// Of them, matrices of the base that are trained whole.
    pub(super) whole: u64,
    /// Of those, the ones of linear layers in blocks.
    pub(super) whole_linear: u64,
    /// Of them, what stands beside linear layers.
    pub(super) beside: u64,
    /// Rows that a soft prompt puts before each example.
    pub(super) prompt_rows: usize,
    /// Blocks from this one on take part in the backward pass.
    pub(super) lowest_block: usize,
    /// Whether anything before the blocks is trained.
    pub(super) input: bool,
    /// Blocks whose output projection of attention is trained, or something beside it.
    pub(super) outputs: usize,
    /// Weights of the largest low-rank update, of both its factors.
    pub(super) widest_update: u64,
    /// Whether something of a layer's input is dropped in training.
    pub(super) drops: bool,
}

/// Where the output projection of attention is in a block.
const OUTPUT_PROJECTION: &str = ".self_attn.o_proj";
/// Any step of a training.
const TRAINING: Mode = Mode::Train {
    seed: 0,
    first_row: 0,
};

impl Trained {
    /// Asks the method at every site.
    pub(super) fn by(
        method: &dyn AdapterMethod,
        config: &ModelConfig,
        parameters: &[Parameter],
    ) -> Result<Self> {
        let mut injector = Injector::new(method, AdapterWeights::planned(), config.shape())?;
        let (mut whole, mut whole_linear, mut lowest) = (0, 0, None);
        let (mut input_trains, mut widest_update, mut drops) = (false, 0u64, false);
        let mut outputs = BTreeSet::new();
        let mut reach = |path: Option<&str>| {
            let block = path.map_or(0, |path| layer_of(path).unwrap_or(config.layers));
            input_trains |= path.is_none();
            if let Some(path) = path.filter(|path| path.ends_with(OUTPUT_PROJECTION)) {
                outputs.insert(path.to_owned());
            }
            lowest = Some(lowest.map_or(block, |lowest: usize| lowest.min(block)));
        };
        for parameter in parameters {
            let shape = &parameter.shape;
            let input = parameter.kind == ParameterKind::Embedding;
            let module = (!input).then_some(parameter.module());
            if injector
                .parameter(&parameter.name, || zeros(shape))?
                .is_some()
            {
                whole += parameter.count() as u64;
                if parameter.kind == ParameterKind::Linear {
                    whole_linear += parameter.count() as u64;
                }
                reach(module);
            }
            let adapted = match parameter.kind {
                ParameterKind::Embedding => injector
                    .adapt_embedding(parameter.module(), &|| zeros(shape))?
                    .is_some(),
                ParameterKind::Linear | ParameterKind::Head => {
                    let adapter = injector.adapt_linear(parameter.module(), &Absent(shape))?;
                    let update = adapter.as_ref().and_then(|layer| layer.low_rank(TRAINING));
                    if let Some(update) = update {
                        let weights = update.a.elem_count() + update.b.elem_count();
                        widest_update = widest_update.max(weights as u64);
                        drops |= update.dropout.is_some();
                    }
                    adapter.is_some()
                }
                ParameterKind::Norm | ParameterKind::Bias => false,
            };
            if adapted {
                reach(module);
            }
        }
        let prompt_rows = injector
            .soft_prompt(&AbsentRows(config.hidden_size))?
            .map_or(0, |prompt| prompt.len());
        if prompt_rows > 0 {
            reach(None);
        }
        let weights = injector.finish()?.parameter_count() as u64;
        let prompt = (prompt_rows * config.hidden_size) as u64;
        Ok(Self {
            weights,
            whole,
            whole_linear,
            beside: weights.saturating_sub(whole + prompt),
            prompt_rows,
            lowest_block: lowest
                .ok_or_else(|| Error::new("the method trains nothing on this model"))?,
            input: input_trains,
            outputs: outputs.len(),
            widest_update,
            drops,
        })
    }
}

/// A layer of which only the shape is known.
struct Absent<'a>(&'a [usize]);

impl BaseLinear for Absent<'_> {
    fn forward(&self, _x: &Tensor) -> Result<Tensor> {
        Err(Error::new("a plan computes nothing"))
    }

    fn weight(&self) -> Result<Tensor> {
        zeros(self.0)
    }

    fn in_features(&self) -> usize {
        self.0[1]
    }

    fn out_features(&self) -> usize {
        self.0[0]
    }
}

/// Embedding rows of which only the length is known.
struct AbsentRows(usize);

impl TextRows for AbsentRows {
    fn tokens(&self, _text: &str) -> Result<Vec<u32>> {
        Ok(vec![0])
    }

    fn rows(&self, tokens: &[u32]) -> Result<Tensor> {
        zeros(&[tokens.len(), self.0])
    }
}

/// One zero in every place: a plan takes no memory for weights, however large a configuration says that they are.
fn zeros(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?.broadcast_as(shape)?)
}
