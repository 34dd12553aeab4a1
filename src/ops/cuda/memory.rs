//! Tensors on the device as what kernels take, checked once at the border of an operation.

use super::launch;
use crate::{Error, Result};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Shape, Storage, Tensor, WithDType};
use half::bf16;
use std::marker::PhantomData;

/// The type of activations, for which kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Real {
    F32,
    Bf16,
}

impl Real {
    /// The type of `tensor`, which `operation` knows as `name`.
    pub(super) fn of(operation: &str, name: &str, tensor: &Tensor) -> Result<Self> {
        match tensor.dtype() {
            DType::F32 => Ok(Self::F32),
            DType::BF16 => Ok(Self::Bf16),
            other => Err(Error::new(format!(
                "`{operation}` needs {name} in f32 or bf16, it is {other:?}"
            ))),
        }
    }

    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// Its name in a kernel.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "float",
            Self::Bf16 => "__nv_bfloat16",
        }
    }
}

/// Where on the device the values of a tensor begin, as long as it lives.
#[derive(Clone, Copy)]
pub(super) struct Address<'a> {
    first: u64,
    size: usize,
    owner: PhantomData<&'a ()>,
}

impl<'a> Address<'a> {
    /// That of `tensor`, which `operation` knows as `name`; it must be contiguous and hold values of `dtype`.
    pub(super) fn of(
        operation: &str,
        name: &str,
        tensor: &'a Tensor,
        dtype: DType,
    ) -> Result<Self> {
        if tensor.dtype() != dtype {
            return Err(Error::new(format!(
                "`{operation}` needs {name} in {dtype:?}, it is {:?}",
                tensor.dtype()
            )));
        }
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, _)) = layout.contiguous_offsets() else {
            return Err(Error::new(format!(
                "`{operation}` needs {name} contiguous, its strides are {:?}",
                layout.stride()
            )));
        };
        let Storage::Cuda(storage) = &*storage else {
            return Err(Error::new(format!(
                "`{operation}` runs on the GPU but {name} is in main memory"
            )));
        };
        let size = dtype.size_in_bytes();
        Ok(Self {
            first: first_address(storage)? + (start * size) as u64,
            size,
            owner: PhantomData,
        })
    }

    /// As [`Address::of`], for an argument that may be absent.
    pub(super) fn of_optional(
        operation: &str,
        name: &str,
        tensor: Option<&'a Tensor>,
        dtype: DType,
    ) -> Result<Option<Self>> {
        tensor
            .map(|tensor| Self::of(operation, name, tensor, dtype))
            .transpose()
    }

    /// That of the value with this index.
    pub(super) fn at(self, index: usize) -> Self {
        Self {
            first: self.first + (index * self.size) as u64,
            ..self
        }
    }

    /// As a number.
    pub(super) fn number(self) -> u64 {
        self.first
    }
}

/// Numbers that are copied to the device as they are. Every bit pattern is one, and all of their bytes belong to them.
pub(super) trait Number: CudaDType + DeviceRepr + WithDType {}

impl Number for f32 {}
impl Number for bf16 {}
impl Number for u32 {}
impl Number for i64 {}
impl Number for f64 {}

/// Memory on the device that an operation fills.
pub(in crate::ops) struct Output {
    storage: CudaStorage,
    first: u64,
    dtype: DType,
}

impl Output {
    /// Room for `length` values of `dtype`, which hold anything.
    pub(super) fn new(device: &CudaDevice, length: usize, dtype: DType) -> Result<Self> {
        Self::of_storage(launch::uninitialised(device, length, dtype)?, dtype)
    }

    /// `length` zeros.
    pub(super) fn zeros(device: &CudaDevice, length: usize, dtype: DType) -> Result<Self> {
        let storage = device
            .zeros_impl(&Shape::from(length.max(1)), dtype)
            .map_err(crate::Error::from)?;
        Self::of_storage(storage, dtype)
    }

    fn of_storage(storage: CudaStorage, dtype: DType) -> Result<Self> {
        let first = first_address(&storage)?;
        Ok(Self {
            storage,
            first,
            dtype,
        })
    }

    pub(super) fn address(&self) -> Address<'_> {
        Address {
            first: self.first,
            size: self.dtype.size_in_bytes(),
            owner: PhantomData,
        }
    }

    /// The first `length` values, once the device has come to them. That such a copy waits is not promised for all machines,
    /// so it is waited for.
    pub(super) fn read<T: Number + Default>(&self, length: usize) -> Result<Vec<T>> {
        let mut values = vec![T::default(); length];
        let device = &self.storage.device;
        let place = self.storage.as_cuda_slice::<T>()?.slice(..length);
        device.memcpy_dtoh(&place, &mut values)?;
        device.synchronize()?;
        Ok(values)
    }

    /// Copies `values` to the place `start` on. They may be dropped afterwards, unless they lie in page-locked memory: it
    /// is read when the device's stream comes to the copy.
    pub(super) fn write<T: Number>(&mut self, start: usize, values: &[T]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let device = self.storage.device.clone();
        let slice = self.storage.as_cuda_slice_mut::<T>()?;
        let mut place = slice.slice_mut(start..start + values.len());
        device
            .memcpy_htod(values, &mut place)
            .map_err(crate::Error::from)
    }

    /// The one f64 that it holds, as an f32.
    pub(super) fn rounded_scalar(self) -> Result<Self> {
        let storage = self
            .storage
            .to_dtype(&Layout::contiguous(()), DType::F32)
            .map_err(crate::Error::from)?;
        Self::of_storage(storage, DType::F32)
    }

    /// The values as a tensor without history.
    pub(in crate::ops) fn into_tensor(self, shape: impl Into<Shape>) -> Tensor {
        tensor(self.storage, shape)
    }

    pub(in crate::ops) fn into_storage(self) -> CudaStorage {
        self.storage
    }
}

/// The tensor with these values and without history.
pub(in crate::ops) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

fn first_address(storage: &CudaStorage) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    let address = match storage.dtype() {
        DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
        DType::F64 => storage.as_cuda_slice::<f64>()?.device_ptr(&stream).0,
        DType::U32 => storage.as_cuda_slice::<u32>()?.device_ptr(&stream).0,
        DType::I64 => storage.as_cuda_slice::<i64>()?.device_ptr(&stream).0,
        other => {
            return Err(Error::new(format!(
                "values in {other:?} cannot be used on the GPU"
            )));
        }
    };
    Ok(address)
}

/// The device that `tensor` is on.
pub(super) fn device_of<'a>(operation: &str, tensor: &'a Tensor) -> Result<&'a CudaDevice> {
    tensor.device().as_cuda_device().map_err(|_| {
        Error::new(format!(
            "`{operation}` runs on the GPU but x is in main memory"
        ))
    })
}

/// The result that a sum of gradients goes into, and whether it is added to what is there.
pub(super) fn sum(
    operation: &str,
    onto: Option<Tensor>,
    device: &CudaDevice,
    shape: &[usize],
    real: Real,
) -> Result<(Tensor, bool)> {
    let Some(onto) = onto else {
        let length = shape.iter().product();
        let output = Output::new(device, length, real.dtype())?;
        return Ok((output.into_tensor(shape), false));
    };
    if onto.elem_count() != shape.iter().product::<usize>() {
        return Err(Error::new(format!(
            "`{operation}`: a gradient of shape {shape:?} cannot be added to one of shape {:?}",
            onto.dims()
        )));
    }
    Ok((onto.reshape(shape)?, true))
}
