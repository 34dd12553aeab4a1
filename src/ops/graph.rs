//! Puts a result that is already computed into candle's graph, with the backward that belongs to it.

use crate::Result;
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

/// The tensor of `shape` that holds `values`, with `backward` as its history where an argument is tracked.
pub(super) fn record<A: Arguments<B>, B>(
    arguments: A,
    values: Vec<f32>,
    shape: impl Into<Shape>,
    backward: B,
) -> Result<Tensor> {
    let shape = shape.into();
    if !arguments.tracked() {
        return Ok(Tensor::from_vec(values, shape, &Device::Cpu)?);
    }
    let forward = Mutex::new(Some(CpuStorage::F32(values)));
    Ok(arguments.apply(Node {
        forward,
        shape,
        backward,
    })?)
}

/// An operation whose forward has been run: candle takes the result out of it.
pub(super) struct Node<B> {
    forward: Mutex<Option<CpuStorage>>,
    shape: Shape,
    backward: B,
}

impl<B> Node<B> {
    fn take(&self) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut forward = self.forward.lock().unwrap_or_else(PoisonError::into_inner);
        let values = forward.take().ok_or_else(|| {
            candle_core::Error::msg("the result of an operation was asked for twice")
        })?;
        Ok((values, self.shape.clone()))
    }
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
        self.take()
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
        self.take()
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
        self.take()
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
