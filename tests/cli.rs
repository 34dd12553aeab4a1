//! The program as a user meets it: what it writes, and what it says when something is wrong.

mod golden;

use assert_cmd::Command;
use golden::golden;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("written");
        path
    }

    /// Twenty good records.
    fn data(&self) -> PathBuf {
        let lines: Vec<String> = (0..20).map(record).collect();
        self.write("data.jsonl", &lines.join("\n"))
    }
}

fn record(index: usize) -> String {
    format!(
        r#"{{"prompt": "w{} w{} w5", "completion": " w{} w7"}}"#,
        index % 9,
        index % 7,
        index % 5
    )
}

struct Said {
    code: i32,
    out: String,
    err: String,
}

fn retune<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Said {
    let output = Command::cargo_bin("retune")
        .expect("built")
        .args(arguments)
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("started");
    Said {
        code: output.status.code().expect("ended by itself"),
        out: String::from_utf8(output.stdout).expect("UTF-8"),
        err: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Trains a LoRA on the golden llama for a few steps.
fn train(folder: &Folder, more: &[&str]) -> Said {
    let (data, out, model) = (
        folder.path("data.jsonl"),
        folder.path("out"),
        golden("models/llama"),
    );
    if !data.exists() {
        folder.data();
    }
    let mut arguments = vec![
        "train",
        "lora",
        "--model",
        text(&model),
        "--data",
        text(&data),
        "--out",
        text(&out),
    ];
    arguments.extend(["--steps", "4", "--batch-size", "4"]);
    arguments.extend(more);
    retune(arguments)
}

/// Asserts exit code, and that fact, place and hint are all there.
fn refused(said: &Said, code: i32, parts: &[&str]) {
    assert_eq!(said.code, code, "{}", said.err);
    for part in parts {
        assert!(said.err.contains(part), "no `{part}` in:\n{}", said.err);
    }
    assert!(!said.err.contains("panicked"), "{}", said.err);
}

fn no_adapter_in(out: &Path) {
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(!out.join(file).exists(), "{file} was left behind");
    }
}

#[test]
fn a_run_leaves_everything_it_promises() {
    let folder = Folder::new();
    let said = train(
        &folder,
        &[
            "--eval-fraction",
            "0.2",
            "--tensorboard",
            "--eval-every",
            "2",
        ],
    );
    assert_eq!(said.code, 0, "{}", said.err);
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "retune.json",
        "README.md",
        "run.toml",
        "metrics.jsonl",
        "loss.svg",
    ] {
        assert!(folder.path("out").join(file).exists(), "{file} is missing");
    }
    assert!(
        fs::read_dir(folder.path("out/tensorboard"))
            .expect("a folder")
            .count()
            > 0
    );
    let metrics = fs::read_to_string(folder.path("out/metrics.jsonl")).expect("metrics");
    let steps: Vec<serde_json::Value> = metrics
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let fields = [
        "step",
        "loss",
        "learning_rate",
        "gradient_norm",
        "target_tokens",
        "tokens_per_second",
        "peak_memory_bytes",
    ];
    let trained: Vec<_> = steps
        .iter()
        .filter(|line| line.get("loss").is_some())
        .collect();
    assert_eq!(trained.len(), 4);
    for field in fields {
        assert!(
            trained
                .iter()
                .all(|line| line[field].as_f64().is_some_and(|value| value > 0.0)),
            "{field}"
        );
    }
    assert_eq!(
        steps
            .iter()
            .filter(|line| line.get("eval_loss").is_some())
            .count(),
        3
    );
}

