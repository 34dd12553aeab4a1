//! What a run leaves for people to read: metrics, plots, event files, the model card.

pub mod memory;
pub mod metrics;
