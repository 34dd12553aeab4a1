//! The backward pass: one task per head and stretch of queries, its part of `dk` and `dv` added up afterwards.

use super::block::{BLOCK, Block, parts};
use super::{Inputs, SoftmaxRow, soft_cap};
use crate::ops::buffers;
use crate::ops::frozen_weight::with_scratch;
use crate::ops::gemm::{Destination, Matrix, MatrixMut, multiply};
use crate::ops::kernels::{self, dot_inline, exp};
use crate::ops::vectorised::vectorised;
use rayon::prelude::*;
use std::ops::Range;

/// Stretches of one segment, at most: each has a part of `dk` and `dv`, so their number bounds the memory of the parts
/// to a multiple of the keys.
const MOST_STRETCHES: usize = 8;
/// Queries of a stretch, at least: several blocks, so that there is little to add up.
const SHORTEST_STRETCH: usize = 8 * BLOCK;

/// Queries of one task, of the many of its segment.
fn stretch(queries: usize) -> usize {
    let longest = queries.div_ceil(MOST_STRETCHES);
    longest.next_multiple_of(BLOCK).max(SHORTEST_STRETCH)
}

struct Task<'a> {
    segment: usize,
    head: usize,
    /// Queries of the segment, counted from its first.
    queries: Range<usize>,
    dq: Option<MatrixMut<'a>>,
}

/// What one task adds to the gradients of its keys and values.
struct Part {
    segment: usize,
    key_head: usize,
    keys: Range<usize>,
    /// `(keys, head_dim)`
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// The gradients of `q`, `k` and `v` where they are tracked.
pub(super) fn run(
    inputs: &Inputs<'_>,
    rows: &[SoftmaxRow],
    dout: &[f32],
    tracked: [bool; 3],
) -> [Option<Vec<f32>>; 3] {
    let shape = inputs.shape;
    let features = shape.heads * shape.head_dim;
    let queries = inputs.q.len() / features;
    let [mut dq, mut dk, mut dv] = [
        (tracked[0], inputs.q),
        (tracked[1], inputs.k),
        (tracked[2], inputs.v),
    ]
    .map(|(tracked, values)| tracked.then(|| buffers::zeros(values.len())));
    let mut tasks = Vec::new();
    let mut dq_rest = dq.as_mut().map(|dq| MatrixMut::new(dq, queries, features));
    for (index, segment) in inputs.segments.iter().enumerate() {
        for queries in parts(segment.queries.len(), stretch(segment.queries.len())) {
            let mut dq_heads = Vec::new();
            if let Some(rest) = dq_rest {
                let (stretch, below) = rest.split_rows(queries.len());
                dq_heads = stretch.column_parts(shape.head_dim);
                dq_rest = Some(below);
            }
            let mut dq_heads = dq_heads.into_iter();
            for head in 0..shape.heads {
                let dq = dq_heads.next();
                tasks.push(Task {
                    segment: index,
                    head,
                    queries: queries.clone(),
                    dq,
                });
            }
        }
    }
    let pass = Pass {
        inputs,
        rows,
        dout,
        tracked,
    };
    let parts: Vec<Part> = tasks
        .into_par_iter()
        .map(|task| pass.run_task(task))
        .collect();
    for (gradient, of_part) in [
        (&mut dk, key_part as fn(&Part) -> &[f32]),
        (&mut dv, value_part),
    ] {
        if let Some(gradient) = gradient {
            add_parts(inputs, gradient, &parts, of_part);
        }
    }
    [dq, dk, dv]
}

fn key_part(part: &Part) -> &[f32] {
    &part.dk
}

fn value_part(part: &Part) -> &[f32] {
    &part.dv
}

/// Adds the parts to the rows and heads they belong to, in the order of the tasks.
fn add_parts(
    inputs: &Inputs<'_>,
    gradient: &mut [f32],
    parts: &[Part],
    of_part: fn(&Part) -> &[f32],
) {
    let shape = inputs.shape;
    let (head_dim, features) = (shape.head_dim, shape.key_value_heads * shape.head_dim);
    let mut rest = gradient;
    let mut taken = 0;
    let mut segments = Vec::new();
    for (index, segment) in inputs.segments.iter().enumerate() {
        let (_, from_start) = rest.split_at_mut((segment.keys.start - taken) * features);
        let (rows, below) = from_start.split_at_mut(segment.keys.len() * features);
        segments.push((index, rows));
        (rest, taken) = (below, segment.keys.end);
    }
    segments.into_par_iter().for_each(|(index, rows)| {
        let start = inputs.segments[index].keys.start;
        let first = parts.partition_point(|part| part.segment < index);
        for part in parts[first..]
            .iter()
            .take_while(|part| part.segment == index)
        {
            let columns = part.key_head * head_dim..(part.key_head + 1) * head_dim;
            let targets = rows
                .chunks_exact_mut(features)
                .skip(part.keys.start - start);
            for (target, values) in targets.zip(of_part(part).chunks_exact(head_dim)) {
                kernels::add_assign(&mut target[columns.clone()], values);
            }
        }
    });
}

struct Pass<'a> {
    inputs: &'a Inputs<'a>,
    rows: &'a [SoftmaxRow],
    dout: &'a [f32],
    tracked: [bool; 3],
}

