//! The tokenizer of a new base: byte-level BPE, learned from its text.
//!
//! Any text round-trips, since every byte is a token. Digits stand alone, words keep the space before them, and no
//! merge crosses a special token: the pattern is that of Qwen2 and Llama 3.

use super::shape::Shape;
use crate::adapters::storage::write_bytes;
use crate::data::{ChatTemplate, GenerationPrompt, Record, read_records};
use crate::{Context, Error, Result};
use rayon::prelude::*;
use regex::Regex;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior};

/// Where words end.
const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How often a pair must occur to become a token.
const MIN_FREQUENCY: u64 = 2;

/// Records that are laid out together, on all cores.
const CHUNK: usize = 4096;

/// What the vocabulary is learned from.
pub(super) struct Texts {
    /// Pieces of text: what stands between special tokens.
    pub(super) pieces: Vec<String>,
    /// Number of records that could not be read, and why the first could not.
    unusable: Option<(usize, Error)>,
}

/// Reads the pieces of text in `files`.
///
/// Records that cannot be used are passed over here, as long as others can: making examples of them reports each.
pub(super) fn texts(shape: &Shape, files: &[PathBuf]) -> Result<Texts> {
    let special = shape.special_tokens.all();
    let special: Vec<String> = special.into_iter().map(regex::escape).collect();
    let reader = Reader {
        template: shape
            .chat_template
            .as_deref()
            .map(|source| template(shape, source))
            .transpose()?,
        special: Regex::new(&special.join("|"))
            .map_err(|error| Error::new("there are too many special tokens").caused_by(error))?,
    };
    let (mut pieces, mut waiting) = (Vec::new(), Vec::new());
    let mut unusable: Option<(usize, Error)> = None;
    for file in files {
        read_records(file, |origin, record| {
            match (record, &mut unusable) {
                (Ok(record), _) => waiting.push(record),
                (Err(_), Some((count, _))) => *count += 1,
                (Err(error), none) => *none = Some((1, error.at(origin))),
            }
            if waiting.len() == CHUNK {
                pieces.extend(reader.pieces(std::mem::take(&mut waiting)));
            }
            Ok(())
        })?;
    }
    pieces.extend(reader.pieces(waiting));
    match unusable {
        Some((_, error)) if pieces.is_empty() => Err(if error.hint_text().is_some() {
            error
        } else {
            error.hint(
                "data is JSON lines or a JSON array; plain text is a record such as `{\"text\": \"...\"}`",
            )
        }),
        unusable => Ok(Texts { pieces, unusable }),
    }
}

/// The template, seeing the special tokens by name.
fn template(shape: &Shape, source: &str) -> Result<ChatTemplate> {
    let mut template = ChatTemplate::new(source)?;
    for (name, token) in named_tokens(shape) {
        template.set_variable(name, &token.into());
    }
    Ok(template)
}

/// The special tokens that have a name in `tokenizer_config.json`.
fn named_tokens(shape: &Shape) -> Vec<(&'static str, &str)> {
    let tokens = &shape.special_tokens;
    let named = [
        ("bos_token", tokens.bos.as_deref()),
        ("eos_token", Some(tokens.eos.as_str())),
        ("pad_token", tokens.pad.as_deref()),
        ("unk_token", tokens.unk.as_deref()),
    ];
    named
        .into_iter()
        .filter_map(|(name, token)| Some((name, token?)))
        .collect()
}

struct Reader {
    template: Option<ChatTemplate>,
    special: Regex,
}

impl Reader {
    /// The pieces of many records, in their order.
    fn pieces(&self, records: Vec<Record>) -> Vec<String> {
        let of_each: Vec<Vec<String>> = records
            .into_par_iter()
            .map(|record| self.pieces_of(record))
            .collect();
        of_each.into_iter().flatten().collect()
    }

