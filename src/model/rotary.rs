//! Rotary position embedding: the cosines and sines by which queries and keys are turned.
//!
//! Pair `i` of a head of `d` numbers turns by `position · theta^(-2i/d)`, the frequencies changed by the scaling in
//! use. RoFormer, <https://arxiv.org/abs/2104.09864>; the arithmetic and its order are those of transformers 5.23
//! (`modeling_rope_utils.py`, `LlamaRotaryEmbedding`), in f32 like there: at position 8000 a frequency that is off in
//! its last bit turns by another 0.0005.

use super::config::{RopeConfig, RopeScaling, Yarn};
use std::f32::consts::TAU;

/// The rotation of one model.
#[derive(Debug, Clone)]
pub struct Rotary {
    rope: RopeConfig,
    head_dim: usize,
    max_positions: usize,
    /// One for each pair of a head: `(head_dim / 2)`.
    frequencies: Vec<f32>,
}

impl Rotary {
    /// The rotation described by `rope`, for heads of `head_dim` numbers in a model made for `max_positions`.
    pub fn new(rope: &RopeConfig, head_dim: usize, max_positions: usize) -> Self {
        let plain = plain_frequencies(power_of(rope.theta), head_dim);
        let frequencies = match &rope.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => plain,
            RopeScaling::Linear { factor } => plain
                .iter()
                .map(|frequency| frequency / *factor as f32)
                .collect(),
            RopeScaling::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_positions,
            } => plain
                .iter()
                .map(|frequency| {
                    llama3_frequency(
                        *frequency,
                        *factor as f32,
                        *low_frequency_factor,
                        *high_frequency_factor,
                        *original_positions as f64,
                    )
                })
                .collect(),
            RopeScaling::Yarn(yarn) => yarn_frequencies(yarn, rope.theta, head_dim),
        };
        Self {
            rope: rope.clone(),
            head_dim,
            max_positions,
            frequencies,
        }
    }

    /// Whether rotations change as a sequence grows to `length`: then keys rotated earlier no longer fit.
    pub fn depends_on_length(&self, length: usize) -> bool {
        matches!(self.rope.scaling, RopeScaling::Dynamic { .. }) && length > self.max_positions
    }

    /// Cosines and sines, each `(positions, head_dim / 2)`, for sequences of which the longest has
    /// `longest_sequence` tokens, those in a cache included.
    ///
    /// The length matters to `dynamic` scaling only. There transformers also remembers the longest sequence it has
    /// seen until a short one comes; here equal calls give equal results.
    pub fn table(&self, positions: &[u32], longest_sequence: usize) -> (Vec<f32>, Vec<f32>) {
        let stretched;
        let mut frequencies = &self.frequencies;
        if let RopeScaling::Dynamic { factor } = self.rope.scaling
            && longest_sequence > self.max_positions
        {
            stretched = self.dynamic_frequencies(factor, longest_sequence);
            frequencies = &stretched;
        }
        let magnitude = match &self.rope.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor as f32,
            _ => 1.0,
        };
        let angles = || {
            positions.iter().flat_map(|position| {
                frequencies
                    .iter()
                    .map(move |frequency| f64::from(*position as f32 * frequency))
            })
        };
        (
            angles()
                .map(|angle| angle.cos() as f32 * magnitude)
                .collect(),
            angles()
                .map(|angle| angle.sin() as f32 * magnitude)
                .collect(),
        )
    }

    /// Frequencies over a base that grows with the sequence ("NTK-aware").
    fn dynamic_frequencies(&self, factor: f64, longest_sequence: usize) -> Vec<f32> {
        let dim = self.head_dim as f64;
        let growth = factor as f32 * longest_sequence as f32 / self.max_positions as f32
            - (factor - 1.0) as f32;
        let growth = f64::from(growth).powf(f64::from((dim / (dim - 2.0)) as f32)) as f32;
        plain_frequencies(
            power_of(f64::from(self.rope.theta as f32 * growth)),
            self.head_dim,
        )
    }
}

/// `base^exponent` for f32 exponents, rounded to f32 once: what a correctly rounded f32 `pow` gives.
fn power_of(base: f64) -> impl Fn(f32) -> f32 {
    let base = f64::from(base as f32);
    move |exponent| base.powf(f64::from(exponent)) as f32
}

/// The exponents 0, 2/d, 4/d, …
fn exponents(head_dim: usize) -> impl Iterator<Item = f32> {
    (0..head_dim / 2).map(move |pair| (2 * pair) as f32 / head_dim as f32)
}

fn plain_frequencies(power: impl Fn(f32) -> f32, head_dim: usize) -> Vec<f32> {
    exponents(head_dim)
        .map(|exponent| 1.0 / power(exponent))
        .collect()
}

/// Long waves are stretched by `factor`, short ones kept, a ramp between the two.
fn llama3_frequency(frequency: f32, factor: f32, low: f64, high: f64, original: f64) -> f32 {
    // torch computes `number / tensor` as the tensor's reciprocal times the number.
    let wavelength = (1.0 / frequency) * TAU;
    if wavelength > (original / low) as f32 {
        return frequency / factor;
    }
    if wavelength < (original / high) as f32 {
        return frequency;
    }
    let smooth = ((1.0 / wavelength) * original as f32 - low as f32) / (high - low) as f32;
    (1.0 - smooth) * frequency / factor + smooth * frequency
}

fn yarn_frequencies(yarn: &Yarn, theta: f64, head_dim: usize) -> Vec<f32> {
    let dim = head_dim as f64;
    // The dimension that turns `turns` times within the original length.
    let dimension = |turns: f64| {
        let length = yarn.original_positions as f64;
        dim * (length / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (dimension(yarn.beta_fast), dimension(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let low = low.max(0.0);
    let mut high = high.min(dim - 1.0);
    if low == high {
        high += 0.001;
    }
    let power = power_of(theta);
    exponents(head_dim)
        .enumerate()
        .map(|(pair, exponent)| {
            let wavelength = power(exponent);
            let ramp = ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            let stretched = 1.0 / (yarn.factor as f32 * wavelength);
            stretched * (1.0 - keep) + (1.0 / wavelength) * keep
        })
        .collect()
}
