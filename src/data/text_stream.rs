//! Text out of tokens that arrive one by one.

use crate::Result;
use crate::data::{SpecialTokens, Tokenizer};

/// Decodes a growing sequence, handing out text only when it can no longer change.
///
/// A character may be spread over several tokens (bytes of an emoji), and the space before a word may depend on the
/// token before it, so a token is decoded together with those that came just before it, and held while the text ends
/// inside a character.
#[derive(Debug, Clone)]
pub struct TextStream<'tokenizer> {
    tokenizer: &'tokenizer Tokenizer,
    special: SpecialTokens,
    /// What was handed out last, for context, and what is held.
    window: Vec<u32>,
    /// How many tokens of the window were handed out.
    emitted: usize,
}

impl<'tokenizer> TextStream<'tokenizer> {
    /// A stream with nothing in it.
    pub fn new(tokenizer: &'tokenizer Tokenizer, special: SpecialTokens) -> Self {
        Self {
            tokenizer,
            special,
            window: Vec::new(),
            emitted: 0,
        }
    }

    /// Takes the next token and returns the text it completes, if any.
    pub fn push(&mut self, token: u32) -> Result<Option<String>> {
        self.window.push(token);
        let (known, whole) = self.decoded()?;
        match whole.strip_prefix(&known) {
            Some(text) if !text.is_empty() && !whole.ends_with(char::REPLACEMENT_CHARACTER) => {
                let text = text.to_owned();
                self.window.drain(..self.emitted);
                self.emitted = self.window.len();
                Ok(Some(text))
            }
            _ => Ok(None),
        }
    }

    /// The text still held: an unfinished character shows as `�`.
    pub fn finish(self) -> Result<Option<String>> {
        let (known, whole) = self.decoded()?;
        let common: usize = known
            .chars()
            .zip(whole.chars())
            .take_while(|(left, right)| left == right)
            .map(|(character, _)| character.len_utf8())
            .sum();
        let text = &whole[common..];
        Ok((!text.is_empty()).then(|| text.to_owned()))
    }

    /// The window's text that was handed out, and its whole text.
    fn decoded(&self) -> Result<(String, String)> {
        let known = self
            .tokenizer
            .decode(&self.window[..self.emitted], self.special)?;
        let whole = self.tokenizer.decode(&self.window, self.special)?;
        Ok((known, whole))
    }
}
