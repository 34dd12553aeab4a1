//! Generation against transformers and PEFT (`tests/golden/generation.json`), against scoring without a cache, and what
//! ends a text.

mod golden;

use golden::golden;
use retune::adapter_folder::{Adapter, OtherBase};
use retune::adapters::hooks::{Mode, NoAdapter};
use retune::adapters::storage::AdapterWeights;
use retune::data::{AddSpecial, DataOptions, Dataset, Example, SpecialTokens, Tokenizer, collate};
use retune::generate::{
    Control, ExactMatchOptions, Generation, GenerationConfig, GenerationOptions, Generator,
    Sampling, StopReason, exact_match,
};
use retune::model::causal_lm::enter;
use retune::model::{self, Model};
use retune::{Context, Result};
use serde::Deserialize;
use serde_json::json;
use std::path::Path;

#[derive(Deserialize)]
struct Reference {
    texts: Vec<ReferenceText>,
}

#[derive(Deserialize)]
struct ReferenceText {
    folder: String,
    prompt: Vec<u32>,
    repetition_penalty: f64,
    tokens: Vec<u32>,
}

/// A fixture's model, and the folder of its base.
fn load(folder: &str) -> Result<(Model, Tokenizer)> {
    let folder = golden(folder);
    if !folder.join("adapter_config.json").exists() {
        let weights = AdapterWeights::fresh(0, &candle_core::Device::Cpu);
        return Ok((
            model::load(&folder, &NoAdapter, weights, None)?,
            Tokenizer::load(&folder)?,
        ));
    }
    let adapter = Adapter::open(&folder)?;
    let base = golden("").join(adapter.saved.config.base_model());
    Ok((
        adapter.load_onto(&base, None, OtherBase::Refuse)?,
        Tokenizer::load(&base)?,
    ))
}

fn fixtures() -> Result<Vec<String>> {
    let mut folders = Vec::new();
    for kind in ["models", "adapters"] {
        let names = golden::names(kind)?;
        folders.extend(names.iter().map(|name| format!("{kind}/{name}")));
    }
    Ok(folders)
}

fn quietly(_: &str) -> Result<Control> {
    Ok(Control::Continue)
}

fn greedy(max_tokens: usize) -> GenerationOptions {
    GenerationOptions {
        max_tokens,
        ..GenerationOptions::default()
    }
}

/// The options of a text in a certain style, and how it is generated.
fn generate(folder: &str, options: &GenerationOptions) -> Result<Generation> {
    let (model, tokenizer) = load(folder)?;
    Generator::new(&model, &tokenizer)?.generate(&[23, 2, 1, 58, 35], options, &mut quietly)
}

#[test]
fn greedy_texts_are_those_of_transformers_and_peft() -> Result<()> {
    let path = golden("generation.json");
    let text = std::fs::read(&path).at(path.display())?;
    let reference: Reference = serde_json::from_slice(&text).at(path.display())?;
    for text in reference.texts {
        let (model, tokenizer) = load(&text.folder)?;
        let options = GenerationOptions {
            max_tokens: text.tokens.len(),
            end_tokens: [2].into(),
            sampling: Sampling {
                repetition_penalty: text.repetition_penalty,
                ..Sampling::default()
            },
            ..GenerationOptions::default()
        };
        let mut generator = Generator::new(&model, &tokenizer)?;
        let generation = generator.generate(&text.prompt, &options, &mut quietly)?;
        // The fixture with dynamic rotation is the only one whose context the texts fill.
        let room = generator.context() - text.prompt.len();
        let wanted = &text.tokens[..text.tokens.len().min(room)];
        assert_eq!(generation.tokens, wanted, "{}", text.folder);
    }
    Ok(())
}

/// The scores of the token after `tokens`, computed as in training: all at once and without a cache.
fn scores_anew(model: &Model, tokens: &[u32]) -> Result<Vec<f32>> {
    let decoder = model.decoder.as_ref();
    let example = Example::new(tokens.to_vec(), vec![true; tokens.len()]);
    let flow = enter(decoder, &collate(&[&example]), Mode::Infer)?;
    let mut hidden = flow.hidden.detach();
    for index in 0..decoder.block_count() {
        hidden = decoder.block(index, &hidden, &flow.pass, None)?;
    }
    let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?;
    let logits = decoder
        .head()
        .forward(&decoder.finish(&last)?, Mode::Infer)?;
    Ok(logits.flatten_all()?.to_vec1()?)
}

