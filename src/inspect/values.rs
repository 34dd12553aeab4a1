//! What the values of a tensor look like, read once.

use rayon::prelude::*;
use safetensors::tensor::Dtype;
use serde::Serialize;

/// Bytes that one task reads: a whole number of values of every type.
const TASK_BYTES: usize = 1 << 18;

/// Counts and sizes of the values of a tensor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Values {
    /// Number of values.
    pub count: u64,
    /// How many are not a number.
    pub nan: u64,
    /// How many are infinite.
    pub infinite: u64,
    /// How many are zero.
    pub zeros: u64,
    /// The largest magnitude of the finite ones.
    pub largest: f32,
    /// The quadratic mean of the finite ones.
    pub rms: f64,
}

impl Values {
    /// Whether all values are zero; an empty tensor has none that are not.
    pub fn all_zero(&self) -> bool {
        self.zeros == self.count
    }

    /// Whether some value is not finite.
    pub fn broken(&self) -> bool {
        self.nan + self.infinite > 0
    }

    /// The Euclidean norm of the finite values.
    pub fn norm(&self) -> f64 {
        self.rms * (self.finite() as f64).sqrt()
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let squares = self.norm().powi(2) + other.norm().powi(2);
        let both = Self {
            count: self.count + other.count,
            nan: self.nan + other.nan,
            infinite: self.infinite + other.infinite,
            zeros: self.zeros + other.zeros,
            largest: self.largest.max(other.largest),
            rms: 0.0,
        };
        Self {
            rms: (squares / both.finite().max(1) as f64).sqrt(),
            ..both
        }
    }

    fn finite(&self) -> u64 {
        self.count - self.nan - self.infinite
    }

    /// Reads the values of f32 numbers.
    pub fn of(values: &[f32]) -> Self {
        values
            .par_chunks(TASK_BYTES / 4)
            .map(|values| Sum::of(values.iter().copied()))
            .reduce(Sum::default, Sum::and)
            .values()
    }

    /// Reads the values of a stored tensor; `None` if they are not real numbers of a common type.
    pub(super) fn of_stored(bytes: &[u8], dtype: Dtype) -> Option<Self> {
        let read: fn(&[u8]) -> Sum = match dtype {
            Dtype::F32 => |bytes| {
                Sum::of(
                    bytes
                        .as_chunks()
                        .0
                        .iter()
                        .map(|four| f32::from_le_bytes(*four)),
                )
            },
            Dtype::F16 => |bytes| {
                Sum::of(
                    bytes
                        .as_chunks()
                        .0
                        .iter()
                        .map(|two| half::f16::from_le_bytes(*two).to_f32()),
                )
            },
            Dtype::BF16 => |bytes| {
                Sum::of(
                    bytes
                        .as_chunks()
                        .0
                        .iter()
                        .map(|two| half::bf16::from_le_bytes(*two).to_f32()),
                )
            },
            _ => return None,
        };
        let sum = bytes
            .par_chunks(TASK_BYTES)
            .map(read)
            .reduce(Sum::default, Sum::and);
        Some(sum.values())
    }
}

#[derive(Clone, Copy, Default)]
struct Sum {
    counted: Values,
    squares: f64,
}

impl Sum {
    fn of(values: impl Iterator<Item = f32>) -> Self {
        let mut sum = Self::default();
        let counted = &mut sum.counted;
        for value in values {
            counted.count += 1;
            if value.is_finite() {
                counted.zeros += u64::from(value == 0.0);
                counted.largest = counted.largest.max(value.abs());
                sum.squares += f64::from(value) * f64::from(value);
            } else if value.is_nan() {
                counted.nan += 1;
            } else {
                counted.infinite += 1;
            }
        }
        sum
    }

    fn and(self, other: Self) -> Self {
        Self {
            counted: self.counted.and(other.counted),
            squares: self.squares + other.squares,
        }
    }

    fn values(self) -> Values {
        let finite = self.counted.finite().max(1) as f64;
        Values {
            rms: (self.squares / finite).sqrt(),
            ..self.counted
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_in_every_type() {
        let numbers = [
            3.0f32,
            -4.0,
            0.0,
            -0.0,
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
        ];
        let wide: Vec<u8> = numbers
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let bf16 = |value: &f32| half::bf16::from_f32(*value).to_le_bytes();
        let f16 = |value: &f32| half::f16::from_f32(*value).to_le_bytes();
        let expected = Values {
            count: 7,
            nan: 1,
            infinite: 2,
            zeros: 2,
            largest: 4.0,
            rms: 2.5,
        };
        assert_eq!(Values::of(&numbers), expected);
        assert_eq!(Values::of_stored(&wide, Dtype::F32), Some(expected));
        let narrow: Vec<u8> = numbers.iter().flat_map(bf16).collect();
        assert_eq!(Values::of_stored(&narrow, Dtype::BF16), Some(expected));
        let narrow: Vec<u8> = numbers.iter().flat_map(f16).collect();
        assert_eq!(Values::of_stored(&narrow, Dtype::F16), Some(expected));
        assert_eq!(Values::of_stored(&narrow, Dtype::U16), None);
        assert!(expected.broken() && !expected.all_zero() && Values::of(&[0.0; 5]).all_zero());
    }

    #[test]
    fn two_parts_count_as_one_tensor() {
        let numbers: Vec<f32> = (0..200_000)
            .map(|index| (index % 77) as f32 - 38.0)
            .collect();
        let whole = Values::of(&numbers);
        let both = Values::of(&numbers[..70_001]).and(Values::of(&numbers[70_001..]));
        assert_eq!(
            (whole.count, whole.zeros, whole.largest),
            (both.count, both.zeros, both.largest)
        );
        assert!(
            (whole.rms - both.rms).abs() < 1e-9,
            "{} {}",
            whole.rms,
            both.rms
        );
        assert!((whole.norm() - whole.rms * 200_000f64.sqrt()).abs() < 1e-6);
    }
}
