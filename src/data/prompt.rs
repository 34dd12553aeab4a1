//! What a model is to go on from, and what the data say comes next.

use super::examples::{from_rounds, instruction_conversation, instruction_rounds};
use super::record_reader::read_values;
use super::tokenizer::check_length;
use super::{
    AddSpecial, Conversation, GenerationPrompt, Learn, Message, Origin, Record, Tokenizer,
};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// Text to generate from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// As text, special tokens included.
    pub text: String,
    /// As tokens.
    pub tokens: Vec<u32>,
    /// What the data say comes next, if they do.
    pub reference: Option<String>,
}

/// How plain text becomes a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout<'a> {
    /// It is the beginning of the text that the model goes on with.
    Plain,
    /// It is what a user says, laid out by the model's chat template.
    Chat {
        /// What the system says before, if anything.
        system: Option<&'a str>,
    },
}

impl Prompt {
    /// A prompt of plain text.
    pub fn text(text: &str, layout: Layout, tokenizer: &Tokenizer) -> Result<Self> {
        // Before a template makes copies of it.
        check_length(text.len())?;
        match layout {
            Layout::Plain => Ok(Self {
                text: text.to_owned(),
                tokens: tokenizer.encode(text, AddSpecial::Start)?,
                reference: None,
            }),
            Layout::Chat { system } => {
                let mut messages: Vec<Message> = system_message(system).collect();
                messages.push(Message::new("user", text));
                Self::conversation(&messages, None, tokenizer)
            }
        }
    }

    /// A conversation up to the beginning of the model's turn.
    pub fn conversation(
        messages: &[Message],
        tools: Option<&Value>,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let template = tokenizer.chat_template()?;
        let text = template.render(messages, tools, GenerationPrompt::Add)?;
        Ok(Self {
            // The template alone decides on special tokens, the first one included.
            tokens: tokenizer.encode(&text, AddSpecial::No)?,
            text,
            reference: None,
        })
    }

    /// The prompt of a record. Its answer becomes the reference: a completion, an output, or the last message if that is
    /// the assistant's.
    pub fn of(record: &Record, layout: Layout, tokenizer: &Tokenizer) -> Result<Self> {
        let (prompt, reference) = match record {
            Record::Text(text) => (Self::text(text, layout, tokenizer)?, String::new()),
            Record::Completion { prompt, completion } => {
                (Self::text(prompt, layout, tokenizer)?, completion.clone())
            }
            Record::Instruction(instruction) if tokenizer.has_chat_template() => {
                let conversation = instruction_conversation(instruction);
                return Self::of_conversation(&conversation, layout, tokenizer);
            }
            Record::Instruction(instruction) => {
                let rounds = instruction_rounds(instruction);
                let example = from_rounds(&rounds, tokenizer, Learn::Completions)?.example;
                let prompt = Self {
                    tokens: example.prompt().to_vec(),
                    text: example.answer.unwrap_or_default().prompt,
                    reference: None,
                };
                (prompt, instruction.output.clone())
            }
            Record::Conversation(conversation) => {
                return Self::of_conversation(conversation, layout, tokenizer);
            }
        };
        Ok(prompt.expecting(reference))
    }

    fn of_conversation(
        conversation: &Conversation,
        layout: Layout,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let mut messages = conversation.messages.clone();
        let answer = messages.pop_if(|last| last.role() == "assistant");
        if let Layout::Chat { system } = layout
            && messages
                .first()
                .is_none_or(|first| first.role() != "system")
        {
            messages.splice(0..0, system_message(system));
        }
        if messages.is_empty() {
            return Err(Error::new("the conversation has nothing before the answer"));
        }
        let prompt = Self::conversation(&messages, conversation.tools.as_ref(), tokenizer)?;
        Ok(prompt.expecting(answer.map(|answer| answer.text()).unwrap_or_default()))
    }

    fn expecting(self, reference: String) -> Self {
        Self {
            reference: Some(reference).filter(|reference| !reference.is_empty()),
            ..self
        }
    }
}

fn system_message(system: Option<&str>) -> impl Iterator<Item = Message> {
    system
        .map(|system| Message::new("system", system))
        .into_iter()
}

/// Hands every prompt of a data file to `visit`, in order, with where it was read. Records have the forms of training
/// data, with or without their answers. The first that is no record is an error.
pub fn read_prompts(
    file: &Path,
    layout: Layout,
    tokenizer: &Tokenizer,
    mut visit: impl FnMut(Origin, Prompt) -> Result<()>,
) -> Result<()> {
    read_values(file, |origin, value| {
        let record = value.and_then(|value| Record::from_json(with_answer(value)));
        let prompt = record.and_then(|record| Prompt::of(&record, layout, tokenizer));
        let prompt = prompt.map_err(|error| error.at(&origin))?;
        visit(origin, prompt)
    })
}

