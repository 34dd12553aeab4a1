//! What chat templates expect of Python: how values print, how JSON is laid out, and methods of strings and dicts.

use std::fmt::Write;

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::chat_template::LONGEST_TEXT;

/// JSON data as a template sees them: objects keep the order of their keys.
pub(super) fn value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(truth) => Value::from(*truth),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Value::from(whole),
            (None, Some(whole)) => Value::from(whole),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(value).collect(),
        serde_json::Value::Object(fields) => Value::from_pairs(
            fields
                .iter()
                .map(|(key, field)| (key.as_str(), value(field))),
        ),
    }
}

/// How `json.dumps` lays out its text.
#[derive(Debug, Clone)]
pub(super) struct JsonLayout {
    /// Characters outside ASCII are escaped.
    pub(super) ascii: bool,
    /// Keys are sorted.
    pub(super) sorted: bool,
    /// Each item on a line of its own, after this much for every level.
    pub(super) indent: Option<String>,
    pub(super) between_items: String,
    pub(super) after_key: String,
}

impl Default for JsonLayout {
    fn default() -> Self {
        Self {
            ascii: false,
            sorted: false,
            indent: None,
            between_items: ", ".to_owned(),
            after_key: ": ".to_owned(),
        }
    }
}

/// A value as JSON.
pub(super) fn json(value: &Value, layout: &JsonLayout) -> Result<String, Error> {
    let mut text = String::new();
    write_json(&mut text, value, layout, 0)?;
    Ok(text)
}

fn write_json(
    text: &mut String,
    value: &Value,
    layout: &JsonLayout,
    depth: usize,
) -> Result<(), Error> {
    if depth > DEEPEST {
        let fact = format!("tojson: nested more than {DEEPEST} deep");
        return Err(Error::new(ErrorKind::InvalidOperation, fact));
    }
    check_length(text)?;
    match value.kind() {
        ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => text.push_str(&number(value)),
        ValueKind::String => write_json_string(text, value.as_str().unwrap_or_default(), layout),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_items(text, ['[', ']'], &items, layout, depth, |text, item| {
                write_json(text, item, layout, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if layout.sorted {
                keys.sort();
            }
            write_items(text, ['{', '}'], &keys, layout, depth, |text, key| {
                match key.as_str() {
                    Some(key) => write_json_string(text, key, layout),
                    None => write_json_string(text, &json(key, layout)?, layout),
                }
                text.push_str(&layout.after_key);
                write_json(text, &value.get_item(key)?, layout, depth + 1)
            })?;
        }
        other => {
            let fact = format!("tojson: a value of type {other} has no JSON");
            return Err(Error::new(ErrorKind::InvalidOperation, fact));
        }
    }
    Ok(())
}

fn write_items(
    text: &mut String,
    [open, close]: [char; 2],
    items: &[Value],
    layout: &JsonLayout,
    depth: usize,
    mut write: impl FnMut(&mut String, &Value) -> Result<(), Error>,
) -> Result<(), Error> {
    let new_line = |text: &mut String, depth: usize| {
        if let Some(indent) = &layout.indent {
            text.push('\n');
            text.push_str(&indent.repeat(depth));
        }
    };
    text.push(open);
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            text.push_str(&layout.between_items);
        }
        new_line(text, depth + 1);
        write(text, item)?;
    }
    if !items.is_empty() {
        new_line(text, depth);
    }
    text.push(close);
    Ok(())
}

fn write_json_string(text: &mut String, string: &str, layout: &JsonLayout) {
    let escaped = serde_json::Value::from(string).to_string();
    if !layout.ascii {
        text.push_str(&escaped);
        return;
    }
    for character in escaped.chars() {
        if character.is_ascii() {
            text.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                push(text, format_args!("\\u{unit:04x}"));
            }
        }
    }
}

/// A value as `str(value)` gives it.
pub(super) fn display(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let mut text = String::new();
            write_repr(&mut text, value, 0)?;
            Ok(text)
        }
        _ => Ok(value.to_string()),
    }
}

/// Levels of lists and maps that are written: what contains itself has no end.
const DEEPEST: usize = 128;

/// Asked before each value is written: a list that holds the same list twice, and so on sixty times, has more items than
/// can be written.
fn check_length(text: &str) -> Result<(), Error> {
    match text.len() > LONGEST_TEXT {
        true => Err(Error::new(
            ErrorKind::InvalidOperation,
            "the text becomes too long",
        )),
        false => Ok(()),
    }
}

