//! Tensors as slices, checked once at the border of an operation.

use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Storage, StorageRef, Tensor};
use std::ops::Deref;

/// The values of a contiguous f32 tensor on the CPU, borrowed.
pub(super) struct Floats<'a> {
    storage: StorageRef<'a>,
    start: usize,
    length: usize,
}

impl<'a> Floats<'a> {
    /// Borrows the values of `tensor`, which `operation` knows as `name`; it must be contiguous.
    pub(super) fn of(operation: &str, name: &str, tensor: &'a Tensor) -> Result<Self> {
        if !matches!(tensor.device(), Device::Cpu) {
            return Err(Error::new(format!(
                "`{operation}` is not implemented on {:?} yet",
                tensor.device().location()
            ))
            .hint("run on the CPU"));
        }
        if tensor.dtype() != DType::F32 {
            return Err(Error::new(format!(
                "`{operation}` needs {name} in f32, it is {:?}",
                tensor.dtype()
            )));
        }
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(Error::new(format!(
                "`{operation}` needs {name} contiguous, its strides are {:?}",
                layout.stride()
            )));
        };
        Ok(Self {
            storage,
            start,
            length: end - start,
        })
    }
}

impl Deref for Floats<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.start + self.length],
            _ => unreachable!("device and type were checked when it was borrowed"),
        }
    }
}

/// Rows and columns of `tensor`, which must have two dimensions.
pub(super) fn matrix_shape(operation: &str, name: &str, tensor: &Tensor) -> Result<(usize, usize)> {
    match *tensor.dims() {
        [rows, columns] => Ok((rows, columns)),
        ref other => Err(Error::new(format!(
            "`{operation}` needs {name} as a matrix (rows, columns), its shape is {other:?}"
        ))),
    }
}

/// Refuses a tensor whose shape is not the one that follows from the others.
pub(super) fn expect_shape(
    operation: &str,
    name: &str,
    tensor: &Tensor,
    wanted: &[usize],
    because: &str,
) -> Result<()> {
    if tensor.dims() == wanted {
        return Ok(());
    }
    Err(Error::new(format!(
        "`{operation}` needs {name} of shape {wanted:?} ({because}), its shape is {:?}",
        tensor.dims()
    )))
}
