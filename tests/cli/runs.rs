//! Runs: what they leave, how they are resumed, and that no work is lost.

use super::files::{copy_folder, entries, json, json_lines};
use super::golden::golden;
use super::program::{program, retune_in};
use super::{
    ADAPTER, Folder, Said, killed_before_step, model_copy, record, refused, retune, text, train,
    weights, while_replaced,
};
use std::fs;
use std::path::Path;

#[test]
fn a_run_leaves_everything_it_promises() {
    let folder = Folder::new();
    train(
        &folder,
        &[
            "--eval-fraction",
            "0.2",
            "--tensorboard",
            "--eval-every",
            "2",
        ],
    )
    .done();
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
    let steps = json_lines(&metrics);
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
    train(
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
    )
    .done();
    let (run, out) = (folder.path("out/run.toml"), again.path("again"));
    retune(["train", "--config", text(&run), "--out", text(&out)]).done();
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
    train(&whole, &options).done();
    train(&halved, &options).done();
    let (whole, halved) = (whole.path("out"), halved.path("out"));
    killed_before_step(&halved, 4);
    retune(["resume", text(&halved)]).done();
    assert!(weights(&whole) == weights(&halved));
    let losses = |out: &Path| -> Vec<serde_json::Value> {
        let metrics = fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
        json_lines(&metrics)
            .iter()
            .map(|line| serde_json::json!([line["step"], line["loss"], line["eval_loss"]]))
            .collect()
    };
    assert_eq!(losses(&whole), losses(&halved));
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_run_ends_as_the_whole_one() {
    let folder = Folder::new();
    train(
        &folder,
        &["--eval-fraction", "0.2", "--save-every", "2", "--quiet"],
    )
    .done();
    let out = folder.path("out");
    let adapter = out.join("adapter_model.safetensors");
    let whole = weights(&out);
    let damage = |step: &str, file: &str| {
        let path = out.join("checkpoints").join(step).join(file);
        let bytes = fs::read(&path).expect("saved");
        fs::write(&path, &bytes[..bytes.len() / 2]).expect("written");
    };
    damage("step-000004", "optimizer.safetensors");
    fs::remove_file(&adapter).expect("removed");
    let said = retune(["resume", text(&out)]).done();
    for part in [
        "warning: ",
        "step-000004 is damaged (optimizer.safetensors: has ",
        "after step 2",
    ] {
        assert!(said.err.contains(part), "no `{part}` in:\n{}", said.err);
    }
    assert!(weights(&out) == whole);

    // Saved again by the run: from the last step there is nothing left to do but to write the adapter.
    fs::remove_file(&adapter).expect("removed");
    let said = retune(["resume", text(&out)]).done();
    assert!(!said.err.contains("warning"), "{}", said.err);
    assert!(weights(&out) == whole);

    damage("step-000002", "state.json");
    damage("step-000004", "weights.safetensors");
    let both = ["step-000002 is damaged", "step-000004 is damaged", "hint: "];
    refused(&retune(["resume", text(&out)]), 1, &both);
}

#[test]
fn an_unwritable_output_folder_is_refused_before_any_work() {
    let folder = Folder::new();
    let out = folder.write("file", "x").join("out");
    let said = train(&folder, &["--out", text(&out)]);
    refused(&said, 1, &["file"]);
    assert!(!said.err.contains("step"), "{}", said.err);
}

/// Runs the program where no file may grow past so many blocks of 512 bytes. 16 are enough for small files, and not for
/// trained weights.
#[cfg(unix)]
fn retune_on_a_full_disk<'a>(blocks: usize, arguments: impl IntoIterator<Item = &'a str>) -> Said {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let mut shell = assert_cmd::Command::new("sh");
    shell
        .args(["-c", &script])
        .arg(assert_cmd::cargo::cargo_bin("retune"))
        .args(arguments);
    Said::by(&mut shell)
}

