//! What the new base is to be: a small TOML file, checked before anything is computed.

use crate::adapters::storage::read_text;
use crate::data::ChatTemplate;
use crate::model::config::ModelType;
use crate::{Context, Error, Result};
use candle_core::DType;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

/// Tokens that every byte-level vocabulary begins with.
const BYTES: usize = 256;

/// A base that does not exist yet, right by construction.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// The architecture.
    pub model_type: ModelType,
    /// Number of tokens, the special ones included.
    pub vocabulary: usize,
    /// Length of a hidden state.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Number of query heads.
    pub attention_heads: usize,
    /// Number of key/value heads.
    pub key_value_heads: usize,
    /// Length of one head.
    pub head_dim: usize,
    /// Whether the output head is the embedding matrix.
    pub tied_head: bool,
    /// Longest sequence the model is made for.
    pub max_positions: usize,
    /// Base of the rotary wavelengths.
    pub rope_theta: f64,
    /// Added to the mean square in every norm.
    pub rms_norm_epsilon: f64,
    /// What the finished weights are stored as.
    pub dtype: DType,
    /// The special tokens.
    pub special_tokens: SpecialTokens,
    /// Source of the chat template.
    pub chat_template: Option<String>,
}

/// Tokens with a meaning of their own, which no text is cut into.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpecialTokens {
    /// Put before every text.
    pub bos: Option<String>,
    /// Put after every text; generation stops there.
    pub eos: String,
    /// Fills up batches in programs that need it.
    pub pad: Option<String>,
    /// Stands for what the vocabulary lacks: a byte-level one lacks nothing.
    pub unk: Option<String>,
    /// The marks of the chat template.
    #[serde(default)]
    pub extra: Vec<String>,
    /// Those after which generation stops, besides `eos`: the mark that ends a turn.
    #[serde(default)]
    pub stop: Vec<String>,
}

/// The file as typed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ShapeFile {
    model_type: String,
    vocabulary: usize,
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    attention_heads: usize,
    key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "yes")]
    tied_head: bool,
    max_positions: usize,
    #[serde(default = "default_rope_theta")]
    rope_theta: f64,
    #[serde(default = "default_epsilon")]
    rms_norm_epsilon: f64,
    #[serde(default = "default_dtype")]
    dtype: String,
    special_tokens: SpecialTokens,
    chat_template: Option<PathBuf>,
}

fn yes() -> bool {
    true
}

fn default_rope_theta() -> f64 {
    10_000.0
}

fn default_epsilon() -> f64 {
    1e-6
}

fn default_dtype() -> String {
    "bf16".to_owned()
}

/// Names of the types that weights can be stored as.
const DTYPES: [(&str, DType); 3] = [
    ("bf16", DType::BF16),
    ("f16", DType::F16),
    ("f32", DType::F32),
];

impl Shape {
    /// Reads a shape file, whose chat template lies in the file's folder or below.
    pub fn read(file: &Path) -> Result<Self> {
        let text = read_text(file).at(file.display())?;
        Self::parse(&text, file.parent().unwrap_or(Path::new("."))).at(file.display())
    }

    /// Reads the text of a shape file.
    pub fn parse(text: &str, folder: &Path) -> Result<Self> {
        let typed: ShapeFile = toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            let place = line.map_or(String::new(), |line| format!("line {line}: "));
            Error::new(format!("{place}{}", error.message().trim_end()))
                .hint("`retune pretrain --help` lists the fields of a shape file")
        })?;
        typed.validated(folder)
    }

    /// The name of the stored type, as in the file.
    pub fn dtype_name(&self) -> &'static str {
        DTYPES
            .iter()
            .find(|(_, dtype)| *dtype == self.dtype)
            .map_or("f32", |(name, _)| name)
    }
}

impl SpecialTokens {
    /// All of them once each, in the order of their ids: `eos` first, so that it is 0 whatever follows.
    pub fn all(&self) -> Vec<&str> {
        let named = [
            Some(&self.eos),
            self.bos.as_ref(),
            self.pad.as_ref(),
            self.unk.as_ref(),
        ];
        let mut seen = BTreeSet::new();
        named
            .into_iter()
            .flatten()
            .chain(&self.extra)
            .map(String::as_str)
            .filter(|token| seen.insert(*token))
            .collect()
    }

    /// The tokens after which generation stops.
    pub fn stops(&self) -> Vec<&str> {
        let mut seen = BTreeSet::new();
        std::iter::once(&self.eos)
            .chain(&self.stop)
            .map(String::as_str)
            .filter(|token| seen.insert(*token))
            .collect()
    }
}

