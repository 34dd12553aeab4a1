//! LoRA: a low-rank update beside each frozen weight.
//!
//! `y = W x + s · B A x` with `A` of `(rank, in)`, `B` of `(out, rank)` and `s = alpha / rank`
//! (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>), or `alpha / √rank` when rank-stabilised
//! (Kalajdzievski 2023, <https://arxiv.org/abs/2312.03732>). On an embedding the rows of `(B A)ᵀ` are added.

#[cfg(test)]
mod tests;

use crate::hooks::{
    AdapterMethod, BaseLinear, Dropout, EmbeddingAdapter, EmbeddingSite, LayerSelection,
    LinearAdapter, LinearSite, LowRank, MethodEntry, Mode, ModelShape, Targets, layer_of, quoted,
};
use crate::storage::{AdapterWeights, CONFIG_FILE, Init, PeftConfig, SavedTensors};
use crate::{Error, Result};
use candle_core::Tensor;
use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fmt::Display;
use std::str::FromStr;

/// What `retune train lora` can be told.
#[derive(Debug, Clone)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct Lora {
    /// Rank of the update: more can learn more, and costs more
    #[cfg_attr(
        feature = "cli",
        arg(
            long,
            default_value_t = 8,
            value_name = "N",
            help_heading = "LoRA options"
        )
    )]
    pub rank: usize,

    /// Strength of the update, above 0, which is scaled by alpha / rank [default: twice the rank]
    #[cfg_attr(
        feature = "cli",
        arg(long, value_name = "X", help_heading = "LoRA options")
    )]
    pub alpha: Option<f64>,

    /// Share of the update's inputs that are dropped in training, from 0 to below 1
    #[cfg_attr(
        feature = "cli",
        arg(
            long,
            default_value_t = 0.0,
            value_name = "P",
            help_heading = "LoRA options"
        )
    )]
    pub dropout: f64,

    /// Scale by alpha / √rank instead of alpha / rank (rsLoRA): steadier at high ranks
    #[cfg_attr(feature = "cli", arg(long, help_heading = "LoRA options"))]
    pub rslora: bool,

    /// Layers to adapt: `all-linear`, names such as `q_proj,v_proj,embed_tokens,lm_head`, or a pattern for the whole path
    #[cfg_attr(
        feature = "cli",
        arg(
            long,
            default_value = "all-linear",
            value_name = "NAMES",
            help_heading = "LoRA options"
        )
    )]
    pub targets: Targets,

    /// Layers to leave alone although they are targets: names or a pattern
    #[cfg_attr(
        feature = "cli",
        arg(long, value_name = "NAMES", help_heading = "LoRA options")
    )]
    pub exclude: Option<Targets>,

    /// Blocks to adapt, counted from 0, such as `0-3,7` [default: all]
    #[cfg_attr(
        feature = "cli",
        arg(long, value_name = "BLOCKS", help_heading = "LoRA options")
    )]
    pub layers: Option<LayerSelection>,

    /// Other ranks for some layers, such as `q_proj=16,layers.0.mlp.up_proj=4`; the first that matches counts
    #[cfg_attr(
        feature = "cli",
        arg(
            long,
            value_delimiter = ',',
            value_name = "NAME=N",
            help_heading = "LoRA options"
        )
    )]
    pub rank_pattern: Vec<Override>,

    /// Other alphas for some layers, such as `q_proj=32`; the first that matches counts
    #[cfg_attr(
        feature = "cli",
        arg(
            long,
            value_delimiter = ',',
            value_name = "NAME=X",
            help_heading = "LoRA options"
        )
    )]
    pub alpha_pattern: Vec<Override>,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: None,
            dropout: 0.0,
            rslora: false,
            targets: Targets::AllLinear,
            exclude: None,
            layers: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
        }
    }
}

/// The row of this method in `METHODS`.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "lora",
    about: "LoRA: a low-rank update beside each frozen linear layer",
    #[cfg(feature = "cli")]
    command: <Lora as clap::Args>::augment_args,
    #[cfg(feature = "cli")]
    from_args: |matches| {
        let lora = <Lora as clap::FromArgMatches>::from_arg_matches(matches)
            .map_err(|error| Error::usage(error.to_string()))?;
        Ok(Box::new(lora.validated()?.with_positive_alphas()?))
    },
    // A LORA configuration without targets of its own is how PEFT stores plainly trained modules: `last-layers`.
    reads: |config| {
        config.peft_type() == "LORA" && !crate::last_layers::is_modules_to_save_only(config)
    },
    from_peft: |config, tensors| {
        name_targets(config, tensors);
        Ok(Box::new(SavedLora(Lora::from_peft(config)?)))
    },
};

