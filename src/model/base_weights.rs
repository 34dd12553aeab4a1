//! Where the weights of a base come from: a checkpoint, or chance.

use super::checkpoint::Checkpoint;
use super::placement::Placement;
use crate::adapters::storage::generator;
use crate::ops::FrozenWeight;
use crate::{Context, Error, Result};
use candle_core::{DType, Device, Tensor};
use rand::RngExt;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// The frozen weights of a base by their Hugging Face names.
pub(super) trait BaseWeights {
    /// Whether there is a weight of this name.
    fn contains(&self, name: &str) -> bool;

    /// A matrix in the type it is stored in.
    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<FrozenWeight>;

    /// A vector in f32, on the CPU.
    fn vector(&self, name: &str, length: usize) -> Result<Tensor>;

    /// The matrix `name`, which is `weight`, where the model computes.
    fn place(
        &self,
        name: &str,
        weight: &FrozenWeight,
        placement: &Placement,
    ) -> Result<FrozenWeight>;
}

impl BaseWeights for Checkpoint {
    fn contains(&self, name: &str) -> bool {
        Self::contains(self, name)
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<FrozenWeight> {
        let view = self.get(name)?;
        expect_shape(name, &view.shape, &[rows, columns])?;
        FrozenWeight::mapped(view.map, view.bytes, view.dtype, rows, columns).at(name)
    }

    fn vector(&self, name: &str, length: usize) -> Result<Tensor> {
        let view = self.get(name)?;
        expect_shape(name, &view.shape, &[length])?;
        view.to_f32_tensor().at(name)
    }

    fn place(
        &self,
        name: &str,
        weight: &FrozenWeight,
        placement: &Placement,
    ) -> Result<FrozenWeight> {
        let held = placement.hold(name, weight).at(name)?;
        if !placement.device.is_cpu() || placement.quantization_of(name).is_some() {
            // What was copied is needed no more: not more than one weight of the file is in memory.
            self.get(name)?.release();
        }
        Ok(held)
    }
}

fn expect_shape(name: &str, found: &[usize], expected: &[usize]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::new(format!(
        "the checkpoint stores {found:?}, its config.json asks for {expected:?}"
    ))
    .at(name)
    .hint("config.json and the weights are of different models"))
}

/// Random weights for measuring: matrices with deviation 0.02 in one type, vectors of ones.
pub(super) struct RandomWeights {
    /// The type that matrices are stored in: f32, f16 or bf16.
    dtype: DType,
    /// The matrices of one block as they were made, if every block is to have the same.
    made: Option<Known>,
    /// The same where the model computes, if they are to be in memory once.
    placed: Option<Known>,
}

/// Matrices by their names without numbers.
type Known = RefCell<BTreeMap<String, FrozenWeight>>;

impl RandomWeights {
    pub(super) fn new(dtype: DType) -> Self {
        Self {
            dtype,
            made: None,
            placed: None,
        }
    }

    /// Every block has weights of its own with the same values, so that a large model is soon made.
    pub(super) fn copied(dtype: DType) -> Self {
        Self {
            made: Some(Known::default()),
            ..Self::new(dtype)
        }
    }

    /// Every block has the same weights, so that a model takes the memory of one.
    pub(super) fn repeated(dtype: DType) -> Self {
        Self {
            placed: Some(Known::default()),
            ..Self::copied(dtype)
        }
    }

    fn make(&self, name: &str, rows: usize, columns: usize) -> Result<FrozenWeight> {
        // Even, of the deviation that models start with.
        const LARGEST: f32 = 0.02 * 1.732_050_8;
        let mut generator = generator(0, name);
        let values = (0..rows * columns).map(|_| generator.random_range(-LARGEST..LARGEST));
        FrozenWeight::from_values(rows, columns, self.dtype, values)
    }
}

impl BaseWeights for RandomWeights {
    fn contains(&self, _: &str) -> bool {
        true
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<FrozenWeight> {
        let make = || self.make(name, rows, columns);
        match &self.made {
            Some(made) => once(made, name, make),
            None => make(),
        }
    }

    fn vector(&self, _: &str, length: usize) -> Result<Tensor> {
        Ok(Tensor::ones(length, DType::F32, &Device::Cpu)?)
    }

    fn place(
        &self,
        name: &str,
        weight: &FrozenWeight,
        placement: &Placement,
    ) -> Result<FrozenWeight> {
        let place = || placement.hold(name, weight);
        match &self.placed {
            Some(placed) => once(placed, name, place),
            None => place(),
        }
    }
}

/// The matrix of all blocks that is called `name` but for the block's number; the first who asks for it has it made.
fn once(
    known: &Known,
    name: &str,
    make: impl FnOnce() -> Result<FrozenWeight>,
) -> Result<FrozenWeight> {
    let kind: Vec<&str> = name
        .split('.')
        .filter(|part| part.parse::<usize>().is_err())
        .collect();
    let kind = kind.join(".");
    if let Some(known) = known.borrow().get(&kind) {
        return Ok(known.clone());
    }
    let matrix = make()?;
    known.borrow_mut().insert(kind, matrix.clone());
    Ok(matrix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_other_values_or_the_same() -> Result<()> {
        let of = |base: &RandomWeights, block: usize| -> Result<Vec<Vec<f32>>> {
            let name = format!("model.layers.{block}.mlp.up_proj.weight");
            Ok(base.matrix(&name, 5, 3)?.to_f32()?.to_vec2()?)
        };
        let (apart, copied) = (
            RandomWeights::new(DType::F32),
            RandomWeights::copied(DType::F32),
        );
        assert_ne!(of(&apart, 0)?, of(&apart, 1)?);
        assert_eq!(of(&copied, 0)?, of(&copied, 1)?);
        assert_eq!(of(&copied, 0)?, of(&apart, 0)?);
        Ok(())
    }
}
