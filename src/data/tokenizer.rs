//! A model's tokenizer: text to tokens and back, and the special tokens that mark beginnings and ends.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Value};
use tokenizers::{PostProcessor, Token};

use crate::adapters::storage::{read_small, read_text};
use crate::data::tokenizer_limits::{self, Growth};
use crate::data::{
    ChatTemplate, GenerationPrompt, Message, TemplateDate, TextStream, has_file, has_folder,
};
use crate::guard::contained;
use crate::{Context, Error, Result};

/// Which of the tokenizer's own special tokens are put round a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddSpecial {
    /// Those before and after it, as an encoder wants.
    Yes,
    /// Only those before it, such as `<s>`: for a text that goes on.
    Start,
    /// None.
    No,
}

/// What decoding does with special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// They are written out.
    Keep,
    /// They are left out.
    Skip,
}

/// A text's tokens and where each came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoding {
    /// The tokens: (tokens).
    pub tokens: Vec<u32>,
    /// The bytes of the text that each token stands for: (tokens). Several tokens of one character share its bytes.
    pub offsets: Vec<Range<usize>>,
}

const FILE: &str = "`tokenizer.json`";

/// Bytes of a text, at most: about a million tokens. While it is made tokens, each byte takes more than a hundred of
/// memory, more with some tokenizers; `bounded` ends the process above 2 GiB.
const LONGEST_TEXT: usize = 4 << 20;
/// Longer texts are made tokens one after the other, so that what they take does not multiply with the threads.
const LONG_TEXT: usize = 256 << 10;

static ONE_LONG_TEXT: Mutex<()> = Mutex::new(());

/// Refuses a text of so many bytes if its tokens could use up the memory.
pub(super) fn check_length(bytes: usize) -> Result<()> {
    match bytes > LONGEST_TEXT {
        true => Err(Error::new(format!(
            "the text has {bytes} bytes, more than the {} MiB that it may have",
            LONGEST_TEXT >> 20
        ))
        .hint("split the text into several")),
        false => Ok(()),
    }
}

/// The names `tokenizer_config.json` gives to special tokens, which are also the names chat templates know them by.
const SPECIAL_TOKEN_NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// A model's tokenizer, as its folder describes it.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    /// Without truncation, padding and post-processing: the post-processor would move offsets.
    plain: tokenizers::Tokenizer,
    /// The same without the space that some tokenizers put in front of a text, where it differs.
    continuing: Option<tokenizers::Tokenizer>,
    growth: Growth,
    /// The special tokens put before and after a text.
    before: Vec<u32>,
    after: Vec<u32>,
    /// Special tokens by name (`bos_token`), in the order of [`SPECIAL_TOKEN_NAMES`].
    special_tokens: Vec<(&'static str, String)>,
    stop_tokens: BTreeSet<u32>,
    /// The special token that the chat template puts after what the assistant says.
    end_of_turn: Option<u32>,
    /// The model's chat template; a broken one matters only where it is needed.
    chat_template: Option<Result<ChatTemplate, String>>,
}

impl Tokenizer {
    /// Reads the tokenizer of a model folder.
    ///
    /// `tokenizer.json` is the tokenizer; `tokenizer_config.json` and `special_tokens_map.json` name its special
    /// tokens; `generation_config.json` and `config.json` may add tokens that end a text.
    pub fn load(folder: &Path) -> Result<Self> {
        let file = folder.join("tokenizer.json");
        if !has_file(&file)? {
            return Err(no_tokenizer(folder));
        }
        let json = read_small(&file).at(file.display())?;
        let mut config = optional_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        for (name, value) in
            optional_json(&folder.join("special_tokens_map.json"))?.unwrap_or_default()
        {
            if config.get(&name).is_none_or(Value::is_null) {
                config.insert(name, value);
            }
        }
        let mut tokenizer = Self::new(&json, &config).at(folder.display())?;
        let generation = match optional_json(&folder.join("generation_config.json"))? {
            Some(generation) => generation,
            None => optional_json(&folder.join("config.json"))?.unwrap_or_default(),
        };
        match generation.get("eos_token_id") {
            Some(Value::Array(ids)) => tokenizer.stop_tokens.extend(ids.iter().filter_map(token)),
            Some(id) => tokenizer.stop_tokens.extend(token(id)),
            None => {}
        }
        let templates = chat_templates(folder, &config)?;
        if !templates.is_empty() {
            match ChatTemplate::with_names(templates) {
                Ok(template) => tokenizer.set_chat_template(template),
                Err(error) => tokenizer.chat_template = Some(Err(error.to_string())),
            }
        }
        Ok(tokenizer)
    }

