//! `generation_config.json`: how the makers of a model suggest to generate with it.

use super::{GenerationOptions, Sampling};
use crate::adapters::storage::read_text;
use crate::data::Tokenizer;
use crate::model::ModelConfig;
use crate::{Context, Error, IntoError, Result};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::Path;

const FILE: &str = "generation_config.json";

/// What a model folder says about generating: `generation_config.json`, and the end tokens of `config.json` where it
/// names none.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// `eos_token_id`: tokens that end a text.
    pub end_tokens: Vec<u32>,
    /// `do_sample`: whether to draw tokens rather than take the likeliest.
    pub samples: bool,
    /// `temperature`.
    pub temperature: Option<f64>,
    /// `top_k`.
    pub top_k: Option<usize>,
    /// `top_p`.
    pub top_p: Option<f64>,
    /// `min_p`.
    pub min_p: Option<f64>,
    /// `repetition_penalty`.
    pub repetition_penalty: Option<f64>,
    /// `stop_strings`: text that ends a generation.
    pub stop: Vec<String>,
    /// What was read, has an effect in transformers and has none here; for the user to know.
    pub notes: Vec<String>,
}

/// Fields that change what transformers generates, each with the value that does not.
const NOT_IMPLEMENTED: [(&str, f64); 15] = [
    ("num_beams", 1.0),
    ("typical_p", 1.0),
    ("top_h", 0.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("guidance_scale", 1.0),
    ("penalty_alpha", 0.0),
    ("diversity_penalty", 0.0),
    ("num_beam_groups", 1.0),
    ("max_time", f64::INFINITY),
];
/// The same of fields that are no numbers: null, false and empty have no effect.
const NOT_IMPLEMENTED_LISTS: [&str; 11] = [
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "token_healing",
    "watermarking_config",
    "force_words_ids",
    "dola_layers",
];

impl GenerationConfig {
    /// Reads `folder`, whose `config.json` is `model`. A folder without `generation_config.json` is fine.
    pub fn read(folder: &Path, model: &ModelConfig) -> Result<Self> {
        let path = folder.join(FILE);
        let mut config = match read_text(&path) {
            Ok(text) => Self::parse(&text).at(path.display())?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::default(),
            Err(error) => return Err(error).at(path.display()),
        };
        if config.end_tokens.is_empty() {
            config.end_tokens.clone_from(&model.end_tokens);
        }
        Ok(config)
    }

    /// Reads the text of a `generation_config.json`.
    pub fn parse(text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text).map_err(IntoError::into_error)?;
        let Value::Object(fields) = json else {
            return Err(Error::new("expected a JSON object of fields"));
        };
        let number = |name: &str| read(&fields, name, "a number", Value::as_f64);
        let config = Self {
            end_tokens: end_tokens(&fields)?,
            samples: read(&fields, "do_sample", "true or false", Value::as_bool)?.unwrap_or(false),
            temperature: number("temperature")?,
            top_k: read(&fields, "top_k", "a whole number", |value| {
                usize::try_from(value.as_u64()?).ok()
            })?,
            top_p: number("top_p")?,
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
            stop: stop_strings(&fields)?,
            notes: notes(&fields),
        };
        // As a file's mistake, not as one of the command line.
        let sampling = config.sampling().validated();
        sampling.map_err(|error| Error::new(error.to_string()))?;
        Ok(config)
    }

    /// How to choose tokens: as the file says, and as transformers does where it says nothing.
    pub fn sampling(&self) -> Sampling {
        let default = Sampling::default();
        Sampling {
            temperature: match self.samples {
                true => self.temperature.unwrap_or(1.0),
                false => 0.0,
            },
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(default.repetition_penalty),
            seed: default.seed,
        }
    }

    /// Options as the folder suggests them. A text ends where the file says and where the tokenizer says.
    pub fn options(&self, tokenizer: &Tokenizer) -> GenerationOptions {
        let mut end_tokens: BTreeSet<u32> = self.end_tokens.iter().copied().collect();
        end_tokens.extend(tokenizer.stop_tokens());
        GenerationOptions {
            end_tokens,
            stop: self.stop.clone(),
            sampling: self.sampling(),
            ..GenerationOptions::default()
        }
    }
}

