//! Hidden states below the lowest trained block, kept from epoch to epoch.
//!
//! What no trained weight has touched is the same in every epoch: a method that trains the last blocks alone computes it
//! once for each example, and from then on runs these blocks only. In f32 the losses are the same to the bit as without;
//! in bf16, half as large, the trained blocks see the rounded values from the first epoch on, so that a run that is
//! resumed, with nothing kept yet, goes on to the same bits too.
//!
//! The CPU keeps them in main memory and what is more in a file, a GPU in its own memory alone: to bring them from
//! elsewhere would have it wait.

mod device_rows;
mod host_rows;

use crate::Result;
use crate::model::Placement;
use candle_core::{DType, Tensor};
use device_rows::DeviceRows;
use host_rows::HostRows;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The number type of kept hidden states.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum CacheType {
    /// As they are: the same losses as without a cache, to the bit
    #[default]
    F32,
    /// Rounded, in half the room: the trained blocks see rounded hidden states in every epoch
    Bf16,
}

impl CacheType {
    /// What a value that is computed as `activations` is kept as: one in 16 bits takes no more.
    pub fn dtype(self, activations: DType) -> DType {
        match self {
            Self::F32 => activations,
            Self::Bf16 => DType::BF16,
        }
    }

    /// What the blocks above are to see of `hidden`, in its own type.
    fn rounded(self, hidden: Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::F32 => hidden,
            Self::Bf16 => hidden.to_dtype(DType::BF16)?.to_dtype(hidden.dtype())?,
        })
    }
}

/// The hidden states of examples.
pub struct ActivationCache {
    number: CacheType,
    kept: Kept,
}

enum Kept {
    Host(HostRows),
    Device(DeviceRows),
}

impl ActivationCache {
    /// A cache for `examples` examples of hidden states of `width` values that are computed at `placement`: `memory` bytes
    /// of them. The others go to a file in `folder`; if there is none, and on a GPU, they are not kept.
    pub fn new(
        placement: &Placement,
        examples: usize,
        width: usize,
        number: CacheType,
        memory: usize,
        folder: Option<&Path>,
    ) -> Result<Self> {
        let dtype = number.dtype(placement.activations());
        let kept = match placement.device.is_cpu() {
            true => Kept::Host(HostRows::new(examples, width, number, memory, folder)?),
            false => Kept::Device(DeviceRows::new(examples, width, dtype, memory)),
        };
        Ok(Self { number, kept })
    }

    /// The rows of these examples end to end, `(rows, width)`, of the type of `like`, if all of them are there.
    pub(super) fn rows(&mut self, examples: &[usize], like: &Tensor) -> Result<Option<Tensor>> {
        match &mut self.kept {
            Kept::Host(rows) => rows.rows(examples),
            Kept::Device(rows) => rows.rows(examples, like.dtype()),
        }
    }

    /// Keeps the rows of these examples, `boundaries` being their starts in `hidden` and its end, and returns what the
    /// blocks above are to see: `hidden`, rounded where the cache rounds.
    pub(super) fn keep(
        &mut self,
        examples: &[usize],
        boundaries: &[usize],
        hidden: Tensor,
    ) -> Result<Tensor> {
        let hidden = self.number.rounded(hidden)?;
        match &mut self.kept {
            Kept::Host(rows) => rows.keep(examples, boundaries, &hidden)?,
            Kept::Device(rows) => rows.keep(examples, boundaries, &hidden)?,
        }
        Ok(hidden)
    }

    /// Gives back what it takes on the disk, which is computed again from now on. Whether that was anything.
    pub(super) fn give_back_file(&mut self) -> bool {
        match &mut self.kept {
            Kept::Host(rows) => rows.give_back_file(),
            Kept::Device(_) => false,
        }
    }

    /// Whether a run that goes on must have what its earlier steps kept, and lacks some of it: on a GPU the last bits of a
    /// row depend on the pass that it was computed in.
    pub(super) fn lacks_earlier_passes(&self) -> bool {
        match &self.kept {
            Kept::Host(_) => false,
            Kept::Device(rows) => rows.is_waiting(),
        }
    }

    /// Whether [`ActivationCache::keep`] would keep anything of these examples.
    pub(super) fn takes(&self, examples: &[usize], boundaries: &[usize]) -> bool {
        match &self.kept {
            Kept::Host(_) => true,
            Kept::Device(rows) => rows.takes(examples, boundaries),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Context;
    use candle_core::Device;

    #[test]
    fn the_blocks_above_see_rounded_values_from_the_first_time_on() -> Result<()> {
        let folder = tempfile::tempdir().at("a temporary folder")?;
        let hidden = Tensor::new(&[[1.0f32, 1.004, f32::NAN]], &Device::Cpu)?;
        let host = |memory| -> Result<Kept> {
            let rows = HostRows::new(1, 3, CacheType::Bf16, memory, Some(folder.path()))?;
            Ok(Kept::Host(rows))
        };
        let device = Kept::Device(DeviceRows::new(1, 3, DType::BF16, 6));
        for kept in [host(6)?, host(0)?, device] {
            let number = CacheType::Bf16;
            let mut cache = ActivationCache { number, kept };
            let bits = |rows: Tensor| -> Result<Vec<u32>> {
                let values: Vec<f32> = rows.flatten_all()?.to_vec1()?;
                Ok(values.into_iter().map(f32::to_bits).collect())
            };
            let seen = bits(cache.keep(&[0], &[0, 1], hidden.clone())?)?;
            assert_eq!(seen[..2], [1.0f32.to_bits(), 1.007_812_5f32.to_bits()]);
            assert!(f32::from_bits(seen[2]).is_nan());
            assert_eq!(
                bits(cache.rows(&[0], &hidden)?.expect("it was kept"))?,
                seen
            );
        }
        Ok(())
    }

    #[test]
    fn what_is_computed_in_16_bits_takes_no_more() {
        for (number, activations, kept) in [
            (CacheType::F32, DType::F32, DType::F32),
            (CacheType::Bf16, DType::F32, DType::BF16),
            (CacheType::F32, DType::BF16, DType::BF16),
            (CacheType::Bf16, DType::BF16, DType::BF16),
        ] {
            assert_eq!(number.dtype(activations), kept);
        }
    }
}
