//! `x Wᵀ + b + scale · (x Aᵀ) Bᵀ` as one operation: a frozen layer with a low-rank update.

use super::clock::{Kind, timed};
use super::compute_type::ComputeType;
#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::{Floats, expect_shape, matrix_shape};
use super::frozen_weight::{FrozenWeight, LowRankUpdate};
use super::gemm::Destination;
use super::graph::{Backward, record};
use super::linear::{check_bias, check_input, contiguous_bias};
use super::thin_matrix::ThinMatrix;
use super::{buffers, kernels, products};
use crate::adapters::hooks::{Dropout, LowRank};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// `y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ`, the weight frozen.
///
/// `x` is `(rows, inputs)`, `w` `(outputs, inputs)`, `a` `(rank, inputs)`, `b` `(outputs, rank)`; the result is
/// `(rows, outputs)`. With many rows `scale · B A` is added to the weight while it is widened, block by block, and the
/// whole is one product; with few the two thin products are made. With `h = x Aᵀ` and `e = dy B`:
///
/// ```text
/// dx = dy W + scale · e A      dA = scale · eᵀ x      dB = scale · dyᵀ h
/// ```
///
/// Nothing is saved but the arguments; `h` is made again in the backward, in the same pass over `x` and `dy` as the
/// gradients of the factors.
pub fn low_rank_linear(
    x: &Tensor,
    w: &FrozenWeight,
    bias: Option<&Tensor>,
    update: &LowRank<'_>,
) -> Result<Tensor> {
    let LowRank {
        a,
        b,
        scale,
        dropout,
    } = *update;
    if let Some(bias) = bias.filter(|bias| bias.track_op()) {
        check_bias(NAME, bias, w.rows())?;
        let y = low_rank_linear(x, w, None, update)?;
        return Ok(y.broadcast_add(&bias.to_dtype(y.dtype())?)?);
    }
    let rows = check_input(NAME, x, w.rows(), w.columns())?;
    let (rank, _) = matrix_shape(NAME, "A", a)?;
    if rank == 0 {
        return Err(Error::new(format!(
            "`{NAME}` needs a rank of at least 1: A has no rows"
        )));
    }
    expect_shape(
        NAME,
        "A",
        a,
        &[rank, w.columns()],
        "its columns are those of the weight",
    )?;
    expect_shape(
        NAME,
        "B",
        b,
        &[w.rows(), rank],
        "its rows are those of the weight, its columns the rows of A",
    )?;
    let (x, a, b) = (&x.contiguous()?, &a.contiguous()?, &b.contiguous()?);
    let bias = contiguous_bias(NAME, bias, w.rows())?;
    let layer = LowRankLinear {
        w: w.clone(),
        scale: scale as f32,
        dropout,
    };
    #[cfg(feature = "cuda")]
    if cuda::takes(x, w) {
        let update = LowRank { a, b, ..*update };
        let y = cuda::low_rank_linear(x, w, bias.as_ref(), &update)?;
        return record([x, a, b], y, (rows, w.rows()), layer);
    }
    let mut y = buffers::take(rows * w.rows());
    layer.forward(
        &mut y,
        &Floats::of(NAME, "x", x)?,
        rows,
        &Floats::of(NAME, "A", a)?,
        &Floats::of(NAME, "B", b)?,
    );
    if let Some(bias) = &bias {
        products::add_bias(&mut y, &Floats::of(NAME, "the bias", bias)?);
    }
    record([x, a, b], y, (rows, w.rows()), layer)
}

const NAME: &str = "low-rank linear";

struct LowRankLinear {
    w: FrozenWeight,
    scale: f32,
    dropout: Option<Dropout>,
}

impl LowRankLinear {
    /// Whether base and update are one product: added to the weight, where that costs less than two thin products per
    /// row, or in bf16, which would round it away there, as one more term.
    fn joins(&self, rows: usize) -> bool {
        // What is dropped for the update alone keeps the two products apart.
        self.dropout.is_none()
            && match self.w.compute() {
                ComputeType::F32 => {
                    rows * (self.w.rows() + self.w.columns()) >= self.w.rows() * self.w.columns()
                }
                ComputeType::Bf16 => rows > products::FEW_ROWS,
            }
    }

    /// `y = x (W + scale · B A)ᵀ`.
    fn forward(&self, y: &mut [f32], x: &[f32], rows: usize, a: &[f32], b: &[f32]) {
        let (outputs, inputs) = (self.w.rows(), self.w.columns());
        let rank = a.len() / inputs.max(1);
        let thin_a = ThinMatrix::from_rows(a, rank, inputs);
        if self.joins(rows) {
            return products::forward(y, x, rows, &self.w, Some(self.update(&thin_a, b, rank)));
        }
        products::forward(y, x, rows, &self.w, None);
        let dropped = self.dropped(x);
        add_thin(
            y,
            outputs,
            dropped.as_deref().unwrap_or(x),
            inputs,
            &thin_a,
            &ThinMatrix::from_columns(b, rank, outputs),
            self.scale,
        );
        if let Some(dropped) = dropped {
            buffers::give(dropped);
        }
    }

