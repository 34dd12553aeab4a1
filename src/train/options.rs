//! What a training run is asked to do: values that are right by construction.

use super::activation_cache::CacheType;
use crate::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// Passes over the training data.
    Epochs(f64),
    /// Optimizer steps.
    Steps(usize),
}

impl Budget {
    /// Number of optimizer steps over `examples` examples, `batch_size` at a time.
    pub fn steps(self, examples: usize, batch_size: usize) -> usize {
        match self {
            Self::Steps(steps) => steps,
            Self::Epochs(epochs) => {
                (steps_of(epochs, examples, batch_size) as usize).clamp(1, MOST_STEPS)
            }
        }
    }
}

/// Steps of so many epochs, however many they are.
fn steps_of(epochs: f64, examples: usize, batch_size: usize) -> f64 {
    (epochs * examples as f64 / batch_size as f64).ceil()
}

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays where it is
    Constant,
    /// Falls in a straight line to zero
    Linear,
    /// Falls along half a cosine to zero
    Cosine,
}

impl Schedule {
    /// The learning rate of optimizer step `step`, counted from 1, of `total`: it rises in a straight line over
    /// `warmup` steps to `peak` (the first step is not wasted on a rate of zero), then follows the schedule.
    pub fn learning_rate(self, peak: f64, step: usize, warmup: usize, total: usize) -> f64 {
        if step <= warmup {
            return peak * step as f64 / warmup as f64;
        }
        let progress = (step - warmup - 1) as f64 / total.saturating_sub(warmup).max(1) as f64;
        peak * match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        }
    }
}

/// Whether activations are kept for the backward pass or computed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Keep what the backward pass needs.
    #[default]
    Never,
    /// Keep only each block's input, and run the block again when its turn comes.
    Blocks,
}

/// What to do about a step whose loss or gradient is not finite; the weights are never touched by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OnNonfinite {
    /// End the run with an error that names the examples
    #[default]
    Stop,
    /// Leave the step out and go on with the next; ten in a row end the run
    Skip,
}

/// What to do about a step whose loss lies far above those of the steps before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OnSpike {
    /// Take it, and name its examples
    #[default]
    Warn,
    /// Leave the step out and go on with the next; ten in a row end the run
    Skip,
    /// End the run with an error that names the examples
    Stop,
}

/// Everything that decides what a run computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainOptions {
    /// How long to train.
    pub budget: Budget,
    /// Examples per optimizer step.
    pub batch_size: usize,
    /// Most tokens held in memory at once: cuts a step into passes, never changes what is learned.
    pub tokens_per_pass: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Movement of the learning rate after the warm-up.
    pub schedule: Schedule,
    /// Optimizer steps until the learning rate is reached.
    pub warmup_steps: usize,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's decay of the mean gradient.
    pub beta1: f64,
    /// AdamW's decay of the mean squared gradient.
    pub beta2: f64,
    /// AdamW's guard against division by zero.
    pub epsilon: f64,
    /// Gradients longer than this are scaled down to it; 0 leaves them alone.
    pub max_gradient_norm: f64,
    /// What to do about a step that is not finite.
    #[serde(default)]
    pub on_nonfinite: OnNonfinite,
    /// What to do about a step whose loss lies far above those before it.
    #[serde(default)]
    pub on_spike: OnSpike,
    /// Keeping or recomputing activations.
    pub recompute: Recompute,
    /// Most memory for hidden states below the lowest trained block that are kept from epoch to epoch; what is more goes
    /// to a file in the run folder. On a GPU it is the GPU's, and what is more is computed again. 0 keeps none. Never
    /// changes the result, unless they are rounded; on a GPU its last bits, which depend on where a row was computed.
    #[serde(default)]
    pub activation_cache_bytes: usize,
    /// The number type of what is kept.
    #[serde(default)]
    pub activation_cache_type: CacheType,
    /// Seed of everything random.
    pub seed: u64,
    /// Steps between evaluations; 0 evaluates at the start and the end only.
    pub eval_every: usize,
    /// Evaluations without improvement after which to stop; 0 never stops early.
    pub patience: usize,
    /// Steps between checkpoints; 0 keeps none but the last.
    pub save_every: usize,
    /// Number of checkpoints kept.
    pub keep: usize,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            budget: Budget::Epochs(3.0),
            batch_size: 8,
            tokens_per_pass: 8192,
            learning_rate: 5e-4,
            schedule: Schedule::Cosine,
            warmup_steps: 0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            max_gradient_norm: 1.0,
            on_nonfinite: OnNonfinite::Stop,
            on_spike: OnSpike::Warn,
            recompute: Recompute::Never,
            activation_cache_bytes: 1 << 30,
            activation_cache_type: CacheType::F32,
            seed: 0,
            eval_every: 0,
            patience: 0,
            save_every: 0,
            keep: 2,
        }
    }
}