impl Lora {
    fn validated(self) -> Result<Self> {
        if let Some((_, fact)) = self.impossible() {
            return Err(Error::usage(fact));
        }
        if self.layers.is_some() && matches!(self.targets, Targets::Pattern(_)) {
            return Err(
                Error::usage("`--layers` goes with target names, not with a pattern").hint(
                    "put the block numbers into the pattern, such as `.*layers\\.[0-3]\\..*_proj`",
                ),
            );
        }
        Ok(self)
    }

    /// The first number that no LoRA can have: its field in `adapter_config.json`, and what is wrong with it.
    fn impossible(&self) -> Option<(&'static str, String)> {
        let rank = |rank: f64| {
            let wrong = !(1.0..=HIGHEST_RANK).contains(&rank) || rank.fract() != 0.0;
            wrong.then(|| {
                format!("a rank must be a whole number from 1 to {HIGHEST_RANK}, not {rank}")
            })
        };
        let dropout = |dropout: f64| {
            let wrong = !(0.0..1.0).contains(&(dropout as f32));
            wrong.then(|| format!("dropout must be, in 32 bits, from 0 to below 1, not {dropout}"))
        };
        // An update is scaled in f32, by no more than its alpha.
        let alpha = |alpha: f64| {
            let wrong = !(alpha as f32).is_finite();
            wrong.then(|| format!("an alpha must be, in 32 bits, a finite number, not {alpha:e}"))
        };
        let mut ranks = self.rank_pattern.iter().map(|entry| entry.value);
        let mut alphas = self.alpha_pattern.iter().map(|entry| entry.value);
        let problems = [
            ("r", rank(self.rank as f64)),
            ("rank_pattern", ranks.find_map(rank)),
            ("lora_dropout", dropout(self.dropout)),
            ("lora_alpha", self.alpha.and_then(alpha)),
            ("alpha_pattern", alphas.find_map(alpha)),
        ];
        problems
            .into_iter()
            .find_map(|(field, problem)| Some((field, problem?)))
    }

    /// Alpha 0 would train nothing and a negative one turns the update round; only folders of others may hold them.
    fn with_positive_alphas(self) -> Result<Self> {
        let wrong = self.alphas().find(|alpha| *alpha as f32 <= 0.0);
        match wrong {
            Some(alpha) => Err(Error::usage(format!(
                "an alpha must be, in 32 bits, above 0, not {alpha:?}"
            ))),
            None => Ok(self),
        }
    }

    /// The alpha that was asked for, and those of single layers.
    fn alphas(&self) -> impl Iterator<Item = f64> {
        let patterns = self.alpha_pattern.iter().map(|entry| entry.value);
        self.alpha.into_iter().chain(patterns)
    }

