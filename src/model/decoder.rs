//! The pre-norm decoder that llama, mistral, qwen2 and qwen3 share; what sets them apart is in their configuration.
//!
//! `h += o(attention(rope(norm(q x)), rope(norm(k x)), v x))` with `x = norm(h)`, then `h += down(act(gate x) · up x)`.

use super::causal_lm::{CausalLm, Pass};
use super::config::ModelConfig;
use super::embedding::Embedding;
use super::kv_cache::{BlockCache, KvCache};
use super::linear::{HandedOut, Linear};
use super::rotary::Rotary;
use super::scope::Scope;
use crate::Result;
use crate::adapters::hooks::{ModelShape, SoftPrompt};
use crate::ops::{self, AttentionShape};
use candle_core::{Tensor, TensorId};
use std::ops::Range;

pub(super) struct Decoder {
    shape: ModelShape,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: Norm,
    head: Linear,
    rotary: Rotary,
    head_dim: usize,
    pub(super) soft_prompt: Option<Box<dyn SoftPrompt>>,
    pub(super) handed_out: HandedOut,
}

struct Block {
    input_norm: Norm,
    attention: Attention,
    feed_forward_norm: Norm,
    feed_forward: FeedForward,
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    query_norm: Option<Norm>,
    key_norm: Option<Norm>,
    shape: AttentionShape,
}

struct FeedForward {
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: ops::Activation,
}

struct Norm {
    weight: Tensor,
    epsilon: f64,
}

impl Decoder {
    pub(super) fn load(config: &ModelConfig, scope: &Scope, handed_out: HandedOut) -> Result<Self> {
        let shape = config.shape();
        let (hidden, vocabulary) = (config.hidden_size, config.vocabulary);
        let model = scope.enter("model");
        let head_scope = scope.enter(shape.head_path);
        let tied_name = format!("{}.weight", shape.head_path);
        let embedding = model.enter("embed_tokens").embedding(
            vocabulary,
            hidden,
            config.tied_head.then_some(tied_name.as_str()),
        )?;
        let blocks = (0..config.layers)
            .map(|index| Block::load(config, index, &model.enter("layers").enter(index)))
            .collect::<Result<_>>()?;
        let norm = Norm::load(config, &model.enter("norm"), hidden)?;
        let head = if config.tied_head {
            head_scope.tied_head(embedding.weight(), hidden, vocabulary)?
        } else {
            head_scope.linear(hidden, vocabulary, false)?
        };
        Ok(Self {
            shape,
            embedding,
            blocks,
            norm,
            head,
            rotary: Rotary::new(&config.rope, config.head_dim, config.max_positions),
            head_dim: config.head_dim,
            soft_prompt: None,
            handed_out,
        })
    }

    pub(super) fn base_rows(&self, tokens: &[u32]) -> Result<Tensor> {
        self.embedding.base_rows(tokens)
    }
}

impl Block {
    fn load(config: &ModelConfig, index: usize, scope: &Scope) -> Result<Self> {
        let hidden = config.hidden_size;
        Ok(Self {
            input_norm: Norm::load(config, &scope.enter("input_layernorm"), hidden)?,
            attention: Attention::load(config, index, &scope.enter("self_attn"))?,
            feed_forward_norm: Norm::load(
                config,
                &scope.enter("post_attention_layernorm"),
                hidden,
            )?,
            feed_forward: FeedForward::load(config, &scope.enter("mlp"))?,
        })
    }

    fn forward(
        &self,
        hidden: &Tensor,
        pass: &Pass,
        cache: Option<&mut BlockCache>,
    ) -> Result<Tensor> {
        let attended = self
            .attention
            .forward(&self.input_norm.forward(hidden)?, pass, cache)?;
        let hidden = (hidden + attended)?;
        let fed = self
            .feed_forward
            .forward(&self.feed_forward_norm.forward(&hidden)?, pass)?;
        Ok((hidden + fed)?)
    }
}

