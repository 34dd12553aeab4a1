//! Numbers on their way to the device, through memory that it reads by itself: the host goes on while they are copied.

use super::device::{HostMemory, driver_error};
use super::memory::{Number, Output};
use crate::Result;
use crate::ops::frozen_weight::Values;
use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use candle_core::{CudaDevice, DType, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use std::collections::HashMap;
use std::convert::identity;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// Words of a piece: 1 MiB, next to which the beginning of a copy costs nothing.
pub(super) const PIECE_WORDS: usize = 1 << 17;
/// Pieces of a ring, 32 MiB in all: some passes' worth of ids and tables, or the weights of which most are on their way
/// while the next ones are read.
pub(super) const PIECES: usize = 32;
/// Values that one task writes.
const TASK_VALUES: usize = 1 << 15;

/// Pieces of memory that are used in turn. Each is written again only when the device has read it: the host waits if it
/// is a whole ring ahead.
struct Ring {
    stream: Arc<CudaStream>,
    memory: HostMemory,
    /// Of each piece: that its last copy is done.
    copied: Vec<CudaEvent>,
    next: usize,
}

impl Ring {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let memory = HostMemory::new(context, PIECES * PIECE_WORDS);
        let copied = (0..PIECES)
            .map(|_| context.new_event(None).map_err(driver_error))
            .collect::<Result<_>>()?;
        Ok(Self {
            memory,
            copied,
            next: 0,
            stream,
        })
    }

    /// Has `write` put `length` numbers into the next piece, from where they go to the place `start` on of `output`.
    fn send<T: Number>(
        &mut self,
        output: &mut Output,
        start: usize,
        length: usize,
        write: impl FnOnce(&mut [T]),
    ) -> Result<()> {
        let copied = &self.copied[self.next];
        copied.synchronize().map_err(driver_error)?;
        let first = self.next * PIECE_WORDS;
        let words = first..first + PIECE_WORDS;
        let piece = self.memory.numbers::<T>(words, length)?;
        write(piece);
        output.write(start, piece)?;
        copied.record(&self.stream).map_err(driver_error)?;
        self.next = (self.next + 1) % PIECES;
        Ok(())
    }
}

/// What it has sent may still have to be read.
impl Drop for Ring {
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
    }
}

/// The rings that nobody uses at the moment. There is one for each device, or more where several threads upload at once.
static RINGS: LazyLock<Mutex<HashMap<DeviceId, Vec<Ring>>>> = LazyLock::new(Mutex::default);

fn rings() -> MutexGuard<'static, HashMap<DeviceId, Vec<Ring>>> {
    RINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes what `convert` makes of `values` to `output`, without waiting for it to be there.
fn send_all<Stored: Copy + Sync, Wanted: Number>(
    device: &CudaDevice,
    output: &mut Output,
    values: &[Stored],
    convert: impl Fn(Stored) -> Wanted + Sync,
) -> Result<()> {
    let piece = PIECE_WORDS * size_of::<u64>() / size_of::<Wanted>();
    let free = rings().get_mut(&device.id()).and_then(Vec::pop);
    let mut ring = match free {
        Some(ring) => ring,
        None => Ring::new(device)?,
    };
    for (index, values) in values.chunks(piece).enumerate() {
        let start = index * piece;
        let write = |piece: &mut [Wanted]| write(piece, values, &convert);
        ring.send(output, start, values.len(), write)?;
    }
    rings().entry(device.id()).or_default().push(ring);
    Ok(())
}

fn write<Stored: Copy + Sync, Wanted: Number>(
    piece: &mut [Wanted],
    values: &[Stored],
    convert: &(impl Fn(Stored) -> Wanted + Sync),
) {
    if values.len() > TASK_VALUES {
        piece
            .par_chunks_mut(TASK_VALUES)
            .zip(values.par_chunks(TASK_VALUES))
            .for_each(|(piece, values)| write(piece, values, convert));
        return;
    }
    for (place, value) in piece.iter_mut().zip(values) {
        *place = convert(*value);
    }
}

/// Numbers of the host as a vector on the device.
pub(super) fn upload<T: Number>(device: &CudaDevice, numbers: &[T]) -> Result<Tensor> {
    let mut output = Output::new(device, numbers.len(), T::DTYPE)?;
    send_all(device, &mut output, numbers, identity::<T>)?;
    Ok(output.into_tensor(numbers.len()))
}

/// `length` values of a weight on the device as `dtype`, f32 or bf16.
pub(in crate::ops) fn upload_weight(
    device: &CudaDevice,
    values: &Values,
    length: usize,
    dtype: DType,
) -> Result<Output> {
    let mut output = Output::new(device, length, dtype)?;
    let onto = &mut output;
    match (values, dtype) {
        (Values::F32(values), DType::F32) => send_all(device, onto, values, identity::<f32>),
        (Values::F32(values), _) => send_all(device, onto, values, bf16::from_f32),
        (Values::F16(values), DType::F32) => send_all(device, onto, values, f16::to_f32),
        (Values::F16(values), _) => send_all(device, onto, values, |value: f16| {
            bf16::from_f32(value.to_f32())
        }),
        (Values::BF16(values), DType::F32) => send_all(device, onto, values, bf16::to_f32),
        (Values::BF16(values), _) => send_all(device, onto, values, identity::<bf16>),
        (Values::Nf4(_), _) => unreachable!("quantised weights go there as they are"),
    }?;
    Ok(output)
}
