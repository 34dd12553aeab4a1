//! `x Wᵀ + b` with a frozen or a trained weight.

#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::{Floats, expect_shape, matrix_shape};
use super::frozen_weight::FrozenWeight;
use super::gemm::{Destination, Matrix, MatrixMut, multiply_parallel};
use super::graph::{Backward, record};
use super::rows::sum_tasks;
use super::{buffers, kernels, products};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

const FROZEN: &str = "linear";
const TRAINED: &str = "trained linear";

/// `y = x Wᵀ + b` with a frozen weight.
///
/// `x` is `(rows, w.columns())`, the result `(rows, w.rows())`. The gradient of `x` is `dy W`; nothing is saved for it.
/// A tracked bias gets its gradient too.
pub fn linear(x: &Tensor, w: &FrozenWeight, bias: Option<&Tensor>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::takes(x, w) {
        return linear_on_cuda(x, w, bias);
    }
    if let Some(bias) = bias.filter(|bias| bias.track_op()) {
        check_bias(FROZEN, bias, w.rows())?;
        return Ok(linear(x, w, None)?.broadcast_add(bias)?);
    }
    let rows = check_input(FROZEN, x, w.rows(), w.columns())?;
    let x = &x.contiguous()?;
    let bias = contiguous_bias(FROZEN, bias, w.rows())?;
    let mut y = buffers::take(rows * w.rows());
    products::forward(&mut y, &Floats::of(FROZEN, "x", x)?, rows, w, None);
    if let Some(bias) = &bias {
        products::add_bias(&mut y, &Floats::of(FROZEN, "the bias", bias)?);
    }
    record([x], y, (rows, w.rows()), FrozenLinear { w: w.clone() })
}

/// As [`linear`], `x` in the type of the weight.
#[cfg(feature = "cuda")]
fn linear_on_cuda(x: &Tensor, w: &FrozenWeight, bias: Option<&Tensor>) -> Result<Tensor> {
    let shape = (check_input(FROZEN, x, w.rows(), w.columns())?, w.rows());
    let x = &x.contiguous()?;
    let bias = contiguous_bias(FROZEN, bias, w.rows())?;
    let y = cuda::linear(x, w, bias.as_ref())?;
    let backward = FrozenLinear { w: w.clone() };
    match bias.filter(|bias| bias.track_op()) {
        Some(bias) => record([x, &bias], y, shape, backward),
        None => record([x], y, shape, backward),
    }
}

struct FrozenLinear {
    w: FrozenWeight,
}

#[cfg(feature = "cuda")]
impl Backward<2> for FrozenLinear {
    const NAME: &'static str = FROZEN;

    fn gradients(
        &self,
        [x, bias]: [&Tensor; 2],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let dx = match x.track_op() {
            true => Some(linear_input_gradient(gradient, &self.w, None)?),
            false => None,
        };
        let db = match bias.track_op() {
            true => Some(bias_gradient(gradient)?),
            false => None,
        };
        Ok([dx, db])
    }
}

impl Backward<1> for FrozenLinear {
    const NAME: &'static str = FROZEN;

    fn gradients(
        &self,
        [x]: [&Tensor; 1],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        debug_assert!(x.track_op());
        Ok([Some(linear_input_gradient(gradient, &self.w, None)?)])
    }
}

/// The gradient of a frozen layer's input, `dy W`, added to `onto` where there is one.
///
/// `dy` is `(rows, w.rows())`, the result `(rows, w.columns())`. The memory of `onto` is the result's.
pub(crate) fn linear_input_gradient(
    dy: &Tensor,
    w: &FrozenWeight,
    onto: Option<Tensor>,
) -> Result<Tensor> {
    let rows = check_input(FROZEN, dy, w.columns(), w.rows())?;
    let dy = dy.contiguous()?;
    #[cfg(feature = "cuda")]
    if cuda::takes(&dy, w) {
        return cuda::input_gradient(&dy, w, onto);
    }
    let (mut dx, destination) = buffers::sum(onto, rows * w.columns())?;
    products::input_gradient(
        &mut dx,
        destination,
        &Floats::of(FROZEN, "the gradient", &dy)?,
        rows,
        w,
        None,
    );
    Ok(Tensor::from_vec(dx, (rows, w.columns()), &Device::Cpu)?)
}

