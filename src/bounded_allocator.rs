//! An allocator that bounds the memory of work that cannot be told a limit.
//!
//! A chat template may double a text in every one of its steps, and a tokenizer's pattern may look at all of a text for
//! each character of it; the libraries that run them count steps, not bytes. So the program's allocator counts what the
//! thread takes while it runs them. An allocation cannot fail as an error and must not unwind: the process ends, with
//! the fact and exit code 1.

#![expect(unsafe_code, reason = "an allocator hands out memory")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;

/// Bytes that bounded work may hold at a time: several times what the largest tokenizers and conversations need.
const LIMIT: usize = 2 << 30;

/// The system's allocator, with a bound of 2 GiB on what a chat template or a tokenizer may take.
///
/// A program that reads files from strangers installs it:
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: retune::BoundedAllocator = retune::BoundedAllocator;
/// ```
///
/// Where the bound is passed, the process ends with an error on standard error and exit code 1.
#[derive(Debug, Clone, Copy, Default)]
pub struct BoundedAllocator;

/// Work whose memory is counted.
#[derive(Clone, Copy)]
struct Bounded {
    what: &'static str,
    held: usize,
}

thread_local! {
    // Without a destructor and made at compile time: using it allocates nothing.
    static BOUNDED: Cell<Option<Bounded>> = const { Cell::new(None) };
}

/// Runs work on `what`, which may hold 2 GiB at a time in this thread where the program uses [`BoundedAllocator`].
pub(crate) fn bounded<T>(what: &'static str, work: impl FnOnce() -> T) -> T {
    /// Also after a panic.
    struct Restore(Option<Bounded>);
    impl Drop for Restore {
        fn drop(&mut self) {
            BOUNDED.set(self.0);
        }
    }
    let outer = BOUNDED.get();
    let _restore = Restore(outer);
    if outer.is_none() {
        BOUNDED.set(Some(Bounded { what, held: 0 }));
    }
    work()
}

fn take(bytes: usize) {
    if let Some(Bounded { what, held }) = BOUNDED.get() {
        let held = held.saturating_add(bytes);
        if held > LIMIT {
            BOUNDED.set(None);
            exceeded(what);
        }
        BOUNDED.set(Some(Bounded { what, held }));
    }
}

fn give(bytes: usize) {
    if let Some(Bounded { what, held }) = BOUNDED.get() {
        // What is freed may have been there before.
        let held = held.saturating_sub(bytes);
        BOUNDED.set(Some(Bounded { what, held }));
    }
}

#[cold]
fn exceeded(what: &str) -> ! {
    let said = writeln!(
        std::io::stderr(),
        "error: {what} needs more than {} GiB of memory\n\n\
         hint: look at it before you use it: no ordinary one does, and one can be made to use up a machine's memory",
        LIMIT >> 30
    );
    // Nobody may be listening.
    drop(said);
    std::process::exit(1)
}

// SAFETY: every call is handed on to the system's allocator as it came, and what is counted beside it is a number of this
// thread, which neither allocates nor unwinds.
unsafe impl GlobalAlloc for BoundedAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller keeps the promises of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller keeps the promises of `GlobalAlloc::alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
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
        unsafe { System.realloc(place, layout, new_size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> Option<usize> {
        BOUNDED.get().map(|bounded| bounded.held)
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

    #[test]
    fn the_count_ends_with_a_panic() {
        let panicked = std::panic::catch_unwind(|| bounded("the work", || panic!("it fails")));
        assert!(panicked.is_err());
        assert_eq!(held(), None);
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
