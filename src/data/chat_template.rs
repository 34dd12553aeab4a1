//! The model's own layout of a conversation: a Jinja template that comes with the tokenizer.
//!
//! What templates may use is what transformers offers them (`transformers/utils/chat_template_utils.py`, 5.23):
//! blocks trimmed, loop controls, `raise_exception`, `strftime_now`, JSON as Python writes it, Python's string and
//! dict methods, and `{% generation %}` round what the model itself must say. There are no files to include, and the
//! work a template may do is limited.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{LazyLock, OnceLock};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, ErrorKind, State, Value, context};
use regex::Regex;
use serde_json::json;

use crate::data::python::{self, JsonLayout};
use crate::data::{Message, TemplateDate, quoted};
use crate::guard::contained;
use crate::{Error, Result};

/// Whether the rendered text ends with the opening of the assistant's next turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// It does: for generating.
    Add,
    /// It does not: for a conversation as it was.
    Omit,
}

/// A model's chat templates, ready to render.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// What every rendering sees besides the conversation: special tokens by name, and the user's own variables.
    variables: Vec<(String, Value)>,
    date: TemplateDate,
    content_form: OnceLock<ContentForm>,
}

/// In which form a template takes a message's content. Messages are given the form that it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ContentForm {
    Text,
    /// A list of text parts, as templates of models that also see images may want.
    Parts,
    Either,
}

/// A conversation as a template sees it.
#[derive(Debug, Clone)]
pub(super) struct Chat {
    messages: Vec<Value>,
    tools: Value,
}

impl Chat {
    /// The number of messages.
    pub(super) fn len(&self) -> usize {
        self.messages.len()
    }
}

/// Instructions of the template engine per rendering: a long conversation needs some 10⁵.
const FUEL: u64 = 5_000_000;
/// Bytes of a template: the longest known ones have 20 thousand.
const LONGEST_SOURCE: usize = 128 << 10;
/// Memory for reading one, whose nested expressions are read by recursion: a few hundred bytes for each byte of it.
const READING_STACK: usize = 256 << 20;
/// Bytes of a rendered conversation.
pub(super) const LONGEST_TEXT: usize = 64 << 20;
/// Round what a `{% generation %}` block rendered. Unicode guarantees that no text contains these two.
const SPAN_START: char = '\u{fdd0}';
const SPAN_END: char = '\u{fdd1}';
const MARKS_SPANS: &str = "retune_marks_spans";
const DEFAULT: &str = "default";
const FOR_TOOLS: &str = "tool_use";

impl ChatTemplate {
    /// A model's only template.
    pub fn new(source: &str) -> Result<Self> {
        Self::with_names([(DEFAULT.to_owned(), source.to_owned())])
    }

    /// A model's templates by name. `tool_use`, where there is one, is for conversations with tools; all others use
    /// `default`.
    pub fn with_names(templates: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let mut environment = environment();
        let mut names = Vec::new();
        for (name, source) in templates {
            if source.len() > LONGEST_SOURCE {
                return Err(Error::new(format!(
                    "the chat template has {} bytes, more than {LONGEST_SOURCE}",
                    source.len()
                )));
            }
            add(&mut environment, name.clone(), translate(&source))?;
            names.push(name);
        }
        if !names.iter().any(|name| name == DEFAULT) {
            return Err(Error::new(format!(
                "no chat template is named `{DEFAULT}`, only {}",
                list(&names)
            ))
            .hint("give one of them as a file: `--chat-template FILE`"));
        }
        let now = TemplateDate::now();
        let mut template = Self {
            environment,
            variables: Vec::new(),
            date: now,
            content_form: OnceLock::new(),
        };
        template.set_date(now);
        Ok(template)
    }