#[cfg(unix)]
#[test]
fn a_disk_that_fills_up_while_saving_leaves_nothing_half_written() {
    let folder = Folder::new();
    let (data, out, model) = (folder.data(), folder.path("out"), golden("models/llama"));
    let mut arguments = vec!["train", "lora", "--model", text(&model)];
    arguments.extend(["--data", text(&data), "--out", text(&out)]);
    arguments.extend(["--steps", "2"]);
    let said = retune_on_a_full_disk(16, arguments);
    refused(&said, 1, &["adapter_model.safetensors"]);
    super::no_adapter_in(&out);
    let left = entries(&out);
    assert!(
        !left.iter().any(|name| name.ends_with(".partial")),
        "{left:?}"
    );
    // The same command works when there is room again.
    train(&folder, &["--steps", "2"]).done();
}

#[cfg(unix)]
#[test]
fn work_is_not_lost_when_the_end_of_a_run_cannot_be_written() {
    let folder = Folder::new();
    let (data, out, model) = (folder.data(), folder.path("out"), golden("models/llama"));
    let mut arguments = vec!["train", "lora", "--model", text(&model)];
    arguments.extend(["--data", text(&data), "--out", text(&out)]);
    // The chart is longer than a checkpoint of so few weights.
    arguments.extend(["--steps", "4", "--rank", "1", "--targets", "q_proj"]);
    let said = retune_on_a_full_disk(8, arguments);
    refused(&said, 1, &["loss.svg", "retune resume"]);
    assert!(out.join("checkpoints").exists());
    retune(["resume", text(&out)]).done();
    assert!(out.join("loss.svg").is_file() && !out.join("checkpoints").exists());
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
    train(&folder, &[]).done();

    let out = folder.path("out");
    let files = || (entries(&out), weights(&out));
    let before = files();
    let said = train(&folder, &["--overwrite", "--data", "nowhere.jsonl"]);
    refused(&said, 1, &["nowhere.jsonl"]);
    assert!(files() == before, "the old adapter is gone");
}

#[test]
fn a_run_is_resumed_from_anywhere_but_only_on_what_it_was_trained_on() {
    let folder = Folder::new();
    folder.data();
    let (model, out) = (golden("models/llama"), folder.path("out"));
    let mut arguments = vec!["train", "lora", "--model", text(&model)];
    arguments.extend(["--data", "data.jsonl", "--out", "out"]);
    arguments.extend(["--steps", "4", "--save-every", "2"]);
    retune_in(folder.0.path(), arguments).done();
    killed_before_step(&out, 4);
    let resume = || retune_in(Path::new("/"), ["resume", text(&out)]);
    folder.write("data.jsonl", &record(1));
    refused(&resume(), 1, &["the training data has changed"]);
    folder.data();
    resume().done();
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
    let limited = train(&folder, &[&options[..], &["--memory-limit", "40"]].concat());
    let small = train(&folder, &["--steps", "1", "--overwrite", "--json"]);
    assert_eq!(
        (free.code, limited.code, small.code),
        (0, 0, 0),
        "{}{}{}",
        free.err,
        limited.err,
        small.err
    );
    assert!(!free.err.contains("computed again"), "{}", free.err);
    assert!(
        limited.err.contains("blocks are computed again"),
        "{}",
        limited.err
    );
    let of = |said: &Said, name: &str| said.json()[name].as_f64().expect("a number");
    let difference = of(&free, "last_loss") - of(&limited, "last_loss");
    assert!(difference.abs() < 1e-5, "{difference}");
    let peaks = (
        of(&free, "peak_memory_bytes"),
        of(&limited, "peak_memory_bytes"),
    );
    assert!(peaks.1 < peaks.0, "{peaks:?}");
    // How large the program itself is depends on how it was built: with optimisations 18 of the 40 MiB.
    let beside = peaks.1 - of(&small, "peak_memory_bytes");
    assert!(beside <= 22.0 * 1048576.0, "{peaks:?} {beside}");
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
        retune(arguments).done();
        out
    };
    let config = |out: &Path| fs::read(out.join("adapter_config.json")).expect("written");
    let base_of =
        |out: &Path| json(&out.join("adapter_config.json"))["base_model_name_or_path"].clone();
    let out = named("typed", &[]);
    let typed = config(&out);
    assert_eq!(base_of(&out), "tests/golden/models/llama");
    killed_before_step(&out, 4);
    retune(["resume", text(&out)]).done();
    assert!(config(&out) == typed);

    let out = named("named", &["--base-name", "1.50"]);
    assert_eq!(base_of(&out), "1.50");
}

