//! Rotary position embedding: the cosines and sines by which queries and keys are turned.
//!
//! Pair `i` of a head of `d` numbers turns by `position · theta^(-2i/d)`, the frequencies changed by the scaling in
//! use. RoFormer, <https://arxiv.org/abs/2104.09864>; the arithmetic and its order are those of transformers 5.23
//! (`modeling_rope_utils.py`, `LlamaRotaryEmbedding`), in f32 like there: at position 8000 a frequency that is off in
//! its last bit turns by another 0.0005.

use super::config::{RopeConfig, RopeScaling, Yarn};
use crate::Result;
use crate::ops::RotaryTable;
use std::f32::consts::TAU;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

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
        let growth = f64::from(growth).powf(dim / (dim - 2.0)) as f32;
        plain_frequencies(
            power_of(f64::from(self.rope.theta as f32 * growth)),
            self.head_dim,
        )
    }
}

/// The rows of one sequence in a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    /// Their places in the sequence.
    pub range: Range<usize>,
    /// Tokens of the sequence in all, those in a cache included.
    pub length: usize,
}

/// Rotations kept from pass to pass: sines take longer than a GPU should wait.
#[derive(Default)]
pub(super) struct KnownRotations(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// Cosines of the first positions.
    cosines: Vec<f32>,
    sines: Vec<f32>,
    /// Those of the last pass, which are often the next one's too.
    last: Option<(Vec<Positions>, RotaryTable)>,
}

impl KnownRotations {
    /// What [`Rotary::table`] gives for the rows of these sequences, end to end.
    pub(super) fn of(&self, rotary: &Rotary, sequences: &[Positions]) -> Result<RotaryTable> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, table)) = &known.last
            && last == sequences
        {
            return Ok(table.clone());
        }
        let (mut cosines, mut sines) = (Vec::new(), Vec::new());
        for sequence in sequences {
            known.append(rotary, sequence, &mut cosines, &mut sines);
        }
        let table = RotaryTable::new(cosines, sines, rotary.head_dim)?;
        known.last = Some((sequences.to_vec(), table.clone()));
        Ok(table)
    }
}

