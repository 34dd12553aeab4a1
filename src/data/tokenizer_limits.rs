//! What a `tokenizer.json` may ask for: the library that runs it bounds neither the length of what normalisers make of
//! a text nor what its patterns take.

use crate::{Error, Result};
use serde_json::Value;
use tokenizers::{NormalizedString, Normalizer, NormalizerWrapper};

/// Normalisers, pre-tokenisers, decoders and post-processors, at most; the largest known tokenizers have a dozen.
const MOST_STEPS: usize = 64;
/// Sequences inside of sequences: the library tries several readings at each level.
const DEEPEST: usize = 4;
/// Bytes of a pattern; the longest known ones have a few hundred.
const LONGEST_PATTERN: usize = 4096;
/// Bytes that take the place of a match, or of a character.
const LONGEST_REPLACEMENT: usize = 64;
/// Bytes of a table of characters, in base64; sentencepiece's own have 300 thousand.
const LONGEST_TABLE: usize = 4 << 20;
/// How much longer a text may become; in UTF-8 the usual forms of Unicode make it three times as long at most.
const MOST_GROWTH: usize = 8;
/// Bytes by which any text may become longer, so that short ones need no care.
const SPARE: usize = 64 << 10;

/// Whether a tokenizer's normalisers must be watched for each text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Growth {
    /// They cannot make a text longer than is allowed.
    Bounded,
    /// They might.
    Possible,
}

/// Refuses steps and patterns that no tokenizer needs; says whether its normalisers must be watched.
pub(super) fn check(tokenizer: &Value) -> Result<Growth> {
    let mut found = Steps::default();
    let mut growth = |part: &str| -> Result<f64> {
        found.growth = 1.0;
        match tokenizer.get(part) {
            None | Some(Value::Null) => {}
            Some(step) => found.add(part, step, 0)?,
        }
        Ok(found.growth)
    };
    growth("pre_tokenizer")?;
    growth("post_processor")?;
    if growth("decoder")? > LONGEST_REPLACEMENT as f64 {
        return Err(refused("`decoder` makes a text too long".to_owned()));
    }
    Ok(match growth("normalizer")? > MOST_GROWTH as f64 {
        true => Growth::Possible,
        false => Growth::Bounded,
    })
}

/// Runs the normalisers one by one, and fails as soon as the text becomes too long.
pub(super) fn refuse_growth(normalizer: &NormalizerWrapper, text: &str) -> Result<()> {
    let most = text.len().saturating_mul(MOST_GROWTH).saturating_add(SPARE);
    normalize(normalizer, &mut NormalizedString::from(text), most)
}

fn normalize(step: &NormalizerWrapper, text: &mut NormalizedString, most: usize) -> Result<()> {
    if let NormalizerWrapper::Sequence(steps) = step {
        let steps: &[NormalizerWrapper] = steps.as_ref();
        return steps
            .iter()
            .try_for_each(|step| normalize(step, text, most));
    }
    let run = |text: &mut NormalizedString| {
        step.normalize(text)
            .map_err(|error| Error::new(format!("this text cannot be normalised: {error}")))
    };
    // Piece by piece before all at once: each character may become a replacement, and each byte of that takes memory.
    let mut length = 0;
    for piece in pieces(text.get()) {
        let mut piece = NormalizedString::from(piece);
        run(&mut piece)?;
        length += piece.get().len();
        if length > most {
            return Err(too_long());
        }
    }
    run(text)?;
    match text.get().len() > most {
        true => Err(too_long()),
        false => Ok(()),
    }
}

fn too_long() -> Error {
    Error::new(format!(
        "the normalisers of `tokenizer.json` make this text more than {MOST_GROWTH} times as long"
    ))
    .hint("do not use this tokenizer unless you trust where it comes from")
}

