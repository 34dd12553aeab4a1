//! The rotary position embedding in `config.json`: `rope_theta` with `rope_scaling`, or `rope_parameters`.
//!
//! Source: `modeling_rope_utils.py` of transformers 5.23 (`RotaryEmbeddingConfigMixin`).

use super::fields::{Fields, shown};
use serde_json::{Map, Value};

/// Base and scaling of the rotation; the arithmetic is in [`crate::model::rotary`].
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the geometric series of wavelengths (`rope_theta`).
    pub theta: f64,
    /// How the series is changed for longer texts.
    pub scaling: RopeScaling,
}

/// The `rope_type`s that are implemented.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// `default`: none.
    None,
    /// `linear`: all frequencies divided by `factor`.
    Linear {
        /// How many times longer.
        factor: f64,
    },
    /// `dynamic`: the base grows with the sequence once it is longer than the model was made for.
    Dynamic {
        /// How fast the base grows.
        factor: f64,
    },
    /// `llama3`: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Fewer turns than this within the original length are low.
        low_frequency_factor: f64,
        /// More turns than this within the original length are high.
        high_frequency_factor: f64,
        /// The length before scaling (`original_max_position_embeddings`).
        original_positions: usize,
    },
    /// `yarn`: a ramp over the dimensions, and scaled cosines and sines.
    Yarn(Yarn),
}

/// The parameters of `yarn`, <https://arxiv.org/abs/2309.00071>.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// How many times longer.
    pub factor: f64,
    /// The length before scaling (`original_max_position_embeddings`).
    pub original_positions: usize,
    /// Cosines and sines are multiplied by this: `attention_factor`, or what follows from `factor`, `mscale` and `mscale_all_dim`.
    pub attention_factor: f64,
    /// Dimensions that turn more often than this within the original length are kept.
    pub beta_fast: f64,
    /// Dimensions that turn less often than this within the original length are divided by `factor`.
    pub beta_slow: f64,
    /// Whether the ends of the ramp are rounded outwards to whole dimensions.
    pub truncate: bool,
}

/// Reads all the places in which rotary parameters can stand.
pub(super) fn read(fields: &mut Fields, max_positions: usize) -> RopeConfig {
    let outer_theta = fields.number("rope_theta");
    let outer_original = fields.size("original_max_position_embeddings");
    if let Some(share) = fields
        .number("partial_rotary_factor")
        .filter(|share| *share != 1.0)
    {
        fields.refuse(
            "partial_rotary_factor",
            share.to_string(),
            "rotation of a part of each head",
        );
    }
    let scaling = fields.object("rope_scaling").filter(|map| !map.is_empty());
    let parameters = fields
        .object("rope_parameters")
        .filter(|map| !map.is_empty());
    let (name, map) = match (scaling, parameters) {
        (Some(scaling), Some(parameters)) => {
            if scaling != parameters {
                fields.problem(
                    "`rope_scaling` and `rope_parameters` are both there and differ".to_owned(),
                );
            }
            ("rope_parameters", parameters)
        }
        (Some(scaling), None) => ("rope_scaling", scaling),
        (None, parameters) => ("rope_parameters", parameters.unwrap_or_default()),
    };
    let mut inner = Fields::new(uniform(map, name, fields));
    let theta = inner
        .number("rope_theta")
        .or(outer_theta)
        .unwrap_or(10_000.0);
    let scaling = read_scaling(&mut inner, name, outer_original, max_positions, fields);
    if let Some(scaling) = scaling {
        inner.finish_inside(name, fields);
        return RopeConfig { theta, scaling };
    }
    RopeConfig {
        theta,
        scaling: RopeScaling::None,
    }
}

/// One set of parameters for all layers: per-layer sets are accepted where they agree.
fn uniform(map: Map<String, Value>, name: &str, fields: &mut Fields) -> Map<String, Value> {
    if !map.iter().any(|(key, _)| key.ends_with("_attention")) {
        return map;
    }
    let mut sets = map.values().filter(|value| !value.is_null());
    match sets.next() {
        Some(Value::Object(first)) if sets.all(|other| other.as_object() == Some(first)) => {
            first.clone()
        }
        _ => {
            fields.refuse(
                name,
                shown(&Value::Object(map.clone())),
                "different rotation in different layers",
            );
            Map::new()
        }
    }
}

