//! `config.json`: what a Hugging Face checkpoint says about itself, checked before anything is loaded.
//!
//! Read as transformers 5.23 reads it (`configuration_{llama,mistral,qwen2,qwen3}.py`, `configuration_utils.py`):
//! the same defaults per model type, and the same precedence where a fact can stand in two places. Deny by default:
//! a field that is neither implemented nor known to be without effect is refused, unless it is null, false or empty.

mod fields;
mod rope;
#[cfg(test)]
mod tests;

use super::checkpoint::Checkpoint;
use super::inventory::EMBEDDING;
use crate::adapters::hooks::ModelShape;
use crate::adapters::storage::read_text;
use crate::data::{has_file, quoted};
use crate::ops::Activation;
use crate::{Context, Error, Result};
use candle_core::DType;
use fields::Fields;
use std::path::Path;

pub use rope::{RopeConfig, RopeScaling, Yarn};

/// The `model_type`s that can be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ModelType {
    /// Llama 1 to 3 and all that share their architecture (TinyLlama, SmolLM2, …).
    Llama,
    /// Mistral 7B and relatives: Llama with a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: Llama with biases on q, k and v.
    Qwen2,
    /// Qwen3: Llama with a norm on each query and key head.
    Qwen3,
}

impl ModelType {
    /// All of them, in the order in which they are listed to users.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    fn read(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name).ok_or_else(|| {
            Error::new(format!("model type {} is not implemented", quoted(name))).hint(format!(
                "implemented are {}; a model of another type whose weights are really of one of these needs its \
                 `model_type` changed",
                Self::ALL.map(|known| format!("`{}`", known.name())).join(", ")
            ))
        })
    }
}

/// Which projections of the attention add a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionBias {
    /// `q_proj`, `k_proj` and `v_proj`.
    pub query_key_value: bool,
    /// `o_proj`.
    pub output: bool,
}

/// What `config.json` says, right by construction.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The architecture.
    pub model_type: ModelType,
    /// Length of a hidden state (`hidden_size`).
    pub hidden_size: usize,
    /// Width of the feed-forward layers (`intermediate_size`).
    pub intermediate_size: usize,
    /// Number of blocks (`num_hidden_layers`).
    pub layers: usize,
    /// Number of query heads (`num_attention_heads`).
    pub attention_heads: usize,
    /// Number of key/value heads (`num_key_value_heads`), a divisor of the query heads.
    pub key_value_heads: usize,
    /// Length of one head (`head_dim`), even; `attention_heads · head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Number of rows of the embedding (`vocab_size`).
    pub vocabulary: usize,
    /// Number of positions the model was made for (`max_position_embeddings`).
    pub max_positions: usize,
    /// Added to the mean square in every norm (`rms_norm_eps`).
    pub rms_norm_epsilon: f64,
    /// Function inside the feed-forward layers (`hidden_act`).
    pub activation: Activation,
    /// Biases of the attention projections: by `attention_bias`, or always on q, k, v in qwen2.
    pub attention_bias: AttentionBias,
    /// Whether the three feed-forward projections have biases (`mlp_bias`).
    pub feed_forward_bias: bool,
    /// Whether each query and key head is normalised before rotation (qwen3).
    pub query_key_norm: bool,
    /// Whether the output head is the embedding matrix (`tie_word_embeddings`, unless the weights hold another head).
    pub tied_head: bool,
    /// Per block, the number of last positions that a token sees, itself included; `None` sees all.
    pub sliding_windows: Vec<Option<usize>>,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// `bos_token_id`.
    pub first_token: Option<u32>,
    /// `eos_token_id`, which may be a list.
    pub end_tokens: Vec<u32>,
    /// The type the weights were saved in (`dtype`, formerly `torch_dtype`).
    pub dtype: Option<DType>,
    /// What was read and does not mean here what it says, or what it means in transformers; for the user to know.
    pub notes: Vec<String>,
}

