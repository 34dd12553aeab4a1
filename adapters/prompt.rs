//! Prompt tuning: learned rows that stand before the embedded tokens of every example.
//!
//! `n · hidden` weights in all (Lester et al. 2021, <https://arxiv.org/abs/2104.08691>); the base never changes. Rows
//! that start from real words learn far better than random ones, which lie far from where embeddings are.

use crate::hooks::{AdapterMethod, InputSite, MethodEntry, ModelShape, SoftPrompt};
use crate::storage::{AdapterWeights, Init, PeftConfig, generator};
use crate::{Error, Result};
use candle_core::Tensor;
use rand_distr::{Distribution, Uniform};
use serde_json::Value;

/// Name of the one tensor, without PEFT's prefix.
const ROWS: &str = "prompt_embeddings";

/// What `retune train prompt` can be told.
#[derive(Debug, Clone)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct Prompt {
    /// Number of learned rows put before every example
    #[cfg_attr(
        feature = "cli",
        arg(
            long,
            default_value_t = 20,
            value_name = "N",
            help_heading = "Prompt options"
        )
    )]
    pub virtual_tokens: usize,

    /// Where the rows start: normal noise, rows of random tokens, or the rows of `--start-text`
    #[cfg_attr(feature = "cli", arg(long, value_enum, default_value_t = PromptStart::Vocabulary, value_name = "START", help_heading = "Prompt options"))]
    pub start: PromptStart,

    /// Text whose tokens the rows start from, repeated or cut to their number; implies `--start text`
    #[cfg_attr(
        feature = "cli",
        arg(long, value_name = "TEXT", help_heading = "Prompt options")
    )]
    pub start_text: Option<String>,
}

/// Where the rows of a new prompt start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum PromptStart {
    /// Normal noise of deviation 1, as PEFT does by default
    Random,
    /// The embedding rows of tokens drawn from the vocabulary
    Vocabulary,
    /// The embedding rows of a text
    Text,
}

impl Default for Prompt {
    fn default() -> Self {
        Self {
            virtual_tokens: 20,
            start: PromptStart::Vocabulary,
            start_text: None,
        }
    }
}

/// The row of this method in `METHODS`.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "prompt",
    about: "Prompt tuning: learned rows before every example, the base untouched",
    #[cfg(feature = "cli")]
    command: <Prompt as clap::Args>::augment_args,
    #[cfg(feature = "cli")]
    from_args: |matches| {
        let options = <Prompt as clap::FromArgMatches>::from_arg_matches(matches)
            .map_err(|error| Error::usage(error.to_string()))?;
        Ok(Box::new(options.validated()?))
    },
    reads: |config| config.peft_type() == "PROMPT_TUNING",
    from_peft: |config, _| Ok(Box::new(Prompt::from_peft(config)?)),
};

impl Prompt {
    fn validated(mut self) -> Result<Self> {
        if self.virtual_tokens == 0 {
            return Err(Error::usage("`--virtual-tokens` must be at least 1"));
        }
        if self.start == PromptStart::Random && self.start_text.is_some() {
            return Err(
                Error::usage("`--start random` and `--start-text` contradict each other")
                    .hint("leave out one of them"),
            );
        }
        if self.start_text.is_some() {
            self.start = PromptStart::Text;
        } else if self.start == PromptStart::Text {
            return Err(
                Error::usage("`--start text` needs a text").hint("add `--start-text \"...\"`")
            );
        }
        Ok(self)
    }

    fn from_peft(config: &mut PeftConfig) -> Result<Self> {
        let submodules: Option<usize> = config.take("num_transformer_submodules")?;
        if submodules.is_some_and(|count| count != 1) {
            return Err(Error::new(
                "`num_transformer_submodules` must be 1: this is not a decoder's prompt",
            )
            .at("adapter_config.json"));
        }
        // Sizes repeat the model's; the tensor's own shape is checked against the model.
        for field in [
            "token_dim",
            "num_attention_heads",
            "num_layers",
            "tokenizer_kwargs",
        ] {
            let _: Option<Value> = config.take(field)?;
        }
        let start: Option<String> = config.take("prompt_tuning_init")?;
        let start_text: Option<String> = config.take("prompt_tuning_init_text")?;
        Ok(Self {
            virtual_tokens: config.require("num_virtual_tokens")?,
            start: match start.as_deref() {
                Some("TEXT") => PromptStart::Text,
                Some("SAMPLE_VOCAB") => PromptStart::Vocabulary,
                _ => PromptStart::Random,
            },
            start_text,
        })
    }

