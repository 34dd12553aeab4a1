//! Every merged weight against base and adapter run side by side, each layer by itself.
//!
//! A layer by itself amplifies nothing, so the bound is what rounding to the stored type can do and no more:
//! `|y - y'| ≤ u · |x| |W|ᵀ` with the type's unit roundoff `u`. This holds in half precision too, where the logits of
//! a whole model drift too far to prove anything.

use super::sites::{Adapted, Base, Change, Changes, StoredLinear};
use crate::adapters::hooks::{BaseLinear, EmbeddingAdapter, LinearAdapter, Mode};
use crate::adapters::storage::{AdapterWeights, Init};
use crate::{Context, Error, Result};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use serde::Serialize;

/// Rows that each layer is tried with.
const ROWS: usize = 4;
/// What f32 sums in another order may differ by, relative to the sums of magnitudes.
const NOISE: f64 = 1e-4;
/// Half of the smallest f16 above zero: what rounding may do to the tiniest values.
const TINIEST: f64 = 3e-8;

/// How near each merged weight by itself does what base and adapter do, side by side.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct LayerCheck {
    /// Number of weights that were tried.
    pub tried: usize,
    /// The largest difference of an output, relative to the largest output of its layer.
    pub difference: f64,
    /// The largest difference of an output, relative to what rounding explains there; a merge that exceeds 1 fails.
    pub of_bound: f64,
}

impl LayerCheck {
    fn and(self, other: Self) -> Self {
        Self {
            tried: self.tried + other.tried,
            difference: self.difference.max(other.difference),
            of_bound: self.of_bound.max(other.of_bound),
        }
    }
}

/// Tries every changed weight of `merged`; the first that is off by more than rounding is an error.
pub(super) fn every_layer(base: &Base, merged: &Base, changes: &Changes) -> Result<LayerCheck> {
    let mut all = LayerCheck::default();
    for (name, change) in &changes.by_name {
        let stored = merged.checkpoint.get(&merged.stored_name(name))?;
        let unit = unit_roundoff(stored.dtype);
        let stored = stored.to_f32_tensor().at(name)?;
        all = all.and(layer(base, name, change, &stored, unit).at(name)?);
    }
    Ok(all)
}

fn layer(
    base: &Base,
    name: &str,
    change: &Change,
    stored: &Tensor,
    unit: f64,
) -> Result<LayerCheck> {
    match &change.adapter {
        None => match &change.replaced {
            None => Ok(LayerCheck::default()),
            Some(replaced) => compare(stored, replaced, &(replaced.abs()? * (unit + 1e-6))?),
        },
        Some(Adapted::Linear(adapter)) => {
            linear(base, name, change, adapter.as_ref(), stored, unit)
        }
        Some(Adapted::Embedding(adapter)) => {
            embedding(base, name, change, adapter.as_ref(), stored, unit)
        }
    }
}

fn linear(
    base: &Base,
    name: &str,
    change: &Change,
    adapter: &dyn LinearAdapter,
    stored: &Tensor,
    unit: f64,
) -> Result<LayerCheck> {
    let x = random(name, ROWS, stored.dim(1)?)?;
    let before = StoredLinear::at(base, name, change.replaced.as_ref());
    let after = StoredLinear::at(base, name, Some(stored));
    let expected = adapter.forward(&x, &before, Mode::Infer)?;
    let found = after.forward(&x)?;
    let sizes = |weight: &Tensor| Ok::<_, Error>(x.abs()?.matmul(&weight.abs()?.t()?)?);
    let (old, new) = (sizes(&before.weight()?)?, sizes(stored)?);
    let allowed = ((&new * (unit + NOISE))? + (old * NOISE)?)?;
    compare(&found, &expected, &allowed)
}

fn embedding(
    base: &Base,
    name: &str,
    change: &Change,
    adapter: &dyn EmbeddingAdapter,
    stored: &Tensor,
    unit: f64,
) -> Result<LayerCheck> {
    let vocabulary = stored.dim(0)?;
    let tokens: Vec<u32> = (0..vocabulary)
        .step_by(vocabulary.div_ceil(256))
        .map(|token| token as u32)
        .collect();
    let tokens = Tensor::new(tokens, &Device::Cpu)?;
    let before = match &change.replaced {
        Some(replaced) => replaced.clone(),
        None => base.values(name)?,
    };
    let before = before.index_select(&tokens, 0)?;
    let expected = adapter.forward(&tokens, &before)?;
    let found = stored.index_select(&tokens, 0)?;
    let allowed = ((found.abs()? * (unit + NOISE))? + (before.abs()? * NOISE)?)?;
    compare(&found, &expected, &allowed)
}

