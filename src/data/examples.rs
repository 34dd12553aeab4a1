//! Tokens, and which of them the loss counts.

use serde_json::Value;

use crate::data::learned_spans::learned_spans;
use crate::data::{
    AddSpecial, Conversation, GenerationPrompt, Instruction, Message, Record, SpecialTokens,
    Tokenizer, quoted,
};
use crate::{Error, Result};

/// Which tokens the loss counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Learn {
    /// Only what the model itself must produce: assistant turns, completions, plain text.
    #[default]
    Completions,
    /// Every token.
    All,
}

/// One training example.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Example {
    /// The tokens the model sees: (tokens).
    pub tokens: Vec<u32>,
    /// Whether the loss counts each token: (tokens). The first never counts, because nothing comes before it.
    pub learn: Vec<bool>,
    /// The last thing to be learned as text, for evaluation by generating. Plain text has none.
    pub answer: Option<Answer>,
}

/// The last learned span of an example as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// The rendered text to generate from.
    pub prompt: String,
    /// What the data say comes next, without end marks: what a perfect model's tokens decode to.
    pub reference: String,
}

impl Example {
    /// An example of these tokens, without text to evaluate.
    pub fn new(tokens: Vec<u32>, mut learn: Vec<bool>) -> Self {
        learn.resize(tokens.len(), false);
        if let Some(first) = learn.first_mut() {
            *first = false;
        }
        Self {
            tokens,
            learn,
            answer: None,
        }
    }

    /// How many tokens the loss counts.
    pub fn target_tokens(&self) -> usize {
        self.learn.iter().skip(1).filter(|learn| **learn).count()
    }

    /// Where the last learned span starts; the number of tokens where there is none.
    pub fn prompt_len(&self) -> usize {
        let Some(last) = self.learn.iter().rposition(|learn| *learn) else {
            return self.tokens.len();
        };
        self.learn[..last]
            .iter()
            .rposition(|learn| !*learn)
            .map_or(0, |before| before + 1)
    }

    /// The tokens to generate from: all before the last learned span.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_len()]
    }

    /// Cuts off the end. Returns whether anything was cut.
    fn truncate(&mut self, max_length: usize) -> bool {
        let cut = self.tokens.len() > max_length;
        if cut {
            self.tokens.truncate(max_length);
            self.learn.truncate(max_length);
            // What was cut off would stay in memory with every example.
            self.tokens.shrink_to_fit();
            self.learn.shrink_to_fit();
        }
        cut
    }
}

/// An example, and what its making is to be reported of.
#[derive(Debug, Clone, Default)]
pub(super) struct Made {
    pub(super) example: Example,
    pub(super) truncated: bool,
    pub(super) rewritten_turns: usize,
    pub(super) unended_turns: usize,
}

/// Refuses a record of a kind that this tokenizer can make nothing of: every other one would fail too.
pub(super) fn check_kind(record: &Record, tokenizer: &Tokenizer) -> Result<()> {
    match record {
        Record::Conversation(_) => tokenizer.chat_template().map(drop),
        Record::Instruction(_) if tokenizer.has_chat_template() => {
            tokenizer.chat_template().map(drop)
        }
        Record::Instruction(_) | Record::Completion { .. } | Record::Text(_) => {
            end_of_text(tokenizer).map(drop)
        }
    }
}

