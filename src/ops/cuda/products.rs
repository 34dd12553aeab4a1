//! Matrix products on the device, by cuBLAS.

#![expect(unsafe_code, reason = "cuBLAS takes pointers and sizes on trust")]

use super::memory::{Address, Real};
use crate::{Error, Result};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::cublas::result::{CublasError, gemm_ex};
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasMath_t, cublasOperation_t, cublasSetMathMode,
    cublasSetWorkspace_v2, cublasStatus_t, cudaDataType_t,
};
use std::ffi::{c_int, c_void};

/// Scratch memory of cuBLAS, as NVIDIA recommends it for Hopper; smaller devices use less of it.
const WORKSPACE_BYTES: usize = 32 << 20;

/// A matrix in row order, as it is or transposed.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: Address<'a>,
    rows: usize,
    columns: usize,
    transposed: bool,
}

impl<'a> Matrix<'a> {
    /// `(rows, columns)` values.
    pub(super) fn new(values: Address<'a>, rows: usize, columns: usize) -> Self {
        Self {
            values,
            rows,
            columns,
            transposed: false,
        }
    }

    /// Its transpose, read from the same memory.
    pub(super) fn transposed(self) -> Self {
        Self {
            transposed: !self.transposed,
            ..self
        }
    }

    /// Rows and columns as it is used.
    fn shape(self) -> (usize, usize) {
        match self.transposed {
            true => (self.columns, self.rows),
            false => (self.rows, self.columns),
        }
    }

    fn operation(self) -> cublasOperation_t {
        match self.transposed {
            true => cublasOperation_t::CUBLAS_OP_T,
            false => cublasOperation_t::CUBLAS_OP_N,
        }
    }
}

/// Where a product goes.
#[derive(Clone, Copy)]
pub(super) struct Destination<'a> {
    pub(super) values: Address<'a>,
    /// The type of its values: that of the factors, or f32.
    pub(super) real: Real,
    /// Whether it is added to what is there.
    pub(super) add: bool,
}

impl<'a> Destination<'a> {
    /// Overwritten by the product.
    pub(super) fn overwrite(values: Address<'a>, real: Real) -> Self {
        Self {
            values,
            real,
            add: false,
        }
    }

    /// Added to.
    pub(super) fn add(values: Address<'a>, real: Real) -> Self {
        Self {
            values,
            real,
            add: true,
        }
    }
}

/// `scale · left right`, in row order: factors of type `real`, sums in f32.
pub(super) fn multiply(
    device: &CudaDevice,
    destination: Destination<'_>,
    left: Matrix<'_>,
    right: Matrix<'_>,
    real: Real,
    scale: f32,
) -> Result<()> {
    let ((rows, inner), (right_inner, columns)) = (left.shape(), right.shape());
    if inner != right_inner {
        return Err(Error::new(format!(
            "a product of ({rows}, {inner}) with ({right_inner}, {columns}) does not exist"
        )));
    }
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let size = |size: usize| {
        c_int::try_from(size).map_err(|_| {
            Error::new(format!(
                "a matrix with a side of {size} is too large for cuBLAS"
            ))
        })
    };
    let beta = if destination.add { 1f32 } else { 0f32 };
    let pointer = |address: Address<'_>| address.number() as *mut c_void;
    let stream = device.cuda_stream();
    stream
        .context()
        .bind_to_thread()
        .map_err(|error| Error::new(format!("the GPU is not available: {error}")))?;
    let blas = device.cublas_handle();
    // cuBLAS counts in columns, where a matrix in row order is its own transpose: it makes `rightᵀ leftᵀ`.
    // SAFETY: the handle is the device's and lives as long. The factors and the destination are tensors of the shapes
    // and types given here, which the callers, all in this folder, have checked; they live until this returns and are
    // given back in the order of the stream. `scale` and `beta` are read before the call returns: the handle's pointer
    // mode is the host's, which it has from its creation.
    let result = unsafe {
        gemm_ex(
            *blas.handle(),
            right.operation(),
            left.operation(),
            size(columns)?,
            size(rows)?,
            size(inner)?,
            (&raw const scale).cast(),
            pointer(right.values).cast_const(),
            data_type(real),
            size(right.columns.max(1))?,
            pointer(left.values).cast_const(),
            data_type(real),
            size(left.columns.max(1))?,
            (&raw const beta).cast(),
            pointer(destination.values),
            data_type(destination.real),
            size(columns)?,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DFALT,
        )
    };
    result.map_err(failed)
}

fn data_type(real: Real) -> cudaDataType_t {
    match real {
        Real::F32 => cudaDataType_t::CUDA_R_32F,
        Real::Bf16 => cudaDataType_t::CUDA_R_16BF,
    }
}

/// Has cuBLAS keep sums of bf16 products in f32 to their end, and gives it scratch memory of its own, with which it
/// gives the same bits on each run. Once for a device.
pub(super) fn prepare(device: &CudaDevice) -> Result<()> {
    let blas = device.cublas_handle();
    let workspace = device
        .alloc_zeros::<u8>(WORKSPACE_BYTES)
        .map_err(crate::Error::from)?
        .leak();
    // SAFETY: the handle is the device's. The memory is of that size and is never given back.
    let result = unsafe {
        let mode = cublasSetMathMode(
            *blas.handle(),
            cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION,
        );
        mode.result().and_then(|()| {
            cublasSetWorkspace_v2(*blas.handle(), workspace as *mut c_void, WORKSPACE_BYTES)
                .result()
        })
    };
    result.map_err(failed)
}

fn failed(error: CublasError) -> Error {
    match error.0 {
        cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Error::out_of_gpu_memory(),
        _ => Error::new(format!("a matrix product on the GPU failed: {error:?}")),
    }
}
