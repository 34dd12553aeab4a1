//! The pre-norm decoder that llama, mistral, qwen2 and qwen3 share; what sets them apart is in their configuration.
//!
//! `h += o(attention(rope(norm(q x)), rope(norm(k x)), v x))` with `x = norm(h)`, then `h += down(act(gate x) · up x)`.

use super::backward::{BlockBackward, GradientSink};
use super::causal_lm::{CausalLm, Pass};
use super::config::ModelConfig;
use super::embedding::Embedding;
use super::kv_cache::{BlockCache, KvCache};
use super::linear::{HandedOut, Linear};
use super::placement::Placement;
use super::rotary::{KnownRotations, Positions, Rotary};
use super::scope::Scope;
use crate::Result;
use crate::adapters::hooks::{ModelShape, SoftPrompt};
use crate::ops::clock::{Kind, timed};
use crate::ops::{self, AttentionShape, RotaryTable, Softmax, Visible};
use candle_core::Tensor;

pub(super) struct Decoder {
    shape: ModelShape,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: Norm,
    head: Linear,
    rotary: Rotary,
    known_rotations: KnownRotations,
    head_dim: usize,
    placement: Placement,
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
            known_rotations: KnownRotations::default(),
            head_dim: config.head_dim,
            placement: scope.placement().clone(),
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
    ) -> Result<(Tensor, KeptBlock)> {
        let normed = self.input_norm.forward(hidden)?;
        let (attended, attention) = self.attention.forward(&normed, pass, cache)?;
        ops::recycle(normed);
        let middle = timed(Kind::Elementwise, || ops::add_onto(attended, hidden))?;
        let normed = self.feed_forward_norm.forward(&middle)?;
        let (fed, feed_forward) = self.feed_forward.forward(&normed, pass)?;
        ops::recycle(normed);
        let output = timed(Kind::Elementwise, || ops::add_onto(fed, &middle))?;
        let kept = KeptBlock {
            attention,
            middle,
            feed_forward,
        };
        Ok((output, kept))
    }

    fn trains(&self) -> bool {
        self.attention_half_trains() || self.feed_forward_half_trains()
    }

    fn attention_half_trains(&self) -> bool {
        let attention = &self.attention;
        let linears = [
            &attention.query,
            &attention.key,
            &attention.value,
            &attention.output,
        ];
        let norms = [
            Some(&self.input_norm),
            attention.query_norm.as_ref(),
            attention.key_norm.as_ref(),
        ];
        linears.into_iter().any(Linear::trains) || norms.into_iter().flatten().any(Norm::trains)
    }

    fn feed_forward_half_trains(&self) -> bool {
        let FeedForward { gate, up, down, .. } = &self.feed_forward;
        [gate, up, down].into_iter().any(Linear::trains) || self.feed_forward_norm.trains()
    }

    /// The gradient of the block's input, where it is wanted, given that of its output.
    fn backward(
        &self,
        hidden: &Tensor,
        kept: KeptBlock,
        gradient: Tensor,
        pass: &Pass,
        wants_input: bool,
        sink: &mut GradientSink<'_>,
    ) -> Result<Option<Tensor>> {
        let wants_middle = wants_input || self.attention_half_trains();
        let KeptBlock {
            attention,
            middle,
            feed_forward,
        } = kept;
        let norm = &self.feed_forward_norm;
        let normed = norm.forward(&middle)?;
        let wants_normed = wants_middle || norm.trains();
        let inner = self.feed_forward.backward(
            &normed,
            feed_forward,
            &gradient,
            pass,
            wants_normed,
            sink,
        )?;
        ops::recycle(normed);
        let gradient = norm.backward(&middle, inner, wants_middle, gradient, sink)?;
        ops::recycle(middle);
        let Some(gradient) = gradient else {
            attention.recycle();
            return Ok(None);
        };
        let norm = &self.input_norm;
        let normed = norm.forward(hidden)?;
        let wants_normed = wants_input || norm.trains();
        let inner =
            self.attention
                .backward(&normed, attention, &gradient, pass, wants_normed, sink)?;
        ops::recycle(normed);
        norm.backward(hidden, inner, wants_input, gradient, sink)
    }
}

/// A block on its way back: what its forward pass kept.
struct RunBlock<'a> {
    block: &'a Block,
    hidden: Tensor,
    kept: KeptBlock,
    pass: &'a Pass,
}