    fn start_rows(&self, site: &InputSite, seed: u64) -> Result<Option<Tensor>> {
        let tokens = match self.start {
            PromptStart::Random => return Ok(None),
            PromptStart::Vocabulary => {
                let range = Uniform::new(0, site.model.vocabulary as u32)
                    .map_err(|error| Error::new(format!("the model has no vocabulary: {error}")))?;
                let mut generator = generator(seed, "prompt start");
                (0..self.virtual_tokens)
                    .map(|_| range.sample(&mut generator))
                    .collect()
            }
            PromptStart::Text => {
                let text = self.start_text.as_deref().unwrap_or_default();
                let tokens = site.text.tokens(text)?;
                if tokens.is_empty() {
                    return Err(Error::new(format!("the start text `{text}` has no tokens")));
                }
                tokens
                    .iter()
                    .copied()
                    .cycle()
                    .take(self.virtual_tokens)
                    .collect::<Vec<u32>>()
            }
        };
        site.text.rows(&tokens).map(Some)
    }
}

impl AdapterMethod for Prompt {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn soft_prompt(
        &self,
        site: &InputSite,
        weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn SoftPrompt>>> {
        let start = match weights.seed() {
            Some(seed) => self.start_rows(site, seed)?,
            None => None,
        };
        let init = start
            .as_ref()
            .map_or(Init::Normal { deviation: 1.0 }, Init::Values);
        let rows = weights.var(ROWS, (self.virtual_tokens, site.model.hidden_size), init)?;
        Ok(Some(Box::new(Rows(rows))))
    }

    fn check(&self, model: &ModelShape) -> Result<()> {
        // 0 where nobody said how many.
        if model.max_positions > 0 && self.virtual_tokens >= model.max_positions {
            return Err(Error::new(format!(
                "a prompt of {} rows leaves no room in a model of {} positions",
                self.virtual_tokens, model.max_positions
            ))
            .hint("train a prompt of fewer rows with `--virtual-tokens`"));
        }
        Ok(())
    }

    fn peft_config(&self, model: &ModelShape, _weights: &AdapterWeights) -> Result<PeftConfig> {
        // A text start would make PEFT ask for the tokenizer while loading, only to overwrite the rows: say random.
        Ok(PeftConfig::new("PROMPT_TUNING")
            .with("modules_to_save", Value::Null)
            .with("num_attention_heads", model.attention_heads)
            .with("num_layers", model.layers)
            .with("num_transformer_submodules", 1)
            .with("num_virtual_tokens", self.virtual_tokens)
            .with("prompt_tuning_init", "RANDOM")
            .with("prompt_tuning_init_text", Value::Null)
            .with("token_dim", model.hidden_size)
            .with("tokenizer_kwargs", Value::Null)
            .with("tokenizer_name_or_path", Value::Null))
    }

    fn default_learning_rate(&self) -> f64 {
        3e-2
    }
}

struct Rows(Tensor);

impl SoftPrompt for Rows {
    fn rows(&self) -> Result<Tensor> {
        Ok(self.0.clone())
    }