/// `y = x Wᵀ + b` with a weight that is trained.
///
/// `x` is `(rows, inputs)`, `w` `(outputs, inputs)`, `b` `(outputs)`. The gradients are `dy W` for `x`, `dyᵀ x` for `w`
/// and the column sums of `dy` for `b`, each only where it is tracked; nothing is saved but the arguments.
pub fn trained_linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, inputs) = matrix_shape(TRAINED, "the weight", w)?;
    let rows = check_input(TRAINED, x, outputs, inputs)?;
    let (x, w) = (&x.contiguous()?, &w.contiguous()?);
    let bias = contiguous_bias(TRAINED, bias, outputs)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let y = cuda::trained_linear(x, w, bias.as_ref())?;
        return match &bias {
            Some(bias) => record([x, w, bias], y, (rows, outputs), TrainedLinear),
            None => record([x, w], y, (rows, outputs), TrainedLinear),
        };
    }
    let mut y = buffers::take(rows * outputs);
    {
        let (x, w) = (
            Floats::of(TRAINED, "x", x)?,
            Floats::of(TRAINED, "the weight", w)?,
        );
        multiply_parallel(
            MatrixMut::new(&mut y, rows, outputs),
            Destination::Overwrite,
            Matrix::new(&x, rows, inputs),
            Matrix::new(&w, outputs, inputs).transposed(),
        );
        if let Some(bias) = &bias {
            products::add_bias(&mut y, &Floats::of(TRAINED, "the bias", bias)?);
        }
    }
    match &bias {
        Some(bias) => record([x, w, bias], y, (rows, outputs), TrainedLinear),
        None => record([x, w], y, (rows, outputs), TrainedLinear),
    }
}

struct TrainedLinear;

impl Backward<2> for TrainedLinear {
    const NAME: &'static str = TRAINED;

    fn gradients(
        &self,
        [x, w]: [&Tensor; 2],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let dx = match x.track_op() {
            true => Some(trained_linear_input_gradient(gradient, w, None)?),
            false => None,
        };
        let dw = match w.track_op() {
            true => Some(weight_gradient(x, gradient)?),
            false => None,
        };
        Ok([dx, dw])
    }
}

/// The gradient of a trained layer's input, `dy W`, added to `onto` where there is one, as [`linear_input_gradient`].
pub(crate) fn trained_linear_input_gradient(
    dy: &Tensor,
    w: &Tensor,
    onto: Option<Tensor>,
) -> Result<Tensor> {
    let (outputs, inputs) = matrix_shape(TRAINED, "the weight", w)?;
    let rows = check_input(TRAINED, dy, inputs, outputs)?;
    let (dy, w) = (dy.contiguous()?, w.contiguous()?);
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return cuda::trained_input_gradient(&dy, &w, onto);
    }
    let (mut dx, destination) = buffers::sum(onto, rows * inputs)?;
    multiply_parallel(
        MatrixMut::new(&mut dx, rows, inputs),
        destination,
        Matrix::new(&Floats::of(TRAINED, "the gradient", &dy)?, rows, outputs),
        Matrix::new(&Floats::of(TRAINED, "the weight", &w)?, outputs, inputs),
    );
    Ok(Tensor::from_vec(dx, (rows, inputs), &Device::Cpu)?)
}

/// The gradient of a layer's weight, `dyᵀ x`: `x` is `(rows, inputs)`, `dy` `(rows, outputs)`, the result
/// `(outputs, inputs)`.
pub(crate) fn weight_gradient(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (rows, inputs) = matrix_shape(TRAINED, "x", x)?;
    let outputs = matrix_shape(TRAINED, "the gradient", dy)?.1;
    let (x, dy) = (x.contiguous()?, dy.contiguous()?);
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return cuda::weight_gradient(&x, &dy);
    }
    let mut dw = buffers::take(outputs * inputs);
    let dy = Floats::of(TRAINED, "the gradient", &dy)?;
    multiply_parallel(
        MatrixMut::new(&mut dw, outputs, inputs),
        Destination::Overwrite,
        Matrix::new(&dy, rows, outputs).transposed(),
        Matrix::new(&Floats::of(TRAINED, "x", &x)?, rows, inputs),
    );
    Ok(Tensor::from_vec(dw, (outputs, inputs), &Device::Cpu)?)
}