    /// Sets a variable that the template may read, such as `bos_token` or `enable_thinking`.
    pub fn set_variable(&mut self, name: &str, value: &serde_json::Value) {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), python::value(value)));
    }

    /// Sets the time that `strftime_now` tells: a resumed run must render what the first one rendered. It is the present
    /// one to begin with.
    pub fn set_date(&mut self, date: TemplateDate) {
        self.date = date;
        self.content_form = OnceLock::new();
        let now = date.date_time();
        self.environment
            .add_function("strftime_now", move |layout: &str| {
                let unknown = |error: &dyn fmt::Display| failed(format!("strftime_now: {error}"));
                let items = time::format_description::parse_strftime_borrowed(layout)
                    .map_err(|error| unknown(&error))?;
                now.format(&items).map_err(|error| unknown(&error))
            });
    }

    /// The time that `strftime_now` tells, if a template asks for it, so that rendering depends on it.
    pub fn date_read(&self) -> Option<TemplateDate> {
        self.mentions("strftime_now").then_some(self.date)
    }

    /// The text of a conversation.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        prompt: GenerationPrompt,
    ) -> Result<String> {
        let chat = self.chat(messages, tools)?;
        self.render_first(&chat, messages.len(), prompt)
    }

    /// A conversation in the form the template reads.
    pub(super) fn chat(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
    ) -> Result<Chat> {
        if messages.is_empty() {
            return Err(Error::new("a conversation without messages"));
        }
        Ok(Chat {
            messages: messages
                .iter()
                .map(|message| self.visible(message))
                .collect(),
            tools: tools.map_or(Value::from(()), python::value),
        })
    }

    /// The text of a conversation's first messages.
    pub(super) fn render_first(
        &self,
        chat: &Chat,
        count: usize,
        prompt: GenerationPrompt,
    ) -> Result<String> {
        self.run(&chat.messages[..count], &chat.tools, prompt, false)
    }

    /// The text of a conversation's first messages, with one of them changed.
    pub(super) fn render_changed(
        &self,
        chat: &Chat,
        count: usize,
        index: usize,
        message: &Message,
    ) -> Result<String> {
        let mut messages = chat.messages[..count].to_vec();
        messages[index] = self.visible(message);
        self.run(&messages, &chat.tools, GenerationPrompt::Omit, false)
    }

    /// The bytes of a conversation's text that `{% generation %}` blocks rendered, in order; `None` for a template
    /// without such blocks.
    pub(super) fn generation_spans(
        &self,
        chat: &Chat,
        text: &str,
    ) -> Result<Option<Vec<Range<usize>>>> {
        if !self.mentions(MARKS_SPANS) {
            return Ok(None);
        }
        let marked = self.run(&chat.messages, &chat.tools, GenerationPrompt::Omit, true)?;
        let mut spans = Vec::new();
        let mut plain = String::with_capacity(text.len());
        let mut start = None;
        for character in marked.chars() {
            match character {
                SPAN_START => start = Some(plain.len()),
                SPAN_END => spans.extend(start.take().map(|start| start..plain.len())),
                other => plain.push(other),
            }
        }
        if plain != text {
            return Err(Error::new("the template's generation blocks change the text they mark")
                .hint("use `--learn all`, or a template whose generation blocks are not filtered or trimmed"));
        }
        Ok(Some(spans))
    }

    fn run(
        &self,
        messages: &[Value],
        tools: &Value,
        prompt: GenerationPrompt,
        marks: bool,
    ) -> Result<String> {
        let name = match self.environment.get_template(FOR_TOOLS) {
            Ok(_) if !tools.is_none() => FOR_TOOLS,
            _ => DEFAULT,
        };
        let template = self
            .environment
            .get_template(name)
            .map_err(|error| explain(&error))?;
        let variables = Value::from_pairs(self.variables.iter().cloned());
        let context = context! {
            messages => messages,
            tools => tools,
            documents => (),
            add_generation_prompt => prompt == GenerationPrompt::Add,
            retune_marks_spans => marks,
            ..variables
        };
        let mut text = Limited(Vec::new());
        contained("the chat template", || {
            template.render_captured_to(context, &mut text).map(drop)
        })?
        .map_err(|error| explain(&error))?;
        String::from_utf8(text.0).map_err(|_| Error::new("the chat template gives no text"))
    }

    /// A message as transformers shows it to a template: without empty fields, and with reasoning under all its names.
    fn visible(&self, message: &Message) -> Value {
        let mut fields = message.fields().clone();
        fields.retain(|_, value| !value.is_null());
        let names = ["reasoning_content", "thinking", "reasoning"];
        if let Some(reasoning) = names.iter().find_map(|name| fields.get(*name)).cloned() {
            fields
                .entry("thinking")
                .or_insert_with(|| reasoning.clone());
            fields.insert("reasoning_content".to_owned(), reasoning);
        }
        match (fields.get("content"), self.content_form()) {
            (Some(serde_json::Value::Array(_)), ContentForm::Text) => {
                fields.insert("content".to_owned(), message.text().into());
            }
            (Some(serde_json::Value::String(text)), ContentForm::Parts) => {
                let parts = json!([{"type": "text", "text": text}]);
                fields.insert("content".to_owned(), parts);
            }
            _ => {}
        }
        python::value(&serde_json::Value::Object(fields))
    }

    /// The form of content that the template shows, tried out once.
    fn content_form(&self) -> ContentForm {
        let word = "retuneprobe";
        let shows = |content: serde_json::Value| {
            let messages = [python::value(&json!({"role": "user", "content": content}))];
            let text = self
                .run(&messages, &Value::from(()), GenerationPrompt::Omit, false)
                .ok()?;
            text.contains(word).then_some(text)
        };
        *self.content_form.get_or_init(|| {
            let text = shows(word.into());
            let parts = shows(json!([{"type": "text", "text": word}]));
            match (text, parts) {
                (Some(text), Some(parts)) if text == parts => ContentForm::Either,
                (None, Some(_)) => ContentForm::Parts,
                _ => ContentForm::Text,
            }
        })
    }

    fn mentions(&self, word: &str) -> bool {
        self.environment
            .templates()
            .any(|(_, template)| template.source().contains(word))
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("the standard delimiters are valid"));
    environment.set_fuel(Some(FUEL));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(python::method);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, minijinja::Error> {
            Err(failed(message.clone()).with_source(Raised(message)))
        },
    );
    environment.add_filter("tojson", to_json);
    environment.add_filter("indent", indent);
    environment.add_filter("format", format_values);
    // No chat template needs them, and they make lists of any length out of nothing.
    environment.remove_filter("batch");
    environment.remove_filter("slice");
    environment.add_test("sequence", |value: &Value| {
        python::is_iterable(value) && value.kind() != ValueKind::Iterable
    });
    environment.add_test("iterable", python::is_iterable);
    environment.add_filter("string", |value: &Value| python::display(value));
    environment.add_filter("retune_learned", |state: &State, text: String| match state
        .lookup(MARKS_SPANS)
    {
        Some(marks) if marks.is_true() => format!("{SPAN_START}{text}{SPAN_END}"),
        _ => text,
    });
    environment.set_formatter(|out, _, value| {
        fmt::Write::write_str(out, &python::display(value)?).map_err(minijinja::Error::from)
    });
    environment
}

