//! The number type in which products with frozen weights are computed.

use crate::{Error, Result};
use std::str::FromStr;

/// The type of the factors of a product with a frozen weight; sums are always f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ComputeType {
    /// Exact: a weight stored in 16 bits is widened.
    #[default]
    F32,
    /// Activations and gradients are rounded to bf16 on their way into the product.
    Bf16,
}

impl ComputeType {
    /// Its name in options, run files and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

impl FromStr for ComputeType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            other => {
                Err(Error::new(format!("`{other}` is not a compute type")).hint("use f32 or bf16"))
            }
        }
    }
}
