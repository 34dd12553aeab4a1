//! Rows of a trained matrix by their numbers: the look-up in an embedding.

#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::matrix_shape;
#[cfg(feature = "cuda")]
use super::graph::record;
use crate::{Error, Result};
use candle_core::Tensor;

/// The rows of `table`, an f32 matrix, with these numbers: `(rows.len(), columns)`.
///
/// The gradient of a row is the sum of those of the places where it was looked up, in their order, and zero if there are
/// none. Fails for a row that is not there.
pub fn look_up(table: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let (count, _) = matrix_shape(NAME, "the table", table)?;
    if let Some(row) = rows.iter().find(|row| **row as usize >= count) {
        return Err(Error::new(format!(
            "token {row} is outside the vocabulary of {count}"
        )));
    }
    #[cfg(feature = "cuda")]
    if table.device().is_cuda() {
        let table = &table.contiguous()?;
        let (y, backward) = cuda::look_up(table, rows)?;
        return record([table], y, (rows.len(), table.dim(1)?), backward);
    }
    Ok(table
        .contiguous()?
        .index_select(&Tensor::new(rows, table.device())?, 0)?)
}

const NAME: &str = "look-up";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::random;

    #[test]
    fn a_row_that_is_not_there_is_an_error() {
        let error = look_up(&random(1, &[3, 2]), &[0, 3]).expect_err("refused");
        assert_eq!(error.to_string(), "token 3 is outside the vocabulary of 3");
    }
}