/// A value as `repr(value)` gives it.
fn write_repr(text: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > DEEPEST {
        // As Python does for what contains itself.
        text.push_str("...");
        return Ok(());
    }
    check_length(text)?;
    match value.kind() {
        ValueKind::String => write_repr_string(text, value.as_str().unwrap_or_default()),
        ValueKind::Number => text.push_str(&number(value)),
        ValueKind::Seq => {
            let tuple = value.downcast_object_ref::<Tuple>().is_some();
            text.push(if tuple { '(' } else { '[' });
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_repr(text, &item, depth + 1)?;
            }
            text.push_str(match (tuple, value.len()) {
                (false, _) => "]",
                (true, Some(1)) => ",)",
                (true, _) => ")",
            });
        }
        ValueKind::Map => {
            text.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_repr(text, &key, depth + 1)?;
                text.push_str(": ");
                write_repr(text, &value.get_item(&key).unwrap_or_default(), depth + 1)?;
            }
            text.push('}');
        }
        _ => text.push_str(&value.to_string()),
    }
    Ok(())
}

fn write_repr_string(text: &mut String, string: &str) {
    let quote = if string.contains('\'') && !string.contains('"') {
        '"'
    } else {
        '\''
    };
    text.push(quote);
    for character in string.chars() {
        match character {
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\\' => text.push_str("\\\\"),
            _ if character == quote => text.extend(['\\', character]),
            _ if character.is_control() && u32::from(character) < 0x100 => {
                push(text, format_args!("\\x{:02x}", u32::from(character)));
            }
            _ => text.push(character),
        }
    }
    text.push(quote);
}

/// A number as Python writes it: floats shortest, with an exponent below 1e-4 and from 1e16.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if float.is_nan() {
        return "NaN".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{float:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..16).contains(&exponent) || float == 0.0 {
        let plain = float.to_string();
        return if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

/// Whether Python could loop over it; over `None` it cannot.
pub(super) fn is_iterable(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    matches!(value.kind(), String | Seq | Map | Iterable | Undefined)
}

/// Methods of Python's types that minijinja's values lack.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    if name == "format" {
        check_widths(value)?;
    }
    if let (Some(text), [Some(part)]) =
        (value.as_str(), [arguments.first().and_then(Value::as_str)])
    {
        let found = match name {
            "removeprefix" => Some(text.strip_prefix(part).unwrap_or(text).into()),
            "removesuffix" => Some(text.strip_suffix(part).unwrap_or(text).into()),
            "partition" => Some(match text.split_once(part) {
                Some((head, tail)) => list([head, part, tail]),
                None => list([text, "", ""]),
            }),
            "rpartition" => Some(match text.rsplit_once(part) {
                Some((head, tail)) => list([head, part, tail]),
                None => list(["", "", text]),
            }),
            "rsplit" => Some(rsplit(text, part, arguments.get(1))?),
            _ => None,
        };
        if let Some(found) = found {
            return Ok(found);
        }
    }
    pycompat::unknown_method_callback(state, value, name, arguments)
}

/// Refuses a format that pads what it is given to more than any text needs. All digits in it count, also those that are
/// no width: they are small numbers.
pub(super) fn check_widths(format: &Value) -> Result<(), Error> {
    const WIDEST: usize = 1 << 20;
    let format = format.as_str().unwrap_or_default();
    let widths = format
        .split(|character: char| !character.is_ascii_digit())
        .filter(|digits| !digits.is_empty())
        .map(|digits| digits.parse().unwrap_or(usize::MAX));
    match widths.fold(0, usize::saturating_add) > WIDEST {
        true => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("format: at most {WIDEST} characters"),
        )),
        false => Ok(()),
    }
}

fn rsplit(text: &str, separator: &str, most: Option<&Value>) -> Result<Value, Error> {
    let most = most.map_or(Ok(-1), |most| i64::try_from(most.clone()))?;
    let mut parts: Vec<&str> = match usize::try_from(most) {
        Ok(most) => text.rsplitn(most + 1, separator).collect(),
        Err(_) => text.rsplit(separator).collect(),
    };
    parts.reverse();
    Ok(list(parts))
}

fn list<'text>(parts: impl IntoIterator<Item = &'text str>) -> Value {
    parts.into_iter().map(Value::from).collect()
}

fn push(text: &mut String, what: std::fmt::Arguments<'_>) {
    text.write_fmt(what)
        .expect("writing to a string cannot fail");
}