    fn len(&self) -> usize {
        self.0.dim(0).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::hooks::tests::{Letters, row_of};
    use crate::storage::SavedTensors;
    use candle_core::Device;
    use std::collections::BTreeMap;

    /// A small alphabet, and hidden states of two values.
    fn model() -> ModelShape {
        ModelShape {
            hidden_size: 2,
            vocabulary: 16,
            ..ModelShape::default()
        }
    }

    /// The rows that the prompt puts in front, having made sure of their number.
    fn rows(prompt: &Prompt, weights: &mut AdapterWeights) -> Result<Vec<Vec<f32>>> {
        let site = InputSite {
            text: &Letters,
            model: &model(),
        };
        let rows = prompt.soft_prompt(&site, weights)?.expect("rows");
        assert_eq!(rows.len(), prompt.virtual_tokens);
        assert!(!rows.is_empty());
        Ok(rows.rows()?.to_vec2()?)
    }

    fn new_rows(prompt: &Prompt, seed: u64) -> Result<Vec<Vec<f32>>> {
        rows(prompt, &mut AdapterWeights::fresh(seed, &Device::Cpu))
    }

    #[test]
    fn a_prompt_leaves_room_for_tokens() {
        let prompt = Prompt {
            virtual_tokens: 64,
            ..Prompt::default()
        };
        let model = |max_positions| ModelShape {
            max_positions,
            ..ModelShape::default()
        };
        let error = prompt.check(&model(64)).expect_err("no room").to_string();
        assert_eq!(
            error,
            "a prompt of 64 rows leaves no room in a model of 64 positions"
        );
        assert!(prompt.check(&model(65)).is_ok());
        assert!(prompt.check(&model(0)).is_ok(), "not known");
    }

    #[test]
    fn a_random_start_has_no_text() {
        let prompt = |start| Prompt {
            start,
            start_text: Some("once".to_owned()),
            ..Prompt::default()
        };
        let error = prompt(PromptStart::Random)
            .validated()
            .expect_err("contradictory");
        assert_eq!(error.kind(), ErrorKind::Usage);
        for start in [PromptStart::Vocabulary, PromptStart::Text] {
            let start = prompt(start).validated().expect("a text").start;
            assert_eq!(start, PromptStart::Text);
        }
    }

    #[test]
    fn a_start_needs_what_it_starts_from() {
        let prompt = |start| Prompt {
            start,
            ..Prompt::default()
        };
        for start in [PromptStart::Random, PromptStart::Vocabulary] {
            let made = prompt(start).validated().expect("nothing is missing");
            assert_eq!(made.start, start);
        }
        let none = Prompt {
            virtual_tokens: 0,
            ..Prompt::default()
        };
        for wrong in [prompt(PromptStart::Text), none] {
            let error = wrong.validated().expect_err("something is missing");
            assert_eq!(error.kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn a_text_is_repeated_or_cut_to_the_number_of_rows() -> Result<()> {
        let prompt = |virtual_tokens, text: &str| Prompt {
            virtual_tokens,
            start: PromptStart::Text,
            start_text: Some(text.to_owned()),
        };
        let letters = |text: &str| -> Vec<Vec<f32>> { text.bytes().map(row_of).collect() };
        assert_eq!(new_rows(&prompt(5, "ab"), 1)?, letters("ababa"));
        assert_eq!(new_rows(&prompt(1, "ab"), 1)?, letters("a"));
        let error = new_rows(&prompt(2, ""), 1).expect_err("no tokens");
        assert_eq!(error.to_string(), "the start text `` has no tokens");
        Ok(())
    }

    #[test]
    fn rows_from_the_vocabulary_are_of_tokens_that_the_seed_draws() -> Result<()> {
        let prompt = Prompt {
            virtual_tokens: 50,
            ..Prompt::default()
        };
        let drawn = new_rows(&prompt, 1)?;
        let vocabulary: Vec<Vec<f32>> = (0..16).map(row_of).collect();
        assert!(drawn.iter().all(|row| vocabulary.contains(row)));
        assert!(drawn.iter().any(|row| *row != drawn[0]));
        assert_eq!(new_rows(&prompt, 1)?, drawn);
        assert_ne!(new_rows(&prompt, 2)?, drawn);
        Ok(())
    }

    #[test]
    fn random_rows_are_of_no_tokens() -> Result<()> {
        let prompt = Prompt {
            start: PromptStart::Random,
            ..Prompt::default()
        };
        let drawn = new_rows(&prompt, 1)?;
        assert!(drawn.iter().flatten().all(|value| value.fract() != 0.0));
        Ok(())
    }

    #[test]
    fn a_loaded_prompt_is_its_files_rows_wherever_it_started() -> Result<()> {
        let saved = Tensor::new(&[[0.5f32, 1.5], [2.5, 3.5]], &Device::Cpu)?;
        let file = BTreeMap::from([(ROWS.to_owned(), saved.clone())]);
        let mut config = PeftConfig::new("PROMPT_TUNING")
            .with("num_virtual_tokens", 2)
            .with("prompt_tuning_init", "TEXT")
            .with("prompt_tuning_init_text", "ab");
        let prompt = Prompt::from_peft(&mut config)?;
        let mut weights = AdapterWeights::loaded(file, &Device::Cpu);
        assert_eq!(rows(&prompt, &mut weights)?, saved.to_vec2::<f32>()?);
        weights.finish()?;
        Ok(())
    }

    #[test]
    fn a_configuration_says_how_many_rows_and_where_they_started() -> Result<()> {
        let config = || PeftConfig::new("PROMPT_TUNING").with("num_virtual_tokens", 7);
        for (start, expected) in [
            (Value::Null, PromptStart::Random),
            (Value::from("RANDOM"), PromptStart::Random),
            (Value::from("SAMPLE_VOCAB"), PromptStart::Vocabulary),
            (Value::from("TEXT"), PromptStart::Text),
        ] {
            let prompt = Prompt::from_peft(&mut config().with("prompt_tuning_init", start))?;
            assert_eq!(prompt.virtual_tokens, 7);
            assert_eq!(prompt.start, expected);
        }
        let error = Prompt::from_peft(&mut PeftConfig::new("PROMPT_TUNING"));
        assert!(error.is_err(), "without a number of rows");
        Ok(())
    }

    #[test]
    fn a_prompt_of_an_encoder_and_a_decoder_is_refused() -> Result<()> {
        let config = |submodules: usize| {
            PeftConfig::new("PROMPT_TUNING")
                .with("num_virtual_tokens", 7)
                .with("num_transformer_submodules", submodules)
        };
        Prompt::from_peft(&mut config(1))?;
        assert!(Prompt::from_peft(&mut config(2)).is_err());
        Ok(())
    }

    #[test]
    fn what_is_written_is_read_back() -> Result<()> {
        let prompt = Prompt {
            virtual_tokens: 7,
            ..Prompt::default()
        };
        let weights = AdapterWeights::fresh(0, &Device::Cpu);
        let written = prompt.peft_config(&model(), &weights)?;
        assert_eq!(written.get("token_dim"), Some(&Value::from(2)));
        let read = crate::method_of(&written, &SavedTensors::new())?;
        assert_eq!(read.peft_config(&model(), &weights)?, written);
        Ok(())
    }
}