/// Examples of a step, at most: all are named at once.
const LARGEST_BATCH: usize = 1 << 20;
/// More than any run can take, and few enough that the examples of all of them can be counted.
const MOST_STEPS: usize = 1 << 40;

impl TrainOptions {
    /// Refuses values that no run can mean, all in one error.
    pub fn validated(self) -> Result<Self> {
        let positive = |value: f64| value > 0.0 && value.is_finite();
        // The optimizer computes in f32, where a small number may be 0, and a large one infinite.
        let positive_in_f32 = |value: f64| positive(f64::from(value as f32));
        let share = |value: f64| value >= 0.0 && (value as f32) < 1.0;
        let checks = [
            (
                (1..=LARGEST_BATCH).contains(&self.batch_size),
                "batch-size must be from 1 to 1048576",
            ),
            (
                self.tokens_per_pass > 0,
                "tokens-per-pass must be at least 1",
            ),
            (
                positive_in_f32(self.learning_rate),
                "learning-rate must be above 0 and finite, in 32 bits too",
            ),
            (
                self.weight_decay >= 0.0 && (self.weight_decay as f32).is_finite(),
                "weight-decay must not be negative, and finite in 32 bits too",
            ),
            (
                share(self.beta1) && share(self.beta2),
                "beta1 and beta2 must be from 0 to below 1, in 32 bits too",
            ),
            (
                positive_in_f32(self.epsilon),
                "epsilon must be above 0 and finite, in 32 bits too",
            ),
            (
                self.max_gradient_norm == 0.0 || self.max_gradient_norm as f32 > 0.0,
                "max-gradient-norm must be 0, or above 0 in 32 bits too",
            ),
            (self.keep > 0, "keep must be at least 1"),
            (
                match self.budget {
                    Budget::Epochs(epochs) => positive(epochs) && epochs <= MOST_STEPS as f64,
                    Budget::Steps(steps) => (1..=MOST_STEPS).contains(&steps),
                },
                "epochs or steps must be above 0, and epochs or steps at most 1099511627776",
            ),
        ];
        let wrong: Vec<&str> = checks
            .iter()
            .filter(|(right, _)| !right)
            .map(|(_, message)| *message)
            .collect();
        if wrong.is_empty() {
            Ok(self)
        } else {
            Err(Error::usage(wrong.join("; ")))
        }
    }

    /// Refuses epochs that have more steps over `examples` examples than steps may be asked for.
    pub fn check_length(&self, examples: usize) -> Result<()> {
        match self.budget {
            Budget::Epochs(epochs)
                if steps_of(epochs, examples, self.batch_size) > MOST_STEPS as f64 =>
            {
                Err(Error::usage(format!(
                    "`--epochs` is {epochs}, and over {examples} examples these have more than {MOST_STEPS} steps"
                ))
                .hint("give a lower one"))
            }
            _ => Ok(()),
        }
    }
}

/// The options that decide what a run computes, by name, as its checkpoints hold them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RecordedOptions(BTreeMap<String, Value>);

impl RecordedOptions {
    /// Those that move no bit, and may be others when a run goes on: what is kept, and where.
    const FREE: [&str; 4] = ["activation_cache_bytes", "keep", "recompute", "save_every"];
    /// What is done about a step at fault.
    const REACTIONS: [&str; 2] = ["on_nonfinite", "on_spike"];

    /// Those of a run.
    pub fn of(options: &TrainOptions) -> Result<Self> {
        let mut options = options.clone();
        if options.activation_cache_bytes == 0 {
            // What is not kept is not rounded.
            options.activation_cache_type = CacheType::F32;
        }
        let mut named: BTreeMap<String, Value> = serde_json::to_value(options)
            .and_then(serde_json::from_value)
            .context("cannot write the options")?;
        // As on the command line: `steps` or `epochs`.
        if let Some(Value::Object(budget)) = named.remove("budget") {
            named.extend(budget);
        }
        Ok(Self(named).without(&Self::FREE))
    }

    /// All but the options of these names.
    #[must_use]
    pub fn without(mut self, names: &[&str]) -> Self {
        self.0.retain(|name, _| !names.contains(&name.as_str()));
        self
    }