impl Pass<'_> {
    fn run_task(&self, task: Task<'_>) -> Part {
        let shape = self.inputs.shape;
        let segment = &self.inputs.segments[task.segment];
        let stretch = Block::new(segment, task.queries.clone(), shape);
        let length = stretch.keys.len() * shape.head_dim;
        let mut part = Part {
            segment: task.segment,
            key_head: task.head / (shape.heads / shape.key_value_heads),
            keys: stretch.keys.clone(),
            dk: vec![0f32; if self.tracked[1] { length } else { 0 }],
            dv: vec![0f32; if self.tracked[2] { length } else { 0 }],
        };
        let mut dq_rest = task.dq;
        for queries in parts(task.queries.len(), BLOCK) {
            let mut dq = None;
            if let Some(rest) = dq_rest {
                let (block, below) = rest.split_rows(queries.len());
                (dq, dq_rest) = (Some(block), Some(below));
            }
            let queries = task.queries.start + queries.start..task.queries.start + queries.end;
            self.run_block(
                Block::new(segment, queries, shape),
                task.head,
                dq,
                &mut part,
            );
        }
        part
    }

    fn run_block(&self, block: Block, head: usize, dq: Option<MatrixMut<'_>>, part: &mut Part) {
        let shape = self.inputs.shape;
        let (head_dim, features) = (shape.head_dim, shape.heads * shape.head_dim);
        let (q, k, v) = self.inputs.head(head);
        let (q, k, v) = (
            q.rows(block.queries.clone()),
            k.rows(block.keys.clone()),
            v.rows(block.keys.clone()),
        );
        let columns = head * head_dim..(head + 1) * head_dim;
        let dout = Matrix::new(self.dout, self.dout.len() / features, features);
        let dout = dout.rows(block.queries.clone()).columns(columns.clone());
        let (queries, keys) = (block.queries.len(), block.keys.len());
        let rows = &self.rows[block.queries.start * shape.heads + head * queries..][..queries];
        // The last row is for the tanh of one query's scores, which its probabilities take the place of.
        with_scratch((2 * queries + 1) * keys, |scratch| {
            let (scores, rest) = scratch.split_at_mut(queries * keys);
            let (errors, tanhs) = rest.split_at_mut(queries * keys);
            multiply(
                MatrixMut::new(scores, queries, keys),
                Destination::Overwrite,
                q,
                k.transposed(),
            );
            multiply(
                MatrixMut::new(errors, queries, keys),
                Destination::Overwrite,
                dout,
                v.transposed(),
            );
            let pairs = scores
                .chunks_exact_mut(keys)
                .zip(errors.chunks_exact_mut(keys));
            for (query, ((scores, errors), row)) in pairs.zip(rows).enumerate() {
                let seen = block.seen(query, shape);
                let Some(cap) = shape.soft_cap else {
                    score_gradient(scores, errors, seen, shape.scale, *row);
                    continue;
                };
                let factor = shape.scale / cap;
                let tanhs = &mut tanhs[..seen.len()];
                soft_cap::forward(&mut scores[seen.clone()], factor);
                tanhs.copy_from_slice(&scores[seen.clone()]);
                score_gradient(scores, errors, seen.clone(), cap, *row);
                soft_cap::backward(&mut errors[seen], tanhs, factor);
            }
            let probabilities = Matrix::new(scores, queries, keys);
            let errors = Matrix::new(errors, queries, keys);
            let rows = block.keys.start - part.keys.start..block.keys.end - part.keys.start;
            let values = rows.start * head_dim..rows.end * head_dim;
            if self.tracked[2] {
                let dv = MatrixMut::new(&mut part.dv[values.clone()], keys, head_dim);
                multiply(dv, Destination::Add, probabilities.transposed(), dout);
            }
            if self.tracked[1] {
                let dk = MatrixMut::new(&mut part.dk[values], keys, head_dim);
                multiply(dk, Destination::Add, errors.transposed(), q);
            }
            if let Some(dq) = dq {
                multiply(dq, Destination::Overwrite, errors, k);
            }
        });
    }
}

vectorised! {
    /// Turns scores into probabilities and `dout vᵀ` into the gradient of the scores.
    fn score_gradient(
        scores: &mut [f32],
        errors: &mut [f32],
        seen: Range<usize>,
        scale: f32,
        row: SoftmaxRow,
    ) {
        for values in [&mut *scores, &mut *errors] {
            values[..seen.start].fill(0.0);
            values[seen.end..].fill(0.0);
        }
        let (scores, errors) = (&mut scores[seen.clone()], &mut errors[seen]);
        for score in scores.iter_mut() {
            *score = exp(*score * scale - row.maximum) * row.inverse_sum;
        }
        let along = dot_inline::<V>(scores, errors);
        for (probability, error) in scores.iter().zip(errors) {
            *error = probability * (*error - along) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_stay_few_however_long_the_segment() {
        for queries in [1, 512, 513, 4096, 4097, 16_384, 100_003] {
            let parts: Vec<_> = parts(queries, stretch(queries)).collect();
            assert!(parts.len() <= MOST_STRETCHES, "{queries}: {parts:?}");
            assert!(
                parts[..parts.len() - 1]
                    .iter()
                    .all(|part| part.end % BLOCK == 0)
            );
        }
    }
}
