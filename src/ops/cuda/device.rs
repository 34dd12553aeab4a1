//! The device: how it is opened, what it has left, what its errors mean, and the memory of the host that it reads itself.

#![expect(
    unsafe_code,
    reason = "the memory pool is set up by a pointer, events are switched off, and page-locked memory holds any numbers"
)]

use super::memory::Number;
use super::{driver, launch, products};
use crate::{Error, Result};
use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUevent_flags, CUmemPool_attribute, CUresult, cuDriverGetVersion,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, DriverError, PinnedHostSlice, result,
};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Memory that the pool keeps rather than hand it back to the system: all of it.
const KEEP_ALL: u64 = u64::MAX;
/// The oldest compute capability that has bf16 and the matrix instructions of the kernels.
const OLDEST: (i32, i32) = (8, 0);

/// The GPU with this number, counted from 0, ready for work.
///
/// Fails, with what to do about it, if there is no driver or it is too old, no such GPU, or one below compute capability
/// 8.0.
pub fn cuda_device(index: usize) -> Result<Device> {
    let count = CudaContext::device_count().map_err(no_driver)?;
    if index >= count.max(0) as usize {
        return Err(Error::new(match count {
            1 => format!("there is no GPU {index}: the only one is 0"),
            _ => format!("there is no GPU {index}: there are {count}, counted from 0"),
        })
        .hint("`nvidia-smi` lists them; `CUDA_VISIBLE_DEVICES` hides some"));
    }
    refuse_old_driver()?;
    let context = CudaContext::new(index).map_err(driver_error)?;
    let capability = context.compute_capability().map_err(driver_error)?;
    if capability < OLDEST {
        let name = context.name().unwrap_or_else(|_| "the GPU".to_owned());
        return Err(Error::new(format!(
            "{name} has compute capability {}.{}, and {}.{} is the oldest that retune runs on",
            capability.0, capability.1, OLDEST.0, OLDEST.1
        ))
        .hint("run on the CPU"));
    }
    let device = Device::new_cuda_with_stream(index).map_err(Error::from)?;
    let cuda = device.as_cuda_device().map_err(Error::from)?;
    // SAFETY: everything runs in the device's one stream, in the order in which it is put there, so nothing has to wait
    // for events.
    unsafe { cuda.disable_event_tracking() };
    if context.has_async_alloc() {
        set_pool_number(
            &context,
            CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            KEEP_ALL,
        )
        .map_err(driver_error)?;
    }
    products::prepare(cuda)?;
    opened().push(device.clone());
    Ok(device)
}

static OPENED: Mutex<Vec<Device>> = Mutex::new(Vec::new());

fn opened() -> MutexGuard<'static, Vec<Device>> {
    OPENED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A moment in the stream of the device that was opened last, which is the only one of a process that measures time.
pub(in crate::ops) struct Moment(CudaEvent);

impl Moment {
    /// That at which the device comes to where its stream ends now; none if no device is open. What has gone wrong there is
    /// said by the next operation.
    pub(in crate::ops) fn now() -> Option<Self> {
        let device = opened().last()?.as_cuda_device().ok()?.cuda_stream();
        let event = device.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        event.ok().map(Self)
    }

    /// The time from here to `end`, for which the host waits.
    pub(in crate::ops) fn until(&self, end: &Self) -> Duration {
        let milliseconds = self.0.elapsed_ms(&end.0).unwrap_or(0.0);
        Duration::from_secs_f64(f64::from(milliseconds).max(0.0) / 1e3)
    }
}

/// The GPU's model and the toolkit that compiles for it: what its bits depend on besides the shapes.
pub fn device_model(device: &Device) -> String {
    let cuda = device.as_cuda_device().ok();
    let name = cuda.and_then(|cuda| cuda.cuda_stream().context().name().ok());
    let name = name.unwrap_or_else(|| "a GPU".to_owned());
    let (major, minor) = launch::compiler_version();
    format!("{name}, CUDA {major}.{minor}")
}

/// Free and total bytes of the device's memory; nothing for the CPU, or if the driver does not say.
///
/// What the pool keeps for the next operations counts as used.
pub fn device_memory(device: &Device) -> Option<(usize, usize)> {
    let cuda = device.as_cuda_device().ok()?;
    cuda.cuda_stream().context().mem_get_info().ok()
}