/// The example that a record makes.
pub(super) fn example(
    record: &Record,
    tokenizer: &Tokenizer,
    learn: Learn,
    max_length: Option<usize>,
) -> Result<Made> {
    let mut made = match record {
        Record::Conversation(conversation) => from_conversation(conversation, tokenizer, learn)?,
        Record::Instruction(instruction) if tokenizer.has_chat_template() => {
            from_conversation(&instruction_conversation(instruction), tokenizer, learn)?
        }
        Record::Instruction(instruction) => {
            from_rounds(&instruction_rounds(instruction), tokenizer, learn)?
        }
        Record::Completion { prompt, completion } => {
            from_rounds(&[(prompt.clone(), completion.clone())], tokenizer, learn)?
        }
        Record::Text(text) => from_text(text, tokenizer)?,
    };
    let wanted = made.example.target_tokens();
    if wanted == 0 {
        return Err(nothing_to_learn(record));
    }
    if let Some(max_length) = max_length {
        made.truncated = made.example.truncate(max_length);
        if made.example.target_tokens() == 0 {
            return Err(Error::new(format!(
                "all {wanted} tokens to be learned lie beyond the maximum length of {max_length} tokens"
            ))
            .hint("raise `--max-length`, or shorten the prompt"));
        }
    }
    Ok(made)
}

fn nothing_to_learn(record: &Record) -> Error {
    match record {
        Record::Conversation(conversation) => {
            let roles: Vec<_> = conversation
                .messages
                .iter()
                .map(|message| format!("`{}`", message.role()))
                .collect();
            Error::new(format!("no token to be learned: the messages are from {}", roles.join(", ")))
                .hint("the model learns what messages from `assistant` say; `--learn all` learns every token")
        }
        _ => Error::new("no token to be learned: the text is empty"),
    }
}

fn from_conversation(
    conversation: &Conversation,
    tokenizer: &Tokenizer,
    learn: Learn,
) -> Result<Made> {
    let template = tokenizer.chat_template()?;
    let chat = template.chat(&conversation.messages, conversation.tools.as_ref())?;
    let text = template.render_first(&chat, chat.len(), GenerationPrompt::Omit)?;
    check_tools_are_shown(conversation, &text)?;
    // As in transformers, the template alone decides on special tokens, the first one included.
    let encoding = tokenizer.encode_with_offsets(&text)?;
    if learn == Learn::All {
        let all = vec![true; encoding.tokens.len()];
        return Ok(Made {
            example: Example::new(encoding.tokens, all),
            ..Made::default()
        });
    }

    let spans = learned_spans(template, tokenizer, conversation, &chat, &text, &encoding)?;
    let mut remaining = spans.iter().peekable();
    let mut learned = Vec::with_capacity(encoding.tokens.len());
    for offset in &encoding.offsets {
        while remaining
            .next_if(|span| span.bytes.end <= offset.start)
            .is_some()
        {}
        learned.push(
            remaining
                .peek()
                .is_some_and(|span| span.bytes.start <= offset.start),
        );
    }
    let ends = |span: &&_| !ends_with_special(tokenizer, &encoding.tokens, &encoding.offsets, span);
    let mut made = Made {
        rewritten_turns: spans.iter().filter(|span| span.rewritten).count(),
        unended_turns: spans.iter().map(|span| &span.bytes).filter(ends).count(),
        example: Example::new(encoding.tokens, learned),
        ..Made::default()
    };
    if let Some(last) = spans.last() {
        made.example.answer = Some(Answer {
            prompt: text[..last.bytes.start].to_owned(),
            reference: last_learned_text(&made.example, tokenizer)?,
        });
    }
    Ok(made)
}

/// Refuses calls and tools that the template leaves out: what is learned would not be what the record says.
fn check_tools_are_shown(conversation: &Conversation, text: &str) -> Result<()> {
    let function = |value: &Value| {
        Some(
            value.get("function").unwrap_or(value)["name"]
                .as_str()?
                .to_owned(),
        )
    };
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let hidden = |values: Vec<Value>| {
        values
            .iter()
            .filter_map(function)
            .find(|name| !text.contains(name.as_str()))
    };
    let hint =
        "give a template that knows tools, `--chat-template FILE`, or remove them from the records";
    for (index, message) in conversation.messages.iter().enumerate() {
        if let Some(name) = hidden(list(message.fields().get("tool_calls"))) {
            let fact = format!(
                "the chat template does not show the call of {} in message {}",
                quoted(&name),
                index + 1
            );
            return Err(Error::new(fact).hint(hint));
        }
    }
    match hidden(list(conversation.tools.as_ref())) {
        Some(name) => {
            let fact = format!("the chat template does not show the tool {}", quoted(&name));
            Err(Error::new(fact).hint(hint))
        }
        None => Ok(()),
    }
}