    fn pieces_of(&self, record: Record) -> Vec<String> {
        let texts = match record {
            Record::Text(text) => vec![text],
            Record::Completion { prompt, completion } => vec![prompt, completion],
            Record::Instruction(instruction) => vec![
                instruction.instruction,
                instruction.input,
                instruction.output,
            ],
            Record::Conversation(conversation) => {
                let rendered = self.template.as_ref().and_then(|template| {
                    let tools = conversation.tools.as_ref();
                    template
                        .render(&conversation.messages, tools, GenerationPrompt::Omit)
                        .ok()
                });
                match rendered {
                    Some(text) => vec![text],
                    None => conversation
                        .messages
                        .iter()
                        .map(|message| message.text())
                        .collect(),
                }
            }
        };
        let pieces = texts.iter().flat_map(|text| self.special.split(text));
        pieces
            .filter(|piece| !piece.is_empty())
            .map(str::to_owned)
            .collect()
    }
}

/// Learns a vocabulary of exactly `shape.vocabulary` tokens and writes the tokenizer's files into `folder`.
///
/// The same texts give the same files, whatever the number of threads: pairs are taken by their count, and equal ones
/// by their tokens' ids.
pub(super) fn write_tokenizer(folder: &Path, shape: &Shape, texts: Texts) -> Result<()> {
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    let byte_level = || ByteLevel::new(false, false, false);
    let split = Split::new(
        SplitPattern::Regex(PATTERN.to_owned()),
        SplitDelimiterBehavior::Isolated,
        false,
    )
    .map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(byte_level()),
    ])));
    tokenizer.with_decoder(Some(byte_level()));

    let special = shape.special_tokens.all();
    let trainer = BpeTrainer::builder()
        .vocab_size(shape.vocabulary)
        .min_frequency(MIN_FREQUENCY)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(
            special
                .iter()
                .map(|token| AddedToken::from(*token, true))
                .collect(),
        )
        .show_progress(false)
        .build();
    let mut trainer = TrainerWrapper::from(trainer);
    tokenizer
        .train(&mut trainer, texts.pieces.into_iter())
        .map_err(failed)?;
    let found = tokenizer.get_vocab_size(true);
    if found != shape.vocabulary {
        let left_out = match texts.unusable {
            None => String::new(),
            Some((1, error)) => format!("; a record could not be used: {error}"),
            Some((count, error)) => {
                format!("; {count} records could not be used, the first of them: {error}")
            }
        };
        return Err(Error::new(format!(
            "the text yields a vocabulary of {found} tokens, and `vocabulary` is {}{left_out}",
            shape.vocabulary
        ))
        .hint(format!("give more text, or set `vocabulary = {found}`")));
    }
    if let Some(bos) = &shape.special_tokens.bos {
        let id = tokenizer.token_to_id(bos).unwrap_or_default();
        let processor = TemplateProcessing::builder()
            .try_single(format!("{bos} $A"))
            .and_then(|template| template.try_pair(format!("{bos} $A {bos} $B")))
            .map_err(Error::new)?
            .special_tokens(vec![(bos.clone(), id)])
            .build()
            .map_err(|error| Error::new(error.to_string()))?;
        tokenizer.with_post_processor(Some(processor));
    } else {
        tokenizer.with_post_processor(Some(byte_level()));
    }
    let json = tokenizer.to_string(true).map_err(failed)?;
    write_bytes(&folder.join("tokenizer.json"), json.as_bytes())?;
    write_json(&folder.join("tokenizer_config.json"), &config_json(shape))?;
    if let Some(template) = &shape.chat_template {
        write_bytes(&folder.join("chat_template.jinja"), template.as_bytes())?;
    }
    Ok(())
}

/// `tokenizer_config.json`, as transformers reads it.
fn config_json(shape: &Shape) -> Value {
    let mut config = json!({
        "clean_up_tokenization_spaces": false,
        "model_max_length": shape.max_positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    for (name, token) in named_tokens(shape) {
        config[name] = token.into();
    }
    if !shape.special_tokens.extra.is_empty() {
        config["additional_special_tokens"] = shape.special_tokens.extra.clone().into();
    }
    config.sort_all_objects();
    config
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).at(path.display())?;
    text.push('\n');
    write_bytes(path, text.as_bytes())
}

fn failed(error: tokenizers::Error) -> Error {
    Error::new(format!("the tokenizer cannot be made: {error}"))
}
