//! Memory that goes from one operation to the next without going back to the system.
//!
//! An activation is a few megabytes: asked of the system, each costs a page fault for every 4 KiB, which is more time than
//! what is computed in it. The backward pass knows when it has seen the last of a tensor, and [`recycle`]s it.

#[cfg(feature = "cuda")]
use super::cuda;
use super::floats::{Floats, expect_shape};
use super::gemm::Destination;
use super::kernels::add_assign;
use crate::{Error, Result};
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor, Var};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Shorter ones are left to the allocator, which keeps them anyway.
const SHORTEST: usize = 1 << 14;

static POOL: Mutex<Pool> = Mutex::new(Pool {
    free: BTreeMap::new(),
    pass: 0,
    step_began: 0,
    other_size: 0,
    rows: 0,
});

/// Free buffers.
struct Pool {
    /// By capacity, each with the pass in which it was last used.
    free: BTreeMap<usize, Vec<(u64, Vec<f32>)>>,
    pass: u64,
    /// The pass with which the step began.
    step_began: u64,
    /// The first of the latest passes that are all of about one size.
    other_size: u64,
    /// Rows of the latest pass.
    rows: usize,
}

impl Pool {
    /// One of at least this capacity. What is much longer is better kept for who needs it.
    ///
    /// If there is none, one that is a little too short makes room for the new one, for nobody will need both; else what is
    /// left of passes of another size.
    fn take(&mut self, wanted: usize) -> Option<Vec<f32>> {
        let first = |range: Option<(&usize, _)>| range.map(|(capacity, _)| *capacity);
        if let Some(capacity) = first(self.free.range(wanted..=wanted + wanted / 4).next()) {
            return self.remove(capacity);
        }
        match first(self.free.range(wanted / 2..wanted).next_back()) {
            Some(short) => drop(self.remove(short)),
            None => self.make_room(wanted),
        }
        None
    }

    /// Drops buffers that passes of another size left, from the shortest, until they are of this capacity together.
    fn make_room(&mut self, wanted: usize) {
        let mut dropped = 0;
        let other_size = self.other_size;
        self.free.retain(|capacity, buffers| {
            buffers.retain(|(used, _)| {
                let drops = dropped < wanted && *used < other_size;
                dropped += if drops { *capacity } else { 0 };
                !drops
            });
            !buffers.is_empty()
        });
    }

    /// Begins a pass of so many rows.
    fn begin_pass(&mut self, rows: usize) {
        self.pass += 1;
        let (least, most) = (rows.min(self.rows), rows.max(self.rows));
        if most > least + least / 4 {
            self.other_size = self.pass;
        }
        self.rows = rows;
    }

    fn remove(&mut self, capacity: usize) -> Option<Vec<f32>> {
        let buffers = self.free.get_mut(&capacity)?;
        let (_, buffer) = buffers.pop()?;
        if buffers.is_empty() {
            self.free.remove(&capacity);
        }
        Some(buffer)
    }

    fn give(&mut self, buffer: Vec<f32>) {
        let same = self.free.entry(buffer.capacity()).or_default();
        same.push((self.pass, buffer));
    }

    /// Drops what was not used in this step, and begins the next.
    fn release_unused(&mut self) {
        self.free.retain(|_, buffers| {
            buffers.retain(|(used, _)| *used >= self.step_began);
            !buffers.is_empty()
        });
        self.pass += 1;
        self.step_began = self.pass;
    }
}

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `length` floats that are left over from other uses.
pub(super) fn take(length: usize) -> Vec<f32> {
    if length < SHORTEST {
        return vec![0.0; length];
    }
    let wanted = capacity_for(length);
    let found = pool().take(wanted);
    let mut buffer = found.unwrap_or_else(|| vec![0.0; wanted]);
    buffer.resize(length, 0.0);
    buffer
}

/// As [`take`], all zeros.
pub(super) fn zeros(length: usize) -> Vec<f32> {
    let mut buffer = take(length);
    buffer.fill(0.0);
    buffer
}

/// Where a sum of gradients goes: onto `onto`, if there is one, else into a buffer of its own.
pub(super) fn sum(onto: Option<Tensor>, length: usize) -> Result<(Vec<f32>, Destination)> {
    let Some(onto) = onto else {
        return Ok((take(length), Destination::Overwrite));
    };
    let values = into_values(onto)?;
    if values.len() != length {
        return Err(Error::new(format!(
            "a gradient of {length} values cannot be added to one of {}",
            values.len()
        )));
    }
    Ok((values, Destination::Add))
}

/// Lengths that differ by little share a capacity, so that batches of about the same size share buffers.
fn capacity_for(length: usize) -> usize {
    let unit = (length.next_power_of_two() / 16).max(1);
    length.next_multiple_of(unit)
}

/// Keeps a buffer for the next one who needs it.
pub(super) fn give(buffer: Vec<f32>) {
    if buffer.capacity() < SHORTEST {
        return;
    }
    pool().give(buffer);
}

/// Ends the use of a tensor and of all that share its memory: the next operation writes there.
///
/// For f32 tensors in main memory that own it whole; others are dropped. A GPU's memory is pooled by its driver.
pub fn recycle(tensor: Tensor) {
    if !tensor.device().is_cpu() {
        return;
    }
    if let Ok(values) = into_values(tensor) {
        give(values);
    }
}