impl ShapeFile {
    fn validated(self, folder: &Path) -> Result<Shape> {
        let mut problems = Vec::new();
        let model_type = ModelType::ALL
            .into_iter()
            .find(|known| known.name() == self.model_type);
        if model_type.is_none() {
            problems.push(format!(
                "`model_type` is `{}`, expected {}",
                self.model_type,
                listed(ModelType::ALL.map(ModelType::name))
            ));
        }
        let dtype = DTYPES.iter().find(|(name, _)| *name == self.dtype);
        if dtype.is_none() {
            problems.push(format!(
                "`dtype` is `{}`, expected {}",
                self.dtype,
                listed(DTYPES.map(|(name, _)| name))
            ));
        }
        for (name, size, limit) in [
            ("hidden_size", self.hidden_size, 1 << 16),
            ("intermediate_size", self.intermediate_size, 1 << 18),
            ("layers", self.layers, 1 << 10),
            ("attention_heads", self.attention_heads, 1 << 10),
            ("max_positions", self.max_positions, 1 << 24),
        ] {
            if size == 0 || size > limit {
                problems.push(format!("`{name}` is {size}, expected 1 to {limit}"));
            }
        }
        let key_value_heads = self.key_value_heads.unwrap_or(self.attention_heads);
        if key_value_heads == 0 || !self.attention_heads.is_multiple_of(key_value_heads) {
            problems.push(format!(
                "`key_value_heads` is {key_value_heads}, expected a divisor of `attention_heads` ({})",
                self.attention_heads
            ));
        }
        let head_dim = self.head_dim(&mut problems);
        if !(self.rope_theta > 1.0 && self.rope_theta.is_finite()) {
            problems.push(format!(
                "`rope_theta` is {}, expected more than 1",
                self.rope_theta
            ));
        }
        if !(self.rms_norm_epsilon > 0.0 && self.rms_norm_epsilon < 0.1) {
            problems.push(format!(
                "`rms_norm_epsilon` is {}, expected a small positive number such as 1e-6",
                self.rms_norm_epsilon
            ));
        }
        self.check_tokens(&mut problems);
        let (Some(model_type), Some((_, dtype)), true) = (model_type, dtype, problems.is_empty())
        else {
            return Err(Error::new(problems.join("; ")));
        };
        let chat_template = match &self.chat_template {
            None => None,
            Some(file) => {
                // Somebody else's shape could have any file of this machine copied into a base.
                let is_plain = |part| matches!(part, Component::Normal(_) | Component::CurDir);
                if !file.components().all(is_plain) {
                    return Err(Error::new(format!(
                        "`chat_template` is `{}`, which leads out of the folder of the shape file",
                        file.display()
                    ))
                    .hint("put the template beside the shape file, and name it alone"));
                }
                let file = folder.join(file);
                let source = read_text(&file).at(file.display())?;
                ChatTemplate::new(&source).at(file.display())?;
                Some(source)
            }
        };
        Ok(Shape {
            model_type,
            vocabulary: self.vocabulary,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            layers: self.layers,
            attention_heads: self.attention_heads,
            key_value_heads,
            head_dim,
            tied_head: self.tied_head,
            max_positions: self.max_positions,
            rope_theta: self.rope_theta,
            rms_norm_epsilon: self.rms_norm_epsilon,
            dtype: *dtype,
            special_tokens: self.special_tokens,
            chat_template,
        })
    }