/// Whether the last token of a span is a mark.
fn ends_with_special(
    tokenizer: &Tokenizer,
    tokens: &[u32],
    offsets: &[std::ops::Range<usize>],
    span: &std::ops::Range<usize>,
) -> bool {
    let last = offsets.partition_point(|offset| offset.start < span.end);
    last.checked_sub(1)
        .is_some_and(|last| tokenizer.is_special(tokens[last]))
}

fn last_learned_text(example: &Example, tokenizer: &Tokenizer) -> Result<String> {
    let start = example.prompt_len();
    let learned = example.learn[start..]
        .iter()
        .take_while(|learn| **learn)
        .count();
    tokenizer.decode(&example.tokens[start..start + learned], SpecialTokens::Skip)
}

/// Prompts and completions in turn. Each completion is learned, with the end-of-text token after it.
///
/// Prompt and completion have tokens of their own, because the prompt's are what the model will be given.
pub(super) fn from_rounds(
    rounds: &[(String, String)],
    tokenizer: &Tokenizer,
    learn: Learn,
) -> Result<Made> {
    let eos = end_of_text(tokenizer)?;
    let mut tokens = tokenizer.encode("", AddSpecial::Start)?;
    let mut learned = vec![learn == Learn::All; tokens.len()];
    let mut text = String::new();
    let mut answer = Answer::default();
    for (prompt, completion) in rounds {
        append(&mut tokens, &mut text, prompt, tokenizer)?;
        learned.resize(tokens.len(), learn == Learn::All);
        answer.prompt.clone_from(&text);
        append(&mut tokens, &mut text, completion, tokenizer)?;
        if tokens.last() != Some(&eos) {
            tokens.push(eos);
        }
        learned.resize(tokens.len(), true);
    }
    let mut example = Example::new(tokens, learned);
    if learn == Learn::Completions {
        answer.reference = last_learned_text(&example, tokenizer)?;
        example.answer = Some(answer);
    }
    Ok(Made {
        example,
        ..Made::default()
    })
}

/// Adds a text's tokens to those of the text before it.
fn append(
    tokens: &mut Vec<u32>,
    text: &mut String,
    more: &str,
    tokenizer: &Tokenizer,
) -> Result<()> {
    match text.is_empty() {
        true => tokens.extend(tokenizer.encode(more, AddSpecial::No)?),
        false => tokens.extend(tokenizer.encode_continuation(more)?),
    }
    text.push_str(more);
    Ok(())
}

fn from_text(text: &str, tokenizer: &Tokenizer) -> Result<Made> {
    let eos = end_of_text(tokenizer)?;
    let mut tokens = tokenizer.encode(text, AddSpecial::Start)?;
    if text.is_empty() {
        return Ok(Made::default());
    }
    if tokens.last() != Some(&eos) {
        tokens.push(eos);
    }
    let learned = vec![true; tokens.len()];
    Ok(Made {
        example: Example::new(tokens, learned),
        ..Made::default()
    })
}

fn end_of_text(tokenizer: &Tokenizer) -> Result<u32> {
    tokenizer.eos().ok_or_else(|| {
        let fact = match tokenizer.special_token("eos_token") {
            Some(name) => format!(
                "the vocabulary lacks the end-of-text token {}",
                quoted(name)
            ),
            None => {
                "the tokenizer names no end-of-text token, so the model cannot learn where to stop"
                    .to_owned()
            }
        };
        Error::new(fact)
            .hint("name a token of the vocabulary as `eos_token` in `tokenizer_config.json`")
    })
}

