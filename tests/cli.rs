//! The program as a user meets it: what it writes, and what it says when something is wrong.

#[path = "cli/base_folders.rs"]
mod base_folders;
#[path = "cli/comparisons.rs"]
mod comparisons;
mod files;
mod golden;
#[path = "cli/outputs.rs"]
mod outputs;
mod program;
#[path = "cli/run_folders.rs"]
mod run_folders;
#[path = "cli/runs.rs"]
mod runs;
#[path = "cli/strangers.rs"]
mod strangers;

use files::{copy_folder, json_lines};
use golden::golden;
use program::{Said, refused, retune};
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

/// Evaluates a base, or an adapter that `more` names.
fn evaluate(model: &Path, data: &Path, more: &[&str]) -> Said {
    let fixed = ["evaluate", "--model", text(model), "--data", text(data)];
    retune([&fixed[..], more].concat())
}

fn merge(model: &Path, adapter: &Path, out: &Path) -> Said {
    let inputs = ["merge", "--model", text(model), "--adapter", text(adapter)];
    retune([&inputs[..], &["--out", text(out)]].concat())
}

/// The two files that are an adapter.
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

fn no_adapter_in(out: &Path) {
    for file in ADAPTER {
        assert!(!out.join(file).exists(), "{file} was left behind");
    }
}

/// The trained weights, to be compared to the byte.
fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("adapter_model.safetensors")).expect("written")
}

/// Takes from a run that ended at `step` that checkpoint and the adapter, as if it had been killed before.
fn killed_before_step(out: &Path, step: usize) {
    fs::remove_dir_all(out.join(format!("checkpoints/step-{step:06}"))).expect("removed");
    for file in ADAPTER {
        fs::remove_file(out.join(file)).expect("removed");
    }
}

/// Leaves of the finished comparison in `out` what was asked, and lets it go on to its row `prompt`, which cannot be written as
/// long as there is the folder that is returned.
fn stopped_at_prompt(out: &Path) -> PathBuf {
    let asked = fs::read(out.join("compare.toml")).expect("the options");
    fs::remove_dir_all(out).expect("removed");
    let obstacle = out.join("prompt/retune.json");
    fs::create_dir_all(&obstacle).expect("made");
    fs::write(out.join("compare.toml"), asked).expect("written");
    let said = retune(["resume", text(out)]);
    refused(&said, 1, &["`prompt` failed", "retune.json"]);
    obstacle
}

/// Replaces the first place in a file that has these bytes, which are as many as before in a safetensors header.
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

/// What `look` sees while these bytes of a file are replaced.
fn while_replaced<T>(file: &Path, from: &str, to: &str, look: impl FnOnce() -> T) -> T {
    let before = fs::read(file).expect("read");
    replace(file, from, to);
    let seen = look();
    fs::write(file, before).expect("written");
    seen
}

