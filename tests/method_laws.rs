//! The laws that hold for every method on every model, with random non-zero weights and alpha other than the rank.

mod golden;

use candle_core::{Device, Tensor};
use golden::{ScoreFile, golden};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use retune::Result;
use retune::adapter_folder::{Adapter, OtherBase, save};
use retune::adapters::METHODS;
use retune::adapters::hooks::{
    AdapterMethod, BaseLinear, LinearAdapter, LinearSite, Mode, ModelShape, NoAdapter,
};
use retune::adapters::last_layers::LastLayers;
use retune::adapters::lora::{Lora, Override};
use retune::adapters::prompt::{Prompt, PromptStart};
use retune::adapters::storage::{AdapterWeights, PeftConfig};
use retune::data::{Batch, Example, collate};
use retune::model::{self, Model, ModelConfig};
use retune::task::causal_lm::score;
use retune::train::{Gradients, Recompute, accumulate};

/// Whether a new adapter leaves the model as it was.
#[derive(Clone, Copy, PartialEq)]
enum Start {
    Neutral,
    Disturbing,
}

struct Case {
    label: &'static str,
    method: Box<dyn AdapterMethod>,
    start: Start,
    /// Number of trained values by the method's formula.
    count: fn(&ModelConfig) -> usize,
    applies: fn(&ModelConfig) -> bool,
}

const RANK: usize = 3;

