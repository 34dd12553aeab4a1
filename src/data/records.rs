//! What a record says, recognised by its keys.
//!
//! | keys | record | known as |
//! |---|---|---|
//! | `messages`, `tools` | a conversation | OpenAI, TRL |
//! | `conversations`, `system`, `tools` | a conversation | ShareGPT, LLaMA-Factory |
//! | `instruction`, `input`, `output`, `system`, `history` | an instruction | Alpaca |
//! | `prompt`, `completion` | a completion, or a conversation if both are lists of messages | TRL |
//! | `text` | plain text | TRL |
//!
//! The first row that fits is taken, so a record with `messages` and `text` is a conversation. Other keys are ignored.

use serde_json::{Map, Value, json};

use crate::data::quoted;
use crate::data::tokenizer::check_length;
use crate::{Error, Result};

/// One record of a data file.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// Messages between a user, a model and its tools.
    Conversation(Conversation),
    /// A task and its solution, to be laid out as a conversation if the model has a chat template.
    Instruction(Instruction),
    /// A text and how it goes on.
    Completion {
        /// The beginning, which is not learned.
        prompt: String,
        /// What comes next.
        completion: String,
    },
    /// Plain text, learned from beginning to end.
    Text(String),
}

/// Messages, and what the model may call.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// The messages in order.
    pub messages: Vec<Message>,
    /// The tools' schemas as a list, in the form the template expects.
    pub tools: Option<Value>,
    /// Assistant messages before this index are not learned: they belong to the prompt.
    pub learn_from: usize,
}

/// A task and its solution.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Instruction {
    /// General instructions that precede the task.
    pub system: Option<String>,
    /// Earlier tasks and their solutions.
    pub history: Vec<(String, String)>,
    /// The task.
    pub instruction: String,
    /// What the task is about; may be empty.
    pub input: String,
    /// The solution.
    pub output: String,
}

/// One message of a conversation, with all fields that a chat template may read.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    fields: Map<String, Value>,
}

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

impl Message {
    /// A message that says `content`.
    pub fn new(role: &str, content: &str) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_owned(), role.into());
        fields.insert("content".to_owned(), content.into());
        Self { fields }
    }

    /// A message in OpenAI's form: `role`, `content` (a string or a list of text parts), `tool_calls`, and whatever
    /// else the template reads.
    ///
    /// A tool call's `arguments` may be JSON in a string, as OpenAI writes it; templates expect the object, so the
    /// string is read.
    pub fn from_json(value: Value) -> Result<Self> {
        let Value::Object(mut fields) = value else {
            return Err(Error::new(format!(
                "expected an object, found {}",
                kind(&value)
            )));
        };
        let role = match fields.get("role") {
            Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
            Some(Value::String(role)) => {
                return Err(Error::new(format!("no role is called {}", quoted(role)))
                    .hint(format!("the roles are {}", listed(ROLES))));
            }
            Some(other) => return Err(expected("role", "a string", other)),
            None => return Err(missing("role", &fields)),
        };
        let calls = match fields.get_mut("tool_calls") {
            None | Some(Value::Null) => false,
            Some(Value::Array(calls)) => {
                calls.iter_mut().try_for_each(read_arguments)?;
                !calls.is_empty()
            }
            Some(other) => return Err(expected("tool_calls", "a list", other)),
        };
        match fields.get("content") {
            Some(Value::String(_)) => {}
            Some(Value::Array(parts)) => parts.iter().try_for_each(check_part)?,
            None | Some(Value::Null) if role == "assistant" && calls => {}
            None => return Err(missing("content", &fields)),
            Some(other) => {
                return Err(expected(
                    "content",
                    "a string or a list of text parts",
                    other,
                ));
            }
        }
        match fields.get("weight") {
            None | Some(Value::Null) => {}
            Some(weight) if weight == 0 || weight == 1 => {}
            Some(other) => {
                let weight = quoted(&other.to_string());
                return Err(Error::new(format!("`weight` is {weight}, not 0 or 1")));
            }
        }
        Ok(Self { fields })
    }

    /// Who says it.
    pub fn role(&self) -> &str {
        self.fields
            .get("role")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// Whether the model is to learn it: an assistant's message, unless its `weight` is 0.
    pub fn is_learned(&self) -> bool {
        self.role() == "assistant" && self.fields.get("weight").is_none_or(|weight| *weight != 0)
    }

    /// What it says: its content, with text parts joined.
    pub fn text(&self) -> String {
        match self.fields.get("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => parts
                .iter()
                .filter_map(|part| part["text"].as_str())
                .collect(),
            _ => String::new(),
        }
    }

    /// All of its fields.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The same message with one field changed.
    pub(super) fn with_field(&self, name: &str, value: Value) -> Self {
        let mut fields = self.fields.clone();
        fields.insert(name.to_owned(), value);
        Self { fields }
    }
}

