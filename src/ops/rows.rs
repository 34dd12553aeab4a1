//! Rows spread over threads, and sums over them.

use super::kernels::add_assign;
use rayon::prelude::*;

/// Values of the rows that one task works on.
const TASK_VALUES: usize = 1 << 15;

/// Values of one task: whole rows of `features`.
pub(super) fn task_values(features: usize) -> usize {
    (TASK_VALUES / features).max(1) * features
}

/// `columns` sums: what `add` makes of the rows of each task, added up in the order of the tasks.
pub(super) fn sum_tasks<Rows: Send>(
    tasks: impl ParallelIterator<Item = Rows>,
    columns: usize,
    add: impl Fn(&mut [f32], Rows) + Sync,
) -> Vec<f32> {
    let partial: Vec<Vec<f32>> = tasks
        .map(|rows| {
            let mut sums = vec![0f32; columns];
            add(&mut sums, rows);
            sums
        })
        .collect();
    let mut sums = vec![0f32; columns];
    for part in partial {
        add_assign(&mut sums, &part);
    }
    sums
}
