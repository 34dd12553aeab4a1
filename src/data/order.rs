//! The order in which training visits the examples.

use std::ops::Range;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

use crate::adapters::storage::read_text;
use crate::digest::hexadecimal;
use crate::{Context, Error, Result};

/// Which example stands at which position of a run.
///
/// A position counts examples from the start of the run, over all epochs, so a resumed run needs no more than the
/// position it had reached.
#[derive(Debug, Clone)]
pub struct Order {
    visits: Visits,
    /// The shuffled epoch that was asked for last.
    shuffled: Option<(u64, Vec<usize>)>,
}

#[derive(Debug, Clone)]
enum Visits {
    Shuffled { examples: usize, seed: u64 },
    Listed(Vec<usize>),
}

impl Order {
    /// Every epoch visits all examples once, in an order that depends on the seed and the epoch alone.
    pub fn shuffled(examples: usize, seed: u64) -> Self {
        Self {
            visits: Visits::Shuffled { examples, seed },
            shuffled: None,
        }
    }

    /// Every epoch visits the examples as they stand in the data.
    pub fn as_stored(examples: usize) -> Self {
        Self {
            visits: Visits::Listed((0..examples).collect()),
            shuffled: None,
        }
    }

    /// Every epoch visits the examples named in a file: one zero-based index a line, blank lines ignored.
    pub fn from_file(file: &Path, examples: usize) -> Result<Self> {
        let text = read_text(file).at(file.display())?;
        let mut listed = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim().trim_start_matches('\u{feff}');
            if line.is_empty() {
                continue;
            }
            let place = format!("{}:{}", file.display(), number + 1);
            let index: usize = line.parse().map_err(|_| {
                Error::new(format!("`{line}` is not an example's index"))
                    .at(&place)
                    .hint("write one whole number a line; the first example is 0")
            })?;
            if index >= examples {
                return Err(Error::new(format!(
                    "there is no example {index}: the data has {examples} examples"
                ))
                .at(&place)
                .hint("indices start at 0, and skipped records have none"));
            }
            listed.push(index);
        }
        if listed.is_empty() {
            return Err(Error::new("the order names no example").at(file.display()));
        }
        Ok(Self {
            visits: Visits::Listed(listed),
            shuffled: None,
        })
    }

    /// SHA-256 of the indices of an order that was given; a shuffled one follows from its seed.
    pub fn digest(&self) -> Option<String> {
        let Visits::Listed(listed) = &self.visits else {
            return None;
        };
        let mut hash = Sha256::new();
        for index in listed {
            hash.update((*index as u64).to_le_bytes());
        }
        Some(hexadecimal(&hash.finalize()))
    }

    /// How many examples an epoch visits.
    pub fn epoch_len(&self) -> usize {
        match &self.visits {
            Visits::Shuffled { examples, .. } => *examples,
            Visits::Listed(listed) => listed.len(),
        }
    }

    /// The examples at these positions of the run, which may lie in several epochs.
    pub fn examples(&mut self, positions: Range<u64>) -> Vec<usize> {
        let epoch_len = self.epoch_len() as u64;
        if epoch_len == 0 {
            return Vec::new();
        }
        positions
            .map(|position| self.epoch(position / epoch_len)[(position % epoch_len) as usize])
            .collect()
    }

    fn epoch(&mut self, epoch: u64) -> &[usize] {
        match &self.visits {
            Visits::Listed(listed) => listed,
            Visits::Shuffled { examples, seed } => {
                let current = self.shuffled.take().filter(|(known, _)| *known == epoch);
                let (_, order) = self.shuffled.insert(
                    current.unwrap_or_else(|| (epoch, permutation(*examples, *seed, epoch))),
                );
                order
            }
        }
    }
}

/// The numbers below `length`, shuffled as (seed, stream) say.
///
/// Written out rather than taken from `rand`, because a run resumed by a later version must see the same order.
pub(super) fn permutation(length: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&stream.to_le_bytes());
    let mut generator = ChaCha8Rng::from_seed(key);
    let mut order: Vec<usize> = (0..length).collect();
    for last in (1..length).rev() {
        order.swap(last, below(&mut generator, last as u64 + 1) as usize);
    }
    order
}

/// A uniform number below `bound` (Lemire 2019: multiply, and reject the few values that would be favoured).
fn below(generator: &mut ChaCha8Rng, bound: u64) -> u64 {
    loop {
        let product = u128::from(generator.next_u64()) * u128::from(bound);
        if product as u64 >= bound.wrapping_neg() % bound {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn listed(text: &str, examples: usize) -> Result<Order> {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(text.as_bytes()).expect("written");
        Order::from_file(file.path(), examples)
    }

    #[test]
    fn an_epoch_is_a_permutation_and_epochs_differ() {
        let mut order = Order::shuffled(100, 7);
        let first = order.examples(0..100);
        let second = order.examples(100..200);
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_ne!(first, second);
        assert_ne!(first, Order::shuffled(100, 8).examples(0..100));
    }

    #[test]
    fn a_resumed_run_needs_only_its_position() {
        let whole = Order::shuffled(5, 3).examples(0..23);
        assert_eq!(Order::shuffled(5, 3).examples(9..23), whole[9..]);
    }

    #[test]
    fn the_order_is_the_same_in_every_version() {
        assert_eq!(permutation(8, 42, 0), [4, 5, 0, 3, 6, 7, 1, 2]);
    }

    #[test]
    fn a_listed_order_repeats() {
        let mut order = listed("2\r\n\r\n0\n2\n", 3).expect("read");
        assert_eq!(order.epoch_len(), 3);
        assert_eq!(order.examples(1..5), [0, 2, 2, 0]);
    }

    #[test]
    fn a_listed_order_names_the_bad_line() {
        let error = listed("0\n7\n", 3).expect_err("out of range").to_string();
        assert!(
            error.ends_with(":2: there is no example 7: the data has 3 examples"),
            "{error}"
        );
        let error = listed("0\n-1\n", 3).expect_err("negative").to_string();
        assert!(error.contains(":2: `-1` is not"), "{error}");
        assert!(listed("\n", 3).is_err());
    }

    #[test]
    fn no_examples_have_no_order() {
        assert!(Order::shuffled(0, 1).examples(0..4).is_empty());
    }
}
