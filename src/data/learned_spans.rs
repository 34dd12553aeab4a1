//! Which of a conversation's rendered text the model itself must say.
//!
//! That is, for every assistant turn, what comes after the generation prompt, up to and including the mark that ends
//! the turn. It is found by rendering, never by searching for the content, in the first of these ways that holds:
//!
//! 1. The template says it: `{% generation %}` blocks.
//! 2. The text before the turn, with the generation prompt, begins the text up to and including the turn, which in
//!    turn begins the whole text. The turn is the difference.
//! 3. The template renders a turn differently once others follow (it drops earlier reasoning, say, or puts the tools
//!    before the last question). Then the turn is rendered again with a word in it that occurs nowhere else: what
//!    stands before and after that word must be found unchanged at both ends of the real text.
//!
//! Where none of them holds, there is no exact answer, and that is an error.

use std::ops::Range;

use serde_json::Value;

use crate::data::chat_template::Chat;
use crate::data::{ChatTemplate, Conversation, Encoding, GenerationPrompt, Message, Tokenizer};
use crate::{Error, Result};

/// Text that the model must say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LearnedSpan {
    /// Its bytes in the rendered conversation.
    pub(super) bytes: Range<usize>,
    /// Whether the turn would have been rendered differently as the last one.
    pub(super) rewritten: bool,
}

/// A word that no template and no data contain.
const SENTINEL: &str = "retuneSentinelZqxjkv";

/// A special token in a text.
#[derive(Debug)]
struct Mark {
    token: u32,
    bytes: Range<usize>,
}

/// The spans of a conversation that are learned, in order. `text` is the whole conversation as rendered, `encoding` its
/// tokens.
pub(super) fn learned_spans(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    chat: &Chat,
    text: &str,
    encoding: &Encoding,
) -> Result<Vec<LearnedSpan>> {
    let turns = assistant_turns(conversation);
    let learned = |index: &usize| {
        *index >= conversation.learn_from && conversation.messages[*index].is_learned()
    };
    if let Some(spans) = template
        .generation_spans(chat, text)?
        .filter(|spans| !spans.is_empty())
    {
        let all = turns.iter().all(learned);
        if !all && spans.len() != turns.len() {
            return Err(Error::new(format!(
                "the template marks {} spans for {} assistant messages, so it is unknown which of them belong to the \
                 messages that are not learned",
                spans.len(),
                turns.len()
            )));
        }
        let wanted = spans.into_iter().enumerate();
        return Ok(wanted
            .filter(|(number, _)| all || learned(&turns[*number]))
            .map(|(_, bytes)| LearnedSpan {
                bytes,
                rewritten: false,
            })
            .collect());
    }

    let turns: Vec<usize> = turns.into_iter().filter(learned).collect();
    refuse_too_long(&turns, conversation.messages.len())?;
    let marks = marks(tokenizer, encoding);
    let mut spans: Vec<LearnedSpan> = Vec::new();
    for index in turns {
        let turn = Turn {
            template,
            tokenizer,
            chat,
            text,
            encoding,
            messages: &conversation.messages,
            index,
        };
        let mut span = turn.span()?.ok_or_else(|| inexact(index))?;
        if spans
            .last()
            .is_some_and(|last| last.bytes.end > span.bytes.start)
        {
            return Err(inexact(index));
        }
        span.bytes.end = without_rest(text, &span.bytes, &marks, tokenizer.end_of_turn());
        spans.push(span);
    }
    Ok(spans)
}

/// Messages that are rendered for one conversation, at most: the limit of some ten seconds, or a few times that where
/// turns are found round a sentinel.
const MOST_RENDERED: usize = 1 << 22;

/// A template is a program that may look at any message and at how many there are: what it makes of the first ones shows
/// only when it is run on them alone. So the time grows with the square of the messages.
fn refuse_too_long(learned: &[usize], messages: usize) -> Result<()> {
    // Once up to each turn and once with it.
    let rendered: usize = learned.iter().map(|index| 2 * index + 1).sum();
    if rendered <= MOST_RENDERED {
        return Ok(());
    }
    Err(Error::new(format!(
        "it would take too long to tell which text of {messages} messages the model must say"
    ))
    .hint(
        "split it into conversations of a thousand messages, use `--learn all`, or give a template with \
         `{% generation %}` blocks: `--chat-template FILE`",
    ))
}

