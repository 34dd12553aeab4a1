//! Runs kernels: the one place where numbers become pointers of the device.

#![expect(
    unsafe_code,
    reason = "what a kernel does with its arguments is outside of what the compiler sees"
)]

use super::compiler::{self, Kernel};
use super::memory::Address;
use crate::{Error, Result};
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{CUfunction_attribute_enum, CUresult};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, DriverError, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc;
use candle_core::cuda_backend::{CudaDevice, DeviceId};
use candle_core::{CudaStorage, DType, Shape};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// Threads of a block, where a kernel does not say otherwise.
pub(super) const THREADS: usize = 256;
/// Values in one access of a thread.
const PACK: usize = 8;
/// Blocks of a launch in which each thread takes more than one value.
const MOST_BLOCKS: usize = 1 << 14;
/// Shared memory of a block that needs no permission.
const COMMON_SHARED_BYTES: usize = 48 << 10;

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub(super) enum Argument {
    /// An address or `unsigned long long`.
    Word(u64),
    Long(i64),
    Int(i32),
    Float(f32),
}

impl From<Address<'_>> for Argument {
    fn from(address: Address<'_>) -> Self {
        Self::Word(address.number())
    }
}

/// Absent is null.
impl From<Option<Address<'_>>> for Argument {
    fn from(address: Option<Address<'_>>) -> Self {
        Self::Word(address.map_or(0, Address::number))
    }
}

impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Self::Word(value)
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

impl From<bool> for Argument {
    fn from(value: bool) -> Self {
        Self::Int(i32::from(value))
    }
}

/// A size as `int`.
pub(super) fn int(value: usize) -> Result<Argument> {
    i32::try_from(value)
        .map(Argument::Int)
        .map_err(|_| Error::new(format!("{value} values in a row are too many for the GPU")))
}

/// A size as `long long`.
pub(super) fn long(value: usize) -> Argument {
    Argument::Long(value as i64)
}

/// An f64: its bits.
pub(super) fn double(value: f64) -> Argument {
    Argument::Word(value.to_bits())
}

/// How a kernel is spread over the device.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    blocks: (usize, usize, usize),
    threads: usize,
    rows: usize,
    shared_bytes: usize,
}

impl Grid {
    /// So many blocks of [`THREADS`].
    pub(super) fn blocks(blocks: usize) -> Self {
        Self::of((blocks, 1, 1), THREADS)
    }

    /// Blocks in three directions, each of so many threads.
    pub(super) fn of(blocks: (usize, usize, usize), threads: usize) -> Self {
        Self {
            blocks,
            threads,
            rows: 1,
            shared_bytes: 0,
        }
    }

    /// Blocks for `values` that threads take in packs, going on until all is done.
    pub(super) fn stride(values: usize) -> Self {
        Self::blocks(values.div_ceil(THREADS * PACK).min(MOST_BLOCKS))
    }

    /// The same with so many times the threads in each block, in its second direction.
    pub(super) fn rows(self, rows: usize) -> Self {
        Self { rows, ..self }
    }

    /// The same with so much shared memory per block.
    pub(super) fn shared(self, shared_bytes: usize) -> Self {
        Self {
            shared_bytes,
            ..self
        }
    }
}

/// Puts a kernel into the device's stream. A grid without blocks is no work.
pub(super) fn launch(
    device: &CudaDevice,
    kernel: Kernel,
    grid: Grid,
    arguments: &[Argument],
) -> Result<()> {
    let (x, y, z) = grid.blocks;
    if x * y * z == 0 {
        return Ok(());
    }
    let function = function(device, kernel)?;
    if grid.shared_bytes > COMMON_SHARED_BYTES {
        function
            .set_attribute(
                CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                grid.shared_bytes as i32,
            )
            .map_err(|error| failed(kernel, error))?;
    }
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    for argument in arguments {
        match argument {
            Argument::Word(value) => builder.arg(value),
            Argument::Long(value) => builder.arg(value),
            Argument::Int(value) => builder.arg(value),
            Argument::Float(value) => builder.arg(value),
        };
    }
    let size = |blocks: usize| {
        u32::try_from(blocks)
            .map_err(|_| Error::new(format!("{blocks} blocks are too many for the GPU")))
    };
    let configuration = LaunchConfig {
        grid_dim: (size(x)?, size(y)?, size(z)?),
        block_dim: (size(grid.threads)?, size(grid.rows)?, 1),
        shared_mem_bytes: size(grid.shared_bytes)?,
    };
    // SAFETY: the callers, all in this folder, pass what the kernel's signature in the `.cu` file says, and addresses of
    // tensors whose shapes they have checked, which live until this returns. Memory is given back in the order of the
    // stream, the only one, so a tensor that is dropped afterwards is there until the kernel has run.
    unsafe { builder.launch(configuration) }.map_err(|error| failed(kernel, error))?;
    Ok(())
}

fn failed(kernel: Kernel, error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::out_of_gpu_memory(),
        _ => Error::new(format!("the GPU refused `{}`: {error}", kernel.name)),
    }
}

/// Room for at least one value on the device, which holds anything.
pub(super) fn uninitialised(
    device: &CudaDevice,
    length: usize,
    dtype: DType,
) -> Result<CudaStorage> {
    // SAFETY: the numbers have no invalid bit patterns, and every operation fills its result before handing it out.
    unsafe { device.alloc_uninit(&Shape::from(length.max(1)), dtype) }.map_err(crate::Error::from)
}

/// Version of the compiler, such as (13, 0).
pub(super) fn compiler_version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both point to numbers of the type that is written.
    let result = unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
    match result.result() {
        Ok(()) => (major, minor),
        Err(_) => (0, 0),
    }
}

/// Kernels that are on a device already.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(DeviceId, compiler::Module), Arc<CudaModule>>,
    functions: HashMap<(DeviceId, Kernel), CudaFunction>,
}

static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);

fn function(device: &CudaDevice, kernel: Kernel) -> Result<CudaFunction> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (device.id(), kernel);
    if let Some(function) = loaded.functions.get(&key) {
        return Ok(function.clone());
    }
    let place = (device.id(), kernel.module);
    let module = match loaded.modules.get(&place) {
        Some(module) => module.clone(),
        None => {
            let module = compiler::load(device, kernel.module)?;
            loaded.modules.insert(place, module.clone());
            module
        }
    };
    let function = module
        .load_function(kernel.name)
        .map_err(|error| failed(kernel, error))?;
    loaded.functions.insert(key, function.clone());
    Ok(function)
}