/// Fails if a value is further off than it may be.
fn compare(found: &Tensor, expected: &Tensor, allowed: &Tensor) -> Result<LayerCheck> {
    let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let (found, expected, allowed) = (numbers(found)?, numbers(expected)?, numbers(allowed)?);
    let (mut largest, mut farthest, mut of_bound) = (0.0_f64, 0.0_f64, 0.0_f64);
    for ((found, expected), allowed) in found.iter().zip(&expected).zip(&allowed) {
        let off = f64::from((found - expected).abs());
        let allowed = f64::from(*allowed) + TINIEST * ROWS as f64;
        if off > allowed || off.is_nan() {
            return Err(Error::new(format!(
                "the merged weight does not do what base and adapter do: {found} instead of {expected}, where rounding explains {allowed:.1e}"
            ))
            .hint("nothing was written; please report this with the adapter's configuration"));
        }
        largest = largest.max(f64::from(expected.abs()));
        farthest = farthest.max(off);
        of_bound = of_bound.max(off / allowed);
    }
    Ok(LayerCheck {
        tried: 1,
        difference: if largest > 0.0 {
            farthest / largest
        } else {
            0.0
        },
        of_bound,
    })
}

/// The largest relative error of rounding to the nearest value of a type.
pub(super) fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => bf16::EPSILON.to_f64() / 2.0,
        DType::F16 => f16::EPSILON.to_f64() / 2.0,
        _ => f64::from(f32::EPSILON) / 2.0,
    }
}

fn random(name: &str, rows: usize, columns: usize) -> Result<Tensor> {
    AdapterWeights::fresh(0, &Device::Cpu).var(
        name,
        (rows, columns),
        Init::Normal { deviation: 1.0 },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter_folder::Adapter;
    use crate::merge::sites::find_changes;
    use crate::merge::stack::Stack;
    use crate::merge::{MergeOptions, merge};
    use crate::model::checkpoint::Checkpoint;
    use crate::model::{ModelConfig, inventory};
    use std::path::{Path, PathBuf};

    fn golden(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(path)
    }

    /// Merges `adapter` with weight `taken`, and checks the outcome against weight 1.
    fn check(adapter: &str, taken: f64, dtype: DType) -> Result<LayerCheck> {
        let folder = golden("adapters").join(adapter);
        let base = golden(Adapter::open(&folder)?.saved.config.base_model());
        let home = tempfile::tempdir().expect("a folder");
        let out = home.path().join("out");
        let options = MergeOptions {
            dtype: Some(dtype),
            ..MergeOptions::default()
        };
        let adapters = [(Adapter::open(&folder)?, taken)];
        merge(&base, &adapters, &out, &options, &mut |_| Ok(()))?;

        let config = ModelConfig::read(&base)?;
        let (before, after) = (Checkpoint::open(&base)?, Checkpoint::open(&out)?);
        let of = |checkpoint| Base {
            checkpoint,
            shape: config.shape(),
            parameters: inventory(&config),
        };
        let (before, after) = (of(&before), of(&after));
        let stack = Stack::new(
            &[(&adapters[0].0, 1.0)],
            &before.shape,
            &before.parameters,
            &|name| before.values(name),
        )?;
        every_layer(&before, &after, &find_changes(&before, &stack)?)
    }

    #[test]
    fn what_is_right_passes_and_a_slip_does_not() -> Result<()> {
        for adapter in [
            "lora-qwen3",
            "lora-llama-biases",
            "lora-embeddings-llama",
            "last-layers-head-llama",
        ] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let right = check(adapter, 1.0, dtype)?;
                assert!(right.tried > 0 && right.of_bound <= 1.0, "{right:?}");
                // In f32 only sums in another order differ; else each weight was rounded by up to the unit.
                let unit = unit_roundoff(dtype).max(1e-5);
                assert!(
                    right.difference < 8.0 * unit,
                    "{adapter} {dtype:?}: {right:?}"
                );
                let slip = if dtype == DType::BF16 { 1.05 } else { 1.01 };
                let error = check(adapter, slip, dtype).expect_err(adapter);
                assert!(
                    error
                        .to_string()
                        .contains("does not do what base and adapter do"),
                    "{error}"
                );
            }
        }
        Ok(())
    }
}
