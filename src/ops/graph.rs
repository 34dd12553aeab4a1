//! Puts a result that is already computed into candle's graph, with the backward that belongs to it.

use crate::Result;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Device, Layout, Shape, Tensor};
use std::sync::{Mutex, PoisonError};

/// The backward of an operation on `N` tensors, together with what its forward saved for it.
pub(super) trait Backward<const N: usize>: Send + Sync + 'static {
    /// Name of the operation in errors.
    const NAME: &'static str;

    /// The gradient of each argument, given the gradient of the result: `None` exactly where it is not tracked.
    fn gradients(
        &self,
        arguments: [&Tensor; N],
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; N]>;
}

/// The arguments of an operation: the tensors whose history the result has.
pub(super) trait Arguments<B>: Sized {
    /// Whether any of them is tracked.
    fn tracked(&self) -> bool;
    /// Makes the node.
    fn apply(self, node: Node<B>) -> candle_core::Result<Tensor>;
}

/// The values of a result, where they were computed.
pub(super) enum Values {
    Cpu(Vec<f32>),
    #[cfg(feature = "cuda")]
    Cuda(CudaStorage),
}

impl Values {
    fn into_tensor(self, shape: Shape) -> Result<Tensor> {
        match self {
            Self::Cpu(values) => Ok(Tensor::from_vec(values, shape, &Device::Cpu)?),
            #[cfg(feature = "cuda")]
            Self::Cuda(storage) => Ok(super::cuda::tensor(storage, shape)),
        }
    }
}

impl From<Vec<f32>> for Values {
    fn from(values: Vec<f32>) -> Self {
        Self::Cpu(values)
    }
}

#[cfg(feature = "cuda")]
impl From<super::cuda::Output> for Values {
    fn from(output: super::cuda::Output) -> Self {
        Self::Cuda(output.into_storage())
    }
}

/// The tensor of `shape` that holds `values`, with `backward` as its history where an argument is tracked.
pub(super) fn record<A: Arguments<B>, B>(
    arguments: A,
    values: impl Into<Values>,
    shape: impl Into<Shape>,
    backward: B,
) -> Result<Tensor> {
    let (values, shape) = (values.into(), shape.into());
    if !arguments.tracked() {
        return values.into_tensor(shape);
    }
    let forward = Mutex::new(Some(values));
    Ok(arguments.apply(Node {
        forward,
        shape,
        backward,
    })?)
}

/// An operation whose forward has been run: candle takes the result out of it.
pub(super) struct Node<B> {
    forward: Mutex<Option<Values>>,
    shape: Shape,
    backward: B,
}

impl<B> Node<B> {
    fn take(&self) -> candle_core::Result<Values> {
        let mut forward = self.forward.lock().unwrap_or_else(PoisonError::into_inner);
        forward.take().ok_or_else(|| {
            candle_core::Error::msg("the result of an operation was asked for twice")
        })
    }

    fn take_cpu(&self) -> candle_core::Result<(CpuStorage, Shape)> {
        match self.take()? {
            Values::Cpu(values) => Ok((CpuStorage::F32(values), self.shape.clone())),
            #[cfg(feature = "cuda")]
            Values::Cuda(_) => Err(elsewhere()),
        }
    }

    #[cfg(feature = "cuda")]
    fn take_cuda(&self) -> candle_core::Result<(CudaStorage, Shape)> {
        match self.take()? {
            Values::Cuda(storage) => Ok((storage, self.shape.clone())),
            Values::Cpu(_) => Err(elsewhere()),
        }
    }
}

#[cfg(feature = "cuda")]
fn elsewhere() -> candle_core::Error {
    candle_core::Error::msg("the result of an operation is not where its arguments are")
}

impl<B: Backward<1>> Arguments<B> for [&Tensor; 1] {
    fn tracked(&self) -> bool {
        self.iter().any(|argument| argument.track_op())
    }

    fn apply(self, node: Node<B>) -> candle_core::Result<Tensor> {
        self[0].apply_op1(node)
    }
}

impl<B: Backward<2>> Arguments<B> for [&Tensor; 2] {
    fn tracked(&self) -> bool {
        self.iter().any(|argument| argument.track_op())
    }

    fn apply(self, node: Node<B>) -> candle_core::Result<Tensor> {
        self[0].apply_op2(self[1], node)
    }
}

impl<B: Backward<3>> Arguments<B> for [&Tensor; 3] {
    fn tracked(&self) -> bool {
        self.iter().any(|argument| argument.track_op())
    }

    fn apply(self, node: Node<B>) -> candle_core::Result<Tensor> {
        self[0].apply_op3(self[1], self[2], node)
    }
}

impl<B: Backward<1>> CustomOp1 for Node<B> {
    fn name(&self) -> &'static str {
        B::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(
        &self,
        x: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let [x] = self
            .backward
            .gradients([x], result, gradient)
            .map_err(candle_core::Error::wrap)?;
        Ok(x)
    }
}

impl<B: Backward<2>> CustomOp2 for Node<B> {
    fn name(&self) -> &'static str {
        B::NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [x, y] = self
            .backward
            .gradients([x, y], result, gradient)
            .map_err(candle_core::Error::wrap)?;
        Ok((x, y))
    }
}

impl<B: Backward<3>> CustomOp3 for Node<B> {
    fn name(&self) -> &'static str {
        B::NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [x, y, z] = self
            .backward
            .gradients([x, y, z], result, gradient)
            .map_err(candle_core::Error::wrap)?;
        Ok((x, y, z))
    }
}
