//! The weights of a model by name and shape, from its configuration alone, and which of a checkpoint's are none of them.

use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use std::collections::BTreeSet;

/// One weight of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Full name in the checkpoint, such as `model.layers.3.mlp.up_proj.weight`.
    pub name: String,
    /// Its dimensions: `[out, in]` for a matrix.
    pub shape: Vec<usize>,
    /// What it is for.
    pub kind: ParameterKind,
}

/// What a weight is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ParameterKind {
    /// The token embedding, `(vocabulary, hidden)`; the output head too where the two are tied.
    Embedding,
    /// The matrix of a linear layer in a block, `(out, in)`.
    Linear,
    /// The scale of a norm.
    Norm,
    /// The bias of a linear layer.
    Bias,
    /// An output head with a matrix of its own, `(vocabulary, hidden)`.
    Head,
}

impl ParameterKind {
    /// In one word, for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Linear => "linear",
            Self::Norm => "norm",
            Self::Bias => "bias",
            Self::Head => "head",
        }
    }
}

impl Parameter {
    /// Number of values.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Path of the module it belongs to, such as `model.layers.3.mlp.up_proj`.
    pub fn module(&self) -> &str {
        self.name
            .rsplit_once('.')
            .map_or(&self.name, |(module, _)| module)
    }
}

/// Name of the token embedding's matrix.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";

/// How the names of the buffers of rotary embeddings end.
const ROTARY_BUFFER: &str = "rotary_emb.inv_freq";

/// Every weight of a model, in the order in which transformers lists them (`named_parameters`). A tied head has no
/// weight of its own; a checkpoint may store the shared matrix under the head's name alone.
pub fn inventory(config: &ModelConfig) -> Vec<Parameter> {
    let mut list = List(Vec::new());
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let table = vec![config.vocabulary, hidden];
    list.push(
        EMBEDDING.to_owned(),
        table.clone(),
        ParameterKind::Embedding,
    );
    let queries = config.attention_heads * config.head_dim;
    let keys = config.key_value_heads * config.head_dim;
    let (bias, inner_bias) = (config.attention_bias, config.feed_forward_bias);
    for layer in 0..config.layers {
        let block = format!("model.layers.{layer}");
        let attention = format!("{block}.self_attn");
        for (name, rows, columns, bias) in [
            ("q_proj", queries, hidden, bias.query_key_value),
            ("k_proj", keys, hidden, bias.query_key_value),
            ("v_proj", keys, hidden, bias.query_key_value),
            ("o_proj", hidden, queries, bias.output),
        ] {
            list.linear(&format!("{attention}.{name}"), rows, columns, bias);
        }
        if config.query_key_norm {
            list.norm(&format!("{attention}.q_norm"), config.head_dim);
            list.norm(&format!("{attention}.k_norm"), config.head_dim);
        }
        for (name, rows, columns) in [
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        ] {
            list.linear(&format!("{block}.mlp.{name}"), rows, columns, inner_bias);
        }
        list.norm(&format!("{block}.input_layernorm"), hidden);
        list.norm(&format!("{block}.post_attention_layernorm"), hidden);
    }
    list.norm("model.norm", hidden);
    if !config.tied_head {
        let head = format!("{}.weight", config.shape().head_path);
        list.push(head, table, ParameterKind::Head);
    }
    list.0
}

/// The tensors of `checkpoint` that a model of this configuration does not read, in alphabetical order. Not among
/// them is what nobody misses: the matrix of a tied head, and the buffers of rotations, which older versions of transformers
/// saved and newer ones pass over, for they follow from the configuration.
pub fn unused<'a>(config: &ModelConfig, checkpoint: &'a Checkpoint) -> Vec<&'a str> {
    let parameters = inventory(config).into_iter();
    let mut known: BTreeSet<String> = parameters.map(|parameter| parameter.name).collect();
    if config.tied_head {
        known.insert(format!("{}.weight", config.shape().head_path));
    }
    let is_missed = |name: &&str| !known.contains(*name) && !name.ends_with(ROTARY_BUFFER);
    checkpoint.names().filter(is_missed).collect()
}

struct List(Vec<Parameter>);

impl List {
    fn push(&mut self, name: String, shape: Vec<usize>, kind: ParameterKind) {
        self.0.push(Parameter { name, shape, kind });
    }

    fn linear(&mut self, path: &str, rows: usize, columns: usize, bias: bool) {
        self.push(
            format!("{path}.weight"),
            vec![rows, columns],
            ParameterKind::Linear,
        );
        if bias {
            self.push(format!("{path}.bias"), vec![rows], ParameterKind::Bias);
        }
    }

    fn norm(&mut self, path: &str, length: usize) {
        self.push(format!("{path}.weight"), vec![length], ParameterKind::Norm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Result;
    use std::collections::BTreeMap;
    use std::path::Path;

    #[test]
    fn lists_the_tensors_of_every_fixture() -> Result<()> {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
        let mut seen = 0;
        for entry in std::fs::read_dir(models).expect("the fixtures") {
            let folder = entry.expect("a fixture").path();
            let config = ModelConfig::read(&folder)?;
            let checkpoint = Checkpoint::open(&folder)?;
            let listed: BTreeMap<String, Vec<usize>> = inventory(&config)
                .into_iter()
                .map(|parameter| (parameter.name, parameter.shape))
                .collect();
            let stored: BTreeMap<String, Vec<usize>> = checkpoint
                .names()
                .map(|name| {
                    // What a tied model stores under the head's name is the embedding.
                    let known = match name {
                        "lm_head.weight" if config.tied_head => "model.embed_tokens.weight",
                        name => name,
                    };
                    let shape = checkpoint.shape(name).unwrap_or_default();
                    (known.to_owned(), shape.to_vec())
                })
                .collect();
            assert_eq!(listed, stored, "{}", folder.display());
            assert!(unused(&config, &checkpoint).is_empty());
            seen += 1;
        }
        assert!(seen > 10, "{seen}");
        Ok(())
    }
}