/// A copy of the golden llama that a test may damage.
fn model_copy(folder: &Folder) -> PathBuf {
    let copy = folder.path("model");
    copy_folder(&golden("models/llama"), &copy);
    copy
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
fn tokens_for_text_that_the_vocabulary_lacks_are_counted() {
    let folder = Folder::new();
    let words = r#"{"prompt": "w1 hello w2", "completion": " world"}"#;
    folder.write("words.jsonl", words);
    let data = folder.path("words.jsonl");
    let said = evaluate(&golden("models/llama"), &data, &[]).done();
    let counted = "; 2 tokens stand for text that the vocabulary lacks";
    assert!(said.err.contains(counted), "{}", said.err);
    let said = evaluate(&golden("models/llama"), &folder.data(), &[]).done();
    assert!(!said.err.contains("lacks"), "{}", said.err);
}

#[test]
fn turns_that_a_template_does_not_end_are_counted() {
    let folder = Folder::new();
    let template = folder.write(
        "template.jinja",
        "{% for m in messages %} {{ m.content }}{% endfor %}",
    );
    let turn = |role: &str| format!(r#"{{"role": "{role}", "content": "w1 w5"}}"#);
    let turns = ["user", "assistant", "user", "assistant"].map(turn);
    let data = folder.write(
        "chat.jsonl",
        &format!(r#"{{"messages": [{}]}}"#, turns.join(", ")),
    );
    let more = ["--chat-template", text(&template)];
    let said = evaluate(&golden("models/llama"), &data, &more).done();
    let counted = "; 2 learned turns have no special token at their end";
    assert!(said.err.contains(counted), "{}", said.err);

    // What is trained so is to be used so.
    let said = train(
        &folder,
        &["--data", text(&data), "--chat-template", text(&template)],
    )
    .done();
    let next = format!(" --chat-template {} --adapter ", text(&template));
    assert!(said.out.contains(&next), "{}", said.out);
    let card = fs::read_to_string(folder.path("out/README.md")).expect("a model card");
    assert!(
        card.contains("chat template") && card.contains("template.jinja"),
        "{card}"
    );
    assert!(!card.contains(text(&template)), "{card}");
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
    let said = train(&folder, &["--overwrite", "--skip-bad-records", "1"]).done();
    assert!(said.err.contains("1 records skipped"), "{}", said.err);
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
    train(&folder, &[]).done();
    let (other, adapter, data) = (
        golden("models/mistral"),
        folder.path("out"),
        folder.path("data.jsonl"),
    );
    let adapter = ["--adapter", text(&adapter)];
    refused(
        &evaluate(&other, &data, &adapter),
        1,
        &["trained on another base", "hint:", "--allow-other-base"],
    );
    let allowed = [&adapter[..], &["--allow-other-base"]].concat();
    evaluate(&other, &data, &allowed).done();
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
    refused(
        &train(&folder, &["--patience", "2"]),
        2,
        &["`--patience` needs", "--eval-data"],
    );
    let adapter = golden("adapters/lora-llama");
    let typed = ["--init-adapter", text(&adapter), "--rank", "64"];
    refused(&train(&folder, &typed), 2, &["--rank"]);
    // Before the base is looked for.
    let adapter = golden("adapters/prompt-llama");
    let typed = ["--init-adapter", text(&adapter), "--model", "nowhere"];
    let named = ["of method `prompt`, not `lora`"];
    refused(&train(&folder, &typed), 2, &named);
    let named = ["keep must be at least 1"];
    refused(&train(&folder, &["--keep", "0"]), 2, &named);
    refused(
        &train(&folder, &["--overwrite", "--dropout", "1.5"]),
        2,
        &["dropout"],
    );
    for (option, value, said) in [
        ("--alpha", "0", "above 0, not 0"),
        ("--alpha", "-4", "above 0, not -4"),
        ("--alpha", "1e-46", "above 0, not 1e-46"),
        ("--dropout", "0.99999999999", "below 1, not 0.99999999999"),
        ("--alpha", "inf", "a finite number, not inf"),
        ("--alpha-pattern", "q_proj=nan", "a finite number, not NaN"),
    ] {
        refused(&train(&folder, &["--overwrite", option, value]), 2, &[said]);
    }
    no_adapter_in(&folder.path("out"));
}

#[test]
fn options_that_would_be_typed_in_vain_are_refused() {
    let folder = Folder::new();
    let cases: [(&[&str], &[&str]); 4] = [
        (
            &["--activation-cache", "0", "--activation-cache-type", "bf16"],
            &["`--activation-cache-type` has no effect", "hint:"],
        ),
        (
            &["--eval-every", "2"],
            &["`--eval-every` needs held-out data", "hint:"],
        ),
        (
            &["--warmup-steps", "5"],
            &["`--warmup-steps` is 5, and the run has 4 steps", "hint:"],
        ),
        (&["--allow-other-base"], &["--init-adapter <DIR>"]),
    ];
    for (options, named) in cases {
        refused(&train(&folder, options), 2, named);
    }

    let (model, data, out) = (
        golden("models/llama"),
        folder.path("data.jsonl"),
        folder.path("out"),
    );
    // As many steps as twenty examples make.
    let mut epoch = vec!["train", "lora", "--model", text(&model)];
    epoch.extend(["--data", text(&data), "--out", text(&out)]);
    epoch.extend(["--epochs", "1", "--batch-size", "10"]);
    let said = retune([&epoch[..], &["--warmup-steps", "3"]].concat());
    let named = ["`--warmup-steps` is 3, and the run has 2 steps", "hint:"];
    refused(&said, 2, &named);
    assert!(!out.exists());
    retune([&epoch[..], &["--warmup-steps", "2"]].concat()).done();

    for command in ["evaluate", "score"] {
        let with = |option: &[&str]| {
            let fixed = [command, "--model", text(&model), "--data", text(&data)];
            retune([&fixed[..], option].concat())
        };
        refused(&with(&["--allow-other-base"]), 2, &["--adapter <DIR>"]);
        refused(
            &with(&["--tokens-per-pass", "0"]),
            2,
            &["--tokens-per-pass", "must be at least 1"],
        );
        with(&["--tokens-per-pass", "1"]).done();
    }
    for method in ["lora", "prompt"] {
        let small = ["--shape", "stories15m", "--batch", "1", "--length", "8"];
        let said = retune([&["bench", method, "--later-epoch"][..], &small].concat());
        refused(&said, 2, &["`--later-epoch` has no effect", "hint:"]);
    }
}

#[test]
fn a_type_of_hidden_states_that_are_never_kept_is_noted() {
    const NOTE: &str = "note: `--activation-cache-type` has no effect";
    let folder = Folder::new();
    let rounded = ["--activation-cache-type", "bf16", "--overwrite"];
    for said in [train(&folder, &rounded), train_prompt(&folder, &rounded)] {
        let said = said.done();
        assert!(said.err.contains(NOTE), "{}", said.err);
    }
    let sized = ["--activation-cache", "7", "--overwrite"];
    let said = train(&folder, &sized).done();
    let note = "note: `--activation-cache` has no effect: nothing lies below what is trained";
    assert!(said.err.contains(note), "{}", said.err);
    for said in [
        train(
            &folder,
            &[&rounded[..], &["--layers", "1", "--batch-size", "10"]].concat(),
        ),
        train(&folder, &["--overwrite"]),
    ] {
        let said = said.done();
        assert!(!said.err.contains(NOTE), "{}", said.err);
    }
}

#[test]
fn a_run_file_of_another_method_is_called_that() {
    let folder = Folder::new();
    train(&folder, &[]).done();
    let (run, again) = (folder.path("out/run.toml"), folder.path("again"));
    let repeat = |method: &str| {
        retune([
            "train",
            method,
            "--config",
            text(&run),
            "--out",
            text(&again),
        ])
    };
    let named = [
        "run.toml: the run is of method `lora`, not `prompt`",
        "hint:",
    ];
    refused(&repeat("prompt"), 2, &named);
    assert!(!again.exists());
    repeat("lora").done();
}

#[cfg(unix)]
#[test]
fn an_output_that_is_a_link_to_nowhere_is_called_that() {
    let folder = Folder::new();
    let (out, model) = (folder.path("out"), golden("models/llama"));
    std::os::unix::fs::symlink("nowhere", &out).expect("a link");
    let named = ["out: a link that leads nowhere", "hint:"];
    refused(&train(&folder, &[]), 1, &named);
    let adapter = golden("adapters/lora-llama");
    refused(&merge(&model, &adapter, &out), 1, &named);
}

#[test]
fn a_weight_that_takes_nothing_of_an_adapter_is_refused() {
    let folder = Folder::new();
    let (out, model, adapter) = (
        folder.path("out"),
        golden("models/llama"),
        golden("adapters/lora-llama"),
    );
    let merged = |weight: &str| {
        let weighted = format!("{}={weight}", text(&adapter));
        merge(&model, Path::new(&weighted), &out)
    };
    refused(&merged("0"), 2, &["a weight of 0 takes nothing"]);
    assert!(!out.exists());
    let said = merged("0.5").done();
    assert!(said.out.contains(" tensors adapted"), "{}", said.out);
}

#[test]
fn what_killed_runs_left_half_written_goes_and_nothing_else_does() {
    let folder = Folder::new();
    let out = folder.path("out");
    let left = out.join(".retune-QNPV7l.partial");
    let others = [".retune-notes-.partial", ".retune-QNPV7l.partial.txt"];
    fs::create_dir_all(out.join(".retune-folder.partial")).expect("a folder");
    for other in others {
        fs::write(out.join(other), "mine").expect("written");
    }

    fs::write(&left, "half").expect("written");
    train(&folder, &["--save-every", "2"]).done();
    assert!(!left.exists());

    fs::write(&left, "half").expect("written");
    killed_before_step(&out, 4);
    // Whoever holds the folder may be writing it.
    #[cfg(unix)]
    {
        let held = fs::File::open(&out).expect("a folder");
        held.lock().expect("locked");
        let said = retune(["resume", text(&out)]);
        refused(&said, 1, &["another run is writing to this folder"]);
        assert!(left.exists());
    }
    retune(["resume", text(&out)]).done();
    assert!(!left.exists());
    assert!(out.join(".retune-folder.partial").is_dir());
    assert!(others.iter().all(|other| out.join(other).exists()));
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

#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_cuda_says_what_to_do() {
    let folder = Folder::new();
    let (data, out, model) = (folder.data(), folder.path("out"), golden("models/llama"));
    let on_base = ["--model", text(&model), "--data", text(&data)];
    let to = ["--out", text(&out)];
    let commands: [Vec<&str>; 4] = [
        [&["train", "lora"][..], &on_base, &to].concat(),
        [&["plan", "train", "lora"][..], &on_base, &to].concat(),
        [&["score"][..], &on_base].concat(),
        vec!["bench", "lora"],
    ];
    for command in commands {
        for device in ["cuda", "cuda:1"] {
            let said = retune(command.iter().copied().chain(["--device", device]));
            let parts = [
                "this build of retune has no CUDA",
                "hint: use `--device cpu`",
                "cargo build --release --features cuda",
            ];
            refused(&said, 1, &parts);
        }
    }
    assert!(!out.exists());
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
        "--device",
        "cpu",
        "--steps",
        "4",
    ];
    let planned = retune(["plan"].into_iter().chain(options)).done().json();
    assert!(!out.exists(), "a plan writes nothing");
    let nf4 = ["--quantize", "nf4"];
    let quantised = retune(["plan"].into_iter().chain(options).chain(nf4)).done();
    let base = |plan: &serde_json::Value| plan["base_bytes"].as_u64().expect("a number");
    // Of its two blocks the linear layers have 15,360 weights, in f32: 36 bytes for 64 of them are left.
    assert_eq!(
        base(&planned) - base(&quantised.json()),
        15_360 / 64 * (256 - 36)
    );
    let trained = retune(options).done().json();
    assert_eq!(planned["trained_parameters"], trained["trained_weights"]);
    assert_eq!(planned["steps"], 4);
    assert_eq!(planned["compute_type"], "f32");
    assert_eq!(planned["device"], "cpu");
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
    let said = retune(["score", "--model", text(&model), "--data", text(&data)]).done();
    let lines = json_lines(&said.out);
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
    let said = evaluate(&model, &data, &[]);
    refused(&said, 1, &["the loss is NaN", "retune inspect"]);
    assert!(said.out.is_empty(), "{}", said.out);
    let said = retune(["score", "--model", text(&model), "--data", text(&data)]);
    refused(&said, 1, &["token 2 of record 1 is NaN", "retune inspect"]);
    assert!(said.out.is_empty(), "{}", said.out);
}
