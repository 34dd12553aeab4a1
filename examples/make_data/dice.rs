//! Random draws that give the same values on every platform.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What a stream of draws is for: streams of one seed never overlap.
#[derive(Clone, Copy)]
pub(crate) enum Stream {
    /// The text to pretrain on.
    Base = 1,
    /// Text of the same kind that is kept out of pretraining.
    Unrelated = 2,
    /// The support tickets.
    Domain = 3,
}

/// A seeded source of choices. Everything is drawn from whole 64-bit words by
/// integer arithmetic, so neither the platform nor a later version of `rand`
/// can change a byte of what is written.
pub(crate) struct Dice(ChaCha8Rng);

impl Dice {
    /// The draws of document `index` of a stream.
    pub(crate) fn new(seed: u64, stream: Stream, index: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&(stream as u64).to_le_bytes());
        bytes[16..24].copy_from_slice(&index.to_le_bytes());
        Self(ChaCha8Rng::from_seed(bytes))
    }

    /// A number in `0..n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "nothing to choose from");
        let wide = u128::from(self.0.next_u64()) * n as u128;
        (wide >> 64) as usize
    }

    /// A number in `low..=high`.
    pub(crate) fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// True in `percent` of a hundred draws.
    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of `items`.
    pub(crate) fn pick<'a, T: ?Sized>(&mut self, items: &'a [&'a T]) -> &'a T {
        items[self.below(items.len())]
    }

    /// A reference to one of `items`.
    pub(crate) fn choose<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// `count` different ones of `items`, in random order.
    pub(crate) fn sample<T: Clone>(&mut self, items: &[T], count: usize) -> Vec<T> {
        let mut order: Vec<usize> = (0..items.len()).collect();
        (0..count.min(items.len()))
            .map(|at| {
                let other = self.between(at, items.len() - 1);
                order.swap(at, other);
                items[order[at]].clone()
            })
            .collect()
    }

    /// Puts `items` into random order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }

    /// The index of one of `weights`, each as likely as its weight.
    pub(crate) fn weighted(&mut self, weights: &[usize]) -> usize {
        let mut left = self.below(weights.iter().sum());
        for (at, &weight) in weights.iter().enumerate() {
            if left < weight {
                return at;
            }
            left -= weight;
        }
        unreachable!("the draw lies below the sum of the weights")
    }
}
