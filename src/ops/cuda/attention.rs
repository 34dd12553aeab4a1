//! Attention: the segments cut into tiles, and how the kernels are spread over them.

use super::compiler::Kernel;
use super::launch::{Argument, Grid, int, launch};
use super::memory::{Address, Output, Real, device_of};
use super::upload::upload;
use crate::ops::{AttentionShape, Segment, Visible};
use crate::{Error, Result};
use candle_core::cuda_backend::DeviceId;
use candle_core::{CudaDevice, DType, Tensor};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

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

/// A kernel that goes through the segments in tiles.
#[derive(Clone, Copy)]
enum TiledKernel {
    Forward,
    Queries,
    Keys,
}

impl TiledKernel {
    const ALL: [Self; 3] = [Self::Forward, Self::Queries, Self::Keys];

    fn name(self) -> &'static str {
        match self {
            Self::Forward => "attention_forward",
            Self::Queries => "attention_query_gradients",
            Self::Keys => "attention_key_value_gradients",
        }
    }

    /// How it is cut up, as `attention.cu` says it.
    fn tiling(self, head_dim: usize, real: Real) -> Tiling {
        let row_bytes = head_dim.next_multiple_of(16) * real.dtype().size_in_bytes();
        // one column for each width of rows, narrow to wide
        let column = match row_bytes {
            0..=128 => 0,
            129..=256 => 1,
            257..=512 => 2,
            _ => 3,
        };
        let stages = [2, 2, 1, 1][column];
        let (tile, step) = match self {
            Self::Forward => ([128, 128, 64, 32][column], [64, 48, 32, 32][column]),
            Self::Queries => ([128, 64, 64, 32][column], [32, 32, 16, 16][column]),
            Self::Keys => ([64, 64, 64, 32][column], [64, 32, 16, 16][column]),
        };
        let row = row_bytes + 16;
        Tiling {
            threads: [128, 128, 128, 64][column],
            tile,
            shared_bytes: match self {
                Self::Forward => (tile + 2 * step) * row,
                Self::Queries => 2 * (tile + stages * step) * row,
                Self::Keys => 2 * (tile + stages * step) * row + 8 * stages * step,
            },
        }
    }
}

/// How a tiled kernel is cut up.
struct Tiling {
    threads: usize,
    /// Queries of a tile, or keys.
    tile: usize,
    shared_bytes: usize,
}

/// The numbers of a tile in the table that the kernels read.
const TILE_WORDS: usize = 5;

/// The tiles of all segments on a device, for all tiled kernels in one table.
struct Tiles {
    device: DeviceId,
    segments: Vec<Segment>,
    /// Queries or keys of a tile, for each kernel.
    sizes: [usize; TiledKernel::ALL.len()],
    table: Tensor,
    /// Where each kernel's are in the table.
    ranges: [Range<usize>; TiledKernel::ALL.len()],
}

/// The tiles that were asked for last: all blocks of a pass ask for the same ones, on their way back too.
static LAST: Mutex<Option<Arc<Tiles>>> = Mutex::new(None);

impl Tiles {
    /// Those of these segments for heads of `head_dim` values.
    fn of(
        device: &CudaDevice,
        segments: &[Segment],
        head_dim: usize,
        real: Real,
    ) -> Result<Arc<Self>> {
        let sizes = TiledKernel::ALL.map(|kernel| kernel.tiling(head_dim, real).tile);
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tiles) = &*last
            && (tiles.device, tiles.sizes) == (device.id(), sizes)
            && tiles.segments == segments
        {
            return Ok(tiles.clone());
        }
        let mut words = Vec::new();
        let ranges = TiledKernel::ALL.map(|kernel| {
            let start = words.len() / TILE_WORDS;
            cut(&mut words, segments, kernel, sizes[kernel as usize]);
            start..words.len() / TILE_WORDS
        });
        let tiles = Arc::new(Self {
            device: device.id(),
            segments: segments.to_vec(),
            sizes,
            table: upload(device, &words)?,
            ranges,
        });
        *last = Some(tiles.clone());
        Ok(tiles)
    }
}

/// Adds the tiles of all segments, of so many queries each, or of so many keys.
fn cut(words: &mut Vec<u32>, segments: &[Segment], kernel: TiledKernel, tile: usize) {
    for Segment { queries, keys } in segments {
        let length = match kernel {
            TiledKernel::Forward | TiledKernel::Queries => queries.len(),
            TiledKernel::Keys => keys.len(),
        };
        for first in (0..length).step_by(tile) {
            let row = [queries.start, queries.len(), keys.start, keys.len(), first];
            words.extend(row.map(|number| number as u32));
        }
    }
}

/// Runs a tiled kernel over all segments; `arguments` are those before the tiles, `rows` those of q.
fn launch_tiled(
    device: &CudaDevice,
    kernel: TiledKernel,
    (real, rows): (Real, usize),
    shape: &AttentionShape,
    segments: &[Segment],
    arguments: &[Argument],
) -> Result<()> {
    let tiles = Tiles::of(device, segments, shape.head_dim, real)?;
    let Range { start, end } = tiles.ranges[kernel as usize].clone();
    let first = Address::of(NAME, "the tiles", &tiles.table, DType::U32)?.at(start * TILE_WORDS);
    let mut arguments = arguments.to_vec();
    arguments.push(first.into());
    arguments.extend(scalars(rows, shape)?);
    let heads = match kernel {
        TiledKernel::Forward | TiledKernel::Queries => shape.heads,
        TiledKernel::Keys => shape.key_value_heads,
    };
    let tiling = kernel.tiling(shape.head_dim, real);
    launch(
        device,
        Kernel::attention(real, shape.head_dim, kernel.name()),
        Grid::of((heads, end - start, 1), tiling.threads).shared(tiling.shared_bytes),
        &arguments,
    )
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
    let out = Output::new(device, q.elem_count(), real.dtype())?;
    let log_sum_exp = Output::new(device, rows * shape.heads, DType::F32)?;
    launch_tiled(
        device,
        TiledKernel::Forward,
        (real, rows),
        shape,
        segments,
        &[
            Address::of(NAME, "q", &q, real.dtype())?.into(),
            Address::of(NAME, "k", &k, real.dtype())?.into(),
            Address::of(NAME, "v", &v, real.dtype())?.into(),
            out.address().into(),
            log_sum_exp.address().into(),
        ],
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
    let inputs: [Argument; 6] = [
        Address::of(NAME, "q", &q, dtype)?.into(),
        Address::of(NAME, "k", &k, dtype)?.into(),
        Address::of(NAME, "v", &v, dtype)?.into(),
        Address::of(NAME, "the gradient", &dout, dtype)?.into(),
        Address::of(NAME, "the log-sum-exp", log_sum_exp, DType::F32)?.into(),
        delta.address().into(),
    ];
    let run = |kernel: TiledKernel, outputs: &[Argument]| {
        let arguments = [&inputs[..], outputs].concat();
        launch_tiled(device, kernel, (real, rows), shape, segments, &arguments)
    };
    let [wants_q, wants_k, wants_v] = wanted;
    let dq = match wants_q {
        true => {
            let dq = Output::new(device, q.elem_count(), dtype)?;
            run(TiledKernel::Queries, &[dq.address().into()])?;
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
    let outputs: [Argument; 2] =
        [&dk, &dv].map(|output| output.as_ref().map(Output::address).into());
    run(TiledKernel::Keys, &outputs)?;
    let tensor = |output: Output| output.into_tensor(k.shape());
    Ok([dq, dk.map(tensor), dv.map(tensor)])
}