#[test]
fn a_run_does_not_go_on_under_another_configuration_or_method() {
    let folder = Folder::new();
    let (model, initial, out) = (
        model_copy(&folder),
        folder.path("initial"),
        folder.path("out"),
    );
    let options = ["--model", text(&model), "--save-every", "2"];
    let first = ["--out", text(&initial)];
    train(&folder, &[&options[..], &first].concat()).done();
    let second = ["--init-adapter", text(&initial)];
    train(&folder, &[&options[..], &second].concat()).done();
    killed_before_step(&out, 4);
    let resume = || retune(["resume", text(&out)]);
    let said = while_replaced(
        &model.join("config.json"),
        "\"rms_norm_eps\": 0.0001",
        "\"rms_norm_eps\": 0.1",
        resume,
    );
    refused(&said, 1, &["the base has changed", "hint:"]);
    let said = while_replaced(
        &initial.join("adapter_config.json"),
        "\"lora_alpha\": 16",
        "\"lora_alpha\": 64",
        resume,
    );
    refused(&said, 1, &["the method's options have changed", "hint:"]);
    resume().done();
}

#[test]
fn a_run_repeated_on_another_base_names_that_base() {
    let folder = Folder::new();
    train(&folder, &[]).done();
    let (model, file) = (model_copy(&folder), folder.path("out/run.toml"));
    let out = folder.path("again");
    retune([
        "train",
        "--config",
        text(&file),
        "--model",
        text(&model),
        "--out",
        text(&out),
    ])
    .done();
    let config = fs::read_to_string(out.join("adapter_config.json")).expect("written");
    assert!(config.contains(text(&model)), "{config}");
}

#[test]
fn what_is_typed_beside_a_run_file_takes_the_place_of_what_it_says() {
    let folder = Folder::new();
    let held_out = folder.write("held-out.jsonl", &record(1));
    let begun = ["--eval-data", text(&held_out), "--rank-pattern", "q_proj=2"];
    train(&folder, &[&begun[..], &["--recompute"]].concat()).done();
    let other = folder.write("other.jsonl", &[record(3), record(4)].join("\n"));
    let (file, out) = (folder.path("out/run.toml"), folder.path("again"));
    let mut repeated = vec!["train", "--config", text(&file), "--out", text(&out)];
    repeated.extend(["--data", text(&other), "--epochs", "1"]);
    repeated.extend(["--eval-fraction", "0.5", "--rank-pattern", "q_proj=3"]);
    repeated.extend(["--recompute", "--recompute=false", "--tensorboard=false"]);
    let said = retune(repeated).done();
    assert!(said.err.contains("data: 2 examples"), "{}", said.err);
    let run = fs::read_to_string(out.join("run.toml")).expect("written");
    for line in ["epochs = 1", "eval-fraction = 0.5", "\"q_proj=3\""] {
        assert!(run.contains(line), "no `{line}` in:\n{run}");
    }
    for replaced in [
        "data.jsonl",
        "held-out.jsonl",
        "\nsteps",
        "q_proj=2",
        "recompute = true",
    ] {
        assert!(!run.contains(replaced), "`{replaced}` in:\n{run}");
    }
}

/// Leaves of a finished run what it had before its first checkpoint.
fn killed_before_any_checkpoint(out: &Path) {
    for step in [2, 4] {
        fs::remove_dir_all(out.join(format!("checkpoints/step-{step:06}"))).expect("removed");
    }
    for file in ADAPTER {
        fs::remove_file(out.join(file)).expect("removed");
    }
}