impl BlockBackward for RunBlock<'_> {
    fn run(
        self: Box<Self>,
        gradient: Tensor,
        wants_input: bool,
        sink: &mut GradientSink<'_>,
    ) -> Result<Option<Tensor>> {
        let Self {
            block,
            hidden,
            kept,
            pass,
        } = *self;
        let gradient = block.backward(&hidden, kept, gradient, pass, wants_input, sink)?;
        ops::recycle(hidden);
        Ok(gradient)
    }
}

/// What the backward pass of a block needs besides its input. The norms' outputs and the gated activation are made again.
struct KeptBlock {
    attention: KeptAttention,
    /// The hidden state between attention and feed-forward, `(rows, hidden)`.
    middle: Tensor,
    feed_forward: KeptFeedForward,
}

impl KeptBlock {
    fn recycle(self) {
        self.attention.recycle();
        ops::recycle(self.middle);
        self.feed_forward.recycle();
    }
}

struct KeptAttention {
    /// Queries and keys before their norms, where the model has such.
    unnormed: Option<(Tensor, Tensor)>,
    /// Rotated, `(rows, heads · head_dim)`.
    query: Tensor,
    /// Rotated, `(rows, key_value_heads · head_dim)`.
    key: Tensor,
    value: Tensor,
    /// What attention returns, before the output projection; only where that is trained.
    mixed: Option<Tensor>,
    softmax: Softmax,
}

impl KeptAttention {
    fn recycle(self) {
        if let Some((query, key)) = self.unnormed {
            ops::recycle(query);
            ops::recycle(key);
        }
        for tensor in [self.query, self.key, self.value] {
            ops::recycle(tensor);
        }
        if let Some(mixed) = self.mixed {
            ops::recycle(mixed);
        }
    }
}

struct KeptFeedForward {
    /// `(rows, intermediate)`, before the activation.
    gate: Tensor,
    up: Tensor,
}

