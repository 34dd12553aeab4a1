//! How much memory a run may use, and how it is made to need no more.

use super::note;
use super::progress::Show;
use crate::model::{ModelConfig, Placement};
use crate::plan::memory_of_base;
use crate::report::{format, memory};
use crate::train::{Recompute, TrainOptions};
use crate::{Error, Result};
use candle_core::DType;

/// A limit that was asked for must be kept, a GPU has no more than it has, and a plan is an estimate: one part in so many of
/// it is added before the two are compared. Of the runs that were measured on one thread or two, with examples of one
/// length, none took so much more than its plan.
const MARGIN_PARTS: u64 = 20;

/// How much memory a run may use, in bytes.
#[derive(Clone, Copy)]
pub(super) enum MemoryLimit {
    /// So much and no more, as `--memory-limit` says.
    Asked(u64),
    /// What a GPU has free; it has no more to give.
    Gpu(u64),
    /// What the machine has free, as far as it says.
    Machine,
}

impl MemoryLimit {
    /// What `asked` allows, in MiB, and the device has.
    pub(super) fn of(asked: Option<u64>, placement: &Placement) -> Self {
        let asked = asked.map(|mebibytes| mebibytes.saturating_mul(1 << 20));
        let free = placement.device_memory().map(|(free, _)| free);
        match (asked, free) {
            (Some(asked), free) if free.is_none_or(|free| asked <= free) => Self::Asked(asked),
            (_, Some(free)) => Self::Gpu(free),
            (_, None) => Self::Machine,
        }
    }

    fn bytes(self) -> Option<u64> {
        match self {
            Self::Asked(bytes) | Self::Gpu(bytes) => Some(bytes),
            Self::Machine => memory::available_bytes(),
        }
    }

    /// What a run of this `peak` is taken to need.
    fn needed(self, peak: u64) -> u64 {
        match self {
            Self::Asked(_) | Self::Gpu(_) => peak.saturating_add(peak / MARGIN_PARTS),
            Self::Machine => peak,
        }
    }

    /// Refuses `what`, whose `peak` is planned, if it needs more than there can be; what a machine has free is a guess.
    fn refuse(self, what: &str, peak: u64, ways_out: &str) -> Result<()> {
        let needed = self.needed(peak);
        let (limit, fact, first) = match self {
            Self::Machine => return Ok(()),
            Self::Asked(limit) => (limit, "the limit is", "raise `--memory-limit`"),
            Self::Gpu(limit) => (
                limit,
                "the GPU has free",
                "choose another GPU by `--device`",
            ),
        };
        if needed <= limit {
            return Ok(());
        }
        Err(Error::new(format!(
            "{what} needs about {}, {fact} {}",
            format::bytes(needed),
            format::bytes(limit)
        ))
        .hint(format!("{first}, {ways_out}")))
    }
}

/// What makes a run smaller.
const SMALLER_RUN: &str = "hold the base in less by `--quantize nf4`, shorten the examples by `--max-length`, or train fewer weights";

/// Refuses a base of shape `config`, its weights stored as `dtype`, that a GPU has no room for, before it is loaded.
pub(super) fn refuse_large_base(
    placement: &Placement,
    config: &ModelConfig,
    dtype: DType,
) -> Result<()> {
    MemoryLimit::of(None, placement).refuse(
        "the base",
        memory_of_base(placement, config, dtype),
        "hold it in less by `--quantize nf4`, or take it to the CPU by `--device cpu`",
    )
}

/// Refuses the run of `label`, whose memory is planned to be `peak`, if a GPU has no room for it.
pub(super) fn refuse_large_run(label: &str, placement: &Placement, peak: u64) -> Result<()> {
    let what = format!("training `{label}`");
    MemoryLimit::of(None, placement).refuse(
        &what,
        peak,
        &format!("ask for less by `--recompute` or `--tokens-per-pass`, {SMALLER_RUN}"),
    )
}

/// The options, with no more memory of a GPU for hidden states that are kept from epoch to epoch than half of what a run of
/// this `peak` leaves without them, in whole MiB: a plan is an estimate, and they save time alone.
pub(super) fn with_room_beside_cache(
    options: TrainOptions,
    limit: MemoryLimit,
    peak: &dyn Fn(&TrainOptions) -> Result<u64>,
) -> Result<TrainOptions> {
    let Some(bytes) = limit.bytes() else {
        return Ok(options);
    };
    let alone = TrainOptions {
        activation_cache_bytes: 0,
        ..options.clone()
    };
    let half = bytes.saturating_sub(limit.needed(peak(&alone)?)) / 2;
    // None at all would not be rounded either, if they are to be.
    let most = (half >> 20).max(1) << 20;
    Ok(TrainOptions {
        activation_cache_bytes: options
            .activation_cache_bytes
            .min(usize::try_from(most).unwrap_or(usize::MAX)),
        ..options
    })
}

/// The options, with blocks computed again and passes made smaller, if a run's `peak` would be more than it may be. No pass
/// is made smaller than `smallest_pass`, the tokens of the longest example.
pub(super) fn fitted(
    options: TrainOptions,
    smallest_pass: usize,
    limit: MemoryLimit,
    peak: &dyn Fn(&TrainOptions) -> Result<u64>,
    show: Show,
) -> Result<TrainOptions> {
    let Some(bytes) = limit.bytes() else {
        return Ok(options);
    };
    let needed = |options: &TrainOptions| -> Result<u64> { Ok(limit.needed(peak(options)?)) };
    let wanted = needed(&options)?;
    if wanted <= bytes {
        return Ok(options);
    }
    let mut fitted = TrainOptions {
        recompute: Recompute::Blocks,
        ..options
    };
    let smallest_pass = smallest_pass.max(1);
    while needed(&fitted)? > bytes && fitted.tokens_per_pass > smallest_pass {
        fitted.tokens_per_pass = (fitted.tokens_per_pass / 2).max(smallest_pass);
    }
    limit.refuse("the run", peak(&fitted)?, SMALLER_RUN)?;
    note(
        show,
        &format!(
            "about {} would be needed and {} may be used: blocks are computed again, in passes of at most {} tokens",
            format::bytes(wanted),
            format::bytes(bytes),
            fitted.tokens_per_pass
        ),
    );
    Ok(fitted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_takes_half_of_what_a_run_leaves() -> Result<()> {
        const MIB: u64 = 1 << 20;
        // Whatever is kept comes on top of 100 MiB.
        let peak = |options: &TrainOptions| -> Result<u64> {
            Ok(100 * MIB + options.activation_cache_bytes as u64)
        };
        for (free, kept) in [(90, 1), (100, 1), (401, 148), (1 << 20, 1024)] {
            let options = TrainOptions::default();
            let limit = MemoryLimit::Gpu(free * MIB);
            let fitting = with_room_beside_cache(options, limit, &peak)?;
            assert_eq!(fitting.activation_cache_bytes as u64, kept * MIB, "{free}");
        }
        let limit = MemoryLimit::Asked(401 * MIB);
        let fitting = with_room_beside_cache(TrainOptions::default(), limit, &peak)?;
        assert_eq!(fitting.activation_cache_bytes as u64, 148 * MIB);
        Ok(())
    }
}