/// The most bytes of the device's pool that were in use at a time since [`reset_pool_peak`]; nothing for the CPU, or a device
/// without a pool. What the pool keeps for the next operations is not in use.
pub fn pool_peak(device: &Device) -> Option<usize> {
    let stream = device.as_cuda_device().ok()?.cuda_stream();
    let number = |attribute| pool_number(stream.context(), attribute);
    // After a reset it may be behind what was in use already.
    let most = number(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?;
    let now = number(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
    usize::try_from(most.max(now)).ok()
}

/// Starts the peak of [`pool_peak`] anew at what is in use, when the device has done what it was given.
pub fn reset_pool_peak(device: &Device) {
    let Ok(cuda) = device.as_cuda_device() else {
        return;
    };
    let _ = device.synchronize();
    let stream = cuda.cuda_stream();
    if stream.context().has_async_alloc() {
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        let _ = set_pool_number(stream.context(), attribute, 0);
    }
}

/// Sets one of the attributes of the device's pool that are numbers of 64 bits.
fn set_pool_number(
    context: &CudaContext,
    attribute: CUmemPool_attribute,
    mut value: u64,
) -> Result<(), DriverError> {
    // SAFETY: the device is that of a context which is alive, the pool is its own, and the attribute is a number of 64
    // bits.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut value).cast())
    }
}

/// One of the same, if the device has a pool and says it.
fn pool_number(context: &CudaContext, attribute: CUmemPool_attribute) -> Option<u64> {
    if !context.has_async_alloc() {
        return None;
    }
    let mut value = 0u64;
    // SAFETY: as for `set_pool_number`.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device()).ok()?;
        result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()).ok()?;
    }
    Some(value)
}

fn refuse_old_driver() -> Result<()> {
    let mut version = 0;
    // SAFETY: it points to a number of the type that is written.
    let known = unsafe { cuDriverGetVersion(&mut version) }.result().is_ok();
    let (needed, _) = launch::compiler_version();
    if known && version / 1000 < needed {
        return Err(Error::new(format!(
            "the NVIDIA driver is too old: it is for CUDA {}.{}, and this program for CUDA {needed}",
            version / 1000,
            version % 1000 / 10
        ))
        .hint("update the driver"));
    }
    Ok(())
}

fn no_driver(error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => Error::new("no NVIDIA GPU was found")
            .hint("`nvidia-smi` lists them; `CUDA_VISIBLE_DEVICES` hides some"),
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            const STANDS_IN: &str = "the library that was found only stands in for it";
            let fault = driver::fault().unwrap_or(STANDS_IN);
            Error::new(format!("no NVIDIA driver: {fault}"))
                .hint("install the NVIDIA driver, or run on the CPU")
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            Error::new("the NVIDIA driver and its libraries are of different versions")
                .hint("restart the machine after an update of the driver")
        }
        _ => Error::new(format!("no NVIDIA driver: {error}"))
            .hint("install the NVIDIA driver, or run on the CPU"),
    }
}

/// Memory of the host that is copied to the device.
pub(super) enum HostMemory {
    /// Page-locked: the device reads it by itself when its stream comes to the copy, while the host goes on.
    Locked(PinnedHostSlice<u64>),
    /// Where the system has no such memory to give, as in a container that may not lock any.
    Ordinary(Vec<u64>),
}

impl HostMemory {
    /// Room for so many words, which hold anything.
    pub(super) fn new(context: &Arc<CudaContext>, words: usize) -> Self {
        // Several threads write into it, which memory that only combines writes (cudarc's default) is not made for.
        let flags = 0;
        // SAFETY: whatever is there is a valid number.
        match unsafe { context.alloc_pinned_with_flags(words, flags) } {
            Ok(memory) => Self::Locked(memory),
            Err(_) => Self::Ordinary(vec![0; words]),
        }
    }

    /// The first `length` numbers that these words have room for.
    pub(super) fn numbers<T: Number>(
        &mut self,
        words: Range<usize>,
        length: usize,
    ) -> Result<&mut [T]> {
        let memory = match self {
            Self::Locked(memory) => memory.as_mut_slice().map_err(driver_error)?,
            Self::Ordinary(memory) => memory.as_mut_slice(),
        };
        // SAFETY: `Number` is implemented only for types that have no invalid bit pattern and no padding.
        let (_, numbers, _) = unsafe { memory[words].align_to_mut::<T>() };
        Ok(&mut numbers[..length])
    }
}

pub(super) fn driver_error(error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::out_of_gpu_memory(),
        _ => Error::new(format!("the GPU cannot be used: {error}")),
    }
}