#[test]
fn the_run_file_repeats_the_run_to_the_byte() {
    let (folder, again) = (Folder::new(), Folder::new());
    let said = train(
        &folder,
        &[
            "--rank",
            "3",
            "--targets",
            "q_proj,v_proj",
            "--dropout",
            "0.1",
            "--learning-rate",
            "1e-3",
        ],
    );
    assert_eq!(said.code, 0, "{}", said.err);
    let (run, out) = (folder.path("out/run.toml"), again.path("again"));
    let said = retune(["train", "--config", text(&run), "--out", text(&out)]);
    assert_eq!(said.code, 0, "{}", said.err);
    let weights = |out: &Path| fs::read(out.join("adapter_model.safetensors")).expect("written");
    assert!(weights(&folder.path("out")) == weights(&out));
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    let (whole, halved) = (Folder::new(), Folder::new());
    let options = [
        "--eval-fraction",
        "0.2",
        "--eval-every",
        "2",
        "--save-every",
        "2",
        "--dropout",
        "0.2",
    ];
    assert_eq!(train(&whole, &options).code, 0);
    assert_eq!(train(&halved, &options).code, 0);
    // As if killed between the checkpoint of step 2 and the end.
    let out = halved.path("out");
    fs::remove_dir_all(out.join("checkpoints/step-000004")).expect("removed");
    fs::remove_file(out.join("adapter_model.safetensors")).expect("removed");
    let said = retune(["resume", text(&out)]);
    assert_eq!(said.code, 0, "{}", said.err);
    let read =
        |folder: &Folder, file: &str| fs::read(folder.path("out").join(file)).expect("written");
    assert!(
        read(&whole, "adapter_model.safetensors") == read(&halved, "adapter_model.safetensors")
    );
    let losses = |folder: &Folder| -> Vec<serde_json::Value> {
        let text = String::from_utf8(read(folder, "metrics.jsonl")).expect("UTF-8");
        text.lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"))
            .map(|line| serde_json::json!([line["step"], line["loss"], line["eval_loss"]]))
            .collect()
    };
    assert_eq!(losses(&whole), losses(&halved));
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_run_ends_as_the_whole_one() {
    let folder = Folder::new();
    let said = train(
        &folder,
        &["--eval-fraction", "0.2", "--save-every", "2", "--quiet"],
    );
    assert_eq!(said.code, 0, "{}", said.err);
    let out = folder.path("out");
    let adapter = out.join("adapter_model.safetensors");
    let whole = fs::read(&adapter).expect("written");
    let damage = |step: &str, file: &str| {
        let path = out.join("checkpoints").join(step).join(file);
        let bytes = fs::read(&path).expect("saved");
        fs::write(&path, &bytes[..bytes.len() / 2]).expect("written");
    };
    damage("step-000004", "optimizer.safetensors");
    fs::remove_file(&adapter).expect("removed");
    let said = retune(["resume", text(&out)]);
    assert_eq!(said.code, 0, "{}", said.err);
    for part in [
        "warning: ",
        "step-000004 is damaged (optimizer.safetensors: has ",
        "after step 2",
    ] {
        assert!(said.err.contains(part), "no `{part}` in:\n{}", said.err);
    }
    assert!(fs::read(&adapter).expect("written again") == whole);

    // Saved again by the run: from the last step there is nothing left to do but to write the adapter.
    fs::remove_file(&adapter).expect("removed");
    let said = retune(["resume", text(&out)]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(!said.err.contains("warning"), "{}", said.err);
    assert!(fs::read(&adapter).expect("written again") == whole);

    damage("step-000002", "state.json");
    damage("step-000004", "weights.safetensors");
    let both = ["step-000002 is damaged", "step-000004 is damaged", "hint: "];
    refused(&retune(["resume", text(&out)]), 1, &both);
}

#[test]
fn misspelt_targets_are_named_with_their_neighbours() {
    let folder = Folder::new();
    let said = train(&folder, &["--targets", "q_prj,v_proj"]);
    refused(
        &said,
        1,
        &[
            "error: no layer matches `q_prj`",
            "hint: the model has",
            "`q_proj`",
        ],
    );
    no_adapter_in(&folder.path("out"));
}

#[test]
fn data_that_is_not_json_is_named_by_line() {
    let folder = Folder::new();
    let mut lines: Vec<String> = (0..20).map(record).collect();
    lines[16] = r#"{"prompt": "w1", "completion""#.to_owned();
    folder.write("data.jsonl", &lines.join("\n"));
    let said = train(&folder, &[]);
    refused(
        &said,
        1,
        &["data.jsonl", "17", "hint:", "--skip-bad-records"],
    );
    no_adapter_in(&folder.path("out"));
    let said = train(&folder, &["--overwrite", "--skip-bad-records", "1"]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.err.contains("1 records skipped"), "{}", said.err);
}

#[test]
fn a_template_that_would_use_up_the_memory_ends_the_program_with_an_error() {
    let folder = Folder::new();
    let message = r#"{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}"#;
    folder.write("data.jsonl", &format!(r#"{{"messages": [{message}]}}"#));
    for doubled in [
        "text.x ~ text.x",
        "text.x + text.x",
        "[text.x, text.x] | join",
    ] {
        let template = folder.write(
            "chat.jinja",
            &format!(
                "{{% set text = namespace(x='retune') %}}\
                 {{% for _ in range(50) %}}{{% set text.x = {doubled} %}}{{% endfor %}}{{{{ text.x | length }}}}"
            ),
        );
        let said = train(
            &folder,
            &["--chat-template", text(&template), "--learn", "all"],
        );
        refused(
            &said,
            1,
            &[
                "error: the chat template needs more than 2 GiB of memory",
                "hint:",
            ],
        );
        no_adapter_in(&folder.path("out"));
    }
}

#[test]
fn a_record_without_a_target_is_named() {
    let folder = Folder::new();
    folder.write(
        "data.jsonl",
        r#"{"messages": [{"role": "user", "content": "w1 w2"}]}"#,
    );
    let said = train(&folder, &[]);
    refused(&said, 1, &["data.jsonl", "hint:"]);
    no_adapter_in(&folder.path("out"));
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let folder = Folder::new();
    assert_eq!(train(&folder, &[]).code, 0);
    let (other, adapter, data) = (
        golden("models/mistral"),
        folder.path("out"),
        folder.path("data.jsonl"),
    );
    let arguments = [
        "evaluate",
        "--model",
        text(&other),
        "--adapter",
        text(&adapter),
        "--data",
        text(&data),
    ];
    refused(
        &retune(arguments),
        1,
        &["trained on another base", "hint:", "--allow-other-base"],
    );
    let mut allowed = arguments.to_vec();
    allowed.push("--allow-other-base");
    assert_eq!(retune(allowed).code, 0);
}

/// A copy of the golden llama that a test may damage.
fn model_copy(folder: &Folder) -> PathBuf {
    let copy = folder.path("model");
    fs::create_dir(&copy).expect("made");
    for entry in fs::read_dir(golden("models/llama")).expect("a folder") {
        let path = entry.expect("an entry").path();
        fs::copy(&path, copy.join(path.file_name().expect("a name"))).expect("copied");
    }
    copy
}

#[test]
fn a_truncated_checkpoint_is_refused() {
    let folder = Folder::new();
    let (model, data) = (model_copy(&folder), folder.data());
    let weights = model.join("model.safetensors");
    let bytes = fs::read(&weights).expect("read");
    fs::write(&weights, &bytes[..bytes.len() / 2]).expect("written");
    let said = retune(["evaluate", "--model", text(&model), "--data", text(&data)]);
    refused(&said, 1, &["model.safetensors", "hint:"]);
}

#[test]
fn a_missing_tokenizer_is_named() {
    let folder = Folder::new();
    let (model, data) = (model_copy(&folder), folder.data());
    fs::remove_file(model.join("tokenizer.json")).expect("removed");
    let said = retune(["evaluate", "--model", text(&model), "--data", text(&data)]);
    refused(&said, 1, &["tokenizer.json", "hint:"]);
}

#[test]
fn an_unwritable_output_folder_is_refused_before_any_work() {
    let folder = Folder::new();
    let (data, file, model) = (
        folder.data(),
        folder.write("file", "x"),
        golden("models/llama"),
    );
    let out = file.join("out");
    let said = retune([
        "train",
        "lora",
        "--model",
        text(&model),
        "--data",
        text(&data),
        "--out",
        text(&out),
        "--steps",
        "1",
    ]);
    refused(&said, 1, &["file"]);
    assert!(!said.err.contains("step"), "{}", said.err);
}

#[cfg(unix)]
#[test]
fn a_disk_that_fills_up_while_saving_leaves_nothing_half_written() {
    let folder = Folder::new();
    let (data, out, model) = (folder.data(), folder.path("out"), golden("models/llama"));
    let binary = assert_cmd::cargo::cargo_bin("retune");
    // No file may grow past 8 KiB: small ones pass, the adapter's weights do not.
    let script = format!(
        "trap '' XFSZ; ulimit -f 16; exec {} train lora --model {} --data {} --out {} --steps 2",
        binary.display(),
        model.display(),
        data.display(),
        out.display()
    );
    let output = std::process::Command::new("sh")
        .arg("-c")
        .arg(script)
        .output()
        .expect("started");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("adapter_model.safetensors"), "{err}");
    no_adapter_in(&out);
    let left: Vec<_> = fs::read_dir(&out)
        .expect("a folder")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .filter(|name| name.ends_with(".partial"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    // The same command works when there is room again.
    let said = train(&folder, &["--steps", "2"]);
    assert_eq!(said.code, 0, "{}", said.err);
}

#[test]
fn work_is_not_lost_when_the_end_of_a_run_cannot_be_written() {
    let folder = Folder::new();
    let obstacle = folder.path("out/README.md");
    fs::create_dir_all(&obstacle).expect("a folder");
    let said = train(&folder, &[]);
    refused(&said, 1, &["README.md", "retune resume"]);
    fs::remove_dir(&obstacle).expect("removed");
    let out = folder.path("out");
    let said = retune(["resume", text(&out)]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(obstacle.is_file() && !out.join("checkpoints").exists());
    refused(
        &retune(["resume", text(&out)]),
        1,
        &["finished", "--init-adapter"],
    );
}

#[test]
fn a_start_that_fails_leaves_the_folder_as_it_was() {
    let folder = Folder::new();
    let said = train(&folder, &["--targets", "q_porj"]);
    refused(&said, 1, &["q_porj"]);
    let said = train(&folder, &[]);
    assert_eq!(said.code, 0, "{}", said.err);

    let files = || {
        let mut names: Vec<_> = fs::read_dir(folder.path("out"))
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        names.sort();
        let weights = fs::read(folder.path("out/adapter_model.safetensors"));
        (names, weights.expect("the adapter"))
    };
    let before = files();
    let said = train(&folder, &["--overwrite", "--data", "nowhere.jsonl"]);
    refused(&said, 1, &["nowhere.jsonl"]);
    assert!(files() == before, "the old adapter is gone");
}

#[test]
fn a_run_is_resumed_from_anywhere_but_only_on_what_it_was_trained_on() {
    let folder = Folder::new();
    folder.data();
    let model = golden("models/llama");
    let run = |folder: &Path, arguments: &[&str]| {
        let output = Command::cargo_bin("retune")
            .expect("built")
            .current_dir(folder)
            .args(arguments)
            .output()
            .expect("started");
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), err)
    };
    let here = folder.0.path();
    let (code, err) = run(
        here,
        &[
            "train",
            "lora",
            "--model",
            text(&model),
            "--data",
            "data.jsonl",
            "--out",
            "out",
            "--steps",
            "4",
            "--save-every",
            "2",
        ],
    );
    assert_eq!(code, Some(0), "{err}");
    let back = || fs::remove_dir_all(folder.path("out/checkpoints/step-000004")).expect("removed");
    back();
    let whole = fs::read(folder.path("data.jsonl")).expect("the data");
    folder.write("data.jsonl", &record(1));
    let (code, err) = run(Path::new("/"), &["resume", text(&folder.path("out"))]);
    assert_eq!(code, Some(1));
    assert!(err.contains("the training data has changed"), "{err}");
    fs::write(folder.path("data.jsonl"), whole).expect("written");
    let (code, err) = run(Path::new("/"), &["resume", text(&folder.path("out"))]);
    assert_eq!(code, Some(0), "{err}");
}

#[test]
fn wrong_usage_has_its_own_exit_code() {
    refused(&retune(["train", "lora", "--rnk", "4"]), 2, &["--rank"]);
    refused(&retune(["train", "lorra"]), 2, &["lora"]);
    let folder = Folder::new();
    refused(&train(&folder, &["--batch-size", "0"]), 2, &["batch-size"]);
    refused(&train(&folder, &["--threads", "100000"]), 2, &["1024"]);
    refused(
        &train(&folder, &["--memory-limit", "3"]),
        1,
        &["--memory-limit", "needs about"],
    );
    refused(&train(&folder, &["--patience", "2"]), 2, &["--eval-data"]);
    let adapter = golden("adapters/lora-llama");
    let typed = ["--init-adapter", text(&adapter), "--rank", "64"];
    refused(&train(&folder, &typed), 2, &["--rank"]);
    refused(
        &train(&folder, &["--overwrite", "--dropout", "1.5"]),
        2,
        &["dropout"],
    );
    for (option, value, said) in [
        ("--alpha", "0", "above 0, not 0"),
        ("--alpha", "-4", "above 0, not -4"),
        ("--alpha", "inf", "a finite number, not inf"),
        ("--alpha-pattern", "q_proj=nan", "a finite number, not NaN"),
    ] {
        refused(&train(&folder, &["--overwrite", option, value]), 2, &[said]);
    }
    no_adapter_in(&folder.path("out"));
}

#[test]
fn targets_and_patterns_without_effect_are_named() {
    let folder = Folder::new();
    let said = train(
        &folder,
        &["--targets", "q_proj,embed_tokens", "--layers", "1"],
    );
    refused(
        &said,
        1,
        &["`--layers 1` leaves nothing of `embed_tokens`", "hint:"],
    );
    let beside = [
        "--overwrite",
        "--targets",
        "q_proj",
        "--rank-pattern",
        "k_proj=3",
    ];
    refused(
        &train(&folder, &beside),
        1,
        &[
            "`k_proj` of `--rank-pattern` matches none of the adapted layers",
            "hint: adapted are `q_proj`",
        ],
    );
    no_adapter_in(&folder.path("out"));
}

/// Trains a soft prompt on the golden llama, which has 64 positions.
fn train_prompt(folder: &Folder, more: &[&str]) -> Said {
    let (data, out, model) = (folder.data(), folder.path("out"), golden("models/llama"));
    let mut arguments = vec![
        "train",
        "prompt",
        "--model",
        text(&model),
        "--data",
        text(&data),
    ];
    arguments.extend(["--out", text(&out), "--steps", "1", "--overwrite"]);
    arguments.extend(more);
    retune(arguments)
}

#[test]
fn a_prompt_that_cannot_be_meant_is_refused() {
    let folder = Folder::new();
    refused(
        &train_prompt(&folder, &["--virtual-tokens", "64"]),
        1,
        &[
            "a prompt of 64 rows leaves no room in a model of 64 positions",
            "hint:",
        ],
    );
    refused(
        &train_prompt(&folder, &["--start", "random", "--start-text", "w1"]),
        2,
        &["`--start random` and `--start-text`", "hint:"],
    );
    no_adapter_in(&folder.path("out"));
}

#[test]
fn a_memory_limit_makes_passes_smaller_and_changes_nothing_else() {
    let folder = Folder::new();
    let options = [
        "--batch-size",
        "2000",
        "--steps",
        "2",
        "--overwrite",
        "--json",
    ];
    let free = train(&folder, &options);
    let limited = train(&folder, &[&options[..], &["--memory-limit", "50"]].concat());
    assert_eq!(
        (free.code, limited.code),
        (0, 0),
        "{}{}",
        free.err,
        limited.err
    );
    assert!(!free.err.contains("computed again"), "{}", free.err);
    assert!(
        limited.err.contains("blocks are computed again"),
        "{}",
        limited.err
    );
    let of = |said: &Said, name: &str| {
        let result: serde_json::Value = serde_json::from_str(&said.out).expect("JSON");
        result[name].as_f64().expect("a number")
    };
    let difference = of(&free, "last_loss") - of(&limited, "last_loss");
    assert!(difference.abs() < 1e-5, "{difference}");
    let peaks = (
        of(&free, "peak_memory_bytes"),
        of(&limited, "peak_memory_bytes"),
    );
    assert!(peaks.1 < peaks.0, "{peaks:?}");
}

#[test]
fn a_plan_knows_what_training_then_finds() {
    let folder = Folder::new();
    let (data, out, model) = (folder.data(), folder.path("out"), golden("models/llama"));
    let options = [
        "train",
        "lora",
        "--model",
        text(&model),
        "--data",
        text(&data),
        "--out",
        text(&out),
        "--json",
        "--quiet",
        "--steps",
        "4",
    ];
    let planned = retune(["plan"].into_iter().chain(options));
    assert_eq!(planned.code, 0, "{}", planned.err);
    assert!(!out.exists(), "a plan writes nothing");
    let trained = retune(options);
    assert_eq!(trained.code, 0, "{}", trained.err);
    let json = |said: &Said| serde_json::from_str::<serde_json::Value>(&said.out).expect("JSON");
    let (planned, trained) = (json(&planned), json(&trained));
    assert_eq!(planned["trained_parameters"], trained["trained_weights"]);
    assert_eq!(planned["steps"], 4);
    let share = |name: &str| {
        planned[name].as_f64().expect("a number") / trained[name].as_f64().expect("a number")
    };
    // The program itself is nearly all of it here, and that depends on how it was built.
    assert!(
        (0.4..2.5).contains(&share("peak_memory_bytes")),
        "{planned} {trained}"
    );
}

#[test]
fn score_prints_a_line_for_each_record() {
    let folder = Folder::new();
    let (data, model) = (folder.data(), golden("models/llama"));
    let said = retune(["score", "--model", text(&model), "--data", text(&data)]);
    assert_eq!(said.code, 0, "{}", said.err);
    let lines: Vec<serde_json::Value> = said
        .out
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), 20);
    for line in lines {
        let length = line["tokens"].as_array().expect("tokens").len();
        let logprobs = line["logprobs"].as_array().expect("logprobs");
        assert_eq!(
            (
                logprobs.len(),
                line["target"].as_array().expect("target").len()
            ),
            (length, length)
        );
        assert!(
            logprobs[0].is_null()
                && logprobs[1..]
                    .iter()
                    .all(|value| value.as_f64().is_some_and(|value| value < 0.0))
        );
    }
}

#[test]
fn compare_puts_the_base_first_and_every_method_after_it() {
    let folder = Folder::new();
    let (data, out, model) = (
        folder.data(),
        folder.path("comparison"),
        golden("models/llama"),
    );
    let said = retune([
        "compare",
        "--model",
        text(&model),
        "--data",
        text(&data),
        "--unrelated",
        text(&data),
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--with",
        "lora --rank 2",
        "--methods",
        "prompt,last-layers",
        "--seeds",
        "1,2",
        "--out",
        text(&out),
    ]);
    assert_eq!(said.code, 0, "{}", said.err);
    let results: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("results.json")).expect("written"))
            .expect("JSON");
    let methods: Vec<&str> = results["rows"]
        .as_array()
        .expect("rows")
        .iter()
        .filter_map(|row| row["method"].as_str())
        .collect();
    assert_eq!(
        methods,
        [
            "base",
            "prompt",
            "prompt",
            "last-layers",
            "last-layers",
            "lora --rank 2",
            "lora --rank 2"
        ]
    );
    let table: Vec<&str> = said.out.lines().collect();
    assert!(
        table.iter().any(|line| line.contains("base")) && said.out.contains("±"),
        "{}",
        said.out
    );
    assert!(out.join("comparison.svg").exists());
}

