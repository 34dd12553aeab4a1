//! A matrix of few rows: a factor of a low-rank update, laid out for products with long rows.
//!
//! A general product packs both sides first, which costs more than these products themselves.

use super::vectorised::vectorised;

/// Rows of a panel: with so many accumulators a product is bound by arithmetic, not by loads.
const GROUP: usize = 8;
/// Columns of a panel: an AVX-512 register.
const WIDTH: usize = 16;

/// Values next to each other, row after row.
type Panel = [[f32; WIDTH]; GROUP];

/// A `(rank, columns)` matrix in panels, zeros where it does not fill them.
#[derive(Clone)]
pub(super) struct ThinMatrix {
    rank: usize,
    columns: usize,
    /// Those of the first eight rows from left to right, then those of the next.
    panels: Vec<Panel>,
}

impl ThinMatrix {
    pub(super) fn zeros(rank: usize, columns: usize) -> Self {
        let count = rank.div_ceil(GROUP) * columns.div_ceil(WIDTH);
        Self {
            rank,
            columns,
            panels: vec![[[0.0; WIDTH]; GROUP]; count],
        }
    }

    pub(super) fn zeros_like(&self) -> Self {
        Self::zeros(self.rank, self.columns)
    }

    /// From `(rank, columns)` values.
    pub(super) fn from_rows(values: &[f32], rank: usize, columns: usize) -> Self {
        let mut matrix = Self::zeros(rank, columns);
        for (row, values) in values.chunks_exact(columns.max(1)).enumerate() {
            for (column, &value) in values.iter().enumerate() {
                *matrix.at(row, column) = value;
            }
        }
        matrix
    }

    /// From `(columns, rank)` values.
    pub(super) fn from_columns(values: &[f32], rank: usize, columns: usize) -> Self {
        let mut matrix = Self::zeros(rank, columns);
        for (column, values) in values.chunks_exact(rank.max(1)).enumerate() {
            for (row, &value) in values.iter().enumerate() {
                *matrix.at(row, column) = value;
            }
        }
        matrix
    }

    /// Its values times `scale`, `(rank, columns)`.
    pub(super) fn to_rows(mut self, scale: f32) -> Vec<f32> {
        let (rank, columns) = (self.rank, self.columns);
        let places = (0..rank).flat_map(|row| (0..columns).map(move |column| (row, column)));
        places
            .map(|(row, column)| scale * *self.at(row, column))
            .collect()
    }

    /// Its values times `scale`, `(columns, rank)`.
    pub(super) fn to_columns(mut self, scale: f32) -> Vec<f32> {
        let (rank, columns) = (self.rank, self.columns);
        let places = (0..columns).flat_map(|column| (0..rank).map(move |row| (row, column)));
        places
            .map(|(row, column)| scale * *self.at(row, column))
            .collect()
    }

    /// The rank rounded up to whole panels: the length of what is multiplied with it.
    pub(super) fn padded_rank(&self) -> usize {
        self.rank.next_multiple_of(GROUP)
    }

    /// `products = self · row`.
    pub(super) fn dot(&self, row: &[f32], products: &mut [f32]) {
        for (products, panels) in products.as_chunks_mut().0.iter_mut().zip(self.groups()) {
            *products = dot(row, panels);
        }
    }

    /// `row += factorsᵀ · self`.
    pub(super) fn add_to(&self, row: &mut [f32], factors: &[f32]) {
        for (factors, panels) in factors.as_chunks().0.iter().zip(self.groups()) {
            add_products(row, factors, panels);
        }
    }

    /// `self += coefficientsᵀ · rows`, with `padded_rank` coefficients for each of the rows.
    pub(super) fn add_outer(&mut self, coefficients: &[f32], rows: &[f32]) {
        let (rank, columns) = (self.padded_rank(), self.columns);
        for (group, panels) in self
            .panels
            .chunks_exact_mut(columns.div_ceil(WIDTH).max(1))
            .enumerate()
        {
            add_outer(panels, coefficients, group * GROUP, rank, rows, columns);
        }
    }