fn marks(tokenizer: &Tokenizer, encoding: &Encoding) -> Vec<Mark> {
    let both = encoding.tokens.iter().zip(&encoding.offsets);
    let special = both.filter(|(token, _)| tokenizer.is_special(**token));
    special
        .map(|(token, bytes)| Mark {
            token: *token,
            bytes: bytes.clone(),
        })
        .collect()
}

fn assistant_turns(conversation: &Conversation) -> Vec<usize> {
    let messages = conversation.messages.iter().enumerate();
    messages
        .filter(|(_, message)| message.role() == "assistant")
        .map(|(index, _)| index)
        .collect()
}

/// Where a turn ends: at the mark after which the model stops.
///
/// Templates go on after it with a line break, and some with the end-of-text token after the last turn.
fn without_rest(
    text: &str,
    span: &Range<usize>,
    marks: &[Mark],
    end_of_turn: Option<u32>,
) -> usize {
    let mut end = span.end;
    let mut last = None;
    let before = marks.partition_point(|mark| mark.bytes.start < span.end);
    for mark in marks[..before].iter().rev() {
        let closing =
            mark.bytes.start >= span.start && text[mark.bytes.end.min(end)..end].trim().is_empty();
        if !closing {
            break;
        }
        if Some(mark.token) == end_of_turn {
            return mark.bytes.end.min(span.end);
        }
        last.get_or_insert(mark.bytes.end.min(span.end));
        end = mark.bytes.start;
    }
    last.unwrap_or(span.end)
}

fn inexact(index: usize) -> Error {
    Error::new(format!(
        "it cannot be told exactly which text of message {} the model must say: the chat template changes earlier \
         messages",
        index + 1
    ))
    .hint("use `--learn all`, or give a template with `{% generation %}` blocks: `--chat-template FILE`")
}

/// One assistant turn of a rendered conversation.
struct Turn<'chat> {
    template: &'chat ChatTemplate,
    tokenizer: &'chat Tokenizer,
    chat: &'chat Chat,
    /// The whole conversation, and its tokens.
    text: &'chat str,
    encoding: &'chat Encoding,
    messages: &'chat [Message],
    index: usize,
}

