//! Hidden states in main memory and in a file.

#![cfg_attr(
    unix,
    expect(unsafe_code, reason = "a file that nobody else can reach is mapped")
)]

use super::CacheType;
use crate::{Context, Result};
use candle_core::{Device, Tensor};
use half::bf16;
use std::fs::File;
use std::path::Path;

impl CacheType {
    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values
                .iter()
                .flat_map(|value| value.to_ne_bytes())
                .collect(),
            Self::Bf16 => values
                .iter()
                .flat_map(|value| bf16::from_f32(*value).to_ne_bytes())
                .collect(),
        }
    }

    fn decode(self, bytes: &[u8], values: &mut Vec<f32>) {
        match self {
            Self::F32 => {
                let (numbers, _) = bytes.as_chunks();
                values.extend(numbers.iter().map(|bytes| f32::from_ne_bytes(*bytes)));
            }
            Self::Bf16 => {
                let (numbers, _) = bytes.as_chunks();
                let numbers = numbers.iter().map(|bytes| bf16::from_ne_bytes(*bytes));
                values.extend(numbers.map(bf16::to_f32));
            }
        }
    }
}

/// Bytes that are allocated together, 64 MiB: allocators give back so large a piece at once, and pages that nothing was
/// written to take no room.
const CHUNK_BYTES: usize = 64 << 20;

/// The hidden states of examples, in memory as far as that may go, then in a mapped file.
pub(super) struct HostRows {
    width: usize,
    number: CacheType,
    kept: Vec<Place>,
    chunks: Vec<Vec<u8>>,
    memory_left: usize,
    spill: Option<Spill>,
}

/// Where the bytes of an example are.
enum Place {
    Nowhere,
    /// Chunk, offset and length.
    Memory(usize, usize, usize),
    /// Offset and length.
    File(usize, usize),
}

/// A file without a name: it is gone when the run ends, however it ends.
///
/// It is written, not mapped to write: on a full disk that is an error, where a mapping would end the process.
struct Spill {
    file: File,
    end: usize,
    /// The most bytes that it may have: checkpoints need room, too.
    most: u64,
    /// As much of it as there was when something beyond the last mapping was asked for.
    #[cfg(unix)]
    map: Option<memmap2::Mmap>,
}

impl HostRows {
    /// Room for `memory` bytes of rows of `width` values in memory, and for the others in a file in `folder`, if there is
    /// one.
    pub(super) fn new(
        examples: usize,
        width: usize,
        number: CacheType,
        memory: usize,
        folder: Option<&Path>,
    ) -> Result<Self> {
        let spill = match folder {
            Some(folder) if cfg!(unix) => Some(Spill {
                file: tempfile::tempfile_in(folder).at(folder.display())?,
                end: 0,
                most: free_bytes(folder).map_or(u64::MAX, |free| free / 2),
                #[cfg(unix)]
                map: None,
            }),
            _ => None,
        };
        Ok(Self {
            width,
            number,
            kept: (0..examples).map(|_| Place::Nowhere).collect(),
            chunks: Vec::new(),
            memory_left: memory,
            spill,
        })
    }

    /// As [`super::ActivationCache::rows`], in f32.
    pub(super) fn rows(&mut self, examples: &[usize]) -> Result<Option<Tensor>> {
        let mut values = Vec::new();
        for example in examples {
            let bytes = match self.kept[*example] {
                Place::Nowhere => return Ok(None),
                Place::Memory(chunk, start, length) => &self.chunks[chunk][start..start + length],
                Place::File(start, length) => match &mut self.spill {
                    Some(spill) => spill.read(start, length)?,
                    None => return Ok(None),
                },
            };
            self.number.decode(bytes, &mut values);
        }
        let rows = values.len() / self.width;
        let rows = Tensor::from_vec(values, (rows, self.width), &Device::Cpu)?;
        Ok(Some(rows))
    }

    /// As [`super::ActivationCache::keep`].
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
            let bytes = self.number.encode(&values);
            if bytes.len() <= self.memory_left {
                self.memory_left -= bytes.len();
                self.kept[*example] = self.store(&bytes);
            } else if let Some(spill) = &mut self.spill {
                match spill.write(&bytes) {
                    Ok(start) => self.kept[*example] = Place::File(start, bytes.len()),
                    // A full disk costs time, not the run: what did not fit is computed again.
                    Err(_) => break,
                }
            }
        }
        Ok(())
    }

    /// Gives back what the file takes; its examples are computed again, and no others go there. Whether it took anything.
    pub(super) fn give_back_file(&mut self) -> bool {
        for place in &mut self.kept {
            if matches!(place, Place::File(..)) {
                *place = Place::Nowhere;
            }
        }
        self.spill.take().is_some_and(|spill| spill.end > 0)
    }

    fn store(&mut self, bytes: &[u8]) -> Place {
        let fits = |chunk: &Vec<u8>| chunk.capacity() - chunk.len() >= bytes.len();
        if !self.chunks.last().is_some_and(fits) {
            let capacity = CHUNK_BYTES.max(bytes.len());
            self.chunks.push(Vec::with_capacity(capacity));
        }
        let index = self.chunks.len() - 1;
        let chunk = &mut self.chunks[index];
        let start = chunk.len();
        chunk.extend_from_slice(bytes);
        Place::Memory(index, start, bytes.len())
    }
}