    /// A tokenizer from the content of `tokenizer.json` and `tokenizer_config.json`.
    pub fn new(tokenizer_json: &[u8], config: &Map<String, Value>) -> Result<Self> {
        // What is not even JSON is for the library to refuse.
        let json: Value = serde_json::from_slice(tokenizer_json).unwrap_or_default();
        let growth = tokenizer_limits::check(&json)?;
        let mut plain = parse(tokenizer_json)?;
        let post_processor = plain.get_post_processor().cloned();
        plain.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        plain.with_padding(None);
        plain
            .with_truncation(None)
            .map_err(|error| Error::new(error.to_string()))?;

        let special_tokens: Vec<_> = SPECIAL_TOKEN_NAMES
            .iter()
            .filter_map(|name| Some((*name, special_token_text(config.get(*name)?)?)))
            .collect();
        let id = |wanted: &str| {
            let (_, text) = special_tokens.iter().find(|(name, _)| *name == wanted)?;
            plain.token_to_id(text)
        };
        let adds = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or_default();
        // transformers 5: these settings, where present, replace the post-processor.
        let settings = ["add_bos_token", "add_eos_token"];
        let (before, after) = match post_processor {
            Some(processor) if !settings.iter().any(|key| config.contains_key(*key)) => {
                added_by(&processor)?
            }
            _ => (
                id("bos_token")
                    .filter(|_| adds("add_bos_token"))
                    .into_iter()
                    .collect(),
                id("eos_token")
                    .filter(|_| adds("add_eos_token"))
                    .into_iter()
                    .collect(),
            ),
        };
        let stop_tokens = id("eos_token").into_iter().collect();
        let continuing = without_leading_space(json)?;
        Ok(Self {
            continuing,
            growth,
            before,
            after,
            stop_tokens,
            special_tokens,
            plain,
            chat_template: None,
            end_of_turn: None,
        })
    }

    /// A text's tokens. One of more than 4 MiB is refused, here as in [`Self::encode_with_offsets`] and
    /// [`Self::encode_continuation`].
    pub fn encode(&self, text: &str, special: AddSpecial) -> Result<Vec<u32>> {
        let mut tokens = match special {
            AddSpecial::Yes | AddSpecial::Start => self.before.clone(),
            AddSpecial::No => Vec::new(),
        };
        self.run(&self.plain, text, |encoding| {
            tokens.extend_from_slice(encoding.get_ids());
        })?;
        if special == AddSpecial::Yes {
            tokens.extend_from_slice(&self.after);
        }
        Ok(tokens)
    }

