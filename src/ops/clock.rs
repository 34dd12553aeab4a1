//! Where the time goes, by kind of operation.

use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Looking up tokens, the rows of a soft prompt, and the way back to what is trained there.
    Embedding,
    /// Products with the weights of the blocks, forward and for the gradient of their input.
    Linear,
    /// Gradients of low-rank factors and of whole trained weights, those of norms among them.
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
    pub const ALL: [Self; 7] = [
        Self::Embedding,
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
            Self::Embedding => "embedding",
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
static SPANS: Mutex<Vec<(Kind, Moment, Moment)>> = Mutex::new(Vec::new());

fn spans() -> MutexGuard<'static, Vec<(Kind, Moment, Moment)>> {
    SPANS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts to count from nothing. One count for the process: two measurements at a time would mix.
pub fn start() {
    spans().clear();
    RUNNING.store(true, Ordering::Relaxed);
}

/// Stops counting and returns the time that each kind of operation took. On a GPU it is that between the moments at which
/// the device came to the operation's beginning and to its end: nothing waited for it until now.
pub fn stop() -> [(Kind, Duration); Kind::ALL.len()] {
    RUNNING.store(false, Ordering::Relaxed);
    let mut spent = Kind::ALL.map(|kind| (kind, Duration::ZERO));
    for (kind, start, end) in spans().drain(..) {
        spent[kind as usize].1 += start.until(&end);
    }
    spent
}

/// Counts what `body` takes as `kind`; nothing inside it may count too.
pub(crate) fn timed<T>(kind: Kind, body: impl FnOnce() -> T) -> T {
    if !RUNNING.load(Ordering::Relaxed) {
        return body();
    }
    let start = Moment::now();
    let result = body();
    spans().push((kind, start, Moment::now()));
    result
}

/// A moment of the host, or of the device that it gives work to.
enum Moment {
    Host(Instant),
    #[cfg(feature = "cuda")]
    Device(super::cuda::Moment),
}

impl Moment {
    fn now() -> Self {
        #[cfg(feature = "cuda")]
        if let Some(moment) = super::cuda::Moment::now() {
            return Self::Device(moment);
        }
        Self::Host(Instant::now())
    }

    fn until(&self, end: &Self) -> Duration {
        match (self, end) {
            (Self::Host(start), Self::Host(end)) => end.duration_since(*start),
            #[cfg(feature = "cuda")]
            (Self::Device(start), Self::Device(end)) => start.until(end),
            // A device was opened, or failed, in between.
            #[cfg(feature = "cuda")]
            _ => Duration::ZERO,
        }
    }
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
        let of = |kind| move |spent: [(Kind, Duration); 7]| spent[kind as usize].1;
        let spent = stop();
        assert!(of(Kind::Optimizer)(spent) >= Duration::from_millis(5));
        assert!(of(Kind::Optimizer)(spent) < Duration::from_millis(500));
    }
}
