//! Sites: the places in a model where a method may act, and all it may know of them.

use super::BaseLinear;
use crate::Result;
use candle_core::Tensor;

/// The sizes of a model that a method may ask for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelShape {
    /// Length of a hidden state.
    pub hidden_size: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Number of query heads.
    pub attention_heads: usize,
    /// Number of key/value heads.
    pub key_value_heads: usize,
    /// Number of tokens in the vocabulary.
    pub vocabulary: usize,
    /// Number of positions the model was made for.
    pub max_positions: usize,
    /// Whether the output head is the embedding matrix itself.
    pub tied_head: bool,
    /// Module path of the output head, `lm_head` in every decoder so far.
    pub head_path: &'static str,
}

/// A frozen linear layer that may be adapted.
pub struct LinearSite<'a> {
    /// Hugging Face module path, such as `model.layers.3.self_attn.q_proj`: the identity of the layer everywhere.
    pub path: &'a str,
    /// The frozen layer.
    pub base: &'a dyn BaseLinear,
    /// Sizes of the whole model.
    pub model: &'a ModelShape,
}

impl LinearSite<'_> {
    /// The number of the block the layer stands in, if it stands in one.
    pub fn layer(&self) -> Option<usize> {
        layer_of(self.path)
    }

    /// Whether this is the output head.
    pub fn is_head(&self) -> bool {
        self.path == self.model.head_path
    }

    /// The name PEFT gives to a tensor of this site, such as `base_model.model.<path>.lora_A.weight`.
    pub fn peft_name(&self, tensor: &str) -> String {
        format!("base_model.model.{}.{tensor}", self.path)
    }
}

/// The token embedding, `(vocabulary, hidden_size)`, frozen.
pub struct EmbeddingSite<'a> {
    /// Hugging Face module path, such as `model.embed_tokens`.
    pub path: &'a str,
    /// Makes the frozen matrix in f32, `(vocabulary, hidden_size)`.
    pub weight: &'a dyn Fn() -> Result<Tensor>,
    /// Sizes of the whole model.
    pub model: &'a ModelShape,
}

impl EmbeddingSite<'_> {
    /// The name PEFT gives to a tensor of this site.
    pub fn peft_name(&self, tensor: &str) -> String {
        format!("base_model.model.{}.{tensor}", self.path)
    }
}

/// One weight of the base, such as `model.layers.3.mlp.up_proj.weight`.
pub struct ParameterSite<'a> {
    /// Full name of the tensor in the checkpoint.
    pub name: &'a str,
    /// Sizes of the whole model.
    pub model: &'a ModelShape,
}

impl ParameterSite<'_> {
    /// The number of the block the parameter stands in, if it stands in one.
    pub fn layer(&self) -> Option<usize> {
        layer_of(self.name)
    }

    /// Whether it belongs to the output head.
    pub fn is_head(&self) -> bool {
        self.name
            .strip_prefix(self.model.head_path)
            .is_some_and(|rest| rest.starts_with('.'))
    }
}

/// Turns text into token ids and their embedding rows, so that a prompt can start from real words.
pub trait TextRows {
    /// Token ids of `text`, without special tokens.
    fn tokens(&self, text: &str) -> Result<Vec<u32>>;
    /// The embedding rows of `tokens`, f32 `(tokens, hidden_size)`.
    fn rows(&self, tokens: &[u32]) -> Result<Tensor>;
}

/// The input of the model, where rows can be put in front of the embedded tokens.
pub struct InputSite<'a> {
    /// Real token rows to start from.
    pub text: &'a dyn TextRows,
    /// Sizes of the whole model.
    pub model: &'a ModelShape,
}

/// The first number in a module path: the layer, as PEFT counts for `layers_to_transform`.
pub fn layer_of(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}
