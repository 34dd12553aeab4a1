//! The kernels' texts, compiled for the device that is there, once: afterwards they come from a folder.

use super::launch::compiler_version;
use super::memory::Real;
use crate::adapters::storage::write_bytes;
use crate::digest::hexadecimal;
use crate::{Error, Result};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaModule;
use candle_core::cuda_backend::cudarc::driver::DriverError;
use candle_core::cuda_backend::cudarc::driver::sys::CUresult;
use candle_core::cuda_backend::cudarc::nvrtc::{
    CompileError, CompileOptions, Ptx, compile_ptx_with_opts,
};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Source {
    Norm,
    Sums,
    Elementwise,
    Rope,
    GatedActivation,
    CrossEntropy,
    AdamW,
    Attention,
    Nf4,
    Sampling,
}

impl Source {
    #[cfg(test)]
    pub(super) const ALL: [Self; 10] = [
        Self::Norm,
        Self::Sums,
        Self::Elementwise,
        Self::Rope,
        Self::GatedActivation,
        Self::CrossEntropy,
        Self::AdamW,
        Self::Attention,
        Self::Nf4,
        Self::Sampling,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Norm => "norm.cu",
            Self::Sums => "sums.cu",
            Self::Elementwise => "elementwise.cu",
            Self::Rope => "rope.cu",
            Self::GatedActivation => "gated_activation.cu",
            Self::CrossEntropy => "cross_entropy.cu",
            Self::AdamW => "adamw.cu",
            Self::Attention => "attention.cu",
            Self::Nf4 => "nf4.cu",
            Self::Sampling => "sampling.cu",
        }
    }

    fn text(self) -> String {
        let own = match self {
            Self::Norm => include_str!("norm.cu"),
            Self::Sums => include_str!("sums.cu"),
            Self::Elementwise => include_str!("elementwise.cu"),
            Self::Rope => include_str!("rope.cu"),
            Self::GatedActivation => include_str!("gated_activation.cu"),
            Self::CrossEntropy => include_str!("cross_entropy.cu"),
            Self::AdamW => include_str!("adamw.cu"),
            Self::Attention => include_str!("attention.cu"),
            Self::Nf4 => include_str!("nf4.cu"),
            Self::Sampling => include_str!("sampling.cu"),
        };
        // A compiler's message then names the line of the file.
        format!(
            "{}\n#line 1 \"{}\"\n{own}",
            include_str!("common.cuh"),
            self.name()
        )
    }
}

/// A file of kernels compiled for one type of activations and, for attention, one size of head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Module {
    pub(super) source: Source,
    pub(super) real: Real,
    /// 0 for files that do not ask.
    pub(super) head_dim: usize,
}

/// One kernel of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Kernel {
    pub(super) module: Module,
    pub(super) name: &'static str,
}

impl Kernel {
    pub(super) fn new(source: Source, real: Real, name: &'static str) -> Self {
        let module = Module {
            source,
            real,
            head_dim: 0,
        };
        Self { module, name }
    }

    /// A kernel of attention for heads of this size.
    pub(super) fn attention(real: Real, head_dim: usize, name: &'static str) -> Self {
        let module = Module {
            source: Source::Attention,
            real,
            head_dim,
        };
        Self { module, name }
    }
}

/// Compute capability that the text is compiled for; devices above it translate further by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    /// 8.0.
    Ampere,
    /// 9.0.
    Hopper,
}

impl Architecture {
    /// The newest that a device of this compute capability runs.
    pub(super) fn of((major, _): (i32, i32)) -> Self {
        match major {
            ..9 => Self::Ampere,
            _ => Self::Hopper,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ampere => "compute_80",
            Self::Hopper => "compute_90",
        }
    }
}

static FOLDERS: Mutex<Folders> = Mutex::new(Folders {
    cache: None,
    toolkit: None,
});

struct Folders {
    cache: Option<PathBuf>,
    toolkit: Option<PathBuf>,
}

fn folders() -> std::sync::MutexGuard<'static, Folders> {
    FOLDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compiled kernels are kept in `folder` from now on, which is made when it is needed. Without this they are compiled
/// anew by each process.
pub fn set_kernel_cache(folder: PathBuf) {
    folders().cache = Some(folder);
}

/// The folder of the CUDA toolkit, what others call `CUDA_HOME`: its headers come before those found elsewhere.
pub fn set_cuda_toolkit(folder: PathBuf) {
    folders().toolkit = Some(folder);
}