/// Reads a template.
fn add(environment: &mut Environment<'static>, name: String, source: String) -> Result<()> {
    let read = || {
        contained("the chat template", || {
            environment.add_template_owned(name, source)
        })?
        .map_err(|error| explain(&error))
    };
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .stack_size(READING_STACK)
            .spawn_scoped(scope, read)
            .map_err(|error| {
                Error::new(format!(
                    "the chat template cannot be read: there is no room for a thread with {} MiB of stack: {error}",
                    READING_STACK >> 20
                ))
            })?
            .join()
            .unwrap_or_else(|_| Err(Error::new("the chat template cannot be read")))
    })
}

/// A text of bounded length.
struct Limited(Vec<u8>);

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > LONGEST_TEXT {
            return Err(io::Error::other("the text becomes too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Rewrites what minijinja does not know.
///
/// Line breaks become `\n`, as in Jinja2. `{% generation %}` becomes a filter that marks its text, in a scope of its own
/// as in transformers.
fn translate(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    static TAGS: LazyLock<[Regex; 2]> = LazyLock::new(|| {
        ["generation", "endgeneration"].map(|tag| {
            Regex::new(&format!(r"\{{%([-+]?)\s*{tag}\s*([-+]?)%\}}"))
                .expect("a pattern written here")
        })
    });
    let [start, end] = &*TAGS;
    let opened = start.replace_all(
        &source,
        "{%${1} with retune_marks_spans = retune_marks_spans %}{% filter retune_learned ${2}%}",
    );
    end.replace_all(&opened, "{%${1} endfilter %}{% endwith ${2}%}")
        .into_owned()
}

/// `tojson(value, ensure_ascii=false, indent=none, separators=none, sort_keys=false)`, as transformers defines it.
fn to_json(
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    options: Kwargs,
) -> Result<String, minijinja::Error> {
    let option = |given: Option<Value>, name: &str| match given {
        Some(value) => Ok(Some(value)),
        None => options.get::<Option<Value>>(name),
    };
    let mut layout = JsonLayout {
        ascii: option(ensure_ascii, "ensure_ascii")?.is_some_and(|value| value.is_true()),
        sorted: option(None, "sort_keys")?.is_some_and(|value| value.is_true()),
        ..JsonLayout::default()
    };
    if let Some(indent) = option(indent, "indent")?.filter(|indent| !indent.is_none()) {
        layout.indent = Some(match indent.as_str() {
            Some(indent) => indent.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(64)),
        });
        layout.between_items = ",".to_owned();
    }
    if let Some(separators) = option(None, "separators")?.filter(|separators| !separators.is_none())
    {
        layout.between_items = separators.get_item_by_index(0)?.to_string();
        layout.after_key = separators.get_item_by_index(1)?.to_string();
    }
    options.assert_all_used()?;
    python::json(value, &layout)
}

/// Jinja's `indent(text, width=4, first=false, blank=false)`, of a width that a text may have.
fn indent(
    text: &str,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<String, minijinja::Error> {
    const WIDEST: usize = 1000;
    let width = match width {
        Some(width) => Some(width),
        None => options.get("width")?,
    };
    let named = |given: Option<bool>, name: &str| match given {
        Some(given) => Ok(given),
        None => options
            .get::<Option<bool>>(name)
            .map(Option::unwrap_or_default),
    };
    let (first, blank) = (named(first, "first")?, named(blank, "blank")?);
    options.assert_all_used()?;
    let space = match width {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) if text.len() <= WIDEST => text.to_owned(),
            None if usize::try_from(width.clone()).is_ok_and(|width| width <= WIDEST) => {
                " ".repeat(usize::try_from(width)?)
            }
            _ => return Err(failed(format!("indent: at most {WIDEST} characters"))),
        },
    };
    let lines = text.split('\n').enumerate().map(|(number, line)| {
        let indented = if number == 0 {
            first
        } else {
            blank || !line.is_empty()
        };
        if indented {
            format!("{space}{line}")
        } else {
            line.to_owned()
        }
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// Jinja's `format(text, …)`, of widths that a text may have.
fn format_values(
    state: &mut State,
    format: &Value,
    values: Rest<ValueOrKwargs>,
) -> Result<Value, minijinja::Error> {
    python::check_widths(format)?;
    minijinja::filters::format(state, format, values)
}

/// What a template said with `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn failed(message: String) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message)
}

/// A template's failure as ours.
fn explain(error: &minijinja::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return Error::new(format!(
                "the chat template refuses this conversation: {message}"
            ));
        }
        cause = current.source();
    }
    let place = error
        .line()
        .map_or(String::new(), |line| format!(" in line {line}"));
    let what = match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.kind().to_string(),
    };
    match error.kind() {
        ErrorKind::OutOfFuel => Error::new("the chat template does not come to an end"),
        ErrorKind::SyntaxError => {
            Error::new(format!("the chat template has a mistake{place}: {what}"))
        }
        _ => Error::new(format!("the chat template fails{place}: {what}")),
    }
    .hint("another template can be given: `--chat-template FILE`")
}

fn list(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| quoted(name)).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::golden;

    #[test]
    fn features_render_as_in_transformers() {
        let golden = golden::read();
        let messages = golden::messages(&golden["feature_messages"]);
        let mut wrong = Vec::new();
        for feature in golden::list(&golden["features"]) {
            let rendered = ChatTemplate::new(golden::text(&feature["template"]))
                .and_then(|template| template.render(&messages, None, GenerationPrompt::Omit));
            let expected = golden::text(&feature["text"]);
            match rendered {
                Ok(text) if text == expected => {}
                Ok(text) => wrong.push(format!("{}:\n  {text:?}\n  {expected:?}", feature["name"])),
                Err(error) => wrong.push(format!("{}: {error}", feature["name"])),
            }
        }
        assert!(wrong.is_empty(), "ours, theirs:\n{}", wrong.join("\n"));
    }
}