impl Attention {
    fn load(config: &ModelConfig, index: usize, scope: &Scope) -> Result<Self> {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let queries = config.attention_heads * head_dim;
        let keys = config.key_value_heads * head_dim;
        let bias = config.attention_bias;
        let head_norm = |name: &str| -> Result<Option<Norm>> {
            if config.query_key_norm {
                Norm::load(config, &scope.enter(name), head_dim).map(Some)
            } else {
                Ok(None)
            }
        };
        Ok(Self {
            query: scope
                .enter("q_proj")
                .linear(hidden, queries, bias.query_key_value)?,
            key: scope
                .enter("k_proj")
                .linear(hidden, keys, bias.query_key_value)?,
            value: scope
                .enter("v_proj")
                .linear(hidden, keys, bias.query_key_value)?,
            output: scope.enter("o_proj").linear(queries, hidden, bias.output)?,
            query_norm: head_norm("q_norm")?,
            key_norm: head_norm("k_norm")?,
            shape: AttentionShape {
                heads: config.attention_heads,
                key_value_heads: config.key_value_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                window: config.sliding_windows[index],
            },
        })
    }

    fn forward(&self, x: &Tensor, pass: &Pass, cache: Option<&mut BlockCache>) -> Result<Tensor> {
        let query = self.query.forward(x, pass.mode)?; // (rows, heads · head_dim)
        let key = self.key.forward(x, pass.mode)?; // (rows, key_value_heads · head_dim)
        let value = self.value.forward(x, pass.mode)?;
        let query = ops::rope(&self.normed(query, &self.query_norm)?, &pass.rotary)?;
        let key = ops::rope(&self.normed(key, &self.key_norm)?, &pass.rotary)?;
        let (key, value) = match cache {
            Some(cache) => cache.append(&key, &value)?,
            None => (key, value),
        };
        let mixed = ops::attention(&query, &key, &value, &self.shape, pass.segments.clone())?;
        self.output.forward(&mixed, pass.mode)
    }

    /// Each head by its own norm, where the model has one.
    fn normed(&self, x: Tensor, norm: &Option<Norm>) -> Result<Tensor> {
        match norm {
            None => Ok(x),
            Some(norm) => {
                let (rows, width) = x.dims2()?;
                let heads = x.reshape((rows * width / self.shape.head_dim, self.shape.head_dim))?;
                Ok(norm.forward(&heads)?.reshape((rows, width))?)
            }
        }
    }
}

impl FeedForward {
    fn load(config: &ModelConfig, scope: &Scope) -> Result<Self> {
        let (hidden, inner, bias) = (
            config.hidden_size,
            config.intermediate_size,
            config.feed_forward_bias,
        );
        Ok(Self {
            gate: scope.enter("gate_proj").linear(hidden, inner, bias)?,
            up: scope.enter("up_proj").linear(hidden, inner, bias)?,
            down: scope.enter("down_proj").linear(inner, hidden, bias)?,
            activation: config.activation,
        })
    }

    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let gate = self.gate.forward(x, pass.mode)?; // (rows, intermediate)
        let up = self.up.forward(x, pass.mode)?;
        self.down.forward(
            &ops::gated_activation(&gate, &up, self.activation)?,
            pass.mode,
        )
    }
}

impl Norm {
    fn load(config: &ModelConfig, scope: &Scope, size: usize) -> Result<Self> {
        Ok(Self {
            weight: scope.vector("weight", size)?,
            epsilon: config.rms_norm_epsilon,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, &self.weight, self.epsilon)
    }
}

impl CausalLm for Decoder {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        self.embedding.forward(tokens)
    }

    fn block_count(&self) -> usize {
        self.blocks.len()
    }

    fn block(
        &self,
        index: usize,
        hidden: &Tensor,
        pass: &Pass,
        cache: Option<&mut BlockCache>,
    ) -> Result<Tensor> {
        self.blocks[index].forward(hidden, pass, cache)
    }

    fn finish(&self, hidden: &Tensor) -> Result<Tensor> {
        self.norm.forward(hidden)
    }

    fn head(&self) -> &Linear {
        &self.head
    }

    fn soft_prompt(&self) -> Option<&dyn SoftPrompt> {
        self.soft_prompt.as_deref()
    }

    fn rotary(&self, positions: Range<usize>, length: usize) -> (Vec<f32>, Vec<f32>) {
        let positions: Vec<u32> = positions.map(|position| position as u32).collect();
        self.rotary.table(&positions, length)
    }

    fn rotary_depends_on_length(&self, length: usize) -> bool {
        self.rotary.depends_on_length(length)
    }

    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn cache(&self, capacity: usize) -> Result<KvCache> {
        KvCache::new(
            self.blocks.len(),
            capacity,
            self.shape.key_value_heads * self.head_dim,
        )
    }

    fn take_handed_out(&self) -> Vec<(TensorId, String)> {
        self.handed_out
            .lock()
            .map(|mut ids| std::mem::take(&mut *ids))
            .unwrap_or_default()
    }
}
