//! The operations on an NVIDIA GPU: kernels of our own, compiled when they are first used, and cuBLAS for the products.
//!
//! Activations are bf16 or f32, and frozen weights are stored in the same type, or quantised and widened to it; trained
//! weights, their gradients, norm weights, biases and losses are f32, and so are all sums. Everything goes into one stream
//! of the device, and nothing here waits for it but what hands numbers to the host. On one GPU model and one
//! version of NVIDIA's libraries the bits depend on shapes alone, as they do on one processor.
//!
//! `launch.rs`, `products.rs`, `device.rs` and `driver.rs` are the border to what Rust cannot check.

mod attention;
mod compiler;
mod device;
#[cfg_attr(
    not(all(
        target_os = "linux",
        any(target_arch = "x86_64", target_arch = "aarch64")
    )),
    path = "linked_driver.rs"
)]
mod driver;
mod elementwise;
mod launch;
mod linear;
mod loss;
mod memory;
mod nf4;
mod norm;
mod optimizer;
mod products;
mod rows;
mod sampling;
mod upload;

#[cfg(test)]
mod tests;

pub(super) use attention::{KeptSoftmax, attention, attention_gradients};
pub use compiler::{set_cuda_toolkit, set_kernel_cache};
pub(super) use device::Moment;
pub use device::{cuda_device, device_memory, device_model, pool_peak, reset_pool_peak};
pub(super) use elementwise::{
    Angles, add_onto, gated_activation, gated_activation_gradients, rope,
};
pub(super) use linear::{
    LowRankBackward, bias_gradient, hold_weights, input_gradient, linear, low_rank_linear,
    trained_input_gradient, trained_linear, weight_gradient,
};
pub(super) use loss::{cross_entropy, linear_cross_entropy, score, score_hidden, times};
pub(super) use memory::{Output, tensor};
pub(super) use nf4::Nf4;
pub(super) use norm::{
    layer_norm, layer_norm_input_gradient, layer_norm_weight_gradient, rms_norm,
    rms_norm_input_gradient, rms_norm_weight_gradient,
};
pub(super) use optimizer::{adamw, squared_norm};
pub(super) use rows::{gather, look_up, select_rows};
pub(super) use sampling::Chooser;
pub(super) use upload::upload_weight;

use super::FrozenWeight;
use crate::Result;
use candle_core::{DType, Device, Tensor};

/// Whether an operation on these belongs here: one of them is on a GPU.
pub(super) fn takes(x: &Tensor, w: &FrozenWeight) -> bool {
    x.device().is_cuda() || w.is_on_device()
}

/// The values of a frozen weight, which must be on the GPU as `x` is.
pub(super) fn head(operation: &str, w: &FrozenWeight) -> Result<Tensor> {
    linear::on_device(operation, w)
}

/// The scalar 0 in f32.
pub(super) fn zero(device: &Device) -> Result<Output> {
    let device = device.as_cuda_device().map_err(crate::Error::from)?;
    Output::zeros(device, 1, DType::F32)
}
