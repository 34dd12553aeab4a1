//! Last-layer freeze: the base stays as it is but for its last blocks, which are trained whole.
//!
//! The oldest way to fine-tune (Howard & Ruder 2018, <https://arxiv.org/abs/1801.06146>, unfreeze from the top): what
//! lies below the first trained block needs no backward at all. Stored small and so that PEFT applies it: a `LORA`
//! configuration whose `target_modules` is PEFT's placeholder for "none", and every trained module by its full path
//! in `modules_to_save`. PEFT compares those with `endswith`, so shorter names would catch block 11 for block 1.

use crate::hooks::{AdapterMethod, MethodEntry, ModelShape, ParameterSite};
use crate::storage::{AdapterWeights, PeftConfig};
use crate::{Error, Result};
use serde_json::{Value, json};

/// PEFT's constant for "no target modules" (`peft.utils.constants.DUMMY_TARGET_MODULES`).
const NO_TARGETS: &str = "dummy-target-modules";

/// What `retune train last-layers` can be told.
#[derive(Debug, Clone)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct LastLayers {
    /// Number of blocks to train, counted from the end
    #[cfg_attr(
        feature = "cli",
        arg(
            long,
            default_value_t = 2,
            value_name = "N",
            help_heading = "Last-layers options"
        )
    )]
    pub blocks: usize,

    /// Train only the feed-forward part of those blocks
    #[cfg_attr(feature = "cli", arg(long, help_heading = "Last-layers options"))]
    pub feed_forward_only: bool,

    /// Train the norm after the last block as well
    #[cfg_attr(feature = "cli", arg(long, help_heading = "Last-layers options"))]
    pub final_norm: bool,

    /// Train the output head as well (a head that is not tied to the embedding)
    #[cfg_attr(feature = "cli", arg(long, help_heading = "Last-layers options"))]
    pub head: bool,
}

impl Default for LastLayers {
    fn default() -> Self {
        Self {
            blocks: 2,
            feed_forward_only: false,
            final_norm: false,
            head: false,
        }
    }
}

/// The row of this method in `METHODS`.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "last-layers",
    about: "Last-layer freeze: train the last blocks, leave the rest as it is",
    #[cfg(feature = "cli")]
    command: <LastLayers as clap::Args>::augment_args,
    #[cfg(feature = "cli")]
    from_args: |matches| {
        let options = <LastLayers as clap::FromArgMatches>::from_arg_matches(matches)
            .map_err(|error| Error::usage(error.to_string()))?;
        if options.blocks == 0 && !options.final_norm && !options.head {
            return Err(Error::usage("`--blocks 0` trains nothing")
                .hint("add `--final-norm` or `--head`, or train a block"));
        }
        Ok(Box::new(options))
    },
    reads: is_modules_to_save_only,
    from_peft: |config| Ok(Box::new(SavedModules::from_peft(config)?)),
};

/// Whether `config` trains whole modules and adapts none.
pub(crate) fn is_modules_to_save_only(config: &PeftConfig) -> bool {
    let no_targets = !config.asks_for("target_modules")
        || config.get("target_modules") == Some(&json!(NO_TARGETS));
    config.peft_type() == "LORA"
        && no_targets
        && !config.asks_for("target_parameters")
        && config.asks_for("modules_to_save")
}

impl AdapterMethod for LastLayers {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn trains(&self, site: &ParameterSite) -> bool {
        match site.layer() {
            Some(layer) => {
                layer + self.blocks >= site.model.layers
                    && (!self.feed_forward_only || site.name.contains(".mlp."))
            }
            None if site.is_head() => self.head,
            None => self.final_norm && site.name == "model.norm.weight",
        }
    }

    fn check(&self, model: &ModelShape) -> Result<()> {
        if self.head && model.tied_head {
            return Err(Error::new(
                "the output head is the embedding matrix itself, so it cannot be trained alone",
            )
            .hint("leave out `--head`"));
        }
        if self.blocks > model.layers {
            return Err(Error::new(format!(
                "`--blocks {}` is more than the model's {} blocks",
                self.blocks, model.layers
            )));
        }
        Ok(())
    }

    fn peft_config(&self, _model: &ModelShape, weights: &AdapterWeights) -> Result<PeftConfig> {
        saved_modules_config(weights)
    }

    fn default_learning_rate(&self) -> f64 {
        2e-4
    }
}

/// An adapter read back: it trains the modules that its file names.
#[derive(Debug)]
struct SavedModules(Vec<String>);

impl SavedModules {
    fn from_peft(config: &mut PeftConfig) -> Result<Self> {
        let modules = config.require("modules_to_save")?;
        // Left over from the LoRA that PEFT makes of no module at all.
        for field in [
            "target_modules",
            "r",
            "lora_alpha",
            "lora_dropout",
            "bias",
            "init_lora_weights",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
        ] {
            let _: Option<Value> = config.take(field)?;
        }
        Ok(Self(modules))
    }
}

impl AdapterMethod for SavedModules {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn trains(&self, site: &ParameterSite) -> bool {
        // PEFT saves a module with all below it, and finds it by the end of its path.
        let parts: Vec<&str> = site.name.split('.').collect();
        (1..parts.len()).any(|length| {
            let path = parts[..length].join(".");
            self.0.iter().any(|module| path.ends_with(module.as_str()))
        })
    }

    fn check(&self, model: &ModelShape) -> Result<()> {
        if model.tied_head
            && self
                .0
                .iter()
                .any(|module| module.ends_with(model.head_path))
        {
            return Err(Error::new(
                "the adapter replaces the output head, which in this model is the embedding matrix itself",
            ));
        }
        Ok(())
    }

    fn peft_config(&self, _model: &ModelShape, weights: &AdapterWeights) -> Result<PeftConfig> {
        saved_modules_config(weights)
    }

    fn default_learning_rate(&self) -> f64 {
        LastLayers::default().default_learning_rate()
    }
}

fn saved_modules_config(weights: &AdapterWeights) -> Result<PeftConfig> {
    let mut modules: Vec<&str> = weights
        .iter()
        .filter_map(|(name, _)| name.strip_prefix("base_model.model.")?.rsplit_once('.'))
        .map(|(module, _)| module)
        .collect();
    modules.dedup();
    let lora = crate::lora::Lora::default();
    // Everything else as in a LoRA without layers, which is what PEFT takes this for.
    let shape_is_not_asked = ModelShape::default();
    Ok(lora
        .peft_config(&shape_is_not_asked, weights)?
        .with("lora_alpha", 8)
        .with("target_modules", NO_TARGETS)
        .with("modules_to_save", modules))
}
