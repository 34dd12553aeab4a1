//! What a method is: its answers at the sites a model offers.

use super::{BaseLinear, Dropout, EmbeddingSite, InputSite, LinearSite, ModelShape, ParameterSite};
use crate::Result;
use crate::storage::{AdapterWeights, PeftConfig, SavedTensors};
use candle_core::Tensor;

/// Whether the model is being trained or used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Training: dropout is on. `seed` changes from step to step; `first_row` is the number of rows of the same step
    /// that earlier passes held, so that a dropout mask does not depend on how a step is cut into passes.
    Train {
        /// Seed of this optimizer step.
        seed: u64,
        /// Index of this pass's first row in the step.
        first_row: usize,
    },
    /// Everything else.
    Infer,
}

/// A way to adapt a frozen model. The model asks at each site while it loads; a method answers where it acts.
///
/// Every hook has a "not here" default. Trained tensors live in [`AdapterWeights`], under their names in
/// `adapter_model.safetensors`; the same code runs for a fresh adapter and for one loaded from a file.
pub trait AdapterMethod: Send + Sync {
    /// Name of the method, as in the command line and in the `METHODS` table.
    fn name(&self) -> &'static str;

    /// Asked at each linear layer.
    fn adapt_linear(
        &self,
        _site: &LinearSite,
        _weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn LinearAdapter>>> {
        Ok(None)
    }

    /// Asked at the token embedding.
    fn adapt_embedding(
        &self,
        _site: &EmbeddingSite,
        _weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn EmbeddingAdapter>>> {
        Ok(None)
    }

    /// Asked at each base weight: `true` makes it trainable.
    fn trains(&self, _site: &ParameterSite) -> bool {
        false
    }

    /// Asked once, at the input.
    fn soft_prompt(
        &self,
        _site: &InputSite,
        _weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn SoftPrompt>>> {
        Ok(None)
    }

    /// Asked once before anything is loaded: is what was asked for possible on a model of this shape?
    fn check(&self, _model: &ModelShape) -> Result<()> {
        Ok(())
    }

    /// The names and patterns that were asked for and match none of the model's linear and embedding layers.
    fn unmatched(&self, _paths: &[String]) -> Vec<String> {
        Vec::new()
    }

    /// Asked once after every layer was, for a new adapter, with the paths of all linear and embedding layers: does
    /// all that was asked for have an effect? [`Self::unmatched`] has found every name by then.
    fn check_paths(&self, _paths: &[String]) -> Result<()> {
        Ok(())
    }

    /// What `adapter_config.json` says, without the fields common to all methods.
    fn peft_config(&self, model: &ModelShape, weights: &AdapterWeights) -> Result<PeftConfig>;

    /// The learning rate that works for this method when none is given.
    fn default_learning_rate(&self) -> f64;
}

/// An adapted linear layer. The adapter decides when to call the frozen one.
pub trait LinearAdapter: Send + Sync {
    /// The adapted output, `(rows, out_features)`, for `x` of `(rows, in_features)`.
    fn forward(&self, x: &Tensor, base: &dyn BaseLinear, mode: Mode) -> Result<Tensor>;

    /// The weight that gives the same output alone, f32 `(out_features, in_features)`, for a base weight of that shape.
    fn merged_weight(&self, base: &Tensor) -> Result<Tensor>;

    /// The layer as `base + scale · B A`, if in `mode` it is no more than that: the engine then runs it fused.
    fn low_rank(&self, _mode: Mode) -> Option<LowRank<'_>> {
        None
    }
}

/// A low-rank update `scale · B A`.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// `(rank, in_features)`.
    pub a: &'a Tensor,
    /// `(out_features, rank)`.
    pub b: &'a Tensor,
    /// Factor of the product.
    pub scale: f64,
    /// What is dropped of the update's input, and not of the frozen layer's.
    pub dropout: Option<Dropout>,
}

/// An adapted token embedding.
pub trait EmbeddingAdapter: Send + Sync {
    /// The adapted rows, `(tokens, hidden_size)`: `base` holds the frozen rows of `tokens`, a u32 vector.
    fn forward(&self, tokens: &Tensor, base: &Tensor) -> Result<Tensor>;

    /// The factors, where the adapted rows are `base` and the rows of `scale · (B A)ᵀ`, without dropout, `a` of shape
    /// `(rank, vocabulary)` and `b` `(hidden_size, rank)`: the engine then looks these up itself.
    fn low_rank(&self) -> Option<LowRank<'_>> {
        None
    }

    /// The embedding matrix that gives the same rows alone, f32 `(vocabulary, hidden_size)`.
    fn merged_weight(&self, base: &Tensor) -> Result<Tensor>;
}

/// Learned rows that stand before the embedded tokens of every segment.
pub trait SoftPrompt: Send + Sync {
    /// The rows, f32 `(virtual_tokens, hidden_size)`.
    fn rows(&self) -> Result<Tensor>;

    /// How many rows there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The bare base: what `--adapter` left out means.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoAdapter;

impl AdapterMethod for NoAdapter {
    fn name(&self) -> &'static str {
        "base"
    }

    fn peft_config(&self, _model: &ModelShape, _weights: &AdapterWeights) -> Result<PeftConfig> {
        Err(crate::Error::new("the bare base has no adapter to write"))
    }

    fn default_learning_rate(&self) -> f64 {
        0.0
    }
}

/// One row of the `METHODS` table: how a method is named, made from the command line, and recognised in a folder.
pub struct MethodEntry {
    /// `retune train <name>`.
    pub name: &'static str,
    /// One line for tables and help.
    pub about: &'static str,
    /// Adds the method's own options to a command.
    #[cfg(feature = "cli")]
    pub command: fn(clap::Command) -> clap::Command,
    /// Makes the method from its parsed options.
    #[cfg(feature = "cli")]
    pub from_args: fn(&clap::ArgMatches) -> Result<Box<dyn AdapterMethod>>,
    /// Whether a folder's configuration is of this method: true in at most one row.
    pub reads: fn(&PeftConfig) -> bool,
    /// Makes the method from a folder's configuration, beside which its tensors lie.
    pub from_peft: fn(&mut PeftConfig, &SavedTensors) -> Result<Box<dyn AdapterMethod>>,
}
