//! The driver's library, looked for when the program starts rather than needed for it to start.
//!
//! cudarc links `libcuda.so.1`, and a system without it ends the program before its first line. So the functions of that
//! library which cudarc calls are defined here, where the linker finds them first and asks for the library no more: each
//! goes on in the driver's own or, where there is no driver, answers that it is missing.

#![expect(
    unsafe_code,
    reason = "functions of C are defined, and looked up by their names"
)]

use libloading::os::unix::Library;
use std::arch::naked_asm;
use std::error::Error;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

const LIBRARY: &str = "libcuda.so.1";
/// `CUDA_ERROR_STUB_LIBRARY`
const MISSING: c_int = 34;

static FAULT: OnceLock<String> = OnceLock::new();

/// Why there is no driver, where there is none.
pub(super) fn fault() -> Option<&'static str> {
    FAULT.get().map(String::as_str)
}

/// Takes the place of every function that was not found: whatever its arguments, it returns a `CUresult`.
extern "C" fn missing() -> c_int {
    MISSING
}

macro_rules! functions {
    ($($name:ident)*) => {
        /// Where each function goes on.
        #[expect(non_upper_case_globals, reason = "the names of the driver's functions")]
        mod places {
            use super::{AtomicPtr, c_void, missing};
            $(pub(super) static $name: AtomicPtr<c_void> = AtomicPtr::new(missing as *mut c_void);)*
        }

        static PLACES: &[(&str, &AtomicPtr<c_void>)] = &[$((stringify!($name), &places::$name)),*];

        $(
            // SAFETY: no other library of the program defines the name. The function leaves registers and stack as they are,
            // so the one that it goes on in has the caller's arguments, and returns to the caller.
            #[unsafe(naked)]
            #[unsafe(no_mangle)]
            extern "C" fn $name() {
                #[cfg(target_arch = "x86_64")]
                naked_asm!("jmp qword ptr [rip + {place}]", place = sym places::$name);
                #[cfg(target_arch = "aarch64")]
                naked_asm!(
                    "adrp x16, {place}",
                    "ldr x16, [x16, :lo12:{place}]",
                    "br x16",
                    place = sym places::$name
                );
            }
        )*
    };
}

// All that cudarc's safe interface calls, and `cuDriverGetVersion`. One that is missing here is asked of the library after
// all: `readelf --dynamic` then names it.
functions! {
    cuCtxCreate_v3 cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetLimit
    cuCtxGetStreamPriorityRange cuCtxSetCacheConfig cuCtxSetCurrent cuCtxSetFlags cuCtxSetLimit cuCtxSynchronize
    cuDestroyExternalMemory cuDeviceGet cuDeviceGetAttribute cuDeviceGetCount cuDeviceGetDefaultMemPool
    cuDeviceGetMemPool cuDeviceGetName cuDeviceGetUuid cuDeviceGetUuid_v2 cuDevicePrimaryCtxRelease_v2
    cuDevicePrimaryCtxRetain cuDeviceSetMemPool cuDeviceTotalMem_v2 cuDriverGetVersion cuEventCreate
    cuEventDestroy_v2 cuEventElapsedTime cuEventElapsedTime_v2 cuEventQuery cuEventRecord cuEventSynchronize
    cuExternalMemoryGetMappedBuffer cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorName
    cuGetErrorString cuGraphClone cuGraphDestroy cuGraphExecDestroy cuGraphInstantiate
    cuGraphInstantiateWithFlags cuGraphLaunch cuGraphUpload cuImportExternalMemory cuInit
    cuLaunchCooperativeKernel cuLaunchHostFunc cuLaunchKernel cuMemAdvise_v2 cuMemAllocAsync
    cuMemAllocFromPoolAsync cuMemAllocManaged cuMemAlloc_v2 cuMemFreeAsync cuMemFreeHost cuMemFree_v2
    cuMemGetInfo_v2 cuMemHostAlloc cuMemPoolCreate cuMemPoolDestroy cuMemPoolGetAttribute cuMemPoolSetAttribute
    cuMemPoolTrimTo cuMemPrefetchAsync_v2 cuMemcpyDtoDAsync_v2 cuMemcpyDtoD_v2 cuMemcpyDtoHAsync_v2
    cuMemcpyDtoH_v2 cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2 cuMemcpyPeerAsync cuMemsetD8Async cuMemsetD8_v2
    cuModuleGetFunction cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData cuModuleUnload
    cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags cuOccupancyMaxActiveClusters
    cuOccupancyMaxPotentialBlockSize cuOccupancyMaxPotentialBlockSizeWithFlags cuOccupancyMaxPotentialClusterSize
    cuProfilerStart cuProfilerStop cuStreamAttachMemAsync cuStreamBeginCapture_v2 cuStreamCreate
    cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamEndCapture cuStreamIsCapturing cuStreamSynchronize
    cuStreamWaitEvent
}

/// Runs before `main`, as the system's own loading of the library would.
// SAFETY: what stands in this section is called once, with arguments that the function may leave aside.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = find;

extern "C" fn find() {
    // SAFETY: loading it runs the driver's own initialisation, as it did when the system loaded it.
    let library = match unsafe { Library::new(LIBRARY) } {
        Ok(library) => library,
        Err(error) => {
            // The cause names the library.
            let fault = error
                .source()
                .map_or(error.to_string(), ToString::to_string);
            // It is set nowhere else.
            let _ = FAULT.set(fault);
            return;
        }
    };
    for (name, place) in PLACES {
        // SAFETY: the name is that of a function of the driver, whose address alone is taken.
        if let Ok(function) = unsafe { library.get::<*mut c_void>(name.as_bytes()) } {
            place.store(function.as_raw_ptr(), Ordering::Relaxed);
        }
    }
    // The functions are called until the process ends.
    std::mem::forget(library);
}
