//! Hidden states below the lowest trained block, kept from epoch to epoch.
//!
//! What no trained weight has touched is the same in every epoch: a method that trains the last blocks alone computes it
//! once for each example, and from then on runs these blocks only. The values are kept as they are, in f32, so that the
//! losses are the same to the bit.

use crate::{Context, Result};
use candle_core::{Device, Tensor};
use std::fs::File;
use std::path::Path;

/// Values that are allocated together, 64 MiB: allocators give back so large a piece at once, and pages that nothing was
/// written to take no room.
const CHUNK_VALUES: usize = 1 << 24;

/// The hidden states of examples, in memory as far as that may go, then in a file.
pub struct ActivationCache {
    width: usize,
    kept: Vec<Place>,
    chunks: Vec<Vec<f32>>,
    memory_left: usize,
    spill: Option<Spill>,
}

enum Place {
    Nowhere,
    /// Chunk, offset and number of values.
    Memory(usize, usize, usize),
    /// Offset in bytes and number of values.
    File(u64, usize),
}

/// A file without a name: it is gone when the run ends, however it ends.
struct Spill {
    file: File,
    end: u64,
}

impl ActivationCache {
    /// A cache for `examples` examples of hidden states of `width` values: `memory` bytes of them in memory, the others
    /// in a file in `folder`, or not at all if there is none.
    pub fn new(
        examples: usize,
        width: usize,
        memory: usize,
        folder: Option<&Path>,
    ) -> Result<Self> {
        let spill = match folder {
            Some(folder) if cfg!(unix) => Some(Spill {
                file: tempfile::tempfile_in(folder).at(folder.display())?,
                end: 0,
            }),
            _ => None,
        };
        Ok(Self {
            width,
            kept: (0..examples).map(|_| Place::Nowhere).collect(),
            chunks: Vec::new(),
            memory_left: memory,
            spill,
        })
    }

    /// The rows of these examples end to end, `(rows, width)`, if all of them are there.
    pub(super) fn rows(&self, examples: &[usize]) -> Result<Option<Tensor>> {
        let mut values = Vec::new();
        for example in examples {
            match &self.kept[*example] {
                Place::Nowhere => return Ok(None),
                Place::Memory(chunk, start, length) => {
                    values.extend_from_slice(&self.chunks[*chunk][*start..start + length]);
                }
                Place::File(offset, length) => match &self.spill {
                    Some(spill) => spill.read(*offset, *length, &mut values)?,
                    None => return Ok(None),
                },
            }
        }
        let rows = values.len() / self.width;
        Ok(Some(Tensor::from_vec(
            values,
            (rows, self.width),
            &Device::Cpu,
        )?))
    }

    /// Keeps the rows of these examples: `boundaries` are their starts in `hidden`, and its end.
    pub(super) fn keep(
        &mut self,
        examples: &[usize],
        boundaries: &[usize],
        hidden: &Tensor,
    ) -> Result<()> {
        for (example, ends) in examples.iter().zip(boundaries.windows(2)) {
            if !matches!(self.kept[*example], Place::Nowhere) {
                continue;
            }
            let rows = hidden.narrow(0, ends[0], ends[1] - ends[0])?;
            let values: Vec<f32> = rows.flatten_all()?.to_vec1()?;
            let bytes = size_of_val(values.as_slice());
            if bytes <= self.memory_left {
                self.memory_left -= bytes;
                self.kept[*example] = self.store(&values);
            } else if let Some(spill) = &mut self.spill {
                match spill.write(&values) {
                    Ok(offset) => self.kept[*example] = Place::File(offset, values.len()),
                    // A full disk costs time, not the run: what did not fit is computed again.
                    Err(_) => return Ok(()),
                }
            }
        }
        Ok(())
    }
}

impl ActivationCache {
    fn store(&mut self, values: &[f32]) -> Place {
        let fits = |chunk: &Vec<f32>| chunk.capacity() - chunk.len() >= values.len();
        if !self.chunks.last().is_some_and(fits) {
            let capacity = CHUNK_VALUES.max(values.len());
            self.chunks.push(Vec::with_capacity(capacity));
        }
        let index = self.chunks.len() - 1;
        let chunk = &mut self.chunks[index];
        let start = chunk.len();
        chunk.extend_from_slice(values);
        Place::Memory(index, start, values.len())
    }
}

#[cfg(unix)]
impl Spill {
    fn write(&mut self, values: &[f32]) -> std::io::Result<u64> {
        use std::os::unix::fs::FileExt;
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_ne_bytes())
            .collect();
        let offset = self.end;
        self.file.write_all_at(&bytes, offset)?;
        self.end += bytes.len() as u64;
        Ok(offset)
    }

    fn read(&self, offset: u64, length: usize, values: &mut Vec<f32>) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; length * size_of::<f32>()];
        self.file
            .read_exact_at(&mut bytes, offset)
            .at("the file of hidden states")?;
        let (numbers, _) = bytes.as_chunks();
        values.extend(numbers.iter().map(|bytes| f32::from_ne_bytes(*bytes)));
        Ok(())
    }
}

#[cfg(not(unix))]
impl Spill {
    fn write(&mut self, _: &[f32]) -> std::io::Result<u64> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn read(&self, _: u64, _: usize, _: &mut Vec<f32>) -> Result<()> {
        Err(crate::Error::new("there is no file of hidden states"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_from_memory_and_from_the_file() -> Result<()> {
        let folder = tempfile::tempdir().at("a temporary folder")?;
        let hidden = Tensor::arange(0f32, 30.0, &Device::Cpu)?.reshape((10, 3))?;
        // Room for the first example alone.
        for (memory, folder, found) in [
            (48, Some(folder.path()), true),
            (0, Some(folder.path()), true),
            (1000, None, true),
            (48, None, false),
        ] {
            let mut cache = ActivationCache::new(4, 3, memory, folder)?;
            assert!(cache.rows(&[2])?.is_none());
            cache.keep(&[2, 0], &[0, 4, 10], &hidden)?;
            assert!(cache.rows(&[1, 2])?.is_none());
            let rows = cache.rows(&[0, 2])?;
            assert_eq!(rows.is_some(), found);
            let wanted = Tensor::cat(&[hidden.narrow(0, 4, 6)?, hidden.narrow(0, 0, 4)?], 0)?;
            if let Some(rows) = rows {
                assert_eq!(rows.to_vec2::<f32>()?, wanted.to_vec2::<f32>()?);
            }
        }
        Ok(())
    }
}
