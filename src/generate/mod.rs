//! Text out of a model, token after token.
//!
//! | file | what it knows |
//! |---|---|
//! | `config.rs` | what the model's makers suggest |
//! | `stop_strings.rs` | text that ends a generation |
//! | `exact_match.rs` | whether the model answers what the data say |

mod config;
mod exact_match;
mod stop_strings;

pub use crate::Control;
pub use crate::ops::Sampling;
pub use config::GenerationConfig;
pub use exact_match::{Answered, ExactMatch, ExactMatchOptions, exact_match};

use crate::data::{SpecialTokens, Tokenizer};
use crate::model::causal_lm::{next_logits, take_in};
use crate::model::{CausalLm, KvCache, Model};
use crate::ops::{HeldWeights, Sampler};
use crate::{Error, Result};
use candle_core::Tensor;
use serde::Serialize;
use std::collections::BTreeSet;
use std::time::Instant;
use stop_strings::{Passed, StopStrings};

/// How to generate one text.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationOptions {
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// Tokens that end the text.
    pub end_tokens: BTreeSet<u32>,
    /// Text that ends the text, and is not part of it.
    pub stop: Vec<String>,
    /// How to choose each token.
    pub sampling: Sampling,
    /// Whether special tokens are text.
    pub special: SpecialTokens,
}

impl Default for GenerationOptions {
    /// Up to 256 of the likeliest tokens, and nothing that ends the text before.
    fn default() -> Self {
        Self {
            max_tokens: 256,
            end_tokens: BTreeSet::new(),
            stop: Vec::new(),
            sampling: Sampling::default(),
            special: SpecialTokens::Skip,
        }
    }
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model ended it.
    EndToken,
    /// A stop string came up.
    StopString,
    /// It has as many tokens as were allowed.
    MaxTokens,
    /// Prompt and text together are as long as the model's context.
    ContextFull,
    /// The reader had enough.
    Interrupted,
}

/// A generated text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generation {
    /// All generated tokens, an end token and those of a stop string included.
    pub tokens: Vec<u32>,
    /// Their text up to the stop string, if one came up.
    pub text: String,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that an earlier text had in common, so that they were not computed again.
    pub reused_tokens: usize,
    /// Seconds until the first token was there.
    pub prompt_seconds: f64,
    /// Seconds for all others.
    pub seconds: f64,
}

impl Generation {
    /// Tokens per second after the first one; none where there is no second token.
    pub fn tokens_per_second(&self) -> Option<f64> {
        (self.tokens.len() > 1).then(|| (self.tokens.len() - 1) as f64 / self.seconds)
    }
}

/// Generates texts with one model, and remembers the keys and values of the last one: what the next prompt has in
/// common with it, such as the turns of a conversation so far, is not computed again.
pub struct Generator<'model> {
    model: &'model dyn CausalLm,
    tokenizer: &'model Tokenizer,
    context: usize,
    cache: KvCache,
    /// The tokens whose keys and values the cache holds, after those of the soft prompt.
    cached: Vec<u32>,
}

/// Tokens of a prompt that go through the model at once: enough for full speed, few enough for little memory.
const CHUNK: usize = 512;
/// The room of a cache at first, in tokens.
const FIRST_ROOM: usize = 256;

impl<'model> Generator<'model> {
    /// A generator for a model and its tokenizer.
    pub fn new(model: &'model Model, tokenizer: &'model Tokenizer) -> Result<Self> {
        let decoder = model.decoder.as_ref();
        Ok(Self {
            model: decoder,
            tokenizer,
            context: model.config.context(),
            cache: decoder.cache(FIRST_ROOM)?,
            cached: Vec::new(),
        })
    }