/// The gradient of a layer's bias: the column sums of `dy` `(rows, outputs)`.
pub(crate) fn bias_gradient(dy: &Tensor) -> Result<Tensor> {
    let outputs = matrix_shape(TRAINED, "the gradient", dy)?.1;
    let dy = dy.contiguous()?;
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return cuda::bias_gradient(&dy);
    }
    let sums = column_sums(&Floats::of(TRAINED, "the gradient", &dy)?, outputs);
    Ok(Tensor::from_vec(sums, outputs, &Device::Cpu)?)
}

impl Backward<3> for TrainedLinear {
    const NAME: &'static str = TRAINED;

    fn gradients(
        &self,
        [x, w, bias]: [&Tensor; 3],
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let [dx, dw] = Backward::<2>::gradients(self, [x, w], result, gradient)?;
        let mut db = None;
        if bias.track_op() {
            db = Some(bias_gradient(gradient)?);
        }
        Ok([dx, dw, db])
    }
}

/// Rows that one task adds up.
const SUM_ROWS: usize = 256;

/// The sum of each column of `(rows, columns)` values.
fn column_sums(values: &[f32], columns: usize) -> Vec<f32> {
    if columns == 0 {
        return Vec::new();
    }
    let tasks = values.par_chunks(SUM_ROWS * columns);
    sum_tasks(tasks, columns, |sums, rows| {
        for row in rows.chunks_exact(columns) {
            kernels::add_assign(sums, row);
        }
    })
}

/// Checks `x` against the weight and returns its rows.
pub(super) fn check_input(
    operation: &str,
    x: &Tensor,
    outputs: usize,
    inputs: usize,
) -> Result<usize> {
    let (rows, features) = matrix_shape(operation, "x", x)?;
    if features != inputs {
        return Err(Error::new(format!(
            "`{operation}`: x is ({rows}, {features}) but the weight is ({outputs}, {inputs})"
        )));
    }
    Ok(rows)
}

pub(super) fn check_bias(operation: &str, bias: &Tensor, outputs: usize) -> Result<()> {
    expect_shape(
        operation,
        "the bias",
        bias,
        &[outputs],
        "one value per row of the weight",
    )
}

