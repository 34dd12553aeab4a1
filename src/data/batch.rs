//! Examples laid end to end: what one forward and backward pass works on.

use crate::data::Example;

/// The target of a row that carries no loss.
pub const IGNORE: u32 = u32::MAX;

/// A flat batch: there is no padding, so `total` below is the sum of the examples' lengths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// The examples' tokens, end to end: (total).
    pub tokens: Vec<u32>,
    /// Each token's place in its own example, from 0: (total).
    pub positions: Vec<u32>,
    /// Where each example starts, and at last the end: (examples + 1).
    pub segments: Vec<usize>,
    /// The token that each row must predict, or [`IGNORE`]: (total).
    pub targets: Vec<u32>,
    /// How many rows have a target: the divisor of the summed loss.
    pub target_tokens: usize,
}

impl Batch {
    /// The number of examples.
    pub fn len(&self) -> usize {
        self.segments.len().saturating_sub(1)
    }

    /// Whether there is no example in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Lays examples end to end.
///
/// This is the only place that shifts: row i predicts token i + 1 of the same example, if that token is learned. The
/// last row of an example predicts nothing.
pub fn collate(examples: &[&Example]) -> Batch {
    let total = examples.iter().map(|example| example.tokens.len()).sum();
    let mut batch = Batch {
        tokens: Vec::with_capacity(total),
        positions: Vec::with_capacity(total),
        segments: Vec::with_capacity(examples.len() + 1),
        targets: Vec::with_capacity(total),
        target_tokens: 0,
    };
    batch.segments.push(0);
    for example in examples {
        batch.tokens.extend_from_slice(&example.tokens);
        batch.positions.extend((0u32..).take(example.tokens.len()));
        let shifted = example.tokens.iter().zip(&example.learn).skip(1);
        batch
            .targets
            .extend(shifted.map(|(token, learn)| if *learn { *token } else { IGNORE }));
        batch.targets.resize(batch.tokens.len(), IGNORE);
        batch.target_tokens += example.target_tokens();
        batch.segments.push(batch.tokens.len());
    }
    batch
}

/// Cuts the examples of one optimizer step into passes of at most `tokens_per_pass` tokens, keeping their order.
///
/// An example longer than the budget is a pass of its own.
pub fn passes(examples: &[&Example], tokens_per_pass: usize) -> Vec<Batch> {
    let mut passes = Vec::new();
    let mut start = 0;
    let mut tokens = 0;
    for (index, example) in examples.iter().enumerate() {
        if index > start && tokens + example.tokens.len() > tokens_per_pass {
            passes.push(collate(&examples[start..index]));
            start = index;
            tokens = 0;
        }
        tokens += example.tokens.len();
    }
    if start < examples.len() {
        passes.push(collate(&examples[start..]));
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example(tokens: &[u32], learned: &[usize]) -> Example {
        let learn = (0..tokens.len())
            .map(|index| learned.contains(&index))
            .collect();
        Example::new(tokens.to_vec(), learn)
    }

    #[test]
    fn targets_are_the_next_learned_token_of_the_same_example() {
        let batch = collate(&[
            &example(&[10, 11, 12], &[1, 2]),
            &example(&[20, 21], &[1]),
            &example(&[30], &[]),
        ]);
        assert_eq!(batch.tokens, [10, 11, 12, 20, 21, 30]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0]);
        assert_eq!(batch.segments, [0, 3, 5, 6]);
        assert_eq!(batch.targets, [11, 12, IGNORE, 21, IGNORE, IGNORE]);
        assert_eq!(batch.target_tokens, 3);
        assert_eq!(batch.len(), 3);
    }

    #[test]
    fn a_first_token_is_never_a_target() {
        let batch = collate(&[&example(&[1], &[]), &example(&[2, 3], &[0, 1])]);
        assert_eq!(batch.targets, [IGNORE, 3, IGNORE]);
        assert_eq!(batch.target_tokens, 1);
    }

    #[test]
    fn nothing_collates_to_nothing() {
        let batch = collate(&[]);
        assert!(batch.is_empty());
        assert_eq!(batch.segments, [0]);
        assert!(passes(&[], 8).is_empty());
    }

    proptest! {
        #[test]
        fn passes_keep_order_budget_and_targets(lengths in prop::collection::vec(1usize..9, 0..20), budget in 0usize..20) {
            let examples: Vec<Example> = lengths
                .iter()
                .enumerate()
                .map(|(index, length)| Example::new(vec![index as u32; *length], vec![true; *length]))
                .collect();
            let references: Vec<&Example> = examples.iter().collect();
            let whole = collate(&references);
            let parts = passes(&references, budget);
            let tokens: Vec<u32> = parts.iter().flat_map(|batch| batch.tokens.clone()).collect();
            prop_assert_eq!(tokens, whole.tokens);
            prop_assert_eq!(parts.iter().map(|batch| batch.target_tokens).sum::<usize>(), whole.target_tokens);
            for batch in &parts {
                prop_assert!(batch.tokens.len() <= budget || batch.len() == 1);
                let counted = batch.targets.iter().filter(|target| **target != IGNORE).count();
                prop_assert_eq!(counted, batch.target_tokens);
            }
        }
    }
}