    /// The tokenizer it decodes with.
    pub fn tokenizer(&self) -> &'model Tokenizer {
        self.tokenizer
    }

    /// The most tokens that prompt and text may have together.
    pub fn context(&self) -> usize {
        self.context.saturating_sub(self.soft_prompt_rows())
    }

    /// Generates a text that follows `prompt`.
    ///
    /// `on_text` hears the text as it becomes certain, and is asked after every token whether to go on: what it hears may
    /// be empty. It never hears half a character or a part of a stop string.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerationOptions,
        on_text: &mut dyn FnMut(&str) -> Result<Control>,
    ) -> Result<Generation> {
        options.sampling.validated()?;
        self.check(prompt)?;
        let mut generation = Generation {
            tokens: Vec::new(),
            text: String::new(),
            stop_reason: StopReason::MaxTokens,
            prompt_tokens: prompt.len(),
            reused_tokens: self.reusable(prompt),
            prompt_seconds: 0.0,
            seconds: 0.0,
        };
        if options.max_tokens == 0 {
            return Ok(generation);
        }
        let _held_weights = HeldWeights::begin();
        let mut started = Instant::now();
        let logits = self.next_logits(prompt, &mut || on_text(""))?;
        let first = match logits {
            None => None,
            Some(logits) => {
                let mut sampler = Sampler::new(options.sampling, &logits, prompt)?;
                Some((sampler.next(&logits)?, sampler))
            }
        };
        generation.prompt_seconds = started.elapsed().as_secs_f64();
        started = Instant::now();
        match first {
            None => generation.stop_reason = StopReason::Interrupted,
            Some((token, sampler)) => {
                self.go_on(token, sampler, prompt, options, on_text, &mut generation)?;
            }
        }
        generation.seconds = started.elapsed().as_secs_f64();
        Ok(generation)
    }

    /// Adds tokens to `generation`, `token` first, until something ends it.
    fn go_on(
        &mut self,
        mut token: u32,
        mut sampler: Sampler,
        prompt: &[u32],
        options: &GenerationOptions,
        on_text: &mut dyn FnMut(&str) -> Result<Control>,
        generation: &mut Generation,
    ) -> Result<()> {
        let mut all = prompt.to_vec();
        let stream = self.tokenizer.text_stream(options.special);
        let mut stream = stream.following(prompt)?;
        let mut stops = StopStrings::new(&options.stop);
        generation.stop_reason = loop {
            generation.tokens.push(token);
            all.push(token);
            let ended = options.end_tokens.contains(&token);
            let text = match ended && options.special == SpecialTokens::Skip {
                true => None,
                false => stream.push(token)?,
            };
            let passed = stops.push(&text.unwrap_or_default());
            generation.text.push_str(passed.text());
            let control = on_text(passed.text())?;
            if matches!(passed, Passed::Stopped(_)) {
                generation.stop_reason = StopReason::StopString;
                return Ok(());
            }
            if ended {
                break StopReason::EndToken;
            }
            if control == Control::Stop {
                break StopReason::Interrupted;
            }
            if generation.tokens.len() == options.max_tokens {
                break StopReason::MaxTokens;
            }
            if all.len() >= self.context() {
                break StopReason::ContextFull;
            }
            match self.next_logits(&all, &mut || Ok(Control::Continue))? {
                Some(logits) => token = sampler.next(&logits)?,
                None => break StopReason::Interrupted,
            }
        };
        // What was held back belongs to the text after all, unless it ends with a stop string at last.
        let passed = stops.push(&stream.finish()?.unwrap_or_default());
        let mut rest = passed.text().to_owned();
        match passed {
            Passed::Text(_) => rest += &stops.finish(),
            Passed::Stopped(_) => generation.stop_reason = StopReason::StopString,
        }
        if !rest.is_empty() {
            generation.text.push_str(&rest);
            on_text(&rest)?;
        }
        Ok(())
    }

    fn check(&self, prompt: &[u32]) -> Result<()> {
        if prompt.is_empty() {
            return Err(
                Error::new("the prompt is empty, so there is nothing to go on from")
                    .hint("give a text, or the token that begins one"),
            );
        }
        if prompt.len() >= self.context() {
            return Err(Error::new(format!(
                "the prompt has {} tokens, and the model's context holds {}",
                prompt.len(),
                self.context()
            ))
            .hint("shorten the prompt, so that there is room for what follows it"));
        }
        Ok(())
    }

    /// The scores of the token after `text`. Between the parts of a long text it asks `go_on`; `None` if that says no.
    fn next_logits(
        &mut self,
        text: &[u32],
        go_on: &mut dyn FnMut() -> Result<Control>,
    ) -> Result<Option<Tensor>> {
        let logits = self.compute(text, go_on);
        if logits.is_err() {
            // Some blocks may have taken rows that others have not.
            self.keep(0);
        }
        logits
    }

    fn compute(
        &mut self,
        text: &[u32],
        go_on: &mut dyn FnMut() -> Result<Control>,
    ) -> Result<Option<Tensor>> {
        let rows = self.soft_prompt_rows() + text.len();
        self.cache.reserve(rows)?;
        self.keep(self.reusable(text));
        if self.model.rotary_depends_on_length(rows) {
            let logits = next_logits(self.model, text, &mut self.cache)?;
            self.keep(0);
            return Ok(Some(logits));
        }
        loop {
            let new = &text[self.cached.len()..];
            if new.len() <= CHUNK {
                let logits = next_logits(self.model, new, &mut self.cache)?;
                self.cached.extend_from_slice(new);
                return Ok(Some(logits));
            }
            take_in(self.model, &new[..CHUNK], &mut self.cache)?;
            self.cached.extend_from_slice(&new[..CHUNK]);
            if go_on()? == Control::Stop {
                return Ok(None);
            }
        }
    }

    /// How many tokens of `text` need not be computed. The last one always is, since its scores are wanted; and all are
    /// where keys are turned by angles that hold for one length alone.
    fn reusable(&self, text: &[u32]) -> usize {
        match self
            .model
            .rotary_depends_on_length(self.soft_prompt_rows() + text.len())
        {
            true => 0,
            false => common(&self.cached, text).min(text.len() - 1),
        }
    }

    /// Forgets all but the first `tokens` tokens.
    fn keep(&mut self, tokens: usize) {
        self.cached.truncate(tokens);
        let rows = match tokens {
            0 => 0,
            _ => self.soft_prompt_rows() + tokens,
        };
        self.cache.truncate(rows);
    }

    fn soft_prompt_rows(&self) -> usize {
        self.model.soft_prompt().map_or(0, |prompt| prompt.len())
    }
}

/// How many tokens two sequences begin with alike.
fn common(left: &[u32], right: &[u32]) -> usize {
    let pairs = left.iter().zip(right);
    pairs.take_while(|(left, right)| left == right).count()
}
