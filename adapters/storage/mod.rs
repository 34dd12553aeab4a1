//! Adapter folders on disk.

mod atomic;
pub use atomic::{write_bytes, write_file};
