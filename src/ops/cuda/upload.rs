//! Weights on their way from a file to the device.

use super::memory::{Number, Output};
use crate::Result;
use crate::ops::frozen_weight::Values;
use candle_core::{CudaDevice, DType};
use half::{bf16, f16};
use rayon::prelude::*;

/// Values that are converted at a time: at most 32 MiB in main memory.
const PIECE: usize = 8 << 20;
/// Values that one task converts.
const TASK_VALUES: usize = 1 << 15;

/// `length` values of a weight on the device as `dtype`, f32 or bf16.
pub(in crate::ops) fn upload_weight(
    device: &CudaDevice,
    values: &Values,
    length: usize,
    dtype: DType,
) -> Result<Output> {
    let mut output = Output::new(device, length, dtype)?;
    match (values, dtype) {
        (Values::F32(values), DType::F32) => output.write(0, &values[..length])?,
        (Values::BF16(values), DType::BF16) => output.write(0, &values[..length])?,
        (Values::F32(values), _) => convert(&mut output, values, bf16::from_f32)?,
        (Values::F16(values), DType::F32) => convert(&mut output, values, f16::to_f32)?,
        (Values::F16(values), _) => {
            convert(&mut output, values, |value| bf16::from_f32(value.to_f32()))?;
        }
        (Values::BF16(values), _) => convert(&mut output, values, bf16::to_f32)?,
    }
    Ok(output)
}

/// Writes what `convert` makes of the values, piece by piece.
fn convert<Stored: Copy + Sync, Wanted: Number + Send>(
    output: &mut Output,
    values: &[Stored],
    convert: impl Fn(Stored) -> Wanted + Sync,
) -> Result<()> {
    let mut converted: Vec<Wanted> = Vec::with_capacity(PIECE.min(values.len()));
    for (index, piece) in values.chunks(PIECE).enumerate() {
        piece
            .par_iter()
            .with_min_len(TASK_VALUES)
            .map(|value| convert(*value))
            .collect_into_vec(&mut converted);
        output.write(index * PIECE, &converted)?;
    }
    Ok(())
}