    /// A text's tokens and the bytes each stands for, without special tokens round it.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Encoding> {
        self.run(&self.plain, text, |encoding| Encoding {
            tokens: encoding.get_ids().to_vec(),
            offsets: encoding
                .get_offsets()
                .iter()
                .map(|(start, end)| *start..*end)
                .collect(),
        })
    }

    /// The tokens of a text that follows another.
    ///
    /// Some tokenizers put a space in front of every text; here they do not, so that decoding both parts together
    /// gives the two texts.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        let tokenizer = self.continuing.as_ref().unwrap_or(&self.plain);
        self.run(tokenizer, text, |encoding| encoding.get_ids().to_vec())
    }

    /// What `read` takes of a text's encoding, most of which is of no use.
    fn run<T>(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        read: impl FnOnce(&tokenizers::Encoding) -> T,
    ) -> Result<T> {
        check_length(text.len())?;
        let _alone = (text.len() > LONG_TEXT)
            .then(|| ONE_LONG_TEXT.lock().unwrap_or_else(PoisonError::into_inner));
        if self.growth == Growth::Possible
            && let Some(normalizer) = tokenizer.get_normalizer()
        {
            contained(FILE, || tokenizer_limits::refuse_growth(normalizer, text))??;
        }
        let encoding = contained(FILE, || tokenizer.encode(text, false))?
            .map_err(|error| Error::new(format!("this text has no tokens: {error}")))?;
        Ok(read(&encoding))
    }

    /// The text of tokens.
    pub fn decode(&self, tokens: &[u32], special: SpecialTokens) -> Result<String> {
        let skip = special == SpecialTokens::Skip;
        contained(FILE, || self.plain.decode(tokens, skip))?
            .map_err(|error| Error::new(format!("these tokens have no text: {error}")))
    }

    /// Text out of tokens that arrive one by one, as in generation.
    pub fn text_stream(&self, special: SpecialTokens) -> TextStream<'_> {
        TextStream::new(self, special)
    }

    /// The token with this text, such as `<|im_end|>`.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.plain.token_to_id(text)
    }

    /// A token as it stands in the vocabulary.
    pub fn token_text(&self, token: u32) -> Option<String> {
        self.plain.id_to_token(token)
    }

    /// How many tokens there are, counting added ones.
    pub fn vocabulary_size(&self) -> usize {
        self.plain.get_vocab_size(true)
    }

    /// The text of a special token, by its name in `tokenizer_config.json`, such as `bos_token`.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        let (_, text) = self
            .special_tokens
            .iter()
            .find(|(known, _)| *known == name)?;
        Some(text)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.token_id(self.special_token("bos_token")?)
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.token_id(self.special_token("eos_token")?)
    }

    /// The tokens after which generation stops, smallest first.
    pub fn stop_tokens(&self) -> Vec<u32> {
        self.stop_tokens.iter().copied().collect()
    }

    /// The token that stands for text the vocabulary lacks.
    pub fn unknown(&self) -> Option<u32> {
        self.token_id(self.special_token("unk_token")?)
    }

    /// Whether a token is special: a mark rather than text.
    pub fn is_special(&self, token: u32) -> bool {
        let special = |text: String| self.plain.get_added_vocabulary().is_special_token(&text);
        self.stop_tokens.contains(&token) || self.token_text(token).is_some_and(special)
    }

    /// The special token that the chat template puts after what the assistant says, if it does.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn
    }

    /// Whether the model has a chat template, good or broken.
    pub fn has_chat_template(&self) -> bool {
        self.chat_template.is_some()
    }

    /// The model's chat template.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        match &self.chat_template {
            Some(Ok(template)) => Ok(template),
            Some(Err(fact)) => Err(Error::new(fact.clone()).hint("give another one: `--chat-template FILE`")),
            None => Err(Error::new("the model has no chat template").hint(
                "give one that fits the model: `--chat-template FILE`; base models are often trained without, on \
                 records with `prompt` and `completion`",
            )),
        }
    }

    /// The model's chat template, to set its variables.
    pub fn chat_template_mut(&mut self) -> Option<&mut ChatTemplate> {
        self.chat_template.as_mut()?.as_mut().ok()
    }

    /// Lays out conversations with this template. It sees the special tokens by name, and the mark it puts after an
    /// assistant's turn ends a text from now on.
    pub fn set_chat_template(&mut self, mut template: ChatTemplate) {
        for (name, text) in &self.special_tokens {
            template.set_variable(name, &text.as_str().into());
        }
        self.end_of_turn = self.find_end_of_turn(&template);
        self.stop_tokens.extend(self.end_of_turn);
        self.chat_template = Some(Ok(template));
    }

    /// Sets the time that the chat template reads, if there is one.
    pub fn set_template_date(&mut self, date: TemplateDate) {
        if let Some(Ok(template)) = &self.chat_template {
            let mut template = template.clone();
            template.set_date(date);
            // What it puts after a turn may depend on the date like all else.
            self.set_chat_template(template);
        }
    }

    /// Lays out conversations with the template in this file.
    pub fn set_chat_template_file(&mut self, file: &Path) -> Result<()> {
        let source = read_text(file).at(file.display())?;
        self.set_chat_template(ChatTemplate::new(&source).at(file.display())?);
        Ok(())
    }

    /// The special token that a template puts after what the assistant says, tried out on a small conversation: the
    /// last one that is the same whether another message follows or not.
    fn find_end_of_turn(&self, template: &ChatTemplate) -> Option<u32> {
        let probe = "retune-probe";
        let messages = [
            Message::new("user", "a"),
            Message::new("assistant", probe),
            Message::new("user", "b"),
        ];
        let ending = |count: usize| {
            let text = template
                .render(&messages[..count], None, GenerationPrompt::Omit)
                .ok()?;
            let (_, ending) = text.split_once(probe)?;
            self.encode(ending, AddSpecial::No).ok()
        };
        let last = ending(2)?;
        let followed = ending(3).unwrap_or_default();
        let common = last
            .iter()
            .zip(&followed)
            .take_while(|(left, right)| left == right)
            .count();
        let special = |tokens: &[u32]| {
            tokens
                .iter()
                .rev()
                .copied()
                .find(|token| self.is_special(*token))
        };
        special(&last[..common]).or_else(|| last.into_iter().find(|token| self.is_special(*token)))
    }
}

