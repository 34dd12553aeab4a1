//! Attention: the segments cut into tiles, and how the kernels are spread over them.

use super::compiler::Kernel;
use super::elementwise::upload;
use super::launch::{Argument, Grid, int, launch};
use super::memory::{Address, Output, Real, device_of};
use crate::ops::{AttentionShape, Segment, Visible};
use crate::{Error, Result};
use candle_core::{CudaDevice, DType, Tensor};

const NAME: &str = "attention";

/// The largest head that the kernels are written for.
const LARGEST_HEAD: usize = 256;
/// Keys before or after a query, where nothing but the segment ends what it sees.
const UNLIMITED: usize = 1 << 30;
/// Addresses of all arguments are multiples of this.
const ALIGNMENT: u64 = 16;

/// What the backward pass needs besides the arguments.
pub(in crate::ops) struct KeptSoftmax {
    /// `(heads, rows)`, as the kernels store it.
    pub(in crate::ops) log_sum_exp: Tensor,
    /// What attention returned; nothing where the graph keeps it.
    pub(in crate::ops) out: Option<Tensor>,
}

/// How a tiled kernel is cut up, as `attention.cu` says it.
struct Tiling {
    threads: usize,
    /// Queries of a tile, or keys.
    tile: usize,
    shared_bytes: usize,
}

/// The sizes of the three tiled kernels.
struct Tilings {
    forward: Tiling,
    queries: Tiling,
    keys: Tiling,
}

impl Tilings {
    fn of(head_dim: usize, real: Real) -> Self {
        let row_bytes = head_dim.next_multiple_of(16) * real.dtype().size_in_bytes();
        // one column for each width of rows, narrow to wide
        let column = match row_bytes {
            0..=128 => 0,
            129..=256 => 1,
            257..=512 => 2,
            _ => 3,
        };
        let threads = [128, 128, 128, 64][column];
        let stages = [2, 2, 1, 1][column];
        let (forward, forward_step) = ([128, 128, 64, 32][column], [64, 48, 32, 32][column]);
        let (queries, query_step) = ([128, 64, 64, 32][column], [32, 32, 16, 16][column]);
        let (keys, key_step) = ([64, 64, 64, 32][column], [64, 32, 16, 16][column]);
        let row = row_bytes + 16;
        let tiling = |tile, shared_bytes| Tiling {
            threads,
            tile,
            shared_bytes,
        };
        Self {
            forward: tiling(forward, (forward + 2 * forward_step) * row),
            queries: tiling(queries, 2 * (queries + stages * query_step) * row),
            keys: tiling(
                keys,
                2 * (keys + stages * key_step) * row + 8 * stages * key_step,
            ),
        }
    }
}

impl Tiling {
    fn grid(&self, heads: usize, tiles: usize) -> Grid {
        Grid::of((heads, tiles, 1), self.threads).shared(self.shared_bytes)
    }
}

/// The numbers of a tile in the table that the kernels read.
const TILE_WORDS: usize = 5;

/// The tiles of all segments, of so many queries each, or of so many keys.
fn table(segments: &[Segment], tile: usize, of_keys: bool) -> Vec<u32> {
    let mut words = Vec::new();
    for Segment { queries, keys } in segments {
        let length = if of_keys { keys.len() } else { queries.len() };
        for first in (0..length).step_by(tile) {
            let row = [queries.start, queries.len(), keys.start, keys.len(), first];
            words.extend(row.map(|number| number as u32));
        }
    }
    words
}

/// A table of tiles on the device, and how many it has.
fn upload_table(device: &CudaDevice, words: &[u32]) -> Result<(Tensor, usize)> {
    Ok((upload(device, words)?, words.len() / TILE_WORDS))
}

/// The scalars that all kernels end with.
fn scalars(rows: usize, shape: &AttentionShape) -> Result<[Argument; 7]> {
    let before = shape.window.map_or(UNLIMITED, |window| window - 1);
    let before = before.min(UNLIMITED);
    let after = match shape.visible {
        Visible::Causal => 0,
        Visible::All => before,
    };
    Ok([
        int(rows)?,
        int(shape.heads)?,
        int(shape.key_value_heads)?,
        shape.scale.into(),
        shape.soft_cap.unwrap_or(0.0).into(),
        int(before)?,
        int(after)?,
    ])
}

/// The tensor where the kernels can read it: a view that begins in the middle of something may have to be copied.
fn aligned(name: &str, t: &Tensor, real: Real) -> Result<Tensor> {
    let address = Address::of(NAME, name, t, real.dtype())?.number();
    match address.is_multiple_of(ALIGNMENT) {
        true => Ok(t.detach()),
        false => Ok(t.detach().force_contiguous()?),
    }
}

fn check_head(shape: &AttentionShape) -> Result<()> {
    if shape.head_dim <= LARGEST_HEAD {
        return Ok(());
    }
    Err(Error::new(format!(
        "`{NAME}`: heads of {} values are larger than those that the GPU's kernels take, {LARGEST_HEAD}",
        shape.head_dim
    ))
    .hint("run on the CPU"))
}

