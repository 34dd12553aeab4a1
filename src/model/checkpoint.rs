//! The weights of a checkpoint: `model.safetensors`, or its index and shards, memory-mapped.
//!
//! Formats: <https://huggingface.co/docs/safetensors> and, for the index, `model.safetensors.index.json` as
//! transformers writes it (`weight_map`: tensor name → file name). Pickles are refused: they can run code.

#[cfg(test)]
mod tests;

use crate::adapters::storage::read_text;
use crate::data::{has_file, quoted};
use crate::digest::hexadecimal;
use crate::{Context, Error, Result};
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// What weights in Python's own format are called.
const PICKLES: [&str; 6] = [".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl"];
/// The limit of the safetensors crate.
const LONGEST_HEADER: usize = 100_000_000;
/// Bytes that are hashed at a time: many fit a tensor, so that all threads have work.
const HASHED_PIECE: usize = 8 << 20;
const TRUNCATED: &str = "the file is damaged or was not written to its end: compare its size with the original, or download it again";

/// All tensors of a checkpoint, by name.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Stored>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Shard {
    file_name: String,
    map: Arc<Mmap>,
}

/// Where a tensor lies. The range is within the mapping and fits shape and type: `read_header` has checked it.
#[derive(Debug, Clone, PartialEq)]
struct Stored {
    shard: usize,
    bytes: Range<usize>,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// What [`Checkpoint::digest`] finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightsDigest {
    /// The SHA-256, in hexadecimal digits.
    pub sha256: String,
    /// Whether every weight is a finite number.
    pub finite: bool,
}

/// Whether no value among these bytes is a NaN or infinite: not all bits of its exponent are ones.
fn all_finite(bytes: &[u8], dtype: Dtype) -> bool {
    match dtype {
        Dtype::BF16 => none_with(bytes, |value| u16::from_le_bytes(value) & 0x7f80 == 0x7f80),
        Dtype::F16 => none_with(bytes, |value| u16::from_le_bytes(value) & 0x7c00 == 0x7c00),
        Dtype::F32 => {
            const ONES: u32 = 0x7f80_0000;
            none_with(bytes, |value| u32::from_le_bytes(value) & ONES == ONES)
        }
        Dtype::F64 => {
            const ONES: u64 = 0x7ff0_0000_0000_0000;
            none_with(bytes, |value| u64::from_le_bytes(value) & ONES == ONES)
        }
        // Other types hold no weights that are read.
        _ => true,
    }
}

/// Whether no value of `N` bytes is `odd`. Only after some thousands is it asked whether one was: a loop without a way out
/// is one that the compiler makes vector instructions of.
fn none_with<const N: usize>(bytes: &[u8], odd: impl Fn([u8; N]) -> bool) -> bool {
    let mut parts = bytes.as_chunks::<N>().0.chunks(4096);
    parts.all(|part| !part.iter().fold(false, |found, value| found | odd(*value)))
}

/// One tensor in a mapped file. Cloning it copies no weights.
#[derive(Debug, Clone)]
pub struct TensorView {
    /// The file; kept mapped for as long as a view of it exists.
    pub map: Arc<Mmap>,
    /// Where in the file the tensor lies.
    pub bytes: Range<usize>,
    /// The type of its values.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

impl TensorView {
    /// The stored bytes, little-endian, row by row.
    pub fn data(&self) -> &[u8] {
        // `Checkpoint::open` has checked the range; an empty slice stands for what cannot be.
        self.map.get(self.bytes.clone()).unwrap_or_default()
    }

    /// Gives the memory of what was read of it back to the system; it is read from the file again if it is asked for.
    pub(super) fn release(&self) {
        release(&self.map, &self.bytes);
    }

    /// A copy on the CPU, in the type of the file.
    pub fn to_tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_raw_buffer(
            self.data(),
            self.dtype,
            &self.shape,
            &Device::Cpu,
        )?)
    }

    /// A copy on the CPU, widened to f32.
    pub fn to_f32_tensor(&self) -> Result<Tensor> {
        Ok(self.to_tensor()?.to_dtype(DType::F32)?)
    }
}

