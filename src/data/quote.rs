//! Names out of strangers' files, as messages show them.

use std::borrow::Cow;

/// A name in backticks, of a length to read.
pub(crate) fn quoted(name: &str) -> String {
    format!("`{}`", shortened(name))
}

/// A text, cut to what fits into a sentence.
pub(crate) fn shortened(text: &str) -> Cow<'_, str> {
    const LONGEST: usize = 80;
    match text.char_indices().nth(LONGEST) {
        None => text.into(),
        Some((end, _)) => format!("{}…", &text[..end]).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_where_it_becomes_too_long_to_read() {
        assert_eq!(quoted("role"), "`role`");
        assert_eq!(quoted(&"é".repeat(80)), format!("`{}`", "é".repeat(80)));
        assert_eq!(quoted(&"é".repeat(81)), format!("`{}…`", "é".repeat(80)));
    }
}
