//! What a method trains on a model that is not there.

use crate::adapters::hooks::{AdapterMethod, BaseLinear, Injector, TextRows, layer_of};
use crate::adapters::storage::AdapterWeights;
use crate::model::ModelConfig;
use crate::model::inventory::{Parameter, ParameterKind};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// The trained weights of a method on a model of some shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Trained {
    /// All of them.
    pub(super) weights: u64,
    /// Of them, matrices of the base that are trained whole.
    pub(super) whole: u64,
    /// Of them, what stands beside linear layers.
    pub(super) beside: u64,
    /// Rows that a soft prompt puts before each example.
    pub(super) prompt_rows: usize,
    /// Blocks from this one on take part in the backward pass.
    pub(super) lowest_block: usize,
}

impl Trained {
    /// Asks the method at every site.
    pub(super) fn by(
        method: &dyn AdapterMethod,
        config: &ModelConfig,
        parameters: &[Parameter],
    ) -> Result<Self> {
        let mut injector = Injector::new(method, AdapterWeights::planned(), config.shape())?;
        let (mut whole, mut lowest) = (0, None);
        let mut reach = |path: Option<&str>| {
            let block = path.map_or(0, |path| layer_of(path).unwrap_or(config.layers));
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
                reach(module);
            }
            let adapted = match parameter.kind {
                ParameterKind::Embedding => injector
                    .adapt_embedding(parameter.module(), &|| zeros(shape))?
                    .is_some(),
                ParameterKind::Linear | ParameterKind::Head => injector
                    .adapt_linear(parameter.module(), &Absent(shape))?
                    .is_some(),
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
            beside: weights.saturating_sub(whole + prompt),
            prompt_rows,
            lowest_block: lowest
                .ok_or_else(|| Error::new("the method trains nothing on this model"))?,
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
