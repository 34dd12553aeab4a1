//! What goes to a terminal or to another program, whose reader may leave: under `head` that ends standard output and is no
//! error, and without anybody on standard error the work is still worth finishing.

use crate::{Context, Control, Result};
use std::io::{self, ErrorKind, Write};

/// `println!` for results: a full disk is an error, and a reader who has left is none.
macro_rules! print_line {
    ($($text:tt)*) => {
        $crate::cli::output::write(&format!("{}\n", format_args!($($text)*))).map(drop)
    };
}
pub(super) use print_line;

/// `eprintln!` that does not panic where nobody listens.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::cli::output::write_to_stderr(&format!("{}\n", format_args!($($text)*)))
    };
}
pub(super) use say;

/// Writes to standard error, if that can be.
pub(super) fn write_to_stderr(text: &str) {
    drop(io::stderr().lock().write_all(text.as_bytes()));
}

/// Writes to standard output at once; says to stop when nobody reads it any more.
///
/// # Errors
///
/// When it cannot be written for another reason, such as a full disk.
pub(super) fn write(text: &str) -> Result<Control> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Control::Continue),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Control::Stop),
        Err(error) => Err(error).at("standard output"),
    }
}
