//! Weights in 4 bits: NF4, 4-bit NormalFloat, of QLoRA (Dettmers et al. 2023, section 3 and appendix E).
//!
//! 64 values in row order, a block, share the largest magnitude among them; each is stored as the nearest of sixteen
//! levels times it. The levels are quantiles of the normal distribution, zero among them. Codes and magnitudes are those of
//! bitsandbytes without its double quantisation; a weight takes 4.5 bits.

use super::vectorised::vectorised;
use crate::{Error, Result};
use rayon::prelude::*;

/// Values that share a magnitude.
pub(super) const BLOCK: usize = 64;
/// Codes in a word: the first is in its lowest bits.
pub(super) const WORD_CODES: usize = 8;
const BLOCK_WORDS: usize = BLOCK / WORD_CODES;
/// Blocks that one task quantises.
const TASK_BLOCKS: usize = 256;

/// What the codes stand for, in units of the block's magnitude.
pub(super) const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Between one level and the next: a value above it is nearer to the next.
const BOUNDS: [f32; 15] = {
    let mut bounds = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        bounds[i] = (LEVELS[i] + LEVELS[i + 1]) / 2.0;
        i += 1;
    }
    bounds
};

/// The two levels of each byte of codes.
const PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [LEVELS[byte & 15], LEVELS[byte >> 4]];
        byte += 1;
    }
    pairs
};

/// A magnitude below this counts as it: its inverse must be finite.
const SMALLEST: f32 = 1e-38;

/// Values in NF4.
pub(super) struct Nf4 {
    /// Eight in a word, whole blocks of them: what is beyond the values is zero.
    codes: Vec<u32>,
    /// The largest magnitude of each block.
    largest: Vec<f32>,
}

impl Nf4 {
    /// The nearest to `count` values, of which `widen` writes those from a place on in f32.
    ///
    /// An error if some of them are not finite: a level times infinity is no number.
    pub(super) fn quantize(count: usize, widen: impl Fn(usize, &mut [f32]) + Sync) -> Result<Self> {
        let blocks = count.div_ceil(BLOCK);
        let mut quantized = Self {
            codes: vec![0; blocks * BLOCK_WORDS],
            largest: vec![0.0; blocks],
        };
        let tasks = quantized
            .codes
            .par_chunks_mut(TASK_BLOCKS * BLOCK_WORDS)
            .zip(quantized.largest.par_chunks_mut(TASK_BLOCKS))
            .enumerate();
        let not_finite: usize = tasks
            .map(|(task, (codes, largest))| {
                let start = task * TASK_BLOCKS * BLOCK;
                let mut values = vec![0f32; largest.len() * BLOCK];
                let present = values.len().min(count - start);
                widen(start, &mut values[..present]);
                quantize(&values, codes, largest);
                values.iter().filter(|value| !value.is_finite()).count()
            })
            .sum();
        match not_finite {
            0 => Ok(quantized),
            _ => Err(Error::new(format!(
                "{not_finite} of the {count} values are not finite, and cannot be quantised"
            ))
            .hint("`retune inspect` names each damaged weight; take another copy of the base")),
        }
    }

    /// Writes the values from `start` on in f32.
    pub(super) fn widen(&self, start: usize, wide: &mut [f32]) {
        let before = (start.next_multiple_of(BLOCK) - start).min(wide.len());
        let (head, rest) = wide.split_at_mut(before);
        let (blocks, tail) = rest.split_at_mut(rest.len() / BLOCK * BLOCK);
        self.widen_part(start, head);
        let first = (start + before) / BLOCK;
        widen(
            &self.codes[first * BLOCK_WORDS..],
            &self.largest[first..],
            blocks,
        );
        self.widen_part(start + before + blocks.len(), tail);
    }

    /// [`Nf4::widen`] within a block.
    fn widen_part(&self, start: usize, wide: &mut [f32]) {
        if wide.is_empty() {
            return;
        }
        let block = start / BLOCK;
        let mut values = [0f32; BLOCK];
        widen(
            &self.codes[block * BLOCK_WORDS..],
            &self.largest[block..],
            &mut values,
        );
        wide.copy_from_slice(&values[start % BLOCK..][..wide.len()]);
    }

