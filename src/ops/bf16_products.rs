//! Products of bf16 factors with f32 sums: twice as fast as f32 where the machine has them (AVX-512 BF16).
//!
//! Both factors are packed in pairs along the depth of the sum, which is what the instruction multiplies: the left one
//! whole, eight rows side by side, the right one 48 columns at a time by the task that needs them. Tasks follow from the
//! shape alone, and each adds up in order of depth, so the bits do not depend on the number of threads.

use super::bf16_tile::{self, COLUMNS, Pair, ROWS, Tile, pair, rounded};
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
                .par_chunks_mut(panel_pairs)
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
    /// Writes, for each pair of the given depths (the last may lack its second), that of each of the given columns.
    /// `pairs` holds zeros where there are fewer than 48 columns.
    fn pack(&self, pairs: &mut [[Pair; COLUMNS]], depths: Range<usize>, columns: Range<usize>);
}

/// `c = Σ aᵢ bᵢ` or `c += Σ aᵢ bᵢ` over the given terms, on all threads.
pub(super) fn multiply(
    c: MatrixMut<'_>,
    destination: Destination,
    terms: &[(&Packed, &dyn Right)],
) {
    let rows = c.row_count();
    let columns = c.column_count();
    let parts: Vec<(usize, MatrixMut<'_>)> = c
        .column_parts(COLUMNS)
        .into_iter()
        .enumerate()
        .map(|(panel, part)| (panel * COLUMNS, part))
        .collect();
    parts.into_par_iter().for_each(|(first, mut part)| {
        let wanted = first..(first + COLUMNS).min(columns);
        let mut add = destination == Destination::Add;
        with_scratch(BLOCK_PAIRS * COLUMNS, |scratch| {
            for (left, right) in terms {
                for block in blocks(left.depth) {
                    let packed = &mut scratch.as_chunks_mut().0[..block.len().div_ceil(2)];
                    if wanted.len() < COLUMNS {
                        packed.as_flattened_mut().fill(0.0);
                    }
                    right.pack(packed, block.clone(), wanted.clone());
                    for panel in 0..left.row_panels {
                        let rows = panel * ROWS..((panel + 1) * ROWS).min(rows);
                        add_tile(&mut part, rows, add, left.panel(panel, &block), packed);
                    }
                    add = true;
                }
            }
        });
    });
}

/// One tile of `c`, of whatever size is left of it.
fn add_tile(
    c: &mut MatrixMut<'_>,
    rows: Range<usize>,
    add: bool,
    a: &[[Pair; ROWS]],
    b: &[[Pair; COLUMNS]],
) {
    let mut tile: Tile = [[0.0; COLUMNS]; ROWS];
    let columns = c.column_count();
    if add {
        for (row, tile) in rows.clone().zip(&mut tile) {
            tile[..columns].copy_from_slice(c.row(row));
        }
    }
    bf16_tile::multiply(&mut tile, a, b);
    for (row, tile) in rows.zip(&tile) {
        c.row(row).copy_from_slice(&tile[..columns]);
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
    let mut lines = [[0.0; BLOCK_PAIRS]; ROWS];
    for (line, row) in lines.iter_mut().zip(rows) {
        pair_up(line, &values[row * stride..][block.clone()]);
    }
    let packed: &mut [[Pair; ROWS]] = packed.as_chunks_mut().0;
    for (at, packed) in packed.iter_mut().enumerate() {
        *packed = std::array::from_fn(|row| lines[row][at]);
    }
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
    fn pack(&self, pairs: &mut [[Pair; COLUMNS]], depths: Range<usize>, columns: Range<usize>) {
        let Self(matrix, side) = self;
        match side {
            Side::Transposed => {
                let mut room = [0; 2 * BLOCK_PAIRS];
                for (at, row) in columns.enumerate() {
                    let room = &mut room[..depths.len()];
                    spread(pairs, at, matrix.bits(row, depths.clone(), room));
                }
            }
            Side::Straight => {
                let (mut first_room, mut second_room) = ([0; COLUMNS], [0; COLUMNS]);
                let count = columns.len();
                for (pairs, row) in pairs.iter_mut().zip(depths.clone().step_by(2)) {
                    let first = matrix.bits(row, columns.clone(), &mut first_room[..count]);
                    let second = match row + 1 < depths.end {
                        true => matrix.bits(row + 1, columns.clone(), &mut second_room[..count]),
                        false => {
                            second_room.fill(0);
                            &second_room[..count]
                        }
                    };
                    interleave(&mut pairs[..count], first, second);
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
    if let ([last], Some(pairs)) = (rest, pairs.last_mut()) {
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
