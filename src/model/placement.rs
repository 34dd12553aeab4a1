//! Where a model computes, and in what type.

use crate::Result;
use crate::ops::{ComputeType, FrozenWeight};
use crate::report::memory;
use candle_core::{DType, Device, DeviceLocation};

/// The device that a model lies on, and the type of its products with frozen weights.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The CPU or a GPU.
    pub device: Device,
    /// The type of the factors; sums are f32.
    pub compute: ComputeType,
}

impl Default for Placement {
    /// The CPU in f32.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            compute: ComputeType::F32,
        }
    }
}

impl Placement {
    /// On `device`, in the type that suits a base stored as `stored`: 16 bits stay 16 bits on a GPU, whose products are
    /// many times as fast in them.
    pub fn suited(device: Device, stored: DType) -> Self {
        let compute = match stored {
            DType::BF16 | DType::F16 if device.is_cuda() => ComputeType::Bf16,
            _ => ComputeType::F32,
        };
        Self { device, compute }
    }

    /// The kind of device, on which the last bits of a result depend: `cpu` or `cuda`.
    pub fn device_kind(&self) -> &'static str {
        match self.device.is_cuda() {
            true => "cuda",
            false => "cpu",
        }
    }

    /// The name of the device, as the command line takes it: `cpu` or `cuda:0`.
    pub fn device_name(&self) -> String {
        match self.device.location() {
            DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
            _ => self.device_kind().to_owned(),
        }
    }

    /// The type of hidden states and their gradients: that of the products on a GPU, f32 on the CPU.
    pub fn activations(&self) -> DType {
        match self.compute {
            ComputeType::Bf16 if self.device.is_cuda() => DType::BF16,
            _ => DType::F32,
        }
    }

    /// The type of a frozen weight in memory that is `stored` so: a GPU holds it as it multiplies it, the CPU as it lies in
    /// the file.
    pub fn weights(&self, stored: DType) -> DType {
        match self.device.is_cuda() {
            true => self.activations(),
            false => stored,
        }
    }

    /// Free memory of a GPU and all that it has, in bytes; none for the CPU.
    pub fn device_memory(&self) -> Option<(u64, u64)> {
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            let (free, all) = crate::ops::device_memory(&self.device)?;
            return Some((free as u64, all as u64));
        }
        None
    }

    /// The most memory so far, in bytes: resident memory of the process, or what is taken of a GPU's, which its allocator
    /// keeps until the end. `None` where the system does not say.
    pub fn peak_memory(&self) -> Option<u64> {
        match self.device_memory() {
            Some((free, all)) => Some(all.saturating_sub(free)),
            None => memory::peak_bytes(),
        }
    }

    /// The same weight on the device, ready for products in the type.
    pub(crate) fn place(&self, weight: &FrozenWeight) -> Result<FrozenWeight> {
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            return weight.upload(&self.device, self.compute);
        }
        Ok(weight.with_compute(self.compute))
    }
}

/// GPU number `index`, ready to compute.
#[cfg(feature = "cuda")]
pub fn cuda_device(index: usize) -> Result<Device> {
    crate::ops::cuda_device(index)
}

/// GPU number `index`: this build has no way to it.
#[cfg(not(feature = "cuda"))]
pub fn cuda_device(_index: usize) -> Result<Device> {
    Err(crate::Error::new("this build of retune has no CUDA").hint(
        "use `--device cpu`, or a build for NVIDIA GPUs: `cargo build --release --features cuda`",
    ))
}
