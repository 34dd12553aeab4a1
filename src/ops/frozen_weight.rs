//! A frozen weight matrix in the type it was stored in.

#![expect(unsafe_code, reason = "mapped bytes are read as numbers in place")]

use super::bf16_products::{Rows, round};
use super::compute_type::ComputeType;
use super::gemm::even_part;
use super::kernels;
use super::nf4::Nf4;
use super::quantization::Quantization;
use super::thin_matrix::ThinMatrix;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// A frozen `(rows, columns)` matrix in f32, f16 or bf16, owned or inside a mapped checkpoint, or quantised. Cloning shares
/// it.
#[derive(Clone)]
pub struct FrozenWeight {
    stored: Arc<Stored>,
    compute: ComputeType,
}

struct Stored {
    rows: usize,
    columns: usize,
    place: Place,
}

/// Where the values are.
enum Place {
    Host(Values),
    /// On a GPU, `(rows, columns)` in f32 or bf16.
    #[cfg(feature = "cuda")]
    Device(Tensor),
    /// On a GPU, quantised.
    #[cfg(feature = "cuda")]
    DeviceNf4(super::cuda::Nf4),
}

/// The values in row order, by type.
pub(super) enum Values {
    F32(Buffer<f32>),
    F16(Buffer<f16>),
    BF16(Buffer<bf16>),
    Nf4(Nf4),
}

/// A slice of numbers that somebody keeps alive.
pub(super) enum Buffer<T> {
    Owned(Vec<T>),
    /// Bytes of a mapped file, aligned for `T` and a whole number of them.
    Mapped(Arc<Mmap>, Range<usize>, PhantomData<T>),
}

/// Number types for which every bit pattern is a value.
pub(super) trait Number: Copy {
    const SIZE: usize;
    fn from_little_endian(bytes: &[u8]) -> Self;
}

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Number for $type {
            const SIZE: usize = size_of::<$type>();
            fn from_little_endian(bytes: &[u8]) -> Self {
                let mut array = [0; size_of::<$type>()];
                array.copy_from_slice(bytes);
                Self::from_le_bytes(array)
            }
        }
    )*};
}
number!(f32, f16, bf16);

impl<T: Number> Buffer<T> {
    /// The numbers in these bytes of the file: in place where they are aligned, else copied.
    fn mapped(map: Arc<Mmap>, bytes: Range<usize>) -> Self {
        if cfg!(target_endian = "little") && in_place::<T>(&map[bytes.clone()]).is_some() {
            return Self::Mapped(map, bytes, PhantomData);
        }
        Self::Owned(
            map[bytes]
                .chunks_exact(T::SIZE)
                .map(T::from_little_endian)
                .collect(),
        )
    }
}

impl<T: Number> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Owned(values) => values,
            Self::Mapped(map, bytes, _) => {
                in_place(&map[bytes.clone()]).expect("alignment was checked when it was made")
            }
        }
    }
}

/// The bytes as numbers, if they are aligned for them and a whole number of them.
fn in_place<T: Number>(bytes: &[u8]) -> Option<&[T]> {
    // SAFETY: `Number` is implemented only for types that have no invalid bit pattern and no padding.
    let (before, numbers, after) = unsafe { bytes.align_to::<T>() };
    (before.is_empty() && after.is_empty()).then_some(numbers)
}

/// A product of two thin matrices to add to a weight: `scale · b a`, with `a` `(rank, columns)` and `b` `(rows, rank)`.
#[derive(Clone, Copy)]
pub(super) struct LowRankUpdate<'a> {
    pub(super) a: &'a ThinMatrix,
    pub(super) b: &'a [f32],
    pub(super) rank: usize,
    pub(super) scale: f32,
}

/// Floats of a block of widened rows: small enough for the cache, large enough for a full-speed product.
const BLOCK_FLOATS: usize = 1 << 20;
/// Values a task widens.
const TASK_VALUES: usize = 1 << 14;

impl FrozenWeight {
    fn new(rows: usize, columns: usize, values: Values) -> Self {
        Self::at(rows, columns, Place::Host(values))
    }

    fn at(rows: usize, columns: usize, place: Place) -> Self {
        Self {
            stored: Arc::new(Stored {
                rows,
                columns,
                place,
            }),
            compute: ComputeType::default(),
        }
    }

    /// The same weight, its products computed in this type.
    pub fn with_compute(&self, compute: ComputeType) -> Self {
        Self {
            stored: Arc::clone(&self.stored),
            compute,
        }
    }