/// The values of an f32 tensor in main memory, without a copy: it, and what shares its memory, must not be used again.
pub(super) fn into_values(tensor: Tensor) -> Result<Vec<f32>> {
    exchange(&tensor, Vec::new())
}

/// The values of an f32 variable in main memory, to be written: they are back in their place when this is dropped.
pub(super) struct Lent<'a> {
    variable: &'a Var,
    values: Vec<f32>,
}

impl<'a> Lent<'a> {
    pub(super) fn of(variable: &'a Var) -> Result<Self> {
        let values = exchange(variable, Vec::new())?;
        Ok(Self { variable, values })
    }

    pub(super) fn values(&mut self) -> &mut [f32] {
        &mut self.values
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        let put_back = exchange(self.variable, values);
        debug_assert!(put_back.is_ok(), "they came from there");
    }
}

/// Puts `values` in the place of those of a tensor that owns its memory whole. One of both is empty.
fn exchange(tensor: &Tensor, values: Vec<f32>) -> Result<Vec<f32>> {
    let exchanged = Exchange(Mutex::new(values));
    tensor.inplace_op1(&exchanged)?;
    let values = exchanged.0.into_inner();
    Ok(values.unwrap_or_else(PoisonError::into_inner))
}

struct Exchange(Mutex<Vec<f32>>);

impl InplaceOp1 for Exchange {
    fn name(&self) -> &'static str {
        "taking the values"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(values), Some((0, end))) if end == values.len().max(held.len()) => {
                std::mem::swap(values, &mut held);
                Ok(())
            }
            _ => candle_core::bail!("a view, or not in f32"),
        }
    }
}

/// `onto + x`, in the memory of `onto`: it, and what shares its memory, must not be used again. Both have the same shape.
pub(crate) fn add_onto(onto: Tensor, x: &Tensor) -> Result<Tensor> {
    let shape = onto.shape().clone();
    expect_shape(
        "addition",
        "the second",
        x,
        shape.dims(),
        "the shape of the first",
    )?;
    #[cfg(feature = "cuda")]
    if onto.device().is_cuda() {
        return cuda::add_onto(onto, x);
    }
    let mut sum = into_values(onto)?;
    let x = x.contiguous()?;
    sum.par_chunks_mut(SHORTEST)
        .zip(Floats::of("addition", "the second", &x)?.par_chunks(SHORTEST))
        .for_each(|(sum, x)| add_assign(sum, x));
    Ok(Tensor::from_vec(sum, shape, &Device::Cpu)?)
}

/// Lets go of everything that is not in use: before work on batches of another size.
pub fn release_all() {
    pool().free.clear();
}

/// Begins a pass of so many rows. Where they are many more or fewer than before, buffers that are left over make room for
/// those that it needs.
pub fn begin_pass(rows: usize) {
    pool().begin_pass(rows);
}

/// Lets go of what nobody has used since the last call: to be called after each optimizer step.
pub fn release_unused() {
    pool().release_unused();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::random;

    #[test]
    fn lengths_that_differ_by_little_share_a_capacity() {
        assert_eq!(capacity_for(1 << 20), 1 << 20);
        assert_eq!(capacity_for(1_000_000), capacity_for(990_000));
        for length in [SHORTEST, 100_003, 1_000_001] {
            assert!((length..=length + length / 8).contains(&capacity_for(length)));
        }
    }

    fn empty() -> Pool {
        Pool {
            free: BTreeMap::new(),
            pass: 0,
            step_began: 0,
            other_size: 0,
            rows: 0,
        }
    }

    #[test]
    fn a_buffer_is_used_again_until_nobody_needs_it() {
        let mut pool = empty();
        pool.give(vec![7.0; 1000]);
        assert_eq!(pool.take(700), None);
        assert_eq!(pool.take(900), Some(vec![7.0; 1000]));
        assert_eq!(pool.take(900), None);
        pool.give(vec![7.0; 1000]);
        pool.release_unused();
        assert_eq!(pool.free.len(), 1);
        pool.release_unused();
        assert!(pool.free.is_empty());
    }

    #[test]
    fn what_passes_of_another_size_left_makes_room_and_what_others_left_does_not() {
        let mut pool = empty();
        let lengths = |pool: &Pool| pool.free.keys().copied().collect::<Vec<_>>();
        pool.begin_pass(80);
        for length in [100, 200, 1000] {
            pool.give(vec![7.0; length]);
        }
        for rows in [80, 100, 80] {
            pool.begin_pass(rows);
            assert_eq!(pool.take(500), None, "too long and too short");
            assert_eq!(lengths(&pool), [100, 200, 1000]);
        }
        pool.begin_pass(40);
        pool.give(vec![7.0; 150]);
        assert_eq!(pool.take(500), None);
        assert_eq!(lengths(&pool), [150]);
        assert_eq!(pool.take(170), None, "a little too short");
        assert_eq!(lengths(&pool), [0; 0]);
    }

    #[test]
    fn a_tensor_gives_its_values_if_it_owns_them_whole() -> Result<()> {
        assert_eq!(
            into_values(Tensor::new(&[1f32, 2.0], &Device::Cpu)?)?,
            [1.0, 2.0]
        );
        let matrix = random(1, &[3, 5]);
        assert!(into_values(matrix.t()?).is_err());
        assert!(into_values(matrix.narrow(0, 1, 2)?).is_err());
        Ok(())
    }
}
