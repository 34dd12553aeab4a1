//! What transformers made of conversations: `tests/golden/chat_templates.py`.

use serde_json::{Map, Value};

use crate::data::{ChatTemplate, Message, Tokenizer};

pub(super) fn read() -> Value {
    serde_json::from_str(include_str!("../../tests/golden/chat_templates.json"))
        .expect("valid JSON")
}

pub(super) fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

pub(super) fn text(value: &Value) -> &str {
    value.as_str().expect("a string")
}

pub(super) fn object(value: &Value) -> &Map<String, Value> {
    value.as_object().expect("an object")
}

pub(super) fn messages(value: &Value) -> Vec<Message> {
    list(value)
        .iter()
        .map(|message| Message::from_json(message.clone()).expect("a message"))
        .collect()
}

/// `byte_level` or `byte_fallback`, with a chat template.
pub(super) fn tokenizer(golden: &Value, name: &str, template: &str) -> Tokenizer {
    let json = golden["tokenizers"][name].to_string();
    let mut tokenizer =
        Tokenizer::new(json.as_bytes(), object(&golden["config"])).expect("a tokenizer");
    tokenizer.set_chat_template(ChatTemplate::new(template).expect("a template"));
    tokenizer
}