/// The bias, checked, in a form that can be borrowed as a slice.
pub(super) fn contiguous_bias(
    operation: &str,
    bias: Option<&Tensor>,
    outputs: usize,
) -> Result<Option<Tensor>> {
    let Some(bias) = bias else { return Ok(None) };
    check_bias(operation, bias, outputs)?;
    Ok(Some(bias.contiguous()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, frozen_weights, random, variable};
    use crate::ops::{ComputeType, MANY_ROWS};

    const SHAPES: [(usize, usize, usize); 7] = [
        (1, 1, 1),
        (1, 7, 65),
        (2, 13, 5),
        (4, 33, 70),
        (5, 31, 17),
        (131, 67, 257),
        (401, 50, 300),
    ];

    fn slow(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let y = x.matmul(&w.t()?)?;
        Ok(match bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    #[test]
    fn a_frozen_weight_equals_its_composition() -> Result<()> {
        for (rows, inputs, outputs) in SHAPES {
            let bias = random(3, &[outputs]);
            for w in frozen_weights(2, outputs, inputs) {
                let dense = w.to_f32()?;
                for bias in [None, Some(&bias)] {
                    let x = [variable(1, &[rows, inputs])];
                    check(
                        &x,
                        &|t| linear(&t[0], &w, bias),
                        &|t| slow(&t[0], &dense, bias),
                        1e-5,
                    );
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_frozen_weight_in_several_blocks_equals_its_composition() -> Result<()> {
        let w = &frozen_weights(2, 1200, 1009)[2];
        let dense = w.to_f32()?;
        let x = [variable(1, &[7, 1009])];
        check(
            &x,
            &|t| linear(&t[0], w, None),
            &|t| slow(&t[0], &dense, None),
            1e-5,
        );
        Ok(())
    }

    #[test]
    fn from_many_rows_on_the_bits_of_a_row_do_not_depend_on_the_others() -> Result<()> {
        const MOST: usize = 530;
        for inputs in [8, 48, 576, 1100] {
            let x = random(1, &[MOST, inputs]);
            for outputs in [
                1, 2, 3, 4, 8, 16, 48, 49, 50, 51, 60, 96, 97, 100, 147, 1537,
            ] {
                let weights = frozen_weights(2, outputs, inputs).into_iter();
                for w in weights.flat_map(|w| [w.with_compute(ComputeType::Bf16), w]) {
                    let bits = |rows: usize| -> Result<Vec<u32>> {
                        let x = x.narrow(0, 0, rows)?.contiguous()?;
                        let y = linear(&x, &w, None)?.narrow(0, 0, MANY_ROWS)?;
                        let y = y.flatten_all()?.to_vec1::<f32>()?;
                        Ok(y.into_iter().map(f32::to_bits).collect())
                    };
                    let expected = bits(MOST)?;
                    for rows in [MANY_ROWS, MANY_ROWS + 1, 96, 131, 257, 513] {
                        let shape = (rows, inputs, outputs, w.dtype(), w.compute());
                        assert!(bits(rows)? == expected, "{shape:?}");
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_trained_bias_has_a_gradient_on_a_frozen_weight() -> Result<()> {
        let w = &frozen_weights(2, 5, 3)[0];
        let dense = w.to_f32()?;
        let arguments = [variable(1, &[7, 3]), variable(3, &[5])];
        check(
            &arguments,
            &|t| linear(&t[0], w, Some(&t[1])),
            &|t| slow(&t[0], &dense, Some(&t[1])),
            1e-5,
        );
        Ok(())
    }

    #[test]
    fn a_trained_weight_equals_its_composition() {
        for (rows, inputs, outputs) in SHAPES {
            let arguments = [
                variable(1, &[rows, inputs]),
                variable(2, &[outputs, inputs]),
                variable(3, &[outputs]),
            ];
            check(
                &arguments[..2],
                &|t| trained_linear(&t[0], &t[1], None),
                &|t| slow(&t[0], &t[1], None),
                1e-5,
            );
            let fast = |t: &[Tensor]| trained_linear(&t[0], &t[1], Some(&t[2]));
            check(
                &arguments,
                &fast,
                &|t| slow(&t[0], &t[1], Some(&t[2])),
                1e-5,
            );
        }
    }

    #[test]
    fn views_and_no_rows_are_taken() -> Result<()> {
        let w = &frozen_weights(2, 4, 3)[1];
        let x = random(1, &[3, 5]).t()?;
        assert_eq!(
            linear(&x, w, None)?.to_vec2::<f32>()?,
            linear(&x.contiguous()?, w, None)?.to_vec2::<f32>()?
        );
        assert_eq!(linear(&random(1, &[0, 3]), w, None)?.dims(), [0, 4]);
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_agree_are_an_error() {
        let w = &frozen_weights(2, 4, 3)[0];
        let message = |result: Result<Tensor>| result.expect_err("refused").to_string();
        assert_eq!(
            message(linear(&random(1, &[2, 4]), w, None)),
            "`linear`: x is (2, 4) but the weight is (4, 3)"
        );
        assert_eq!(
            message(linear(&random(1, &[2, 1, 3]), w, None)),
            "`linear` needs x as a matrix (rows, columns), its shape is [2, 1, 3]"
        );
        assert_eq!(
            message(linear(&random(1, &[2, 3]), w, Some(&random(1, &[3])))),
            "`linear` needs the bias of shape [4] (one value per row of the weight), its shape is [3]"
        );
        let half = random(1, &[2, 3])
            .to_dtype(candle_core::DType::F16)
            .expect("a float type");
        assert_eq!(
            message(linear(&half, w, None)),
            "`linear` needs x in f32, it is F16"
        );
    }
}
