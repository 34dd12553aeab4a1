//! The merged weights as safetensors files, written tensor by tensor: never more than one of them is in memory.

use super::check::unit_roundoff;
use super::sites::{Base, Change, Changes};
use crate::model::files::MERGED;
use crate::{Context, Error, Result};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes that are copied, and values that are converted, at a time.
const CHUNK: usize = 1 << 22;

/// One tensor to write.
pub(super) struct Output<'a> {
    pub(super) name: String,
    /// The base's tensor it is made of, by its name in the file.
    source: String,
    pub(super) change: Option<&'a Change>,
    dtype: Dtype,
    shape: Vec<usize>,
    pub(super) bytes: usize,
}

/// One file to write.
pub(super) struct Shard<'a> {
    pub(super) file: String,
    pub(super) tensors: Vec<Output<'a>>,
}

/// Which tensors go into which files: as in the base, or in new files of at most `max_bytes`.
pub(super) fn layout<'a>(
    base: &Base,
    changes: &'a Changes,
    dtype: Option<DType>,
    max_bytes: Option<u64>,
) -> Result<Vec<Shard<'a>>> {
    let mut shards = Vec::new();
    for (file, names) in base.checkpoint.shards() {
        let mut tensors = Vec::new();
        for (name, source, changed_as) in names
            .into_iter()
            .flat_map(|name| placed(base, changes, name))
        {
            let stored = base.checkpoint.stored(&source)?;
            let dtype = match dtype {
                Some(wanted) if widens(stored.dtype()) => stored_type(wanted)?,
                _ => stored.dtype(),
            };
            let shape = stored.shape().to_vec();
            let values: usize = shape.iter().product();
            tensors.push(Output {
                change: changes.by_name.get(&changed_as),
                name,
                source,
                dtype,
                shape,
                bytes: (values * dtype.bitsize()).div_ceil(8),
            });
        }
        let file = file.to_owned();
        shards.push(Shard { file, tensors });
    }
    if let Some(max_bytes) = max_bytes {
        shards = split(base, shards, max_bytes);
    }
    for shard in &mut shards {
        // The order of the safetensors library: wide types first, so that every tensor is aligned.
        shard.tensors.sort_by(|left, right| {
            right
                .dtype
                .cmp(&left.dtype)
                .then(left.name.cmp(&right.name))
        });
    }
    Ok(shards)
}

/// What is written where the base has `stored`: each with its name, the base's tensor it is made of, and the name by
/// which its change is known. Most tensors keep name and place; a tied head may appear or share the embedding's fate.
fn placed(base: &Base, changes: &Changes, stored: &str) -> Vec<(String, String, String)> {
    let (embedding, head) = (base.embedding_name(), base.head_name());
    let matrix = base.stored_name(embedding);
    let is_matrix = stored == matrix;
    let row =
        |name: &str, changed_as: &str| (name.to_owned(), matrix.clone(), changed_as.to_owned());
    match (base.shape.tied_head, changes.unties_head) {
        (true, true) if is_matrix => vec![row(embedding, embedding), row(&head, &head)],
        (true, true) if stored == head => Vec::new(),
        (true, false) if is_matrix || stored == head => vec![row(stored, embedding)],
        _ => vec![(stored.to_owned(), stored.to_owned(), stored.to_owned())],
    }
}

/// Fills files of at most `max_bytes` in the order of the model; a larger tensor has one of its own.
fn split<'a>(base: &Base, shards: Vec<Shard<'a>>, max_bytes: u64) -> Vec<Shard<'a>> {
    let places: BTreeMap<&str, usize> = base
        .parameters
        .iter()
        .enumerate()
        .map(|(place, parameter)| (parameter.name.as_str(), place))
        .collect();
    let mut tensors: Vec<Output> = shards.into_iter().flat_map(|shard| shard.tensors).collect();
    tensors.sort_by_key(|output| {
        places
            .get(output.name.as_str())
            .copied()
            .unwrap_or(usize::MAX)
    });
    let mut files: Vec<Vec<Output>> = Vec::new();
    let mut filled = u64::MAX;
    for output in tensors {
        let bytes = output.bytes as u64;
        match files.last_mut() {
            Some(file) if filled.saturating_add(bytes) <= max_bytes => {
                file.push(output);
                filled += bytes;
            }
            _ => {
                files.push(vec![output]);
                filled = bytes;
            }
        }
    }
    let count = files.len();
    let named = |(index, tensors)| Shard {
        file: match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        },
        tensors,
    };
    files.into_iter().enumerate().map(named).collect()
}

