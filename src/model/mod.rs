//! Hugging Face checkpoints: what a model is, where its weights lie, and how they get here.

pub mod checkpoint;
pub mod config;
pub mod hub;
pub mod rotary;
