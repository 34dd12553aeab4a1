//! Ctrl-C: the first one asks to come to an end in good order, the second one stops at once.

use super::output::say;
use crate::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Exit code of a process stopped by Ctrl-C.
const STOPPED: i32 = 130;

/// Watches for SIGINT and SIGTERM from now on.
pub(super) fn watch() -> Result<()> {
    watch_and(|| say!("\nstopping after this step and saving; press Ctrl-C again to stop at once"))
}

/// The same for work that has nothing to save and stops soon enough not to talk about it.
pub(super) fn watch_quietly() -> Result<()> {
    watch_and(|| {})
}

fn watch_and(answer: fn()) -> Result<()> {
    ctrlc::set_handler(move || {
        if ASKED.swap(true, Ordering::SeqCst) {
            std::process::exit(STOPPED);
        }
        answer();
    })
    .map_err(|error| {
        let why = match error {
            ctrlc::Error::System(error) => error.to_string(),
            error => error.to_string(),
        };
        Error::new(format!("cannot watch for Ctrl-C: {why}"))
    })
}

/// Starts watching anew, for work that goes on after an interruption.
pub(super) fn forget() {
    ASKED.store(false, Ordering::SeqCst);
}

/// Whether the user asked to stop.
pub(super) fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}
