//! Adapter folders on disk.

mod atomic;
pub use atomic::{sync_folder, write_bytes, write_file};