#[test]
fn the_cache_changes_no_token() -> Result<()> {
    for folder in fixtures()? {
        let (model, tokenizer) = load(&folder)?;
        let mut generator = Generator::new(&model, &tokenizer)?;
        let prompt = [23, 2, 1, 58, 35, 7, 11];
        let generation = generator.generate(&prompt, &greedy(40), &mut quietly)?;
        let mut all = prompt.to_vec();
        for token in generation.tokens {
            let scores = scores_anew(&model, &all)?;
            let highest = scores.iter().copied().fold(f32::MIN, f32::max);
            // Equal up to rounding: where two tokens are as likely as each other, either may come.
            assert!(
                highest - scores[token as usize] < 1e-5,
                "{folder}, token {}",
                all.len()
            );
            all.push(token);
        }
    }
    Ok(())
}

#[test]
fn what_an_earlier_text_had_in_common_changes_no_token() -> Result<()> {
    for folder in fixtures()? {
        let (model, tokenizer) = load(&folder)?;
        let mut generator = Generator::new(&model, &tokenizer)?;
        let options = greedy(4);
        let mut conversation = vec![23, 2, 1, 58, 35];
        let mut turns = Vec::new();
        for turn in 0..3 {
            let generation = generator.generate(&conversation, &options, &mut quietly)?;
            // The last generated token was never fed, and a turn may end one token before it.
            let expected = [0, conversation.len() - 3, conversation.len() - 3][turn];
            assert!(
                generation.reused_tokens == expected || folder.contains("dynamic"),
                "{folder}: {}",
                generation.reused_tokens
            );
            turns.push((conversation.clone(), generation.tokens.clone()));
            conversation.extend(&generation.tokens[..3]);
            conversation.extend([61, 40 + turn as u32, 7]);
        }
        // Back to the first: the cache is cut, not used up.
        turns.push(turns[0].clone());
        for (conversation, tokens) in turns {
            let mut fresh = Generator::new(&model, &tokenizer)?;
            let anew = fresh.generate(&conversation, &options, &mut quietly)?;
            let again = generator.generate(&conversation, &options, &mut quietly)?;
            assert_eq!(anew.tokens, tokens, "{folder}");
            assert_eq!(again.tokens, tokens, "{folder}");
        }
    }
    Ok(())
}

#[test]
fn a_prompt_longer_than_a_part_of_it_and_than_the_first_room_gives_the_same_text() -> Result<()> {
    let (model, tokenizer) = load("models/llama-rope-llama3")?;
    let prompt: Vec<u32> = (0..700)
        .map(|index| (index * 37 + index / 11) % 93)
        .collect();
    let mut generator = Generator::new(&model, &tokenizer)?;
    let mut asked = 0;
    let mut counting = |_: &str| {
        asked += 1;
        Ok(Control::Continue)
    };
    let generation = generator.generate(&prompt, &greedy(3), &mut counting)?;
    assert_eq!(asked, 4, "once between the two parts, then for each token");
    let mut all = prompt;
    for token in generation.tokens {
        let scores = scores_anew(&model, &all)?;
        let highest = scores.iter().copied().fold(f32::MIN, f32::max);
        assert!(highest - scores[token as usize] < 1e-5);
        all.push(token);
    }
    Ok(())
}

#[test]
fn a_text_ends_at_the_end_of_the_context() -> Result<()> {
    for (folder, context) in [
        ("models/llama", 64),
        ("models/llama-rope-dynamic", 32),
        ("models/llama-rope-yarn", 256),
        ("adapters/prompt-llama", 60),
    ] {
        let (model, tokenizer) = load(folder)?;
        let mut generator = Generator::new(&model, &tokenizer)?;
        let generation = generator.generate(&[23, 2, 1], &greedy(1000), &mut quietly)?;
        assert_eq!(generation.stop_reason, StopReason::ContextFull, "{folder}");
        assert_eq!(generation.tokens.len() + 3, context, "{folder}");
        let full = vec![5; context];
        let error = generator
            .generate(&full, &greedy(1), &mut quietly)
            .expect_err("no token fits");
        let wanted =
            format!("the prompt has {context} tokens, and the model's context holds {context}");
        assert_eq!(error.to_string(), wanted);
    }
    Ok(())
}