/// The module on the device: from the cache, or compiled and put there.
pub(super) fn load(device: &CudaDevice, module: Module) -> Result<Arc<CudaModule>> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let capability = context.compute_capability().map_err(refused)?;
    let architecture = Architecture::of(capability);
    let place = cached(module, architecture);
    // What cannot be read, or not be loaded, is made again; cudarc would panic at a zero in the text.
    if let Some(ptx) = place
        .as_deref()
        .and_then(|path| fs::read_to_string(path).ok())
        .filter(|ptx| !ptx.contains('\0'))
        && let Ok(loaded) = context.load_module(Ptx::from_src(ptx))
    {
        return Ok(loaded);
    }
    let ptx = compile(module, architecture)?;
    if let Some(path) = &place {
        keep(path, &ptx);
    }
    context.load_module(Ptx::from_src(ptx)).map_err(refused)
}

/// The module in the portable assembler of NVIDIA's devices.
pub(super) fn compile(module: Module, architecture: Architecture) -> Result<String> {
    let include_paths = header_folders()
        .iter()
        .map(|folder| folder.display().to_string())
        .collect();
    let compile_options = CompileOptions {
        options: options(module, architecture),
        include_paths,
        name: Some(module.source.name().to_owned()),
        ..CompileOptions::default()
    };
    match compile_ptx_with_opts(module.source.text(), compile_options) {
        Ok(ptx) => Ok(ptx.to_src()),
        Err(CompileError::CompileError { log, .. }) => {
            let log = log.to_string_lossy().into_owned();
            let error = Error::new(format!(
                "`{}` does not compile: {}",
                module.source.name(),
                log.trim()
            ));
            Err(if log.contains("cuda_bf16.h") {
                error.hint(
                    "install the headers of the CUDA runtime, or set CUDA_HOME to the toolkit's folder",
                )
            } else if log.contains("libnvrtc-builtins") {
                error.hint(
                    "put the folder of this library, beside `libnvrtc.so`, into LD_LIBRARY_PATH",
                )
            } else {
                error
            })
        }
        Err(error) => Err(Error::new(format!(
            "the compiler of the CUDA toolkit, NVRTC, failed: {error}"
        ))),
    }
}

fn options(module: Module, architecture: Architecture) -> Vec<String> {
    let mut options = vec![
        "--std=c++17".to_owned(),
        format!("--gpu-architecture={}", architecture.name()),
        format!("-DREAL={}", module.real.name()),
    ];
    if module.head_dim > 0 {
        options.push(format!("-DHEAD_DIM={}", module.head_dim));
    }
    options
}

/// Where the compiled module is kept: its name says all that it was made of.
fn cached(module: Module, architecture: Architecture) -> Option<PathBuf> {
    let folder = folders().cache.clone()?;
    let mut hash = Sha256::new();
    hash.update(module.source.text());
    for option in options(module, architecture) {
        hash.update([0u8]);
        hash.update(option);
    }
    let (major, minor) = compiler_version();
    hash.update(format!("\0{major}.{minor}"));
    Some(folder.join(format!("{}.ptx", hexadecimal(&hash.finalize()))))
}

/// A cache that cannot be written costs time only.
fn keep(path: &Path, ptx: &str) {
    let made = path.parent().map(fs::create_dir_all);
    if matches!(made, Some(Ok(()))) {
        let _ = write_bytes(path, ptx.as_bytes());
    }
}

/// Folders with the toolkit's headers: the one that was set, those beside the compiler's library, whose version they are
/// of, and the system's.
fn header_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = folders()
        .toolkit
        .iter()
        .map(|toolkit| toolkit.join("include"))
        .collect();
    for library in loaded_compilers() {
        // `<toolkit>/lib64/libnvrtc.so`, with `targets/<platform>` between them or not
        for above in library.ancestors().skip(2).take(2) {
            folders.push(above.join("include"));
            // NVIDIA's Python packages have a folder for each library
            folders.push(above.join("cuda_runtime/include"));
        }
    }
    folders.push("/usr/local/cuda/include".into());
    folders.retain(|folder| folder.join("cuda_bf16.h").is_file());
    folders.dedup();
    folders
}

/// Files of the compiler's library in this process.
fn loaded_compilers() -> Vec<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut found: Vec<PathBuf> = maps
        .lines()
        .filter_map(|line| line.find('/').map(|start| PathBuf::from(&line[start..])))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc.so"))
        })
        .collect();
    found.dedup();
    found
}

fn refused(error: DriverError) -> Error {
    let refused = Error::new(format!("the GPU's driver refused a kernel: {error}"));
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::out_of_gpu_memory(),
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => refused.hint(
            "the driver is older than the CUDA toolkit: update the driver, or use a toolkit of its version",
        ),
        _ => refused,
    }
}
