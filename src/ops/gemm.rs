//! Matrix products: the one wrapper over the `gemm` crate.
//!
//! A product runs on one thread per tile, and the tiles follow from the shape alone, so the bits of the result do not
//! depend on how many threads there are.

#![expect(
    unsafe_code,
    reason = "the gemm crate takes raw pointers; the views check every bound when they are made"
)]

use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// A matrix to read: a slice with strides, so that transposing and cutting cost nothing.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows laid end to end.
    pub(super) fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Rows that begin `stride` values apart.
    pub(super) fn strided(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(
            fits(values.len(), rows, columns, stride),
            "a matrix reaches past its values"
        );
        Self {
            values,
            rows,
            columns,
            row_stride: stride,
            column_stride: 1,
        }
    }

    /// How many rows it has.
    pub(super) fn row_count(&self) -> usize {
        self.rows
    }

    /// Rows as columns.
    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// The given rows, all columns.
    pub(super) fn rows(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.rows,
            "rows outside the matrix"
        );
        let start = (range.start * self.row_stride).min(self.values.len());
        Self {
            values: &self.values[start..],
            rows: range.len(),
            ..self
        }
    }

    /// The given columns, all rows.
    pub(super) fn columns(self, range: Range<usize>) -> Self {
        self.transposed().rows(range).transposed()
    }
}