impl Checkpoint {
    /// Maps the weights in `folder` and checks that every file is whole.
    pub fn open(folder: &Path) -> Result<Self> {
        let single = folder.join(SINGLE);
        let index = folder.join(INDEX);
        if has_file(&single)? {
            return Self::map(folder, vec![SINGLE.to_owned()], None);
        }
        if !has_file(&index)? {
            return Err(no_weights(folder));
        }
        let text = read_text(&index).at(index.display())?;
        let weight_map = read_index(&text).at(index.display())?;
        let files: BTreeSet<String> = weight_map.values().cloned().collect();
        let missing: Vec<&str> = files
            .iter()
            .filter(|file| !folder.join(file).is_file())
            .map(String::as_str)
            .collect();
        if !missing.is_empty() {
            return Err(Error::new(format!(
                "{} of the {} files it lists are missing: {}",
                missing.len(),
                files.len(),
                listed(&missing)
            ))
            .at(index.display())
            .hint("download the missing files into the folder"));
        }
        Self::map(folder, files.into_iter().collect(), Some(&weight_map))
    }

    fn map(
        folder: &Path,
        files: Vec<String>,
        index: Option<&BTreeMap<String, String>>,
    ) -> Result<Self> {
        let mut shards = Vec::with_capacity(files.len());
        let mut tensors = BTreeMap::new();
        let mut metadata = BTreeMap::new();
        let mut twice = Vec::new();
        for (shard, file_name) in files.into_iter().enumerate() {
            let path = folder.join(&file_name);
            let map = map_file(&path).at(path.display())?;
            let (stored, header) = read_header(&map, shard).at(path.display())?;
            metadata.extend(header);
            for (name, place) in stored {
                // Where a tensor is in two files, the index says which one counts.
                match index.and_then(|index| index.get(&name)) {
                    Some(file) if *file != file_name => continue,
                    _ => {}
                }
                if tensors.insert(name.clone(), place).is_some() {
                    twice.push(name);
                }
            }
            shards.push(Shard {
                file_name,
                map: Arc::new(map),
            });
        }
        if tensors.is_empty() {
            return Err(Error::new("the safetensors files hold no tensor")
                .at(folder.display())
                .hint(TRUNCATED));
        }
        if !twice.is_empty() {
            return Err(Error::new(format!(
                "in more than one file and not in the index: {}",
                listed(&twice)
            ))
            .at(folder.display())
            .hint(
                "write the index again, or remove the file that does not belong to the checkpoint",
            ));
        }
        let absent: Vec<&str> = index
            .into_iter()
            .flatten()
            .map(|(name, _)| name.as_str())
            .filter(|name| !tensors.contains_key(*name))
            .collect();
        if !absent.is_empty() {
            return Err(Error::new(format!(
                "the index lists tensors that their files lack: {}",
                listed(&absent)
            ))
            .at(folder.join(INDEX).display())
            .hint("index and shards are of different versions: download them again together"));
        }
        Ok(Self {
            folder: folder.to_owned(),
            shards,
            tensors,
            metadata,
        })
    }

