//! The base before its first step: configuration files and random weights, as a Hugging Face folder in f32.

use super::shape::Shape;
use super::write_weights;
use crate::adapters::storage::{AdapterWeights, Init};
use crate::data::Tokenizer;
use crate::model::ModelConfig;
use crate::model::config::ModelType;
use crate::model::inventory::{Parameter, ParameterKind, inventory};
use crate::{Context, Error, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Standard deviation of a random weight.
const DEVIATION: f64 = 0.02;

/// `config.json` of a base of this shape, as transformers writes it.
pub(super) fn config_json(shape: &Shape, tokenizer: &Tokenizer, dtype: DType) -> Result<Value> {
    let architecture = match shape.model_type {
        ModelType::Llama => "LlamaForCausalLM",
        ModelType::Mistral => "MistralForCausalLM",
        ModelType::Qwen2 => "Qwen2ForCausalLM",
        ModelType::Qwen3 => "Qwen3ForCausalLM",
    };
    let tokens = &shape.special_tokens;
    let mut config = json!({
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": optional_id(tokenizer, tokens.bos.as_deref())?,
        "dtype": match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        },
        "eos_token_id": stop_ids(shape, tokenizer)?,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": DEVIATION,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "model_type": shape.model_type.name(),
        "num_attention_heads": shape.attention_heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "pad_token_id": optional_id(tokenizer, tokens.pad.as_deref())?,
        "rms_norm_eps": shape.rms_norm_epsilon,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied_head,
        "use_cache": true,
        "vocab_size": shape.vocabulary,
    });
    match shape.model_type {
        ModelType::Llama => {
            config["attention_bias"] = false.into();
            config["mlp_bias"] = false.into();
        }
        ModelType::Mistral => config["sliding_window"] = Value::Null,
        ModelType::Qwen2 => config["use_sliding_window"] = false.into(),
        ModelType::Qwen3 => {
            config["attention_bias"] = false.into();
            config["use_sliding_window"] = false.into();
        }
    }
    config.sort_all_objects();
    Ok(config)
}

/// `generation_config.json`: greedy, and where to stop.
pub(super) fn generation_config_json(shape: &Shape, tokenizer: &Tokenizer) -> Result<Value> {
    let tokens = &shape.special_tokens;
    let mut config = Map::new();
    for (name, token) in [("bos_token_id", &tokens.bos), ("pad_token_id", &tokens.pad)] {
        if let Some(token) = token {
            config.insert(name.to_owned(), id(tokenizer, token)?.into());
        }
    }
    config.insert("eos_token_id".to_owned(), stop_ids(shape, tokenizer)?);
    config.insert("max_length".to_owned(), shape.max_positions.into());
    Ok(Value::Object(config))
}

/// One id, or a list where there are several.
fn stop_ids(shape: &Shape, tokenizer: &Tokenizer) -> Result<Value> {
    let stops = shape.special_tokens.stops();
    let ids: Vec<u32> = stops
        .into_iter()
        .map(|token| id(tokenizer, token))
        .collect::<Result<_>>()?;
    Ok(match ids[..] {
        [only] => only.into(),
        _ => ids.into(),
    })
}

fn optional_id(tokenizer: &Tokenizer, token: Option<&str>) -> Result<Option<u32>> {
    token.map(|token| id(tokenizer, token)).transpose()
}

fn id(tokenizer: &Tokenizer, token: &str) -> Result<u32> {
    tokenizer
        .token_id(token)
        .ok_or_else(|| Error::new(format!("the tokenizer lacks the special token `{token}`")))
}

/// Writes random f32 weights into `folder`: they depend on the seed and each weight's name alone.
///
/// Matrices are normal with deviation 0.02; those that write into the residual stream get `1/√(2·layers)` of it, so that
/// its variance does not grow with depth (GPT-2). Norms are 1, biases 0.
pub(super) fn write_random_weights(folder: &Path, seed: u64) -> Result<()> {
    let config = ModelConfig::read(folder)?;
    let mut weights = AdapterWeights::fresh(seed, &Device::Cpu);
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for parameter in inventory(&config) {
        let start = initial(&parameter, config.layers);
        let tensor = weights
            .var(&parameter.name, parameter.shape.clone(), start)
            .at(&parameter.name)?;
        tensors.insert(parameter.name, tensor);
    }
    write_weights(folder, &tensors)
}

fn initial(parameter: &Parameter, layers: usize) -> Init<'static> {
    let residual = ["o_proj", "down_proj"]
        .iter()
        .any(|name| parameter.module().ends_with(name));
    match parameter.kind {
        ParameterKind::Norm => Init::Ones,
        ParameterKind::Bias => Init::Zeros,
        ParameterKind::Linear if residual => Init::Normal {
            deviation: DEVIATION / (2.0 * layers as f64).sqrt(),
        },
        ParameterKind::Linear | ParameterKind::Embedding | ParameterKind::Head => Init::Normal {
            deviation: DEVIATION,
        },
    }
}