/// A text in pieces of some kilobytes.
fn pieces(mut text: &str) -> impl Iterator<Item = &str> {
    const PIECE: usize = 4 << 10;
    std::iter::from_fn(move || {
        let mut end = text.len().min(PIECE);
        while !text.is_char_boundary(end) {
            end += 1;
        }
        let (piece, rest) = text.split_at(end);
        text = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

/// What was counted so far.
#[derive(Default)]
struct Steps {
    count: usize,
    /// By what a text may become longer, all steps of a part taken together.
    growth: f64,
}

impl Steps {
    fn add(&mut self, part: &str, step: &Value, depth: usize) -> Result<()> {
        self.count += 1;
        if self.count > MOST_STEPS {
            return Err(refused(format!("there are more than {MOST_STEPS} steps")));
        }
        if depth > DEEPEST {
            return Err(refused(format!(
                "`{part}` has sequences nested more than {DEEPEST} deep"
            )));
        }
        let lists = ["normalizers", "pretokenizers", "decoders", "processors"];
        let inside: Vec<&Value> = lists
            .iter()
            .filter_map(|list| step.get(list)?.as_array())
            .flatten()
            .collect();
        if !inside.is_empty() {
            return inside
                .into_iter()
                .try_for_each(|step| self.add(part, step, depth + 1));
        }
        let pattern = step.get("pattern");
        let is_text = pattern.is_some_and(|pattern| pattern.get("Regex").is_none());
        let pattern = pattern
            .and_then(|pattern| {
                let named = pattern.get("Regex").or_else(|| pattern.get("String"));
                named.unwrap_or(pattern).as_str()
            })
            .unwrap_or_default();
        let limited = |what: &str, length: usize, most: usize| match length > most {
            true => Err(refused(format!(
                "{what} of `{part}` has {length} bytes, more than {most}"
            ))),
            false => Ok(()),
        };
        limited("a pattern", pattern.len(), LONGEST_PATTERN)?;
        let text = |field: &str| step.get(field).and_then(Value::as_str).unwrap_or_default();
        let content = text("content");
        limited("a replacement", content.len(), LONGEST_REPLACEMENT)?;
        limited("a prefix", text("prepend").len(), LONGEST_REPLACEMENT)?;
        let table = text("precompiled_charsmap");
        limited("a table", table.len(), LONGEST_TABLE)?;
        limited("an entry", longest_entry(table), LONGEST_REPLACEMENT)?;
        self.growth *= match text("type") {
            // An empty match lies between any two characters.
            "Replace" if !is_text => 1.0 + content.len() as f64,
            "Replace" => (content.len() as f64 / pattern.len().max(1) as f64).max(1.0),
            "NFC" | "NFD" => 3.0,
            "NFKC" | "NFKD" => 11.0,
            "Lowercase" => 1.5,
            "ByteLevel" => 2.0,
            "Sequence" | "Prepend" | "Strip" | "StripAccents" | "Nmt" | "ByteFallback" | "Fuse"
            | "Metaspace" | "WordPiece" | "BPEDecoder" | "CTC" => 1.0,
            // Not every character becomes the longest entry, but a stranger's table may say so.
            _ if part == "normalizer" => LONGEST_REPLACEMENT as f64,
            _ => 1.0,
        };
        Ok(())
    }
}

fn refused(fact: String) -> Error {
    Error::new(format!("`tokenizer.json` asks for too much: {fact}"))
        .hint("do not use this tokenizer unless you trust where it comes from")
}

/// Bytes of the longest text in a table of sentencepiece: in base64 the length of its trie, the trie, and the texts,
/// each ended by a zero byte. What is no such table has none; the library refuses it.
fn longest_entry(base64: &str) -> usize {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let mut bytes = Vec::with_capacity(base64.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0u32);
    for value in base64.bytes().map_while(digit) {
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else {
        return 0;
    };
    let trie = u32::from_le_bytes(*length) as usize / 4 * 4;
    let texts = rest.get(trie..).unwrap_or_default();
    let lengths = texts.split(|byte| *byte == 0).map(<[u8]>::len);
    lengths.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ordinary_normalisers_are_not_watched_and_others_are() {
        let growth = |normalizer: Value| check(&json!({"normalizer": normalizer})).expect("fine");
        let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let prefix = json!({"type": "Prepend", "prepend": "▁"});
        for normalizer in [
            Value::Null,
            json!({"type": "NFC"}),
            json!({"type": "Sequence", "normalizers": [prefix, space]}),
        ] {
            assert_eq!(growth(normalizer), Growth::Bounded);
        }
        assert_eq!(growth(json!({"type": "NFKC"})), Growth::Possible);
        let two = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let four = json!({"type": "Sequence", "normalizers": vec![two; 4]});
        assert_eq!(growth(four), Growth::Possible);
    }

    #[test]
    fn the_longest_text_of_a_table_is_found() {
        // No trie, then "ab", "", "abcd".
        assert_eq!(longest_entry("AAAAAGFiAABhYmNkAA=="), 4);
        assert_eq!(longest_entry(""), 0);
        assert_eq!(longest_entry("/////w=="), 0);
    }
}
