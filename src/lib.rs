//! Parameter-efficient fine-tuning of Hugging Face checkpoints, on candle.

pub use bounded::BoundedAllocator;
pub use control::Control;
pub use retune_adapters as adapters;
pub use retune_adapters::{Context, Error, ErrorKind, IntoError, Result};

pub mod adapter_folder;
pub mod atomic;
pub mod bench;
mod bounded;
pub mod cli;
pub mod compare;
mod control;
pub mod data;
mod digest;
pub mod evaluate;
pub mod generate;
mod guard;
pub mod inspect;
pub mod merge;
pub mod model;
pub mod ops;
pub mod plan;
pub mod pretrain;
pub mod report;
pub mod task;
pub mod train;