impl Turn<'_> {
    fn span(&self) -> Result<Option<LearnedSpan>> {
        // Some templates cannot render no messages at all, so the first turn may have no opening.
        let opening = match self
            .template
            .render_first(self.chat, self.index, GenerationPrompt::Add)
        {
            Ok(opening) => opening,
            Err(_) if self.index == 0 => return Ok(None),
            Err(error) => return Err(error),
        };
        let closed =
            self.template
                .render_first(self.chat, self.index + 1, GenerationPrompt::Omit)?;
        if closed.starts_with(&opening) && self.text.starts_with(&closed) {
            return Ok(Some(LearnedSpan {
                bytes: opening.len()..closed.len(),
                rewritten: false,
            }));
        }
        for message in with_sentinel(&self.messages[self.index]) {
            if let Some(bytes) = self.span_round_sentinel(&opening, &message)? {
                let rewritten = !closed.contains(&self.text[bytes.clone()]);
                return Ok(Some(LearnedSpan { bytes, rewritten }));
            }
        }
        Ok(None)
    }

    /// The turn's bytes, found round a sentinel in one of the message's fields.
    fn span_round_sentinel(
        &self,
        opening: &str,
        message: &Message,
    ) -> Result<Option<Range<usize>>> {
        let render = |count| {
            self.template
                .render_changed(self.chat, count, self.index, message)
        };
        // A template may refuse the changed message; then this field is not the one.
        let (Ok(whole), Ok(alone)) = (render(self.chat.len()), render(self.index + 1)) else {
            return Ok(None);
        };
        let (Some((before, after)), Some((before_alone, after_alone))) =
            (halves(&whole), halves(&alone))
        else {
            return Ok(None);
        };
        let Some((_, content_end)) = self.content((before, after)) else {
            return Ok(None);
        };
        let Some(start) = self.start(opening, before, before_alone)? else {
            return Ok(None);
        };
        let Some(tail) = self.common_ending(after_alone, after)? else {
            return Ok(None);
        };
        Ok(Some(start..content_end + tail))
    }

    /// Where the model takes over: after the generation prompt, as far as the finished turn shows it.
    ///
    /// Thinking models open `<think>` in the generation prompt and show nothing of it in a turn without reasoning. Then
    /// the model takes over where the two part, which is inside the generation prompt and not after the content's start.
    /// `before` is what stands before the content in the whole text, `before_alone` the same if the turn is the last.
    fn start(&self, opening: &str, before: &str, before_alone: &str) -> Result<Option<usize>> {
        let earlier = match self.index {
            0 => String::new(),
            index => self
                .template
                .render_first(self.chat, index, GenerationPrompt::Omit)?,
        };
        let inside_prompt =
            |common: usize| opening.starts_with(&earlier) && common >= earlier.len();

        let common = common_start(opening, self.text);
        if common == opening.len() && common <= before.len() {
            return Ok(Some(common));
        }
        if inside_prompt(common) {
            return Ok(Some(self.token_start(common).min(before.len())));
        }
        // The template changes what comes before the turn: compare with the turn as the last one.
        let common = common_start(opening, before_alone);
        let parted = common < opening.len() && common < before_alone.len();
        if (!parted || inside_prompt(common))
            && let Some(head) = before.strip_suffix(&before_alone[common..])
        {
            return Ok(Some(if common < opening.len() {
                self.token_start(head.len())
            } else {
                head.len()
            }));
        }
        // It changes the turn's own beginning too: look for the generation prompt between the content of the message
        // before and the turn's own.
        let Some(prompt) = opening
            .strip_prefix(&earlier)
            .filter(|prompt| !prompt.is_empty())
        else {
            return Ok(None);
        };
        let Some(between) = self
            .previous_content_end()?
            .and_then(|end| before.get(end..))
        else {
            return Ok(None);
        };
        if let Some(found) = between.rfind(prompt) {
            return Ok(Some(before.len() - between.len() + found + prompt.len()));
        }
        let marks = marks(self.tokenizer, &self.tokenizer.encode_with_offsets(prompt)?);
        let least = marks.first().map_or(prompt.len(), |mark| mark.bytes.end);
        let begins =
            |end: &usize| prompt.is_char_boundary(*end) && between.ends_with(&prompt[..*end]);
        Ok((least..prompt.len())
            .rev()
            .find(begins)
            .map(|_| before.len()))
    }

    /// Where the content of the message before this turn ends.
    fn previous_content_end(&self) -> Result<Option<usize>> {
        let Some(index) = self.index.checked_sub(1) else {
            return Ok(Some(0));
        };
        for message in with_sentinel(&self.messages[index]) {
            let Ok(whole) =
                self.template
                    .render_changed(self.chat, self.chat.len(), index, &message)
            else {
                continue;
            };
            if let Some((_, end)) = halves(&whole).and_then(|halves| self.content(halves)) {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    /// The bytes of the real text that stand in the sentinel's place, if everything else is unchanged.
    fn content(&self, (before, after): (&str, &str)) -> Option<(usize, usize)> {
        let unchanged = self.text.starts_with(before) && self.text.ends_with(after);
        let end = self.text.len().checked_sub(after.len())?;
        (unchanged && before.len() <= end).then_some((before.len(), end))
    }

    /// The start of the token in which a byte of the text lies: what begins a token differently is learned as a whole.
    fn token_start(&self, byte: usize) -> usize {
        let next = self
            .encoding
            .offsets
            .partition_point(|token| token.start <= byte);
        match next
            .checked_sub(1)
            .map(|token| &self.encoding.offsets[token])
        {
            Some(token) if token.end > byte => token.start,
            _ => byte,
        }
    }

    /// How many bytes of the turn's ending stand in the whole text too. All of them must, except for special tokens
    /// that a template puts after the last turn only.
    fn common_ending(&self, alone: &str, whole: &str) -> Result<Option<usize>> {
        let mut common = common_start(alone, whole);
        let marks: Vec<Range<usize>> =
            marks(self.tokenizer, &self.tokenizer.encode_with_offsets(alone)?)
                .into_iter()
                .map(|mark| mark.bytes)
                .collect();
        if let Some(cut) = marks
            .iter()
            .find(|mark| mark.start < common && common < mark.end)
        {
            common = cut.start;
        }
        let mut position = common;
        for mark in marks.iter().filter(|mark| mark.start >= common) {
            // Marks that share bytes, of a byte-level vocabulary, leave nothing between them.
            let between = alone.get(position..mark.start).unwrap_or_default();
            if !between.trim().is_empty() {
                return Ok(None);
            }
            position = mark.end;
        }
        Ok(alone[position..].trim().is_empty().then_some(common))
    }
}

/// How many bytes two texts begin with in common.
fn common_start(left: &str, right: &str) -> usize {
    let pairs = left.chars().zip(right.chars());
    pairs
        .take_while(|(left, right)| left == right)
        .map(|(character, _)| character.len_utf8())
        .sum()
}

/// What stands before and after the sentinel, if it occurs once.
fn halves(text: &str) -> Option<(&str, &str)> {
    let (before, after) = text.split_once(SENTINEL)?;
    (!after.contains(SENTINEL)).then_some((before, after))
}

/// The message with the sentinel in each of its texts in turn: in place of the content, after it (for templates that
/// read the content), in a call's arguments, and as a call's name.
fn with_sentinel(message: &Message) -> Vec<Message> {
    let mut changed = Vec::new();
    let text = message.text();
    if !text.is_empty() {
        changed.push(message.with_field("content", SENTINEL.into()));
        changed.push(message.with_field("content", (text + SENTINEL).into()));
    }
    if let Some(Value::Array(calls)) = message.fields().get("tool_calls") {
        for place in ["arguments", "name"] {
            let mut calls = calls.clone();
            let call = calls.first_mut().map(|call| {
                if call.get("function").is_some() {
                    &mut call["function"]
                } else {
                    call
                }
            });
            if let Some(text) = call.and_then(|call| first_text(&mut call[place])) {
                *text = SENTINEL.to_owned();
                changed.push(message.with_field("tool_calls", calls.into()));
            }
        }
    }
    changed
}

/// The first string in a value.
fn first_text(value: &mut Value) -> Option<&mut String> {
    match value {
        Value::String(text) => Some(text),
        Value::Array(items) => items.iter_mut().find_map(first_text),
        Value::Object(fields) => fields.values_mut().find_map(first_text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::examples::example;
    use crate::data::{Example, Learn, Record, golden};

    /// The example of a conversation of so many messages, every other one learned.
    fn of_length(messages: usize, tokenizer: &Tokenizer) -> Result<Example> {
        let sides = [
            Message::new("user", "one more"),
            Message::new("assistant", "and one"),
        ];
        let record = Record::Conversation(Conversation {
            messages: sides.iter().cycle().take(messages).cloned().collect(),
            ..Conversation::default()
        });
        example(&record, tokenizer, Learn::Completions, None).map(|made| made.example)
    }

    #[test]
    fn a_template_that_marks_its_turns_has_no_limit_and_another_says_so() -> Result<()> {
        let golden = golden::read();
        let chat = &golden["chats"][0];
        let [marked, plain] = ["marked", "plain"]
            .map(|kind| golden::tokenizer(&golden, "byte_level", golden::text(&chat[kind])));
        let one = of_length(2, &marked)?.target_tokens();
        assert_eq!(of_length(4000, &marked)?.target_tokens(), 2000 * one);
        assert_eq!(
            of_length(100, &plain)?.learn,
            of_length(100, &marked)?.learn
        );

        let error = of_length(4000, &plain).expect_err("eight million messages to render");
        assert!(error.to_string().contains("too long"), "{error}");
        let hint = error.hint_text().unwrap_or_default();
        assert!(hint.contains("{% generation %}"), "{hint}");
        Ok(())
    }

    #[test]
    fn two_thousand_messages_are_not_too_many() {
        let answers: Vec<usize> = (1..2000).step_by(2).collect();
        assert!(refuse_too_long(&answers, 2000).is_ok());
    }
}