#[test]
fn a_text_ends_with_an_end_token_which_is_not_shown() -> Result<()> {
    let all = generate("models/llama", &greedy(12))?;
    assert_eq!(all.stop_reason, StopReason::MaxTokens);
    let mut options = greedy(12);
    options.end_tokens = [all.tokens[6]].into();
    let ended = generate("models/llama", &options)?;
    assert_eq!(ended.stop_reason, StopReason::EndToken);
    assert_eq!(ended.tokens, all.tokens[..7]);
    assert!(all.text.starts_with(&ended.text));
    assert_eq!(ended.text, generate("models/llama", &greedy(6))?.text);
    options.special = SpecialTokens::Keep;
    assert_eq!(
        generate("models/llama", &options)?.text,
        generate("models/llama", &greedy(7))?.text
    );
    Ok(())
}

#[test]
fn a_stop_string_ends_the_text_before_it_and_no_part_of_it_is_heard() -> Result<()> {
    let all = generate("models/llama", &greedy(16))?;
    let middle = all.text.len() / 2;
    let stop = all.text[middle..middle + 4].to_owned();
    let start = all.text.find(&stop).expect("it was cut out of the text");
    let (model, tokenizer) = load("models/llama")?;
    let mut options = greedy(16);
    options.stop = vec!["never".to_owned(), stop];
    let mut heard = String::new();
    let generation = Generator::new(&model, &tokenizer)?.generate(
        &[23, 2, 1, 58, 35],
        &options,
        &mut |text| {
            heard.push_str(text);
            Ok(Control::Continue)
        },
    )?;
    assert_eq!(generation.stop_reason, StopReason::StopString);
    assert_eq!(generation.text, all.text[..start]);
    assert_eq!(heard, generation.text);
    Ok(())
}

#[test]
fn the_reader_can_stop_a_text_and_hears_all_of_it() -> Result<()> {
    let (model, tokenizer) = load("models/qwen2")?;
    let mut heard = String::new();
    let mut calls = 0;
    let generation = Generator::new(&model, &tokenizer)?.generate(
        &[23, 2, 1, 58, 35],
        &greedy(16),
        &mut |text| {
            heard.push_str(text);
            calls += 1;
            Ok(if calls == 5 {
                Control::Stop
            } else {
                Control::Continue
            })
        },
    )?;
    assert_eq!(generation.stop_reason, StopReason::Interrupted);
    assert_eq!(generation.tokens.len(), 5);
    assert_eq!(heard, generation.text);
    Ok(())
}

#[test]
fn an_error_of_the_reader_leaves_the_generator_usable() -> Result<()> {
    let (model, tokenizer) = load("models/qwen2")?;
    let mut generator = Generator::new(&model, &tokenizer)?;
    let prompt = [23, 2, 1, 58, 35];
    let wanted = generator
        .generate(&prompt, &greedy(8), &mut quietly)?
        .tokens;
    let failed = generator.generate(&prompt, &greedy(8), &mut |_| {
        Err(retune::Error::new("the pipe is closed"))
    });
    assert!(failed.is_err());
    assert!(
        generator
            .generate(&[23, 2, 4000], &greedy(8), &mut quietly)
            .is_err()
    );
    assert_eq!(
        generator
            .generate(&prompt, &greedy(8), &mut quietly)?
            .tokens,
        wanted
    );
    Ok(())
}

#[test]
fn draws_follow_from_the_seed_and_not_from_the_threads() -> Result<()> {
    let mut options = greedy(24);
    options.sampling.temperature = 1.0;
    let with_seed = |seed: u64, threads: usize| {
        let mut options = options.clone();
        options.sampling.seed = seed;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.expect("a pool of a few threads");
        pool.install(|| generate("adapters/lora-llama", &options))
    };
    let first = with_seed(1, 1)?;
    assert_eq!(with_seed(1, 3)?.tokens, first.tokens);
    assert_ne!(with_seed(2, 1)?.tokens, first.tokens);
    Ok(())
}