    fn from_peft(config: &mut PeftConfig) -> Result<Self> {
        let targets: Value = config.require("target_modules")?;
        let rank = config.require("r")?;
        // Starts that also change the base need that change undone; the others only name how a run began.
        let start: Option<Value> = config.take("init_lora_weights")?;
        if let Some(Value::String(name)) = &start
            && !["gaussian", "eva", "orthogonal"].contains(&name.as_str())
        {
            return Err(Error::new(format!(
                "`init_lora_weights` is `{name}`: such an adapter changes the base as well"
            ))
            .at("adapter_config.json")
            .hint(
                "convert it with PEFT's `path_initial_model_for_weight_conversion` to a plain LoRA",
            ));
        }
        let bias: Option<String> = config.take("bias")?;
        if let Some(bias) = bias.filter(|bias| bias != "none") {
            return Err(
                Error::new(format!("`bias` is `{bias}`; only `none` is implemented"))
                    .at("adapter_config.json"),
            );
        }
        let read = |field: &str, value: &Value| {
            Targets::from_peft(value).map_err(|error| in_field(field, error))
        };
        let targets = read("target_modules", &targets)?;
        let exclude: Option<Value> = config.take("exclude_modules")?;
        let exclude = exclude.map(|exclude| read("exclude_modules", &exclude));
        let layers: Option<Value> = config.take("layers_to_transform")?;
        let layers = match layers {
            None => None,
            Some(Value::Number(layer)) => layer
                .as_u64()
                .map(|layer| LayerSelection::new(vec![layer as usize]))
                .ok_or_else(|| {
                    Error::new(format!("`layers_to_transform` cannot be `{layer}`"))
                        .at("adapter_config.json")
                })
                .map(Some)?,
            Some(other) => Some(LayerSelection::new(
                serde_json::from_value(other.clone()).map_err(|_| {
                    Error::new(format!("`layers_to_transform` cannot be `{other}`"))
                        .at("adapter_config.json")
                })?,
            )),
        };
        // Only ever restates where the block number stands in a path; there is one place in every model here.
        let _: Option<Value> = config.take("layers_pattern")?;
        let lora = Self {
            rank,
            alpha: Some(config.take("lora_alpha")?.unwrap_or(8.0)),
            dropout: config.take("lora_dropout")?.unwrap_or(0.0),
            rslora: config.take("use_rslora")?.unwrap_or(false),
            targets,
            exclude: exclude.transpose()?,
            // An empty list is no choice of blocks to PEFT.
            layers: layers.filter(|layers| !layers.layers().is_empty()),
            rank_pattern: overrides(config, "rank_pattern")?,
            alpha_pattern: overrides(config, "alpha_pattern")?,
        };
        if let Some((field, fact)) = lora.impossible() {
            return Err(in_field(field, fact));
        }
        if lora.layers.is_some() && matches!(lora.targets, Targets::Pattern(_)) {
            return Err(Error::new(
                "`layers_to_transform` goes with names in `target_modules`, not with a pattern",
            )
            .at(CONFIG_FILE));
        }
        Ok(lora)
    }

    fn acts_on(&self, path: &str, is_head: bool) -> bool {
        let excluded = self
            .exclude
            .as_ref()
            .is_some_and(|exclude| exclude.matches(path, false));
        !excluded && self.in_layers(path) && self.targets.matches(path, is_head)
    }

    fn in_layers(&self, path: &str) -> bool {
        self.layers
            .as_ref()
            .is_none_or(|layers| layer_of(path).is_some_and(|layer| layers.contains(layer)))
    }

    fn rank_at(&self, path: &str) -> usize {
        first_override(&self.rank_pattern, path).map_or(self.rank, |rank| rank as usize)
    }

