//! What the error of a run says of its cause and of the way on.

use crate::inspect::broken_weights;
use crate::train::Checkpoints;
use crate::{Error, ErrorKind};
use std::path::Path;

/// The error that ended a run in `out` on the base in the folder `base`, with its cause or the way on as its hint.
pub(super) fn explained(error: Error, base: &Path, checkpoints: &Checkpoints, out: &Path) -> Error {
    match error.kind() {
        ErrorKind::NotFinite => blamed_on_base(error, base),
        _ => match checkpoints.newest_intact() {
            Ok(Some(_)) => with_resume(error, out),
            _ => error,
        },
    }
}

/// The same error of work that `retune resume` goes on with, where the command itself would be refused: the hint says so.
pub(in crate::cli) fn with_resume(error: Error, out: &Path) -> Error {
    const AGAIN: &str = "run the command again";
    let resume = format!("go on with `retune resume {}`", out.display());
    let hint = match error.hint_text() {
        None => format!("{resume} when that is put right"),
        Some(hint) if hint.contains(AGAIN) => hint.replace(AGAIN, &resume),
        Some(hint) => format!("{resume} when that is put right: {hint}"),
    };
    error.hint(hint)
}

/// The same error, with what is wrong with the base's own weights as its hint if anything is.
fn blamed_on_base(error: Error, folder: &Path) -> Error {
    match broken_weights(folder) {
        Ok(lines) if !lines.is_empty() => {
            let damage = format!(
                "the base itself is damaged: {}; download it again, or ask who made it",
                lines.join("; ")
            );
            // The other hint may name the last good state.
            let hint = match error.hint_text() {
                Some(other) => format!("{damage}. Else: {other}"),
                None => damage,
            };
            error.hint(hint)
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IntoError;

    #[test]
    fn work_that_was_saved_is_gone_on_with_and_not_begun_again() {
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull).into_error();
        let hint = |error: Error| {
            let error = with_resume(error, Path::new("out"));
            error.hint_text().expect("a way out").to_owned()
        };
        assert!(
            full()
                .hint_text()
                .is_some_and(|hint| hint.contains("run the command again")),
            "it is what is to be replaced"
        );
        assert_eq!(
            hint(full()),
            "free some space and go on with `retune resume out`; nothing half-written was left"
        );
        assert_eq!(
            hint(Error::new("fact")),
            "go on with `retune resume out` when that is put right"
        );
        assert_eq!(
            hint(Error::new("fact").hint("a way out")),
            "go on with `retune resume out` when that is put right: a way out"
        );
    }
}