    /// The same weight with fewer bits: each value becomes the nearest that the type has. It must be in main memory.
    pub fn quantized(&self, quantization: Quantization) -> Result<Self> {
        let Quantization::Nf4 = quantization;
        let count = self.rows() * self.columns();
        let nf4 = Nf4::quantize(count, |start, wide| self.widen_values(start, wide))?;
        Ok(Self::new(self.rows(), self.columns(), Values::Nf4(nf4)).with_compute(self.compute))
    }

    /// The type of the factors of its products.
    pub fn compute(&self) -> ComputeType {
        self.compute
    }

    /// Copies a matrix of f32, f16 or bf16.
    pub fn from_tensor(t: &Tensor) -> Result<Self> {
        let (rows, columns) = super::floats::matrix_shape("frozen weight", "the weight", t)?;
        let flat = t.flatten_all()?.to_device(&Device::Cpu)?;
        let values = match t.dtype() {
            DType::F32 => Values::F32(Buffer::Owned(flat.to_vec1()?)),
            DType::F16 => Values::F16(Buffer::Owned(flat.to_vec1()?)),
            DType::BF16 => Values::BF16(Buffer::Owned(flat.to_vec1()?)),
            other => return Err(unsupported_type(other)),
        };
        Ok(Self::new(rows, columns, values))
    }

    /// These values in row order, stored as `dtype`: f32, f16 or bf16.
    pub(crate) fn from_values(
        rows: usize,
        columns: usize,
        dtype: DType,
        values: impl Iterator<Item = f32>,
    ) -> Result<Self> {
        let values = match dtype {
            DType::F32 => Values::F32(Buffer::Owned(values.collect())),
            DType::F16 => Values::F16(Buffer::Owned(values.map(f16::from_f32).collect())),
            DType::BF16 => Values::BF16(Buffer::Owned(values.map(bf16::from_f32).collect())),
            other => return Err(unsupported_type(other)),
        };
        Ok(Self::new(rows, columns, values))
    }

    /// The matrix in these bytes of a mapped file, little-endian and in row order: read in place where the bytes are
    /// aligned for the type, else copied.
    pub fn mapped(
        map: Arc<Mmap>,
        bytes: Range<usize>,
        dtype: DType,
        rows: usize,
        columns: usize,
    ) -> Result<Self> {
        if bytes.start > bytes.end || bytes.end > map.len() {
            return Err(Error::new(format!(
                "a weight is at bytes {}..{} of a file of {} bytes",
                bytes.start,
                bytes.end,
                map.len()
            ))
            .hint("the file may be truncated: compare its size with the original, or download it again"));
        }
        let wanted = rows
            .checked_mul(columns)
            .and_then(|count| count.checked_mul(dtype.size_in_bytes()));
        if wanted != Some(bytes.len()) {
            return Err(Error::new(format!(
                "a weight of shape ({rows}, {columns}) in {dtype:?} cannot be {} bytes long",
                bytes.len()
            )));
        }
        let values = match dtype {
            DType::F32 => Values::F32(Buffer::mapped(map, bytes)),
            DType::F16 => Values::F16(Buffer::mapped(map, bytes)),
            DType::BF16 => Values::BF16(Buffer::mapped(map, bytes)),
            other => return Err(unsupported_type(other)),
        };
        Ok(Self::new(rows, columns, values))
    }

    /// Rows: the features of the output of a linear layer.
    pub fn rows(&self) -> usize {
        self.stored.rows
    }

    /// Columns: the features of the input of a linear layer.
    pub fn columns(&self) -> usize {
        self.stored.columns
    }

    /// The type it is stored in; that which it is widened to if it is quantised.
    pub fn dtype(&self) -> DType {
        match &self.stored.place {
            Place::Host(Values::F32(_) | Values::Nf4(_)) => DType::F32,
            Place::Host(Values::F16(_)) => DType::F16,
            Place::Host(Values::BF16(_)) => DType::BF16,
            #[cfg(feature = "cuda")]
            Place::Device(values) => values.dtype(),
            #[cfg(feature = "cuda")]
            Place::DeviceNf4(values) => values.dtype(),
        }
    }

    /// All of it in f32 in main memory, `(rows, columns)`: made anew on each call.
    pub fn to_f32(&self) -> Result<Tensor> {
        Ok(self.widened()?.to_device(&Device::Cpu)?)
    }