fn linear_sizes(config: &ModelConfig) -> [(usize, usize); 7] {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let queries = config.attention_heads * config.head_dim;
    let keys = config.key_value_heads * config.head_dim;
    [
        (hidden, queries),
        (hidden, keys),
        (hidden, keys),
        (queries, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
}

fn lora_count(config: &ModelConfig) -> usize {
    let block: usize = linear_sizes(config)
        .iter()
        .map(|(inputs, outputs)| RANK * (inputs + outputs))
        .sum();
    config.layers * block
}

fn feed_forward_count(config: &ModelConfig) -> usize {
    let biases = if config.feed_forward_bias {
        2 * config.intermediate_size + config.hidden_size
    } else {
        0
    };
    3 * config.hidden_size * config.intermediate_size + biases
}

fn block_count(config: &ModelConfig) -> usize {
    let queries = config.attention_heads * config.head_dim;
    let keys = config.key_value_heads * config.head_dim;
    let mut count: usize = linear_sizes(config)[..4]
        .iter()
        .map(|(inputs, outputs)| inputs * outputs)
        .sum();
    if config.attention_bias.query_key_value {
        count += queries + 2 * keys;
    }
    if config.attention_bias.output {
        count += config.hidden_size;
    }
    if config.query_key_norm {
        count += 2 * config.head_dim;
    }
    count + feed_forward_count(config) + 2 * config.hidden_size
}

fn cases() -> Vec<Case> {
    let lora = || Lora {
        rank: RANK,
        alpha: Some(5.0),
        ..Lora::default()
    };
    let everywhere: fn(&ModelConfig) -> bool = |_| true;
    let untied: fn(&ModelConfig) -> bool = |config| !config.tied_head;
    vec![
        Case {
            label: "lora",
            method: Box::new(lora()),
            start: Start::Neutral,
            count: lora_count,
            applies: everywhere,
        },
        Case {
            label: "rank-stabilised lora on embeddings",
            method: Box::new(Lora {
                rslora: true,
                targets: "v_proj,embed_tokens".parse().expect("names"),
                ..lora()
            }),
            start: Start::Neutral,
            count: |config| {
                let keys = config.key_value_heads * config.head_dim;
                RANK * (config.layers * (config.hidden_size + keys)
                    + config.vocabulary
                    + config.hidden_size)
            },
            applies: everywhere,
        },
        Case {
            label: "lora of several ranks and strengths",
            method: Box::new(Lora {
                targets: "q_proj,v_proj".parse().expect("names"),
                // The first that matches counts, and in the order of their names it would be another.
                rank_pattern: overrides(&["layers.1.self_attn.q_proj=5", ".*.q_proj=2"]),
                alpha_pattern: overrides(&["v_proj=4", ".*=3"]),
                ..lora()
            }),
            start: Start::Neutral,
            count: |config| {
                let [(hidden, queries), _, (_, values), ..] = linear_sizes(config);
                let ranks = 5 + 2 * (config.layers - 1);
                ranks * (hidden + queries) + RANK * config.layers * (hidden + values)
            },
            applies: everywhere,
        },
        Case {
            label: "lora on an untied head",
            method: Box::new(Lora {
                targets: "lm_head".parse().expect("names"),
                ..lora()
            }),
            start: Start::Neutral,
            count: |config| RANK * (config.hidden_size + config.vocabulary),
            applies: untied,
        },
        Case {
            label: "last block",
            method: Box::new(LastLayers {
                blocks: 1,
                ..LastLayers::default()
            }),
            start: Start::Neutral,
            count: block_count,
            applies: everywhere,
        },
        Case {
            label: "last feed-forward and final norm",
            method: Box::new(LastLayers {
                blocks: 1,
                feed_forward_only: true,
                final_norm: true,
                head: false,
            }),
            start: Start::Neutral,
            count: |config| feed_forward_count(config) + config.hidden_size,
            applies: everywhere,
        },
        Case {
            label: "head and final norm alone",
            method: Box::new(LastLayers {
                blocks: 0,
                feed_forward_only: false,
                final_norm: true,
                head: true,
            }),
            start: Start::Neutral,
            count: |config| config.hidden_size * (config.vocabulary + 1),
            applies: untied,
        },
        Case {
            label: "prompt",
            method: Box::new(Prompt {
                virtual_tokens: 4,
                start: PromptStart::Random,
                start_text: None,
            }),
            start: Start::Disturbing,
            count: |config| 4 * config.hidden_size,
            applies: everywhere,
        },
    ]
}

fn overrides(texts: &[&str]) -> Vec<Override> {
    texts
        .iter()
        .map(|text| text.parse().expect("a name and a number"))
        .collect()
}

/// Runs `law` on every case × model that goes together.
fn everywhere(law: impl Fn(&Case, &std::path::Path, &ModelConfig) -> Result<()>) -> Result<()> {
    for name in golden::names("models")? {
        let folder = golden("models").join(&name);
        let config = ModelConfig::read(&folder)?;
        for case in cases().iter().filter(|case| (case.applies)(&config)) {
            law(case, &folder, &config)
                .map_err(|error| error.context(format!("{} on {name}", case.label)))?;
        }
    }
    Ok(())
}

fn fresh(case: &Case, folder: &std::path::Path) -> Result<Model> {
    model::load(
        folder,
        case.method.as_ref(),
        AdapterWeights::fresh(7, &Device::Cpu),
        None,
    )
}

/// An adapter as it might be in the middle of training: every weight a little off its start.
fn trained(case: &Case, folder: &std::path::Path) -> Result<Model> {
    let model = fresh(case, folder)?;
    let mut generator = ChaCha8Rng::seed_from_u64(11);
    for (_, var) in model.weights.iter() {
        let noise: Vec<f32> = (0..var.elem_count())
            .map(|_| (generator.next_u32() as f32 / u32::MAX as f32 - 0.5) * 0.4)
            .collect();
        var.set(&(var.as_tensor() + Tensor::from_vec(noise, var.shape(), &Device::Cpu)?)?)?;
    }
    Ok(model)
}

fn batch(folder: &std::path::Path) -> Result<Batch> {
    let examples: Vec<Example> = ScoreFile::read(folder)?
        .records
        .into_iter()
        .map(|record| {
            let learn = vec![true; record.tokens.len()];
            Example::new(record.tokens, learn)
        })
        .collect();
    Ok(collate(&examples.iter().collect::<Vec<_>>()))
}

fn scores(model: &Model, batch: &Batch) -> Result<Vec<f32>> {
    Ok(score(model.decoder.as_ref(), batch)?
        .iter()
        .map(|score| score.log_probability)
        .collect())
}

fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    left.iter()
        .zip(right)
        .map(|(left, right)| (left - right).abs())
        .fold(0.0, f32::max)
}

fn gradients(model: &Model, batch: &Batch, recompute: Recompute) -> Result<(f64, Gradients)> {
    let mut gradients = Gradients::new();
    let mode = Mode::Train {
        seed: 1,
        first_row: 0,
    };
    let loss = accumulate(
        model.decoder.as_ref(),
        &model.weights,
        batch,
        mode,
        recompute,
        &mut gradients,
    )?;
    Ok((loss, gradients))
}

#[test]
fn every_row_of_the_table_is_under_the_laws() {
    let tested: Vec<&str> = cases().iter().map(|case| case.method.name()).collect();
    for entry in &METHODS {
        assert!(
            tested.contains(&entry.name),
            "`{}` has no case here",
            entry.name
        );
    }
}

#[test]
fn a_fresh_adapter_leaves_the_model_as_it_was() -> Result<()> {
    everywhere(|case, folder, _| {
        let batch = batch(folder)?;
        let base = model::load(
            folder,
            &NoAdapter,
            AdapterWeights::fresh(0, &Device::Cpu),
            None,
        )?;
        let difference = largest_difference(
            &scores(&base, &batch)?,
            &scores(&fresh(case, folder)?, &batch)?,
        );
        match case.start {
            Start::Neutral => assert!(difference <= 2e-5, "{}: {difference}", case.label),
            Start::Disturbing => assert!(difference > 1e-3, "{}: {difference}", case.label),
        }
        let difference = largest_difference(
            &scores(&base, &batch)?,
            &scores(&trained(case, folder)?, &batch)?,
        );
        assert!(
            difference > 1e-3,
            "{}: the adapter does nothing",
            case.label
        );
        Ok(())
    })
}

#[test]
fn saved_and_loaded_is_the_same_to_the_bit() -> Result<()> {
    everywhere(|case, folder, _| {
        let batch = batch(folder)?;
        let model = trained(case, folder)?;
        let first = tempfile::tempdir().expect("a folder");
        let second = tempfile::tempdir().expect("a folder");
        save(first.path(), &model, case.method.as_ref(), "base")?;
        let adapter = Adapter::open(first.path())?;
        let loaded = adapter.load_onto(folder, None, OtherBase::Refuse)?;
        assert_eq!(
            scores(&model, &batch)?,
            scores(&loaded, &batch)?,
            "{}",
            case.label
        );
        save(second.path(), &loaded, adapter.method.as_ref(), "base")?;
        for file in [
            "adapter_config.json",
            "adapter_model.safetensors",
            "retune.json",
        ] {
            let read = |folder: &tempfile::TempDir| {
                std::fs::read(folder.path().join(file)).expect("written")
            };
            assert!(
                read(&first) == read(&second),
                "{}: {file} changed",
                case.label
            );
        }
        Ok(())
    })
}

/// LoRA as a method that knows nothing of the engine: candle's operations alone.
struct PlainLora(Lora);

struct Plain(Box<dyn LinearAdapter>);

impl AdapterMethod for PlainLora {
    fn name(&self) -> &'static str {
        "plain lora"
    }

    fn adapt_linear(
        &self,
        site: &LinearSite,
        weights: &mut AdapterWeights,
    ) -> Result<Option<Box<dyn LinearAdapter>>> {
        let adapter = self.0.adapt_linear(site, weights)?;
        Ok(adapter.map(|adapter| Box::new(Plain(adapter)) as Box<dyn LinearAdapter>))
    }

    fn peft_config(&self, model: &ModelShape, weights: &AdapterWeights) -> Result<PeftConfig> {
        self.0.peft_config(model, weights)
    }

    fn default_learning_rate(&self) -> f64 {
        self.0.default_learning_rate()
    }
}

