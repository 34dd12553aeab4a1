//! The types with fewer bits in which frozen weights can be held.

use crate::{Error, Result};
use std::str::FromStr;

/// A type with fewer bits than the checkpoint's, in which the linear layers of a base's blocks are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// 4-bit NormalFloat: 4.5 bits a weight (QLoRA, Dettmers et al. 2023).
    Nf4,
}

impl Quantization {
    /// Its name in options, run files and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
        }
    }

    /// Memory of `count` weights, in bytes.
    pub fn bytes(self, count: u64) -> u64 {
        match self {
            // Half a byte for each, and an f32 for 64 of them.
            Self::Nf4 => count.div_ceil(64) * 36,
        }
    }
}

impl FromStr for Quantization {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "nf4" => Ok(Self::Nf4),
            other => Err(Error::new(format!("`{other}` is not a quantised type")).hint("use nf4")),
        }
    }
}