/// What the file system of a folder has free for this process, in bytes, where it says so.
fn free_bytes(folder: &Path) -> Option<u64> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    if let Ok(system) = rustix::fs::statvfs(folder) {
        return Some(system.f_bavail.saturating_mul(system.f_frsize));
    }
    let _ = folder;
    None
}

#[cfg(unix)]
impl Spill {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        use std::os::unix::fs::FileExt;
        let start = self.end;
        if (start + bytes.len()) as u64 > self.most {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(bytes, start as u64)?;
        self.end += bytes.len();
        Ok(start)
    }

    fn read(&mut self, start: usize, length: usize) -> Result<&[u8]> {
        const NAME: &str = "the file of hidden states";
        let end = start + length;
        let map = match self.map.take() {
            Some(map) if map.len() >= end => map,
            _ => {
                let mut options = memmap2::MmapOptions::new();
                // SAFETY: the file has no name and this is its only handle; it is written at its end alone and never
                // made shorter, so what is mapped does not change.
                unsafe { options.len(self.end).map(&self.file) }.at(NAME)?
            }
        };
        let bytes = self.map.insert(map).get(start..end);
        bytes.ok_or_else(|| crate::Error::new("rows are missing at its end").at(NAME))
    }
}

#[cfg(not(unix))]
impl Spill {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn read(&mut self, _: usize, _: usize) -> Result<&[u8]> {
        Err(crate::Error::new("there is no file of hidden states"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[cfg(unix)]
    #[test]
    fn the_file_leaves_room_on_the_disk_and_can_be_given_back() -> Result<()> {
        let folder = tempfile::tempdir().at("a temporary folder")?;
        let hidden = Tensor::arange(0f32, 30.0, &Device::Cpu)?.reshape((10, 3))?;
        let mut cache = HostRows::new(2, 3, CacheType::F32, 0, Some(folder.path()))?;
        let spill = cache.spill.as_mut().expect("a file");
        let free = free_bytes(folder.path()).expect("a file system");
        assert!(spill.most > 0 && spill.most <= free);
        // Room for the first example's four rows of three values, and not for the other's six.
        spill.most = 100;
        cache.keep(&[0, 1], &[0, 4, 10], &hidden)?;
        assert!(cache.rows(&[0])?.is_some() && cache.rows(&[1])?.is_none());
        assert!(cache.give_back_file() && !cache.give_back_file());
        assert!(cache.rows(&[0])?.is_none());
        cache.keep(&[0], &[0, 4], &hidden)?;
        assert!(cache.rows(&[0])?.is_none());
        Ok(())
    }

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
            let mut cache = HostRows::new(4, 3, CacheType::F32, memory, folder)?;
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

    #[test]
    fn a_value_takes_as_many_bytes_as_its_type_says() {
        for number in [CacheType::F32, CacheType::Bf16] {
            let size = number.dtype(DType::F32).size_in_bytes();
            assert_eq!(number.encode(&[1.0, 2.0, 3.0]).len(), 3 * size);
        }
    }

    #[test]
    fn what_is_kept_shares_memory_and_is_never_moved_to_make_room() -> Result<()> {
        let mut cache = HostRows::new(0, 1, CacheType::F32, 0, None)?;
        let few = vec![0u8; 1 << 20];
        assert!(matches!(cache.store(&few), Place::Memory(0, 0, _)));
        assert!(matches!(cache.store(&few), Place::Memory(0, start, _) if start == few.len()));
        let many = vec![0u8; CHUNK_BYTES - few.len()];
        assert!(matches!(cache.store(&many), Place::Memory(1, 0, _)));
        Ok(())
    }

    #[test]
    fn the_file_is_read_while_it_grows() -> Result<()> {
        let folder = tempfile::tempdir().at("a temporary folder")?;
        let mut cache = HostRows::new(3, 3, CacheType::F32, 0, Some(folder.path()))?;
        for example in 0..3 {
            let first = example as f32 * 100.0;
            let hidden = Tensor::arange(first, first + 3000.0, &Device::Cpu)?.reshape((1000, 3))?;
            cache.keep(&[example], &[0, 1000], &hidden)?;
            // The newest first: it lies behind the end of what was read before.
            for known in (0..=example).rev() {
                let rows = cache.rows(&[known])?.expect("it was kept");
                assert_eq!(rows.to_vec2::<f32>()?[0][0], known as f32 * 100.0);
            }
        }
        Ok(())
    }
}