    /// `dx = dy (W + scale · B A)`, or added to what is there.
    fn input_gradient(
        &self,
        dx: &mut [f32],
        destination: Destination,
        dy: &[f32],
        a: &[f32],
        b: &[f32],
    ) {
        let rows = dy.len() / self.w.rows().max(1);
        let (outputs, inputs) = (self.w.rows(), self.w.columns());
        let rank = a.len() / inputs.max(1);
        let thin_a = ThinMatrix::from_rows(a, rank, inputs);
        if self.joins(rows) {
            return products::input_gradient(
                dx,
                destination,
                dy,
                rows,
                &self.w,
                Some(self.update(&thin_a, b, rank)),
            );
        }
        products::input_gradient(dx, destination, dy, rows, &self.w, None);
        let thin_b = ThinMatrix::from_columns(b, rank, outputs);
        if self.dropout.is_none() {
            return add_thin(dx, inputs, dy, outputs, &thin_b, &thin_a, self.scale);
        }
        let mut update = buffers::zeros(dx.len());
        add_thin(
            &mut update,
            inputs,
            dy,
            outputs,
            &thin_b,
            &thin_a,
            self.scale,
        );
        self.drop_rows(&mut update);
        dx.par_chunks_mut(THIN_ROWS * inputs.max(1))
            .zip(update.par_chunks(THIN_ROWS * inputs.max(1)))
            .for_each(|(dx, update)| kernels::add_assign(dx, update));
        buffers::give(update);
    }

    /// The update's input, where something of it is dropped.
    fn dropped(&self, x: &[f32]) -> Option<Vec<f32>> {
        self.dropout?;
        let mut dropped = buffers::take(x.len());
        dropped.copy_from_slice(x);
        self.drop_rows(&mut dropped);
        Some(dropped)
    }

    fn drop_rows(&self, rows: &mut [f32]) {
        let Some(dropout) = self.dropout else { return };
        rows.par_chunks_mut(self.w.columns().max(1))
            .with_min_len(THIN_ROWS)
            .enumerate()
            .for_each(|(row, values)| dropout.apply(row, values));
    }

    fn update<'a>(&self, a: &'a ThinMatrix, b: &'a [f32], rank: usize) -> LowRankUpdate<'a> {
        LowRankUpdate {
            a,
            b,
            rank,
            scale: self.scale,
        }
    }
}

/// Rows that one task multiplies.
const THIN_ROWS: usize = 16;

/// `y += scale · (x innerᵀ) outer`, row by row.
fn add_thin(
    y: &mut [f32],
    outputs: usize,
    x: &[f32],
    inputs: usize,
    inner: &ThinMatrix,
    outer: &ThinMatrix,
    scale: f32,
) {
    if inputs == 0 || outputs == 0 {
        return;
    }
    y.par_chunks_mut(THIN_ROWS * outputs)
        .zip(x.par_chunks(THIN_ROWS * inputs))
        .for_each(|(y, x)| {
            let mut hidden = vec![0f32; inner.padded_rank()];
            for (y, x) in y.chunks_exact_mut(outputs).zip(x.chunks_exact(inputs)) {
                inner.dot(x, &mut hidden);
                kernels::scale(&mut hidden, scale);
                outer.add_to(y, &hidden);
            }
        });
}

impl Backward<3> for LowRankLinear {
    const NAME: &'static str = NAME;

    fn gradients(
        &self,
        [x, a, b]: [&Tensor; 3],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        #[cfg(feature = "cuda")]
        if cuda::takes(x, &self.w) {
            let update = LowRank {
                a,
                b,
                scale: f64::from(self.scale),
                dropout: self.dropout,
            };
            let dy = gradient.contiguous()?;
            let backward = cuda::LowRankBackward::of(x, &dy, &update)?;
            let dx = match x.track_op() {
                true => Some(backward.input_gradient(&self.w, None)?),
                false => None,
            };
            if !(a.track_op() || b.track_op()) {
                return Ok([dx, None, None]);
            }
            let (da, db) = backward.factor_gradients()?;
            return Ok([dx, a.track_op().then_some(da), b.track_op().then_some(db)]);
        }
        let dx = match x.track_op() {
            true => Some(self.dx(gradient, a, b, None)?),
            false => None,
        };
        if !(a.track_op() || b.track_op()) {
            return Ok([dx, None, None]);
        }
        let (da, db) = self.factors(x, gradient, a, b)?;
        Ok([dx, a.track_op().then_some(da), b.track_op().then_some(db)])
    }
}