/// Compares on the golden llama for one step.
fn compare(folder: &Folder, more: &[&str]) -> Said {
    let (data, out, model) = (
        folder.data(),
        folder.path("comparison"),
        golden("models/llama"),
    );
    let mut arguments = vec!["compare", "--model", text(&model), "--data", text(&data)];
    arguments.extend([
        "--out",
        text(&out),
        "--steps",
        "1",
        "--batch-size",
        "4",
        "--quiet",
    ]);
    arguments.extend(more);
    retune(arguments)
}

#[test]
fn a_row_that_would_come_twice_is_refused() {
    let folder = Folder::new();
    let cases: [(&[&str], &str); 4] = [
        (
            &["--methods", "lora,lora"],
            "the method `lora` is given twice",
        ),
        (
            &["--methods", "lora", "--with", " lora "],
            "the method `lora` is given twice",
        ),
        (
            &["--with", "lora --rank 2", "--with", "lora  --rank 2"],
            "the method `lora --rank 2` is given twice",
        ),
        (&["--seeds", "1,2,1"], "the seed `1` is given twice"),
    ];
    for (options, named) in cases {
        refused(&compare(&folder, options), 2, &[named]);
    }
    assert!(!folder.path("comparison").exists());
}

#[test]
fn a_comparison_says_what_it_compared_and_is_replaced_when_told() {
    let folder = Folder::new();
    let results = || -> serde_json::Value {
        let file = folder.path("comparison/results.json");
        serde_json::from_slice(&fs::read(file).expect("written")).expect("JSON")
    };
    let adapter = |name: &str| {
        folder
            .path("comparison")
            .join(name)
            .join("adapter_config.json")
            .exists()
    };
    let data = folder.path("data.jsonl");
    // Two names that differ in signs alone.
    let said = compare(
        &folder,
        &[
            "--with",
            "lora --targets .*q_proj",
            "--with",
            "lora --targets .+q_proj",
            "--unrelated",
            text(&data),
        ],
    );
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(!said.out.contains("-0.0000"), "{}", said.out);
    let found = results();
    assert_eq!(found["retune_version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(found["data"], serde_json::json!([text(&data)]));
    assert_eq!(found["eval_data"], serde_json::json!([]));
    assert_eq!(found["eval_fraction"], 0.1);
    assert_eq!(found["unrelated"], serde_json::json!([text(&data)]));
    assert_eq!(found["seeds"], serde_json::json!([0]));
    assert_eq!(found["steps"], 1);
    assert_eq!(found["batch_size"], 4);
    let names = ["lora_--targets___q_proj", "lora_--targets___q_proj_"];
    for (row, name) in names.iter().enumerate() {
        assert_eq!(found["rows"][row + 1]["adapter"], *name);
        assert!(adapter(name), "{name}");
    }

    fs::write(folder.path("comparison/notes.txt"), "mine").expect("written");
    let again = ["--methods", "prompt"];
    let said = compare(&folder, &again);
    refused(&said, 1, &["already holds a comparison", "`--overwrite`"]);
    assert!(adapter(names[0]));
    let said = compare(&folder, &["--methods", "prompt", "--overwrite"]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert_eq!(results()["rows"][1]["method"], "prompt");
    assert!(adapter("prompt") && !names.iter().any(|name| adapter(name)));
    assert!(folder.path("comparison/notes.txt").exists());
}

#[cfg(unix)]
#[test]
fn a_reader_who_leaves_is_no_error() {
    let model = golden("models/llama");
    let model = model.to_string_lossy();
    for arguments in [vec!["inspect", &model], vec!["completions", "bash"]] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = std::process::Command::new(assert_cmd::cargo::cargo_bin("retune"))
            .args(&arguments)
            .stdout(writer)
            .output()
            .expect("started");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.is_empty(),
            "{arguments:?}: {said}"
        );
    }
}

/// What a comparison found, but for times, speeds and memory.
fn lasting(out: &Path) -> serde_json::Value {
    let text = fs::read(out.join("results.json")).expect("written");
    let mut results: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    for row in results["rows"].as_array_mut().expect("rows") {
        for passing in ["tokens_per_second", "seconds", "peak_memory_bytes"] {
            row[passing] = serde_json::Value::Null;
        }
    }
    results
}

#[test]
fn an_interrupted_comparison_resumes_to_the_same_bytes() {
    let folder = Folder::new();
    let (whole, halved) = (folder.path("comparison"), folder.path("halved"));
    let mut options = vec!["--methods", "lora,prompt", "--steps", "4"];
    options.extend(["--eval-every", "1", "--save-every", "2"]);
    let said = compare(&folder, &options);
    assert_eq!(said.code, 0, "{}", said.err);

    // As if killed in the second row, after the checkpoint of step 2: its adapter cannot be written.
    options.extend(["--out", text(&halved)]);
    let obstacle = halved.join("prompt/retune.json");
    fs::create_dir_all(&obstacle).expect("a folder");
    let said = compare(&folder, &[&options[..], &["--overwrite"]].concat());
    refused(&said, 1, &["`prompt` failed", "retune.json"]);
    fs::remove_dir(&obstacle).expect("removed");
    fs::remove_dir_all(halved.join("prompt/checkpoints/step-000004")).expect("removed");
    let json = |file: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(halved.join(file)).expect("written")).expect("JSON")
    };
    let finished = json("rows.json")["rows"].clone();

    let unfinished = ["unfinished comparison", "retune resume", "--overwrite"];
    refused(&compare(&folder, &options), 1, &unfinished);
    let others: Vec<String> = (1..21).map(record).collect();
    folder.write("data.jsonl", &others.join("\n"));
    let said = retune(["resume", text(&halved)]);
    refused(&said, 1, &["the training data has changed", "hint:"]);
    folder.data();

    let file = halved.join("compare.toml");
    let asked = fs::read_to_string(&file).expect("the options");
    fs::write(&file, asked.replace("quiet = true", "quiet = false")).expect("written");
    let said = retune(["resume", text(&halved)]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(!said.err.contains("training lora"), "{}", said.err);
    assert!(
        said.err.contains("training prompt after step 2"),
        "{}",
        said.err
    );
    assert_eq!(lasting(&whole), lasting(&halved));
    // The rows that were finished are taken as they were, to the second.
    let rows = json("results.json")["rows"].clone();
    assert_eq!(finished.as_array().map(Vec::len), Some(2));
    assert_eq!((&rows[0], &rows[1]), (&finished[0], &finished[1]));
    for row in ["lora", "prompt"] {
        for file in [
            "adapter_config.json",
            "adapter_model.safetensors",
            "retune.json",
        ] {
            let bytes = |out: &Path| fs::read(out.join(row).join(file)).expect("written");
            assert!(bytes(&whole) == bytes(&halved), "{row}/{file}");
        }
        assert!(!halved.join(row).join("checkpoints").exists());
    }
    let chart = |out: &Path| fs::read(out.join("comparison.svg")).expect("written");
    assert!(chart(&whole) == chart(&halved));
    assert!(!halved.join("rows.json").exists());
    let said = retune(["resume", text(&halved)]);
    refused(&said, 1, &["the comparison is finished", "--overwrite"]);
}

