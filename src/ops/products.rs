//! Products of flat activations with a frozen weight, block by block.

use super::bf16_products::{self, Packed, Rows, Side, Sided, round};
use super::compute_type::ComputeType;
use super::frozen_weight::{FrozenWeight, LowRankUpdate, Values};
use super::gemm::{Destination, Matrix, MatrixMut, NARROWEST_TILE, multiply_parallel};
use super::thin_matrix::ThinMatrix;
use super::{buffers, kernels};
use rayon::prelude::*;
use std::ops::Range;

/// Up to so many rows the weight is read once, in its stored type, and never widened: a token being generated.
pub(super) const FEW_ROWS: usize = 4;
/// From so many rows on, the bits of a row are the same whatever other rows share the product. Those of fewer rows are added
/// up in another order: here up to [`FEW_ROWS`], and in the gemm crate where neither side of a tile has more than 64, or the
/// tile no more than 256 values.
pub(crate) const MANY_ROWS: usize = 65;
/// Rows of the weight in one task of such a product.
const FEW_ROWS_TASK: usize = 64;

/// `y = x (W + update)ᵀ`, with `x` `(rows, w.columns())` and `y` `(rows, w.rows())`.
pub(super) fn forward(
    y: &mut [f32],
    x: &[f32],
    rows: usize,
    w: &FrozenWeight,
    update: Option<LowRankUpdate<'_>>,
) {
    let narrow = w.rows() < NARROWEST_TILE && w.compute() == ComputeType::F32;
    if (rows <= FEW_ROWS || narrow) && update.is_none() {
        return few_rows(y, x, rows, w);
    }
    let (outputs, inputs) = (w.rows(), w.columns());
    if w.compute() == ComputeType::Bf16 {
        let c = MatrixMut::new(y, rows, outputs);
        let thin = update.map(|update| Thin {
            hidden: hidden(x, rows, inputs, update.a),
            factor: Factor {
                values: update.b.iter().map(|value| update.scale * value).collect(),
                columns: update.rank,
            },
        });
        return bf16(
            c,
            Destination::Overwrite,
            x,
            inputs,
            w,
            Side::Transposed,
            thin,
        );
    }
    let x = Matrix::new(x, rows, inputs);
    w.for_each_block(update, |range, block| {
        let y = MatrixMut::new(y, rows, outputs).columns(range.clone());
        let block = Matrix::new(block, range.len(), inputs);
        multiply_parallel(y, Destination::Overwrite, x, block.transposed());
    });
}

/// `dx = dy (W + update)` or `dx += dy (W + update)`, with `dy` `(rows, w.rows())` and `dx` `(rows, w.columns())`.
pub(super) fn input_gradient(
    dx: &mut [f32],
    destination: Destination,
    dy: &[f32],
    rows: usize,
    w: &FrozenWeight,
    update: Option<LowRankUpdate<'_>>,
) {
    let (outputs, inputs) = (w.rows(), w.columns());
    if w.compute() == ComputeType::Bf16 {
        let c = MatrixMut::new(dx, rows, inputs);
        let thin = update.map(|update| {
            let b = ThinMatrix::from_columns(update.b, update.rank, outputs);
            Thin {
                hidden: hidden(dy, rows, outputs, &b),
                factor: Factor {
                    values: update.a.to_rows(update.scale),
                    columns: inputs,
                },
            }
        });
        return bf16(c, destination, dy, outputs, w, Side::Straight, thin);
    }
    let dy = Matrix::new(dy, rows, outputs);
    w.for_each_block(update, |range, block| {
        let destination = if range.start == 0 {
            destination
        } else {
            Destination::Add
        };
        let block = Matrix::new(block, range.len(), inputs);
        multiply_parallel(
            MatrixMut::new(dx, rows, inputs),
            destination,
            dy.columns(range),
            block,
        );
    });
}