#[test]
fn a_run_without_a_checkpoint_starts_again_on_what_it_was_begun_with_alone() {
    let folder = Folder::new();
    let (out, start) = (folder.path("out"), folder.path("start"));
    train(&folder, &["--steps", "1"]).done();
    fs::rename(&out, &start).expect("moved");
    let options = [
        "--init-adapter",
        text(&start),
        "--save-every",
        "2",
        "--quiet",
    ];
    train(&folder, &options).done();
    let whole = weights(&out);
    killed_before_any_checkpoint(&out);
    let again = || retune(["resume", text(&out)]);

    let said = while_replaced(&folder.path("data.jsonl"), "w7", "w8", again);
    refused(
        &said,
        1,
        &["inputs.json: the training data has changed", "hint:"],
    );
    let adapter = start.join("adapter_model.safetensors");
    let begun = fs::read(&adapter).expect("the adapter");
    let mut other = begun.clone();
    *other.last_mut().expect("a weight") ^= 1;
    fs::write(&adapter, &other).expect("written");
    let named = ["the adapter that it starts from has changed", "hint:"];
    refused(&again(), 1, &named);
    fs::write(&adapter, &begun).expect("written");
    again().done();
    assert!(weights(&out) == whole);
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_in_a_folder_of_any_name_goes_on_there_and_names_that_cannot_be_kept_are_refused() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let folder = Folder::new();
    train(&folder, &["--save-every", "2"]).done();
    let whole = weights(&folder.path("out"));
    let out = folder.path("").join(OsStr::from_bytes(b"x\xff"));
    fs::rename(folder.path("out"), &out).expect("moved");
    killed_before_step(&out, 4);
    Said::by(program().arg("resume").arg(&out)).done();
    assert!(weights(&out) == whole);
    assert!(!folder.path("x\u{fffd}").exists());

    let data = folder.path("").join(OsStr::from_bytes(b"d\xff.jsonl"));
    fs::copy(folder.path("data.jsonl"), &data).expect("copied");
    let (model, again) = (golden("models/llama"), folder.path("again"));
    for command in [&["train", "lora"][..], &["compare"]] {
        let mut command_line = program();
        command_line.args(command).arg("--data").arg(&data);
        command_line.args(["--model", text(&model), "--out", text(&again)]);
        let named = ["`--data` is not UTF-8", "hint:"];
        refused(&Said::by(&mut command_line), 2, &named);
    }
    assert!(!again.exists());
}

/// The options of a run file with another value for one of them, as TOML writes it.
pub(super) fn with(options: &str, name: &str, value: &str) -> String {
    let start = format!("{name} = ");
    let others = options.lines().filter(|line| !line.starts_with(&start));
    let mut lines: Vec<String> = others.map(str::to_owned).collect();
    lines.push(format!("{start}{value}"));
    lines.join("\n")
}

#[test]
fn a_run_goes_on_with_the_options_it_was_begun_with() {
    let folder = Folder::new();
    train(&folder, &["--save-every", "2", "--quiet"]).done();
    let out = folder.path("out");
    let (file, whole) = (out.join("run.toml"), weights(&out));
    let begun = fs::read_to_string(&file).expect("the options");
    killed_before_step(&out, 4);
    for (name, value) in [
        ("learning-rate", "0.25"),
        ("seed", "7"),
        ("batch-size", "2"),
        ("steps", "8"),
        ("beta1", "0.5"),
        ("beta2", "0.5"),
        ("epsilon", "0.001"),
        ("schedule", "\"linear\""),
        ("weight-decay", "0.1"),
        ("warmup-steps", "3"),
        ("max-gradient-norm", "0.5"),
        ("tokens-per-pass", "16"),
        ("patience", "2"),
        ("on-spike", "\"skip\""),
        ("activation-cache-type", "\"bf16\""),
    ] {
        fs::write(&file, with(&begun, name, value)).expect("written");
        let named = format!("`{name}`, ");
        let parts = [named.as_str(), " before and ", "has changed since", "hint:"];
        refused(&retune(["resume", text(&out)]), 1, &parts);
    }
    let epochs = with(&begun, "epochs", "9.0");
    let epochs: Vec<&str> = epochs
        .lines()
        .filter(|line| !line.starts_with("steps"))
        .collect();
    fs::write(&file, epochs.join("\n")).expect("written");
    refused(&retune(["resume", text(&out)]), 1, &["`steps`, 4 before"]);

    // What moves no bit, and what is done about faults by a run that would have ended at one.
    let free = [
        ("keep", "5"),
        ("save-every", "1"),
        ("activation-cache", "7"),
        ("recompute", "true"),
        ("on-nonfinite", "\"skip\""),
        ("log-every", "3"),
        ("threads", "2"),
    ];
    let changed = free
        .iter()
        .fold(begun, |options, (name, value)| with(&options, name, value));
    fs::write(&file, changed).expect("written");
    retune(["resume", text(&out)]).done();
    assert!(weights(&out) == whole);
}