impl ModelConfig {
    /// The sizes that methods and reports ask for.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            hidden_size: self.hidden_size,
            layers: self.layers,
            attention_heads: self.attention_heads,
            key_value_heads: self.key_value_heads,
            vocabulary: self.vocabulary,
            max_positions: self.max_positions,
            tied_head: self.tied_head,
            head_path: "lm_head",
        }
    }

    /// The most positions the model was made for, those that its rotation was stretched to included.
    pub fn context(&self) -> usize {
        let stretched = match &self.rope.scaling {
            RopeScaling::Dynamic { factor } => self.max_positions as f64 * factor,
            RopeScaling::Yarn(yarn) => yarn.original_positions as f64 * yarn.factor,
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 0.0,
        };
        self.max_positions.max(stretched as usize)
    }

    /// Reads `config.json` in `folder`. Where it ties the head to the embedding and the weights beside it hold a head with
    /// other values, the two are not tied: as in transformers 5, `PreTrainedModel.tie_weights`.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        if !has_file(&path)? {
            return Err(Error::new("a checkpoint needs a `config.json`, and there is none")
                .at(folder.display())
                .hint("point to the folder that holds `config.json` and `model.safetensors`, or to a hub id such as `org/name`"));
        }
        let text = read_text(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidData => Error::new("not a text file").at(path.display()),
            _ => crate::IntoError::into_error(error).at(path.display()),
        })?;
        let mut config = Self::parse(&text).at(path.display())?;
        if config.tied_head
            && let Some(head) = config.other_head(folder)
        {
            config.tied_head = false;
            config.notes.push(format!(
                "`tie_word_embeddings` is true, but `{head}` is not the embedding: the two are not tied, as in \
                 transformers 5; set it to false in `config.json` to say so to every reader"
            ));
        }
        Ok(config)
    }

    /// The name of the head's own matrix, if the weights in `folder` hold one that is not the embedding's.
    fn other_head(&self, folder: &Path) -> Option<String> {
        // What is wrong with the weights is said when they are loaded.
        let checkpoint = Checkpoint::open(folder).ok()?;
        let head = format!("{}.weight", self.shape().head_path);
        let (own, shared) = (
            checkpoint.stored(&head).ok()?,
            checkpoint.stored(EMBEDDING).ok()?,
        );
        (own != shared).then_some(head)
    }

    /// Reads the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self> {
        let json: serde_json::Value =
            serde_json::from_str(text).map_err(crate::IntoError::into_error)?;
        let serde_json::Value::Object(map) = json else {
            return Err(Error::new("expected a JSON object of fields"));
        };
        let mut fields = Fields::new(map);
        let model_type = ModelType::read(&fields.required_text("model_type")?)?;

        let sizes = Sizes::read(&mut fields, model_type);
        let config = Self {
            model_type,
            hidden_size: sizes.hidden_size,
            intermediate_size: sizes.intermediate_size,
            layers: sizes.layers,
            attention_heads: sizes.attention_heads,
            key_value_heads: sizes.key_value_heads,
            head_dim: sizes.head_dim,
            vocabulary: sizes.vocabulary,
            max_positions: sizes.max_positions,
            rms_norm_epsilon: fields.number("rms_norm_eps").unwrap_or(1e-6),
            activation: read_activation(&mut fields),
            attention_bias: read_attention_bias(&mut fields, model_type),
            feed_forward_bias: model_type == ModelType::Llama
                && fields.flag("mlp_bias").unwrap_or(false),
            query_key_norm: model_type == ModelType::Qwen3,
            tied_head: fields.flag("tie_word_embeddings").unwrap_or(false),
            sliding_windows: read_sliding_windows(&mut fields, model_type, sizes.layers),
            rope: rope::read(&mut fields, sizes.max_positions),
            first_token: read_tokens(&mut fields, "bos_token_id", model_type)
                .first()
                .copied(),
            end_tokens: read_tokens(&mut fields, "eos_token_id", model_type),
            dtype: read_dtype(&mut fields),
            notes: read_notes(&mut fields),
        };
        fields.finish(model_type)?;
        config.check()?;
        Ok(config)
    }

    /// The matrices of all blocks, of the embedding and of the head.
    fn weights(&self) -> u64 {
        let product = |left: usize, right: usize| left as u64 * right as u64;
        let heads = self.attention_heads + self.key_value_heads;
        let attention = 2 * product(heads * self.head_dim, self.hidden_size);
        let block = attention + 3 * product(self.intermediate_size, self.hidden_size);
        self.layers as u64 * block + 2 * product(self.vocabulary, self.hidden_size)
    }

    /// Refuses sizes that no model can have.
    fn check(&self) -> Result<()> {
        let mut problems = Vec::new();
        // Far above any model there is, and low enough that products of two of them cannot overflow.
        for (name, size, limit) in [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 22),
            ("num_hidden_layers", self.layers, 1 << 12),
            ("num_attention_heads", self.attention_heads, 1 << 14),
            ("num_key_value_heads", self.key_value_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 14),
            ("vocab_size", self.vocabulary, 1 << 26),
            ("max_position_embeddings", self.max_positions, 1 << 31),
        ] {
            if size == 0 || size > limit {
                problems.push(format!("`{name}` is {size}, expected 1 to {limit}"));
            }
        }
        if self.key_value_heads > 0 && !self.attention_heads.is_multiple_of(self.key_value_heads) {
            problems.push(format!(
                "`num_attention_heads` ({}) is not a multiple of `num_key_value_heads` ({})",
                self.attention_heads, self.key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            problems.push(format!(
                "`head_dim` is {}, and rotation needs an even one",
                self.head_dim
            ));
        }
        if !(self.rms_norm_epsilon >= 0.0 && self.rms_norm_epsilon < 1.0) {
            problems.push(format!(
                "`rms_norm_eps` is {}, expected 0 to 1",
                self.rms_norm_epsilon
            ));
        }
        if self.sliding_windows.contains(&Some(0)) {
            problems.push("`sliding_window` is 0, so no token would see anything".to_owned());
        }
        for token in self.first_token.iter().chain(&self.end_tokens) {
            if *token as usize >= self.vocabulary {
                problems.push(format!(
                    "token {token} is outside of the vocabulary of {}",
                    self.vocabulary
                ));
            }
        }
        self.rope.check(self.head_dim, &mut problems);
        // Each size by itself is one that can be counted with, so this cannot overflow.
        if problems.is_empty() && self.weights() > MOST_WEIGHTS {
            problems.push(format!(
                "the sizes make a model of {} weights, expected at most {MOST_WEIGHTS}",
                self.weights()
            ));
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::new(problems.join("; ")).hint("compare the file with the original on the hub"))
    }
}

