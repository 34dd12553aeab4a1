//! Hidden states that stay on the device that computed them.

use crate::Result;
use candle_core::{DType, Tensor};

/// The hidden states of examples as tensors of their own, as far as memory may go: nothing is copied to the host, so
/// nothing waits.
pub(super) struct DeviceRows {
    /// `(rows, width)` of each example.
    kept: Vec<Option<Tensor>>,
    width: usize,
    dtype: DType,
    memory_left: usize,
    to_come: usize,
}

impl DeviceRows {
    /// Room for `memory` bytes of rows of `width` values, kept as `dtype`.
    pub(super) fn new(examples: usize, width: usize, dtype: DType, memory: usize) -> Self {
        Self {
            kept: vec![None; examples],
            width,
            dtype,
            memory_left: memory,
            to_come: examples,
        }
    }

    /// As [`super::ActivationCache::rows`], the rows as `dtype`.
    pub(super) fn rows(&self, examples: &[usize], dtype: DType) -> Result<Option<Tensor>> {
        let kept = examples.iter().map(|example| self.kept[*example].as_ref());
        let Some(kept) = kept.collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let rows = match kept.as_slice() {
            // What is kept is never handed out itself: whoever is given rows may write there.
            [rows] => rows.force_contiguous()?,
            several => Tensor::cat(several, 0)?,
        };
        Ok(Some(rows.to_dtype(dtype)?))
    }

    /// As [`super::ActivationCache::keep`].
    pub(super) fn keep(
        &mut self,
        examples: &[usize],
        boundaries: &[usize],
        hidden: &Tensor,
    ) -> Result<()> {
        for (example, ends) in examples.iter().zip(boundaries.windows(2)) {
            let count = ends[1] - ends[0];
            if !self.takes_one(*example, count) {
                continue;
            }
            let rows = hidden.narrow(0, ends[0], count)?;
            // In memory of their own: a view would keep all of `hidden`.
            let rows = match rows.dtype() == self.dtype {
                true => rows.force_contiguous()?,
                false => rows.to_dtype(self.dtype)?,
            };
            self.memory_left -= self.bytes(count);
            self.to_come -= 1;
            self.kept[*example] = Some(rows.detach());
        }
        Ok(())
    }

    /// Whether there is room for an example that has not come yet.
    pub(super) fn is_waiting(&self) -> bool {
        self.to_come > 0 && self.bytes(1) <= self.memory_left
    }

    /// Whether any of these examples would be kept.
    pub(super) fn takes(&self, examples: &[usize], boundaries: &[usize]) -> bool {
        let mut counted = examples.iter().zip(boundaries.windows(2));
        counted.any(|(example, ends)| self.takes_one(*example, ends[1] - ends[0]))
    }

    fn takes_one(&self, example: usize, rows: usize) -> bool {
        self.kept[example].is_none() && self.bytes(rows) <= self.memory_left
    }

    fn bytes(&self, rows: usize) -> usize {
        rows * self.width * self.dtype.size_in_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn rows_come_back_in_the_order_in_which_they_are_asked_for() -> Result<()> {
        let hidden = Tensor::arange(0f32, 30.0, &Device::Cpu)?.reshape((10, 3))?;
        let mut cache = DeviceRows::new(4, 3, DType::F32, usize::MAX);
        cache.keep(&[2, 0], &[0, 4, 10], &hidden)?;
        let wanted = Tensor::cat(&[hidden.narrow(0, 4, 6)?, hidden.narrow(0, 0, 4)?], 0)?;
        let rows = cache.rows(&[0, 2], DType::F32)?.expect("both were kept");
        assert_eq!(rows.to_vec2::<f32>()?, wanted.to_vec2::<f32>()?);
        let row = cache.rows(&[2], DType::F32)?.expect("it was kept");
        assert_eq!(row.dims(), [4, 3]);
        assert!(cache.rows(&[1, 2], DType::F32)?.is_none());
        Ok(())
    }

    #[test]
    fn what_there_is_no_room_for_is_not_kept() -> Result<()> {
        let hidden = Tensor::zeros((10, 3), DType::F32, &Device::Cpu)?;
        // Four rows of three numbers, and not a fifth.
        for (dtype, memory) in [(DType::F32, 59), (DType::BF16, 29)] {
            let mut cache = DeviceRows::new(3, 3, dtype, memory);
            assert!(cache.is_waiting() && cache.takes(&[0, 1], &[0, 6, 10]));
            cache.keep(&[0, 1], &[0, 6, 10], &hidden)?;
            assert!(cache.rows(&[0], DType::F32)?.is_none());
            assert!(cache.rows(&[1], DType::F32)?.is_some());
            assert!(!cache.is_waiting() && !cache.takes(&[0, 1, 2], &[0, 6, 10, 11]));
        }
        Ok(())
    }

    #[test]
    fn nothing_waits_once_all_examples_have_come() -> Result<()> {
        let hidden = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
        let mut cache = DeviceRows::new(2, 3, DType::F32, usize::MAX);
        cache.keep(&[1, 1], &[0, 1, 2], &hidden)?;
        assert!(cache.is_waiting(), "one example came twice");
        cache.keep(&[0, 1], &[0, 1, 2], &hidden)?;
        assert!(!cache.is_waiting());
        Ok(())
    }
}