/// A record of prompts only as one of training data: with an answer, which is empty.
fn with_answer(value: Value) -> Value {
    let Value::Object(mut fields) = value else {
        return value;
    };
    let lacks = |fields: &Map<String, Value>, key: &str| fields.get(key).is_none_or(Value::is_null);
    if !lacks(&fields, "instruction") && lacks(&fields, "output") {
        fields.insert("output".to_owned(), "".into());
    }
    if lacks(&fields, "completion") {
        match fields.get("prompt") {
            Some(Value::Array(_)) => {
                let messages = fields.remove("prompt").unwrap_or_default();
                fields.insert("messages".to_owned(), messages);
            }
            Some(Value::String(_)) => {
                fields.insert("completion".to_owned(), "".into());
            }
            _ => {}
        }
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Example;
    use crate::data::examples::example;
    use serde_json::json;
    use std::path::PathBuf;

    fn tokenizer(model: &str) -> Result<Tokenizer> {
        let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests/golden/models", model]
            .iter()
            .collect();
        Tokenizer::load(&folder)
    }

    fn prompt(record: Value, layout: Layout, tokenizer: &Tokenizer) -> Result<Prompt> {
        Prompt::of(&Record::from_json(with_answer(record))?, layout, tokenizer)
    }

    const PLAIN: Layout = Layout::Plain;

    /// Records with an answer, and the same without it.
    fn records() -> [(Value, Value); 4] {
        let user = json!({"role": "user", "content": "w3 w14"});
        [
            (
                json!({"prompt": "w3 w14", "completion": " w5"}),
                json!({"prompt": "w3 w14"}),
            ),
            (
                json!({"messages": [user, {"role": "assistant", "content": "w5"}]}),
                json!({"messages": [user]}),
            ),
            (
                json!({"prompt": [user], "completion": [{"role": "assistant", "content": "w5"}]}),
                json!({"prompt": [user]}),
            ),
            (
                json!({"instruction": "w7", "input": "w14", "output": "w5"}),
                json!({"instruction": "w7", "input": "w14"}),
            ),
        ]
    }

    #[test]
    fn a_prompt_is_what_training_has_before_the_answer() -> Result<()> {
        let with_template = tokenizer("llama")?;
        let json = include_bytes!("../../tests/golden/models/llama/tokenizer.json");
        let names = json!({"bos_token": "<s>", "eos_token": "</s>"});
        let without_template = Tokenizer::new(json, names.as_object().expect("an object"))?;
        for tokenizer in [with_template, without_template] {
            for (with, without) in records() {
                let record = Record::from_json(with.clone())?;
                if matches!(record, Record::Conversation(_)) && !tokenizer.has_chat_template() {
                    continue;
                }
                let prompt = prompt(with, PLAIN, &tokenizer)?;
                let example: Example =
                    example(&record, &tokenizer, Learn::Completions, None)?.example;
                assert_eq!(prompt.tokens, example.prompt(), "{record:?}");
                assert_eq!(prompt.text, example.answer.unwrap_or_default().prompt);
                assert_eq!(prompt.reference.as_deref().map(str::trim), Some("w5"));
                let alone = super::tests::prompt(without, PLAIN, &tokenizer)?;
                assert_eq!(alone.tokens, prompt.tokens);
                assert_eq!(alone.reference, None);
            }
        }
        Ok(())
    }

    #[test]
    fn a_chat_lays_plain_text_out_as_what_a_user_says() -> Result<()> {
        let tokenizer = tokenizer("llama")?;
        let layout = Layout::Chat {
            system: Some("w80 w81"),
        };
        let wanted = Prompt::conversation(
            &[
                Message::new("system", "w80 w81"),
                Message::new("user", "w3 w14"),
            ],
            None,
            &tokenizer,
        )?;
        for record in [
            json!({"prompt": "w3 w14"}),
            json!({"text": "w3 w14"}),
            json!({"messages": [{"role": "user", "content": "w3 w14"}]}),
        ] {
            assert_eq!(prompt(record, layout, &tokenizer)?, wanted);
        }
        let own = json!({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "w3 w14"}]});
        assert_ne!(
            prompt(own, layout, &tokenizer)?,
            wanted,
            "a system message of its own stays"
        );
        Ok(())
    }

    #[test]
    fn a_bad_record_is_named_by_its_line() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("prompts.jsonl");
        std::fs::write(&file, "{\"prompt\": \"the\"}\n{\"question\": \"the\"}\n").expect("written");
        let mut seen = 0;
        let error = read_prompts(&file, PLAIN, &tokenizer("llama")?, |_, _| {
            seen += 1;
            Ok(())
        })
        .expect_err("`question` is no known key");
        assert_eq!(seen, 1);
        assert!(error.to_string().contains("prompts.jsonl:2: "), "{error}");
        Ok(())
    }
}
