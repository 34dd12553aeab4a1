//! Panics as errors, and libraries that read files from strangers.

use crate::bounded::{bounded, used_up};
use crate::{Error, Result};
use std::any::Any;
use std::cell::Cell;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs work on `what`; if it panics, that is an error and nothing is printed.
///
/// What the work was changing must not be used after an error.
pub(crate) fn guarded<T>(what: &str, work: impl FnOnce() -> T) -> Result<T> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                report(panic);
            }
        }));
    });
    let outer = GUARDED.replace(true);
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    done.map_err(|panic| Error::new(format!("{what} cannot be used: {}", message(&*panic))))
}

/// Runs a library's work on `what`, a stranger's: a panic is an error, and memory and time are [`bounded`].
pub(crate) fn contained<T>(what: &'static str, work: impl FnOnce() -> T) -> Result<T> {
    guarded(what, || bounded(what, work))
}

/// A thread that the system does not start.
pub(crate) fn no_thread(error: &io::Error) -> Error {
    Error::new(format!("no further thread can be started: {error}")).hint(
        "limits on memory (`ulimit -v`) and on processes (`ulimit -u`) count threads too: raise them, or compute with \
         fewer: `--threads 1`",
    )
}

/// From now on a thread that finds no memory for its beginnings ends the process as every lack of memory does.
///
/// That happens in Rust's own library, before anything of ours could catch it, and would be a signal without a hint.
pub(crate) fn watch_threads() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        if lacks_memory(message(panic.payload())) {
            used_up();
        }
        report(panic);
    }));
}

/// Whether these are the words in which Rust's library says that a new thread has no place for its signals.
fn lacks_memory(panic: &str) -> bool {
    panic.contains("alternative stack")
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("it makes the library that reads it fail")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_and_what_comes_after_works() {
        let error = guarded("the file", || -> usize { panic!("entry {} is missing", 3) })
            .expect_err("it panics");
        assert_eq!(
            error.to_string(),
            "the file cannot be used: entry 3 is missing"
        );
        assert_eq!(guarded("the file", || 5).expect("it does not"), 5);
        assert!(!GUARDED.get());
    }

    #[test]
    fn a_thread_without_memory_to_begin_with_is_a_lack_of_memory() {
        assert!(lacks_memory(
            "failed to allocate an alternative stack: Cannot allocate memory (os error 12)"
        ));
        assert!(lacks_memory(
            "failed to set up alternative stack guard page: Cannot allocate memory (os error 12)"
        ));
        assert!(!lacks_memory("index out of bounds"));
    }
}
