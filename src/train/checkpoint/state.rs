//! Where a run stands, and the file that says it.

use crate::train::Inputs;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the layout; a reader refuses others.
pub(super) const VERSION: u32 = 2;

/// Where a run stands. Random streams and the data cursor follow from the step and the run's seed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Optimizer steps taken, those left out included.
    pub step: usize,
    /// Steps left out: not finite, or far above those before them.
    pub skipped: usize,
    /// How many of them were the last steps.
    pub skipped_in_a_row: usize,
    /// Losses of the last steps that were taken, by which the next is judged, oldest first.
    #[serde(default)]
    pub recent_losses: Vec<f64>,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// The newest evaluation's loss.
    pub final_eval_loss: Option<f64>,
    /// Evaluations since the best one.
    pub evaluations_without_gain: usize,
    /// Seconds spent in steps.
    pub seconds: f64,
    /// Tokens that went through the model in steps.
    pub tokens: u64,
}

/// The evaluation with the lowest loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps before it.
    pub step: usize,
    /// Its loss.
    pub loss: f64,
}

/// `state.json`.
#[derive(Serialize, Deserialize)]
pub(super) struct StateFile {
    version: u32,
    pub(super) state: TrainState,
    #[serde(default)]
    pub(super) inputs: Option<Inputs>,
    /// The other files, and how long they are.
    pub(super) bytes: BTreeMap<String, u64>,
}

impl StateFile {
    /// The state beside files of these lengths.
    pub(super) fn new(
        state: TrainState,
        inputs: Option<Inputs>,
        bytes: BTreeMap<String, u64>,
    ) -> Self {
        Self {
            version: VERSION,
            state,
            inputs,
            bytes,
        }
    }
}

/// The version of the layout, which a state file of any version says.
pub(super) fn version(text: &[u8]) -> serde_json::Result<u32> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let found: Version = serde_json::from_slice(text)?;
    Ok(found.version)
}
