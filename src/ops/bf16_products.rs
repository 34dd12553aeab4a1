//! Products of bf16 factors with f32 sums: twice as fast as f32 where the machine has them (AVX-512 BF16).
//!
//! Both factors are packed in pairs along the depth of the sum, which is what the instruction multiplies: the left one
//! whole, eight rows side by side, the right one 48 columns at a time by the task that needs them. Tasks follow from the
//! shape alone, and each adds up in order of depth, so the bits do not depend on the number of threads.

use super::bf16_tile::{self, COLUMNS, Pair, ROWS, pair, rounded};
use super::buffers;
use super::frozen_weight::with_scratch;
use super::gemm::{Destination, MatrixMut};
use super::vectorised::vectorised;
use rayon::prelude::*;
use std::ops::Range;

/// Pairs in depth that are packed at a time: 48 columns of them stay in the second-level cache.
const BLOCK_PAIRS: usize = 512;

/// A left factor, packed: for each block of depth the panels of eight rows, for each panel the pairs of its rows.
pub(super) struct Packed {
    pairs: Vec<Pair>,
    depth: usize,
    row_panels: usize,
}

impl Packed {
    /// The first `depth` values of each of the rows, which begin `stride` values apart.
    pub(super) fn new(values: &[f32], rows: usize, depth: usize, stride: usize) -> Self {
        let row_panels = rows.div_ceil(ROWS);
        let mut pairs = buffers::take(row_panels * ROWS * depth.div_ceil(2));
        let mut rest = pairs.as_mut_slice();
        for block in blocks(depth) {
            let panel_pairs = block.len().div_ceil(2) * ROWS;
            let (packed, below) = rest.split_at_mut(panel_pairs * row_panels);
            rest = below;
            packed
                .par_chunks_mut(panel_pairs.max(1))
                .enumerate()
                .for_each(|(panel, packed)| {
                    let rows = panel * ROWS..((panel + 1) * ROWS).min(rows);
                    pack_rows(packed, values, rows, stride, block.clone());
                });
        }
        Self {
            pairs,
            depth,
            row_panels,
        }
    }

    /// The pairs of one panel of rows in the block of depth that begins at `start`.
    fn panel(&self, panel: usize, block: &Range<usize>) -> &[[Pair; ROWS]] {
        let block_pairs = block.len().div_ceil(2);
        let before = self.row_panels * block.start / 2;
        let all = self.pairs.as_chunks().0;
        &all[before + panel * block_pairs..][..block_pairs]
    }

    /// Hands its memory on.
    pub(super) fn recycle(self) {
        buffers::give(self.pairs);
    }
}

/// The right factor of a product, `(depth, columns)`, which packs parts of itself.
pub(super) trait Right: Sync {
    /// Writes panels of 48 columns: for each pair of the given depths (the last may lack its second) that of each column.
    /// `panels` has zeros where the last panel has fewer columns.
    fn pack(&self, panels: &mut [[Pair; COLUMNS]], depths: Range<usize>, columns: Range<usize>);
}

/// Panels of the right factor that one task packs at a time, at most: with more, they leave the second-level cache.
const MOST_PANELS: usize = 6;

/// `c = Σ aᵢ bᵢ` or `c += Σ aᵢ bᵢ` over the given terms, on all threads.
pub(super) fn multiply(
    c: MatrixMut<'_>,
    destination: Destination,
    terms: &[(&Packed, &dyn Right)],
) {
    let panels = panels_of_a_task(c.column_count().div_ceil(COLUMNS));
    let width = panels * COLUMNS;
    let parts: Vec<MatrixMut<'_>> = c.column_parts(width);
    let parts = parts.into_par_iter().enumerate();
    parts.for_each(|(index, mut part)| {
        let columns = index * width..index * width + part.column_count();
        let mut destination = destination;
        with_scratch(BLOCK_PAIRS * width, |scratch| {
            for (left, right) in terms {
                for block in blocks(left.depth) {
                    let pairs = block.len().div_ceil(2);
                    let panels = columns.len().div_ceil(COLUMNS);
                    let packed = &mut scratch.as_chunks_mut().0[..panels * pairs];
                    if !columns.len().is_multiple_of(COLUMNS) {
                        packed[(panels - 1) * pairs..].as_flattened_mut().fill(0.0);
                    }
                    right.pack(packed, block.clone(), columns.clone());
                    add_tiles(&mut part, destination, left, &block, packed);
                    destination = Destination::Add;
                }
            }
        });
    });
}

