//! Tokens, and which of them the loss counts.

/// Which tokens the loss counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Learn {
    /// Only what the model itself must produce: assistant turns, completions, plain text.
    #[default]
    Completions,
    /// Every token.
    All,
}

/// One training example.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Example {
    /// The tokens the model sees: (tokens).
    pub tokens: Vec<u32>,
    /// Whether the loss counts each token: (tokens). The first never counts, because nothing comes before it.
    pub learn: Vec<bool>,
    /// The last thing to be learned as text, for evaluation by generating. Plain text has none.
    pub answer: Option<Answer>,
}

/// The last learned span of an example as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// The rendered text to generate from.
    pub prompt: String,
    /// What the data say comes next, without end markers.
    pub reference: String,
}

impl Example {
    /// An example of these tokens, without text to evaluate.
    pub fn new(tokens: Vec<u32>, mut learn: Vec<bool>) -> Self {
        learn.resize(tokens.len(), false);
        if let Some(first) = learn.first_mut() {
            *first = false;
        }
        Self {
            tokens,
            learn,
            answer: None,
        }
    }

    /// How many tokens the loss counts.
    pub fn target_tokens(&self) -> usize {
        self.learn.iter().skip(1).filter(|learn| **learn).count()
    }

    /// Where the last learned span starts; the number of tokens where there is none.
    pub fn prompt_len(&self) -> usize {
        let Some(last) = self.learn.iter().rposition(|learn| *learn) else {
            return self.tokens.len();
        };
        self.learn[..last]
            .iter()
            .rposition(|learn| !*learn)
            .map_or(0, |before| before + 1)
    }

    /// The tokens to generate from: all before the last learned span.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_len()]
    }
}