impl Record {
    /// Recognises a record by its keys. One of more than 4 MiB of text is refused.
    pub fn from_json(value: Value) -> Result<Self> {
        let Value::Object(mut fields) = value else {
            return Err(
                Error::new(format!("expected an object, found {}", kind(&value))).hint(FORMS),
            );
        };
        let has = |key: &str| fields.get(key).is_some_and(|value| !value.is_null());
        let recognised = if has("messages") {
            conversation(&mut fields, "messages", Message::from_json)
        } else if has("conversations") {
            conversation(&mut fields, "conversations", sharegpt_message)
        } else if has("instruction") && has("output") {
            instruction(&fields).map(Self::Instruction)
        } else if has("prompt") && has("completion") {
            completion(&mut fields)
        } else if has("text") {
            string(&fields, "text").map(Self::Text)
        } else {
            Err(unknown_form(&fields))
        };
        let record = recognised?;
        check_length(record.text_bytes())?;
        Ok(record)
    }

    /// Bytes of all its texts together.
    pub(super) fn text_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Completion { prompt, completion } => prompt.len() + completion.len(),
            Self::Instruction(instruction) => instruction.text_bytes(),
            Self::Conversation(conversation) => {
                let messages = conversation.messages.iter();
                let fields = messages.flat_map(|message| message.fields.values());
                fields.chain(&conversation.tools).map(text_bytes).sum()
            }
        }
    }
}

impl Instruction {
    fn text_bytes(&self) -> usize {
        let history = self.history.iter();
        let earlier: usize = history
            .map(|(task, solution)| task.len() + solution.len())
            .sum();
        let system = self.system.as_ref().map_or(0, String::len);
        earlier + system + self.instruction.len() + self.input.len() + self.output.len()
    }
}

/// Bytes of the texts in a value; what is no text counts as one.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(|item| 1 + text_bytes(item)).sum(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, field)| key.len() + text_bytes(field))
            .sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 1,
    }
}

const FORMS: &str = "a record has `messages`, `conversations`, `instruction` and `output`, `prompt` and `completion`, \
                     or `text`; rename its keys";

fn unknown_form(fields: &Map<String, Value>) -> Error {
    let wanted = [
        "messages",
        "conversations",
        "instruction",
        "output",
        "prompt",
        "completion",
        "text",
    ];
    if let Some(empty) = wanted
        .iter()
        .find(|key| fields.get(**key).is_some_and(Value::is_null))
    {
        return Error::new(format!("`{empty}` is null")).hint(FORMS);
    }
    Error::new(format!(
        "not a known form of record; its keys are {}",
        keys(fields)
    ))
    .hint(FORMS)
}

fn conversation(
    fields: &mut Map<String, Value>,
    key: &str,
    read: impl Fn(Value) -> Result<Message>,
) -> Result<Record> {
    let mut messages = message_list(fields, key, read)?;
    // ShareGPT keeps the system message beside the others.
    if key == "conversations"
        && let Some(system) = optional_string(fields, "system")?.filter(|system| !system.is_empty())
    {
        messages.insert(0, Message::new("system", &system));
    }
    Ok(Record::Conversation(Conversation {
        messages,
        tools: tools(fields)?,
        learn_from: 0,
    }))
}

