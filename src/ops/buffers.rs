//! Memory that goes from one operation to the next without going back to the system.
//!
//! An activation is a few megabytes: asked of the system, each costs a page fault for every 4 KiB, which is more time than
//! what is computed in it. The backward pass knows when it has seen the last of a tensor, and [`recycle`]s it.

use super::floats::{Floats, expect_shape};
use super::gemm::Destination;
use super::kernels::add_assign;
use crate::{Error, Result};
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Shorter ones are left to the allocator, which keeps them anyway.
const SHORTEST: usize = 1 << 14;

/// Free buffers.
static POOL: Mutex<Pool> = Mutex::new(Pool {
    free: BTreeMap::new(),
    period: 0,
});

struct Pool {
    /// By capacity, each with the period in which it was last used.
    free: BTreeMap<usize, Vec<(u64, Vec<f32>)>>,
    period: u64,
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
    let found = {
        let free = &mut pool().free;
        // One that is much longer is better kept for what needs it.
        let capacity = free.range(wanted..=wanted + wanted / 4).next();
        capacity
            .map(|(capacity, _)| *capacity)
            .and_then(|capacity| {
                let buffers = free.get_mut(&capacity)?;
                let (_, buffer) = buffers.pop()?;
                if buffers.is_empty() {
                    free.remove(&capacity);
                }
                Some(buffer)
            })
    };
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
    let mut pool = pool();
    let period = pool.period;
    let same = pool.free.entry(buffer.capacity()).or_default();
    same.push((period, buffer));
}

/// Ends the use of a tensor and of all that share its memory: the next operation writes there.
///
/// For f32 tensors in main memory that own it whole; others are dropped.
pub fn recycle(tensor: Tensor) {
    if let Ok(values) = into_values(tensor) {
        give(values);
    }
}

/// The values of an f32 tensor in main memory, without a copy: it, and what shares its memory, must not be used again.
pub(super) fn into_values(tensor: Tensor) -> Result<Vec<f32>> {
    let taken = Taken(Mutex::new(Vec::new()));
    tensor.inplace_op1(&taken)?;
    let values = taken.0.into_inner();
    Ok(values.unwrap_or_else(PoisonError::into_inner))
}

struct Taken(Mutex<Vec<f32>>);

impl InplaceOp1 for Taken {
    fn name(&self) -> &'static str {
        "taking the values"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(values), Some((0, end))) if end == values.len() => {
                *self.0.lock().unwrap_or_else(PoisonError::into_inner) = std::mem::take(values);
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
    let mut sum = into_values(onto)?;
    let x = x.contiguous()?;
    sum.par_chunks_mut(SHORTEST)
        .zip(Floats::of("addition", "the second", &x)?.par_chunks(SHORTEST))
        .for_each(|(sum, x)| add_assign(sum, x));
    Ok(Tensor::from_vec(sum, shape, &Device::Cpu)?)
}

/// Lets go of what nobody has used since the last call: to be called after each optimizer step.
pub fn release_unused() {
    let mut pool = pool();
    let period = pool.period;
    pool.free.retain(|_, buffers| {
        buffers.retain(|(used, _)| *used >= period);
        !buffers.is_empty()
    });
    pool.period += 1;
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

    #[test]
    fn a_tensor_gives_its_memory() -> Result<()> {
        // A length that no other test takes.
        const LENGTH: usize = 777_777;
        let tensor = Tensor::from_vec(take(LENGTH), LENGTH, &candle_core::Device::Cpu)?;
        let place = into_values(tensor.clone())?.as_ptr();
        let tensor = Tensor::from_vec(take(LENGTH), LENGTH, &candle_core::Device::Cpu)?;
        assert!(!place.is_null());
        recycle(tensor);
        assert_eq!(take(LENGTH).len(), LENGTH);
        assert!(into_values(random(1, &[3, 5]).t()?).is_err());
        Ok(())
    }
}