/// A field that may be absent or null.
fn read<T>(
    fields: &Map<String, Value>,
    name: &str,
    wanted: &str,
    as_wanted: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match as_wanted(value) {
            Some(read) => Ok(Some(read)),
            None => Err(Error::new(format!("`{name}` is {value}, not {wanted}"))),
        },
    }
}

/// One token or a list of them. Some published files say -1 for none.
fn end_tokens(fields: &Map<String, Value>) -> Result<Vec<u32>> {
    let listed = read(
        fields,
        "eos_token_id",
        "a token id or a list of them",
        |value| {
            let listed = match value {
                Value::Array(tokens) => tokens.iter().collect(),
                single => vec![single],
            };
            let tokens = listed
                .into_iter()
                .map(Value::as_i64)
                .collect::<Option<Vec<_>>>()?;
            let tokens = tokens.into_iter().filter(|token| *token >= 0);
            tokens
                .map(|token| u32::try_from(token).ok())
                .collect::<Option<Vec<u32>>>()
        },
    )?;
    Ok(listed.unwrap_or_default())
}

/// One string or a list of them.
fn stop_strings(fields: &Map<String, Value>) -> Result<Vec<String>> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let listed = read(
        fields,
        "stop_strings",
        "a string or a list of them",
        |value| match value {
            Value::Array(texts) => texts.iter().map(text).collect(),
            single => Some(vec![text(single)?]),
        },
    )?;
    Ok(listed.unwrap_or_default())
}

fn notes(fields: &Map<String, Value>) -> Vec<String> {
    let numbers = NOT_IMPLEMENTED.iter().filter_map(|(name, neutral)| {
        let value = fields.get(*name)?;
        (value.as_f64() != Some(*neutral)).then_some((*name, value))
    });
    let others = NOT_IMPLEMENTED_LISTS
        .iter()
        .filter_map(|name| Some((*name, fields.get(*name)?)));
    let without_effect = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    numbers
        .chain(others)
        .filter(|(_, value)| !without_effect(value))
        .map(|(name, value)| {
            format!("`{name}` of `{FILE}` is {value}: transformers follows it, retune does not")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_a_chat_model_is_read_as_transformers_reads_it() -> Result<()> {
        let config = GenerationConfig::parse(
            r#"{"bos_token_id": 151643, "do_sample": true, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
                "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "transformers_version": "4.37.0"}"#,
        )?;
        assert_eq!(config.end_tokens, [151_645, 151_643]);
        assert_eq!(
            config.sampling(),
            Sampling {
                temperature: 0.7,
                top_k: 20,
                top_p: 0.8,
                repetition_penalty: 1.1,
                ..Sampling::default()
            }
        );
        assert_eq!(config.notes, Vec::<String>::new());
        Ok(())
    }

    #[test]
    fn a_temperature_without_do_sample_has_no_effect() -> Result<()> {
        let config =
            GenerationConfig::parse(r#"{"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}"#)?;
        assert_eq!(config.sampling().temperature, 0.0);
        assert_eq!(config.sampling().top_p, 0.9);
        assert_eq!(config.end_tokens, [2]);
        Ok(())
    }

    #[test]
    fn fields_that_are_not_followed_are_noted() -> Result<()> {
        let config = GenerationConfig::parse(
            r#"{"num_beams": 4, "typical_p": 1.0, "suppress_tokens": [], "bad_words_ids": [[1]], "min_length": 0}"#,
        )?;
        let names: Vec<_> = config
            .notes
            .iter()
            .map(|note| note.split('`').nth(1))
            .collect();
        assert_eq!(names, [Some("num_beams"), Some("bad_words_ids")]);
        Ok(())
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (text, wanted) in [
            (r#"{"temperature": "hot"}"#, "`temperature`"),
            (r#"{"eos_token_id": "</s>"}"#, "`eos_token_id`"),
            (r#"{"top_p": 1.5}"#, "top-p"),
            (r#"{"repetition_penalty": 0}"#, "repetition penalty"),
            ("[]", "object"),
        ] {
            let error = GenerationConfig::parse(text).expect_err("it is nonsense");
            assert!(error.to_string().contains(wanted), "{text}: {error}");
        }
    }
}
