//! A small template language for sentences.
//!
//! `[one|two|]` chooses between alternatives (nested ones too), `{name}` is a
//! value bound in the [`Scene`] or else an entry of the word list of that
//! name, and `{a name}` puts the right indefinite article before it. Sentences
//! are capitalised afterwards.

use crate::dice::Dice;
use crate::words;

/// Who and what a text is about: the values its templates refer to.
#[derive(Clone, Default)]
pub(crate) struct Scene(Vec<(String, String)>);

impl Scene {
    /// Binds `name` to `value`, in place of what it was bound to.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<String>) {
        let value = value.into();
        match self.0.iter_mut().find(|(bound, _)| bound == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }

    /// Binds `name` to an entry of the word list `list`, and returns it.
    pub(crate) fn draw(&mut self, dice: &mut Dice, name: &str, list: &str) -> String {
        let value = self.raw(dice, &format!("{{{list}}}"));
        self.set(name, value.clone());
        value
    }

    /// Writes `template` out, sentences capitalised.
    pub(crate) fn say(&self, dice: &mut Dice, template: &str) -> String {
        tidy(&self.raw(dice, template))
    }

    /// Writes one of `templates` out, sentences capitalised.
    pub(crate) fn one(&self, dice: &mut Dice, templates: &[&str]) -> String {
        let template = dice.pick(templates);
        self.say(dice, template)
    }

    /// Writes `template` out as it stands, for use inside a sentence.
    pub(crate) fn raw(&self, dice: &mut Dice, template: &str) -> String {
        let mut out = String::new();
        self.expand(dice, template, &mut out);
        out
    }

    fn expand(&self, dice: &mut Dice, template: &str, out: &mut String) {
        let mut rest = template;
        while let Some(at) = rest.find(['[', '{']) {
            out.push_str(&rest[..at]);
            let (inner, after) = enclosed(&rest[at..]);
            if rest.as_bytes()[at] == b'[' {
                let options = alternatives(inner);
                let option = dice.pick(&options);
                self.expand(dice, option, out);
            } else if let Some(name) = inner.strip_prefix("a ") {
                let mut word = String::new();
                self.value(dice, name, &mut word);
                out.push_str(&with_article(&word));
            } else {
                self.value(dice, inner, out);
            }
            rest = after;
        }
        out.push_str(rest);
    }

    fn value(&self, dice: &mut Dice, name: &str, out: &mut String) {
        if let Some((_, value)) = self.0.iter().find(|(bound, _)| bound == name) {
            out.push_str(value);
        } else {
            let entry = dice.pick(words::list(name));
            self.expand(dice, entry, out);
        }
    }
}

/// What stands between the bracket that `text` opens with and its counterpart,
/// and what follows it.
fn enclosed(text: &str) -> (&str, &str) {
    let mut depth = 0;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return (&text[1..at], &text[at + 1..]);
        }
    }
    panic!("unbalanced template: {text}");
}

/// The alternatives of a choice, split at its own bars and not at inner ones.
fn alternatives(inner: &str) -> Vec<&str> {
    let (mut depth, mut start, mut options) = (0, 0, Vec::new());
    for (at, byte) in inner.bytes().enumerate() {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth -= 1,
            b'|' if depth == 0 => {
                options.push(&inner[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    options.push(&inner[start..]);
    options
}

/// `word` with "a" or "an" before it.
pub(crate) fn with_article(word: &str) -> String {
    const LIKE_YOU: &[&str] = &["uni", "use", "usu", "one", "eu"];
    const SILENT: &[&str] = &["hour", "honest", "8", "11", "18"];
    let vowel = word.starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O', 'U']);
    let an = SILENT.iter().any(|start| word.starts_with(start))
        || vowel && !LIKE_YOU.iter().any(|start| word.starts_with(start));
    format!("{} {word}", if an { "an" } else { "a" })
}

/// The plural of a noun or of a phrase that ends in one.
pub(crate) fn plural(noun: &str) -> String {
    const ODD: &[(&str, &str)] = &[
        ("pair of pliers", "pairs of pliers"),
        ("knife", "knives"),
        ("shelf", "shelves"),
        ("loaf", "loaves"),
        ("leaf", "leaves"),
        ("scarf", "scarves"),
        ("goose", "geese"),
        ("mouse", "mice"),
        ("sheep", "sheep"),
        ("person", "people"),
        ("child", "children"),
        ("foot", "feet"),
        ("potato", "potatoes"),
        ("tomato", "tomatoes"),
    ];
    for (one, many) in ODD {
        if let Some(start) = noun.strip_suffix(one) {
            return format!("{start}{many}");
        }
    }
    if let Some(start) = noun.strip_suffix('y')
        && !start.ends_with(['a', 'e', 'o', 'u'])
    {
        return format!("{start}ies");
    }
    if ["s", "x", "ch", "sh", "z"]
        .iter()
        .any(|end| noun.ends_with(end))
    {
        return format!("{noun}es");
    }
    format!("{noun}s")
}

/// "3 kettles" or "three kettles" or "one kettle", as `number` reads.
pub(crate) fn counted(number: &str, many: usize, noun: &str) -> String {
    match many {
        1 => format!("{number} {noun}"),
        _ => format!("{number} {}", plural(noun)),
    }
}

/// `items` as "a, b and c".
pub(crate) fn joined(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// `text` with its first letter in upper case.
pub(crate) fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(chars).collect()
    })
}

/// Capitalises sentences and takes out doubled spaces, which an empty
/// alternative leaves behind.
pub(crate) fn tidy(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut starts, mut ended) = (true, false);
    for c in text.chars() {
        if c == ' ' && (out.is_empty() || out.ends_with([' ', '\n'])) {
            continue;
        }
        if matches!(c, ',' | '.' | '!' | '?') && out.ends_with(' ') {
            out.pop();
        }
        match c {
            '.' | '!' | '?' => ended = true,
            // `"Why?" she asked` goes on, `He said, "No." She left` does not.
            '"' if ended && !out.ends_with('.') => ended = false,
            '\n' => (starts, ended) = (true, false),
            ' ' if ended => (starts, ended) = (true, false),
            '"' | ' ' | '(' => {}
            _ if starts => {
                out.extend(c.to_uppercase());
                (starts, ended) = (false, false);
                continue;
            }
            _ => ended = false,
        }
        out.push(c);
    }
    out.truncate(out.trim_end().len());
    out
}