fn message_list(
    fields: &mut Map<String, Value>,
    key: &str,
    read: impl Fn(Value) -> Result<Message>,
) -> Result<Vec<Message>> {
    match fields.get_mut(key).map(Value::take) {
        Some(Value::Array(items)) if items.is_empty() => {
            Err(Error::new(format!("`{key}` is empty")))
        }
        Some(Value::Array(items)) => {
            let numbered = items.into_iter().enumerate();
            numbered
                .map(|(index, item)| {
                    read(item).map_err(|error| {
                        let numbered = Error::new(format!("message {}: {error}", index + 1));
                        match error.hint_text() {
                            Some(hint) => numbered.hint(hint),
                            None => numbered,
                        }
                    })
                })
                .collect()
        }
        Some(other) => Err(expected(key, "a list of messages", &other)),
        None => Err(missing(key, fields)),
    }
}

/// A ShareGPT message: `{"from": …, "value": …}`. Messages in OpenAI's form are found under the same key.
fn sharegpt_message(value: Value) -> Result<Message> {
    let Value::Object(fields) = &value else {
        return Message::from_json(value);
    };
    if fields.contains_key("role") {
        return Message::from_json(value);
    }
    let from = string(fields, "from")?;
    let text = string(fields, "value")?;
    let role = match from.as_str() {
        "system" => "system",
        "human" | "user" => "user",
        "gpt" | "assistant" => "assistant",
        "tool" | "observation" => "tool",
        "function_call" => return function_call(&text),
        _ => {
            let known = [
                "system",
                "human",
                "user",
                "gpt",
                "assistant",
                "tool",
                "observation",
                "function_call",
            ];
            return Err(Error::new(format!("no sender is called {}", quoted(&from)))
                .hint(format!("`from` is one of {}", listed(known))));
        }
    };
    let mut message = Message::new(role, &text);
    for (key, value) in fields {
        if !matches!(key.as_str(), "from" | "value" | "content") {
            message.fields.insert(key.clone(), value.clone());
        }
    }
    Message::from_json(Value::Object(message.fields))
}

/// An assistant's message that calls tools: `{"name": …, "arguments": …}` as JSON, or a list of such.
fn function_call(text: &str) -> Result<Message> {
    let calls = match serde_json::from_str(text) {
        Ok(Value::Array(calls)) => calls,
        Ok(call @ Value::Object(_)) => vec![call],
        _ => {
            return Err(Error::new("a `function_call` that is not JSON").hint(
                "its `value` is `{\"name\": …, \"arguments\": {…}}`, or a list of such calls",
            ));
        }
    };
    let calls: Vec<Value> = calls
        .into_iter()
        .map(|call| json!({"type": "function", "function": call}))
        .collect();
    Message::from_json(json!({"role": "assistant", "tool_calls": calls}))
}

/// Reads the arguments of a call that carries them as a string.
fn read_arguments(call: &mut Value) -> Result<()> {
    if !call.is_object() {
        return Err(Error::new(format!(
            "a tool call is {}, not an object",
            kind(call)
        )));
    }
    let function = match call.get_mut("function") {
        Some(function) => function,
        None => call,
    };
    if function
        .get("name")
        .and_then(Value::as_str)
        .is_none_or(str::is_empty)
    {
        return Err(Error::new("a tool call without the `name` of its function"));
    }
    if let Some(Value::String(text)) = function.get("arguments") {
        let arguments: Value = match text.trim() {
            "" => json!({}),
            text => serde_json::from_str(text).map_err(|error| {
                Error::new(format!(
                    "the `arguments` of a tool call are not JSON: {error}"
                ))
            })?,
        };
        function["arguments"] = arguments;
    }
    Ok(())
}