impl KeptFeedForward {
    fn recycle(self) {
        ops::recycle(self.gate);
        ops::recycle(self.up);
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
                visible: Visible::Causal,
                window: config.sliding_windows[index],
                soft_cap: None,
            },
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut BlockCache>,
    ) -> Result<(Tensor, KeptAttention)> {
        let query = self.query.forward_detached(x, pass.mode)?; // (rows, heads · head_dim)
        let key = self.key.forward_detached(x, pass.mode)?; // (rows, key_value_heads · head_dim)
        let value = self.value.forward_detached(x, pass.mode)?;
        let (query, key, unnormed) = match (&self.query_norm, &self.key_norm) {
            (Some(query_norm), Some(key_norm)) => {
                let normed = (
                    self.each_head(query_norm, &query)?,
                    self.each_head(key_norm, &key)?,
                );
                (normed.0, normed.1, Some((query, key)))
            }
            _ => (query, key, None),
        };
        let rotated = timed(Kind::Elementwise, || ops::rope(&query, &pass.rotary))?;
        ops::recycle(query);
        let query = rotated;
        let rotated = timed(Kind::Elementwise, || ops::rope(&key, &pass.rotary))?;
        ops::recycle(key);
        let (key, value) = match cache {
            Some(cache) => cache.append(&rotated, &value)?,
            None => (rotated, value),
        };
        let (mixed, softmax) = timed(Kind::Attention, || {
            ops::attention_forward(&query, &key, &value, &self.shape, &pass.segments)
        })?;
        let output = self.output.forward_detached(&mixed, pass.mode)?;
        let mixed = if self.output.trains() {
            Some(mixed)
        } else {
            ops::recycle(mixed);
            None
        };
        let kept = KeptAttention {
            unnormed,
            query,
            key,
            value,
            mixed,
            softmax,
        };
        Ok((output, kept))
    }

    /// The gradient of `x`, where it is wanted, given that of the output.
    fn backward(
        &self,
        x: &Tensor,
        kept: KeptAttention,
        gradient: &Tensor,
        pass: &Pass,
        wants_input: bool,
        sink: &mut GradientSink<'_>,
    ) -> Result<Option<Tensor>> {
        let below = [&self.query, &self.key, &self.value];
        let trained = below.map(|linear| wants_input || linear.trains());
        let normed = [&self.query_norm, &self.key_norm, &None];
        let norms = normed.map(|norm| norm.as_ref().is_some_and(Norm::trains));
        let wanted: [bool; 3] = std::array::from_fn(|i| trained[i] || norms[i]);
        let wants_mixed = wanted.contains(&true);
        let dmixed = match &kept.mixed {
            Some(mixed) => {
                self.output
                    .backward(mixed, gradient, pass.mode, wants_mixed, None, sink)?
            }
            None if wants_mixed => Some(self.output.input_gradient(gradient, None)?),
            None => None,
        };
        let Some(dmixed) = dmixed else {
            kept.recycle();
            return Ok(None);
        };
        let [dquery, dkey, dvalue] = timed(Kind::Attention, || {
            ops::attention_gradients(
                [&kept.query, &kept.key, &kept.value],
                &kept.softmax,
                &self.shape,
                &pass.segments,
                &dmixed,
                wanted,
            )
        })?;
        ops::recycle(dmixed);
        let (raw_query, raw_key) = match &kept.unnormed {
            Some((query, key)) => (Some(query), Some(key)),
            None => (None, None),
        };
        let dquery = self.unturned(dquery, &self.query_norm, raw_query, pass, sink)?;
        let dkey = self.unturned(dkey, &self.key_norm, raw_key, pass, sink)?;
        kept.recycle();
        let mut dx = None;
        for (linear, gradient) in below.into_iter().zip([dquery, dkey, dvalue]) {
            if let Some(gradient) = gradient {
                dx = linear.backward(x, &gradient, pass.mode, wants_input, dx, sink)?;
                ops::recycle(gradient);
            }
        }
        Ok(dx)
    }

    /// The gradient of a projection, given that of its heads after norm and rotation.
    fn unturned(
        &self,
        gradient: Option<Tensor>,
        norm: &Option<Norm>,
        raw: Option<&Tensor>,
        pass: &Pass,
        sink: &mut GradientSink<'_>,
    ) -> Result<Option<Tensor>> {
        let Some(gradient) = gradient else {
            return Ok(None);
        };
        let turned = timed(Kind::Elementwise, || {
            ops::rope_gradient(&gradient, &pass.rotary)
        })?;
        ops::recycle(gradient);
        let (Some(norm), Some(raw)) = (norm, raw) else {
            return Ok(Some(turned));
        };
        let heads = (raw.elem_count() / self.shape.head_dim, self.shape.head_dim);
        let (raw_heads, turned_heads) = (raw.reshape(heads)?, turned.reshape(heads)?);
        norm.weight_backward(&raw_heads, &turned_heads, sink)?;
        let dx = norm.input_gradient(&raw_heads, &turned_heads, None)?;
        ops::recycle(turned);
        Ok(Some(dx.reshape(raw.shape())?))
    }

    /// Each head by its own norm.
    fn each_head(&self, norm: &Norm, x: &Tensor) -> Result<Tensor> {
        let heads = (x.elem_count() / self.shape.head_dim, self.shape.head_dim);
        Ok(norm.forward(&x.reshape(heads)?)?.reshape(x.shape())?)
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

    fn forward(&self, x: &Tensor, pass: &Pass) -> Result<(Tensor, KeptFeedForward)> {
        let gate = self.gate.forward_detached(x, pass.mode)?; // (rows, intermediate)
        let up = self.up.forward_detached(x, pass.mode)?;
        let active = timed(Kind::Elementwise, || {
            ops::gated_activation(&gate, &up, self.activation)
        })?;
        let output = self.down.forward_detached(&active, pass.mode)?;
        ops::recycle(active);
        Ok((output, KeptFeedForward { gate, up }))
    }

    /// The gradient of `x`, where it is wanted, given that of the output.
    fn backward(
        &self,
        x: &Tensor,
        kept: KeptFeedForward,
        gradient: &Tensor,
        pass: &Pass,
        wants_input: bool,
        sink: &mut GradientSink<'_>,
    ) -> Result<Option<Tensor>> {
        let KeptFeedForward { gate, up } = kept;
        let wants_active = wants_input || self.gate.trains() || self.up.trains();
        if !(wants_active || self.down.trains()) {
            return Ok(None);
        }
        let active = timed(Kind::Elementwise, || {
            ops::gated_activation(&gate, &up, self.activation)
        })?;
        let dactive = self
            .down
            .backward(&active, gradient, pass.mode, wants_active, None, sink)?;
        ops::recycle(active);
        let Some(dactive) = dactive else {
            return Ok(None);
        };
        let (dgate, dup) = timed(Kind::Elementwise, || {
            ops::gated_activation_gradients(&gate, &up, self.activation, &dactive)
        })?;
        for tensor in [gate, up, dactive] {
            ops::recycle(tensor);
        }
        let dx = self
            .gate
            .backward(x, &dgate, pass.mode, wants_input, None, sink)?;
        ops::recycle(dgate);
        let dx = self
            .up
            .backward(x, &dup, pass.mode, wants_input, dx, sink)?;
        ops::recycle(dup);
        Ok(dx)
    }
}

