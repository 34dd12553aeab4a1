//! Some rows of a matrix.

#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::matrix_shape;
#[cfg(feature = "cuda")]
use super::graph::record;
use crate::{Error, Result};
use candle_core::Tensor;

/// The rows of `x`, a matrix, with these numbers, which must ascend: `(rows.len(), columns)`, in the type of `x`.
///
/// The gradient of `x` is that of the result in these rows and zero in all others.
pub fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let (count, _) = matrix_shape(NAME, "x", x)?;
    // No row comes twice: on a GPU each is written by itself on the way back.
    let ascending = rows.windows(2).all(|pair| pair[0] < pair[1]);
    if !ascending || rows.last().is_some_and(|last| *last as usize >= count) {
        return Err(Error::new(format!(
            "`{NAME}` takes the numbers of rows in ascending order, below {count}"
        )));
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let x = &x.contiguous()?;
        let (y, backward) = cuda::select_rows(x, rows)?;
        return record([x], y, (rows.len(), x.dim(1)?), backward);
    }
    Ok(x.index_select(&Tensor::new(rows, x.device())?, 0)?)
}

const NAME: &str = "select rows";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, random, variable};

    #[test]
    fn equals_its_composition() {
        for rows in [&[0u32][..], &[2, 3, 10], &[0, 4, 5, 6, 9]] {
            let slow = |t: &[Tensor]| -> Result<Tensor> {
                let rows = rows.iter().map(|row| t[0].narrow(0, *row as usize, 1));
                let rows = rows.collect::<candle_core::Result<Vec<_>>>()?;
                Ok(Tensor::cat(&rows, 0)?)
            };
            let x = [variable(1, &[11, 7])];
            check(&x, &|t| select_rows(&t[0], rows), &slow, 1e-6);
        }
    }

    #[test]
    fn rows_that_are_not_there_or_come_twice_are_an_error() {
        for rows in [&[3][..], &[1, 1], &[2, 0]] {
            let error = select_rows(&random(1, &[3, 2]), rows).expect_err("refused");
            assert_eq!(
                error.to_string(),
                "`select rows` takes the numbers of rows in ascending order, below 3"
            );
        }
    }
}