/// The golden models are so small that the fingerprint of a base is of all their values.
#[test]
fn a_run_does_not_go_on_when_one_bit_of_its_base_has_changed() {
    let folder = Folder::new();
    let model = folder.path("model");
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/base/model");
    copy_folder(&base, &model);
    let named = ["--model", text(&model), "--save-every", "1"];
    train(
        &folder,
        &[&named[..], &["--steps", "2", "--quiet"]].concat(),
    )
    .done();
    let out = folder.path("out");
    killed_before_step(&out, 2);

    let weights = model.join("model.safetensors");
    let whole = fs::read(&weights).expect("the weights");
    let (header, _) = whole.split_first_chunk().expect("a length");
    let start = 8 + u64::from_le_bytes(*header) as usize;
    let mut changed = whole.clone();
    // Of the 5000th value of the first tensor, which is between two runs of the sample.
    changed[start + 2 * 5000] ^= 1;
    fs::write(&weights, changed).expect("written");
    let said = retune(["resume", text(&out)]);
    refused(&said, 1, &["the base has changed", "hint:"]);
    // A copy with other times is the same base.
    fs::write(&weights, whole).expect("written");
    retune(["resume", text(&out)]).done();
}

#[test]
fn a_rate_that_leaves_no_number_is_refused_or_ends_the_run_without_a_checkpoint() {
    let folder = Folder::new();
    for (option, value) in [
        ("--learning-rate", "1e39"),
        ("--learning-rate", "1e-50"),
        ("--epsilon", "1e-50"),
        ("--weight-decay", "1e39"),
        ("--beta2", "0.999999999999"),
    ] {
        let said = train(&folder, &[option, value]);
        refused(&said, 2, &[&option[2..], "32 bits"]);
    }
    assert!(!folder.path("out").exists());

    let mut explosive = vec!["--learning-rate", "1e38", "--schedule", "constant"];
    explosive.extend(["--warmup-steps", "0", "--save-every", "1"]);
    let said = train(&folder, &explosive);
    refused(&said, 1, &["no numbers after step 1", "--learning-rate"]);
    assert!(!said.err.contains("last good state"), "{}", said.err);
    let saved = fs::read_dir(folder.path("out/checkpoints")).map_or(0, Iterator::count);
    // What it began on.
    assert_eq!(saved, 1);
    super::no_adapter_in(&folder.path("out"));
}

#[cfg(unix)]
#[test]
fn a_disk_that_is_full_at_a_later_checkpoint_says_how_to_go_on() {
    let folder = Folder::new();
    train(&folder, &["--save-every", "2", "--quiet"]).done();
    let out = folder.path("out");
    let whole = weights(&out);
    killed_before_step(&out, 4);
    let said = retune_on_a_full_disk(16, ["resume", text(&out)]);
    let hint = format!("hint: go on with `retune resume {}`", out.display());
    refused(&said, 1, &[&hint]);
    retune(["resume", text(&out)]).done();
    assert!(weights(&out) == whole);
}

#[test]
fn as_many_checkpoints_are_kept_as_were_asked_for() {
    let folder = Folder::new();
    let kept = |keep: &[&str]| -> Vec<String> {
        let options = ["--save-every", "1", "--quiet", "--overwrite"];
        let said = train(&folder, &[&options[..], keep].concat());
        assert_eq!(said.code, 0, "{}", said.err);
        let entries = fs::read_dir(folder.path("out/checkpoints")).expect("a folder");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("an entry").file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .filter(|name| name != "inputs.json")
            .collect();
        names.sort();
        names
    };
    assert_eq!(kept(&["--keep", "1"]), ["step-000004"]);
    assert_eq!(kept(&[]), ["step-000003", "step-000004"]);
    let three = ["step-000002", "step-000003", "step-000004"];
    assert_eq!(kept(&["--keep", "3"]), three);
}

/// Whether this text stands anywhere in these bytes.
fn holds(bytes: &[u8], text: &str) -> bool {
    let mut windows = bytes.windows(text.len());
    windows.any(|window| window == text.as_bytes())
}