    fn scale_at(&self, path: &str) -> f64 {
        let rank = self.rank_at(path) as f64;
        let alpha = first_override(&self.alpha_pattern, path).unwrap_or(self.alpha_value());
        alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    fn alpha_value(&self) -> f64 {
        self.alpha.unwrap_or(2.0 * self.rank as f64)
    }
}

impl AdapterMethod for Lora {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn adapt_linear(
        &self,
        site: &LinearSite,
        weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn LinearAdapter>>> {
        if !self.acts_on(site.path, site.is_head()) {
            return Ok(None);
        }
        if site.is_head() && site.model.tied_head {
            return Err(Error::new(
                "the output head is the embedding matrix itself, so it cannot be adapted alone",
            )
            .hint("leave the head out of `--targets`"));
        }
        let (rank, inputs, outputs) = (
            self.rank_at(site.path),
            site.base.in_features(),
            site.base.out_features(),
        );
        weights.same(&site.peft_name("base_layer.weight"), || site.base.weight())?;
        let bound = 1.0 / (inputs as f64).sqrt();
        Ok(Some(Box::new(LoraLinear {
            a: weights.var(
                &site.peft_name("lora_A.weight"),
                (rank, inputs),
                Init::Uniform { bound },
            )?,
            b: weights.var(
                &site.peft_name("lora_B.weight"),
                (outputs, rank),
                Init::Zeros,
            )?,
            scale: self.scale_at(site.path),
            dropout: self.dropout,
            path: site.path.to_owned(),
        })))
    }

    fn adapt_embedding(
        &self,
        site: &EmbeddingSite,
        weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn EmbeddingAdapter>>> {
        // Not a linear layer, so only a name or a pattern can mean it.
        if matches!(self.targets, Targets::AllLinear) || !self.acts_on(site.path, false) {
            return Ok(None);
        }
        weights.same(&site.peft_name("base_layer.weight"), || (site.weight)())?;
        let rank = self.rank_at(site.path);
        let (vocabulary, hidden) = (site.model.vocabulary, site.model.hidden_size);
        Ok(Some(Box::new(LoraEmbedding {
            a: weights.var(
                &site.peft_name("lora_embedding_A"),
                (rank, vocabulary),
                Init::Zeros,
            )?,
            b: weights.var(
                &site.peft_name("lora_embedding_B"),
                (hidden, rank),
                Init::Normal { deviation: 1.0 },
            )?,
            scale: self.scale_at(site.path),
        })))
    }

    fn unmatched(&self, paths: &[String]) -> Vec<String> {
        let patterns = self.rank_pattern.iter().chain(&self.alpha_pattern);
        let unknown = patterns.filter(|entry| !paths.iter().any(|path| entry.matches(path)));
        let mut unmatched = self.targets.unmatched(paths);
        unmatched.extend(
            self.exclude
                .iter()
                .flat_map(|exclude| exclude.unmatched(paths)),
        );
        unmatched.extend(unknown.map(|entry| entry.name.clone()));
        unmatched
    }

    fn check_paths(&self, paths: &[String]) -> Result<()> {
        let in_layers: Vec<String> = paths
            .iter()
            .filter(|path| self.in_layers(path))
            .cloned()
            .collect();
        let dropped = self.targets.unmatched(&in_layers);
        if let (Some(layers), false) = (&self.layers, dropped.is_empty()) {
            return Err(Error::new(format!(
                "`--layers {layers}` leaves nothing of {} among the targets",
                quoted(&dropped)
            ))
            .hint("leave out `--layers` and name the blocks in the targets, such as `--targets layers.1.self_attn.q_proj,embed_tokens`"));
        }
        // What stands in no block, embedding and output head, is not part of `all-linear`.
        let adapted: Vec<&str> = paths
            .iter()
            .map(String::as_str)
            .filter(|path| self.acts_on(path, layer_of(path).is_none()))
            .collect();
        for (option, patterns) in [
            ("--rank-pattern", &self.rank_pattern),
            ("--alpha-pattern", &self.alpha_pattern),
        ] {
            let idle: Vec<&str> = patterns
                .iter()
                .filter(|entry| !adapted.iter().any(|path| entry.matches(path)))
                .map(|entry| entry.name.as_str())
                .collect();
            if !idle.is_empty() {
                let names: BTreeSet<&str> = adapted
                    .iter()
                    .filter_map(|path| path.rsplit('.').next())
                    .collect();
                return Err(Error::new(format!(
                    "{} of `{option}` matches none of the adapted layers",
                    quoted(idle)
                ))
                .hint(format!("adapted are {}", quoted(names))));
            }
            let first: BTreeSet<usize> = adapted
                .iter()
                .filter_map(|path| patterns.iter().position(|entry| entry.matches(path)))
                .collect();
            let shadowed = (0..patterns.len()).find(|index| !first.contains(index));
            if let Some(index) = shadowed {
                return Err(Error::new(format!(
                    "`{}={}` of `{option}` never counts: of several that match a layer the first does",
                    patterns[index].name, patterns[index].value
                ))
                .hint("give each name once, and what matches fewer layers first"));
            }
        }
        Ok(())
    }

    fn check(&self, model: &ModelShape) -> Result<()> {
        match self
            .layers
            .iter()
            .flat_map(|layers| layers.layers())
            .find(|layer| **layer >= model.layers)
        {
            Some(layer) => Err(Error::new(format!(
                "`--layers` names block {layer}, the model has blocks 0 to {}",
                model.layers - 1
            ))),
            None => Ok(()),
        }
    }

    fn peft_config(&self, _model: &ModelShape, weights: &AdapterWeights) -> Result<PeftConfig> {
        let targets = match &self.targets {
            // PEFT would expand `all-linear` again by its own rule: name what was adapted.
            Targets::AllLinear => {
                let mut names: Vec<&str> = weights
                    .iter()
                    .filter_map(|(name, _)| name.strip_suffix(".lora_A.weight")?.rsplit('.').next())
                    .collect();
                names.sort_unstable();
                names.dedup();
                json!(names)
            }
            chosen => chosen.to_peft(),
        };
        let nulls = [
            "alora_invocation_tokens",
            "arrow_config",
            "corda_config",
            "eva_config",
            "kasa_config",
            "layer_replication",
            "layers_pattern",
            "lora_ga_config",
            "megatron_config",
            "modules_to_save",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "velora_config",
        ];
        let falses = [
            "ensure_weight_tying",
            "fan_in_fan_out",
            "lora_bias",
            "use_dora",
            "use_qalora",
        ];
        let mut config = PeftConfig::new("LORA");
        for name in nulls {
            config = config.with(name, Value::Null);
        }
        for name in falses {
            config = config.with(name, false);
        }
        Ok(config
            .with("r", self.rank)
            .with("lora_alpha", number(self.alpha_value()))
            .with("lora_dropout", self.dropout)
            .with("use_rslora", self.rslora)
            .with("bias", "none")
            .with("init_lora_weights", true)
            .with("loftq_config", json!({}))
            .with("megatron_core", "megatron.core")
            .with("qalora_group_size", 16)
            .with("target_modules", targets)
            .with(
                "exclude_modules",
                self.exclude.as_ref().map_or(Value::Null, Targets::to_peft),
            )
            .with(
                "layers_to_transform",
                self.layers
                    .as_ref()
                    .map_or(Value::Null, |layers| json!(layers.layers())),
            )
            .with("rank_pattern", to_object(&self.rank_pattern))
            .with("alpha_pattern", to_object(&self.alpha_pattern)))
    }

    fn default_learning_rate(&self) -> f64 {
        5e-4
    }
}

/// A LoRA read back. By its tensors it fits a base or does not: PEFT passes over what it names and the base lacks, such
/// as blocks of a deeper one, and nobody typed it.
struct SavedLora(Lora);

impl AdapterMethod for SavedLora {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn adapt_linear(
        &self,
        site: &LinearSite,
        weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn LinearAdapter>>> {
        self.0.adapt_linear(site, weights)
    }

    fn adapt_embedding(
        &self,
        site: &EmbeddingSite,
        weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn EmbeddingAdapter>>> {
        self.0.adapt_embedding(site, weights)
    }

    fn peft_config(&self, model: &ModelShape, weights: &AdapterWeights) -> Result<PeftConfig> {
        self.0.peft_config(model, weights)
    }

    fn default_learning_rate(&self) -> f64 {
        self.0.default_learning_rate()
    }
}

struct LoraLinear {
    a: Tensor,
    b: Tensor,
    scale: f64,
    dropout: f64,
    path: String,
}

impl LoraLinear {
    /// What is dropped of the update's input in `mode`.
    fn dropped(&self, mode: Mode) -> Option<Dropout> {
        match mode {
            Mode::Train { seed, first_row } if self.dropout > 0.0 => {
                Some(Dropout::new(self.dropout, seed, &self.path, first_row))
            }
            _ => None,
        }
    }
}

impl LinearAdapter for LoraLinear {
    fn forward(&self, x: &Tensor, base: &dyn BaseLinear, mode: Mode) -> Result<Tensor> {
        let input = match self.dropped(mode) {
            Some(dropout) => {
                let (rows, inputs) = x.dims2()?;
                let mut mask = vec![1f32; rows * inputs];
                for (row, mask) in mask.chunks_exact_mut(inputs.max(1)).enumerate() {
                    dropout.apply(row, mask);
                }
                let mask = Tensor::from_vec(mask, (rows, inputs), x.device())?;
                (x * mask)?
            }
            None => x.clone(),
        };
        let update = input.matmul(&self.a.t()?)?.matmul(&self.b.t()?)?;
        Ok((base.forward(x)? + (update * self.scale)?)?)
    }

    fn merged_weight(&self, base: &Tensor) -> Result<Tensor> {
        Ok((base + (self.b.matmul(&self.a)? * self.scale)?)?)
    }

    fn low_rank(&self, mode: Mode) -> Option<LowRank<'_>> {
        Some(LowRank {
            a: &self.a,
            b: &self.b,
            scale: self.scale,
            dropout: self.dropped(mode),
        })
    }
}

struct LoraEmbedding {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl EmbeddingAdapter for LoraEmbedding {
    fn forward(&self, tokens: &Tensor, base: &Tensor) -> Result<Tensor> {
        let rows = self.a.t()?.contiguous()?.index_select(tokens, 0)?; // (tokens, rank)
        Ok((base + (rows.matmul(&self.b.t()?)? * self.scale)?)?)
    }

    fn low_rank(&self) -> Option<LowRank<'_>> {
        Some(LowRank {
            a: &self.a,
            b: &self.b,
            scale: self.scale,
            dropout: None,
        })
    }

    fn merged_weight(&self, base: &Tensor) -> Result<Tensor> {
        Ok((base + (self.b.matmul(&self.a)?.t()? * self.scale)?)?)
    }
}

/// Far above the width of any layer that an update of low rank is for.
const HIGHEST_RANK: f64 = 65_536.0;
/// Bytes of a compiled pattern, at most: names of layers need a hundredth.
const LARGEST_PATTERN: usize = 1 << 18;
/// One for each layer of the largest models.
const MOST_OVERRIDES: usize = 4096;

/// A value that holds for the layers matching a name or pattern only, written `q_proj=16`.
#[derive(Debug, Clone)]
pub struct Override {
    name: String,
    pattern: Regex,
    value: f64,
}

impl Override {
    fn new(name: &str, value: f64) -> Result<Self> {
        let pattern = RegexBuilder::new(&format!("^(?:.*\\.)?(?:{name})$"))
            .size_limit(LARGEST_PATTERN)
            .build()
            .map_err(|error| Error::usage(format!("`{name}` is not a valid pattern: {error}")))?;
        Ok(Self {
            name: name.to_owned(),
            pattern,
            value,
        })
    }

    fn matches(&self, path: &str) -> bool {
        self.pattern.is_match(path)
    }
}

impl FromStr for Override {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::usage(format!("`{text}` is not of the form NAME=NUMBER"));
        let (name, value) = text.rsplit_once('=').ok_or_else(wrong)?;
        Self::new(name.trim(), value.trim().parse().map_err(|_| wrong())?)
    }
}

/// Puts the names of the modules that the file has tensors of in the place of patterns that look ahead or behind, which
/// Python knows: an engine that looks around has no bound on the time that a stranger's pattern may take, and the file
/// says as well what is adapted.
fn name_targets(config: &mut PeftConfig, tensors: &SavedTensors) {
    let looks_around = |field: &str| {
        config.get(field).is_some_and(|value| {
            let pattern = value.as_str().unwrap_or_default();
            Targets::from_peft(value).is_err()
                && ["(?=", "(?!", "(?<=", "(?<!"]
                    .iter()
                    .any(|start| pattern.contains(start))
        })
    };
    if !looks_around("target_modules") && !looks_around("exclude_modules") {
        return;
    }
    let modules: Vec<&str> = tensors
        .keys()
        .filter_map(|name| {
            let name = name.strip_prefix("base_model.model.")?;
            name.strip_suffix(".lora_A.weight")
                .or_else(|| name.strip_suffix(".lora_embedding_A"))
        })
        .collect();
    if !modules.is_empty() {
        *config = config
            .clone()
            .with("target_modules", modules)
            .with("exclude_modules", Value::Null);
    }
}

fn first_override(overrides: &[Override], path: &str) -> Option<f64> {
    overrides
        .iter()
        .find(|entry| entry.matches(path))
        .map(|entry| entry.value)
}

fn overrides(config: &mut PeftConfig, field: &str) -> Result<Vec<Override>> {
    let entries: Map<String, Value> = config.take(field)?.unwrap_or_default();
    if entries.len() > MOST_OVERRIDES {
        return Err(Error::new(format!(
            "`{field}` has {} entries, more than {MOST_OVERRIDES}",
            entries.len()
        ))
        .at("adapter_config.json"));
    }
    entries
        .iter()
        .map(|(name, value)| {
            let value = value.as_f64().ok_or_else(|| {
                Error::new(format!("`{field}` gives `{name}` the value `{value}`"))
                    .at("adapter_config.json")
            })?;
            Override::new(name, value).map_err(|error| in_field(field, error))
        })
        .collect()
}

/// The fault of a field in `adapter_config.json`: what would be wrong usage where it is typed is the file's fault there.
fn in_field(field: &str, fact: impl Display) -> Error {
    Error::new(format!("field `{field}`: {fact}")).at(CONFIG_FILE)
}

/// The entries in their order, which PEFT keeps and goes by too: to it as to [`first_override`] the first that matches
/// counts, so the first of a name is written.
fn to_object(overrides: &[Override]) -> Value {
    let mut object = Map::new();
    for entry in overrides {
        object
            .entry(entry.name.as_str())
            .or_insert(number(entry.value));
    }
    object.into()
}

/// A whole number without a decimal point, as Python writes an int.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}