    fn head_dim(&self, problems: &mut Vec<String>) -> usize {
        let Some(head_dim) = self.head_dim else {
            let whole = self.hidden_size.is_multiple_of(self.attention_heads.max(1));
            let head_dim = self.hidden_size / self.attention_heads.max(1);
            if !whole || !head_dim.is_multiple_of(2) {
                problems.push(format!(
                    "`hidden_size` ({}) does not make `attention_heads` ({}) heads of an even length, and there is no \
                     `head_dim`",
                    self.hidden_size, self.attention_heads
                ));
            }
            return head_dim;
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 1 << 12 {
            problems.push(format!(
                "`head_dim` is {head_dim}, expected an even number up to {}",
                1 << 12
            ));
        }
        head_dim
    }

    fn check_tokens(&self, problems: &mut Vec<String>) {
        let tokens = &self.special_tokens;
        let all = tokens.all();
        if all.iter().any(|token| token.trim().is_empty()) {
            problems.push("a special token is empty".to_owned());
        }
        if let Some(single) = all.iter().find(|token| token.chars().count() == 1) {
            // It would be a token of the byte alphabet at the same time.
            problems.push(format!(
                "the special token `{single}` is a single character"
            ));
        }
        for stop in &tokens.stop {
            if !all.contains(&stop.as_str()) {
                problems.push(format!(
                    "`stop` names `{stop}`, which is not among the special tokens"
                ));
            }
        }
        let least = BYTES + all.len();
        if self.vocabulary < least || self.vocabulary > 1 << 20 {
            problems.push(format!(
                "`vocabulary` is {}, expected {least} (all bytes and {} special tokens) to {}",
                self.vocabulary,
                all.len(),
                1 << 20
            ));
        }
    }
}

fn listed<const N: usize>(names: [&str; N]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: &str = r#"
model_type = "qwen3"
vocabulary = 300
hidden_size = 32
intermediate_size = 64
layers = 2
attention_heads = 4
key_value_heads = 2
max_positions = 64

[special_tokens]
eos = "<|end|>"
extra = ["<|turn|>"]
"#;

    fn message(text: &str) -> String {
        Shape::parse(text, Path::new("."))
            .expect_err("not a shape")
            .to_string()
    }

    #[test]
    fn what_is_left_out_has_a_default() -> Result<()> {
        let shape = Shape::parse(SHAPE, Path::new("."))?;
        assert_eq!(
            (shape.head_dim, shape.tied_head, shape.dtype),
            (8, true, DType::BF16)
        );
        assert_eq!(shape.special_tokens.all(), ["<|end|>", "<|turn|>"]);
        assert_eq!(shape.special_tokens.stops(), ["<|end|>"]);
        Ok(())
    }

    #[test]
    fn an_unknown_field_is_named_with_its_line() {
        let error = message(&SHAPE.replace("layers = 2", "layer = 2"));
        assert!(
            error.contains("line 6") && error.contains("`layer`") && error.contains("`layers`"),
            "{error}"
        );
        let error = message(&SHAPE.replace("eos = ", "eof = "));
        assert!(error.contains("`eof`"), "{error}");
    }

    #[test]
    fn a_missing_field_is_named() {
        let error = message(&SHAPE.replace("hidden_size = 32\n", ""));
        assert!(error.contains("`hidden_size`"), "{error}");
    }

    #[test]
    fn senseless_values_are_named_together() {
        let text = SHAPE
            .replace("qwen3", "gpt9")
            .replace("vocabulary = 300", "vocabulary = 200")
            .replace("attention_heads = 4", "attention_heads = 3")
            .replace("extra = [", "stop = [\"<|nobody|>\"]\nextra = [\"x\", ");
        let error = message(&text);
        for part in [
            "`gpt9`",
            "`vocabulary` is 200, expected 259",
            "divisor",
            "`<|nobody|>`",
            "`x` is a single",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn a_missing_chat_template_is_named() {
        let error = message(&SHAPE.replace(
            "[special_tokens]",
            "chat_template = \"gone.jinja\"\n[special_tokens]",
        ));
        assert!(error.contains("gone.jinja"), "{error}");
    }

    #[test]
    fn a_chat_template_lies_in_the_folder_of_the_shape() -> Result<()> {
        let home = tempfile::tempdir().expect("a folder");
        let folder = home.path().join("shape");
        std::fs::create_dir_all(folder.join("below")).expect("made");
        for file in ["chat.jinja", "shape/chat.jinja", "shape/below/chat.jinja"] {
            std::fs::write(home.path().join(file), "{{ messages }}").expect("written");
        }
        let read = |template: &str| {
            let line = format!("chat_template = {template:?}\n[special_tokens]");
            Shape::parse(&SHAPE.replace("[special_tokens]", &line), &folder)
        };
        for template in ["chat.jinja", "./chat.jinja", "below/chat.jinja"] {
            assert!(read(template)?.chat_template.is_some());
        }
        let absolute = home.path().join("chat.jinja");
        let absolute = absolute.to_str().expect("UTF-8");
        for template in ["../chat.jinja", "below/../../chat.jinja", absolute] {
            let error = read(template).expect_err(template);
            assert!(
                error.to_string().contains("leads out of the folder"),
                "{error}"
            );
            assert!(error.hint_text().is_some());
        }
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn a_shape_without_end_is_refused() {
        let error = Shape::read(Path::new("/dev/zero")).expect_err("a device");
        assert!(error.to_string().contains("a pipe or a device"), "{error}");
    }
}
