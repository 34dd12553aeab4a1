//! Dropout whose mask depends on what is dropped alone: not on how a step is cut into passes, nor on threads.

/// Dropout of the rows that go into a layer, in one optimizer step: a value is zero with some probability, and what stays
/// is scaled up so that the mean does not move (Srivastava et al. 2014).
///
/// Whether a value stays depends on the seed, the layer, the row's number in the step and the column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    stream: u64,
    threshold: u64,
    kept: f32,
    first_row: usize,
}

impl Dropout {
    /// Dropout with this probability, below 1, in the layer at `path`, for a pass whose first row is `first_row` of the
    /// step.
    pub fn new(probability: f64, seed: u64, path: &str, first_row: usize) -> Self {
        let mixed = |state: u64, byte: u8| mix(state ^ u64::from(byte));
        Self {
            stream: path.bytes().fold(seed, mixed),
            threshold: (probability * u64::MAX as f64) as u64,
            kept: (1.0 / (1.0 - probability)) as f32,
            first_row,
        }
    }

    /// Begins every number that decides whether a value stays: `mix(stream ^ index)` with the value's index in the step.
    pub fn stream(&self) -> u64 {
        self.stream
    }

    /// Values whose number is below this are dropped.
    pub fn threshold(&self) -> u64 {
        self.threshold
    }

    /// Factor of the values that stay.
    pub fn kept(&self) -> f32 {
        self.kept
    }

    /// Number in the step of the pass's first row.
    pub fn first_row(&self) -> usize {
        self.first_row
    }

    /// Multiplies row number `row` of the pass by its part of the mask.
    pub fn apply(&self, row: usize, values: &mut [f32]) {
        let first = ((self.first_row + row) * values.len()) as u64;
        for (index, value) in (first..).zip(values) {
            let drops = mix(self.stream ^ index) < self.threshold;
            *value = if drops { 0.0 } else { *value * self.kept };
        }
    }
}

/// The finaliser of SplitMix64: a bijection whose output bits all depend on all input bits.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
