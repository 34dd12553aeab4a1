//! How the queries of a segment are cut, and which keys each part sees.

use super::{AttentionShape, Segment, Visible};
use std::ops::Range;

/// Queries of a block: with 64 the scores of a few thousand keys stay in the second-level cache.
pub(super) const BLOCK: usize = 64;

/// Some queries of one segment that follow each other, and the keys that any of them sees.
#[derive(Clone)]
pub(super) struct Block {
    /// Rows of `q`.
    pub(super) queries: Range<usize>,
    /// Rows of `k` and `v`.
    pub(super) keys: Range<usize>,
    /// The row of `k` with the key of the first query.
    own_key: usize,
}

impl Block {
    /// The block of the given queries of a segment, at least one, counted from the segment's first.
    pub(super) fn new(segment: &Segment, queries: Range<usize>, shape: &AttentionShape) -> Self {
        let own_key = segment.keys.end - segment.queries.len() + queries.start;
        let last_key = own_key + queries.len() - 1;
        // The further on a query, the further on what it sees begins and ends.
        let first_seen = seen_keys(own_key, &segment.keys, shape).start;
        let end_seen = seen_keys(last_key, &segment.keys, shape).end;
        Self {
            keys: first_seen..end_seen,
            queries: segment.queries.start + queries.start..segment.queries.start + queries.end,
            own_key,
        }
    }

    /// The keys that the given query of the block sees, counted from the block's first key.
    pub(super) fn seen(&self, query: usize, shape: &AttentionShape) -> Range<usize> {
        let seen = seen_keys(self.own_key + query, &self.keys, shape);
        seen.start - self.keys.start..seen.end - self.keys.start
    }
}

/// Of the given keys those that the query with the key `own` sees.
fn seen_keys(own: usize, keys: &Range<usize>, shape: &AttentionShape) -> Range<usize> {
    let window = shape.window.unwrap_or(usize::MAX);
    let start = keys.start.max((own + 1).saturating_sub(window));
    let end = match shape.visible {
        Visible::Causal => own + 1,
        Visible::All => keys.end.min(own.saturating_add(window)),
    };
    start..end
}

/// The queries of a segment in parts of at most `size`, counted from its first.
pub(super) fn parts(queries: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..queries)
        .step_by(size)
        .map(move |start| start..(start + size).min(queries))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_block_has_the_keys_that_its_queries_see() {
        let segment = Segment {
            queries: 3..33,
            keys: 10..60,
        };
        for visible in [Visible::Causal, Visible::All] {
            for window in [None, Some(1), Some(4), Some(25), Some(100)] {
                let shape = AttentionShape {
                    heads: 1,
                    key_value_heads: 1,
                    head_dim: 1,
                    scale: 1.0,
                    visible,
                    window,
                    soft_cap: None,
                };
                for queries in [0..1, 0..30, 7..20, 29..30] {
                    let block = Block::new(&segment, queries.clone(), &shape);
                    assert_eq!(block.queries, 3 + queries.start..3 + queries.end);
                    let mut of_any = BTreeSet::new();
                    for (query, own) in (30 + queries.start..30 + queries.end).enumerate() {
                        let expected: Vec<usize> = segment
                            .keys
                            .clone()
                            .filter(|&key| visible == Visible::All || key <= own)
                            .filter(|key| window.is_none_or(|window| key.abs_diff(own) < window))
                            .collect();
                        let seen = block.seen(query, &shape);
                        let seen = block.keys.start + seen.start..block.keys.start + seen.end;
                        assert_eq!(seen.collect::<Vec<_>>(), expected);
                        of_any.extend(expected);
                    }
                    assert_eq!(block.keys.collect::<BTreeSet<_>>(), of_any);
                }
            }
        }
    }
}
