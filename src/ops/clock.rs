//! Where the time goes, by kind of operation.

use serde::Serialize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Products with the weights of the blocks, forward and for the gradient of their input.
    Linear,
    /// Gradients of low-rank factors and of whole trained weights.
    WeightGradients,
    /// Scores, softmax and mixing, both ways.
    Attention,
    /// Norms, rotations, gated activations and residual sums.
    Elementwise,
    /// Vocabulary projection and loss.
    Head,
    /// Clipping and AdamW.
    Optimizer,
}

impl Kind {
    /// All of them, in the order of a step.
    pub const ALL: [Self; 6] = [
        Self::Linear,
        Self::WeightGradients,
        Self::Attention,
        Self::Elementwise,
        Self::Head,
        Self::Optimizer,
    ];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear layers",
            Self::WeightGradients => "weight gradients",
            Self::Attention => "attention",
            Self::Elementwise => "norms, rotation, activation",
            Self::Head => "head and loss",
            Self::Optimizer => "optimizer",
        }
    }
}

static RUNNING: AtomicBool = AtomicBool::new(false);
static SPENT: [AtomicU64; Kind::ALL.len()] = [const { AtomicU64::new(0) }; Kind::ALL.len()];

/// Starts to count from nothing. One count for the process: two measurements at a time would mix.
pub fn start() {
    for spent in &SPENT {
        spent.store(0, Ordering::Relaxed);
    }
    RUNNING.store(true, Ordering::Relaxed);
}

/// Stops counting and returns the time that each kind of operation took.
pub fn stop() -> [(Kind, Duration); Kind::ALL.len()] {
    RUNNING.store(false, Ordering::Relaxed);
    Kind::ALL.map(|kind| {
        let spent = SPENT[kind as usize].load(Ordering::Relaxed);
        (kind, Duration::from_nanos(spent))
    })
}

/// Counts what `body` takes as `kind`; nothing inside it may count too.
pub(crate) fn timed<T>(kind: Kind, body: impl FnOnce() -> T) -> T {
    if !RUNNING.load(Ordering::Relaxed) {
        return body();
    }
    wait_for_gpu();
    let started = Instant::now();
    let result = body();
    wait_for_gpu();
    SPENT[kind as usize].fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
    result
}

/// What a GPU was given before is not counted, and what it was given now is.
fn wait_for_gpu() {
    #[cfg(feature = "cuda")]
    super::cuda::synchronize_all();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_only_while_it_runs() {
        let wait = || {
            timed(Kind::Optimizer, || {
                std::thread::sleep(Duration::from_millis(5))
            })
        };
        wait();
        start();
        wait();
        let of = |kind| move |spent: [(Kind, Duration); 6]| spent[kind as usize].1;
        let spent = stop();
        assert!(of(Kind::Optimizer)(spent) >= Duration::from_millis(5));
        assert!(of(Kind::Optimizer)(spent) < Duration::from_millis(500));
    }
}