fn files_below(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => files.extend(files_below(&path)),
            false => files.push(path),
        }
    }
    files
}

#[test]
fn neither_a_token_nor_the_way_to_a_file_is_in_what_a_run_leaves_to_others() {
    const TOKEN: &str = "hf_OfNobodyElse";
    const PRIVATE: &str = "project-that-nobody-knows";
    let folder = Folder::new();
    let private = folder.path(PRIVATE);
    fs::create_dir(&private).expect("made");
    let [base, data, held_out, order, first] =
        ["base", "data.jsonl", "held-out.jsonl", "order.txt", "first"]
            .map(|name| private.join(name));
    fs::rename(model_copy(&folder), &base).expect("moved");
    fs::rename(folder.data(), &data).expect("moved");
    fs::copy(&data, &held_out).expect("copied");
    fs::write(&order, "3\n1\n4\n").expect("written");
    let (out, merged) = (folder.path("out"), folder.path("merged"));
    let run = |arguments: &[&str]| {
        let output = super::program::program()
            .args(arguments)
            .env("HF_TOKEN", TOKEN)
            .output()
            .expect("started");
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{err}");
        assert!(!holds(&output.stderr, TOKEN) && !holds(&output.stdout, TOKEN));
    };
    let mut train = vec!["train", "lora", "--model", text(&base)];
    train.extend(["--data", text(&data), "--eval-data", text(&held_out)]);
    train.extend(["--order", text(&order), "--base-name", "org/base"]);
    train.extend(["--steps", "2", "--save-every", "1", "--tensorboard"]);
    run(&[&train[..], &["--out", text(&first)]].concat());
    let again = ["--init-adapter", text(&first), "--out", text(&out)];
    run(&[&train[..], &again].concat());
    let merge = ["merge", "--model", text(&base), "--adapter", text(&out)];
    run(&[&merge[..], &["--out", text(&merged)]].concat());

    let left = [&out, &merged].map(|folder| files_below(folder));
    for file in left.concat() {
        let bytes = fs::read(&file).expect("read");
        assert!(!holds(&bytes, TOKEN), "{}", file.display());
        // It repeats the run on this machine.
        let is_for_others = !file.ends_with("run.toml");
        assert_ne!(holds(&bytes, PRIVATE), is_for_others, "{}", file.display());
    }
}

#[test]
fn a_token_that_the_hub_does_not_accept_is_not_shown() {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    const TOKEN: &str = "hf_OfNobodyElse";
    let folder = Folder::new();
    let (data, out, cache) = (folder.data(), folder.path("out"), folder.path("hub"));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let hub = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().expect("a connection");
        let mut request = String::new();
        let mut lines = BufReader::new(connection.try_clone().expect("a copy"));
        // An empty line ends it.
        while lines.read_line(&mut request).is_ok_and(|length| length > 2) {}
        let answer = "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        // Nobody listens if it was not the program that asked.
        drop(connection.write_all(answer.as_bytes()));
        request
    });
    let mut command = super::program::program();
    for variable in [
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HTTPS_PROXY",
        "https_proxy",
        "ALL_PROXY",
        "all_proxy",
        "RUST_BACKTRACE",
    ] {
        command.env_remove(variable);
    }
    let output = command
        .args(["train", "lora", "--model", "org/base", "--data"])
        .args([text(&data), "--out", text(&out)])
        .env("HF_ENDPOINT", format!("http://{address}"))
        .env("HF_HOME", text(&cache))
        .env("HF_TOKEN", TOKEN)
        .output()
        .expect("started");
    // A hub that nobody asked would wait for ever.
    drop(TcpStream::connect(address));
    let request = hub.join().expect("a request");
    assert!(request.contains(&format!("Bearer {TOKEN}")), "{request}");

    let said = Said {
        code: output.status.code().expect("ended by itself"),
        out: String::from_utf8(output.stdout).expect("UTF-8"),
        err: String::from_utf8(output.stderr).expect("UTF-8"),
    };
    refused(&said, 1, &["the hub does not accept the token", "hint:"]);
    assert!(!said.err.contains(TOKEN) && !said.out.contains(TOKEN));
    for file in files_below(folder.0.path()) {
        let bytes = fs::read(&file).expect("read");
        assert!(!holds(&bytes, TOKEN), "{}", file.display());
    }
    assert!(!out.exists());
}