    /// The folder it was opened in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The names of all tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The dimensions of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|stored| stored.shape.as_slice())
    }

    /// The tensor `name`, if it is of a type that can be computed with.
    pub fn get(&self, name: &str) -> Result<TensorView> {
        let (stored, map) = self.find(name)?;
        let dtype = match stored.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::U8 => DType::U8,
            Dtype::U32 => DType::U32,
            Dtype::I16 => DType::I16,
            Dtype::I32 => DType::I32,
            Dtype::I64 => DType::I64,
            other => {
                return Err(Error::new(format!(
                    "the tensor `{name}` is of type {other}, which is not implemented"
                ))
                .at(self.folder.display())
                .hint("take a version of the checkpoint in BF16, F16 or F32"));
            }
        };
        Ok(TensorView {
            map: map.clone(),
            bytes: stored.bytes.clone(),
            dtype,
            shape: stored.shape.clone(),
        })
    }

    /// The tensor `name` exactly as stored, of whatever type: for writing it to another file.
    pub fn stored(&self, name: &str) -> Result<safetensors::tensor::TensorView<'_>> {
        let (stored, map) = self.find(name)?;
        let data = map.get(stored.bytes.clone()).unwrap_or_default();
        safetensors::tensor::TensorView::new(stored.dtype, stored.shape.clone(), data)
            .at(self.folder.display())
    }

    fn find(&self, name: &str) -> Result<(&Stored, &Arc<Mmap>)> {
        let found = self
            .tensors
            .get(name)
            .and_then(|stored| Some((stored, &self.shards.get(stored.shard)?.map)));
        found.ok_or_else(|| {
            let error = Error::new(format!("the checkpoint has no tensor `{name}`"))
                .at(self.folder.display());
            let last = name
                .rsplit('.')
                .find(|part| !matches!(*part, "weight" | "bias"))
                .unwrap_or(name);
            let near: Vec<&str> = self
                .names()
                .filter(|known| known.contains(last))
                .take(4)
                .collect();
            match near.as_slice() {
                [] => error.hint("`config.json` and the weights may belong to different models"),
                near => error.hint(format!("similar names in it: {}", listed(near))),
            }
        })
    }

    /// The files in alphabetical order, each with the names of its tensors.
    pub fn shards(&self) -> impl Iterator<Item = (&str, Vec<&str>)> {
        self.shards
            .iter()
            .enumerate()
            .map(|(shard, Shard { file_name, .. })| {
                let own = self
                    .tensors
                    .iter()
                    .filter(move |(_, stored)| stored.shard == shard);
                (
                    file_name.as_str(),
                    own.map(|(name, _)| name.as_str()).collect(),
                )
            })
    }

    /// The free-form texts in the headers, such as `format`: `pt`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Identifies the weights by all of their bytes, and sees whether one of them is not finite.
    ///
    /// Covers every name, type and shape too. How the weights are spread over files does not matter. Each piece of
    /// 8 MiB is hashed by itself, on any thread, and given back to the system: what is resident stays small.
    pub fn digest(&self) -> WeightsDigest {
        let mut hash = Sha256::new();
        hash.update(b"retune base bytes 1\0");
        let mut pieces = Vec::new();
        for (name, stored) in &self.tensors {
            for text in [
                name,
                &stored.dtype.to_string(),
                &format!("{:?}", stored.shape),
            ] {
                hash.update((text.len() as u64).to_le_bytes());
                hash.update(text);
            }
            let starts = stored.bytes.clone().step_by(HASHED_PIECE);
            pieces.extend(starts.map(|start| {
                let end = (start + HASHED_PIECE).min(stored.bytes.end);
                (&self.shards[stored.shard].map, start..end, stored.dtype)
            }));
        }
        let sums: Vec<_> = pieces
            .into_par_iter()
            .map(|(map, bytes, dtype)| {
                let piece = map.get(bytes.clone()).unwrap_or_default();
                let seen = (Sha256::digest(piece), all_finite(piece, dtype));
                release(map, &bytes);
                seen
            })
            .collect();
        sums.iter().for_each(|(sum, _)| hash.update(sum));
        WeightsDigest {
            sha256: hexadecimal(&hash.finalize()),
            finite: sums.iter().all(|(_, finite)| *finite),
        }
    }

    /// Identifies the weights by a sample of them: a SHA-256, in hexadecimal digits.
    ///
    /// Covers every name and shape and up to 4096 values of each tensor, widened to f32: all of a small one, 32 runs
    /// spread evenly over a large one. How the weights are spread over files does not matter, nor does a wider type.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(b"retune base 1\0");
        for name in self.names() {
            let stored = self.stored(name)?;
            for text in [name, &format!("{:?}", stored.shape())] {
                hash.update((text.len() as u64).to_le_bytes());
                hash.update(text);
            }
            sample(stored.data(), stored.dtype(), &mut hash);
        }
        Ok(hexadecimal(&hash.finalize()))
    }
}