fn read_scaling(
    inner: &mut Fields,
    name: &str,
    outer_original: Option<usize>,
    max_positions: usize,
    fields: &mut Fields,
) -> Option<RopeScaling> {
    let former = inner.text("type");
    let kind = inner
        .text("rope_type")
        .or(former)
        .unwrap_or_else(|| "default".to_owned());
    // The field beside the object goes before the one inside: that is transformers' order.
    let original = |inner: &mut Fields| {
        let own = inner.size("original_max_position_embeddings");
        outer_original.or(own).unwrap_or(max_positions)
    };
    let scaling = match kind.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: inner.required_number("factor"),
        },
        "dynamic" => RopeScaling::Dynamic {
            factor: inner.required_number("factor"),
        },
        "llama3" => RopeScaling::Llama3 {
            factor: inner.required_number("factor"),
            low_frequency_factor: inner.required_number("low_freq_factor"),
            high_frequency_factor: inner.required_number("high_freq_factor"),
            original_positions: original(inner),
        },
        "yarn" => {
            let original_positions = original(inner);
            // Null is derived; transformers takes absence for a mistake.
            let factor = match inner.has("factor") {
                true => inner
                    .number("factor")
                    .unwrap_or(max_positions as f64 / original_positions as f64),
                false => inner.required_number("factor"),
            };
            RopeScaling::Yarn(Yarn {
                factor,
                original_positions,
                attention_factor: attention_factor(inner, factor),
                // transformers writes `get(..) or 32`, so 0 is the default too.
                beta_fast: inner
                    .number("beta_fast")
                    .filter(|beta| *beta != 0.0)
                    .unwrap_or(32.0),
                beta_slow: inner
                    .number("beta_slow")
                    .filter(|beta| *beta != 0.0)
                    .unwrap_or(1.0),
                // Absent is true, null is false: `get("truncate", True)`.
                truncate: !inner.has("truncate") || inner.flag("truncate").unwrap_or(false),
            })
        }
        other => {
            fields.refuse(
                name,
                format!("{{\"rope_type\": {other:?}, …}}"),
                "implemented are `default`, `linear`, `dynamic`, `llama3` and `yarn`",
            );
            return None;
        }
    };
    Some(scaling)
}

fn attention_factor(inner: &mut Fields, factor: f64) -> f64 {
    let stated = inner.number("attention_factor");
    let scale = inner.number("mscale").filter(|scale| *scale != 0.0);
    let scale_all = inner.number("mscale_all_dim").filter(|scale| *scale != 0.0);
    let magnitude = |scale: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * scale * factor.ln() + 1.0
        }
    };
    stated.unwrap_or_else(|| match (scale, scale_all) {
        (Some(scale), Some(scale_all)) => magnitude(scale) / magnitude(scale_all),
        _ => magnitude(1.0),
    })
}

impl RopeConfig {
    /// Adds what cannot be computed with.
    pub(super) fn check(&self, head_dim: usize, problems: &mut Vec<String>) {
        if !(self.theta > 1.0 && self.theta <= 1e15) {
            problems.push(format!(
                "`rope_theta` is {}, expected more than 1",
                self.theta
            ));
        }
        let mut positive = |name: &str, number: f64| {
            if !(number > 0.0 && number <= 1e9) {
                problems.push(format!(
                    "`{name}` of the rotary scaling is {number}, expected a positive number"
                ));
            }
        };
        match &self.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Dynamic { factor } => {
                positive("factor", *factor);
                if *factor < 1.0 || head_dim <= 2 {
                    problems.push(format!(
                        "`dynamic` rotary scaling needs a `factor` of at least 1 and a `head_dim` above 2, not {factor} and {head_dim}"
                    ));
                }
            }
            RopeScaling::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_positions,
            } => {
                positive("factor", *factor);
                positive("low_freq_factor", *low_frequency_factor);
                positive("high_freq_factor", *high_frequency_factor);
                positive(
                    "original_max_position_embeddings",
                    *original_positions as f64,
                );
                if high_frequency_factor <= low_frequency_factor {
                    problems.push(format!(
                        "`high_freq_factor` ({high_frequency_factor}) must be above `low_freq_factor` ({low_frequency_factor})"
                    ));
                }
            }
            RopeScaling::Yarn(yarn) => {
                positive("factor", yarn.factor);
                positive("attention_factor", yarn.attention_factor);
                positive("beta_fast", yarn.beta_fast);
                positive("beta_slow", yarn.beta_slow);
                positive(
                    "original_max_position_embeddings",
                    yarn.original_positions as f64,
                );
                if yarn.beta_fast < yarn.beta_slow {
                    problems.push(format!(
                        "`beta_fast` ({}) must not be below `beta_slow` ({})",
                        yarn.beta_fast, yarn.beta_slow
                    ));
                }
            }
        }
    }
}
