//! `adapter_config.json`, as PEFT 0.21 writes it: an object with sorted keys.

use crate::{Context, Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Name of the file in an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// Fields that say where an adapter comes from or how it was made, and never change what it computes.
const INERT: [&str; 9] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "tokenizer_name_or_path",
];

/// The fields of an adapter's configuration.
///
/// A method takes the fields it implements; [`PeftConfig::finish`] refuses those that are left and would change the
/// result. So a configuration that we half understand is an error, never a silently different adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct PeftConfig {
    fields: Map<String, Value>,
}

impl PeftConfig {
    /// A configuration of `peft_type` with the fields that every method has.
    pub fn new(peft_type: &str) -> Self {
        let fields = [
            ("auto_mapping", Value::Null),
            ("base_model_name_or_path", Value::Null),
            ("inference_mode", json!(true)),
            ("peft_type", json!(peft_type)),
            ("peft_version", json!("0.21.2")),
            ("revision", Value::Null),
            ("task_type", json!("CAUSAL_LM")),
        ];
        Self {
            fields: fields
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
        }
    }

    /// Reads `folder/adapter_config.json`.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        let text = super::read_small(&path)
            .at(path.display())
            .map_err(|error| {
                error.hint(
                    "an adapter folder holds `adapter_config.json` and `adapter_model.safetensors`",
                )
            })?;
        let fields: Map<String, Value> = serde_json::from_slice(&text).at(path.display())?;
        Ok(Self { fields })
    }

    /// The kind of adapter in PEFT's words, such as `LORA`.
    pub fn peft_type(&self) -> &str {
        self.text("peft_type")
    }

    /// The base the adapter was trained on, as its file names it.
    pub fn base_model(&self) -> &str {
        self.text("base_model_name_or_path")
    }

    fn text(&self, field: &str) -> &str {
        self.fields
            .get(field)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The value of `field`, if it is there and not null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// Whether `field` asks for something: there, and not null, false or empty.
    pub fn asks_for(&self, field: &str) -> bool {
        self.fields.get(field).is_some_and(asks_for_something)
    }

    /// The fields that ask for something, without those that never change what an adapter computes.
    pub fn asked(&self) -> impl Iterator<Item = (&str, &Value)> {
        let fields = self
            .fields
            .iter()
            .map(|(name, value)| (name.as_str(), value));
        fields.filter(|(name, value)| {
            asks_for_something(value) && *name != "task_type" && !INERT.contains(name)
        })
    }

    /// Sets `field`.
    #[must_use]
    pub fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(field.to_owned(), value.into());
        self
    }

    /// Takes `field` out of the configuration; null is the same as missing.
    pub fn take<T: DeserializeOwned>(&mut self, field: &str) -> Result<Option<T>> {
        match self.fields.remove(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value.clone())
                .map(Some)
                .map_err(|error| {
                    Error::new(format!("field `{field}` cannot be `{value}`: {error}"))
                        .at(CONFIG_FILE)
                }),
        }
    }

    /// Takes `field`, which must be there.
    pub fn require<T: DeserializeOwned>(&mut self, field: &str) -> Result<T> {
        self.take(field)?
            .ok_or_else(|| Error::new(format!("field `{field}` is missing")).at(CONFIG_FILE))
    }

    /// Refuses what is left and would change the result.
    pub fn finish(&self) -> Result<()> {
        if let Some(task) = self.get("task_type").filter(|task| *task != "CAUSAL_LM") {
            return Err(
                Error::new(format!("the adapter is for task `{task}`, not `CAUSAL_LM`"))
                    .at(CONFIG_FILE),
            );
        }
        let left: Vec<String> = self
            .asked()
            .map(|(name, value)| format!("`{name}`: {value}"))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        Err(Error::new(format!(
            "the adapter asks for what is not implemented: {}",
            left.join(", ")
        ))
        .at(CONFIG_FILE)
        .hint("with these fields ignored its results would be wrong"))
    }

    /// The file's bytes: sorted keys, two spaces, no newline at the end.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let mut fields = self.fields.clone();
        fields.sort_keys();
        serde_json::to_vec_pretty(&fields).context("cannot write the adapter's configuration")
    }
}

