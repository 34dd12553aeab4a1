//! How much memory a run may use, and how it is made to need no more.

use super::note;
use super::progress::Show;
use crate::model::Placement;
use crate::report::{format, memory};
use crate::train::{Recompute, TrainOptions};
use crate::{Error, Result};

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

    /// Refuses a run that needs more than there can be; what a machine has free is a guess.
    fn refuse(self, needed: u64) -> Result<()> {
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
            "the run needs about {}, {fact} {}",
            format::bytes(needed),
            format::bytes(limit)
        ))
        .hint(format!(
            "{first}, shorten the examples by `--max-length`, or train fewer weights"
        )))
    }
}

/// The options, with blocks computed again and passes made smaller, if a run's `peak` would be more than it may be.
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
    let wanted = peak(&options)?;
    if wanted <= bytes {
        return Ok(options);
    }
    let mut fitted = TrainOptions {
        recompute: Recompute::Blocks,
        ..options
    };
    while peak(&fitted)? > bytes && fitted.tokens_per_pass > smallest_pass.max(1) {
        fitted.tokens_per_pass /= 2;
    }
    limit.refuse(peak(&fitted)?)?;
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
