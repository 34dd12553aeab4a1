//! Hugging Face checkpoints: what a model is, where its weights lie, and how they get here.

pub mod backward;
mod base_weights;
pub mod causal_lm;
pub mod checkpoint;
pub mod config;
mod decoder;
mod embedding;
pub(crate) mod files;
pub mod hub;
pub mod inventory;
mod kv_cache;
pub mod linear;
mod load;
mod named_shapes;
mod placement;
pub mod rotary;
mod scope;

pub use causal_lm::CausalLm;
pub use config::ModelConfig;
pub use inventory::{Parameter, ParameterKind, inventory};
pub use kv_cache::{BlockCache, KvCache};
pub use load::{Model, load, load_adapted, load_on, random, repeated};
pub use named_shapes::{named_shape, named_shapes};
pub use placement::{Placement, cuda_device};