/// Far above any model there is, and low enough that its bytes and operations can be counted.
const MOST_WEIGHTS: u64 = 1 << 44;

struct Sizes {
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    attention_heads: usize,
    key_value_heads: usize,
    head_dim: usize,
    vocabulary: usize,
    max_positions: usize,
}

impl Sizes {
    fn read(fields: &mut Fields, model_type: ModelType) -> Self {
        let hidden_size = fields.required_size("hidden_size");
        let attention_heads = fields.required_size("num_attention_heads");
        // Absent and null differ: an absent field takes the class's default, null means "as many as query heads".
        let key_value_heads = match (fields.has("num_key_value_heads"), model_type) {
            (false, ModelType::Mistral) => Some(8),
            (false, ModelType::Qwen2 | ModelType::Qwen3) => Some(32),
            _ => fields.size("num_key_value_heads"),
        };
        let head_dim = match (fields.has("head_dim"), model_type) {
            (false, ModelType::Qwen3) => Some(128),
            _ => fields.size("head_dim"),
        };
        if head_dim.is_none() && attention_heads > 0 && !hidden_size.is_multiple_of(attention_heads)
        {
            fields.problem(format!(
                "`hidden_size` ({hidden_size}) is not a multiple of `num_attention_heads` ({attention_heads}), and there is no `head_dim`"
            ));
        }
        Self {
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size"),
            layers: fields.required_size("num_hidden_layers"),
            attention_heads,
            key_value_heads: key_value_heads.unwrap_or(attention_heads),
            head_dim: head_dim
                .unwrap_or_else(|| hidden_size.checked_div(attention_heads).unwrap_or(0)),
            vocabulary: fields.required_size("vocab_size"),
            max_positions: fields
                .size("max_position_embeddings")
                .unwrap_or(match model_type {
                    ModelType::Llama => 2048,
                    ModelType::Mistral => 131_072,
                    ModelType::Qwen2 | ModelType::Qwen3 => 32_768,
                }),
        }
    }
}

fn read_activation(fields: &mut Fields) -> Activation {
    match fields.text("hidden_act").as_deref() {
        None | Some("silu" | "swish") => Activation::Silu,
        Some("gelu") => Activation::Gelu,
        Some("gelu_new" | "gelu_pytorch_tanh") => Activation::GeluTanh,
        Some(other) => {
            fields.refuse(
                "hidden_act",
                format!("{other:?}"),
                "implemented are `silu`, `gelu`, `gelu_new` and `gelu_pytorch_tanh`",
            );
            Activation::Silu
        }
    }
}

