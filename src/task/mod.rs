//! What is learned: one loss a file.

pub mod causal_lm;
