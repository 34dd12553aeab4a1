//! The driver's library where the system loads it with the program, which does not start without it.

/// Why there is no driver, where there is none.
pub(super) fn fault() -> Option<&'static str> {
    None
}
