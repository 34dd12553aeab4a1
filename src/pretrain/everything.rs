//! The method that trains every weight of the base: how a base comes to be, and not an adapter that could be saved.

use crate::adapters::hooks::{AdapterMethod, ModelShape, ParameterSite};
use crate::adapters::storage::{AdapterWeights, PeftConfig};
use crate::{Error, Result};

/// Answers "yes" at every weight.
pub(super) struct Everything;

impl AdapterMethod for Everything {
    fn name(&self) -> &'static str {
        "everything"
    }

    fn trains(&self, _site: &ParameterSite) -> bool {
        true
    }

    fn peft_config(&self, _model: &ModelShape, _weights: &AdapterWeights) -> Result<PeftConfig> {
        Err(Error::new("a base is written whole, not as an adapter"))
    }

    fn default_learning_rate(&self) -> f64 {
        2e-3
    }
}