/// How many of the panels one task takes, so that all threads end together; it changes no sum.
fn panels_of_a_task(panels: usize) -> usize {
    let threads = rayon::current_num_threads();
    let longest = |size: usize| panels.div_ceil(size).div_ceil(threads) * size;
    (1..=MOST_PANELS)
        .rev()
        .min_by_key(|size| longest(*size))
        .unwrap_or(1)
}

/// What one block of depth adds to some columns of the product.
fn add_tiles(
    c: &mut MatrixMut<'_>,
    destination: Destination,
    left: &Packed,
    block: &Range<usize>,
    right: &[[Pair; COLUMNS]],
) {
    let pairs = block.len().div_ceil(2);
    let (rows, columns) = (c.row_count(), c.column_count());
    for (first_column, right) in (0..columns)
        .step_by(COLUMNS)
        .zip((0..).map(|panel| &right[panel * pairs..][..pairs]))
    {
        let width = COLUMNS.min(columns - first_column);
        for (panel, first_row) in (0..rows).step_by(ROWS).enumerate() {
            let left = left.panel(panel, block);
            if width == COLUMNS && first_row + ROWS <= rows {
                let rows: [&mut [f32]; ROWS] = c.rows(first_row);
                let tile = rows.map(|row| &mut row.as_chunks_mut().0[first_column / COLUMNS]);
                bf16_tile::multiply(tile, destination, left, right);
                continue;
            }
            // As a whole tile, so that the bits of a row do not depend on how many there are.
            let mut room = [[0.0; COLUMNS]; ROWS];
            for (row, values) in (first_row..rows).zip(&mut room) {
                let [row] = c.rows(row);
                values[..width].copy_from_slice(&row[first_column..][..width]);
            }
            bf16_tile::multiply(room.each_mut(), destination, left, right);
            for (row, values) in (first_row..rows).zip(&room) {
                let [row] = c.rows(row);
                row[first_column..][..width].copy_from_slice(&values[..width]);
            }
        }
    }
}

/// The depths `0..depth` in blocks; each but the last is a whole number of pairs. An empty sum has one, without pairs.
fn blocks(depth: usize) -> impl Iterator<Item = Range<usize>> {
    const STEP: usize = 2 * BLOCK_PAIRS;
    (0..depth.max(1))
        .step_by(STEP)
        .map(move |start| start..(start + STEP).min(depth))
}

/// Packs one block of depth of up to eight rows; absent rows are zeros.
fn pack_rows(
    packed: &mut [Pair],
    values: &[f32],
    rows: Range<usize>,
    stride: usize,
    block: Range<usize>,
) {
    let pairs = block.len().div_ceil(2);
    with_scratch(ROWS * pairs, |lines| {
        let (full, absent) = lines.split_at_mut(rows.len() * pairs);
        absent.fill(0.0);
        for (line, row) in full.chunks_exact_mut(pairs.max(1)).zip(rows) {
            pair_up(line, &values[row * stride..][block.clone()]);
        }
        let lines: [&[Pair]; ROWS] = std::array::from_fn(|row| &lines[row * pairs..][..pairs]);
        turn(packed.as_chunks_mut().0, lines);
    });
}