impl Norm {
    fn load(config: &ModelConfig, scope: &Scope, size: usize) -> Result<Self> {
        Ok(Self {
            weight: scope.vector("weight", size)?,
            epsilon: config.rms_norm_epsilon,
        })
    }

    /// Without history.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        timed(Kind::Elementwise, || {
            ops::rms_norm(x, &self.weight.detach(), self.epsilon)
        })
    }

    fn trains(&self) -> bool {
        self.weight.track_op()
    }

    fn weight_backward(
        &self,
        x: &Tensor,
        gradient: &Tensor,
        sink: &mut GradientSink<'_>,
    ) -> Result<()> {
        if !self.trains() {
            return Ok(());
        }
        let epsilon = self.epsilon as f32;
        let dw = timed(Kind::WeightGradients, || {
            ops::rms_norm_weight_gradient(x, &self.weight, epsilon, gradient)
        })?;
        sink.add(&self.weight, dw)
    }

    fn input_gradient(
        &self,
        x: &Tensor,
        gradient: &Tensor,
        onto: Option<Tensor>,
    ) -> Result<Tensor> {
        timed(Kind::Elementwise, || {
            ops::rms_norm_input_gradient(x, &self.weight, self.epsilon as f32, gradient, onto)
        })
    }

    /// The gradient of a residual stream `x` beside a branch that starts with this norm: `inner` is the gradient of the
    /// branch's input, if there is one, `residual` that of what the branch was added to.
    fn backward(
        &self,
        x: &Tensor,
        inner: Option<Tensor>,
        wants_input: bool,
        residual: Tensor,
        sink: &mut GradientSink<'_>,
    ) -> Result<Option<Tensor>> {
        let Some(inner) = inner else {
            return Ok(wants_input.then_some(residual));
        };
        self.weight_backward(x, &inner, sink)?;
        let gradient = match wants_input {
            true => Some(self.input_gradient(x, &inner, Some(residual))?),
            false => None,
        };
        ops::recycle(inner);
        Ok(gradient)
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
        let cached = cache.is_some();
        let (output, kept) = self.blocks[index].forward(hidden, pass, cache)?;
        // What lies in the cache is still needed.
        if !cached {
            kept.recycle();
        }
        Ok(output)
    }

    fn block_with_backward<'a>(
        &'a self,
        index: usize,
        hidden: Tensor,
        pass: &'a Pass,
    ) -> Result<(Tensor, Box<dyn BlockBackward + 'a>)> {
        let block = &self.blocks[index];
        let (output, kept) = block.forward(&hidden, pass, None)?;
        let backward = RunBlock {
            block,
            hidden,
            kept,
            pass,
        };
        Ok((output, Box::new(backward)))
    }

    fn input_trains(&self) -> bool {
        self.soft_prompt.is_some() || self.embedding.trains()
    }

    fn block_trains(&self, index: usize) -> bool {
        self.blocks[index].trains()
    }

    fn finish(&self, hidden: &Tensor) -> Result<Tensor> {
        ops::rms_norm(hidden, &self.norm.weight, self.norm.epsilon)
    }

    fn head(&self) -> &Linear {
        &self.head
    }

    fn soft_prompt(&self) -> Option<&dyn SoftPrompt> {
        self.soft_prompt.as_deref()
    }

    fn rotary(&self, sequences: &[Positions]) -> Result<RotaryTable> {
        let table = self.known_rotations.of(&self.rotary, sequences)?;
        #[cfg(feature = "cuda")]
        table.upload(&self.placement.device)?;
        Ok(table)
    }

    fn rotary_depends_on_length(&self, length: usize) -> bool {
        self.rotary.depends_on_length(length)
    }

    fn cache(&self, capacity: usize) -> Result<KvCache> {
        KvCache::new(
            self.blocks.len(),
            capacity,
            self.shape.key_value_heads * self.head_dim,
            &self.placement,
        )
    }

    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn handed_out(&self) -> &HandedOut {
        &self.handed_out
    }
}
