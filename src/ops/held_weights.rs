//! A time in which trained weights stay as they are.

#[cfg(feature = "cuda")]
use super::cuda;
use std::marker::PhantomData;

/// While it lives, no trained weight changes with which this thread computes: on a GPU the factors of low-rank updates are
/// brought to the type of the activations once, and not for every product.
#[must_use]
pub struct HeldWeights(PhantomData<*const ()>);

impl HeldWeights {
    /// From here on, until it is dropped.
    pub fn begin() -> Self {
        #[cfg(feature = "cuda")]
        cuda::hold_weights(true);
        Self(PhantomData)
    }
}

impl Drop for HeldWeights {
    fn drop(&mut self) {
        #[cfg(feature = "cuda")]
        cuda::hold_weights(false);
    }
}