/// The header of a file: what is said of it, and where its tensors are.
#[derive(Serialize)]
struct Header<'a> {
    /// In order, unlike the map of [`Metadata`] itself: the same merge gives the same bytes.
    #[serde(rename = "__metadata__")]
    texts: BTreeMap<&'a str, String>,
    #[serde(flatten)]
    tensors: Metadata,
}

/// Writes one file into `folder`, which says that it is of a merge which has `written` all these; `on_tensor` hears of each tensor before it is written.
pub(super) fn write_shard(
    folder: &Path,
    shard: &Shard,
    base: &Base,
    written: &BTreeSet<&str>,
    on_tensor: &mut dyn FnMut(&Output) -> Result<()>,
) -> Result<()> {
    let path = folder.join(&shard.file);
    let mut offset = 0;
    let mut infos = Vec::new();
    for output in &shard.tensors {
        let info = TensorInfo {
            dtype: output.dtype,
            shape: output.shape.clone(),
            data_offsets: (offset, offset + output.bytes),
        };
        offset += output.bytes;
        infos.push((output.name.clone(), info));
    }
    let header = Header {
        texts: BTreeMap::from([
            ("format", "pt".to_owned()),
            (MERGED, json!(written).to_string()),
        ]),
        tensors: Metadata::new(None, infos).at(path.display())?,
    };
    let mut header = serde_json::to_vec(&header).at(path.display())?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut writer = BufWriter::with_capacity(1 << 20, File::create(&path).at(path.display())?);
    let length = header.len() as u64;
    writer.write_all(&length.to_le_bytes()).at(path.display())?;
    writer.write_all(&header).at(path.display())?;
    for output in &shard.tensors {
        on_tensor(output)?;
        write_tensor(output, base, &mut |bytes| {
            writer.write_all(bytes).at(path.display())
        })?;
    }
    writer.flush().at(path.display())
}

/// The names of all files of weights, and of their index: there is none for a single file of the usual name.
pub(super) fn files<'a>(shards: &'a [Shard]) -> impl Iterator<Item = &'a str> {
    let index = has_index(shards).then_some(INDEX);
    let files = shards.iter().map(|shard| shard.file.as_str());
    files.chain(index)
}

fn has_index(shards: &[Shard]) -> bool {
    !matches!(shards, [shard] if shard.file == SINGLE)
}

/// `model.safetensors.index.json`, as transformers writes it, if there is one.
pub(super) fn write_index(folder: &Path, shards: &[Shard]) -> Result<()> {
    if !has_index(shards) {
        return Ok(());
    }
    let outputs = || shards.iter().flat_map(|shard| &shard.tensors);
    let parameters: usize = outputs()
        .map(|output| output.shape.iter().product::<usize>())
        .sum();
    let bytes: usize = outputs().map(|output| output.bytes).sum();
    let map: BTreeMap<&str, &str> = shards
        .iter()
        .flat_map(|shard| {
            shard
                .tensors
                .iter()
                .map(|output| (output.name.as_str(), shard.file.as_str()))
        })
        .collect();
    let map: Map<String, Value> = map
        .into_iter()
        .map(|(name, file)| (name.to_owned(), json!(file)))
        .collect();
    let index = json!({
        "metadata": { "total_parameters": parameters, "total_size": bytes },
        "weight_map": map,
    });
    super::files::write_json(&folder.join(INDEX), &index)
}

fn write_tensor(
    output: &Output,
    base: &Base,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let Some(change) = output.change else {
        return copy(output, base, write).at(&output.name);
    };
    let source = || base.checkpoint.get(&output.source)?.to_f32_tensor();
    let merged = change.apply(source).at(&output.name)?;
    if merged.dims() != output.shape {
        let fact = format!(
            "merging gives {:?}, the base has {:?}",
            merged.dims(),
            output.shape
        );
        return Err(Error::new(fact).at(&output.name));
    }
    let values: Vec<f32> = merged.flatten_all()?.to_vec1()?;
    drop(merged);
    let broken = values.par_iter().filter(|value| !value.is_finite()).count();
    refuse_broken(broken, &format!("{} merged values", values.len())).at(&output.name)?;
    values
        .chunks(CHUNK)
        .try_for_each(|values| narrow(values, output.dtype, write))
        .at(&output.name)
}

