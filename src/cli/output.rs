//! What goes to a terminal or to another program, whose reader may leave: under `head` that ends standard output and is no
//! error, and without anybody on standard error the work is still worth finishing.

use crate::{Context, Control, Result};
use std::borrow::Cow;
use std::io::{self, ErrorKind, Write};

/// `println!` for results: a full disk is an error, and a reader who has left is none.
macro_rules! print_line {
    ($($text:tt)*) => {
        $crate::cli::output::write(&format!("{}\n", format_args!($($text)*))).map(drop)
    };
}
pub(super) use print_line;

/// `eprintln!` that does not panic where nobody listens, and says nothing that a terminal would obey.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::cli::output::write_to_stderr(&format!("{}\n", format_args!($($text)*)))
    };
}
pub(super) use say;

/// Writes to standard error, if that can be. What a terminal would obey is spelt out: any text may quote a stranger's file.
pub(super) fn write_to_stderr(text: &str) {
    drop(io::stderr().lock().write_all(spelt_out(text).as_bytes()));
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

/// A model's text on its way out: spelt out where a `terminal` shows it, and to the byte as it is for another program.
pub(super) fn for_reader(text: &str, terminal: bool) -> Cow<'_, str> {
    match terminal {
        true => spelt_out(text),
        false => Cow::Borrowed(text),
    }
}

/// The text without what a terminal would obey, such as sequences that colour it, move in it, or fill the clipboard: of
/// all control characters, line feeds and tabs alone are left as they are.
pub(super) fn spelt_out(text: &str) -> Cow<'_, str> {
    let is_obeyed = |character: char| character.is_control() && !matches!(character, '\n' | '\t');
    if !text.chars().any(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let mut spelt = String::with_capacity(text.len());
    for character in text.chars() {
        match is_obeyed(character) {
            true => spelt.extend(character.escape_default()),
            false => spelt.push(character),
        }
    }
    Cow::Owned(spelt)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts text into the clipboard, colours it, rings, and goes back over the line; the last in one character.
    const OBEYED: &str = "a\u{1b}]52;c;cm0gLXJm\u{7}\u{1b}[31m\r\u{8}\u{7f}\u{9b}2J";

    #[test]
    fn a_terminal_has_nothing_to_obey() {
        let spelt = spelt_out(OBEYED);
        assert!(!spelt.contains(char::is_control), "{spelt:?}");
        assert_eq!(
            spelt,
            r"a\u{1b}]52;c;cm0gLXJm\u{7}\u{1b}[31m\r\u{8}\u{7f}\u{9b}2J"
        );
        // Once is enough.
        assert_eq!(spelt_out(&spelt), spelt);
        let harmless = "two lines\n\tof text: übermütig, 日本語, 🦀\n";
        assert_eq!(spelt_out(harmless), harmless);
    }

    #[test]
    fn another_program_gets_every_byte() {
        assert_eq!(for_reader(OBEYED, false), OBEYED);
        assert_eq!(for_reader(OBEYED, true), spelt_out(OBEYED));
    }

    #[test]
    fn text_in_pieces_is_spelt_out_as_the_whole() {
        let pieces: String = OBEYED
            .split_inclusive(|_: char| true)
            .map(|piece| spelt_out(piece).into_owned())
            .collect();
        assert_eq!(pieces, spelt_out(OBEYED));
    }
}