    /// All of it in f32 on the device where it is, `(rows, columns)`: made anew on each call, but for what a GPU holds in
    /// f32 already.
    pub fn widened(&self) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(values) = self.device_values()? {
            return Ok(values.to_dtype(DType::F32)?);
        }
        let mut wide = vec![0f32; self.rows() * self.columns()];
        self.widen(0..self.rows(), None, &mut wide);
        Ok(Tensor::from_vec(
            wide,
            (self.rows(), self.columns()),
            &Device::Cpu,
        )?)
    }

    /// All of it as [`FrozenWeight::dtype`], in main memory, `(rows, columns)`: copied on each call.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let shape = (self.rows(), self.columns());
        #[cfg(feature = "cuda")]
        if let Some(values) = self.device_values()? {
            return Ok(values.to_device(&Device::Cpu)?);
        }
        Ok(match self.values() {
            Values::F32(values) => Tensor::from_slice(values, shape, &Device::Cpu)?,
            Values::F16(values) => Tensor::from_slice(values, shape, &Device::Cpu)?,
            Values::BF16(values) => Tensor::from_slice(values, shape, &Device::Cpu)?,
            Values::Nf4(_) => self.to_f32()?,
        })
    }

    /// The given rows, `(rows.len(), columns)`: the look-up in an embedding. In f32; of a weight on a GPU in its own type,
    /// on the GPU.
    pub fn gather(&self, rows: &[u32]) -> Result<Tensor> {
        if let Some((position, row)) = rows
            .iter()
            .enumerate()
            .find(|&(_, &row)| row as usize >= self.rows())
        {
            return Err(Error::new(format!(
                "token {row} at position {position} is outside a vocabulary of {}",
                self.rows()
            ))
            .hint("the tokenizer and the model may not belong together"));
        }
        #[cfg(feature = "cuda")]
        if let Some(values) = self.device_values()? {
            return super::cuda::gather(&values, rows);
        }
        let mut wide = vec![0f32; rows.len() * self.columns()];
        if self.columns() > 0 {
            wide.par_chunks_mut(self.columns())
                .with_min_len(16)
                .zip(rows)
                .for_each(|(wide, &row)| self.widen_values(row as usize * self.columns(), wide));
        }
        Ok(Tensor::from_vec(
            wide,
            (rows.len(), self.columns()),
            &Device::Cpu,
        )?)
    }

    /// The values in main memory, for kernels that read the stored type.
    pub(super) fn values(&self) -> &Values {
        match &self.stored.place {
            Place::Host(values) => values,
            #[cfg(feature = "cuda")]
            Place::Device(_) | Place::DeviceNf4(_) => {
                unreachable!("an operation on a weight on a GPU runs there")
            }
        }
    }

    /// Whether it is on a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn is_on_device(&self) -> bool {
        !matches!(self.stored.place, Place::Host(_))
    }

    /// The values on the GPU, `(rows, columns)`, if they are there: those that it holds, or made anew if it is quantised.
    #[cfg(feature = "cuda")]
    pub(super) fn device_values(&self) -> Result<Option<Tensor>> {
        match &self.stored.place {
            Place::Host(_) => Ok(None),
            Place::Device(values) => Ok(Some(values.clone())),
            Place::DeviceNf4(values) => values.widen((self.rows(), self.columns())).map(Some),
        }
    }

    /// The same weight on `device`, in the type in which products are computed there, or quantised if it is that already. On
    /// the CPU it stays as it is.
    ///
    /// Rounded to the nearest value where the type is narrower, in pieces, so that no second copy of it exists in main
    /// memory.
    #[cfg(feature = "cuda")]
    pub fn upload(&self, device: &Device, compute: ComputeType) -> Result<Self> {
        let dtype = match compute {
            ComputeType::F32 => DType::F32,
            ComputeType::Bf16 => DType::BF16,
        };
        let (rows, columns) = (self.rows(), self.columns());
        let values = match (&self.stored.place, device) {
            (Place::Host(Values::Nf4(values)), Device::Cuda(device)) => {
                let place = Place::DeviceNf4(super::cuda::Nf4::upload(device, values, dtype)?);
                return Ok(Self::at(rows, columns, place).with_compute(compute));
            }
            (Place::Host(values), Device::Cuda(device)) => {
                super::cuda::upload_weight(device, values, rows * columns, dtype)?
                    .into_tensor((rows, columns))
            }
            (Place::Host(_), _) => return Ok(self.with_compute(compute)),
            (Place::Device(values), _) => values.to_device(device)?.to_dtype(dtype)?,
            (Place::DeviceNf4(values), _) => values
                .widen((rows, columns))?
                .to_device(device)?
                .to_dtype(dtype)?,
        };
        if !values.device().is_cuda() {
            return Ok(Self::from_tensor(&values)?.with_compute(compute));
        }
        Ok(Self::at(rows, columns, Place::Device(values)).with_compute(compute))
    }

    /// Calls `product` with all rows in f32, block after block, `update` added to them. An f32 weight without an update
    /// is one block and is not copied.
    pub(super) fn for_each_block(
        &self,
        update: Option<LowRankUpdate<'_>>,
        mut product: impl FnMut(Range<usize>, &[f32]),
    ) {
        let (rows, columns) = (self.rows(), self.columns());
        if let (Values::F32(values), None) = (self.values(), update) {
            return product(0..rows, values);
        }
        let block_rows = even_part(rows, (BLOCK_FLOATS / columns.max(1)).max(192), 192).min(rows);
        with_scratch(block_rows * columns, |scratch| {
            for start in (0..rows).step_by(block_rows.max(1)) {
                let range = start..(start + block_rows).min(rows);
                let block = &mut scratch[..range.len() * columns];
                self.widen(range.clone(), update, block);
                product(range, block);
            }
        });
    }

    /// Writes the given rows in f32, `update` added to them.
    fn widen(&self, rows: Range<usize>, update: Option<LowRankUpdate<'_>>, wide: &mut [f32]) {
        let columns = self.columns();
        if columns == 0 {
            return;
        }
        let task_rows = (TASK_VALUES / columns).max(1);
        wide.par_chunks_mut(task_rows * columns)
            .enumerate()
            .for_each(|(task, wide)| {
                let first = rows.start + task * task_rows;
                self.widen_values(first * columns, wide);
                let Some(LowRankUpdate { a, b, rank, scale }) = update else {
                    return;
                };
                let mut factors = vec![0f32; a.padded_rank()];
                for (row, wide) in (first..).zip(wide.chunks_exact_mut(columns)) {
                    for (factor, b) in factors.iter_mut().zip(&b[row * rank..][..rank]) {
                        *factor = scale * b;
                    }
                    a.add_to(wide, &factors);
                }
            });
    }

    /// Writes values from the given one on in f32.
    pub(super) fn widen_values(&self, start: usize, wide: &mut [f32]) {
        let range = start..start + wide.len();
        match self.values() {
            Values::F32(values) => wide.copy_from_slice(&values[range]),
            Values::F16(values) => values[range].convert_to_f32_slice(wide),
            Values::BF16(values) => kernels::widen_bf16(&values[range], wide),
            Values::Nf4(values) => values.widen(start, wide),
        }
    }
}

