//! The forward pass: one task per block of queries and head.

use super::block::{BLOCK, Block, parts};
use super::{Inputs, SoftmaxRow, soft_cap};
use crate::ops::buffers;
use crate::ops::frozen_weight::with_scratch;
use crate::ops::gemm::{Destination, Matrix, MatrixMut, multiply};
use crate::ops::kernels::{exp_sum_inline, maximum_inline};
use crate::ops::vectorised::vectorised;
use rayon::prelude::*;
use std::ops::Range;

struct Task<'a> {
    block: Block,
    head: usize,
    out: MatrixMut<'a>,
    rows: &'a mut [SoftmaxRow],
}

/// The result, and the softmax of each query: those of a block lie together, head after head.
pub(super) fn run(inputs: &Inputs<'_>) -> (Vec<f32>, Vec<SoftmaxRow>) {
    let shape = inputs.shape;
    let features = shape.heads * shape.head_dim;
    let queries = inputs.q.len() / features;
    let mut out = buffers::take(inputs.q.len());
    let mut rows = vec![SoftmaxRow::default(); queries * shape.heads];
    let mut tasks = Vec::new();
    let mut out_rest = MatrixMut::new(&mut out, queries, features);
    let mut rows_rest = rows.as_mut_slice();
    for segment in inputs.segments {
        for queries in parts(segment.queries.len(), BLOCK) {
            let block = Block::new(segment, queries.clone(), shape);
            let (block_out, below) = out_rest.split_rows(queries.len());
            out_rest = below;
            for (head, out) in block_out
                .column_parts(shape.head_dim)
                .into_iter()
                .enumerate()
            {
                let (rows, rest) = rows_rest.split_at_mut(queries.len());
                rows_rest = rest;
                tasks.push(Task {
                    block: block.clone(),
                    head,
                    out,
                    rows,
                });
            }
        }
    }
    tasks
        .into_par_iter()
        .for_each(|task| run_task(inputs, task));
    (out, rows)
}

fn run_task(inputs: &Inputs<'_>, task: Task<'_>) {
    let Task {
        block,
        head,
        out,
        rows,
    } = task;
    let shape = inputs.shape;
    let (q, k, v) = inputs.head(head);
    let (queries, keys) = (block.queries.len(), block.keys.len());
    with_scratch(queries * keys, |scores| {
        let q = q.rows(block.queries.clone());
        multiply(
            MatrixMut::new(scores, queries, keys),
            Destination::Overwrite,
            q,
            k.rows(block.keys.clone()).transposed(),
        );
        for (query, (scores, row)) in scores.chunks_exact_mut(keys).zip(rows).enumerate() {
            let seen = block.seen(query, shape);
            let scale = match shape.soft_cap {
                Some(cap) => {
                    soft_cap::forward(&mut scores[seen.clone()], shape.scale / cap);
                    cap
                }
                None => shape.scale,
            };
            *row = softmax(scores, seen, scale);
        }
        multiply(
            out,
            Destination::Overwrite,
            Matrix::new(scores, queries, keys),
            v.rows(block.keys.clone()),
        );
    });
}

impl<'a> Inputs<'a> {
    /// `q` of a head and `k` and `v` of the head that serves it, all rows.
    pub(super) fn head(&self, head: usize) -> (Matrix<'a>, Matrix<'a>, Matrix<'a>) {
        let shape = self.shape;
        let key_head = head / (shape.heads / shape.key_value_heads);
        let query_columns = head * shape.head_dim..(head + 1) * shape.head_dim;
        let key_columns = key_head * shape.head_dim..(key_head + 1) * shape.head_dim;
        let features = shape.heads * shape.head_dim;
        let key_features = shape.key_value_heads * shape.head_dim;
        let keys = |values: &'a [f32]| {
            Matrix::new(values, values.len() / key_features, key_features)
                .columns(key_columns.clone())
        };
        let q = Matrix::new(self.q, self.q.len() / features, features).columns(query_columns);
        (q, keys(self.k), keys(self.v))
    }
}

vectorised! {
    /// Turns the scores that are seen into probabilities and the others into zeros.
    fn softmax(scores: &mut [f32], seen: Range<usize>, scale: f32) -> SoftmaxRow {
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
        let scores = &mut scores[seen];
        // A negative scale would turn the order round; scaling first costs one more pass, and nobody has one.
        let maximum = maximum_inline::<V>(scores) * scale;
        let sum = exp_sum_inline::<V>(scores, scale, maximum);
        let inverse_sum = (1.0 / sum) as f32;
        for score in scores {
            *score *= inverse_sum;
        }
        SoftmaxRow { maximum, inverse_sum }
    }
}
