//! The folder that PEFT reads and writes: `adapter_config.json` and `adapter_model.safetensors`.

use super::{AdapterWeights, PeftConfig, write_bytes};
use crate::{Context, Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Name of the weights' file in an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What the same file was called when PEFT still wrote pickles.
pub const PICKLE_FILE: &str = "adapter_model.bin";

/// The tensors of an adapter's file, f32, under their names in it.
pub type SavedTensors = BTreeMap<String, Tensor>;

/// An adapter as it lies on the disk.
#[derive(Debug)]
pub struct PeftFolder {
    /// The configuration, as written.
    pub config: PeftConfig,
    /// The trained tensors.
    pub tensors: SavedTensors,
}

impl PeftFolder {
    /// Reads an adapter folder. Weights in a pickle (`adapter_model.bin`) are refused: reading one runs its code.
    pub fn load(folder: &Path) -> Result<Self> {
        let config = PeftConfig::read(folder)?;
        refuse_pickle(folder)?;
        Ok(Self {
            config,
            tensors: read_adapter_tensors(&folder.join(WEIGHTS_FILE))?,
        })
    }

    /// Refuses values that are not finite, in the words of the first tensor that has some. To [`PeftFolder::load`] they are
    /// values like others: what is wrong with an adapter can be looked at.
    pub fn check_finite(&self) -> Result<()> {
        for (name, tensor) in &self.tensors {
            let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
            let broken = values.iter().filter(|value| !value.is_finite()).count();
            if broken > 0 {
                return Err(Error::not_finite(format!(
                    "{broken} of the {} values of `{name}` are not finite",
                    values.len()
                ))
                .hint("`retune inspect` lists all such weights of an adapter"));
            }
        }
        Ok(())
    }

    /// Writes `weights` and their configuration into `folder`, each file in full or not at all. The same weights give
    /// the same bytes.
    pub fn save(folder: &Path, config: &PeftConfig, weights: &AdapterWeights) -> Result<()> {
        let mut names = Vec::new();
        for (name, var) in weights.iter() {
            let values: Vec<f32> = var.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?;
            let bytes: Vec<u8> = values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            names.push((name, var.dims().to_vec(), bytes));
        }
        let mut views = Vec::new();
        for (name, shape, bytes) in &names {
            views.push((
                *name,
                TensorView::new(Dtype::F32, shape.clone(), bytes).at(*name)?,
            ));
        }
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let bytes = safetensors::serialize(views, Some(metadata)).at(folder.display())?;
        write_bytes(&folder.join(WEIGHTS_FILE), &bytes)?;
        write_bytes(&folder.join(super::CONFIG_FILE), &config.to_json()?)
    }
}

/// Refuses a folder with its weights in a pickle alone: no pickle is ever read.
pub fn refuse_pickle(folder: &Path) -> Result<()> {
    if folder.join(WEIGHTS_FILE).exists() || !folder.join(PICKLE_FILE).exists() {
        return Ok(());
    }
    Err(Error::new(format!(
        "the adapter is a pickle (`{PICKLE_FILE}`), which can run code when it is read"
    ))
    .at(folder.display())
    .hint(format!(
        "convert it once, in its folder: python -c \"import torch, safetensors.torch as s; \
         t = torch.load('{PICKLE_FILE}', map_location='cpu', weights_only=True); \
         s.save_file({{k: v.contiguous() for k, v in t.items()}}, '{WEIGHTS_FILE}', {{'format': 'pt'}})\""
    )))
}

/// The tensors of a safetensors file of f32, f16 or bf16 weights, widened to f32.
pub fn read_adapter_tensors(path: &Path) -> Result<SavedTensors> {
    let bytes = super::read_bytes(path).at(path.display())?;
    let file = SafeTensors::deserialize(&bytes).at(path.display())?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                return Err(Error::new(format!(
                    "`{name}` is stored as {other:?}; only F32, F16 and BF16 are read"
                ))
                .at(path.display()));
            }
        };
        if view.shape().contains(&0) {
            return Err(
                Error::new(format!("`{name}` is {:?}: it has no values", view.shape()))
                    .at(path.display()),
            );
        }
        let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?
            .to_dtype(DType::F32)?;
        tensors.insert(name.to_owned(), tensor);
    }
    if tensors.is_empty() {
        return Err(Error::new("there is no tensor in it").at(path.display()));
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::storage::Init;

    #[test]
    fn save_load_save_gives_the_same_bytes() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let again = tempfile::tempdir().expect("a folder");
        let config = PeftConfig::new("LORA").with("r", 2);
        let mut weights = AdapterWeights::fresh(1, &Device::Cpu);
        for name in ["b.lora_B.weight", "a.lora_A.weight"] {
            weights.var(name, (3, 2), Init::Normal { deviation: 1.0 })?;
        }
        PeftFolder::save(folder.path(), &config, &weights)?;

        let loaded = PeftFolder::load(folder.path())?;
        let mut weights = AdapterWeights::loaded(loaded.tensors, &Device::Cpu);
        weights.var("a.lora_A.weight", (3, 2), Init::Zeros)?;
        weights.var("b.lora_B.weight", (3, 2), Init::Zeros)?;
        PeftFolder::save(again.path(), &loaded.config, &weights.finish()?)?;
        for file in [WEIGHTS_FILE, super::super::CONFIG_FILE] {
            let read = |folder: &tempfile::TempDir| {
                std::fs::read(folder.path().join(file)).expect("written")
            };
            assert_eq!(read(&folder), read(&again), "{file}");
        }
        Ok(())
    }

    #[test]
    fn a_pickle_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("adapter_config.json"), "{}").expect("written");
        std::fs::write(folder.path().join("adapter_model.bin"), "x").expect("written");
        let message = PeftFolder::load(folder.path())
            .expect_err("a pickle")
            .to_string();
        assert!(message.contains("pickle"), "{message}");
    }

    #[test]
    fn a_truncated_file_is_refused() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let mut weights = AdapterWeights::fresh(1, &Device::Cpu);
        weights.var("a", (30, 2), Init::Ones)?;
        PeftFolder::save(folder.path(), &PeftConfig::new("LORA"), &weights)?;
        let path = folder.path().join(WEIGHTS_FILE);
        let bytes = std::fs::read(&path).expect("written");
        std::fs::write(&path, &bytes[..bytes.len() - 7]).expect("written");
        let message = PeftFolder::load(folder.path())
            .expect_err("truncated")
            .to_string();
        assert!(
            message.contains("not a valid safetensors file"),
            "{message}"
        );
        Ok(())
    }

    /// A file of one tensor of these bytes.
    fn file_of(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> tempfile::NamedTempFile {
        let view = TensorView::new(dtype, shape.to_vec(), bytes).expect("a tensor");
        let bytes = safetensors::serialize([("a", view)], None).expect("a file");
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("written");
        file
    }

    #[test]
    fn half_precision_is_widened_without_loss() -> Result<()> {
        // 1.5 and -2 as IEEE's 16 bits, and as the upper half of 32.
        for (dtype, bits) in [
            (Dtype::F16, [0x3e00u16, 0xc000]),
            (Dtype::BF16, [0x3fc0, 0xc000]),
        ] {
            let bytes = bits.map(u16::to_le_bytes).concat();
            let file = file_of(dtype, &[2], &bytes);
            let tensors = read_adapter_tensors(file.path())?;
            assert_eq!(tensors["a"].to_vec1::<f32>()?, [1.5, -2.0]);
        }
        Ok(())
    }

    #[test]
    fn values_that_are_not_finite_are_loaded_and_told() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let mut weights = AdapterWeights::fresh(1, &Device::Cpu);
        weights.var("a", (2, 2), Init::Ones)?;
        for (broken, count) in [
            ([1.0, f32::MAX, -0.0, f32::MIN_POSITIVE], 0),
            ([1.0, f32::NAN, 0.0, 0.0], 1),
            ([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0], 3),
        ] {
            let start = Tensor::from_vec(broken.to_vec(), (2, 2), &Device::Cpu)?;
            weights.get("a").expect("made above").set(&start)?;
            PeftFolder::save(folder.path(), &PeftConfig::new("LORA"), &weights)?;
            let checked = PeftFolder::load(folder.path())?.check_finite();
            if count == 0 {
                checked?;
                continue;
            }
            let error = checked.expect_err("not finite");
            assert_eq!(error.kind(), ErrorKind::NotFinite);
            assert_eq!(
                error.to_string(),
                format!("{count} of the 4 values of `a` are not finite")
            );
        }
        Ok(())
    }

    #[test]
    fn a_file_that_holds_no_weights_is_refused() {
        let empty = tempfile::NamedTempFile::new().expect("a file");
        let none: [(&str, TensorView); 0] = [];
        let bytes = safetensors::serialize(none, None).expect("a file");
        std::fs::write(empty.path(), bytes).expect("written");
        for (file, fact) in [
            (file_of(Dtype::I64, &[1], &[0; 8]), "`a` is stored as I64"),
            (file_of(Dtype::F32, &[0, 2], &[]), "`a` is [0, 2]"),
            (empty, "there is no tensor in it"),
        ] {
            let error = read_adapter_tensors(file.path()).expect_err(fact);
            assert!(error.to_string().contains(fact), "{error}");
        }
    }

    #[test]
    fn a_pickle_beside_safetensors_is_left_alone() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        refuse_pickle(folder.path())?;
        std::fs::write(folder.path().join(PICKLE_FILE), "x").expect("written");
        assert!(refuse_pickle(folder.path()).is_err());
        std::fs::write(folder.path().join(WEIGHTS_FILE), "x").expect("written");
        refuse_pickle(folder.path())
    }
}