impl Rows for FrozenWeight {
    fn bits<'a>(&'a self, row: usize, columns: Range<usize>, room: &'a mut [u16]) -> &'a [u16] {
        let start = row * self.columns();
        let range = start + columns.start..start + columns.end;
        match self.values() {
            Values::BF16(values) => values[range].reinterpret_cast(),
            Values::F32(values) => {
                round(room, &values[range]);
                room
            }
            Values::F16(_) | Values::Nf4(_) => {
                let mut wide = vec![0f32; room.len()];
                self.widen_values(range.start, &mut wide);
                round(room, &wide);
                room
            }
        }
    }
}

impl std::fmt::Debug for FrozenWeight {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "FrozenWeight({}, {}, {:?})",
            self.rows(),
            self.columns(),
            self.dtype()
        )
    }
}

fn unsupported_type(dtype: DType) -> Error {
    Error::new(format!("a weight in {dtype:?} cannot be used")).hint("f32, f16 and bf16 can")
}

/// Lends a buffer of `length` floats that lives as long as the thread; its values are left over from other uses.
pub(super) fn with_scratch<T>(length: usize, body: impl FnOnce(&mut [f32]) -> T) -> T {
    thread_local! {
        static SCRATCH: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    // Taken out while in use: a task that is stolen on this thread meanwhile gets one of its own.
    let mut scratch = SCRATCH.take();
    if scratch.len() < length {
        scratch.resize(length, 0.0);
    }
    let result = body(&mut scratch[..length]);
    SCRATCH.set(scratch);
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, frozen_weights, random};
    use std::io::Write;

    fn flat(t: &Tensor) -> Vec<f32> {
        t.flatten_all()
            .and_then(|t| t.to_dtype(DType::F32))
            .and_then(|t| t.to_vec1())
            .expect("a float type")
    }

    /// A mapped file of these bytes.
    fn map(bytes: &[u8]) -> Arc<Mmap> {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(bytes).expect("room for it");
        // SAFETY: the file has no name, so nobody else changes it.
        Arc::new(unsafe { Mmap::map(&file) }.expect("a file that can be mapped"))
    }

    #[test]
    fn values_come_back_as_they_were() -> Result<()> {
        for w in frozen_weights(1, 131, 17).into_iter().take(3) {
            let stored = random(1, &[131, 17]).to_dtype(w.dtype())?;
            assert_eq!(flat(&w.to_f32()?), flat(&stored));
            assert_eq!(w.to_tensor()?.dtype(), w.dtype());
            assert_eq!(flat(&w.to_tensor()?), flat(&stored));
        }
        Ok(())
    }

    #[test]
    fn a_mapped_weight_is_read_in_place_or_copied() -> Result<()> {
        let numbers = flat(&random(1, &[6]));
        for shift in 0..4 {
            let mut bytes = vec![0u8; 4096 + shift];
            bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            let range = 4096 + shift..bytes.len();
            let w = FrozenWeight::mapped(map(&bytes), range, DType::F32, 2, 3)?;
            assert_eq!(flat(&w.to_f32()?), numbers);
            let in_place = matches!(w.values(), Values::F32(Buffer::Mapped(..)));
            assert_eq!(in_place, shift == 0);
        }
        for dtype in [DType::F16, DType::BF16] {
            let bytes: Vec<u8> = numbers
                .iter()
                .flat_map(|&number| match dtype {
                    DType::F16 => f16::from_f32(number).to_le_bytes(),
                    _ => bf16::from_f32(number).to_le_bytes(),
                })
                .collect();
            let w = FrozenWeight::mapped(map(&bytes), 0..12, dtype, 3, 2)?;
            assert_eq!(
                flat(&w.to_tensor()?),
                flat(&random(1, &[6]).to_dtype(dtype)?)
            );
        }
        Ok(())
    }

    #[test]
    fn bytes_that_do_not_fit_are_an_error() {
        let file = map(&[0; 64]);
        let error = |range, dtype, rows, columns| {
            FrozenWeight::mapped(file.clone(), range, dtype, rows, columns)
                .expect_err("refused")
                .to_string()
        };
        assert_eq!(
            error(40..80, DType::F32, 2, 5),
            "a weight is at bytes 40..80 of a file of 64 bytes"
        );
        assert_eq!(
            error(0..40, DType::BF16, 2, 5),
            "a weight of shape (2, 5) in BF16 cannot be 40 bytes long"
        );
        assert_eq!(
            error(0..40, DType::F32, usize::MAX, 2),
            format!(
                "a weight of shape ({}, 2) in F32 cannot be 40 bytes long",
                usize::MAX
            )
        );
        assert_eq!(
            error(0..10, DType::U8, 2, 5),
            "a weight in U8 cannot be used"
        );
    }

    #[test]
    fn rows_are_gathered_in_order() -> Result<()> {
        for w in frozen_weights(3, 50, 7) {
            let rows: Vec<u32> = (0..101).map(|i| i * 7 % 50).collect();
            let wanted = w
                .to_f32()?
                .index_select(&Tensor::new(rows.as_slice(), &Device::Cpu)?, 0)?;
            assert_eq!(flat(&w.gather(&rows)?), flat(&wanted));
            assert_eq!(w.gather(&[])?.dims(), [0, 7]);
            let error = w.gather(&[3, 50]).expect_err("row 50 of 50");
            assert_eq!(
                error.to_string(),
                "token 50 at position 1 is outside a vocabulary of 50"
            );
        }
        Ok(())
    }

    #[test]
    fn blocks_cover_all_rows_once_with_the_update_added() -> Result<()> {
        let (rows, columns, rank) = (1500, 1111, 3);
        let (a, b) = (
            flat(&random(4, &[rank, columns])),
            flat(&random(5, &[rows, rank])),
        );
        let update = LowRankUpdate {
            a: &ThinMatrix::from_rows(&a, rank, columns),
            b: &b,
            rank,
            scale: 0.5,
        };
        let product = Tensor::from_slice(&b, (rows, rank), &Device::Cpu)?
            .matmul(&Tensor::from_slice(&a, (rank, columns), &Device::Cpu)?)?;
        for w in frozen_weights(6, rows, columns) {
            for update in [None, Some(update)] {
                let mut seen = Vec::new();
                let mut next = 0;
                w.for_each_block(update, |range, block| {
                    assert_eq!(range.start, next);
                    next = range.end;
                    seen.extend_from_slice(block);
                });
                let wanted = match update {
                    Some(_) => (w.to_f32()? + (&product * 0.5)?)?,
                    None => w.to_f32()?,
                };
                assert_close("blocks", &seen, &flat(&wanted), 1e-6);
            }
        }
        Ok(())
    }
}
