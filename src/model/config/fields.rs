//! The fields of a `config.json`, taken one by one; what is left over at the end must be without effect.

use super::ModelType;
use crate::data::{quoted, shortened};
use crate::{Error, Result};
use serde_json::{Map, Value};

/// A JSON object being read. Problems are collected, so that one error names them all.
pub(super) struct Fields {
    map: Map<String, Value>,
    missing: Vec<&'static str>,
    problems: Vec<String>,
    refused: Vec<String>,
}

impl Fields {
    pub(super) fn new(map: Map<String, Value>) -> Self {
        Self {
            map,
            missing: Vec::new(),
            problems: Vec::new(),
            refused: Vec::new(),
        }
    }

    /// Whether the field is there, be it null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// Takes a field out; null counts as absent.
    pub(super) fn value(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn size(&mut self, name: &str) -> Option<usize> {
        let value = self.value(name)?;
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        self.expect(name, &value, size, "a whole number")
    }

    pub(super) fn number(&mut self, name: &str) -> Option<f64> {
        let value = self.value(name)?;
        self.expect(
            name,
            &value,
            value.as_f64().filter(|number| number.is_finite()),
            "a number",
        )
    }

    pub(super) fn flag(&mut self, name: &str) -> Option<bool> {
        let value = self.value(name)?;
        self.expect(name, &value, value.as_bool(), "true or false")
    }

    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        let value = self.value(name)?;
        self.expect(name, &value, value.as_str().map(str::to_owned), "a text")
    }

    pub(super) fn texts(&mut self, name: &str) -> Option<Vec<String>> {
        let value = self.value(name)?;
        let texts = value.as_array().and_then(|list| {
            list.iter()
                .map(|text| text.as_str().map(str::to_owned))
                .collect()
        });
        self.expect(name, &value, texts, "a list of texts")
    }

    pub(super) fn object(&mut self, name: &str) -> Option<Map<String, Value>> {
        let value = self.value(name)?;
        self.expect(name, &value, value.as_object().cloned(), "an object")
    }

    /// A size without which there is no model; 0 stands in until `finish` reports it.
    pub(super) fn required_size(&mut self, name: &'static str) -> usize {
        self.require(name);
        self.size(name).unwrap_or(0)
    }

    /// A number without which nothing can be computed; 0 stands in until `finish` reports it.
    pub(super) fn required_number(&mut self, name: &'static str) -> f64 {
        self.require(name);
        self.number(name).unwrap_or(0.0)
    }

    fn require(&mut self, name: &'static str) {
        if self.map.get(name).is_none_or(Value::is_null) {
            self.missing.push(name);
        }
    }

    pub(super) fn required_text(&mut self, name: &'static str) -> Result<String> {
        self.text(name).ok_or_else(|| {
            Error::new(format!("the field `{name}` is missing or not a text"))
                .hint("expected the `config.json` of a Hugging Face checkpoint")
        })
    }

    /// Records a field that contradicts itself or another.
    pub(super) fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// Records a field that asks for something that is not implemented.
    pub(super) fn refuse(&mut self, name: &str, value: impl Into<String>, reason: &str) {
        let (name, value) = (quoted(name), value.into());
        let value = shortened(&value);
        self.refused.push(format!("{name} = {value} ({reason})"));
    }

    fn expect<T>(
        &mut self,
        name: &str,
        value: &Value,
        read: Option<T>,
        expected: &str,
    ) -> Option<T> {
        if read.is_none() {
            self.problems
                .push(format!("`{name}` is {}, expected {expected}", shown(value)));
        }
        read
    }

    /// Ends the reading of an object inside `outer`: hands over its problems and whatever was left over in it.
    pub(super) fn finish_inside(self, name: &str, outer: &mut Self) {
        for problem in self
            .missing
            .iter()
            .map(|field| format!("`{field}` is missing"))
            .chain(self.problems)
        {
            outer.problems.push(format!("{name}: {problem}"));
        }
        for (field, value) in &self.map {
            let neutral = field == "partial_rotary_factor" && value.as_f64() == Some(1.0);
            if !neutral && !is_empty(value) {
                outer.refuse(&format!("{name}.{field}"), shown(value), "unknown field");
            }
        }
    }