    /// The first of them that is another one `now`, with both values.
    ///
    /// A run that was to stop at a fault has met none, or it would have ended: it may do otherwise from now on.
    pub(crate) fn changed(&self, now: &Self) -> Option<String> {
        let same = |name: &str, before: &Value| {
            now.0.get(name) == Some(before)
                || (Self::REACTIONS.contains(&name) && *before == "stop")
        };
        let (name, before) = self.0.iter().find(|(name, before)| !same(name, before))?;
        let now = now.0.get(name).map_or("none".to_owned(), Value::to_string);
        Some(format!(
            "`{}`, {before} before and {now} now,",
            name.replace('_', "-")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_to_its_peak_and_falls_towards_zero() {
        let rate = |schedule: Schedule, step| schedule.learning_rate(1.0, step, 4, 104);
        assert_eq!(rate(Schedule::Linear, 1), 0.25);
        assert_eq!(rate(Schedule::Cosine, 4), 1.0);
        assert_eq!(rate(Schedule::Linear, 5), 1.0);
        assert_eq!(rate(Schedule::Linear, 55), 0.5);
        assert!((rate(Schedule::Cosine, 55) - 0.5).abs() < 1e-12);
        assert!(rate(Schedule::Cosine, 104) < 1e-3);
        assert_eq!(rate(Schedule::Constant, 104), 1.0);
    }

    #[test]
    fn impossible_values_are_refused_together() {
        let options = TrainOptions {
            batch_size: 0,
            learning_rate: f64::NAN,
            ..Default::default()
        };
        let message = options.validated().expect_err("both are wrong").to_string();
        assert!(
            message.contains("batch-size") && message.contains("learning-rate"),
            "{message}"
        );
    }

    #[test]
    fn each_impossible_value_is_refused_and_the_last_possible_one_is_not() {
        type Change = fn(&mut TrainOptions);
        let refused: [(&str, Change); 25] = [
            ("batch-size", |options| options.batch_size = 0),
            ("batch-size", |options| options.batch_size = (1 << 20) + 1),
            ("tokens-per-pass", |options| options.tokens_per_pass = 0),
            ("learning-rate", |options| options.learning_rate = 0.0),
            ("learning-rate", |options| options.learning_rate = -1.0),
            ("learning-rate", |options| {
                options.learning_rate = f64::INFINITY;
            }),
            ("weight-decay", |options| options.weight_decay = -0.1),
            ("weight-decay", |options| {
                options.weight_decay = f64::INFINITY;
            }),
            ("beta1", |options| options.beta1 = 1.0),
            ("beta1", |options| options.beta1 = -0.1),
            ("beta2", |options| options.beta2 = 1.0),
            ("beta2", |options| options.beta2 = f64::NAN),
            ("epsilon", |options| options.epsilon = 0.0),
            ("epsilon", |options| options.epsilon = f64::INFINITY),
            ("max-gradient-norm", |options| {
                options.max_gradient_norm = -1.0;
            }),
            ("max-gradient-norm", |options| {
                options.max_gradient_norm = 1e-320;
            }),
            ("max-gradient-norm", |options| {
                options.max_gradient_norm = f64::NAN;
            }),
            ("keep", |options| options.keep = 0),
            ("epochs", |options| options.budget = Budget::Epochs(0.0)),
            ("epochs", |options| {
                options.budget = Budget::Epochs(f64::INFINITY);
            }),
            ("epochs", |options| options.budget = Budget::Epochs(1e30)),
            ("epochs", |options| {
                options.budget = Budget::Epochs((1u64 << 40) as f64 + 1.0);
            }),
            ("steps", |options| options.budget = Budget::Steps(0)),
            ("steps", |options| {
                options.budget = Budget::Steps((1 << 40) + 1);
            }),
            ("steps", |options| {
                options.budget = Budget::Steps(usize::MAX);
            }),
        ];
        for (name, change) in refused {
            let mut options = TrainOptions::default();
            change(&mut options);
            let said = format!("{options:?}");
            let message = options.validated().expect_err(&said).to_string();
            assert!(
                message.contains(name) && !message.contains(';'),
                "{message}"
            );
        }
        let possible: [Change; 9] = [
            |_| {},
            |options| options.batch_size = 1,
            |options| options.batch_size = 1 << 20,
            |options| options.tokens_per_pass = 1,
            |options| (options.beta1, options.beta2) = (0.0, 0.0),
            |options| options.max_gradient_norm = 0.0,
            |options| options.budget = Budget::Steps(1 << 40),
            |options| options.budget = Budget::Epochs((1u64 << 40) as f64),
            |options| options.keep = 1,
        ];
        for change in possible {
            let mut options = TrainOptions::default();
            change(&mut options);
            assert!(options.clone().validated().is_ok(), "{options:?}");
        }
    }

    #[test]
    fn what_is_no_number_in_32_bits_is_refused() {
        let valid = TrainOptions::default;
        for (options, name) in [
            (
                TrainOptions {
                    learning_rate: 1e39,
                    ..valid()
                },
                "learning-rate",
            ),
            (
                TrainOptions {
                    learning_rate: 1e-50,
                    ..valid()
                },
                "learning-rate",
            ),
            (
                TrainOptions {
                    epsilon: 1e-50,
                    ..valid()
                },
                "epsilon",
            ),
            (
                TrainOptions {
                    weight_decay: 1e39,
                    ..valid()
                },
                "weight-decay",
            ),
            (
                TrainOptions {
                    beta2: 1.0 - 1e-12,
                    ..valid()
                },
                "beta2",
            ),
        ] {
            let error = options.validated().expect_err(name);
            assert!(error.to_string().contains(name), "{error}");
            assert_eq!(error.kind(), crate::ErrorKind::Usage);
        }
        assert!(valid().validated().is_ok());
    }

    #[test]
    fn an_option_that_moves_bits_is_named_when_it_changes() -> Result<()> {
        let begun = TrainOptions {
            max_gradient_norm: f64::INFINITY,
            ..TrainOptions::default()
        };
        // As it comes back from a checkpoint.
        let text = serde_json::to_string(&RecordedOptions::of(&begun)?).context("written")?;
        let recorded: RecordedOptions = serde_json::from_str(&text).context("read")?;
        let changed = |options: &TrainOptions| -> Result<Option<String>> {
            Ok(recorded.changed(&RecordedOptions::of(options)?))
        };
        assert_eq!(changed(&begun)?, None);
        let free = TrainOptions {
            recompute: Recompute::Blocks,
            activation_cache_bytes: 0,
            save_every: 7,
            keep: 9,
            on_nonfinite: OnNonfinite::Skip,
            ..begun.clone()
        };
        assert_eq!(changed(&free)?, None);
        for (options, said) in [
            (
                TrainOptions {
                    learning_rate: 1e-3,
                    ..begun.clone()
                },
                "`learning-rate`, 0.0005 before and 0.001 now,",
            ),
            (
                TrainOptions {
                    budget: Budget::Steps(9),
                    ..begun.clone()
                },
                "`epochs`, 3.0 before and none now,",
            ),
            (
                TrainOptions {
                    schedule: Schedule::Linear,
                    ..begun.clone()
                },
                "`schedule`, \"cosine\" before and \"linear\" now,",
            ),
            (
                TrainOptions {
                    on_spike: OnSpike::Skip,
                    ..begun.clone()
                },
                "`on-spike`, \"warn\" before and \"skip\" now,",
            ),
            (
                TrainOptions {
                    activation_cache_type: CacheType::Bf16,
                    ..begun.clone()
                },
                "`activation-cache-type`, \"f32\" before and \"bf16\" now,",
            ),
            (
                TrainOptions {
                    max_gradient_norm: 1.0,
                    ..begun.clone()
                },
                "`max-gradient-norm`, null before and 1.0 now,",
            ),
        ] {
            assert_eq!(changed(&options)?.as_deref(), Some(said));
        }
        Ok(())
    }

    #[test]
    fn epochs_have_no_more_steps_than_may_be_asked_for() {
        let of = |epochs, examples| {
            TrainOptions {
                budget: Budget::Epochs(epochs),
                batch_size: 4,
                ..Default::default()
            }
            .check_length(examples)
        };
        let most = (1u64 << 40) as f64;
        of(most, 4).expect("as many");
        let (fewer, many) = ((1u64 << 20) as f64, 4 << 20);
        of(fewer, many).expect("as many");
        for (epochs, examples) in [(most, 5), (fewer + 1.0, many)] {
            let error = of(epochs, examples).expect_err("more");
            assert!(error.to_string().contains("`--epochs`"), "{error}");
            assert_eq!(error.kind(), crate::ErrorKind::Usage);
        }
        let steps = TrainOptions {
            budget: Budget::Steps(MOST_STEPS),
            ..Default::default()
        };
        steps.check_length(usize::MAX).expect("no epochs");
    }

    #[test]
    fn a_part_of_an_epoch_is_a_whole_number_of_steps() {
        assert_eq!(Budget::Epochs(1.0).steps(10, 4), 3);
        assert_eq!(Budget::Epochs(0.01).steps(10, 4), 1);
    }
}
