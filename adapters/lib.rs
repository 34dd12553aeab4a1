//! Adapter methods: open the folder, see the methods.

mod error;
pub use error::{Context, Error, ErrorKind, IntoError, Result};

pub mod storage;
