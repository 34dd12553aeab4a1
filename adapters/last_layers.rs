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
    from_peft: |config, _| Ok(Box::new(SavedModules::from_peft(config)?)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Init, SavedTensors};
    use candle_core::Device;

    const NAMES: [&str; 8] = [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.3.self_attn.q_proj.bias",
        "model.layers.3.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ];

    /// Four blocks and a head of its own.
    fn model() -> ModelShape {
        ModelShape {
            layers: 4,
            head_path: "lm_head",
            ..ModelShape::default()
        }
    }

    fn tied() -> ModelShape {
        ModelShape {
            tied_head: true,
            ..model()
        }
    }

    fn trained(method: &dyn AdapterMethod) -> Vec<&'static str> {
        let model = &model();
        NAMES
            .into_iter()
            .filter(|name| method.trains(&ParameterSite { name, model }))
            .collect()
    }

    fn saved(modules: &[&str]) -> PeftConfig {
        PeftConfig::new("LORA").with("modules_to_save", json!(modules))
    }

    #[test]
    fn the_last_blocks_are_trained_and_what_is_asked_for_beside_them() {
        let blocks = |blocks| LastLayers {
            blocks,
            ..LastLayers::default()
        };
        assert_eq!(trained(&blocks(2)), NAMES[2..6]);
        assert_eq!(trained(&blocks(1)), NAMES[4..6]);
        assert!(trained(&blocks(0)).is_empty());
        let feed_forward = LastLayers {
            feed_forward_only: true,
            ..blocks(2)
        };
        assert_eq!(trained(&feed_forward), NAMES[2..3]);
        let norm = LastLayers {
            final_norm: true,
            ..blocks(0)
        };
        assert_eq!(trained(&norm), NAMES[6..7]);
        let head = LastLayers {
            head: true,
            ..blocks(0)
        };
        assert_eq!(trained(&head), NAMES[7..]);
    }

    #[test]
    fn no_more_blocks_are_trained_than_there_are() {
        let blocks = |blocks| LastLayers {
            blocks,
            ..LastLayers::default()
        };
        for fine in [0, 3, 4] {
            assert!(blocks(fine).check(&model()).is_ok(), "{fine}");
        }
        let error = blocks(5).check(&model()).expect_err("a block too many");
        assert_eq!(
            error.to_string(),
            "`--blocks 5` is more than the model's 4 blocks"
        );
    }

    #[test]
    fn a_head_that_is_the_embedding_is_not_trained_alone() -> Result<()> {
        let head = LastLayers {
            head: true,
            ..LastLayers::default()
        };
        assert!(head.check(&tied()).is_err());
        head.check(&model())?;
        LastLayers::default().check(&tied())?;

        let head = SavedModules::from_peft(&mut saved(&["model.norm", "lm_head"]))?;
        assert!(head.check(&tied()).is_err());
        head.check(&model())?;
        SavedModules::from_peft(&mut saved(&["model.norm"]))?.check(&tied())
    }

    #[test]
    fn a_saved_module_is_found_by_the_end_of_its_path_and_trained_with_all_below_it() -> Result<()>
    {
        for (modules, expected) in [
            (vec!["q_proj", "norm"], &NAMES[3..7]),
            (vec!["model.layers.2"], &NAMES[2..4]),
            (vec!["lm_head"], &NAMES[7..]),
            // A weight is no module.
            (vec!["q_proj.weight"], &NAMES[..0]),
        ] {
            let method = SavedModules::from_peft(&mut saved(&modules))?;
            assert_eq!(trained(&method), expected, "{modules:?}");
        }
        Ok(())
    }

    #[test]
    fn a_folder_trains_what_was_trained() -> Result<()> {
        let method = LastLayers {
            blocks: 1,
            final_norm: true,
            ..LastLayers::default()
        };
        let mut weights = AdapterWeights::fresh(0, &Device::Cpu);
        for name in trained(&method) {
            let name = format!("base_model.model.{name}");
            weights.var(&name, (2, 3), Init::Ones)?;
        }
        let config = method.peft_config(&model(), &weights)?;
        assert_eq!(
            config.get("modules_to_save"),
            Some(&json!(["model.layers.3.self_attn.q_proj", "model.norm"]))
        );
        assert_eq!(config.get("target_modules"), Some(&json!(NO_TARGETS)));

        let read = crate::method_of(&config, &SavedTensors::new())?;
        assert_eq!(trained(read.as_ref()), trained(&method));
        assert_eq!(read.peft_config(&model(), &weights)?, config);
        Ok(())
    }

    #[test]
    fn a_lora_of_saved_modules_alone_is_of_this_method() {
        let modules = || saved(&["model.norm"]);
        for config in [
            modules(),
            modules().with("target_modules", json!([])),
            modules().with("target_modules", NO_TARGETS),
        ] {
            assert!(is_modules_to_save_only(&config), "{config:?}");
        }
        for config in [
            PeftConfig::new("LORA"),
            PeftConfig::new("PROMPT_TUNING").with("modules_to_save", json!(["model.norm"])),
            modules().with("target_modules", json!(["q_proj"])),
            modules().with("target_parameters", json!(["experts.up_proj"])),
        ] {
            assert!(!is_modules_to_save_only(&config), "{config:?}");
        }
    }

    #[cfg(feature = "cli")]
    #[test]
    fn a_command_trains_something() {
        use crate::ErrorKind;

        let made = |options: &[&str]| {
            let command = (ENTRY.command)(clap::Command::new(ENTRY.name));
            let words = [ENTRY.name].into_iter().chain(options.iter().copied());
            let matches = command.try_get_matches_from(words).expect("options");
            (ENTRY.from_args)(&matches).map(|method| method.name())
        };
        for options in [
            vec![],
            vec!["--blocks", "0", "--final-norm"],
            vec!["--blocks", "0", "--head"],
        ] {
            assert_eq!(made(&options).expect("a method"), ENTRY.name);
        }
        let error = made(&["--blocks", "0"]).expect_err("nothing to train");
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
}