#[test]
fn a_method_that_diverges_is_a_row_and_the_others_are_trained_all_the_same() {
    let folder = Folder::new();
    let out = folder.path("comparison");
    let results = || -> serde_json::Value {
        serde_json::from_slice(&fs::read(out.join("results.json")).expect("written")).expect("JSON")
    };
    let diverging = "lora --learning-rate 1e38";
    let mut options = vec!["--with", diverging, "--with", "prompt"];
    options.extend(["--steps", "3", "--warmup-steps", "0"]);
    options.extend(["--schedule", "constant"]);
    let said = compare(&folder, &options);
    let named = [
        "`lora --learning-rate 1e38` of seed 0: step ",
        "is not finite",
        "--retry-failed",
    ];
    refused(&said, 1, &named);
    assert!(said.out.contains("failed"), "{}", said.out);
    let first = results();
    let rows = first["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[1]["method"], diverging);
    assert!(
        rows[1]["failed"]
            .as_str()
            .is_some_and(|reason| reason.contains("is not finite")),
        "{first}"
    );
    assert!(rows[1]["best_eval_loss"].is_null() && rows[1]["adapter"].is_null());
    assert!(rows[2]["failed"].is_null() && rows[2]["best_eval_loss"].is_f64());
    assert!(out.join("prompt/adapter_config.json").exists());

    // It does not run again by itself, and in its old place when it is asked to.
    let trace = out.join("lora_--learning-rate_1e38/metrics.jsonl");
    fs::remove_file(&trace).expect("removed");
    refused(&retune(["resume", text(&out)]), 1, &named);
    assert!(!trace.exists() && results() == first);
    refused(&retune(["resume", text(&out), "--retry-failed"]), 1, &named);
    assert!(trace.exists() && results() == first);

    assert_eq!(train(&folder, &[]).code, 0);
    let run = folder.path("out");
    let said = retune(["resume", text(&run), "--retry-failed"]);
    refused(&said, 2, &["is for comparisons", "hint:"]);
}

/// The test runs where the fixtures' relative path leads to them.
#[test]
fn results_and_adapters_of_a_comparison_name_the_base_as_it_was_typed_or_told() {
    let folder = Folder::new();
    let out = folder.path("comparison");
    let base = "tests/golden/models/llama";
    let json = |file: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(out.join(file)).expect("written")).expect("JSON")
    };
    let named = |name: &str| {
        let config = json("prompt/adapter_config.json");
        assert_eq!(config["base_model_name_or_path"], name);
        assert_eq!(json("results.json")["base"], name);
    };
    let options = ["--model", base, "--methods", "prompt"];
    let said = compare(&folder, &options);
    assert_eq!(said.code, 0, "{}", said.err);
    named(base);
    let told = ["--overwrite", "--base-name", "org/base"];
    let said = compare(&folder, &[&options[..], &told].concat());
    assert_eq!(said.code, 0, "{}", said.err);
    named("org/base");
    let file = fs::read_to_string(out.join("compare.toml")).expect("the options");
    assert!(file.contains("base-name = \"org/base\""), "{file}");
}

