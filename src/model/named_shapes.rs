//! Shapes of well-known models, for measuring without a checkpoint.

use super::ModelConfig;
use crate::{Error, Result};
use serde_json::json;

struct Shape {
    name: &'static str,
    about: &'static str,
    hidden: usize,
    layers: usize,
    heads: usize,
    key_value_heads: usize,
    intermediate: usize,
    vocabulary: usize,
}

const SHAPES: [Shape; 5] = [
    Shape {
        name: "stories15m",
        about: "TinyStories Llama, 24 million weights",
        hidden: 288,
        layers: 6,
        heads: 6,
        key_value_heads: 6,
        intermediate: 768,
        vocabulary: 32_000,
    },
    Shape {
        name: "smol135m",
        about: "SmolLM2-135M",
        hidden: 576,
        layers: 30,
        heads: 9,
        key_value_heads: 3,
        intermediate: 1536,
        vocabulary: 49_152,
    },
    Shape {
        name: "qwen05b",
        about: "Qwen2.5-0.5B without its biases",
        hidden: 896,
        layers: 24,
        heads: 14,
        key_value_heads: 2,
        intermediate: 4864,
        vocabulary: 151_936,
    },
    Shape {
        name: "llama1b",
        about: "Llama-3.2-1B",
        hidden: 2048,
        layers: 16,
        heads: 32,
        key_value_heads: 8,
        intermediate: 8192,
        vocabulary: 128_256,
    },
    Shape {
        name: "llama8b",
        about: "Llama-3.1-8B, its head tied",
        hidden: 4096,
        layers: 32,
        heads: 32,
        key_value_heads: 8,
        intermediate: 14_336,
        vocabulary: 128_256,
    },
];

/// Names and descriptions of the shapes.
pub fn named_shapes() -> impl Iterator<Item = (&'static str, &'static str)> {
    SHAPES.iter().map(|shape| (shape.name, shape.about))
}

/// The shape of this name: a Llama with a tied head.
pub fn named_shape(name: &str) -> Result<ModelConfig> {
    let shape = SHAPES
        .iter()
        .find(|shape| shape.name == name)
        .ok_or_else(|| {
            let known: Vec<_> = SHAPES.iter().map(|shape| shape.name).collect();
            Error::usage(format!("there is no shape `{name}`")).hint(format!(
                "known are {}; the path of a config.json works too",
                known.join(", ")
            ))
        })?;
    let config = json!({
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": true,
        "max_position_embeddings": 32_768,
    });
    ModelConfig::parse(&config.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_can_be_built() -> Result<()> {
        for (name, _) in named_shapes() {
            assert_eq!(
                named_shape(name)?.head_dim * named_shape(name)?.attention_heads,
                named_shape(name)?.hidden_size
            );
        }
        assert!(named_shape("gpt9").is_err());
        Ok(())
    }
}