fn check_part(part: &Value) -> Result<()> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(_)) => Ok(()),
        (Some("text"), None) => Err(Error::new("a text part without `text`")),
        (Some(other), _) => Err(Error::new(format!(
            "a part of type {}: only text can be learned",
            quoted(other)
        ))
        .hint("parts are `{\"type\": \"text\", \"text\": …}`")),
        (None, _) => Err(Error::new("a part without `type`").hint(
            "parts are `{\"type\": \"text\", \"text\": …}`; one text can be `content` itself",
        )),
    }
}

/// The tools as a list; data sets that need one type a column keep it as JSON in a string.
fn tools(fields: &Map<String, Value>) -> Result<Option<Value>> {
    let tools = match fields.get("tools") {
        Some(Value::String(text)) if text.trim().is_empty() => Value::Null,
        Some(Value::String(text)) => serde_json::from_str(text).map_err(|error| {
            Error::new(format!("`tools` is a string that is not JSON: {error}"))
        })?,
        Some(other) => other.clone(),
        None => Value::Null,
    };
    match tools {
        Value::Null => Ok(None),
        Value::Array(list) if list.is_empty() => Ok(None),
        Value::Array(list) => Ok(Some(Value::Array(list))),
        other => Err(expected("tools", "a list", &other)),
    }
}

fn instruction(fields: &Map<String, Value>) -> Result<Instruction> {
    let history = match fields.get("history") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(rounds)) => rounds
            .iter()
            .map(|round| {
                match (
                    round.get(0).and_then(Value::as_str),
                    round.get(1).and_then(Value::as_str),
                ) {
                    (Some(task), Some(solution)) => Ok((task.to_owned(), solution.to_owned())),
                    _ => Err(Error::new("`history` is not a list of pairs of strings")),
                }
            })
            .collect::<Result<_>>()?,
        Some(other) => return Err(expected("history", "a list of pairs", other)),
    };
    Ok(Instruction {
        system: optional_string(fields, "system")?.filter(|system| !system.is_empty()),
        history,
        instruction: string(fields, "instruction")?,
        input: optional_string(fields, "input")?.unwrap_or_default(),
        output: string(fields, "output")?,
    })
}

fn completion(fields: &mut Map<String, Value>) -> Result<Record> {
    match (&fields["prompt"], &fields["completion"]) {
        (Value::String(prompt), Value::String(completion)) => Ok(Record::Completion {
            prompt: prompt.clone(),
            completion: completion.clone(),
        }),
        (Value::Array(_), Value::Array(_)) => {
            let mut messages = message_list(fields, "prompt", Message::from_json)?;
            let learn_from = messages.len();
            messages.extend(message_list(fields, "completion", Message::from_json)?);
            Ok(Record::Conversation(Conversation {
                messages,
                tools: tools(fields)?,
                learn_from,
            }))
        }
        (prompt, completion) => Err(Error::new(format!(
            "`prompt` is {} and `completion` is {}",
            kind(prompt),
            kind(completion)
        ))
        .hint("both are strings, or both are lists of messages")),
    }
}

fn string(fields: &Map<String, Value>, key: &str) -> Result<String> {
    match fields.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(expected(key, "a string", other)),
        None => Err(missing(key, fields)),
    }
}

fn optional_string(fields: &Map<String, Value>, key: &str) -> Result<Option<String>> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => string(fields, key).map(Some),
    }
}

fn expected(key: &str, wanted: &str, found: &Value) -> Error {
    Error::new(format!("`{key}` is {}, not {wanted}", kind(found)))
}

fn missing(key: &str, fields: &Map<String, Value>) -> Error {
    Error::new(format!("no `{key}`; the keys are {}", keys(fields)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn keys(fields: &Map<String, Value>) -> String {
    match fields.len() {
        0 => "none".to_owned(),
        _ => listed(fields.keys().map(String::as_str)),
    }
}

fn listed<'name>(names: impl IntoIterator<Item = &'name str>) -> String {
    let names: Vec<_> = names.into_iter().map(quoted).collect();
    names.join(", ")
}