/// A model folder's chat templates by name.
///
/// As in transformers 5: `chat_template.jinja` and `additional_chat_templates/*.jinja` take the place of
/// `chat_template` in `tokenizer_config.json`, which is a template or a list of named ones. Older processors keep one
/// in `chat_template.json`.
fn chat_templates(folder: &Path, config: &Map<String, Value>) -> Result<Vec<(String, String)>> {
    let mut templates = Vec::new();
    let file = folder.join("chat_template.jinja");
    if has_file(&file)? {
        templates.push(("default".to_owned(), read_text(&file).at(file.display())?));
    }
    let others = folder.join("additional_chat_templates");
    let mut additional = Vec::new();
    if has_folder(&others)? {
        for entry in std::fs::read_dir(&others).at(others.display())? {
            let file = entry.at(others.display())?.path();
            let extension = file.extension();
            if extension.is_some_and(|extension| extension == "jinja") && has_file(&file)? {
                additional.push(file);
            }
        }
    }
    additional.sort();
    for file in additional {
        let name = file
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        templates.push((name, read_text(&file).at(file.display())?));
    }
    if !templates.is_empty() {
        return Ok(templates);
    }
    let processor = optional_json(&folder.join("chat_template.json"))?.unwrap_or_default();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Ok(
        match config
            .get("chat_template")
            .or_else(|| processor.get("chat_template"))
        {
            Some(Value::String(template)) => vec![("default".to_owned(), template.clone())],
            Some(Value::Array(named)) => named
                .iter()
                .filter_map(|entry| Some((text(&entry["name"])?, text(&entry["template"])?)))
                .collect(),
            Some(Value::Object(named)) => named
                .iter()
                .filter_map(|(name, template)| Some((name.clone(), text(template)?)))
                .collect(),
            _ => Vec::new(),
        },
    )
}

fn parse(json: &[u8]) -> Result<tokenizers::Tokenizer> {
    contained(FILE, || tokenizers::Tokenizer::from_bytes(json))?
        .map_err(|error| Error::new(format!("{FILE} is not a tokenizer: {error}")))
}

