//! Where a model computes, in what type, and how it holds its weights.

use super::inventory::ParameterKind;
use crate::Result;
use crate::adapters::hooks::layer_of;
use crate::ops::{ComputeType, FrozenWeight, Quantization};
use crate::report::memory;
use candle_core::{DType, Device, DeviceLocation};

/// The device that a model lies on, the type of its products with frozen weights, and whether it holds those in fewer bits.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The CPU or a GPU.
    pub device: Device,
    /// The type of the factors; sums are f32.
    pub compute: ComputeType,
    /// What the frozen weights of the blocks' linear layers are quantised to; embeddings, norms, biases and the output head
    /// are not, nor is what a method trains.
    pub quantization: Option<Quantization>,
}

/// The processor's name as it says it itself, which several generations may share, and what tells these apart: family and
/// model, and the instructions for which there are products of their own.
#[cfg(target_arch = "x86_64")]
fn processor() -> Option<String> {
    let processor = raw_cpuid::CpuId::new();
    let brand = processor.get_processor_brand_string()?;
    let features = processor.get_feature_info()?;
    let instructions = [
        ("FMA", is_x86_feature_detected!("fma")),
        ("AVX-512", is_x86_feature_detected!("avx512f")),
        ("AVX-512 BF16", is_x86_feature_detected!("avx512bf16")),
    ];
    let instructions = instructions.iter().filter(|(_, there)| *there);
    let instructions: Vec<&str> = instructions.map(|(name, _)| *name).collect();
    Some(format!(
        "{}, family {} model {}, with {}",
        brand.as_str().trim(),
        features.family_id(),
        features.model_id(),
        instructions.join(", ")
    ))
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> Option<String> {
    None
}

impl Default for Placement {
    /// The CPU in f32, weights as they are stored.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            compute: ComputeType::F32,
            quantization: None,
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
        Self {
            device,
            compute,
            quantization: None,
        }
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

    /// What computes, by name: `retune 0.1.0 on NVIDIA H200`. Another version may compute in another order, and another
    /// processor has other instructions and caches, or another GPU other kernels of its maker's, on which the order depends:
    /// only the same gives the same bits.
    pub fn machine(&self) -> String {
        let named = self.gpu_name().or_else(processor);
        let name = named.unwrap_or_else(|| std::env::consts::ARCH.to_owned());
        format!("retune {} on {name}", env!("CARGO_PKG_VERSION"))
    }

    fn gpu_name(&self) -> Option<String> {
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            return Some(crate::ops::device_model(&self.device));
        }
        None
    }

    /// All of it on which the bits of a result depend, such as `cpu f32` or `cuda bf16 nf4`.
    pub(crate) fn summary(&self) -> String {
        let quantization = self.quantization.map(Quantization::name);
        [self.device_kind(), self.compute.name()]
            .into_iter()
            .chain(quantization)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// The type of hidden states and their gradients: that of the products on a GPU, f32 on the CPU.
    pub fn activations(&self) -> DType {
        match self.compute {
            ComputeType::Bf16 if self.device.is_cuda() => DType::BF16,
            _ => DType::F32,
        }
    }

    /// What `count` frozen weights of this kind that are `stored` so take in memory, in bytes.
    pub fn bytes(&self, kind: ParameterKind, count: u64, stored: DType) -> u64 {
        match self.quantization {
            Some(quantization) if kind == ParameterKind::Linear => quantization.bytes(count),
            _ => count * self.weights(stored).size_in_bytes() as u64,
        }
    }

    /// The type of a frozen weight in memory that is `stored` so and is not quantised: a GPU holds it as it multiplies it,
    /// the CPU as it lies in the file.
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

    /// Starts the peak of [`Placement::peak_in_use`] anew at what is in use now, where the system can do that.
    pub fn reset_peak(&self) {
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            return crate::ops::reset_pool_peak(&self.device);
        }
        memory::reset_peak();
    }

    /// The most memory that was in use at a time, in bytes: resident memory of the process; on a GPU tensors and scratch
    /// memory, not what its pool keeps for later, nor the context of CUDA. `None` where the system does not say.
    pub fn peak_in_use(&self) -> Option<u64> {
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            return crate::ops::pool_peak(&self.device).map(|bytes| bytes as u64);
        }
        memory::peak_bytes()
    }

    /// What the frozen matrix `name` of a base is quantised to.
    pub(super) fn quantization_of(&self, name: &str) -> Option<Quantization> {
        self.quantization.filter(|_| layer_of(name).is_some())
    }

    /// The frozen matrix `name` of a base as it is held: on the device, quantised if it is to be, ready for products in the
    /// type.
    pub(super) fn hold(&self, name: &str, weight: &FrozenWeight) -> Result<FrozenWeight> {
        match self.quantization_of(name) {
            Some(quantization) => self.place(&weight.quantized(quantization)?),
            None => self.place(weight),
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
