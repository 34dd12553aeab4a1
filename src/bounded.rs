//! Bounds on memory and time for work that cannot be told one.
//!
//! A chat template may double a text in every one of its steps and compare lists that hold each other, and a tokenizer's
//! pattern may look at all of a text for each character of it; the libraries that run them count steps, not bytes or
//! seconds. So the program's allocator counts what a thread takes while it runs them, and a thread watches how long that
//! lasts. An allocation cannot fail as an error and must not unwind, and a thread cannot be stopped: beyond a bound the
//! process ends, with the fact and exit code 1.

#![expect(unsafe_code, reason = "an allocator hands out memory")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

/// Bytes that bounded work may hold at a time: several times what the largest tokenizers and conversations need.
const LARGEST: usize = 2 << 30;
/// Minutes that bounded work may take: a hundred times what the longest texts need.
const LONGEST: u32 = 10;

/// The system's allocator, with a bound of 2 GiB on what a chat template or a tokenizer may take.
///
/// A program that reads files from strangers installs it:
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: retune::BoundedAllocator = retune::BoundedAllocator;
/// ```
///
/// Where the bound is passed, or the system has no memory left, the process ends with an error on standard error and exit
/// code 1.
#[derive(Debug, Clone, Copy, Default)]
pub struct BoundedAllocator;

/// Work whose memory is counted.
#[derive(Clone, Copy)]
struct Counted {
    what: &'static str,
    held: usize,
}

/// Work whose time is counted.
struct Watched {
    thread: ThreadId,
    what: &'static str,
    seconds: u32,
}

thread_local! {
    // Without a destructor and made at compile time: using it allocates nothing.
    static COUNTED: Cell<Option<Counted>> = const { Cell::new(None) };
}

static WATCHED: Mutex<Vec<Watched>> = Mutex::new(Vec::new());

fn watched() -> MutexGuard<'static, Vec<Watched>> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs work on `what`, which may hold 2 GiB at a time in this thread where the program uses [`BoundedAllocator`], and
/// may take ten minutes where it has called [`watch`].
pub(crate) fn bounded<T>(what: &'static str, work: impl FnOnce() -> T) -> T {
    /// Also after a panic.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            COUNTED.set(None);
            let this = thread::current().id();
            watched().retain(|watched| watched.thread != this);
        }
    }
    if COUNTED.get().is_some() {
        return work();
    }
    watched().push(Watched {
        thread: thread::current().id(),
        what,
        seconds: 0,
    });
    let _end = End;
    COUNTED.set(Some(Counted { what, held: 0 }));
    work()
}

/// Ends the process when bounded work does not come to an end. What counts is the time in which the process ran.
pub(crate) fn watch() {
    // Without a thread to spare there is no watch; all else works.
    drop(thread::Builder::new().name("watch".to_owned()).spawn(|| {
        loop {
            thread::sleep(Duration::from_secs(1));
            if let Some(what) = second() {
                exceeded(&format!("{what} takes more than {LONGEST} minutes"));
            }
        }
    }));
}

/// Counts one second; the work that has had too many.
fn second() -> Option<&'static str> {
    let mut watched = watched();
    watched.iter_mut().for_each(|work| work.seconds += 1);
    let endless = watched.iter().find(|work| work.seconds > 60 * LONGEST);
    endless.map(|work| work.what)
}

fn take(bytes: usize) {
    if let Some(Counted { what, held }) = COUNTED.get() {
        let held = held.saturating_add(bytes);
        if held > LARGEST {
            COUNTED.set(None);
            exceeded(&format!(
                "{what} needs more than {} GiB of memory",
                LARGEST >> 30
            ));
        }
        COUNTED.set(Some(Counted { what, held }));
    }
}

fn give(bytes: usize) {
    if let Some(Counted { what, held }) = COUNTED.get() {
        // What is freed may have been there before.
        let held = held.saturating_sub(bytes);
        COUNTED.set(Some(Counted { what, held }));
    }
}