/// A matrix to write, its columns next to each other. It can be cut into parts that do not overlap.
pub(super) struct MatrixMut<'a> {
    start: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    values: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]` of the elements inside its bounds, and two of them never share an element.
unsafe impl Send for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// Rows laid end to end.
    pub(super) fn new(values: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Rows that begin `stride` values apart.
    pub(super) fn strided(
        values: &'a mut [f32],
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Self {
        assert!(
            columns <= stride || rows <= 1,
            "rows of a matrix to write overlap"
        );
        assert!(
            fits(values.len(), rows, columns, stride),
            "a matrix reaches past its values"
        );
        Self {
            start: values.as_mut_ptr(),
            rows,
            columns,
            row_stride: stride,
            values: PhantomData,
        }
    }

    /// How many rows it has.
    pub(super) fn row_count(&self) -> usize {
        self.rows
    }

    /// How many columns it has.
    pub(super) fn column_count(&self) -> usize {
        self.columns
    }

    /// `N` rows from `first` on.
    pub(super) fn rows<const N: usize>(&mut self, first: usize) -> [&mut [f32]; N] {
        assert!(first + N <= self.rows, "rows outside the matrix");
        std::array::from_fn(|row| {
            if self.columns == 0 {
                return Default::default();
            }
            // SAFETY: the row is inside the bounds that were checked when the matrix was made, no other row overlaps
            // it, nobody else has a part of it, and it is borrowed as long as the matrix is.
            unsafe {
                let start = self.start.add((first + row) * self.row_stride);
                std::slice::from_raw_parts_mut(start, self.columns)
            }
        })
    }

    /// The rows before `row` and those from it on.
    pub(super) fn split_rows(self, row: usize) -> (Self, Self) {
        assert!(row <= self.rows, "rows outside the matrix");
        let below = Self {
            start: self.start.wrapping_add(row * self.row_stride),
            rows: self.rows - row,
            ..self
        };
        (Self { rows: row, ..self }, below)
    }

    /// The columns before `column` and those from it on.
    pub(super) fn split_columns(self, column: usize) -> (Self, Self) {
        assert!(column <= self.columns, "columns outside the matrix");
        let right = Self {
            start: self.start.wrapping_add(column),
            columns: self.columns - column,
            ..self
        };
        (
            Self {
                columns: column,
                ..self
            },
            right,
        )
    }

    /// The given columns, all rows.
    pub(super) fn columns(self, range: Range<usize>) -> Self {
        let (left, _) = self.split_columns(range.end);
        left.split_columns(range.start).1
    }

    /// All of it in parts of at most `rows` rows.
    pub(super) fn row_parts(self, rows: usize) -> Vec<Self> {
        let mut parts = Vec::new();
        let mut rest = self;
        while rest.rows > rows {
            let (part, below) = rest.split_rows(rows);
            parts.push(part);
            rest = below;
        }
        parts.push(rest);
        parts
    }

    /// All of it in parts of at most `columns` columns.
    pub(super) fn column_parts(self, columns: usize) -> Vec<Self> {
        self.column_parts_of_least(columns, 1)
    }

    /// The same, but for a rest of fewer than `least` columns, which belongs to the last part.
    fn column_parts_of_least(self, columns: usize, least: usize) -> Vec<Self> {
        let mut parts = Vec::new();
        let mut rest = self;
        while rest.columns >= columns + least {
            let (part, right) = rest.split_columns(columns);
            parts.push(part);
            rest = right;
        }
        parts.push(rest);
        parts
    }
}

/// Whether the last element of such a matrix is inside a slice of `length` values.
fn fits(length: usize, rows: usize, columns: usize, stride: usize) -> bool {
    rows == 0
        || columns == 0
        || (rows - 1)
            .checked_mul(stride)
            .and_then(|last| last.checked_add(columns))
            .is_some_and(|end| end <= length)
}

/// What a product does with the values that are already there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Destination {
    /// They are lost, and may be anything.
    Overwrite,
    /// The product is added to them.
    Add,
}

/// `c = a b` or `c += a b` on this thread.
pub(super) fn multiply(c: MatrixMut<'_>, destination: Destination, a: Matrix<'_>, b: Matrix<'_>) {
    assert!(
        c.rows == a.rows && c.columns == b.columns && a.columns == b.rows,
        "shapes of a product do not agree"
    );
    if c.rows == 0 || c.columns == 0 {
        return;
    }
    // The crate calls the factor of what is there `alpha` and the factor of the product `beta`.
    let alpha = if destination == Destination::Add {
        1.0
    } else {
        0.0
    };
    // SAFETY: the constructors have checked that every element of `a`, `b` and `c` is inside its slice, `c` is borrowed
    // mutably and cannot overlap the others, and the shapes agree.
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.start,
            1,
            c.row_stride as isize,
            destination == Destination::Add,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            alpha,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Columns of a tile of a product that runs in parallel: a multiple of 48, the vector side of the widest micro-kernel.
const TILE_COLUMNS: usize = 96;
/// Fewer columns are no tile of their own: the crate multiplies 256 values or fewer in another order, and rows enough for
/// any other tile would not be enough for it.
pub(super) const NARROWEST_TILE: usize = 4;
/// Columns of a tile where there would be too few to share.
const NARROW_TILE_COLUMNS: usize = 48;
/// Tiles that are enough to share.
const ENOUGH_TILES: usize = 16;
/// Rows of a tile.
const TILE_ROWS: usize = 512;
/// Rows of a tile where packing `b` means transposing it: done for each tile, so tiles are taller.
const TRANSPOSED_TILE_ROWS: usize = 1024;

/// `c = a b` or `c += a b` in tiles on all threads.
pub(super) fn multiply_parallel(
    c: MatrixMut<'_>,
    destination: Destination,
    a: Matrix<'_>,
    b: Matrix<'_>,
) {
    let rows = if b.column_stride == 1 {
        TILE_ROWS
    } else {
        TRANSPOSED_TILE_ROWS
    };
    let tile_rows = even_part(c.rows, rows, 1);
    let few = c.rows.div_ceil(tile_rows) * c.columns.div_ceil(TILE_COLUMNS) < ENOUGH_TILES;
    let columns = if few {
        NARROW_TILE_COLUMNS
    } else {
        TILE_COLUMNS
    };
    let tile_columns = even_part(c.columns, columns, NARROW_TILE_COLUMNS);
    let tiles: Vec<(usize, usize, MatrixMut<'_>)> = c
        .row_parts(tile_rows)
        .into_iter()
        .enumerate()
        .flat_map(|(i, rows)| {
            let parts = rows.column_parts_of_least(tile_columns, NARROWEST_TILE);
            let parts = parts.into_iter().enumerate();
            parts.map(move |(j, tile)| (i * tile_rows, j * tile_columns, tile))
        })
        .collect();
    tiles.into_par_iter().for_each(|(row, column, tile)| {
        let a = a.rows(row..row + tile.rows);
        let b = b.columns(column..column + tile.columns);
        multiply(tile, destination, a, b);
    });
}

/// The size, a multiple of `unit`, that cuts `total` into equal parts of about `wanted`.
pub(super) fn even_part(total: usize, wanted: usize, unit: usize) -> usize {
    let parts = total.div_ceil(wanted).max(1);
    total.div_ceil(parts).next_multiple_of(unit).max(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};

    fn values(seed: u64, length: usize) -> Vec<f32> {
        random(seed, &[length]).to_vec1().expect("f32 values")
    }

    fn slow(a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
        let at = |m: Matrix<'_>, i, j| f64::from(m.values[i * m.row_stride + j * m.column_stride]);
        let entry = |i, j| {
            (0..a.columns)
                .map(|k| at(a, i, k) * at(b, k, j))
                .sum::<f64>() as f32
        };
        (0..a.rows)
            .flat_map(|i| (0..b.columns).map(move |j| entry(i, j)))
            .collect()
    }

    #[test]
    fn products_of_all_layouts_are_right() {
        for (m, n, k) in [
            (1, 1, 1),
            (1, 50, 7),
            (50, 1, 7),
            (3, 5, 2),
            (65, 97, 33),
            (401, 211, 129),
        ] {
            let (a, b) = (values(1, m * k), values(2, k * n));
            for a in [Matrix::new(&a, m, k), Matrix::new(&a, k, m).transposed()] {
                for b in [Matrix::new(&b, k, n), Matrix::new(&b, n, k).transposed()] {
                    let wanted = slow(a, b);
                    let mut c = vec![f32::NAN; m * n];
                    multiply(MatrixMut::new(&mut c, m, n), Destination::Overwrite, a, b);
                    assert_close("one thread", &c, &wanted, 1e-5);
                    multiply_parallel(MatrixMut::new(&mut c, m, n), Destination::Overwrite, a, b);
                    assert_close("tiles", &c, &wanted, 1e-5);
                    multiply_parallel(MatrixMut::new(&mut c, m, n), Destination::Add, a, b);
                    let twice: Vec<f32> = wanted.iter().map(|value| 2.0 * value).collect();
                    assert_close("added", &c, &twice, 1e-5);
                }
            }
        }
    }

    #[test]
    fn an_empty_sum_is_zero() {
        let mut c = vec![f32::NAN; 6];
        let (a, b) = (Matrix::new(&[], 2, 0), Matrix::new(&[], 0, 3));
        multiply_parallel(MatrixMut::new(&mut c, 2, 3), Destination::Overwrite, a, b);
        assert_eq!(c, [0.0; 6]);
        multiply_parallel(
            MatrixMut::new(&mut [], 0, 3),
            Destination::Overwrite,
            Matrix::new(&[], 0, 3),
            Matrix::new(&[0.0; 9], 3, 3),
        );
    }

    #[test]
    fn parts_of_a_matrix_do_not_touch_the_rest() {
        let mut c = vec![7f32; 12];
        let middle = MatrixMut::new(&mut c, 3, 4)
            .split_rows(1)
            .1
            .split_rows(1)
            .0
            .columns(1..3);
        multiply(
            middle,
            Destination::Overwrite,
            Matrix::new(&[2.0], 1, 1),
            Matrix::new(&[3.0, 4.0], 1, 2),
        );
        assert_eq!(
            c,
            [7.0, 7.0, 7.0, 7.0, 7.0, 6.0, 8.0, 7.0, 7.0, 7.0, 7.0, 7.0]
        );
    }

    #[test]
    #[should_panic(expected = "a matrix reaches past its values")]
    fn a_matrix_larger_than_its_values_is_refused() {
        Matrix::new(&[0.0; 5], 2, 3);
    }
}