fn asks_for_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(entries) => !entries.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_taken_and_matters_is_refused() -> Result<()> {
        let mut config = PeftConfig::new("LORA")
            .with("r", 8)
            .with("use_dora", true)
            .with("use_rslora", false)
            .with("loftq_config", json!({}))
            .with("megatron_core", "megatron.core");
        assert_eq!(config.take::<usize>("r")?, Some(8));
        let message = config.finish().expect_err("DoRA is not taken").to_string();
        assert!(message.contains("`use_dora`: true"), "{message}");
        assert!(!message.contains("megatron"), "{message}");
        Ok(())
    }

    #[test]
    fn keys_are_sorted_as_peft_sorts_them() -> Result<()> {
        let text =
            String::from_utf8(PeftConfig::new("LORA").with("r", 8).to_json()?).expect("UTF-8");
        assert!(
            text.starts_with("{\n  \"auto_mapping\": null,\n  \"base_model"),
            "{text}"
        );
        assert!(text.ends_with("\"task_type\": \"CAUSAL_LM\"\n}"), "{text}");
        Ok(())
    }

    #[test]
    fn a_field_asks_for_something_unless_it_is_null_false_or_empty() {
        let config = |value: Value| PeftConfig::new("LORA").with("field", value);
        for nothing in [json!(null), json!(false), json!(""), json!([]), json!({})] {
            assert!(!config(nothing.clone()).asks_for("field"), "{nothing}");
            assert!(config(nothing).finish().is_ok());
        }
        for something in [
            json!(true),
            json!(0),
            json!(0.0),
            json!("x"),
            json!([0]),
            json!({"x": 0}),
        ] {
            assert!(config(something.clone()).asks_for("field"), "{something}");
            assert!(config(something).finish().is_err());
        }
        assert!(!PeftConfig::new("LORA").asks_for("field"));
    }

    #[test]
    fn what_changes_no_result_may_be_left() {
        let config = PeftConfig::new("LORA")
            .with("base_model_name_or_path", "a/base")
            .with("revision", "main")
            .with("qalora_group_size", 16);
        assert!(config.finish().is_ok());
        assert_eq!(config.peft_type(), "LORA");
        assert_eq!(config.base_model(), "a/base");
        assert_eq!(PeftConfig::new("LORA").base_model(), "");
    }

    #[test]
    fn an_adapter_of_another_task_is_refused() {
        let config = |task: Value| PeftConfig::new("LORA").with("task_type", task);
        assert!(config(json!("CAUSAL_LM")).finish().is_ok());
        assert!(config(Value::Null).finish().is_ok());
        let error = config(json!("SEQ_CLS")).finish().expect_err("another task");
        assert!(error.to_string().contains("SEQ_CLS"), "{error}");
    }

    #[test]
    fn a_field_is_taken_once_and_as_what_it_must_be() -> Result<()> {
        let mut config = PeftConfig::new("LORA")
            .with("r", 8)
            .with("none", Value::Null);
        assert_eq!(config.get("r"), Some(&json!(8)));
        assert_eq!(config.get("none"), None);
        assert_eq!(config.take::<usize>("none")?, None);
        assert_eq!(config.require::<usize>("r")?, 8);
        assert_eq!(config.take::<usize>("r")?, None);
        let error = config.require::<usize>("r").expect_err("taken");
        assert_eq!(
            error.to_string(),
            "adapter_config.json: field `r` is missing"
        );
        let error = config
            .with("r", "eight")
            .take::<usize>("r")
            .expect_err("no number");
        assert!(
            error
                .to_string()
                .contains("field `r` cannot be `\"eight\"`"),
            "{error}"
        );
        Ok(())
    }

    #[test]
    fn what_is_written_is_read_back() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let error = PeftConfig::read(folder.path()).expect_err("no file");
        assert!(error.hint_text().is_some(), "{error}");
        let config = PeftConfig::new("LORA").with("r", 8);
        std::fs::write(folder.path().join(CONFIG_FILE), config.to_json()?).expect("written");
        assert_eq!(PeftConfig::read(folder.path())?, config);
        Ok(())
    }
}
