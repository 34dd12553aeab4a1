use super::*;
use crate::adapters::hooks::NoAdapter;
use crate::data::{AddSpecial, SpecialTokens};
use crate::evaluate::evaluate;
use crate::train::{Budget, Schedule};
use std::fs;

const SHAPE: &str = r#"
model_type = "qwen3"
vocabulary = 300
hidden_size = 32
intermediate_size = 64
layers = 2
attention_heads = 4
key_value_heads = 2
head_dim = 8
max_positions = 64
chat_template = "chat.jinja"

[special_tokens]
eos = "<|end|>"
extra = ["<|turn|>", "<|done|>"]
stop = ["<|done|>"]
"#;

const TEMPLATE: &str = "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|done|>\n{% endfor %}\
{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}";

/// A shape, its chat template and a little text.
fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| fs::write(home.path().join(name), text).expect("written");
    write("shape.toml", SHAPE);
    write("chat.jinja", TEMPLATE);
    let mut lines = String::new();
    for index in 0..160 {
        let (animal, place) = (
            ["cat", "dog", "owl", "fox"][index % 4],
            ["house", "forest", "garden"][index % 3],
        );
        let record = match index % 5 {
            0 => serde_json::json!({"messages": [
                {"role": "user", "content": format!("Where is the {animal}?")},
                {"role": "assistant", "content": format!("The {animal} is in the {place}, 20{index} 🦉.")},
            ]}),
            _ => {
                serde_json::json!({"text": format!("The {animal} went to the {place}. There the {animal} slept.")})
            }
        };
        lines += &format!("{record}\n");
    }
    write("text.jsonl", &lines);
    home
}

fn options(home: &Path) -> Result<PretrainOptions> {
    Ok(PretrainOptions {
        shape: Shape::read(&home.join("shape.toml"))?,
        data: vec![home.join("text.jsonl")],
        skip_bad: 0,
        length: 32,
        eval_fraction: Some(0.1),
        seed: 0,
    })
}

fn training() -> TrainOptions {
    TrainOptions {
        budget: Budget::Steps(12),
        batch_size: 8,
        learning_rate: 2e-2,
        schedule: Schedule::Cosine,
        warmup_steps: 2,
        weight_decay: 0.1,
        ..TrainOptions::default()
    }
}

/// Makes a base and returns what was told of its losses.
fn run(options: &PretrainOptions, out: &Path, run: &Path) -> Result<(Pretrained, Vec<f64>)> {
    let mut losses = Vec::new();
    let pretraining = Pretraining::prepare(options.clone(), out)?;
    let pretrained = pretraining.train(&training(), run, Start::Fresh, &mut |event| {
        if let Event::Step(report) = event {
            losses.push(report.loss);
        }
        Ok(Control::Continue)
    })?;
    Ok((pretrained, losses))
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).expect("a folder");
    entries
        .map(|entry| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, fs::read(entry.path()).expect("a file"))
        })
        .collect()
}

#[test]
fn a_base_learns_and_loads_again() -> Result<()> {
    let home = home();
    let (options, out) = (options(home.path())?, home.path().join("base"));
    let (pretrained, losses) = run(&options, &out, &home.path().join("run"))?;
    assert_eq!(losses.len(), 12);
    assert!(
        losses[0] > 5.0 && losses[11] < losses[0] - 1.0,
        "{losses:?}"
    );

    let names: Vec<String> = files(&out).into_keys().collect();
    let expected = [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);

    let tokenizer = Tokenizer::load(&out)?;
    let model = model::load(
        &out,
        &NoAdapter,
        AdapterWeights::fresh(0, &Device::Cpu),
        None,
    )?;
    assert_eq!(model.config.dtype, Some(DType::BF16));
    let (_, held_out) = segments(&options, &tokenizer)?;
    let held_out = held_out.expect("a share is held out");
    let again = evaluate(model.decoder.as_ref(), &held_out, 256, &mut |_| {})?.loss;
    let best = pretrained.state.best.expect("it was scored").loss;
    assert!((again - best).abs() < 0.01, "{again} is not {best}");
    Ok(())
}

#[test]
fn a_tied_head_gets_the_gradients_of_both_uses() -> Result<()> {
    use crate::adapters::hooks::Mode;
    use crate::data::{Example, collate};
    use crate::train::{Gradients, Recompute, accumulate};
    let home = home();
    let options = options(home.path())?;
    vocabulary::write_tokenizer(
        home.path(),
        &options.shape,
        vocabulary::texts(&options.shape, &options.data)?,
    )?;
    let model = random_model(home.path(), &options, &Tokenizer::load(home.path())?)?;
    let example = Example::new(vec![5, 9, 5, 17, 40], vec![true; 5]);
    let batch = collate(&[&example]);
    let loss = |gradients: &mut Gradients| {
        accumulate(
            model.decoder.as_ref(),
            &model.weights,
            &batch,
            Mode::Infer,
            Recompute::Never,
            gradients,
        )
    };
    let mut gradients = Gradients::new();
    loss(&mut gradients)?;
    let name = "base_model.model.model.embed_tokens.weight";
    let table = model.weights.get(name).expect("the embedding is trained");
    assert!(
        model
            .weights
            .get("base_model.model.lm_head.weight")
            .is_none()
    );
    let gradient: Vec<Vec<f32>> = gradients[name].to_vec2()?;
    let start: Vec<Vec<f32>> = table.to_vec2()?;
    // 5 is read and predicted, 40 is only predicted, 3 is neither.
    for (token, feature) in [(5, 0), (9, 7), (40, 3), (3, 1)] {
        let at = |step: f32| -> Result<f64> {
            let mut moved = start.clone();
            moved[token][feature] += step;
            table.set(&Tensor::new(moved, &Device::Cpu)?)?;
            loss(&mut Gradients::new())
        };
        let step = 2e-3;
        let slope = (at(step)? - at(-step)?) / f64::from(2.0 * step);
        let found = f64::from(gradient[token][feature]);
        assert!(
            (slope - found).abs() < 2e-3 + 0.02 * slope.abs(),
            "token {token}: {found}, differences say {slope}"
        );
    }
    Ok(())
}