/// Hashes 32 runs of 128 values, or all values where there are no more than that.
fn sample(data: &[u8], dtype: Dtype, hash: &mut Sha256) {
    const RUNS: usize = 32;
    const RUN: usize = 128;
    let width = (dtype.bitsize() / 8).max(1);
    let values = data.len() / width;
    let run = |start: usize, length: usize| {
        data.get(start * width..(start + length) * width)
            .unwrap_or_default()
    };
    let runs: Vec<&[u8]> = match values {
        0..=4096 => vec![data],
        _ => (0..RUNS)
            .map(|index| run((values - RUN) * index / (RUNS - 1), RUN))
            .collect(),
    };
    for bytes in runs {
        match widened(bytes, dtype) {
            Some(values) => values.for_each(|value| hash.update(value.to_le_bytes())),
            None => {
                hash.update(dtype.to_string());
                hash.update(bytes);
            }
        }
    }
}

/// The values as f32, if they are real numbers.
fn widened(bytes: &[u8], dtype: Dtype) -> Option<Box<dyn Iterator<Item = f32> + '_>> {
    let pairs = || bytes.as_chunks().0.iter().copied();
    Some(match dtype {
        Dtype::BF16 => Box::new(pairs().map(|pair| half::bf16::from_le_bytes(pair).to_f32())),
        Dtype::F16 => Box::new(pairs().map(|pair| half::f16::from_le_bytes(pair).to_f32())),
        Dtype::F32 => Box::new(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|four| f32::from_le_bytes(*four)),
        ),
        Dtype::F64 => Box::new(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|eight| f64::from_le_bytes(*eight) as f32),
        ),
        _ => return None,
    })
}

/// Gives the memory of what was read of a mapping back to the system.
#[cfg_attr(
    not(unix),
    expect(unused_variables, reason = "the system is told on Unix alone")
)]
fn release(map: &Mmap, bytes: &Range<usize>) {
    #[cfg(unix)]
    #[expect(
        unsafe_code,
        reason = "the only advice that takes effect at once is unsafe for mappings that can be written to"
    )]
    // SAFETY: the mapping is shared with the file and read-only, so that a page that is dropped comes back as it was.
    // Where the system refuses, the pages stay: they are cache, and go when memory is short.
    let _ = unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len())
    };
}

fn map_file(path: &Path) -> Result<Mmap> {
    let file = std::fs::File::open(path).map_err(crate::IntoError::into_error)?;
    #[expect(
        unsafe_code,
        reason = "weights must not be copied into memory, and a mapping is only safe by agreement"
    )]
    // SAFETY: the mapping is read-only and lives in an `Arc` beside every slice of it. What Rust cannot rule out is
    // another process that writes to or cuts the file meanwhile; retune itself writes by renaming new files into
    // place, which leaves mapped ones as they were.
    let map = unsafe { Mmap::map(&file) };
    map.map_err(crate::IntoError::into_error)
}

type Header = (Vec<(String, Stored)>, BTreeMap<String, String>);

/// Reads and checks the header of a safetensors file held in `file`: 8 bytes with its length, then JSON.
fn read_header(file: &[u8], shard: usize) -> Result<Header> {
    if file.starts_with(b"version https://git-lfs") {
        return Err(
            Error::new("this is a Git LFS pointer, not the weights themselves").hint(
                "run `git lfs pull` in the repository, or let retune download it by its hub id",
            ),
        );
    }
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(Error::new(format!(
            "not a safetensors file: it has only {} bytes",
            file.len()
        ))
        .hint(TRUNCATED));
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length)
        .ok()
        .filter(|length| *length <= LONGEST_HEADER)
        .ok_or_else(|| {
            Error::new(format!(
                "not a safetensors file: its first 8 bytes announce a header of {length} bytes"
            ))
            .hint("expected weights in the safetensors format, whatever the file's name says")
        })?;
    if header == 0 {
        return Err(Error::new("the safetensors header is empty").hint(TRUNCATED));
    }
    let (header, data) = rest.split_at_checked(header).ok_or_else(|| {
        Error::new(format!(
            "the header should have {length} bytes, and the whole file has {}",
            file.len()
        ))
        .hint(TRUNCATED)
    })?;
    // The crate checks here that shapes, types and offsets agree and that tensors neither overlap nor leave gaps.
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|error| Error::new(format!("bad safetensors header: {error}")))?;
    if metadata.data_len() != data.len() {
        let start = file.len() - data.len();
        return Err(Error::new(format!(
            "the header announces {} bytes of weights after the first {start}, and there are {}",
            metadata.data_len(),
            data.len()
        ))
        .hint(TRUNCATED));
    }
    let start = file.len() - data.len();
    let tensors = metadata.offset_keys().into_iter().filter_map(|name| {
        let info = metadata.info(&name)?;
        let (from, to) = info.data_offsets;
        let stored = Stored {
            shard,
            bytes: start + from..start + to,
            dtype: info.dtype,
            shape: info.shape.clone(),
        };
        Some((name, stored))
    });
    let texts = metadata
        .metadata()
        .iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.clone()));
    Ok((tensors.collect(), texts.collect()))
}

