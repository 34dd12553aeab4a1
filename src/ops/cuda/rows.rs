//! The look-up of rows, and the way back.

use super::compiler::{Kernel, Source};
use super::launch::{Grid, THREADS, int, launch};
use super::memory::{Address, Output, Real, device_of};
use super::upload::upload;
use crate::Result;
use crate::ops::graph::Backward;
use candle_core::{DType, Tensor};

const ROWS: &str = "look-up of rows";

/// These rows of `table`, in its type.
pub(in crate::ops) fn gather(table: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let (output, _) = gathered(table, rows)?;
    Ok(output.into_tensor((rows.len(), table.dim(1)?)))
}

/// These rows of `table`, in its type, and their numbers on the device.
fn gathered(table: &Tensor, rows: &[u32]) -> Result<(Output, Tensor)> {
    let device = device_of(ROWS, table)?;
    let real = Real::of(ROWS, "the table", table)?;
    let columns = table.dim(1)?;
    let output = Output::new(device, rows.len() * columns, real.dtype())?;
    let ids = upload(device, rows)?;
    launch(
        device,
        Kernel::new(Source::Elementwise, real, "gather"),
        Grid::blocks(rows.len()),
        &[
            Address::of(ROWS, "the table", table, real.dtype())?.into(),
            Address::of(ROWS, "the rows", &ids, DType::U32)?.into(),
            output.address().into(),
            int(rows.len())?,
            int(columns)?,
        ],
    )?;
    Ok((output, ids))
}

/// These rows of `x`, contiguous, in its type, and the way back, on which no row may be there twice.
pub(in crate::ops) fn select_rows(x: &Tensor, rows: &[u32]) -> Result<(Output, SelectRows)> {
    let (output, ids) = gathered(x, rows)?;
    Ok((output, SelectRows { ids }))
}

/// Puts the gradients of rows back among those that were left out.
pub(in crate::ops) struct SelectRows {
    ids: Tensor,
}

impl Backward<1> for SelectRows {
    const NAME: &'static str = ROWS;

    fn gradients(
        &self,
        [x]: [&Tensor; 1],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        let gradient = gradient.contiguous()?;
        let device = device_of(ROWS, &gradient)?;
        let real = Real::of(ROWS, "the gradient", &gradient)?;
        let (count, columns) = gradient.dims2()?;
        let output = Output::zeros(device, x.elem_count(), real.dtype())?;
        launch(
            device,
            Kernel::new(Source::Elementwise, real, "scatter"),
            Grid::blocks(count),
            &[
                Address::of(ROWS, "the gradient", &gradient, real.dtype())?.into(),
                Address::of(ROWS, "the rows", &self.ids, DType::U32)?.into(),
                output.address().into(),
                int(count)?,
                int(columns)?,
            ],
        )?;
        Ok([Some(output.into_tensor(x.shape()))])
    }
}

/// These rows of `table`, f32 and contiguous, and the way back, on which the gradients of a row are added up in the order in
/// which it was looked up.
pub(in crate::ops) fn look_up(table: &Tensor, rows: &[u32]) -> Result<(Output, LookUp)> {
    let (output, _) = gathered(table, rows)?;
    let rows = rows.to_vec();
    Ok((output, LookUp { rows }))
}

/// Adds up the gradients of each row.
pub(in crate::ops) struct LookUp {
    rows: Vec<u32>,
}

impl Backward<1> for LookUp {
    const NAME: &'static str = ROWS;

    fn gradients(
        &self,
        [table]: [&Tensor; 1],
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 1]> {
        let gradient = gradient.contiguous()?;
        let device = device_of(ROWS, &gradient)?;
        let columns = table.dim(1)?;
        let output = Output::zeros(device, table.elem_count(), DType::F32)?;
        let Segments { words, count } = Segments::of(&self.rows);
        let words = upload(device, &words)?;
        let order = Address::of(ROWS, "the rows", &words, DType::U32)?;
        launch(
            device,
            Kernel::new(Source::Elementwise, Real::F32, "add_segments"),
            Grid::of((count, columns.div_ceil(THREADS), 1), THREADS),
            &[
                Address::of(ROWS, "the gradient", &gradient, DType::F32)?.into(),
                order.into(),
                order.at(self.rows.len()).into(),
                output.address().into(),
                int(columns)?,
            ],
        )?;
        Ok([Some(output.into_tensor(table.shape()))])
    }
}

/// Which look-ups belong to the same row.
struct Segments {
    /// The places of all look-ups, those of a row one after the other; then a row and the end of its places for each row,
    /// after one pair whose end is 0.
    words: Vec<u32>,
    /// How many rows there are.
    count: usize,
}

impl Segments {
    fn of(rows: &[u32]) -> Self {
        let mut places: Vec<u32> = (0..rows.len() as u32).collect();
        // Stable: the places of a row stay in their order.
        places.sort_by_key(|place| rows[*place as usize]);
        let mut ends = vec![0, 0];
        let mut end = 0;
        for of_row in places.chunk_by(|left, right| rows[*left as usize] == rows[*right as usize]) {
            end += of_row.len() as u32;
            ends.extend([rows[of_row[0] as usize], end]);
        }
        let count = ends.len() / 2 - 1;
        let words = [places, ends].concat();
        Self { words, count }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_a_row_stand_together_and_in_order() {
        let Segments { words, count } = Segments::of(&[7, 0, 7, 2, 0, 7]);
        assert_eq!(count, 3);
        assert_eq!(words[..6], [1, 4, 3, 0, 2, 5]);
        assert_eq!(words[6..], [0, 0, 0, 2, 2, 3, 7, 6]);
        assert_eq!(Segments::of(&[]).words, [0, 0]);
    }
}