/// What a post-processor puts before and after a text, found by letting it process a single token.
fn added_by(processor: &tokenizers::PostProcessorWrapper) -> Result<(Vec<u32>, Vec<u32>)> {
    let token = Token::new(0, String::new(), (0, 0));
    let single = tokenizers::Encoding::from_tokens(vec![token], 0);
    let encoding = contained(FILE, || processor.process(single, None, true))?
        .map_err(|error| Error::new(format!("the post-processor of {FILE} fails: {error}")))?;
    let added = |(token, special): (&u32, &u32)| (*special == 1).then_some(*token);
    let both = || {
        encoding
            .get_ids()
            .iter()
            .zip(encoding.get_special_tokens_mask())
    };
    let before: Vec<u32> = both().map_while(added).collect();
    let mut after: Vec<u32> = both().rev().map_while(added).collect();
    after.reverse();
    Ok((before, after))
}

/// The tokenizer without the space it puts in front of a text, if it does.
///
/// The space comes from a `Prepend` normalizer, or from a `Metaspace` or `ByteLevel` pre-tokenizer.
fn without_leading_space(mut json: Value) -> Result<Option<tokenizers::Tokenizer>> {
    let mut changed = false;
    for part in ["normalizer", "pre_tokenizer"] {
        if let Some(part) = json.get_mut(part) {
            changed |= remove_leading_space(part);
        }
    }
    if !changed {
        return Ok(None);
    }
    json["post_processor"] = Value::Null;
    json["truncation"] = Value::Null;
    json["padding"] = Value::Null;
    parse(json.to_string().as_bytes()).map(Some)
}

fn remove_leading_space(part: &mut Value) -> bool {
    match part["type"].as_str() {
        Some("Sequence") => {
            let mut changed = false;
            for list in ["normalizers", "pretokenizers"] {
                if let Some(Value::Array(parts)) = part.get_mut(list) {
                    parts
                        .iter_mut()
                        .for_each(|part| changed |= remove_leading_space(part));
                }
            }
            changed
        }
        Some("Prepend") => {
            *part = serde_json::json!({"type": "Sequence", "normalizers": []});
            true
        }
        Some("Metaspace") if part["prepend_scheme"] != "never" => {
            part["prepend_scheme"] = "never".into();
            if part.get("add_prefix_space").is_some() {
                part["add_prefix_space"] = false.into();
            }
            true
        }
        Some("ByteLevel") if part["add_prefix_space"] == true => {
            part["add_prefix_space"] = false.into();
            true
        }
        _ => false,
    }
}

/// A special token in a configuration file: its text, or an object with the text as `content`.
fn special_token_text(value: &Value) -> Option<String> {
    value
        .as_str()
        .or_else(|| value.get("content")?.as_str())
        .map(str::to_owned)
}

fn token(value: &Value) -> Option<u32> {
    value.as_u64()?.try_into().ok()
}

/// A JSON object from a file that need not exist.
fn optional_json(file: &Path) -> Result<Option<Map<String, Value>>> {
    if !has_file(file)? {
        return Ok(None);
    }
    let bytes = read_small(file).at(file.display())?;
    serde_json::from_slice(&bytes).at(file.display()).map(Some)
}

fn no_tokenizer(folder: &Path) -> Error {
    if !folder.is_dir() {
        return Error::new("no such folder").at(folder.display());
    }
    let other = [
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "vocab.json",
        "vocab.txt",
    ]
    .into_iter()
    .find(|name| folder.join(name).is_file());
    match other {
        Some(other) => Error::new(format!("no `tokenizer.json`, only `{other}`"))
            .hint("write one with transformers: `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"),
        None => Error::new("no `tokenizer.json`")
            .hint("copy the tokenizer of the model it was made from into the folder"),
    }
    .at(folder.display())
}