#[cfg(unix)]
#[test]
fn a_comparison_that_is_asked_to_stop_says_how_to_go_on() {
    use std::process::{Command, Stdio};
    let folder = Folder::new();
    let (data, out, model) = (
        folder.data(),
        folder.path("comparison"),
        golden("models/llama"),
    );
    let mut comparison = Command::new(assert_cmd::cargo::cargo_bin("retune"))
        .args(["compare", "--model", text(&model), "--data", text(&data)])
        .args(["--out", text(&out), "--methods", "lora"])
        .args(["--steps", "1000000"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    while !out.join("lora/metrics.jsonl").exists() {
        let ended = comparison.try_wait().expect("a process");
        assert!(ended.is_none(), "{ended:?}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let asked = Command::new("sh")
        .arg("-c")
        .arg(format!("kill -INT {}", comparison.id()))
        .status()
        .expect("started");
    assert!(asked.success());
    let output = comparison.wait_with_output().expect("ended");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{err}");
    for part in ["of `lora`; everything is saved", "hint: ", "retune resume"] {
        assert!(err.contains(part), "no `{part}` in:\n{err}");
    }
    assert!(out.join("lora/checkpoints").exists());

    let other = ["--methods", "prompt"];
    let unfinished = ["unfinished comparison", "retune resume", "--overwrite"];
    refused(&compare(&folder, &other), 1, &unfinished);
    let said = compare(&folder, &[&other[..], &["--overwrite"]].concat());
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(out.join("results.json").exists() && !out.join("lora").exists());
}

#[test]
fn what_lies_where_a_row_would_be_written_is_not_replaced_unasked() {
    let folder = Folder::new();
    let row = folder.path("comparison/lora");
    fs::create_dir_all(&row).expect("a folder");
    let said = compare(&folder, &["--methods", "lora"]);
    refused(&said, 1, &["would be written here", "--overwrite"]);
    let said = compare(&folder, &["--methods", "lora", "--overwrite"]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(row.join("adapter_config.json").exists());
}

/// The test runs where the fixtures' relative path leads to them; the name of the data would be two with a comma.
#[test]
fn a_base_named_by_a_relative_path_keeps_its_name_after_a_resume() {
    let folder = Folder::new();
    let lines: Vec<String> = (0..8).map(record).collect();
    let data = folder.write("first, second.jsonl", &lines.join("\n"));
    let named = |out: &str, more: &[&str]| {
        let out = folder.path(out);
        let base = "tests/golden/models/llama";
        let mut arguments = vec!["train", "lora", "--model", base, "--steps", "4"];
        arguments.extend(["--data", text(&data), "--save-every", "2"]);
        arguments.extend(["--out", text(&out)]);
        arguments.extend(more);
        let said = retune(arguments);
        assert_eq!(said.code, 0, "{}", said.err);
        out
    };
    let config = |out: &Path| fs::read(out.join("adapter_config.json")).expect("written");
    let base_of = |out: &Path| -> serde_json::Value {
        serde_json::from_slice::<serde_json::Value>(&config(out)).expect("JSON")
            ["base_model_name_or_path"]
            .clone()
    };
    let out = named("typed", &[]);
    let typed = config(&out);
    assert_eq!(base_of(&out), "tests/golden/models/llama");
    fs::remove_dir_all(out.join("checkpoints/step-000004")).expect("removed");
    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    let said = retune(["resume", text(&out)]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(config(&out) == typed);

    let out = named("named", &["--base-name", "1.50"]);
    assert_eq!(base_of(&out), "1.50");
}

#[test]
fn a_run_does_not_go_on_under_another_configuration_or_method() {
    let folder = Folder::new();
    let (model, data, out) = (model_copy(&folder), folder.data(), folder.path("out"));
    let initial = folder.path("initial");
    let train = |out: &Path, more: &[&str]| {
        let mut arguments = vec!["train", "lora", "--model", text(&model), "--steps", "4"];
        arguments.extend(["--data", text(&data), "--save-every", "2"]);
        arguments.extend(["--out", text(out)]);
        arguments.extend(more);
        retune(arguments)
    };
    assert_eq!(train(&initial, &[]).code, 0);
    assert_eq!(train(&out, &["--init-adapter", text(&initial)]).code, 0);
    fs::remove_dir_all(out.join("checkpoints/step-000004")).expect("removed");
    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    let changed = |file: &Path, from: &str, to: &str| {
        let before = fs::read_to_string(file).expect("read");
        assert!(before.contains(from), "no {from} in {before}");
        fs::write(file, before.replace(from, to)).expect("written");
        let said = retune(["resume", text(&out)]);
        fs::write(file, before).expect("written");
        said
    };
    let said = changed(
        &model.join("config.json"),
        "\"rms_norm_eps\": 0.0001",
        "\"rms_norm_eps\": 0.1",
    );
    refused(&said, 1, &["the base has changed", "hint:"]);
    let said = changed(
        &initial.join("adapter_config.json"),
        "\"lora_alpha\": 16",
        "\"lora_alpha\": 64",
    );
    refused(&said, 1, &["the method's options have changed", "hint:"]);
    let said = retune(["resume", text(&out)]);
    assert_eq!(said.code, 0, "{}", said.err);
}

#[test]
fn a_comparison_does_not_take_a_limit_that_it_would_not_keep() {
    let said = compare(&Folder::new(), &["--memory-limit", "1"]);
    refused(&said, 2, &["--memory-limit", "--recompute"]);
}

#[test]
fn work_is_not_written_over_what_it_is_made_from_or_other_work() {
    let folder = Folder::new();
    assert_eq!(train(&folder, &[]).code, 0);
    let out = folder.path("out");
    let said = train(&folder, &["--init-adapter", text(&out), "--overwrite"]);
    refused(&said, 2, &["name the same folder", "hint:"]);
    let said = compare(&folder, &["--out", text(&out), "--overwrite"]);
    refused(&said, 1, &["a run of `retune train`", "hint:"]);
    assert!(out.join("adapter_model.safetensors").exists());

    let other = folder.path("compared");
    assert_eq!(compare(&folder, &["--out", text(&other)]).code, 0);
    let said = train(&folder, &["--out", text(&other), "--overwrite"]);
    refused(&said, 1, &["holds a comparison", "hint:"]);
}

#[test]
fn a_run_repeated_on_another_base_names_that_base() {
    let folder = Folder::new();
    assert_eq!(train(&folder, &[]).code, 0);
    let (model, file) = (model_copy(&folder), folder.path("out/run.toml"));
    let out = folder.path("again");
    let said = retune([
        "train",
        "--config",
        text(&file),
        "--model",
        text(&model),
        "--out",
        text(&out),
    ]);
    assert_eq!(said.code, 0, "{}", said.err);
    let config = fs::read_to_string(out.join("adapter_config.json")).expect("written");
    assert!(config.contains(text(&model)), "{config}");
}

#[test]
fn a_result_that_is_no_number_is_an_error_and_not_a_result() {
    let folder = Folder::new();
    let explosive = [
        "--learning-rate",
        "1e38",
        "--warmup-steps",
        "0",
        "--schedule",
        "constant",
        "--steps",
        "1",
    ];
    let said = train(&folder, &explosive);
    refused(&said, 1, &["no numbers after step 1", "--learning-rate"]);
    no_adapter_in(&folder.path("out"));

    let model = model_copy(&folder);
    let weights = model.join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("read");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).expect("written");
    let data = folder.path("data.jsonl");
    let said = retune(["evaluate", "--model", text(&model), "--data", text(&data)]);
    refused(&said, 1, &["the loss is NaN", "retune inspect"]);
    assert!(said.out.is_empty(), "{}", said.out);
    let said = retune(["score", "--model", text(&model), "--data", text(&data)]);
    refused(&said, 1, &["token 2 of record 1 is NaN", "retune inspect"]);
    assert!(said.out.is_empty(), "{}", said.out);
}

#[cfg(unix)]
#[test]
fn nothing_outside_of_a_base_is_copied_and_pipes_and_devices_are_refused() {
    use std::os::unix::fs::symlink;
    let folder = Folder::new();
    assert_eq!(train(&folder, &[]).code, 0);
    let (model, adapter) = (model_copy(&folder), folder.path("out"));
    let secret = folder.write("secret", "not for others");
    symlink(&secret, model.join("tokenizer_notes.txt")).expect("linked");
    let merged = folder.path("merged");
    let merge = [
        "merge",
        "--model",
        text(&model),
        "--adapter",
        text(&adapter),
        "--out",
        text(&merged),
    ];
    let said = retune(merge);
    refused(&said, 1, &["tokenizer_notes.txt", "leads out of", "hint:"]);
    assert!(!merged.exists());
    fs::remove_file(model.join("tokenizer_notes.txt")).expect("removed");
    assert_eq!(retune(merge).code, 0);

    let data = folder.path("data.jsonl");
    for name in [
        "generation_config.json",
        "tokenizer_config.json",
        "config.json",
    ] {
        let file = model.join(name);
        let before = fs::read(&file).expect("read");
        fs::remove_file(&file).expect("removed");
        symlink("/dev/zero", &file).expect("linked");
        let said = retune(["evaluate", "--model", text(&model), "--data", text(&data)]);
        refused(&said, 1, &[name, "a device"]);
        fs::remove_file(&file).expect("removed");
        fs::write(&file, before).expect("written");
    }
}

/// A copy of a golden adapter that a test may damage.
fn adapter_copy(folder: &Folder, name: &str) -> PathBuf {
    let copy = folder.path(name);
    fs::create_dir(&copy).expect("made");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let original = golden("adapters").join(name).join(file);
        fs::copy(original, copy.join(file)).expect("copied");
    }
    copy
}

/// Replaces the one place in a file that has these bytes, which are as many as before in a safetensors header.
fn replace(file: &Path, from: &str, to: &str) {
    let before = fs::read(file).expect("read");
    let place = before
        .windows(from.len())
        .position(|window| window == from.as_bytes())
        .unwrap_or_else(|| panic!("no {from} in {}", file.display()));
    let after = [
        &before[..place],
        to.as_bytes(),
        &before[place + from.len()..],
    ]
    .concat();
    fs::write(file, after).expect("written");
}

#[test]
fn a_soft_prompt_of_another_length_or_width_is_seen_by_inspect() {
    let folder = Folder::new();
    let adapter = adapter_copy(&folder, "prompt-llama");
    let said = retune(["inspect", text(&adapter)]);
    assert_eq!(said.code, 0, "{}", said.err);
    let config = adapter.join("adapter_config.json");
    let changed = |from: &str, to: &str, more: &[&str], named: &[&str]| {
        let before = fs::read(&config).expect("read");
        replace(&config, from, to);
        let arguments = ["inspect", text(&adapter)].into_iter();
        refused(&retune(arguments.chain(more.iter().copied())), 1, named);
        fs::write(&config, before).expect("written");
    };
    let (count, width) = ("\"num_virtual_tokens\": 4", "\"token_dim\": 32");
    let named = ["`prompt_embeddings` is [4, 32]", "needs [5, 32]"];
    changed(count, "\"num_virtual_tokens\": 5", &[], &named);
    let model = golden("models/llama");
    let base = ["--model", text(&model)];
    changed(count, "\"num_virtual_tokens\": 5", &base, &named);
    let named = ["`prompt_embeddings` is [4, 32]", "needs [4, 48]"];
    changed(width, "\"token_dim\": 48", &[], &named);

    // The base is what it must fit, whatever the adapter says of itself.
    let copy = model_copy(&folder);
    let config = copy.join("config.json");
    replace(&config, "\"hidden_size\": 32", "\"hidden_size\": 64");
    let said = retune(["inspect", text(&adapter), "--model", text(&copy)]);
    refused(
        &said,
        1,
        &["`prompt_embeddings` is [4, 32]", "needs [4, 64]"],
    );
}

#[test]
fn weights_of_integers_are_seen_by_inspect() {
    let folder = Folder::new();
    let model = model_copy(&folder);
    let said = retune(["inspect", text(&model)]);
    assert_eq!(said.code, 0, "{}", said.err);
    let weights = model.join("model.safetensors");
    replace(&weights, "\"F32\"", "\"U32\"");
    let said = retune(["inspect", text(&model)]);
    refused(&said, 1, &["stored as U32, which cannot be used", "BF16"]);
}

#[test]
fn an_adapter_in_a_pickle_is_named_with_the_way_to_convert_it() {
    let folder = Folder::new();
    let adapter = adapter_copy(&folder, "lora-llama");
    let pickle = adapter.join("adapter_model.bin");
    fs::rename(adapter.join("adapter_model.safetensors"), &pickle).expect("renamed");
    let named = ["pickle", "adapter_model.bin", "run code", "weights_only"];
    refused(&retune(["inspect", text(&adapter)]), 1, &named);
    fs::remove_file(adapter.join("adapter_config.json")).expect("removed");
    refused(&retune(["inspect", text(&adapter)]), 1, &named);
}

#[test]
fn the_numbers_of_an_adapter_are_named_with_file_and_field() {
    let folder = Folder::new();
    let (model, data) = (golden("models/llama"), folder.data());
    let adapter = adapter_copy(&folder, "lora-llama");
    let config = adapter.join("adapter_config.json");
    let before = fs::read(&config).expect("read");
    for (from, to, field) in [
        ("\"r\": 4", "\"r\": 1000000000000", "field `r`: a rank"),
        (
            "\"lora_dropout\": 0.0",
            "\"lora_dropout\": 1.5",
            "field `lora_dropout`: dropout",
        ),
        (
            "\"rank_pattern\": {}",
            "\"rank_pattern\": {\"q_proj\": 0}",
            "field `rank_pattern`: a rank",
        ),
    ] {
        replace(&config, from, to);
        let said = retune([
            "evaluate",
            "--model",
            text(&model),
            "--adapter",
            text(&adapter),
            "--data",
            text(&data),
        ]);
        refused(&said, 1, &["adapter_config.json", field]);
        fs::write(&config, &before).expect("written");
    }
}

#[test]
fn a_file_that_cannot_be_used_is_told_apart_from_one_that_is_broken() {
    let folder = Folder::new();
    let model = model_copy(&folder);
    let evaluate =
        |data: &Path| retune(["evaluate", "--model", text(&model), "--data", text(data)]);
    // Half of a pair, alone or before something else.
    for half in ["\\ud83d", "\\ud83d!", "\\ud83d\\u0041", "\\ude00"] {
        let record = format!(r#"{{"prompt": "w1", "completion": "{half}"}}"#);
        let said = evaluate(&folder.write("half.jsonl", &record));
        refused(&said, 1, &["half.jsonl:1", "half of a character"]);
    }
    let packed = folder.path("packed.jsonl");
    for (start, named) in [
        (&b"\x28\xb5\x2f\xfd\x04\x58"[..], "`zstd -d`"),
        (&b"\xfd7zXZ\0\0\x04"[..], "`xz -d`"),
        (&b"BZh91AY&SY"[..], "`bzip2 -d`"),
    ] {
        fs::write(&packed, start).expect("written");
        refused(&evaluate(&packed), 1, &["packed.jsonl", named]);
    }

    let data = folder.data();
    for file in ["config.json", "tokenizer_config.json", "tokenizer.json"] {
        let bytes = fs::read(model.join(file)).expect("read");
        let marked = [&b"\xef\xbb\xbf"[..], bytes.as_slice()].concat();
        fs::write(model.join(file), marked).expect("written");
    }
    let said = evaluate(&data);
    assert_eq!(said.code, 0, "{}", said.err);

    let weights = model.join("model.safetensors");
    fs::write(&weights, [0u8; 8]).expect("written");
    refused(&evaluate(&data), 1, &["header is empty", "hint:"]);
    fs::write(&weights, b"\x02\0\0\0\0\0\0\0{}").expect("written");
    refused(&evaluate(&data), 1, &["hold no tensor", "hint:"]);
    fs::remove_file(&weights).expect("removed");
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("blobs/gone", &weights).expect("linked");
        let named = ["model.safetensors", "a link to `blobs/gone`", "hint:"];
        refused(&evaluate(&data), 1, &named);
    }
}

/// Changes a file of a run's newest checkpoint, and its checksum with it.
fn forge(run: &Path, file: &str, from: &str, to: &str) {
    let newest = run.join("checkpoints/step-000004");
    let sum = || {
        let bytes = fs::read(newest.join(file)).expect("saved");
        let digest = Sha256::digest(&bytes);
        digest
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let before = sum();
    replace(&newest.join(file), from, to);
    // Two files may have the same bytes.
    let line = |sum: &str| format!("{sum}  {file}");
    replace(&newest.join("SHA256SUMS"), &line(&before), &line(&sum()));
}

#[test]
fn a_checkpoint_of_other_tensors_is_named_with_file_tensor_and_shapes() {
    let folder = Folder::new();
    let out = folder.path("out");
    let a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let shape = ("\"shape\":[8,32]", "\"shape\":[32,8]");
    let shapes = ["is [32, 8], the run has [8, 32]", "hint:"];
    let first = format!("there is no `first.{a}` in it");
    let cases: [(&str, (&str, &str), &[&str]); 3] = [
        ("weights.safetensors", shape, &shapes),
        ("best.safetensors", shape, &shapes),
        (
            "optimizer.safetensors",
            (
                "first.base_model.model.model.layers.0.self_attn.q_proj",
                "third.base_model.model.model.layers.0.self_attn.q_proj",
            ),
            &[&first, "hint:"],
        ),
    ];
    for (file, (from, to), named) in cases {
        let options = ["--save-every", "2", "--eval-fraction", "0.2", "--overwrite"];
        let said = train(&folder, &options);
        assert_eq!(said.code, 0, "{}", said.err);
        fs::remove_file(out.join("adapter_config.json")).expect("removed");
        forge(&out, file, from, to);
        let said = retune(["resume", text(&out)]);
        refused(&said, 1, &[&[file][..], named].concat());
    }
}

#[test]
fn sizes_that_no_model_has_are_refused_and_large_ones_are_planned_without_making_anything() {
    let folder = Folder::new();
    let (model, data) = (model_copy(&folder), folder.data());
    let config = model.join("config.json");
    let original = fs::read(&config).expect("read");
    let sized = |sizes: &[(&str, &str)]| {
        fs::write(&config, &original).expect("written");
        for (name, size) in sizes {
            let now = match *name {
                "hidden_size" => "32",
                "intermediate_size" => "48",
                _ => "2",
            };
            let (from, to) = (
                format!("\"{name}\": {now},"),
                format!("\"{name}\": {size},"),
            );
            replace(&config, &from, &to);
        }
    };
    let plan = |method: &str| {
        let arguments = ["plan", "train", method, "--model", text(&model)];
        let data = ["--data", text(&data), "--out", "never", "--json"];
        retune(arguments.into_iter().chain(data))
    };
    let bench = || retune(["bench", "lora", "--shape", text(&config)]);
    let cases: [(&[(&str, &str)], &str); 4] = [
        (&[("hidden_size", "1099511627776")], "expected 1 to 1048576"),
        (&[("num_hidden_layers", "1000000000")], "expected 1 to 4096"),
        (
            &[("hidden_size", "18446744073709551616")],
            "expected a whole number",
        ),
        (
            &[
                ("hidden_size", "1048576"),
                ("intermediate_size", "4194304"),
                ("num_hidden_layers", "4096"),
            ],
            "the sizes make a model of",
        ),
    ];
    for (sizes, named) in cases {
        sized(sizes);
        refused(&plan("lora"), 1, &["config.json", named]);
        refused(&bench(), 1, &["config.json", named]);
    }

    // Twenty terabytes.
    sized(&[
        ("hidden_size", "131072"),
        ("intermediate_size", "524288"),
        ("num_hidden_layers", "64"),
    ]);
    for method in ["lora", "last-layers", "prompt"] {
        let said = plan(method);
        assert_eq!(said.code, 0, "{method}: {}", said.err);
        let planned: serde_json::Value = serde_json::from_str(&said.out).expect("JSON");
        assert!(planned["seconds"].is_null(), "{planned}");
        let bytes = planned["base_bytes"].as_f64().expect("a number");
        assert!(bytes > 2e13, "{planned}");
    }
}

#[test]
fn what_a_terminal_would_obey_is_not_printed_from_a_strangers_file() {
    let folder = Folder::new();
    let (model, data) = (model_copy(&folder), folder.data());
    let config = model.join("config.json");
    let changed = fs::read_to_string(&config).expect("read");
    let changed = changed.replace(
        "\"model_type\": \"llama\"",
        "\"model_type\": \"\\u001b[31mred\"",
    );
    fs::write(&config, changed).expect("written");
    let said = retune(["evaluate", "--model", text(&model), "--data", text(&data)]);
    refused(&said, 1, &["[31mred"]);
    assert!(!said.err.contains('\u{1b}'), "{:?}", said.err);
    let said = retune(["inspect", text(&model)]);
    refused(&said, 1, &["[31mred"]);
    let both = said.out + &said.err;
    assert!(!both.contains('\u{1b}'), "{both:?}");
}
