//! A matrix of few rows: a factor of a low-rank update, laid out for products with long rows.
//!
//! A general product packs both sides first, which costs more than these products themselves.

use super::kernels::add_assign;
use super::lanes::{Lanes, WIDTH};
use super::vectorised::vectorised;
use std::array;

/// Rows that are worked on together: with so many a product is bound by arithmetic, not by loads and stores.
const GROUP: usize = 8;
/// Columns of a stretch that stays in the first-level cache with a group of rows on both sides.
const STRETCH: usize = 448;

/// A `(rank, columns)` matrix with rows of zeros up to a whole group.
#[derive(Clone)]
pub(super) struct ThinMatrix {
    rank: usize,
    columns: usize,
    /// `(padded_rank, columns)`
    values: Vec<f32>,
}

impl ThinMatrix {
    pub(super) fn zeros(rank: usize, columns: usize) -> Self {
        let values = vec![0.0; rank.next_multiple_of(GROUP) * columns];
        Self {
            rank,
            columns,
            values,
        }
    }

    pub(super) fn zeros_like(&self) -> Self {
        Self::zeros(self.rank, self.columns)
    }

    /// From `(rank, columns)` values.
    pub(super) fn from_rows(values: &[f32], rank: usize, columns: usize) -> Self {
        let mut matrix = Self::zeros(rank, columns);
        matrix.values[..values.len()].copy_from_slice(values);
        matrix
    }

    /// From `(columns, rank)` values.
    pub(super) fn from_columns(values: &[f32], rank: usize, columns: usize) -> Self {
        let mut matrix = Self::zeros(rank, columns);
        for (column, values) in values.chunks_exact(rank.max(1)).enumerate() {
            for (row, &value) in values.iter().enumerate() {
                matrix.values[row * columns + column] = value;
            }
        }
        matrix
    }

    /// Its values times `scale`, `(rank, columns)`.
    pub(super) fn to_rows(&self, scale: f32) -> Vec<f32> {
        let values = &self.values[..self.rank * self.columns];
        values.iter().map(|value| scale * value).collect()
    }

    /// Its values times `scale`, `(columns, rank)`.
    pub(super) fn to_columns(&self, scale: f32) -> Vec<f32> {
        let places =
            (0..self.columns).flat_map(|column| (0..self.rank).map(move |row| (row, column)));
        places
            .map(|(row, column)| scale * self.values[row * self.columns + column])
            .collect()
    }

    /// Its rows, without those that are zeros.
    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    /// The rank rounded up to whole groups: the length of what is multiplied with it.
    pub(super) fn padded_rank(&self) -> usize {
        self.rank.next_multiple_of(GROUP)
    }

    /// `products = self · row`.
    pub(super) fn dot(&self, row: &[f32], products: &mut [f32]) {
        for (products, rows) in products.as_chunks_mut().0.iter_mut().zip(self.groups()) {
            *products = dot(row, rows);
        }
    }

    /// `row += factorsᵀ · self`.
    pub(super) fn add_to(&self, row: &mut [f32], factors: &[f32]) {
        for (factors, rows) in factors.as_chunks().0.iter().zip(self.groups()) {
            add_products(row, factors, rows);
        }
    }

    /// `self += coefficientsᵀ · rows`, with `padded_rank` coefficients for each of the rows.
    pub(super) fn add_outer(&mut self, coefficients: &[f32], rows: &[f32]) {
        let (rank, columns) = (self.padded_rank(), self.columns);
        let count = rows.len() / columns.max(1);
        for start in (0..columns).step_by(STRETCH) {
            let stretch = start..(start + STRETCH).min(columns);
            for first in (0..count).step_by(GROUP) {
                // past the last row the last is taken again, with the factor 0
                let row = |i: usize| &rows[(first + i).min(count - 1) * columns..][stretch.clone()];
                let group = array::from_fn(row);
                for r in 0..rank {
                    let coefficient = |i: usize| match first + i < count {
                        true => coefficients[(first + i) * rank + r],
                        false => 0.0,
                    };
                    let target = &mut self.values[r * columns..][stretch.clone()];
                    add_products(target, &array::from_fn(coefficient), group);
                }
            }
        }
    }

    /// `self += other`.
    pub(super) fn add(&mut self, other: &Self) {
        add_assign(&mut self.values, &other.values);
    }

    /// Its rows, a group at a time.
    fn groups(&self) -> impl Iterator<Item = [&[f32]; GROUP]> {
        let columns = self.columns;
        let groups = self.values.chunks_exact((GROUP * columns).max(1));
        groups.map(move |group| array::from_fn(|i| &group[i * columns..(i + 1) * columns]))
    }
}