/// An instruction as a conversation: the input follows the instruction after a blank line.
pub(super) fn instruction_conversation(instruction: &Instruction) -> Conversation {
    let mut messages: Vec<Message> = instruction
        .system
        .iter()
        .map(|system| Message::new("system", system))
        .collect();
    for (task, solution) in &instruction.history {
        messages.push(Message::new("user", task));
        messages.push(Message::new("assistant", solution));
    }
    let task = match instruction.input.is_empty() {
        true => instruction.instruction.clone(),
        false => format!("{}\n\n{}", instruction.instruction, instruction.input),
    };
    messages.push(Message::new("user", &task));
    messages.push(Message::new("assistant", &instruction.output));
    Conversation {
        messages,
        ..Conversation::default()
    }
}

/// An instruction as plain text, for models without a chat template.
pub(super) fn instruction_rounds(instruction: &Instruction) -> Vec<(String, String)> {
    let last = (
        &instruction.instruction,
        &instruction.input,
        &instruction.output,
    );
    let no_input = String::new();
    let earlier = instruction
        .history
        .iter()
        .map(|(task, solution)| (task, &no_input, solution));
    let mut rounds = Vec::new();
    for (number, (task, input, solution)) in earlier.chain([last]).enumerate() {
        let mut prompt = match (&instruction.system, number) {
            (Some(system), 0) => format!("{system}\n\n"),
            (None, 0) => String::new(),
            _ => "\n\n".to_owned(),
        };
        prompt.push_str(&format!("### Instruction\n{task}\n\n"));
        if !input.is_empty() {
            prompt.push_str(&format!("### Input\n{input}\n\n"));
        }
        prompt.push_str("### Answer\n");
        rounds.push((prompt, solution.clone()));
    }
    rounds
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::golden;

    /// The example of a golden conversation, or why there is none.
    fn made(golden: &serde_json::Value, tokenizer: &Tokenizer, name: &str) -> Result<Made> {
        let conversation = Conversation {
            messages: golden::messages(&golden["conversations"][name]),
            tools: name.starts_with("tools").then(|| golden["tools"].clone()),
            learn_from: 0,
        };
        example(
            &Record::Conversation(conversation),
            tokenizer,
            Learn::Completions,
            None,
        )
    }

    #[test]
    fn conversations_have_the_text_tokens_and_masks_of_transformers() {
        let golden = golden::read();
        let mut wrong = Vec::new();
        for chat in golden::list(&golden["chats"]) {
            for (kind, backend) in [
                ("marked", "byte_level"),
                ("plain", "byte_level"),
                ("plain", "byte_fallback"),
                ("marked", "byte_fallback"),
            ] {
                let tokenizer = golden::tokenizer(&golden, backend, golden::text(&chat[kind]));
                for case in golden::list(&chat["cases"]) {
                    let name = golden::text(&case["conversation"]);
                    let place = format!("{} {kind} {backend} {name}", chat["style"]);
                    match made(&golden, &tokenizer, name) {
                        Ok(_) if case.get("error").is_some() => {
                            wrong.push(format!("{place}: no error"))
                        }
                        Err(_) if case.get("error").is_some() => {}
                        Err(error) => wrong.push(format!("{place}: {error}")),
                        Ok(made) => {
                            let expected = &case[backend];
                            let tokens: Vec<u32> =
                                serde_json::from_value(expected["tokens"].clone()).expect("tokens");
                            if made.example.tokens != tokens {
                                wrong.push(format!("{place}: other tokens"));
                            }
                            let mask: String = made
                                .example
                                .learn
                                .iter()
                                .map(|learn| if *learn { '1' } else { '0' })
                                .collect();
                            if mask != expected["mask"] {
                                wrong.push(format!(
                                    "{place}: {:?}\n  {mask}\n  {}",
                                    golden::text(&case["text"]),
                                    golden::text(&expected["mask"])
                                ));
                            }
                        }
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "ours, theirs:\n{}", wrong.join("\n"));
    }
}
