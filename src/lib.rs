//! Parameter-efficient fine-tuning of Hugging Face checkpoints, on candle.

pub use retune_adapters as adapters;
pub use retune_adapters::{Context, Error, ErrorKind, IntoError, Result};

pub mod atomic;
pub mod cli;
pub mod ops;
pub mod report;