impl LowRankLinear {
    fn dx(&self, dy: &Tensor, a: &Tensor, b: &Tensor, onto: Option<Tensor>) -> Result<Tensor> {
        let rows = check_input(NAME, dy, self.w.columns(), self.w.rows())?;
        let inputs = self.w.columns();
        let dy = dy.contiguous()?;
        let (mut dx, destination) = buffers::sum(onto, rows * inputs)?;
        self.input_gradient(
            &mut dx,
            destination,
            &Floats::of(NAME, "the gradient", &dy)?,
            &Floats::of(NAME, "A", a)?,
            &Floats::of(NAME, "B", b)?,
        );
        Ok(Tensor::from_vec(dx, (rows, inputs), &Device::Cpu)?)
    }

    fn factors(&self, x: &Tensor, dy: &Tensor, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        let (outputs, rank) = b.dims2()?;
        let inputs = self.w.columns();
        let (x, dy) = (x.contiguous()?, dy.contiguous()?);
        let thin_a = ThinMatrix::from_rows(&Floats::of(NAME, "A", a)?, rank, inputs);
        let thin_b = ThinMatrix::from_columns(&Floats::of(NAME, "B", b)?, rank, outputs);
        let x = Floats::of(NAME, "x", &x)?;
        let dropped = self.dropped(&x);
        let (da, db) = factor_gradients(
            dropped.as_deref().unwrap_or(&x),
            &Floats::of(NAME, "the gradient", &dy)?,
            &thin_a,
            &thin_b,
            inputs,
            outputs,
        );
        if let Some(dropped) = dropped {
            buffers::give(dropped);
        }
        let da = Tensor::from_vec(da.to_rows(self.scale), (rank, inputs), &Device::Cpu)?;
        let db = Tensor::from_vec(db.to_columns(self.scale), (outputs, rank), &Device::Cpu)?;
        Ok((da, db))
    }
}

/// The gradients of [`low_rank_linear`] but the bias's: `dx`, if it is wanted, added to `onto` where there is one, then
/// `dA` and `dB`.
pub(crate) fn low_rank_linear_gradients(
    x: &Tensor,
    dy: &Tensor,
    w: &FrozenWeight,
    update: LowRank<'_>,
    wants_input: bool,
    onto: Option<Tensor>,
) -> Result<(Option<Tensor>, Tensor, Tensor)> {
    let layer = LowRankLinear {
        w: w.clone(),
        scale: update.scale as f32,
        dropout: update.dropout,
    };
    let (a, b) = (update.a.contiguous()?, update.b.contiguous()?);
    #[cfg(feature = "cuda")]
    if cuda::takes(x, w) {
        check_input(NAME, dy, w.columns(), w.rows())?;
        let update = LowRank {
            a: &a,
            b: &b,
            ..update
        };
        let (x, dy) = (x.contiguous()?, dy.contiguous()?);
        let (backward, (da, db)) = timed(Kind::WeightGradients, || -> Result<_> {
            let backward = cuda::LowRankBackward::of(&x, &dy, &update)?;
            let factors = backward.factor_gradients()?;
            Ok((backward, factors))
        })?;
        let dx = match wants_input {
            true => Some(timed(Kind::Linear, || backward.input_gradient(w, onto))?),
            false => onto,
        };
        return Ok((dx, da, db));
    }
    let (da, db) = timed(Kind::WeightGradients, || layer.factors(x, dy, &a, &b))?;
    let dx = match wants_input {
        true => Some(timed(Kind::Linear, || layer.dx(dy, &a, &b, onto))?),
        false => onto,
    };
    Ok((dx, da, db))
}

/// Rows that one task passes over.
const TASK_ROWS: usize = 192;
/// Rows that stay in the cache between the products in which they take part.
const BLOCK_ROWS: usize = 48;