#[test]
fn the_same_run_gives_the_same_bytes_on_any_number_of_threads() -> Result<()> {
    let home = home();
    let options = options(home.path())?;
    let made = |threads: usize| {
        let out = home.path().join(format!("base-{threads}"));
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("threads");
        pool.install(|| run(&options, &out, &home.path().join(format!("run-{threads}"))))?;
        Ok::<_, Error>(files(&out))
    };
    let (one, two) = (made(1)?, made(2)?);
    for (name, bytes) in &one {
        assert!(two[name] == *bytes, "`{name}` differs");
    }
    Ok(())
}

#[test]
fn any_text_comes_back_from_its_tokens() -> Result<()> {
    let home = home();
    let shape = Shape::read(&home.path().join("shape.toml"))?;
    let texts = vocabulary::texts(&shape, &[home.path().join("text.jsonl")])?;
    assert!(
        texts.pieces.iter().all(|text| !text.contains("<|")),
        "special tokens stand between texts"
    );
    vocabulary::write_tokenizer(home.path(), &shape, texts)?;
    let tokenizer = Tokenizer::load(home.path())?;
    assert_eq!(tokenizer.vocabulary_size(), 300);
    for text in [
        "The cat went.",
        "  两只老虎，跑得快\n\n\t",
        "🦉👩‍👩‍👧 naïve\r\n",
        "I'LL pay 1234€",
        "e\u{301}\0\u{ffff}",
    ] {
        let tokens = tokenizer.encode(text, AddSpecial::Yes)?;
        assert_eq!(tokenizer.decode(&tokens, SpecialTokens::Keep)?, text);
    }
    // Digits stand alone.
    assert_eq!(tokenizer.encode("20", AddSpecial::No)?.len(), 2);
    assert_eq!(tokenizer.encode("<|turn|>", AddSpecial::No)?.len(), 1);
    assert_eq!(tokenizer.stop_tokens().len(), 2);
    Ok(())
}

#[test]
fn too_little_text_for_the_vocabulary_is_refused() -> Result<()> {
    let home = home();
    fs::write(home.path().join("shape.toml"), SHAPE.replace("300", "3000")).expect("written");
    let error = run(
        &options(home.path())?,
        &home.path().join("base"),
        &home.path().join("run"),
    );
    let error = error.expect_err("the text is too small");
    assert!(
        error.to_string().contains("`vocabulary` is 3000"),
        "{error}"
    );
    assert!(
        error
            .hint_text()
            .is_some_and(|hint| hint.contains("vocabulary = "))
    );
    Ok(())
}

#[test]
fn text_that_is_no_record_is_named_by_line() -> Result<()> {
    let home = home();
    let data = home.path().join("text.jsonl");
    let records = fs::read_to_string(&data).expect("read");
    let error = |text: String, shape: String| -> Result<Error> {
        fs::write(&data, text).expect("written");
        fs::write(home.path().join("shape.toml"), shape).expect("written");
        let options = options(home.path())?;
        let (out, folder) = (home.path().join("base"), home.path().join("run"));
        Ok(run(&options, &out, &folder).expect_err("no record"))
    };
    let plain = "\nIt was a dark night.\nAnd a stormy one.\n";
    let first = format!("{}:2: not valid JSON at column 1", data.display());
    let none = error(plain.to_owned(), SHAPE.to_owned())?;
    assert!(none.to_string().starts_with(&first), "{none}");
    assert!(
        none.hint_text()
            .is_some_and(|hint| hint.contains("JSON lines")),
        "{none:?}"
    );

    let few = error(format!("{plain}{records}"), SHAPE.replace("300", "3000"))?.to_string();
    assert!(few.contains("`vocabulary` is 3000; 2 records"), "{few}");
    assert!(few.contains(&first), "{few}");
    Ok(())
}

#[test]
fn a_resumed_run_ends_as_the_uninterrupted_one() -> Result<()> {
    let home = home();
    let options = options(home.path())?;
    let (whole, parts) = (home.path().join("whole"), home.path().join("parts"));
    run(&options, &whole, &home.path().join("run-1"))?;
    let folder = home.path().join("run-2");
    let stopped = Pretraining::prepare(options.clone(), &parts)?.train(
        &training(),
        &folder,
        Start::Fresh,
        &mut |event| {
            Ok(match event {
                Event::Step(report) if report.step == 5 => Control::Stop,
                _ => Control::Continue,
            })
        },
    )?;
    assert_eq!(stopped.outcome, Outcome::Interrupted);
    assert!(!parts.exists());
    let rest = Pretraining::prepare(options, &parts)?;
    rest.train(&training(), &folder, Start::Checkpoint, &mut |_| {
        Ok(Control::Continue)
    })?;
    for (name, bytes) in files(&whole) {
        assert!(files(&parts)[&name] == bytes, "`{name}` differs");
    }
    Ok(())
}
