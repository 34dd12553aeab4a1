//! Every parser on damaged and on hostile files: `Ok` or `Err`, never a panic, and soon.
//!
//! First what is kept in `fuzz/corpus/`, then valid files with seeded changes. A case that fails is left in the file
//! that the failure names; `cargo fuzz run` takes it as it is.

#[path = "hostile/bodies.rs"]
mod bodies;
#[path = "hostile/changes.rs"]
mod changes;
mod golden;
#[path = "hostile/resume.rs"]
mod resume;

use changes::{Form, changed, framed};
use flate2::Compression;
use flate2::write::GzEncoder;
use golden::golden;
use retune::data::{AddSpecial, DataOptions, Dataset, Layout, Learn, Tokenizer, read_prompts};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};

/// Changed files for each parser: what a slow machine reads in a few seconds.
const MANY: u64 = 1500;
/// The same for parsers behind which a model is loaded.
const FEW: u64 = 500;
/// No case may take longer, not even a chat template that uses up what it is allowed on every record.
const LONGEST: Duration = Duration::from_secs(60);

/// Runs `body` on what is kept for `target`, on the valid files, and on `cases` changed ones.
fn survive(target: &str, body: fn(&[u8]) -> bool, valid: &[(Form, &[u8])], cases: u64) {
    for (_, bytes) in valid {
        assert!(body(bytes), "a valid file for `{target}` is refused");
    }
    let mut all = kept(target);
    for (seed, (form, bytes)) in (0..cases).zip(valid.iter().cycle()) {
        all.push((format!("seed-{seed}"), changed(bytes, *form, seed)));
    }
    let mut failures = Vec::new();
    for (case, bytes) in &all {
        let left = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-{case}"));
        // Before it is read: a case that ends the process is left there too.
        fs::write(&left, bytes).expect("written");
        match failure(body, bytes) {
            Some(why) => failures.push(format!("{}: {why}", left.display())),
            None => fs::remove_file(&left).expect("removed"),
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {} cases for `{target}`:\n{}",
        failures.len(),
        all.len(),
        failures.join("\n")
    );
}

/// The files kept for `target`: those with an extension. The fuzzer's own have none.
fn kept(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    assert!(folder.is_dir(), "no {}", folder.display());
    let Ok(entries) = fs::read_dir(folder.join(target)) else {
        return Vec::new();
    };
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some())
        .map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            (name.into_owned(), fs::read(&path).expect("a case"))
        })
        .collect();
    files.sort();
    files
}

/// Why a case fails, if it does.
fn failure(body: fn(&[u8]) -> bool, bytes: &[u8]) -> Option<String> {
    let started = Instant::now();
    let ended = catch_unwind(|| body(bytes));
    let time = started.elapsed();
    match ended {
        Ok(_) => (time > LONGEST).then(|| format!("took {time:?}")),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Some(text.unwrap_or("a panic").to_owned())
        }
    }
}

/// The texts at `path` in the fixtures of chat templates: `*` stands for every element.
fn fixtures(path: &[&str]) -> Vec<Vec<u8>> {
    fn collect(value: &Value, path: &[&str], found: &mut Vec<Vec<u8>>) {
        match path {
            [] => found.push(match value {
                Value::String(text) => text.clone().into_bytes(),
                other => other.to_string().into_bytes(),
            }),
            ["*", rest @ ..] => {
                for value in value.as_array().expect("a list") {
                    collect(value, rest, found);
                }
            }
            [name, rest @ ..] => collect(&value[*name], rest, found),
        }
    }
    let text = fs::read(golden("chat_templates.json")).expect("the fixtures");
    let fixtures = serde_json::from_slice(&text).expect("JSON");
    let mut found = Vec::new();
    collect(&fixtures, path, &mut found);
    found
}

fn all_of(form: Form, files: &[Vec<u8>]) -> Vec<(Form, &[u8])> {
    files.iter().map(|bytes| (form, bytes.as_slice())).collect()
}

#[test]
fn any_weights_of_a_model() {
    let valid = [(Form::Safetensors, bodies::WEIGHTS)];
    survive("checkpoint", bodies::checkpoint, &valid, FEW);
}

#[test]
fn any_index_of_shards() {
    survive("index", bodies::index, &[(Form::Json, bodies::INDEX)], FEW);
}

#[test]
fn any_configuration_of_a_model() {
    survive(
        "config",
        bodies::config,
        &[(Form::Json, bodies::CONFIG)],
        MANY,
    );
}

#[test]
fn any_settings_for_generation() {
    let valid = [(Form::Json, bodies::GENERATION_CONFIG)];
    survive("generation_config", bodies::generation_config, &valid, MANY);
}

