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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const PATH: &str = "model.layers.0.mlp.up_proj";

    /// What the pass leaves of this many rows of ones.
    fn dropped(dropout: &Dropout, rows: usize) -> Vec<Vec<f32>> {
        let row = |row| {
            let mut values = vec![1.0; 256];
            dropout.apply(row, &mut values);
            values
        };
        (0..rows).map(row).collect()
    }

    #[test]
    fn the_asked_share_is_dropped_and_the_mean_does_not_move() {
        let rows = dropped(&Dropout::new(0.25, 7, PATH, 0), 64);
        let values: Vec<f32> = rows.concat();
        let share = values.iter().filter(|value| **value == 0.0).count() as f64 / 16_384.0;
        assert!((share - 0.25).abs() < 0.01, "{share}");
        let mean = f64::from(values.iter().sum::<f32>()) / 16_384.0;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert_eq!(
            dropped(&Dropout::new(0.0, 7, PATH, 0), 1),
            [vec![1.0; 256]],
            "without dropout"
        );
    }

    #[test]
    fn rows_layers_and_steps_have_masks_of_their_own() {
        let masks = [
            Dropout::new(0.25, 7, PATH, 0),
            Dropout::new(0.25, 8, PATH, 0),
            Dropout::new(0.25, 7, "model.layers.1.mlp.up_proj", 0),
        ]
        .into_iter()
        .flat_map(|dropout| dropped(&dropout, 64));
        let kept = |row: Vec<f32>| row.iter().map(|value| *value > 0.0).collect();
        let different: BTreeSet<Vec<bool>> = masks.map(kept).collect();
        assert_eq!(different.len(), 3 * 64);
    }

    #[test]
    fn a_mask_does_not_depend_on_how_a_step_is_cut_into_passes() {
        let whole = dropped(&Dropout::new(0.25, 7, PATH, 0), 8);
        let rest = dropped(&Dropout::new(0.25, 7, PATH, 5), 3);
        assert_eq!(whole[5..], rest);
    }

    #[test]
    fn what_is_dropped_can_be_told_from_the_numbers_alone() {
        let dropout = Dropout::new(0.25, 7, PATH, 5);
        for (row, values) in dropped(&dropout, 3).into_iter().enumerate() {
            let first = (dropout.first_row() + row) * values.len();
            for (index, value) in (first as u64..).zip(values) {
                let drops = mix(dropout.stream() ^ index) < dropout.threshold();
                assert_eq!(value, if drops { 0.0 } else { dropout.kept() });
            }
        }
    }

    /// The first numbers that SplitMix64 gives from the seed 0: its state grows by one constant from number to number.
    #[test]
    fn numbers_are_mixed_as_in_split_mix_64() {
        let states = (0..4).map(|count: u64| count.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        assert_eq!(
            states.map(mix).collect::<Vec<u64>>(),
            [
                0xE220_A839_7B1D_CDAF,
                0x6E78_9E6A_A1B9_65F4,
                0x06C4_5D18_8009_454F,
                0xF88B_B8A8_724C_81EC,
            ]
        );
    }
}