/// The rows of a matrix as columns of the right factor (`x Wᵀ`), or as they are (`dy W`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// A row of the matrix is a column of the factor.
    Transposed,
    /// A row of the matrix is one depth of the factor.
    Straight,
}

/// A matrix whose rows can be had as bf16 bits.
pub(super) trait Rows: Sync {
    /// The values in these columns of a row: borrowed where they are stored as such, else written to `room`, which is as
    /// long.
    fn bits<'a>(&'a self, row: usize, columns: Range<usize>, room: &'a mut [u16]) -> &'a [u16];
}

/// A matrix as the right factor.
pub(super) struct Sided<'a, R>(pub(super) &'a R, pub(super) Side);

impl<R: Rows> Right for Sided<'_, R> {
    fn pack(&self, panels: &mut [[Pair; COLUMNS]], depths: Range<usize>, columns: Range<usize>) {
        let Self(matrix, side) = self;
        let pairs = depths.len().div_ceil(2);
        if pairs == 0 {
            return;
        }
        match side {
            Side::Transposed => {
                let mut room = [0; 2 * BLOCK_PAIRS];
                for (at, row) in columns.enumerate() {
                    let room = &mut room[..depths.len()];
                    let panel = &mut panels[at / COLUMNS * pairs..];
                    spread(panel, at % COLUMNS, matrix.bits(row, depths.clone(), room));
                }
            }
            Side::Straight => {
                let mut room = [[0; MOST_PANELS * COLUMNS]; 2];
                let [first_room, second_room] =
                    room.each_mut().map(|room| &mut room[..columns.len()]);
                for (pair, row) in depths.clone().step_by(2).enumerate() {
                    let first = matrix.bits(row, columns.clone(), &mut *first_room);
                    let second = match row + 1 < depths.end {
                        true => matrix.bits(row + 1, columns.clone(), &mut *second_room),
                        false => {
                            second_room.fill(0);
                            &*second_room
                        }
                    };
                    let values = first.chunks(COLUMNS).zip(second.chunks(COLUMNS));
                    for (panel, (first, second)) in values.enumerate() {
                        interleave(&mut panels[panel * pairs + pair], first, second);
                    }
                }
            }
        }
    }
}

/// Column `at` of the pairs: `values` two by two.
fn spread(pairs: &mut [[Pair; COLUMNS]], at: usize, values: &[u16]) {
    let (twos, rest) = values.as_chunks::<2>();
    for (pairs, &[first, second]) in pairs.iter_mut().zip(twos) {
        pairs[at] = f32::from_bits(u32::from(first) | u32::from(second) << 16);
    }
    if let ([last], Some(pairs)) = (rest, pairs.get_mut(twos.len())) {
        pairs[at] = f32::from_bits(u32::from(*last));
    }
}

