//! `--device`, `--compute-type` and `--quantize`: where to compute, in what type, and how the base is held.

use super::note;
use super::progress::Show;
use crate::Result;
use crate::model::{Placement, cuda_device};
use crate::ops::{ComputeType, Quantization};
use candle_core::{DType, Device};
use clap::Args;
use std::str::FromStr;
use toml::Value;

/// The device, the type of its products, and that of the weights it holds.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct PlacementArgs {
    /// Where to compute: `auto`, `cpu`, `cuda` or `cuda:N`
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    device: DeviceChoice,

    /// Type of products with the base's weights: `f32`, `bf16`, or `auto`, which is `bf16` on a GPU for a base stored in 16
    /// bits
    #[arg(long, default_value = "auto", value_name = "TYPE")]
    compute_type: ComputeChoice,

    /// Hold the frozen weights of the base's blocks in fewer bits: `nf4` takes 4.5 bits a weight, as QLoRA does [default: as
    /// they are stored]
    #[arg(long, value_name = "TYPE", value_parser = quantization)]
    quantize: Option<Quantization>,
}

fn quantization(name: &str) -> Result<Quantization, String> {
    name.parse().map_err(|_| "expected `nf4`".to_owned())
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "expected `auto`, `cpu`, `cuda` or `cuda:N`".to_owned()),
        }
    }
}

/// What to compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ComputeChoice {
    Auto,
    Type(ComputeType),
}

impl FromStr for ComputeChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => text
                .parse::<ComputeType>()
                .map(Self::Type)
                .map_err(|_| "expected `auto`, `f32` or `bf16`".to_owned()),
        }
    }
}

impl PlacementArgs {
    /// Refuses a device that this build has no way to: before anything is downloaded.
    pub(super) fn check(&self) -> Result<()> {
        match self.device {
            DeviceChoice::Cuda(index) if cfg!(not(feature = "cuda")) => {
                cuda_device(index).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// The device, opened, and the type that was asked for or suits a base stored as `stored`.
    pub(super) fn open(&self, stored: DType, show: Show) -> Result<Placement> {
        #[cfg(feature = "cuda")]
        prepare_compiler();
        let device = match self.device {
            DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Cuda(index) => cuda_device(index)?,
            DeviceChoice::Auto if cfg!(not(feature = "cuda")) => Device::Cpu,
            DeviceChoice::Auto => cuda_device(0).unwrap_or_else(|error| {
                note(show, &format!("computing on the CPU: {error}"));
                Device::Cpu
            }),
        };
        let mut placement = Placement::suited(device, stored);
        if let ComputeChoice::Type(compute) = self.compute_type {
            placement.compute = compute;
        }
        placement.quantization = self.quantize;
        if placement.device.is_cuda() {
            let (device, compute) = (placement.device_name(), placement.compute.name());
            note(show, &format!("computing on {device} in {compute}"));
        }
        Ok(placement)
    }
}

/// What a run file says of it, so that the run goes on as it began.
pub(super) fn settled(placement: &Placement) -> [(&'static str, Value); 2] {
    [
        ("device", Value::String(placement.device_name())),
        (
            "compute-type",
            Value::String(placement.compute.name().to_owned()),
        ),
    ]
}

/// Says where the toolkit's headers are, and where compiled kernels are kept from one start of the program to the next.
#[cfg(feature = "cuda")]
fn prepare_compiler() {
    let folder = |name: &str| {
        let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
        Some(std::path::PathBuf::from(value))
    };
    if let Some(toolkit) = folder("CUDA_HOME").or_else(|| folder("CUDA_PATH")) {
        crate::ops::set_cuda_toolkit(toolkit);
    }
    let home = folder("HOME").or_else(|| folder("USERPROFILE"));
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(home?.join(".cache")));
    if let Some(cache) = cache {
        crate::ops::set_kernel_cache(cache.join("retune").join("kernels"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_types_are_named() {
        assert_eq!("cuda:3".parse::<DeviceChoice>(), Ok(DeviceChoice::Cuda(3)));
        assert!("cuda:".parse::<DeviceChoice>().is_err());
        assert_eq!(
            "bf16".parse::<ComputeChoice>(),
            Ok(ComputeChoice::Type(ComputeType::Bf16))
        );
        assert!("f16".parse::<ComputeChoice>().is_err());
        let written = settled(&Placement::default()).map(|(_, value)| value);
        assert_eq!(written, ["cpu", "f32"].map(Value::from));
    }
}