impl LinearAdapter for Plain {
    fn forward(&self, x: &Tensor, base: &dyn BaseLinear, mode: Mode) -> Result<Tensor> {
        self.0.forward(x, base, mode)
    }

    fn merged_weight(&self, base: &Tensor) -> Result<Tensor> {
        self.0.merged_weight(base)
    }
}

#[test]
fn the_fused_path_of_low_rank_methods_equals_candles() -> Result<()> {
    let lora = || Lora {
        rank: RANK,
        alpha: Some(5.0),
        dropout: 0.2,
        ..Lora::default()
    };
    let case = |method: Box<dyn AdapterMethod>| Case {
        label: "lora both ways",
        method,
        start: Start::Neutral,
        count: lora_count,
        applies: |_| true,
    };
    let (fused, plain) = (case(Box::new(lora())), case(Box::new(PlainLora(lora()))));
    for name in golden::names("models")? {
        let folder = golden("models").join(&name);
        let batch = batch(&folder)?;
        let (fused, plain) = (trained(&fused, &folder)?, trained(&plain, &folder)?);
        for recompute in [Recompute::Never, Recompute::Blocks] {
            let (loss, ours) = gradients(&fused, &batch, recompute)?;
            let (plain_loss, theirs) = gradients(&plain, &batch, recompute)?;
            assert!(
                (loss - plain_loss).abs() <= 1e-5 * plain_loss,
                "{name}: {loss} {plain_loss}"
            );
            assert_eq!(ours.len(), theirs.len());
            for (weight, ours) in &ours {
                let values = |t: &Tensor| -> Result<Vec<f32>> { Ok(t.flatten_all()?.to_vec1()?) };
                let (ours, theirs) = (values(ours)?, values(&theirs[weight])?);
                let size = theirs
                    .iter()
                    .fold(0f32, |size, value| size.max(value.abs()));
                let difference = largest_difference(&ours, &theirs);
                assert!(
                    difference <= 1e-4 * size,
                    "{name}: {weight} differs by {difference}, the largest is {size}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn exactly_one_row_reads_each_configuration() -> Result<()> {
    for name in golden::names("adapters")? {
        let config = retune::adapters::storage::PeftConfig::read(&golden("adapters").join(&name))?;
        let readers = METHODS
            .iter()
            .filter(|entry| (entry.reads)(&config))
            .count();
        assert_eq!(readers, 1, "{name}");
    }
    for case in cases() {
        let config = case.method.peft_config(
            &ModelShape::default(),
            &AdapterWeights::fresh(0, &Device::Cpu),
        )?;
        let readers = METHODS.iter().filter(|entry| (entry.reads)(&config));
        // Without a model there are no trained modules to name, by which last layers are told from a LoRA.
        if case.method.name() != "last-layers" {
            assert_eq!(
                readers.map(|entry| entry.name).collect::<Vec<_>>(),
                [case.method.name()],
                "{}",
                case.label
            );
        }
    }
    Ok(())
}

#[test]
fn every_trained_weight_gets_a_gradient_and_no_frozen_one_does() -> Result<()> {
    everywhere(|case, folder, _| {
        let batch = batch(folder)?;
        let model = trained(case, folder)?;
        // `accumulate` refuses a gradient of a frozen weight.
        let (loss, kept) = gradients(&model, &batch, Recompute::Never)?;
        let (again, recomputed) = gradients(&model, &batch, Recompute::Blocks)?;
        assert!((loss - again).abs() <= 1e-6 * loss.abs(), "{}", case.label);
        let scored: f32 = scores(&model, &batch)?.iter().sum();
        assert!(
            (loss + f64::from(scored)).abs() <= 1e-4 * loss.abs(),
            "{}: {loss} {scored}",
            case.label
        );
        for (name, _) in model.weights.iter() {
            let kept = kept
                .get(name)
                .unwrap_or_else(|| panic!("{}: `{name}` got no gradient", case.label));
            let norm = kept.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt();
            assert!(
                norm > 0.0 && norm.is_finite(),
                "{}: `{name}` has gradient norm {norm}",
                case.label
            );
            let difference = (kept - &recomputed[name])?
                .sqr()?
                .sum_all()?
                .to_scalar::<f32>()?
                .sqrt();
            assert!(
                difference <= 1e-5 * norm,
                "{}: `{name}`, recomputed: {difference} of {norm}",
                case.label
            );
        }
        Ok(())
    })
}

#[test]
fn gradients_are_slopes_of_the_loss() -> Result<()> {
    everywhere(|case, folder, _| {
        let batch = batch(folder)?;
        let model = trained(case, folder)?;
        let (_, gradients) = gradients(&model, &batch, Recompute::Never)?;
        let loss = || -> Result<f64> {
            Ok(-scores(&model, &batch)?
                .iter()
                .map(|score| f64::from(*score))
                .sum::<f64>())
        };
        for (name, var) in model.weights.iter() {
            let gradient = &gradients[name];
            // Along the gradient the slope is its length: one direction per weight sees every entry.
            let norm = f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt());
            let start = var.as_tensor().copy()?.detach();
            let step = 2e-3 / norm.max(1e-3);
            let at = |way: f64| -> Result<f64> {
                var.set(&(&start + (gradient * (way * step))?)?)?;
                loss()
            };
            let slope = (at(1.0)? - at(-1.0)?) / (2.0 * step);
            var.set(&start)?;
            let expected = norm * norm;
            let error = (slope - expected).abs() / expected;
            assert!(
                error < 2e-2,
                "{}: `{name}`: slope {slope}, gradient says {expected}",
                case.label
            );
        }
        Ok(())
    })
}

#[test]
fn the_number_of_trained_weights_is_the_formulas() -> Result<()> {
    everywhere(|case, folder, config| {
        assert_eq!(
            fresh(case, folder)?.weights.parameter_count(),
            (case.count)(config),
            "{}",
            case.label
        );
        Ok(())
    })
}