#[test]
fn any_tokenizer() {
    let mut files = fixtures(&["tokenizers", "byte_level"]);
    files.extend(fixtures(&["tokenizers", "byte_fallback"]));
    let mut valid = all_of(Form::Json, &files);
    valid.push((Form::Json, bodies::TOKENIZER));
    survive("tokenizer", bodies::tokenizer, &valid, MANY);
}

#[test]
fn a_tokenizer_that_asks_for_too_much_is_refused_soon() {
    let with = |part: &str, value: Value| {
        let mut json: Value = serde_json::from_slice(bodies::TOKENIZER).expect("JSON");
        json[part] = value;
        Tokenizer::new(json.to_string().as_bytes(), &serde_json::Map::new())
    };
    let replace = |pattern: Value, content: &str| serde_json::json!({"type": "Replace", "pattern": pattern, "content": content});
    let normalizers =
        |steps: Vec<Value>| serde_json::json!({"type": "Sequence", "normalizers": steps});
    let text = |text: &str| serde_json::json!({"String": text});
    let pattern = |pattern: &str| serde_json::json!({"Regex": pattern});
    let double = || replace(text("w"), "ww");
    let started = Instant::now();
    let nested = (0..20).fold(double(), |inside, _| normalizers(vec![inside]));
    let split = serde_json::json!({"type": "Split", "pattern": pattern(&"a".repeat(5000)), "behavior": "Isolated", "invert": false});
    // No trie, and one text of 900 bytes.
    let table = format!("AAAAAGFh{}", "YWFh".repeat(300));
    for (part, value, named) in [
        ("normalizer", nested, "nested"),
        ("normalizer", normalizers(vec![double(); 100]), "64 steps"),
        (
            "normalizer",
            replace(text("w"), &"w".repeat(100)),
            "a replacement",
        ),
        (
            "normalizer",
            replace(pattern(&"(a|".repeat(2000)), ""),
            "a pattern",
        ),
        (
            "normalizer",
            serde_json::json!({"type": "Precompiled", "precompiled_charsmap": table}),
            "an entry",
        ),
        ("pre_tokenizer", split, "a pattern"),
        (
            "decoder",
            serde_json::json!({"type": "Sequence", "decoders": vec![double(); 40]}),
            "`decoder` makes",
        ),
    ] {
        let error = with(part, value).map(drop).expect_err(named);
        assert!(error.to_string().contains(named), "{error}");
    }

    // Forty doublings are few steps: what they make of a text is watched.
    let doubling = with("normalizer", normalizers(vec![double(); 40])).expect("few steps");
    for words in ["w", &"w1 ".repeat(10_000)] {
        let error = doubling.encode(words, retune::data::AddSpecial::No);
        let error = error.expect_err("too long").to_string();
        assert!(error.contains("times as long"), "{error}");
    }
    assert!(doubling.encode("x", retune::data::AddSpecial::No).is_ok());
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("data.jsonl");
    fs::write(&file, r#"{"text": "w1"}"#).expect("written");
    let eos = serde_json::Map::from_iter([("eos_token".to_owned(), Value::from("</s>"))]);
    let mut json: Value = serde_json::from_slice(bodies::TOKENIZER).expect("JSON");
    json["normalizer"] = normalizers(vec![double(); 40]);
    let doubling = Tokenizer::new(json.to_string().as_bytes(), &eos).expect("few steps");
    let error = Dataset::load(&[file], &doubling, &DataOptions::default());
    let error = error.expect_err("too long").to_string();
    assert!(error.contains("data.jsonl:1: the normalisers"), "{error}");
    let time = started.elapsed();
    assert!(time < Duration::from_secs(20), "{time:?}");
}

#[test]
fn any_settings_of_a_tokenizer() {
    let template = serde_json::json!({
        "add_bos_token": true,
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
    });
    let template = template.to_string();
    let valid = [
        (Form::Json, bodies::TOKENIZER_CONFIG),
        (Form::Json, template.as_bytes()),
    ];
    survive("tokenizer_config", bodies::tokenizer_config, &valid, MANY);
}

#[test]
fn any_chat_template() {
    let mut files = fixtures(&["chats", "*", "marked"]);
    files.extend(fixtures(&["chats", "*", "plain"]));
    files.extend(fixtures(&["features", "*", "template"]));
    let mut valid = all_of(Form::Text, &files);
    valid.push((Form::Text, bodies::CHAT_TEMPLATE));
    survive("chat_template", bodies::chat_template, &valid, MANY);
}

#[test]
fn any_identity_of_an_adapter() {
    let identity = r#"{"retune_version": "0.1.0", "method": "lora", "base_fingerprint": "0"}"#;
    let valid = [(Form::Json, identity.as_bytes())];
    survive("identity", bodies::identity, &valid, FEW);
}

#[test]
fn any_shape_of_a_base() {
    let shape = include_bytes!("../examples/base/shape.toml");
    survive("shape", bodies::shape, &[(Form::Text, shape)], MANY);
}

#[test]
fn any_answer_of_a_hub() {
    let commit = "0".repeat(40);
    let listing =
        format!(r#"{{"sha": "{commit}", "siblings": [{{"rfilename": "README.md", "size": 3}}]}}"#);
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\nETag: \"abc\"\r\nX-Repo-Commit: {commit}\r\n\r\n{listing}",
        listing.len()
    );
    // No model has files that are all alike, so even this one is refused, but late.
    assert!(!bodies::hub(answer.as_bytes()));
    for seed in 0..FEW {
        let bytes = changed(answer.as_bytes(), Form::Text, seed);
        if let Some(why) = failure(bodies::hub, &bytes) {
            panic!("{why}: {}", String::from_utf8_lossy(&bytes));
        }
    }
}

#[test]
fn any_data() {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(bodies::RECORDS).expect("written");
    let gzip = gzip.finish().expect("written");
    let records: Vec<&str> = std::str::from_utf8(bodies::RECORDS)
        .expect("text")
        .lines()
        .collect();
    let array = format!("[{}]", records.join(",\n"));
    let valid = [
        (Form::JsonLines, bodies::RECORDS),
        (Form::Json, array.as_bytes()),
        (Form::Bytes, gzip.as_slice()),
    ];
    survive("data", bodies::data, &valid, MANY);
}

#[test]
fn a_line_without_end_is_refused_before_it_fills_the_memory() {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    let block = vec![b' '; 1 << 20];
    for _ in 0..300 {
        gzip.write_all(&block).expect("written");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("data.jsonl.gz");
    fs::write(&file, gzip.finish().expect("written")).expect("written");
    let tokenizer = Tokenizer::load(&golden("models/llama")).expect("a tokenizer");
    let error = Dataset::load(&[file], &tokenizer, &DataOptions::default())
        .map(drop)
        .expect_err("a line of 300 MiB");
    assert!(error.to_string().contains("longer than 256 MiB"), "{error}");

    // A shorter one is a record that can be left out.
    let file = folder.path().join("long.jsonl");
    let record = r#"{"prompt": "w1", "completion": " w2"}"#;
    let numbers = "0,".repeat(20 << 20);
    fs::write(&file, format!("{record}\n{{\"numbers\": [{numbers}0]}}\n")).expect("written");
    let skipping = DataOptions {
        skip_bad: 1,
        ..DataOptions::default()
    };
    let refused =
        |options: &DataOptions| Dataset::load(std::slice::from_ref(&file), &tokenizer, options);
    let error = refused(&DataOptions::default())
        .map(drop)
        .expect_err("40 MiB");
    assert!(
        error
            .to_string()
            .contains("long.jsonl:2: the record has 40 MiB"),
        "{error}"
    );
    assert_eq!(refused(&skipping).expect("the other record").len(), 1);

    // An array may be one line, as most programs write it.
    let file = folder.path().join("array.json");
    let mut array = String::from(r#"[{"prompt": "w1", "completion": " w2"}"#);
    array.extend(std::iter::repeat_n(' ', (256 << 20) + 2));
    array.push(']');
    fs::write(&file, array).expect("written");
    let data = Dataset::load(&[file], &tokenizer, &DataOptions::default()).expect("one record");
    assert_eq!(data.len(), 1);
}

#[test]
fn a_text_of_many_million_tokens_is_refused_before_it_is_made_tokens() {
    let tokenizer = Tokenizer::load(&golden("models/llama")).expect("a tokenizer");
    let long = "w1 ".repeat(2 << 20);
    let started = Instant::now();
    let refused = |error: retune::Error| {
        assert!(error.to_string().contains("has 6291456 bytes"), "{error}");
    };
    refused(tokenizer.encode(&long, AddSpecial::No).expect_err("6 MiB"));
    refused(tokenizer.encode_continuation(&long).expect_err("6 MiB"));
    refused(tokenizer.encode_with_offsets(&long).expect_err("6 MiB"));

    // All parts of a record count together.
    let half = &long[..long.len() / 2];
    let messages = serde_json::json!([
        {"role": "user", "content": half},
        {"role": "assistant", "content": [{"type": "text", "text": half}]},
    ]);
    let records = [
        serde_json::json!({"text": "w1 w2"}),
        serde_json::json!({"text": long}),
        serde_json::json!({"prompt": half, "completion": half}),
        serde_json::json!({"instruction": half, "output": half}),
        serde_json::json!({"messages": messages}),
    ];
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    for record in records {
        writeln!(gzip, "{record}").expect("written");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("data.jsonl.gz");
    fs::write(&file, gzip.finish().expect("written")).expect("written");
    let load = |skip_bad| {
        let options = DataOptions {
            skip_bad,
            ..DataOptions::default()
        };
        Dataset::load(std::slice::from_ref(&file), &tokenizer, &options)
    };
    let error = load(0).expect_err("four bad records");
    for line in 2..=5 {
        let named = format!("data.jsonl.gz:{line}: the text has");
        assert!(error.to_string().contains(&named), "{error}");
    }
    let hint = error.hint_text().unwrap_or_default();
    assert!(hint.contains("split the text"), "{hint}");
    assert!(hint.contains("--skip-bad-records 4"), "{hint}");
    assert_eq!(load(4).expect("one good record").len(), 1);
    let error = read_prompts(&file, Layout::Plain, &tokenizer, |_, _| Ok(()));
    let error = error.expect_err("a long record").to_string();
    assert!(error.contains("data.jsonl.gz:2: the text has"), "{error}");
    let time = started.elapsed();
    assert!(time < Duration::from_secs(20), "{time:?}");
}

#[test]
fn a_conversation_of_thousands_of_messages_takes_no_longer_than_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("data.jsonl");
    let messages: Vec<Value> = (0..20_000)
        .map(|index| {
            let role = if index % 2 == 0 { "user" } else { "assistant" };
            serde_json::json!({"role": role, "content": "w1"})
        })
        .collect();
    let record = serde_json::json!({"messages": messages});
    fs::write(&file, record.to_string()).expect("written");
    let tokenizer = Tokenizer::load(&golden("models/llama")).expect("a tokenizer");
    let load = |learn| {
        let options = DataOptions {
            learn,
            ..DataOptions::default()
        };
        Dataset::load(std::slice::from_ref(&file), &tokenizer, &options)
    };
    let started = Instant::now();
    let error = load(Learn::Completions).expect_err("the square of 20,000");
    assert!(error.to_string().contains("20000 messages"), "{error}");
    let hint = error.hint_text().unwrap_or_default();
    assert!(hint.contains("--learn all"), "{hint}");
    let data = load(Learn::All).expect("one record");
    assert!(data.examples[0].tokens.len() > 20_000);
    let time = started.elapsed();
    assert!(time < Duration::from_secs(20), "{time:?}");
}

#[test]
fn any_configuration_of_an_adapter() {
    let valid =
        [bodies::LORA, bodies::LAST_LAYERS, bodies::PROMPT].map(|(config, _)| (Form::Json, config));
    survive("adapter_config", bodies::adapter_config, &valid, FEW);
}

#[test]
fn any_weights_of_an_adapter() {
    let valid = [bodies::LORA, bodies::LAST_LAYERS, bodies::PROMPT]
        .map(|(_, weights)| (Form::Safetensors, weights));
    survive("adapter_weights", bodies::adapter_weights, &valid, FEW);
}

#[test]
fn any_order_of_the_examples() {
    let order = fs::read(golden("train/lora/order.txt")).expect("an order");
    survive(
        "order",
        bodies::order,
        &[(Form::Text, order.as_slice())],
        MANY,
    );
}

#[test]
fn any_record_of_a_run() {
    let valid = [(Form::JsonLines, bodies::METRICS)];
    survive("metrics_file", bodies::metrics_file, &valid, MANY);
}

#[test]
fn any_options_of_a_run() {
    let options =
        b"method = \"lora\"\nmodel = \"base\"\nepochs = 1.5\nsteps = 12\nlearning-rate = 5e-4\n";
    survive(
        "run_file",
        bodies::run_file,
        &[(Form::Text, options.as_slice())],
        MANY,
    );
}

#[test]
fn any_state_of_a_run() {
    let valid = [(Form::Json, bodies::saved("state.json"))];
    survive("state", bodies::state, &valid, FEW);
}

#[test]
fn any_checksums_of_a_run() {
    let valid = [(Form::Text, bodies::saved("SHA256SUMS"))];
    survive("sums", bodies::sums, &valid, FEW);
}

#[test]
fn headers_that_lie_about_sizes_are_refused() {
    for header in [
        r#"{"a":{"dtype":"F32","shape":[0,4294967296,8589934592],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
        r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#,
        r#"{"__metadata__":{"format":"pt"}}"#,
        "{}",
        "",
    ] {
        for data in [0, 8, 12] {
            let file = framed(header.as_bytes(), &vec![0; data]);
            assert!(!bodies::checkpoint(&file), "{header}");
            assert!(!bodies::adapter_weights(&file), "{header}");
        }
    }
    for length in [0, 1, 8, 1 << 32, 1 << 63, u64::MAX] {
        let file = [&length.to_le_bytes()[..], b"{}"].concat();
        assert!(!bodies::checkpoint(&file), "{length}");
        assert!(!bodies::adapter_weights(&file), "{length}");
    }
}