    /// The words of codes, for a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn codes(&self) -> &[u32] {
        &self.codes
    }

    /// The magnitudes of the blocks, for a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn largest(&self) -> &[f32] {
        &self.largest
    }
}

vectorised! {
    /// Quantises whole blocks.
    fn quantize(values: &[f32], codes: &mut [u32], largest: &mut [f32]) {
        let (blocks, words) = (values.as_chunks::<BLOCK>().0, codes.as_chunks_mut::<BLOCK_WORDS>().0);
        for ((values, words), largest) in blocks.iter().zip(words).zip(largest) {
            *largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            let inverse = 1.0 / largest.max(SMALLEST);
            let scaled = values.map(|value| value * inverse);
            let mut codes = [0u32; BLOCK];
            for bound in BOUNDS {
                for (code, value) in codes.iter_mut().zip(&scaled) {
                    *code += u32::from(*value > bound);
                }
            }
            for (word, codes) in words.iter_mut().zip(codes.as_chunks::<WORD_CODES>().0) {
                *word = (0..WORD_CODES).fold(0, |word, i| word | codes[i] << (4 * i));
            }
        }
    }

    /// Writes whole blocks in f32.
    fn widen(codes: &[u32], largest: &[f32], wide: &mut [f32]) {
        let words = codes.as_chunks::<BLOCK_WORDS>().0;
        for ((words, largest), wide) in words.iter().zip(largest).zip(wide.as_chunks_mut::<BLOCK>().0) {
            for (word, wide) in words.iter().zip(wide.as_chunks_mut::<WORD_CODES>().0) {
                for (byte, wide) in word.to_le_bytes().into_iter().zip(wide.as_chunks_mut::<2>().0) {
                    let [first, second] = PAIRS[usize::from(byte)];
                    *wide = [first * largest, second * largest];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantized(values: &[f32]) -> Result<Nf4> {
        Nf4::quantize(values.len(), |start, wide| {
            wide.copy_from_slice(&values[start..][..wide.len()]);
        })
    }

    fn all(nf4: &Nf4, count: usize) -> Vec<f32> {
        let mut wide = vec![f32::NAN; count];
        nf4.widen(0, &mut wide);
        wide
    }

    #[test]
    fn levels_come_back_as_they_were_and_others_as_the_nearest() -> Result<()> {
        // Each block has its own magnitude, and the last one is not whole.
        let values: Vec<f32> = (0..150)
            .map(|i| LEVELS[(i * 7 + 15) % 16] * [0.5, 2.0, 0.125][i / BLOCK])
            .collect();
        assert_eq!(all(&quantized(&values)?, 150), values);
        for i in -1000..=1000i16 {
            let value = f32::from(i) / 1000.0;
            let found = all(&quantized(&[1.0, value])?, 2)[1];
            let nearest = LEVELS
                .into_iter()
                .min_by(|a, b| (a - value).abs().total_cmp(&(b - value).abs()));
            assert_eq!(Some(found), nearest, "{value}");
        }
        Ok(())
    }

    #[test]
    fn zeros_and_the_smallest_numbers_are_kept() -> Result<()> {
        assert_eq!(all(&quantized(&[0.0; 70])?, 70), [0.0; 70]);
        let tiny = f32::from_bits(1);
        assert_eq!(all(&quantized(&[tiny, -tiny])?, 2), [0.0; 2]);
        let least = f32::MIN_POSITIVE;
        assert_eq!(all(&quantized(&[least, -least])?, 2), [least, -least]);
        Ok(())
    }

    #[test]
    fn a_part_is_that_part_of_the_whole() -> Result<()> {
        let count = 3 * BLOCK + 7;
        let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7).sin()).collect();
        let nf4 = quantized(&values)?;
        let whole = all(&nf4, count);
        for start in 0..count {
            for length in [0, 1, 5, 63, 64, 65, 130, count] {
                let mut part = vec![f32::NAN; length.min(count - start)];
                nf4.widen(start, &mut part);
                assert_eq!(part, whole[start..][..part.len()]);
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = vec![1.0; 40_000];
            values[39_999] = bad;
            let error = quantized(&values).err().expect("refused").to_string();
            assert_eq!(
                error,
                "1 of the 40000 values are not finite, and cannot be quantised"
            );
        }
    }
}