    /// `self += other`.
    pub(super) fn add(&mut self, other: &Self) {
        for (panel, other) in self.panels.iter_mut().zip(&other.panels) {
            super::kernels::add_assign(panel.as_flattened_mut(), other.as_flattened());
        }
    }

    fn groups(&self) -> impl Iterator<Item = &[Panel]> {
        self.panels
            .chunks_exact(self.columns.div_ceil(WIDTH).max(1))
    }

    fn at(&mut self, row: usize, column: usize) -> &mut f32 {
        let panel = row / GROUP * self.columns.div_ceil(WIDTH) + column / WIDTH;
        &mut self.panels[panel][row % GROUP][column % WIDTH]
    }
}

/// A shorter row of values, zeros behind it.
#[inline(always)]
fn padded(values: &[f32]) -> [f32; WIDTH] {
    let mut padded = [0.0; WIDTH];
    padded[..values.len()].copy_from_slice(values);
    padded
}

/// `sums[r] += values · panel[r]`, lane by lane.
#[inline(always)]
fn add_lanes(sums: &mut Panel, values: &[f32; WIDTH], panel: &Panel) {
    for r in 0..GROUP {
        for lane in 0..WIDTH {
            sums[r][lane] = values[lane].mul_add(panel[r][lane], sums[r][lane]);
        }
    }
}

/// `values += Σ factors[r] · panel[r]`.
#[inline(always)]
fn add_panel(values: &mut [f32; WIDTH], factors: &[f32; GROUP], panel: &Panel) {
    for r in 0..GROUP {
        for lane in 0..WIDTH {
            values[lane] = factors[r].mul_add(panel[r][lane], values[lane]);
        }
    }
}

/// `sums[r] += coefficients[r] · values`.
#[inline(always)]
fn add_row(sums: &mut Panel, coefficients: &[f32; GROUP], values: &[f32; WIDTH]) {
    for r in 0..GROUP {
        for lane in 0..WIDTH {
            sums[r][lane] = coefficients[r].mul_add(values[lane], sums[r][lane]);
        }
    }
}

vectorised! {
    fn dot(row: &[f32], panels: &[Panel]) -> [f32; GROUP] {
        let mut sums = [[0f32; WIDTH]; GROUP];
        let (vectors, tail) = row.as_chunks::<WIDTH>();
        for (values, panel) in vectors.iter().zip(panels) {
            add_lanes(&mut sums, values, panel);
        }
        if let Some(panel) = panels.get(vectors.len()) {
            add_lanes(&mut sums, &padded(tail), panel);
        }
        sums.map(|sums| sums.iter().sum())
    }

    fn add_products(row: &mut [f32], factors: &[f32; GROUP], panels: &[Panel]) {
        let (vectors, tail) = row.as_chunks_mut::<WIDTH>();
        let count = vectors.len();
        for (values, panel) in vectors.iter_mut().zip(panels) {
            add_panel(values, factors, panel);
        }
        if let Some(panel) = panels.get(count) {
            let mut values = padded(tail);
            add_panel(&mut values, factors, panel);
            tail.copy_from_slice(&values[..tail.len()]);
        }
    }

    fn add_outer(
        panels: &mut [Panel],
        coefficients: &[f32],
        first: usize,
        rank: usize,
        rows: &[f32],
        columns: usize,
    ) {
        for (panel, start) in panels.iter_mut().zip((0..columns).step_by(WIDTH)) {
            let mut sums = *panel;
            let end = (start + WIDTH).min(columns);
            for (row, coefficients) in rows.chunks_exact(columns).zip(coefficients.chunks_exact(rank)) {
                let Some(coefficients) = coefficients[first..].first_chunk() else { continue };
                match row[start..end].first_chunk() {
                    Some(values) => add_row(&mut sums, coefficients, values),
                    None => add_row(&mut sums, coefficients, &padded(&row[start..end])),
                }
            }
            *panel = sums;
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
            assert_eq!(matrix.clone().to_rows(1.0), a);
            let turned = matrix.clone().to_columns(1.0);
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
            assert_close("add_outer", &outer.clone().to_rows(1.0), &wanted, 1e-6);
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