/// The products of `row` with each of four rows: zipped, because an index would be checked for every vector, and without
/// closures, which would not be compiled for the wide vectors.
#[inline(always)]
fn dot_four<V: Lanes>(row: &[f32], rows: [&[f32]; 4]) -> [f32; 4] {
    let (vectors, tail) = row.as_chunks::<WIDTH>();
    let [r0, r1, r2, r3] = rows;
    let (r0, tail0) = r0[..row.len()].as_chunks::<WIDTH>();
    let (r1, tail1) = r1[..row.len()].as_chunks::<WIDTH>();
    let (r2, tail2) = r2[..row.len()].as_chunks::<WIDTH>();
    let (r3, tail3) = r3[..row.len()].as_chunks::<WIDTH>();
    let (mut s0, mut s1, mut s2, mut s3) =
        (V::splat(0.0), V::splat(0.0), V::splat(0.0), V::splat(0.0));
    for ((((row, r0), r1), r2), r3) in vectors.iter().zip(r0).zip(r1).zip(r2).zip(r3) {
        let row = V::load(row);
        s0 = row.mul_add(V::load(r0), s0);
        s1 = row.mul_add(V::load(r1), s1);
        s2 = row.mul_add(V::load(r2), s2);
        s3 = row.mul_add(V::load(r3), s3);
    }
    let mut sums = [s0.sum(), s1.sum(), s2.sum(), s3.sum()];
    for ((((row, r0), r1), r2), r3) in tail.iter().zip(tail0).zip(tail1).zip(tail2).zip(tail3) {
        sums[0] += row * r0;
        sums[1] += row * r1;
        sums[2] += row * r2;
        sums[3] += row * r3;
    }
    sums
}

vectorised! {
    /// The products of `row` with each of the rows.
    fn dot(row: &[f32], rows: [&[f32]; GROUP]) -> [f32; GROUP] {
        let [r0, r1, r2, r3, r4, r5, r6, r7] = rows;
        let [p0, p1, p2, p3] = dot_four::<V>(row, [r0, r1, r2, r3]);
        let [p4, p5, p6, p7] = dot_four::<V>(row, [r4, r5, r6, r7]);
        [p0, p1, p2, p3, p4, p5, p6, p7]
    }

    /// `target += Σ factors[i] · rows[i]`.
    fn add_products(target: &mut [f32], factors: &[f32; GROUP], rows: [&[f32]; GROUP]) {
        let length = target.len();
        let [r0, r1, r2, r3, r4, r5, r6, r7] = rows.map(|row| &row[..length]);
        let [f0, f1, f2, f3, f4, f5, f6, f7] = *factors;
        for i in 0..length {
            let sum = f0.mul_add(r0[i], target[i]);
            let sum = f1.mul_add(r1[i], sum);
            let sum = f2.mul_add(r2[i], sum);
            let sum = f3.mul_add(r3[i], sum);
            let sum = f4.mul_add(r4[i], sum);
            let sum = f5.mul_add(r5[i], sum);
            let sum = f6.mul_add(r6[i], sum);
            target[i] = f7.mul_add(r7[i], sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};

    fn values(seed: u64, length: usize) -> Vec<f32> {
        random(seed, &[length]).to_vec1().expect("f32 values")
    }

    #[test]
    fn its_products_are_right() {
        for (rank, columns) in [(1, 1), (1, 16), (8, 5), (3, 33), (17, 100)] {
            let a = values(1, rank * columns);
            let matrix = ThinMatrix::from_rows(&a, rank, columns);
            assert_eq!(matrix.to_rows(1.0), a);
            let turned = matrix.to_columns(1.0);
            assert_eq!(
                ThinMatrix::from_columns(&turned, rank, columns).to_rows(1.0),
                a
            );

            let mut factors = values(2, 2 * matrix.padded_rank());
            let rows = values(3, 2 * columns);
            let mut products = vec![f32::NAN; matrix.padded_rank()];
            matrix.dot(&rows[..columns], &mut products);
            let wanted: Vec<f32> = a
                .chunks(columns)
                .map(|a| a.iter().zip(&rows).map(|(a, b)| a * b).sum())
                .collect();
            assert_close("dot", &products[..rank], &wanted, 1e-6);

            let mut sum = rows[..columns].to_vec();
            matrix.add_to(&mut sum, &factors[..matrix.padded_rank()]);
            let wanted: Vec<f32> = (0..columns)
                .map(|c| {
                    rows[c]
                        + (0..rank)
                            .map(|r| factors[r] * a[r * columns + c])
                            .sum::<f32>()
                })
                .collect();
            assert_close("add_to", &sum, &wanted, 1e-6);

            let mut outer = matrix.clone();
            outer.add_outer(&factors, &rows);
            let second = factors.split_off(matrix.padded_rank());
            let wanted: Vec<f32> = (0..rank * columns)
                .map(|i| (i / columns, i % columns))
                .map(|(r, c)| {
                    a[r * columns + c] + factors[r] * rows[c] + second[r] * rows[columns + c]
                })
                .collect();
            assert_close("add_outer", &outer.to_rows(1.0), &wanted, 1e-6);
            outer.add(&matrix);
            let wanted: Vec<f32> = wanted
                .iter()
                .zip(&a)
                .map(|(sum, a)| 2.0 * (sum + a))
                .collect();
            assert_close("add", &outer.to_rows(2.0), &wanted, 1e-6);
        }
    }
}
