//! The backward pass: one task per head and stretch of queries, its part of `dk` and `dv` added up afterwards.

use super::{BLOCK, Block, Inputs, SoftmaxRow, parts};
use crate::ops::buffers;
use crate::ops::frozen_weight::with_scratch;
use crate::ops::gemm::{Destination, Matrix, MatrixMut, multiply};
use crate::ops::kernels::{self, dot_inline, exp};
use crate::ops::vectorised::vectorised;
use rayon::prelude::*;
use std::ops::Range;

/// Queries of one task: several blocks, so that the parts of `dk` and `dv` to add up stay few.
const STRETCH: usize = 8 * BLOCK;

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
        for queries in parts(segment.queries.len(), STRETCH) {
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
        let stretch = Block::new(segment, task.queries.clone(), shape.window);
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
                Block::new(segment, queries, shape.window),
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
        with_scratch(2 * queries * keys, |scratch| {
            let (scores, errors) = scratch.split_at_mut(queries * keys);
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
                let seen = block.seen(query, shape.window);
                score_gradient(scores, errors, seen, shape.scale, *row);
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