#[cold]
fn exceeded(fact: &str) -> ! {
    end(format_args!(
        "error: {fact}\n\n\
         hint: look at it before you use it: no ordinary one does, and one can be made to use up a machine"
    ))
}

/// What the system gave. Where it has nothing left to give the process ends: Rust's own way to do so is a signal, without a
/// word of what to do.
fn given(place: *mut u8) -> *mut u8 {
    if place.is_null() {
        used_up()
    }
    place
}

/// Ends the process for lack of memory.
#[cold]
pub(crate) fn used_up() -> ! {
    end(format_args!(
        "error: the memory is used up\n\n\
         hint: everything needs less with `--quantize nf4`, and training with `--tokens-per-pass` and `--recompute`: \
         `retune plan` says how much. What a run has saved is whole: `retune resume` goes on from it"
    ))
}

/// Ends the process with these words, for which no memory is needed.
#[cold]
fn end(words: std::fmt::Arguments<'_>) -> ! {
    // Nobody may be listening.
    drop(writeln!(std::io::stderr(), "{words}"));
    std::process::exit(1)
}

// SAFETY: every call is handed on to the system's allocator as it came, and what is counted beside it is a number of this
// thread, which neither allocates nor unwinds.
unsafe impl GlobalAlloc for BoundedAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller keeps the promises of `GlobalAlloc::alloc`.
        given(unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller keeps the promises of `GlobalAlloc::alloc_zeroed`.
        given(unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: the caller keeps the promises of `GlobalAlloc::dealloc`, and all that is handed out is the system's.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        match new_size.checked_sub(layout.size()) {
            Some(more) => take(more),
            None => give(layout.size() - new_size),
        }
        // SAFETY: the caller keeps the promises of `GlobalAlloc::realloc`, and all that is handed out is the system's.
        given(unsafe { System.realloc(place, layout, new_size) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> Option<usize> {
        COUNTED.get().map(|bounded| bounded.held)
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, 8).expect("a size of memory")
    }

    #[test]
    fn what_work_holds_is_counted_while_it_runs() {
        bounded("the work", || {
            take(1000);
            // Work within bounded work counts towards the same bound.
            bounded("its part", || take(500));
            assert_eq!(held(), Some(1500));
            give(2000);
            assert_eq!(held(), Some(0));
        });
        assert_eq!(held(), None);
        take(usize::MAX);
    }

    fn seconds(what: &str) -> Option<u32> {
        let watched = watched();
        let mut all = watched.iter().filter(|work| work.what == what);
        all.next().map(|work| work.seconds)
    }

    #[test]
    fn counting_ends_with_a_panic() {
        let panicked = std::panic::catch_unwind(|| bounded("what fails", || panic!("it does")));
        assert!(panicked.is_err());
        assert_eq!(held(), None);
        assert_eq!(seconds("what fails"), None);
    }

    #[test]
    fn work_without_end_is_named() {
        bounded("an endless work", || {
            assert_eq!(seconds("an endless work"), Some(0));
            let named = (0..=60 * LONGEST).find_map(|_| second());
            assert!(named.is_some());
            assert_eq!(seconds("an endless work"), Some(60 * LONGEST + 1));
        });
        assert_eq!(seconds("an endless work"), None);
    }

    #[test]
    fn memory_is_counted_as_it_grows_and_shrinks() {
        bounded("the work", || {
            // SAFETY: each call is handed what the one before gave, with its layout.
            unsafe {
                let place = BoundedAllocator.alloc(layout(64));
                assert_eq!(held(), Some(64));
                let place = BoundedAllocator.realloc(place, layout(64), 4096);
                assert_eq!(held(), Some(4096));
                let place = BoundedAllocator.realloc(place, layout(4096), 32);
                assert_eq!(held(), Some(32));
                let zeros = BoundedAllocator.alloc_zeroed(layout(8));
                assert_eq!((*zeros, held()), (0, Some(40)));
                BoundedAllocator.dealloc(zeros, layout(8));
                BoundedAllocator.dealloc(place, layout(32));
            }
            assert_eq!(held(), Some(0));
        });
    }
}