fn read_attention_bias(fields: &mut Fields, model_type: ModelType) -> AttentionBias {
    let (query_key_value, output) = match model_type {
        ModelType::Llama | ModelType::Qwen3 => {
            let bias = fields.flag("attention_bias").unwrap_or(false);
            (bias, bias)
        }
        ModelType::Mistral => (false, false),
        ModelType::Qwen2 => {
            // The architecture has no such choice, and transformers ignores the field.
            fields.flag("attention_bias");
            (true, false)
        }
    };
    AttentionBias {
        query_key_value,
        output,
    }
}

fn read_sliding_windows(
    fields: &mut Fields,
    model_type: ModelType,
    layers: usize,
) -> Vec<Option<usize>> {
    // An absurd number of layers is reported later; it must not be allocated before.
    let layers = layers.min(1 << 12);
    let listed = fields.texts("layer_types");
    let windows = match model_type {
        ModelType::Llama => vec![None; layers],
        ModelType::Mistral => {
            let window = if fields.has("sliding_window") {
                fields.size("sliding_window")
            } else {
                Some(4096)
            };
            vec![window; layers]
        }
        ModelType::Qwen2 | ModelType::Qwen3 => {
            let used = fields.flag("use_sliding_window").unwrap_or(false);
            let size = if fields.has("sliding_window") {
                fields.size("sliding_window")
            } else {
                Some(4096)
            };
            let window = size.filter(|_| used);
            let first = fields.size("max_window_layers").unwrap_or(28);
            match &listed {
                None => (0..layers)
                    .map(|layer| window.filter(|_| layer >= first))
                    .collect(),
                Some(types) => types
                    .iter()
                    .map(|kind| window.filter(|_| kind == "sliding_attention"))
                    .collect(),
            }
        }
    };
    if let Some(types) = listed {
        let stated: Vec<_> = windows
            .iter()
            .map(|window| {
                if window.is_some() {
                    "sliding_attention"
                } else {
                    "full_attention"
                }
            })
            .collect();
        if types.len() != layers {
            fields.problem(format!(
                "`layer_types` lists {} layers, and `num_hidden_layers` is {layers}",
                types.len()
            ));
        } else if let Some(layer) = (0..layers).find(|layer| types[*layer] != stated[*layer]) {
            fields.refuse(
                "layer_types",
                format!("{:?} at layer {layer}", types[layer]),
                "the other fields make this layer something else, or the kind is not implemented",
            );
        }
    }
    windows
}

/// One token id, a list of them, or none. Some published files say -1 for none.
fn read_tokens(fields: &mut Fields, name: &str, model_type: ModelType) -> Vec<u32> {
    if !fields.has(name) {
        return match (model_type, name) {
            (ModelType::Llama | ModelType::Mistral, "bos_token_id") => vec![1],
            (ModelType::Llama | ModelType::Mistral, "eos_token_id") => vec![2],
            _ => Vec::new(),
        };
    }
    let Some(value) = fields.value(name) else {
        return Vec::new();
    };
    let listed = match value {
        serde_json::Value::Array(list) => list,
        single => vec![single],
    };
    let tokens: Option<Vec<i64>> = listed.iter().map(serde_json::Value::as_i64).collect();
    let tokens = tokens.map(|tokens| {
        tokens
            .into_iter()
            .filter(|token| *token >= 0)
            .map(u32::try_from)
            .collect::<Result<Vec<_>, _>>()
    });
    match tokens {
        Some(Ok(tokens)) => tokens,
        _ => {
            fields.problem(format!("`{name}` is neither a token id nor a list of them"));
            Vec::new()
        }
    }
}

fn read_dtype(fields: &mut Fields) -> Option<DType> {
    let former = fields.text("torch_dtype");
    let name = fields.text("dtype").or(former)?;
    match name.strip_prefix("torch.").unwrap_or(&name) {
        "float32" | "float" => Some(DType::F32),
        "float16" | "half" => Some(DType::F16),
        "bfloat16" => Some(DType::BF16),
        "float64" | "double" => Some(DType::F64),
        _ => {
            fields.refuse(
                "dtype",
                format!("{name:?}"),
                "implemented are `float32`, `float16`, `bfloat16` and `float64`",
            );
            None
        }
    }
}

fn read_notes(fields: &mut Fields) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(rate) = fields
        .number("attention_dropout")
        .filter(|rate| *rate != 0.0)
    {
        notes.push(format!(
            "`attention_dropout` is {rate}: transformers applies it while training, retune does not"
        ));
    }
    notes
}