/// The files that the index in `folder` lists, in alphabetical order.
pub(super) fn shard_files(folder: &Path) -> Result<Vec<String>> {
    let index = folder.join(INDEX);
    let text = read_text(&index).at(index.display())?;
    let files: BTreeSet<String> = read_index(&text)
        .at(index.display())?
        .into_values()
        .collect();
    Ok(files.into_iter().collect())
}

/// Whether a file is, by its name, a pickle.
pub(super) fn is_pickle(file: &str) -> bool {
    PICKLES.iter().any(|ending| file.ends_with(ending))
}

/// Reads an index: tensor name → file name. File names are plain names of files beside it.
fn read_index(text: &str) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = serde_json::from_str(text).map_err(crate::IntoError::into_error)?;
    if weight_map.is_empty() {
        return Err(Error::new("the `weight_map` is empty").hint("download the file again"));
    }
    let outside: BTreeSet<&str> = weight_map
        .values()
        .map(String::as_str)
        .filter(|file| !is_plain(file))
        .collect();
    if !outside.is_empty() {
        return Err(Error::new(format!(
            "file names in an index must be plain names ending in `.safetensors`, not {}",
            listed(&outside.into_iter().collect::<Vec<_>>())
        ))
        .hint("do not use this checkpoint unless you trust where it comes from"));
    }
    Ok(weight_map)
}

/// Whether a name stands for a file in the same folder on every system.
fn is_plain(file: &str) -> bool {
    let mut components = Path::new(file).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == file)
        && !file.contains(['/', '\\', ':', '\0'])
        && file.ends_with(".safetensors")
}

fn no_weights(folder: &Path) -> Error {
    if !folder.is_dir() {
        let fact = if folder.exists() {
            "expected a folder, found a file"
        } else {
            "no such folder"
        };
        return Error::new(fact)
            .at(folder.display())
            .hint("point to the folder that holds `config.json` and the weights");
    }
    let names: BTreeSet<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let with = |endings: &[&str]| {
        let found: Vec<&str> = names
            .iter()
            .map(String::as_str)
            .filter(|name| endings.iter().any(|ending| name.ends_with(ending)))
            .collect();
        (!found.is_empty()).then(|| listed(&found))
    };
    let error = |fact: String| Error::new(fact).at(folder.display());
    if let Some(pickles) = with(&PICKLES) {
        return error(format!("the weights are Python pickles, which can run any code when read: {pickles}")).hint(format!(
            "convert them once, where you trust them: python -c \"from transformers import AutoModelForCausalLM as M; \
             M.from_pretrained('{}').save_pretrained('converted')\"",
            folder.display()
        ));
    }
    if names.contains("adapter_config.json") {
        return error("this is an adapter, not a model".to_owned())
            .hint("give it as the adapter, and the model it was trained on as the model");
    }
    let hint = match with(&[".safetensors", ".gguf", ".onnx", ".h5", ".msgpack"]) {
        Some(others) => {
            format!("found only {others}: weights must be saved as transformers saves them")
        }
        None => {
            "copy the weights beside `config.json`, or give a hub id such as `org/name`".to_owned()
        }
    };
    error(format!("there is neither `{SINGLE}` nor `{INDEX}`")).hint(hint)
}

/// Up to eight names in backticks.
pub(super) fn listed(names: &[impl AsRef<str>]) -> String {
    let shown = names
        .iter()
        .take(8)
        .map(|name| quoted(name.as_ref()))
        .collect::<Vec<_>>()
        .join(", ");
    match names.len() {
        0..=8 => shown,
        more => format!("{shown} and {} more", more - 8),
    }
}
