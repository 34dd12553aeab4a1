//! Whether a model answers what the data say.

use super::{Control, GenerationOptions, Generator, Sampling, StopReason};
use crate::data::{AddSpecial, Example, SpecialTokens, Tokenizer};
use crate::model::Model;
use crate::{Error, Result};
use serde::Serialize;

/// How to let a model answer.
#[derive(Debug, Clone, PartialEq)]
pub struct ExactMatchOptions {
    /// How many tokens an answer may have beyond those of the reference: room to end it, or to go on and be wrong.
    pub margin: usize,
    /// End tokens and stop strings; what else it says about length and sampling is not used.
    pub generation: GenerationOptions,
}

impl ExactMatchOptions {
    /// Answers that end as `generation` says, and may be a little longer than the reference.
    pub fn new(generation: GenerationOptions) -> Self {
        Self {
            margin: 8,
            generation,
        }
    }
}

/// How often a model answered what the data say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExactMatch {
    /// Answers that equal their reference, but for white space around both.
    pub right: usize,
    /// Examples that were answered.
    pub of: usize,
    /// Examples that were not: plain text without an answer, or cut at the maximum length before the answer's end.
    pub skipped: usize,
    /// Each answer, in the order of the data.
    pub answers: Vec<Answered>,
}

impl ExactMatch {
    /// The share of right answers.
    pub fn share(&self) -> f64 {
        self.right as f64 / self.of as f64
    }
}

/// One example, answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Answered {
    /// Position in the data, from 0.
    pub example: usize,
    /// What the model was given, as text.
    pub prompt: String,
    /// What the data say comes next.
    pub reference: String,
    /// What the model said.
    pub answer: String,
    /// Whether both are the same, but for white space around them.
    pub right: bool,
    /// Why the answer ended.
    pub stop_reason: StopReason,
}

/// Lets the model answer each example greedily, and compares the answers with the data's. `on_answer` hears each one and
/// may stop; what was answered until then counts.
pub fn exact_match(
    model: &Model,
    tokenizer: &Tokenizer,
    examples: &[Example],
    options: &ExactMatchOptions,
    on_answer: &mut dyn FnMut(&Answered) -> Result<Control>,
) -> Result<ExactMatch> {
    let mut generator = Generator::new(model, tokenizer)?;
    let mut result = ExactMatch {
        right: 0,
        of: 0,
        skipped: 0,
        answers: Vec::new(),
    };
    for (index, example) in examples.iter().enumerate() {
        let Some(question) = Question::of(example, tokenizer)? else {
            result.skipped += 1;
            continue;
        };
        let generation = GenerationOptions {
            max_tokens: question.reference_tokens + options.margin,
            special: SpecialTokens::Skip,
            sampling: Sampling::default(),
            ..options.generation.clone()
        };
        let generated =
            generator.generate(question.prompt, &generation, &mut |_| Ok(Control::Continue))?;
        let answered = Answered {
            example: index,
            prompt: question.prompt_text.to_owned(),
            reference: question.reference.to_owned(),
            right: generated.text.trim() == question.reference.trim(),
            answer: generated.text,
            stop_reason: generated.stop_reason,
        };
        let control = on_answer(&answered)?;
        result.of += 1;
        result.right += usize::from(answered.right);
        result.answers.push(answered);
        if control == Control::Stop {
            break;
        }
    }
    if result.of == 0 {
        return Err(Error::new(format!(
            "none of the {} examples has an answer to compare with",
            examples.len()
        ))
        .hint("records with `messages`, `instruction` and `output`, or `prompt` and `completion` have one"));
    }
    Ok(result)
}

/// What an example asks, and what it expects.
struct Question<'a> {
    prompt: &'a [u32],
    prompt_text: &'a str,
    reference: &'a str,
    reference_tokens: usize,
}

impl<'a> Question<'a> {
    fn of(example: &'a Example, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let Some(answer) = &example.answer else {
            return Ok(None);
        };
        let prompt = example.prompt();
        let learned = &example.tokens[prompt.len()..];
        let count = example.learn[prompt.len()..].iter();
        let count = count.take_while(|learn| **learn).count();
        // An example that was cut asks something else, or wants only the beginning of the answer.
        let kept = tokenizer.decode(&learned[..count], SpecialTokens::Skip)?;
        if prompt.is_empty() || kept != answer.reference {
            return Ok(None);
        }
        // The model may say the same in other tokens than the data do.
        let alone = tokenizer.encode(&answer.reference, AddSpecial::No)?.len();
        Ok(Some(Self {
            prompt,
            prompt_text: &answer.prompt,
            reference: &answer.reference,
            reference_tokens: count.max(alone),
        }))
    }
}
