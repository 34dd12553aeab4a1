//! Log-probabilities against transformers and PEFT, on the fixtures of `tests/golden/`.

mod golden;

use golden::{ScoreFile, golden, score_difference};
use retune::adapter_folder::{Adapter, OtherBase};
use retune::adapters::hooks::NoAdapter;
use retune::adapters::storage::AdapterWeights;
use retune::model::checkpoint::Checkpoint;
use retune::model::{self, ModelConfig, Placement};
use retune::ops::Quantization;
use retune::{Context, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// The largest difference that f32 rounding may make; the fixtures' own noise is about 4e-6.
const TOLERANCE: f32 = 2e-5;

#[test]
fn base_models_score_as_in_transformers() -> Result<()> {
    for name in golden::names("models")? {
        let folder = golden("models").join(&name);
        let weights = AdapterWeights::fresh(0, &candle_core::Device::Cpu);
        let model = model::load(&folder, &NoAdapter, weights, None)?;
        let difference = score_difference(&model, &ScoreFile::read(&folder)?)?;
        assert!(difference <= TOLERANCE, "{name}: {difference}");
    }
    Ok(())
}

#[test]
fn a_base_in_nf4_scores_as_with_the_weights_of_bitsandbytes() -> Result<()> {
    let folder = golden("models/llama");
    let weights = AdapterWeights::fresh(0, &candle_core::Device::Cpu);
    let placement = Placement {
        quantization: Some(Quantization::Nf4),
        ..Placement::default()
    };
    let model = model::load_on(&placement, &folder, &NoAdapter, weights, None)?;
    let expected = ScoreFile::read_file(&folder.join("score-nf4.json"))?;
    let difference = score_difference(&model, &expected)?;
    assert!(difference <= TOLERANCE, "{difference}");
    let unquantised = score_difference(&model, &ScoreFile::read(&folder)?)?;
    assert!(unquantised > 0.1, "nothing was quantised");
    Ok(())
}

#[test]
fn adapters_made_by_peft_score_as_in_peft() -> Result<()> {
    for name in golden::names("adapters")? {
        let folder = golden("adapters").join(&name);
        let adapter = Adapter::open(&folder)?;
        let base = golden("").join(adapter.saved.config.base_model());
        let model = adapter.load_onto(&base, None, OtherBase::Refuse)?;
        let difference = score_difference(&model, &ScoreFile::read(&folder)?)?;
        assert!(difference <= TOLERANCE, "{name}: {difference}");
    }
    Ok(())
}

/// Writes the golden model `name` with a configuration that ties its head, and with both matrices in its weights.
fn write_tied(name: &str, folder: &Path) -> Result<()> {
    let original = golden("models").join(name);
    let config = std::fs::read_to_string(original.join("config.json")).at("config.json")?;
    let field = |tied: bool| format!("\"tie_word_embeddings\": {tied}");
    let config = config.replace(&field(false), &field(true));
    std::fs::write(folder.join("config.json"), config).at("config.json")?;

    let stored = Checkpoint::open(&original)?;
    let mut tensors = BTreeMap::new();
    tensors.insert(
        "lm_head.weight",
        stored.stored("model.embed_tokens.weight")?,
    );
    for name in stored.names() {
        tensors.insert(name, stored.stored(name)?);
    }
    let file = folder.join("model.safetensors");
    safetensors::serialize_to_file(tensors, None, &file).at(file.display())
}

/// transformers 5 ties what the configuration ties, unless both matrices are stored and differ: then it scores as if the
/// configuration did not.
#[test]
fn a_head_that_is_stored_with_other_values_is_not_tied() -> Result<()> {
    for (name, tied) in [("llama", false), ("llama-tied", true)] {
        let folder = tempfile::tempdir().at("a folder")?;
        write_tied(name, folder.path())?;
        let config = ModelConfig::read(folder.path())?;
        assert_eq!(config.tied_head, tied, "{name}");
        assert_eq!(config.notes.is_empty(), tied, "{:?}", config.notes);
        let weights = AdapterWeights::fresh(0, &candle_core::Device::Cpu);
        let model = model::load(folder.path(), &NoAdapter, weights, None)?;
        let expected = ScoreFile::read(&golden("models").join(name))?;
        let difference = score_difference(&model, &expected)?;
        assert!(difference <= TOLERANCE, "{name}: {difference}");
    }
    Ok(())
}
