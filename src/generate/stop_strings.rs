//! Text that ends a generation, found while the text arrives in pieces.

/// Hands text on, up to the first stop string, and holds back what could be the beginning of one.
#[derive(Debug)]
pub(super) struct StopStrings<'a> {
    stops: &'a [String],
    /// Text that is not handed on yet: shorter than the longest stop string.
    held: String,
}

/// What became of a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Passed {
    /// This much is certain to come before any stop string.
    Text(String),
    /// This is the last text before a stop string.
    Stopped(String),
}

impl Passed {
    /// What may be handed on.
    pub(super) fn text(&self) -> &str {
        let (Self::Text(text) | Self::Stopped(text)) = self;
        text
    }
}

impl<'a> StopStrings<'a> {
    /// Nothing held yet. An empty stop string is never found.
    pub(super) fn new(stops: &'a [String]) -> Self {
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes the next piece of text.
    pub(super) fn push(&mut self, text: &str) -> Passed {
        self.held.push_str(text);
        let found = self.stops().filter_map(|stop| self.held.find(stop)).min();
        if let Some(start) = found {
            self.held.truncate(start);
            return Passed::Stopped(std::mem::take(&mut self.held));
        }
        let free = (0..self.held.len())
            .filter(|start| self.held.is_char_boundary(*start))
            .find(|start| {
                self.stops()
                    .any(|stop| stop.starts_with(&self.held[*start..]))
            })
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(free);
        Passed::Text(std::mem::replace(&mut self.held, rest))
    }

    /// The text still held, when no more comes: no stop string began there after all.
    pub(super) fn finish(self) -> String {
        self.held
    }

    fn stops(&self) -> impl Iterator<Item = &'a str> {
        let stops = self.stops.iter().map(String::as_str);
        stops.filter(|stop| !stop.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that is handed on, and whether a stop string ended it.
    fn pass(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut filter = StopStrings::new(&stops);
        let mut handed_on = Vec::new();
        for piece in pieces {
            match filter.push(piece) {
                Passed::Text(text) => handed_on.push(text),
                Passed::Stopped(text) => {
                    handed_on.push(text);
                    return (handed_on, true);
                }
            }
        }
        handed_on.push(filter.finish());
        (handed_on, false)
    }

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn text_passes_where_nothing_stops_it() {
        assert_eq!(pass(&[], &["a", "b"]), (texts(&["a", "b", ""]), false));
        assert_eq!(pass(&[""], &["a"]), (texts(&["a", ""]), false));
    }

    #[test]
    fn the_beginning_of_a_stop_string_is_held_until_it_is_none() {
        let (handed_on, stopped) = pass(&["END"], &["an E", "N", "d", " E"]);
        assert_eq!(handed_on, texts(&["an ", "", "ENd", " ", "E"]));
        assert!(!stopped);
    }

    #[test]
    fn no_part_of_a_stop_string_is_handed_on() {
        let (handed_on, stopped) = pass(&["\n\n"], &["one\n", "\ntwo"]);
        assert_eq!(handed_on, texts(&["one", ""]));
        assert!(stopped);
    }

    #[test]
    fn the_longest_possible_beginning_is_held() {
        // After `aab`, `aabaaa` may still come, though `aaba` has failed at its second `a`.
        let (handed_on, stopped) = pass(&["aabaaa"], &["aabaa", "b", "aaa"]);
        assert_eq!(handed_on.concat(), "aab");
        assert!(stopped);
    }

    #[test]
    fn the_first_stop_string_counts_wherever_it_stands_in_the_list() {
        let (handed_on, stopped) = pass(&["b", "ab"], &["xab"]);
        assert_eq!(handed_on, texts(&["x"]));
        assert!(stopped);
    }

    #[test]
    fn characters_of_several_bytes_are_never_cut() {
        let (handed_on, stopped) = pass(&["é!"], &["caf", "é", "é", "!"]);
        assert_eq!(handed_on, texts(&["caf", "", "é", ""]));
        assert!(stopped);
    }
}
