//! Log-probabilities against transformers and PEFT, on the fixtures of `tests/golden/`.

mod golden;

use golden::{ScoreFile, golden, score_difference};
use retune::Result;
use retune::adapter_folder::{Adapter, OtherBase};
use retune::adapters::hooks::NoAdapter;
use retune::adapters::storage::AdapterWeights;
use retune::model;

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