vectorised! {
    /// Values two by two; a last one alone is paired with zero.
    fn pair_up(pairs: &mut [Pair], values: &[f32]) {
        let (twos, rest) = values.as_chunks::<2>();
        for (pair_of, &[first, second]) in pairs.iter_mut().zip(twos) {
            *pair_of = pair(first, second);
        }
        if let ([last], Some(pair_of)) = (rest, pairs.get_mut(twos.len())) {
            *pair_of = pair(*last, 0.0);
        }
    }

    /// Eight lines side by side.
    fn turn(packed: &mut [[Pair; ROWS]], lines: [&[Pair]; ROWS]) {
        for (at, packed) in packed.iter_mut().enumerate() {
            *packed = std::array::from_fn(|row| lines[row][at]);
        }
    }

    /// Each value of one row with that below it.
    fn interleave(pairs: &mut [Pair], first: &[u16], second: &[u16]) {
        for ((pair_of, &first), &second) in pairs.iter_mut().zip(first).zip(second) {
            *pair_of = f32::from_bits(u32::from(first) | u32::from(second) << 16);
        }
    }

    /// The nearest bf16 of each value.
    pub(super) fn round(bits: &mut [u16], values: &[f32]) {
        for (bits, &value) in bits.iter_mut().zip(values) {
            *bits = rounded(value) as u16;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, check_threads, random};

    fn values(seed: u64, length: usize) -> Vec<f32> {
        random(seed, &[length]).to_vec1().expect("f32 values")
    }

    struct Matrix(Vec<f32>, usize);

    impl Rows for Matrix {
        fn bits<'a>(&'a self, row: usize, columns: Range<usize>, room: &'a mut [u16]) -> &'a [u16] {
            round(room, &self.0[row * self.1..][columns]);
            room
        }
    }

    fn nearest(value: f32) -> f64 {
        half::bf16::from_f32(value).to_f64()
    }

    const SHAPES: [(usize, usize, usize); 7] = [
        (1, 1, 1),
        (3, 7, 5),
        (8, 48, 1024),
        (9, 49, 1025),
        (33, 300, 2050),
        (70, 10, 64),
        (5, 97, 0),
    ];

    #[test]
    fn products_equal_those_of_rounded_factors() {
        for (rows, columns, depth) in SHAPES {
            let (a, b) = (values(1, rows * depth), values(2, depth * columns));
            let at = |row: usize, column: usize| -> f32 {
                let products = (0..depth)
                    .map(|k| nearest(a[row * depth + k]) * nearest(b[k * columns + column]));
                products.sum::<f64>() as f32
            };
            let wanted: Vec<f32> = (0..rows)
                .flat_map(|row| (0..columns).map(move |column| (row, column)))
                .map(|(row, column)| at(row, column))
                .collect();
            let turned = (0..columns)
                .flat_map(|column| (0..depth).map(move |k| (k, column)))
                .map(|(k, column)| b[k * columns + column])
                .collect();
            let straight = Matrix(b.clone(), columns);
            let turned = Matrix(turned, depth);
            let left = Packed::new(&a, rows, depth, depth);
            for right in [
                Sided(&straight, Side::Straight),
                Sided(&turned, Side::Transposed),
            ] {
                let mut c = vec![f32::NAN; rows * columns];
                let terms: [(&Packed, &dyn Right); 1] = [(&left, &right)];
                multiply(
                    MatrixMut::new(&mut c, rows, columns),
                    Destination::Overwrite,
                    &terms,
                );
                assert_close("product", &c, &wanted, 1e-5);
                let terms: [(&Packed, &dyn Right); 2] = [(&left, &right), (&left, &right)];
                multiply(
                    MatrixMut::new(&mut c, rows, columns),
                    Destination::Add,
                    &terms,
                );
                let thrice: Vec<f32> = wanted.iter().map(|value| 3.0 * value).collect();
                assert_close("two more", &c, &thrice, 1e-5);
            }
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let (rows, columns, depth) = (67, 500, 1100);
        let (a, b) = (values(1, rows * depth), values(2, depth * columns));
        let right = Matrix(b, columns);
        check_threads(|| {
            let left = Packed::new(&a, rows, depth, depth);
            let mut c = vec![0.0; rows * columns];
            let right = Sided(&right, Side::Straight);
            multiply(
                MatrixMut::new(&mut c, rows, columns),
                Destination::Overwrite,
                &[(&left, &right)],
            );
            c.into_iter().map(f32::to_bits).collect()
        });
    }

    #[test]
    fn not_a_number_stays_one() {
        for (a, b) in [(f32::NAN, 1.0), (1.0, -f32::NAN), (f32::INFINITY, 0.0)] {
            let left = Packed::new(&[a, 2.0], 1, 2, 2);
            let right = Matrix(vec![b, 3.0], 1);
            let mut c = [0.0];
            multiply(
                MatrixMut::new(&mut c, 1, 1),
                Destination::Overwrite,
                &[(&left, &Sided(&right, Side::Straight))],
            );
            assert!(c[0].is_nan(), "{a} times {b}");
        }
    }
}
