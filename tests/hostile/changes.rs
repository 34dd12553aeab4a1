//! Seeded changes to valid files: what a disk, a slip or an attacker does to them.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::Value;

/// What a file is made of: most changes keep to it, and so get past the outermost check.
#[derive(Clone, Copy)]
pub(crate) enum Form {
    Bytes,
    Text,
    Json,
    JsonLines,
    /// JSON behind its length, and data that it describes.
    Safetensors,
}

/// Every integer here is small enough to be harmless or too large to be granted: what lies between would only fill the
/// memory of the machine.
const NUMBERS: [&str; 12] = [
    "0",
    "-0",
    "1",
    "-1",
    "0.5",
    "7",
    "65536",
    "1e-320",
    "1e308",
    "1e999",
    "18446744073709551615",
    "-9223372036854775808",
];
const SCRAPS: [&str; 16] = [
    "null",
    "true",
    "[]",
    "{}",
    "[[]]",
    "[null]",
    r#"{"":0}"#,
    r#""""#,
    r#""\u0000""#,
    r#""\ud800""#,
    r#""é\u202e""#,
    r#""(""#,
    r#""..""#,
    r#""../outside.safetensors""#,
    r#""../../../outside.safetensors""#,
    "NaN",
];
const NAMES: [&str; 4] = ["", "0", "type", "../../../outside.safetensors"];
/// Deeper than any stack would bear.
const DEPTH: usize = 100_000;
/// Stands in a document for a scrap of JSON, until it is text.
const MARK: &str = "mark of a scrap";

/// The valid file after one to three changes that follow from `seed`.
pub(crate) fn changed(valid: &[u8], form: Form, seed: u64) -> Vec<u8> {
    let mut changes = Changes(ChaCha8Rng::seed_from_u64(seed));
    let mut bytes = valid.to_vec();
    for _ in 0..=changes.below(3) {
        bytes = match form {
            // Some changes know nothing of the form.
            _ if changes.below(5) == 0 => changes.damage(bytes),
            Form::Bytes => changes.damage(bytes),
            Form::Text => changes.number(bytes),
            Form::Json => changes.json(bytes),
            Form::JsonLines => changes.line(&bytes),
            Form::Safetensors => changes.header(bytes),
        };
    }
    bytes
}

/// A safetensors file of this header and these data.
pub(crate) fn framed(header: &[u8], data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header, data].concat()
}

struct Changes(ChaCha8Rng);

impl Changes {
    /// A number below `end`, or 0 if there is none.
    fn below(&mut self, end: usize) -> usize {
        (self.0.next_u64() % end.max(1) as u64) as usize
    }

    fn one_of(&mut self, texts: &[&'static str]) -> &'static str {
        texts[self.below(texts.len())]
    }

    /// Changes a few bytes somewhere, whatever they mean.
    fn damage(&mut self, mut bytes: Vec<u8>) -> Vec<u8> {
        // Half of the time near the start, where headers are.
        let reach = match self.below(2) {
            0 => bytes.len(),
            _ => bytes.len().min(256),
        };
        let start = self.below(reach + 1);
        let end = bytes.len().min(start + self.below(64));
        match self.below(6) {
            0 => {
                let bit = 1u8 << self.below(8);
                bytes
                    .iter_mut()
                    .skip(start)
                    .take(1)
                    .for_each(|byte| *byte ^= bit);
            }
            1 => bytes.truncate(start),
            2 => {
                let noise: Vec<u8> = (start..end).map(|_| self.below(256) as u8).collect();
                bytes.splice(start..start, noise);
            }
            3 => {
                let place = self.below(reach + 1);
                let copy = bytes[start..end].to_vec();
                bytes.splice(place..place, copy);
            }
            4 => {
                bytes.drain(start..end);
            }
            _ => bytes[start..end].fill(if self.below(2) == 0 { 0 } else { 0xff }),
        }
        bytes
    }

    /// Puts another number in the place of one in a text.
    fn number(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let digit = |index: usize| bytes.get(index).is_some_and(u8::is_ascii_digit);
        let starts: Vec<usize> = (0..bytes.len())
            .filter(|index| {
                digit(*index) && index.checked_sub(1).is_none_or(|before| !digit(before))
            })
            .collect();
        if starts.is_empty() || self.below(3) == 0 {
            return self.damage(bytes);
        }
        let start = starts[self.below(starts.len())];
        let end = (start..).find(|index| !digit(*index)).unwrap_or(start);
        let number = self.one_of(&NUMBERS).as_bytes();
        [&bytes[..start], number, &bytes[end..]].concat()
    }

    /// Changes one value of a JSON document.
    fn json(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let Ok(mut document) = serde_json::from_slice::<Value>(&bytes) else {
            return self.damage(bytes);
        };
        let mut values = Vec::new();
        each(&mut document, &mut |value| values.push(value.clone()));
        let chosen = self.below(values.len());
        let other = values[self.below(values.len())].clone();
        let (kind, place) = (self.below(6), self.below(1 << 16));
        let name = self.one_of(&NAMES);
        let mut index = 0;
        each(&mut document, &mut |value| {
            if index == chosen {
                match (kind, &mut *value) {
                    (0, _) => *value = other.clone(),
                    (1, Value::Object(fields)) => {
                        let key = fields.keys().nth(place % fields.len().max(1)).cloned();
                        fields.shift_remove(&key.unwrap_or_default());
                    }
                    (1, Value::Array(items)) if !items.is_empty() => {
                        items.remove(place % items.len());
                    }
                    (2, Value::Object(fields)) => {
                        fields.insert(name.to_owned(), MARK.into());
                    }
                    (2, Value::Array(items)) => items.push(other.clone()),
                    _ => *value = MARK.into(),
                }
            }
            index += 1;
        });
        let text = document.to_string();
        text.replace(&format!("\"{MARK}\""), &self.scrap()).into()
    }

    fn scrap(&mut self) -> String {
        match self.below(20) {
            0 => "[".repeat(DEPTH) + &"]".repeat(DEPTH),
            1..=9 => self.one_of(&NUMBERS).to_owned(),
            _ => self.one_of(&SCRAPS).to_owned(),
        }
    }

    /// Changes one line of JSON.
    fn line(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut lines: Vec<Vec<u8>> = bytes
            .split(|byte| *byte == b'\n')
            .map(<[u8]>::to_vec)
            .collect();
        let chosen = self.below(lines.len());
        lines[chosen] = self.json(std::mem::take(&mut lines[chosen]));
        lines.join(&b'\n')
    }

    /// Changes the header of a safetensors file, and says its new length.
    fn header(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        match unframed(&bytes) {
            Some((header, data)) => framed(&self.json(header.to_vec()), data),
            None => self.damage(bytes),
        }
    }
}

fn unframed(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

/// Visits every value of a document, a value before what is in it.
fn each(value: &mut Value, visit: &mut dyn FnMut(&mut Value)) {
    visit(value);
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| each(item, visit)),
        Value::Object(fields) => fields.values_mut().for_each(|field| each(field, visit)),
        _ => {}
    }
}