/// `dA = (dy B)ᵀ x` and `dBᵀ = (x Aᵀ)ᵀ dy`, with `b` transposed, in one pass over `x` and `dy`.
fn factor_gradients(
    x: &[f32],
    dy: &[f32],
    a: &ThinMatrix,
    b: &ThinMatrix,
    inputs: usize,
    outputs: usize,
) -> (ThinMatrix, ThinMatrix) {
    let (mut da, mut db) = (a.zeros_like(), b.zeros_like());
    if inputs == 0 || outputs == 0 {
        return (da, db);
    }
    let rank = a.padded_rank();
    let partial: Vec<(ThinMatrix, ThinMatrix)> = x
        .par_chunks(TASK_ROWS * inputs)
        .zip(dy.par_chunks(TASK_ROWS * outputs))
        .map(|(x, dy)| {
            let (mut da, mut db) = (a.zeros_like(), b.zeros_like());
            let (mut hidden, mut error) =
                (vec![0f32; BLOCK_ROWS * rank], vec![0f32; BLOCK_ROWS * rank]);
            let blocks = x
                .chunks(BLOCK_ROWS * inputs)
                .zip(dy.chunks(BLOCK_ROWS * outputs));
            for (x, dy) in blocks {
                for (x, hidden) in x.chunks_exact(inputs).zip(hidden.chunks_exact_mut(rank)) {
                    a.dot(x, hidden);
                }
                for (dy, error) in dy.chunks_exact(outputs).zip(error.chunks_exact_mut(rank)) {
                    b.dot(dy, error);
                }
                da.add_outer(&error, x);
                db.add_outer(&hidden, dy);
            }
            (da, db)
        })
        .collect();
    for (da_part, db_part) in &partial {
        da.add(da_part);
        db.add(db_part);
    }
    (da, db)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, frozen_weights, random, variable};

    fn update<'a>(a: &'a Tensor, b: &'a Tensor, scale: f64) -> LowRank<'a> {
        LowRank {
            a,
            b,
            scale,
            dropout: None,
        }
    }

    #[test]
    fn equals_its_composition() -> Result<()> {
        // the last three have so many rows that the update is merged
        for (rows, inputs, outputs, rank) in [
            (1, 1, 1, 1),
            (1, 7, 65, 3),
            (5, 65, 33, 8),
            (60, 257, 130, 4),
            (9, 3, 5, 2),
            (401, 50, 97, 8),
            (200, 67, 131, 17),
        ] {
            let arguments = [
                variable(1, &[rows, inputs]),
                variable(2, &[rank, inputs]),
                variable(3, &[outputs, rank]),
            ];
            let bias = random(4, &[outputs]);
            let dropout = Dropout::new(0.3, 5, "a.layer", 11);
            let mut mask = vec![1f32; rows * inputs];
            for (row, mask) in mask.chunks_exact_mut(inputs).enumerate() {
                dropout.apply(row, mask);
            }
            let mask = Tensor::from_vec(mask, (rows, inputs), &Device::Cpu)?;
            for (w, dropout) in frozen_weights(5, outputs, inputs)
                .into_iter()
                .flat_map(|w| [(w.clone(), None), (w, Some(dropout))])
            {
                let dense = w.to_f32()?;
                let slow = |t: &[Tensor]| -> Result<Tensor> {
                    let input = match dropout {
                        Some(_) => (&t[0] * &mask)?,
                        None => t[0].clone(),
                    };
                    let update = input.matmul(&t[1].t()?)?.matmul(&t[2].t()?)?;
                    Ok((t[0].matmul(&dense.t()?)? + (update * 0.7)?)?.broadcast_add(&bias)?)
                };
                let fast = |t: &[Tensor]| {
                    let update = LowRank {
                        dropout,
                        ..update(&t[1], &t[2], 0.7)
                    };
                    low_rank_linear(&t[0], &w, Some(&bias), &update)
                };
                check(&arguments, &fast, &slow, 2e-5);
            }
        }
        Ok(())
    }

    #[test]
    fn a_trained_bias_has_a_gradient() -> Result<()> {
        let w = &frozen_weights(2, 5, 3)[2];
        let dense = w.to_f32()?;
        let arguments = [
            variable(1, &[7, 3]),
            variable(2, &[2, 3]),
            variable(3, &[5, 2]),
            variable(4, &[5]),
        ];
        let slow = |t: &[Tensor]| -> Result<Tensor> {
            let merged = (&dense + t[2].matmul(&t[1])?)?;
            Ok(t[0].matmul(&merged.t()?)?.broadcast_add(&t[3])?)
        };
        check(
            &arguments,
            &|t| low_rank_linear(&t[0], w, Some(&t[3]), &update(&t[1], &t[2], 1.0)),
            &slow,
            1e-5,
        );
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_agree_are_an_error() {
        let w = &frozen_weights(2, 4, 3)[0];
        let message = |a: &[usize], b: &[usize]| {
            let result = low_rank_linear(
                &random(1, &[2, 3]),
                w,
                None,
                &update(&random(1, a), &random(1, b), 1.0),
            );
            result.expect_err("refused").to_string()
        };
        assert_eq!(
            message(&[2, 4], &[4, 2]),
            "`low-rank linear` needs A of shape [2, 3] (its columns are those of the weight), its shape is [2, 4]"
        );
        assert_eq!(
            message(&[2, 3], &[4, 3]),
            "`low-rank linear` needs B of shape [4, 2] (its rows are those of the weight, its columns the rows of A), its shape is [4, 3]"
        );
    }
}