#[test]
fn a_merge_says_how_near_it_is_to_base_and_adapter() {
    let folder = Folder::new();
    let (model, adapter) = (golden("models/llama"), golden("adapters/lora-llama"));
    let merge = |out: &str, more: &[&str]| {
        let out = folder.path(out);
        let mut arguments = vec!["merge", "--model", text(&model)];
        arguments.extend(["--adapter", text(&adapter), "--out", text(&out)]);
        arguments.extend(more);
        let said = retune(arguments);
        assert_eq!(said.code, 0, "{}", said.err);
        said.out
    };
    let lines = merge("lines", &[]);
    for part in ["layers: ", "probe: logits within ", " allowed"] {
        assert!(lines.contains(part), "no `{part}` in:\n{lines}");
    }
    let report: serde_json::Value =
        serde_json::from_str(&merge("json", &["--json"])).expect("JSON");
    let of = |name: &str| report["probe"][name].as_f64().expect("a number");
    assert!(of("difference") <= of("bound"), "{report}");
    assert!(of("effect") > of("bound"), "{report}");
}

#[cfg(unix)]
#[test]
fn a_run_that_nobody_listens_to_is_worth_finishing() {
    let folder = Folder::new();
    let (base, data, out) = (golden("models/llama"), folder.data(), folder.path("out"));
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_retune"))
        .args([
            "train",
            "lora",
            "--model",
            text(&base),
            "--data",
            text(&data),
        ])
        .args(["--out", text(&out), "--steps", "4", "--save-every", "2"])
        .stdout(std::process::Stdio::null())
        .stderr(writer)
        .status()
        .expect("started");
    assert_eq!(status.code(), Some(0));
    assert!(out.join("adapter_model.safetensors").is_file());
}

#[test]
fn a_run_on_a_quantised_base_is_resumed_and_merged_as_any_other() {
    let folder = Folder::new();
    let (data, out, merged) = (folder.data(), folder.path("out"), folder.path("merged"));
    let base = golden("models/llama");
    let options = ["--quantize", "nf4", "--save-every", "2"];
    let said = train(&folder, &options).done();
    let next = format!("--model {} --quantize nf4 --adapter", base.display());
    assert!(said.out.contains(&next), "{}", said.out);
    let whole = weights(&out);
    let file = fs::read_to_string(out.join("run.toml")).expect("written");
    assert!(file.contains("quantize = \"nf4\""), "{file}");
    let card = fs::read_to_string(out.join("README.md")).expect("written");
    assert!(card.contains("| base held in | nf4 |"), "{card}");
    killed_before_step(&out, 4);
    let as_it_was = || retune(["resume", text(&out)]);
    let said = while_replaced(&out.join("run.toml"), "quantize = \"nf4\"\n", "", as_it_was);
    refused(
        &said,
        1,
        &["the quantisation of the base has changed", "hint:"],
    );
    as_it_was().done();
    assert!(weights(&out) == whole, "other bytes");

    let loss = |more: &[&str]| -> f64 {
        let evaluate = ["evaluate", "--model", text(&base), "--data", text(&data)];
        let result = retune([&evaluate[..], &["--json"], more].concat())
            .done()
            .json();
        assert_eq!(result["quantization"].is_null(), !more.contains(&"nf4"));
        result["loss"].as_f64().expect("a loss")
    };
    let adapter = ["--adapter", text(&out)];
    assert_ne!(loss(&[]), loss(&["--quantize", "nf4"]));
    let merge = ["merge", "--model", text(&base), "--adapter", text(&out)];
    retune([&merge[..], &["--out", text(&merged)]].concat()).done();
    let of_merged = retune([
        "evaluate",
        "--model",
        text(&merged),
        "--data",
        text(&data),
        "--json",
    ])
    .done();
    let of_merged = of_merged.json()["loss"].as_f64().expect("a loss");
    assert!((of_merged - loss(&adapter)).abs() < 1e-4, "{of_merged}");

    let said = train(&folder, &["--overwrite", "--quantize", "int3"]);
    refused(&said, 2, &["expected `nf4`"]);
}