    /// Reports everything wrong so far, and every field left over that may have an effect.
    pub(super) fn finish(mut self, model_type: ModelType) -> Result<()> {
        for (name, value) in std::mem::take(&mut self.map) {
            if is_empty(&value) || INERT.contains(&name.as_str()) {
                continue;
            }
            match CHANGES_THE_RESULT.iter().find(|(known, ..)| *known == name) {
                Some((_, neutral, _)) if neutral.is_some() && value.as_f64() == *neutral => {}
                Some((.., reason)) => self.refuse(&name, shown(&value), reason),
                None => self.refuse(&name, shown(&value), "unknown field"),
            }
        }
        let missing = self
            .missing
            .iter()
            .map(|name| format!("the required field `{name}` is missing"));
        let wrong: Vec<String> = missing.chain(self.problems).collect();
        if !wrong.is_empty() {
            return Err(
                Error::new(wrong.join("; ")).hint("compare the file with the original on the hub")
            );
        }
        if !self.refused.is_empty() {
            let plural = if self.refused.len() == 1 {
                "a field asks"
            } else {
                "fields ask"
            };
            return Err(Error::new(format!(
                "{plural} for something that is not implemented for `{}`: {}",
                model_type.name(),
                self.refused.join(", ")
            ))
            .hint(
                "going on would compute something other than the model; a field that you know to be without effect \
                 can be removed from a copy of the file",
            ));
        }
        Ok(())
    }
}

/// Null, false, `""`, `[]` and `{}` switch nothing on.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// A value as JSON, cut to what fits into a sentence.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 {
        return text;
    }
    text.chars().take(59).chain(['…']).collect()
}

/// Fields without effect on what a decoder computes, whatever their value.
const INERT: &[&str] = &[
    // Where the file comes from.
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "is_llama_config",
    "name_or_path",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    // How a fresh model starts, and how transformers runs it.
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "chunk_size_feed_forward",
    "initializer_range",
    "is_decoder",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "torchscript",
    "use_cache",
    "use_return_dict",
    // Heads and tasks other than language modelling.
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "prefix",
    "problem_type",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    // Generation settings, which transformers drops from this file.
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "target_lookbehind",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

/// Known fields that are not implemented: name, the value at which they do nothing, and what they do.
const CHANGES_THE_RESULT: &[(&str, Option<f64>, &str)] = &[
    (
        "attention_bias",
        None,
        "biases this architecture does not have",
    ),
    ("attention_multiplier", None, "other scale of the attention"),
    ("attn_logit_softcapping", None, "capped attention scores"),
    ("clip_qkv", None, "clipped queries, keys and values"),
    ("compression_config", None, "quantised weights"),
    ("embedding_multiplier", Some(1.0), "scaled embeddings"),
    ("final_logit_softcapping", None, "capped logits"),
    ("is_encoder_decoder", None, "an encoder"),
    ("logit_scale", Some(1.0), "scaled logits"),
    ("logits_scaling", Some(1.0), "scaled logits"),
    ("mlp_bias", None, "biases this architecture does not have"),
    ("num_experts", None, "mixture of experts"),
    ("num_local_experts", None, "mixture of experts"),
    (
        "pretraining_tp",
        Some(1.0),
        "weights split as in pretraining",
    ),
    (
        "quantization_config",
        None,
        "quantised weights; take the repository with the original ones",
    ),
    (
        "query_pre_attn_scalar",
        None,
        "other scale of the attention",
    ),
    ("residual_multiplier", Some(1.0), "scaled residuals"),
    ("rope_interleaved", None, "rotation of neighbouring pairs"),
    ("sliding_window", None, "sliding window"),
    ("use_mrope", None, "multimodal rotary positions"),
    ("use_qk_norm", None, "norms on queries and keys"),
    ("use_sliding_window", None, "sliding window"),
];