impl Known {
    /// Adds the rotations of a sequence's rows to those of the ones before it.
    fn append(
        &mut self,
        rotary: &Rotary,
        Positions { range, length }: &Positions,
        cosines: &mut Vec<f32>,
        sines: &mut Vec<f32>,
    ) {
        let table = |positions: Range<usize>| {
            let positions: Vec<u32> = positions.map(|position| position as u32).collect();
            rotary.table(&positions, *length)
        };
        if rotary.depends_on_length(*length) {
            let (new_cosines, new_sines) = table(range.clone());
            cosines.extend(new_cosines);
            sines.extend(new_sines);
            return;
        }
        let pairs = rotary.head_dim / 2;
        let (new_cosines, new_sines) = table(self.cosines.len() / pairs..range.end);
        self.cosines.extend(new_cosines);
        self.sines.extend(new_sines);
        let values = range.start * pairs..range.end * pairs;
        cosines.extend_from_slice(&self.cosines[values.clone()]);
        sines.extend_from_slice(&self.sines[values]);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops;
    use candle_core::{Device, Tensor};

    /// Compares the last row of a table with what transformers 5.23 computes (`LlamaRotaryEmbedding`, on the CPU).
    fn assert_row(
        rope: (f64, RopeScaling),
        (head_dim, max_positions): (usize, usize),
        positions: &[u32],
        (cosines, sines): (&[f32], &[f32]),
    ) {
        let (theta, scaling) = rope;
        let rotary = Rotary::new(&RopeConfig { theta, scaling }, head_dim, max_positions);
        let longest = positions
            .iter()
            .max()
            .map_or(0, |position| *position as usize + 1);
        let (all_cosines, all_sines) = rotary.table(positions, longest);
        assert_eq!(all_cosines.len(), positions.len() * head_dim / 2);
        for (ours, expected) in [(&all_cosines, cosines), (&all_sines, sines)] {
            let row = &ours[ours.len() - head_dim / 2..];
            for (value, expected) in row.iter().zip(expected) {
                assert!(
                    (value - expected).abs() <= 2e-7,
                    "{row:?} is not {expected:?}"
                );
            }
        }
    }

    #[test]
    fn plain_linear_and_dynamic_agree_with_transformers() {
        let plain: (&[f32], &[f32]) = (
            &[0.985_896_6, 0.999_858_6, 0.808_027_5, 0.998_016_2],
            &[0.167_355_7, 0.016_814_09, 0.589_144_77, 0.062_958_34],
        );
        let positions = [0, 1, 7, 63];
        assert_row((1e4, RopeScaling::None), (8, 64), &positions, plain);
        assert_row(
            (1e4, RopeScaling::Linear { factor: 2.5 }),
            (8, 64),
            &positions,
            (
                &[0.997_738_9, -0.812_952_04, 0.968_415_7, 0.999_682_5],
                &[0.067_208_834, 0.582_330_64, 0.249_341_26, 0.025_197_335],
            ),
        );
        // As long as the model was made for, `dynamic` changes nothing.
        assert_row(
            (1e4, RopeScaling::Dynamic { factor: 2.0 }),
            (8, 64),
            &positions,
            plain,
        );
        assert_row(
            (1e4, RopeScaling::Dynamic { factor: 2.0 }),
            (8, 64),
            &[0, 5, 150],
            (
                &[0.699_250_8, -0.967_135_1, 0.811_008_1, 0.999_186_6],
                &[-0.714_876_4, -0.254_263_22, 0.585_034_9, 0.040_325_2],
            ),
        );
    }

    #[test]
    fn llama3_agrees_with_transformers() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_positions: 8192,
        };
        let cosines = [
            0.985_896_6,
            0.939_634,
            -0.716_229,
            0.896_301_9,
            0.999_633_85,
            0.999_999_9,
            1.0,
            1.0,
        ];
        let sines = [
            0.167_355_7,
            -0.342_181_06,
            0.697_865_3,
            0.443_444_37,
            0.027_058_77,
            0.000_539_926_1,
            0.000_104_703_95,
            2.030_447_6e-5,
        ];
        assert_row(
            (5e5, scaling),
            (16, 131_072),
            &[0, 1, 7, 63],
            (&cosines, &sines),
        );
    }

    #[test]
    fn yarn_agrees_with_transformers() {
        let magnitude = |scale: f64, factor: f64| 0.1 * scale * factor.ln() + 1.0;
        let yarn = Yarn {
            factor: 4.0,
            original_positions: 32_768,
            attention_factor: magnitude(1.0, 4.0),
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
        };
        let cosines = [
            1.122_570_9,
            0.234_669_63,
            -0.465_783_42,
            1.098_671_8,
            1.138_064_6,
            1.138_624_9,
            1.138_629_3,
            1.138_629_4,
        ];
        let sines = [
            0.190_556_12,
            -1.114_184_5,
            1.039_000_9,
            0.298_993_65,
            0.035_860_896,
            0.003_189_057_8,
            0.000_567_104_26,
            0.000_100_847,
        ];
        assert_row(
            (1e6, RopeScaling::Yarn(yarn.clone())),
            (16, 131_072),
            &[0, 1, 7, 63],
            (&cosines, &sines),
        );

        let untruncated = Yarn {
            factor: 32.0,
            original_positions: 4096,
            attention_factor: magnitude(1.0, 32.0),
            beta_fast: 16.0,
            beta_slow: 2.0,
            truncate: false,
        };
        let cosines = [
            1.327_582_4,
            -0.086_346_39,
            -1.344_179_2,
            1.203_345_8,
            1.346_556_2,
            1.346_572_8,
            1.346_573_6,
            1.346_573_6,
        ];
        let sines = [
            0.225_356_77,
            1.343_802_3,
            -0.080_266_88,
            0.604_333_8,
            0.006_844_995_5,
            0.001_542_991_5,
            0.000_347_818_13,
            7.840_447e-5,
        ];
        assert_row(
            (1.5e5, RopeScaling::Yarn(untruncated)),
            (16, 131_072),
            &[0, 1, 7, 63],
            (&cosines, &sines),
        );

        let scaled = Yarn {
            factor: 40.0,
            original_positions: 4096,
            attention_factor: magnitude(1.0, 40.0) / magnitude(0.5, 40.0),
            ..yarn
        };
        let cosines = [
            1.139_422_4,
            0.552_055_4,
            1.155_558_6,
            0.074_110_24,
            1.096_002_6,
            1.154_065_8,
            1.155_720_6,
            1.155_721_9,
        ];
        let sines = [
            0.193_416_67,
            1.015_346_3,
            0.019_432_414,
            1.153_343_4,
            0.366_704_02,
            0.061_849_32,
            0.001_820_261_4,
            0.000_575_617_5,
        ];
        assert_row(
            (1e4, RopeScaling::Yarn(scaled)),
            (16, 163_840),
            &[0, 1, 7, 63],
            (&cosines, &sines),
        );
    }

    #[test]
    fn rows_follow_the_positions() {
        let rotary = Rotary::new(
            &RopeConfig {
                theta: 1e4,
                scaling: RopeScaling::None,
            },
            4,
            64,
        );
        let (cosines, sines) = rotary.table(&[3, 0, 3], 4);
        assert_eq!(
            (cosines.len(), &cosines[2..4], &sines[2..4]),
            (6, &[1.0, 1.0][..], &[0.0, 0.0][..])
        );
        assert_eq!(cosines[..2], cosines[4..]);
        assert!(rotary.table(&[], 0).0.is_empty());
    }

    #[test]
    fn known_rotations_are_those_of_the_table() -> Result<()> {
        let rope = RopeConfig {
            theta: 1e4,
            scaling: RopeScaling::Dynamic { factor: 2.0 },
        };
        let (rotary, known) = (Rotary::new(&rope, 4, 8), KnownRotations::default());
        let sequence = |range: Range<usize>, length| Positions { range, length };
        for sequences in [
            vec![sequence(0..3, 3), sequence(0..7, 7)],
            vec![sequence(0..3, 3), sequence(0..7, 7)],
            vec![sequence(0..7, 7), sequence(0..3, 3)],
            vec![sequence(5..8, 8)],
            vec![sequence(5..8, 20)],
            vec![sequence(5..8, 21)],
        ] {
            let (mut cosines, mut sines) = (Vec::new(), Vec::new());
            for Positions { range, length } in &sequences {
                let positions: Vec<u32> = range.clone().map(|at| at as u32).collect();
                let table = rotary.table(&positions, *length);
                cosines.extend(table.0);
                sines.extend(table.1);
            }
            let rows = cosines.len() / 2;
            let x = Tensor::arange(0f32, (rows * 4) as f32, &Device::Cpu)?.reshape((rows, 4))?;
            let found = rope_of(&x, &known.of(&rotary, &sequences)?)?;
            let expected = rope_of(&x, &RotaryTable::new(cosines, sines, 4)?)?;
            assert_eq!(found, expected, "{sequences:?}");
        }
        Ok(())
    }

    fn rope_of(x: &Tensor, table: &RotaryTable) -> Result<Vec<Vec<f32>>> {
        Ok(ops::rope(x, table)?.to_vec2()?)
    }
}
