//! The arithmetic of a step, counted.

use super::trained::Trained;
use crate::model::ModelConfig;
use crate::model::inventory::{Parameter, ParameterKind};
use crate::train::Recompute;
use serde::Serialize;

/// Floating-point operations of one optimizer step; a multiplication and an addition are two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Work {
    /// Products with frozen and trained weights of blocks and head: forward, and for the gradients of their inputs.
    pub products: f64,
    /// Scores and mixing, both ways, of the causal half alone.
    pub attention: f64,
    /// Gradients of what is trained.
    pub weight_gradients: f64,
    /// The forward pass of blocks that are computed again; what a run without recomputation saves.
    pub recomputed: f64,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepShape {
    /// Rows that go through the blocks.
    pub rows: f64,
    /// Rows that go through the head.
    pub targets: f64,
    /// Rows of a segment.
    pub length: f64,
    /// Keeping or recomputing activations.
    pub recompute: Recompute,
    /// Whether the hidden states below the lowest trained block were kept from an earlier epoch.
    pub cached: bool,
}

impl Work {
    /// All but what is computed twice.
    pub fn useful(&self) -> f64 {
        self.products + self.attention + self.weight_gradients
    }

    /// The work of a step of this shape.
    pub(super) fn of(
        config: &ModelConfig,
        parameters: &[Parameter],
        trained: &Trained,
        step: &StepShape,
    ) -> Self {
        let StepShape {
            rows,
            targets,
            length,
            recompute,
            cached,
        } = *step;
        let blocks: f64 = parameters
            .iter()
            .filter(|parameter| parameter.kind == ParameterKind::Linear)
            .map(|parameter| parameter.count() as f64)
            .sum();
        let above = (config.layers - trained.lowest_block.min(config.layers)) as f64;
        let share = above / config.layers as f64;
        let forward = if cached { share } else { 1.0 };
        let head = (config.vocabulary * config.hidden_size) as f64;
        let queries = (config.attention_heads * config.head_dim) as f64;
        // Two products forward, of which the causal half is needed; five for two on the way back.
        let attention = 2.0 * rows * 2.0 * queries * length / 2.0 * config.layers as f64;
        Self {
            products: 2.0 * (rows * blocks * (forward + share) + targets * 2.0 * head),
            attention: attention * (forward + 2.5 * share),
            weight_gradients: rows * (2.0 * trained.whole as f64 + 4.0 * trained.beside as f64),
            recomputed: match recompute {
                Recompute::Never => 0.0,
                Recompute::Blocks => share * (2.0 * rows * blocks + attention),
            },
        }
    }
}
