//! Differentiable operations, each with a hand-written backward.
//!
//! Activations are f32 and flat: `(rows, features)`, one row per token, the examples of a batch laid end to end. Only
//! attention knows where one example ends. A frozen weight stays in the type it was stored in and never receives a
//! gradient; a trained one is an f32 tensor. Four rules hold for every operation:
//!
//! - **Nothing is computed for what is not tracked.** An argument without history costs no gradient, and when no
//!   argument has one the result has none either, so the layers below the lowest trained one keep nothing.
//! - **The bits do not depend on the number of threads.** Work is split by shape alone, and partial sums are added in
//!   a fixed order.
//! - **NaN is passed on**, so that a loss which is not finite is seen.
//! - **A wrong shape is an error**, which names the operation and both shapes.
//!
//! Each operation first computes its result from plain slices and then hands it to [`graph::record`] with its backward.
//! On a GPU, with the feature `cuda`, activations are f32 or bf16, frozen weights of the same type, and `cuda/` computes
//! both; what is checked, recorded and tested is the same.

mod adamw;
mod attention;
mod bf16_products;
mod bf16_tile;
mod buffers;
pub mod clock;
mod compute_type;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod floats;
mod frozen_weight;
mod gated_activation;
mod gemm;
mod graph;
mod held_weights;
mod kernels;
mod lanes;
mod layer_norm;
mod linear;
mod linear_cross_entropy;
mod look_up;
mod low_rank_linear;
mod nf4;
mod products;
mod quantization;
mod rms_norm;
mod rope;
mod rows;
mod sampling;
mod score;
mod seed_gradient;
mod select_rows;
mod thin_matrix;
mod vectorised;
mod verdict;

#[cfg(test)]
mod testing;

pub use adamw::{AdamWStep, TrainedWeight, adamw, squared_norm};
pub use attention::{AttentionShape, Segment, Visible, attention};
pub(crate) use attention::{Softmax, attention_forward, attention_gradients};
pub(crate) use buffers::add_onto;
pub use buffers::{begin_pass, recycle, release_all, release_unused};
pub use compute_type::ComputeType;
pub use cross_entropy::cross_entropy;
#[cfg(feature = "cuda")]
pub use cuda::{
    cuda_device, device_memory, device_model, pool_peak, reset_pool_peak, set_cuda_toolkit,
    set_kernel_cache,
};
pub use frozen_weight::FrozenWeight;
pub(crate) use gated_activation::gated_activation_gradients;
pub use gated_activation::{Activation, gated_activation};
pub use held_weights::HeldWeights;
pub use layer_norm::layer_norm;
pub(crate) use linear::{
    bias_gradient, linear_input_gradient, trained_linear_input_gradient, weight_gradient,
};
pub use linear::{linear, trained_linear};
pub(crate) use linear_cross_entropy::head_chunk_bytes;
pub use linear_cross_entropy::{linear_cross_entropy, trained_linear_cross_entropy};
pub use look_up::look_up;
pub use low_rank_linear::low_rank_linear;
pub(crate) use low_rank_linear::low_rank_linear_gradients;
pub(crate) use products::MANY_ROWS;
pub use quantization::Quantization;
pub use rms_norm::rms_norm;
pub(crate) use rms_norm::{rms_norm_input_gradient, rms_norm_weight_gradient};
pub(crate) use rope::rope_gradient;
pub use rope::{RotaryTable, rope};
pub(crate) use sampling::Sampler;
pub use sampling::Sampling;
pub use score::{TokenScore, score_logits, score_targets};
pub use seed_gradient::seed_gradient;
pub use select_rows::select_rows;
pub use verdict::{Fault, Reaction, StepLimits, Verdict};