/// The low-rank part of a product in bf16: one more term of its sum.
struct Thin {
    /// `(rows, rank)`
    hidden: Packed,
    factor: Factor,
}

/// A thin factor times the update's scale.
struct Factor {
    values: Vec<f32>,
    columns: usize,
}

impl Rows for Factor {
    fn bits<'a>(&'a self, row: usize, columns: Range<usize>, room: &'a mut [u16]) -> &'a [u16] {
        round(room, &self.values[row * self.columns..][columns]);
        room
    }
}

/// `c = x W` or `c += x W`, in bf16, with `W` on the given side and the low-rank part beside it.
fn bf16(
    c: MatrixMut<'_>,
    destination: Destination,
    x: &[f32],
    depth: usize,
    w: &FrozenWeight,
    side: Side,
    thin: Option<Thin>,
) {
    let x = Packed::new(x, c.row_count(), depth, depth);
    let w = Sided(w, side);
    match thin {
        Some(Thin { hidden, factor }) => {
            let factor = Sided(&factor, side);
            bf16_products::multiply(c, destination, &[(&x, &w), (&hidden, &factor)]);
            hidden.recycle();
        }
        None => bf16_products::multiply(c, destination, &[(&x, &w)]),
    }
    x.recycle();
}

/// Rows that one task multiplies with a thin factor.
const THIN_ROWS: usize = 16;

/// `x thinᵀ`, packed.
fn hidden(x: &[f32], rows: usize, width: usize, thin: &ThinMatrix) -> Packed {
    let padded = thin.padded_rank();
    let mut hidden = buffers::zeros(rows * padded);
    if width > 0 {
        hidden
            .par_chunks_mut(THIN_ROWS * padded)
            .zip(x.par_chunks(THIN_ROWS * width))
            .for_each(|(hidden, x)| {
                for (hidden, x) in hidden.chunks_exact_mut(padded).zip(x.chunks_exact(width)) {
                    thin.dot(x, hidden);
                }
            });
    }
    let packed = Packed::new(&hidden, rows, thin.rank(), padded);
    buffers::give(hidden);
    packed
}

/// Adds the bias to each row.
pub(super) fn add_bias(y: &mut [f32], bias: &[f32]) {
    if bias.is_empty() {
        return;
    }
    y.par_chunks_mut(bias.len())
        .with_min_len(16)
        .for_each(|y| kernels::add_assign(y, bias));
}

/// One dot product per row of the weight and row of `x`.
fn few_rows(y: &mut [f32], x: &[f32], rows: usize, w: &FrozenWeight) {
    let (outputs, inputs) = (w.rows(), w.columns());
    if rows == 0 || outputs == 0 || inputs == 0 {
        return y.fill(0.0);
    }
    // (outputs, rows): each task writes its own part
    let mut transposed = vec![0f32; outputs * rows];
    transposed
        .par_chunks_mut(FEW_ROWS_TASK * rows)
        .enumerate()
        .for_each(|(task, part)| {
            let mut wide = Vec::new();
            for (row, results) in (task * FEW_ROWS_TASK..).zip(part.chunks_exact_mut(rows)) {
                let range = row * inputs..(row + 1) * inputs;
                if let Values::F16(_) | Values::Nf4(_) = w.values() {
                    wide.resize(inputs, 0f32);
                    w.widen_values(range.start, &mut wide);
                }
                for (result, x) in results.iter_mut().zip(x.chunks_exact(inputs)) {
                    *result = match w.values() {
                        Values::F32(values) => kernels::dot(&values[range.clone()], x),
                        Values::BF16(values) => kernels::dot_bf16(&values[range.clone()], x),
                        Values::F16(_) | Values::Nf4(_) => kernels::dot(&wide, x),
                    };
                }
            }
        });
    for (row, y) in y.chunks_exact_mut(outputs).enumerate() {
        for (y, results) in y.iter_mut().zip(transposed.chunks_exact(rows)) {
            *y = results[row];
        }
    }
}