/// The result, and the log-sum-exp of each query and head; all arguments are checked and contiguous.
pub(in crate::ops) fn attention(
    [q, k, v]: [&Tensor; 3],
    shape: &AttentionShape,
    segments: &[Segment],
) -> Result<(Output, Tensor)> {
    check_head(shape)?;
    let device = device_of(NAME, q)?;
    let real = Real::of(NAME, "q", q)?;
    let (q, k, v) = (
        aligned("q", q, real)?,
        aligned("k", k, real)?,
        aligned("v", v, real)?,
    );
    let rows = q.dim(0)?;
    let tiling = Tilings::of(shape.head_dim, real).forward;
    let words = table(segments, tiling.tile, false);
    let (tiles, count) = upload_table(device, &words)?;
    let out = Output::new(device, q.elem_count(), real.dtype())?;
    let log_sum_exp = Output::new(device, rows * shape.heads, DType::F32)?;
    let mut arguments: Vec<Argument> = vec![
        Address::of(NAME, "q", &q, real.dtype())?.into(),
        Address::of(NAME, "k", &k, real.dtype())?.into(),
        Address::of(NAME, "v", &v, real.dtype())?.into(),
        out.address().into(),
        log_sum_exp.address().into(),
        Address::of(NAME, "the tiles", &tiles, DType::U32)?.into(),
    ];
    arguments.extend(scalars(rows, shape)?);
    launch(
        device,
        Kernel::attention(real, shape.head_dim, "attention_forward"),
        tiling.grid(shape.heads, count),
        &arguments,
    )?;
    Ok((out, log_sum_exp.into_tensor((shape.heads, rows))))
}

/// The gradients of those of q, k and v that are `wanted`; `out` is what attention returned. All arguments are contiguous.
pub(in crate::ops) fn attention_gradients(
    [q, k, v]: [&Tensor; 3],
    (log_sum_exp, out): (&Tensor, &Tensor),
    shape: &AttentionShape,
    segments: &[Segment],
    dout: &Tensor,
    wanted: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let device = device_of(NAME, q)?;
    let real = Real::of(NAME, "q", q)?;
    let dtype = real.dtype();
    let (q, k, v) = (
        aligned("q", q, real)?,
        aligned("k", k, real)?,
        aligned("v", v, real)?,
    );
    let dout = aligned("the gradient", dout, real)?;
    let out = aligned("the result", out, real)?;
    let rows = q.dim(0)?;
    let delta = Output::new(device, rows * shape.heads, DType::F32)?;
    launch(
        device,
        Kernel::attention(real, shape.head_dim, "attention_delta"),
        Grid::blocks((rows * shape.heads).div_ceil(8)),
        &[
            Address::of(NAME, "the result", &out, dtype)?.into(),
            Address::of(NAME, "the gradient", &dout, dtype)?.into(),
            delta.address().into(),
            int(rows)?,
            int(shape.heads)?,
        ],
    )?;
    let tilings = Tilings::of(shape.head_dim, real);
    let inputs: [Argument; 6] = [
        Address::of(NAME, "q", &q, dtype)?.into(),
        Address::of(NAME, "k", &k, dtype)?.into(),
        Address::of(NAME, "v", &v, dtype)?.into(),
        Address::of(NAME, "the gradient", &dout, dtype)?.into(),
        Address::of(NAME, "the log-sum-exp", log_sum_exp, DType::F32)?.into(),
        delta.address().into(),
    ];
    let [wants_q, wants_k, wants_v] = wanted;
    let dq = match wants_q {
        true => {
            let dq = Output::new(device, q.elem_count(), dtype)?;
            let (tiles, count) =
                upload_table(device, &table(segments, tilings.queries.tile, false))?;
            let tiles = Address::of(NAME, "the tiles", &tiles, DType::U32)?;
            let mut arguments = inputs.to_vec();
            arguments.push(dq.address().into());
            arguments.push(tiles.into());
            arguments.extend(scalars(rows, shape)?);
            launch(
                device,
                Kernel::attention(real, shape.head_dim, "attention_query_gradients"),
                tilings.queries.grid(shape.heads, count),
                &arguments,
            )?;
            Some(dq.into_tensor(q.shape()))
        }
        false => None,
    };
    if !wants_k && !wants_v {
        return Ok([dq, None, None]);
    }
    let covered: usize = segments.iter().map(|segment| segment.keys.len()).sum();
    let gradient = |wanted: bool| -> Result<Option<Output>> {
        match (wanted, covered == k.dim(0)?) {
            (false, _) => Ok(None),
            (true, true) => Output::new(device, k.elem_count(), dtype).map(Some),
            // Nobody writes those of keys that no segment has.
            (true, false) => Output::zeros(device, k.elem_count(), dtype).map(Some),
        }
    };
    let (dk, dv) = (gradient(wants_k)?, gradient(wants_v)?);
    let (tiles, count) = upload_table(device, &table(segments, tilings.keys.tile, true))?;
    let mut arguments = inputs.to_vec();
    arguments.push(dk.as_ref().map(Output::address).into());
    arguments.push(dv.as_ref().map(Output::address).into());
    arguments.push(Address::of(NAME, "the tiles", &tiles, DType::U32)?.into());
    arguments.extend(scalars(rows, shape)?);
    launch(
        device,
        Kernel::attention(real, shape.head_dim, "attention_key_value_gradients"),
        tilings.keys.grid(shape.key_value_heads, count),
        &arguments,
    )?;
    let tensor = |output: Output| output.into_tensor(k.shape());
    Ok([dq, dk.map(tensor), dv.map(tensor)])
}