/// Writes what no adapter changes. Its values are looked at on their way, while they are at hand.
fn copy(output: &Output, base: &Base, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let stored = base.checkpoint.stored(&output.source)?;
    let mut broken = 0;
    if stored.dtype() == output.dtype {
        for bytes in stored.data().chunks(CHUNK) {
            broken += not_finite(bytes, stored.dtype());
            write(bytes)?;
        }
    } else {
        let view = base.checkpoint.get(&output.source)?;
        let width = view.dtype.size_in_bytes();
        for bytes in view.data().chunks(CHUNK * width) {
            broken += not_finite(bytes, stored.dtype());
            let count = bytes.len() / width;
            let values: Vec<f32> =
                Tensor::from_raw_buffer(bytes, view.dtype, &[count], &Device::Cpu)?
                    .to_dtype(DType::F32)?
                    .to_vec1()?;
            narrow(&values, output.dtype, write)?;
        }
    }
    let values: usize = output.shape.iter().product();
    refuse_broken(broken, &format!("{values} values of the base"))
}

fn refuse_broken(broken: usize, all: &str) -> Result<()> {
    if broken == 0 {
        return Ok(());
    }
    Err(
        Error::not_finite(format!("{broken} of the {all} are not finite")).hint(
            "nothing was written; `retune inspect` lists all such weights of base and adapter",
        ),
    )
}

/// How many of the stored values are NaN or infinite. Integers never are.
fn not_finite(bytes: &[u8], dtype: Dtype) -> usize {
    match dtype {
        Dtype::F64 => count::<8>(bytes, |value| !f64::from_le_bytes(value).is_finite()),
        Dtype::F32 => count::<4>(bytes, |value| !f32::from_le_bytes(value).is_finite()),
        Dtype::F16 => count::<2>(bytes, |value| !f16::from_le_bytes(value).is_finite()),
        Dtype::BF16 => count::<2>(bytes, |value| !bf16::from_le_bytes(value).is_finite()),
        _ => 0,
    }
}

fn count<const N: usize>(bytes: &[u8], wanted: impl Fn([u8; N]) -> bool + Sync) -> usize {
    let (values, _) = bytes.as_chunks::<N>();
    values
        .par_iter()
        .with_min_len(1 << 14)
        .filter(|value| wanted(**value))
        .count()
}

/// Writes f32 values in another type, each rounded to the nearest value, ties to even.
fn narrow(values: &[f32], dtype: Dtype, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    match dtype {
        Dtype::F64 => write(&encoded(values, |value| f64::from(value).to_le_bytes())),
        Dtype::F32 => write(&encoded(values, f32::to_le_bytes)),
        Dtype::BF16 => write(&encoded(values, |value| {
            bf16::from_f32(value).to_le_bytes()
        })),
        Dtype::F16 => {
            let lost = |value: &&f32| value.is_finite() && f16::from_f32(**value).is_infinite();
            if let Some(value) = values.iter().find(lost) {
                return Err(
                    Error::new(format!("the value {value} is too large for f16"))
                        .hint("write `--dtype bf16`, which has the range of f32"),
                );
            }
            write(&encoded(values, |value| f16::from_f32(value).to_le_bytes()))
        }
        other => Err(Error::new(format!(
            "cannot write merged weights as {other}"
        ))),
    }
}

fn encoded<const N: usize>(values: &[f32], encode: impl Fn(f32) -> [u8; N] + Sync) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * N];
    let (places, _) = bytes.as_chunks_mut::<N>();
    places
        .par_iter_mut()
        .with_min_len(1 << 14)
        .zip(values)
        .for_each(|(place, value)| *place = encode(*value));
    bytes
}

/// Whether values of this type are real numbers that can be converted.
fn widens(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

fn stored_type(dtype: DType) -> Result<Dtype> {
    match dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::F16 => Ok(Dtype::F16),
        DType::BF16 => Ok(Dtype::BF16),
        other => Err(
            Error::usage(format!("weights cannot be written as {other:?}"))
                .hint("choose `f32`, `f16` or `bf16`"),
        ),
    }
}

/// The unit roundoff of the coarsest type that values were rounded to.
pub(super) fn roundoff(shards: &[Shard], base: &Base) -> Result<f64> {
    let mut coarsest = unit_roundoff(DType::F32);
    for output in shards.iter().flat_map(|shard| &shard.tensors) {
        let stored = base.checkpoint.stored(&output.source)?.dtype();
        if output.change.is_some() || stored != output.dtype {
            coarsest = coarsest.max(match output.dtype {
                Dtype::BF16 => unit_roundoff(DType::BF16),
                Dtype::F16 => unit_roundoff(DType::F16),
                _ => 0.0,
            });
        }
    }
    Ok(coarsest)
}