#[test]
fn a_prompt_without_tokens_is_refused() -> Result<()> {
    let (model, tokenizer) = load("models/llama")?;
    let mut generator = Generator::new(&model, &tokenizer)?;
    let error = generator
        .generate(&[], &greedy(1), &mut quietly)
        .expect_err("there is nothing to go on from");
    assert!(error.to_string().contains("the prompt is empty"));
    assert_eq!(
        generator.generate(&[5], &greedy(0), &mut quietly)?.tokens,
        [0; 0]
    );
    Ok(())
}

#[test]
fn options_come_from_the_model_folder() -> Result<()> {
    let folder = golden("models/llama");
    let (model, tokenizer) = load("models/llama")?;
    let options = GenerationConfig::read(&folder, &model.config)?.options(&tokenizer);
    assert_eq!(options.end_tokens, [2].into());
    assert_eq!(options.sampling, Sampling::default());
    // Without the file, config.json names the end.
    let without = GenerationConfig::read(Path::new("/nowhere"), &model.config)?;
    assert_eq!(without.end_tokens, [2]);
    Ok(())
}

#[test]
fn answers_are_compared_with_those_of_the_data() -> Result<()> {
    let (model, tokenizer) = load("models/llama")?;
    let mut generator = Generator::new(&model, &tokenizer)?;
    // A question that the model answers in words alone.
    let mut tell = |number: u32| {
        let question = format!("w{number} w14 w15");
        let prompt = tokenizer.encode(&question, AddSpecial::Start)?;
        let told = generator.generate(&prompt, &greedy(5), &mut quietly)?;
        let words = told.tokens.iter().all(|token| (3..93).contains(token));
        let ends_once = !told.tokens[..4].contains(&told.tokens[4]);
        Ok((words && ends_once).then_some((question, told)))
    };
    let told: Result<Vec<_>> = (0..20).map(&mut tell).collect();
    let (question, told) = told?.into_iter().flatten().next().expect("one of twenty");
    // What the model says first is the right answer if its fifth token ends a text.
    let answer = tokenizer.decode(&told.tokens[..4], SpecialTokens::Keep)?;
    let folder = tempfile::tempdir().at("a folder")?;
    let file = folder.path().join("data.jsonl");
    let lines = [
        json!({"prompt": question, "completion": answer}),
        json!({"prompt": question, "completion": format!(" {answer} ")}),
        json!({"prompt": question, "completion": format!("{answer} w5")}),
        json!({"text": question}),
        json!({"prompt": question, "completion": format!("w1 {}", "w2 ".repeat(40))}),
    ];
    let lines: Vec<String> = lines.iter().map(ToString::to_string).collect();
    std::fs::write(&file, lines.join("\n")).at(file.display())?;
    let data = DataOptions {
        max_length: Some(16),
        ..DataOptions::default()
    };
    let data = Dataset::load(&[file], &tokenizer, &data)?;
    let mut generation = greedy(0);
    generation.end_tokens = [told.tokens[4]].into();
    let options = ExactMatchOptions::new(generation);
    let mut heard = Vec::new();
    let result = exact_match(
        &model,
        &tokenizer,
        &data.examples,
        &options,
        &mut |answered| {
            heard.push(answered.right);
            Ok(Control::Continue)
        },
    )?;
    assert_eq!(heard, [true, true, false]);
    assert_eq!((result.right, result.of, result.skipped), (2, 3, 2));
    assert_eq!(result.answers[2].answer.trim(), answer);
    assert_eq!(result.answers[2].prompt, question);
    assert!((result.share() - 2.0 / 3.0).abs() < 1e-12);
    let nothing = exact_match(
        &model,
        &tokenizer,
        &data.examples[3..],
        &options,
        &mut |_| Ok(Control::Continue),
    );
    assert!(nothing.is_err());
    Ok(())
}
