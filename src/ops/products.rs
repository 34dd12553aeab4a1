//! Products of flat activations with a frozen weight, block by block.

use super::frozen_weight::{FrozenWeight, LowRankUpdate, Values};
use super::gemm::{Destination, Matrix, MatrixMut, multiply_parallel};
use super::kernels;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Up to so many rows the weight is read once, in its stored type, and never widened: a token being generated.
const FEW_ROWS: usize = 4;
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
    if rows <= FEW_ROWS && update.is_none() {
        return few_rows(y, x, rows, w);
    }
    let (outputs, inputs) = (w.rows(), w.columns());
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
            let mut wide = vec![
                0f32;
                if matches!(w.values(), Values::F16(_)) {
                    inputs
                } else {
                    0
                }
            ];
            for (row, results) in (task * FEW_ROWS_TASK..).zip(part.chunks_exact_mut(rows)) {
                let range = row * inputs..(row + 1) * inputs;
                for (result, x) in results.iter_mut().zip(x.chunks_exact(inputs)) {
                    *result = match w.values() {
                        Values::F32(values) => kernels::dot(&values[range.clone()], x),
                        Values::BF16(values) => kernels::dot_bf16(&values[range.clone()], x),
                        Values::F16(values) => {
                            values[range.clone()].convert_to_f32_slice(&mut wide);
                            kernels::dot(&wide, x)
                        }
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
