//! Where commands write, and what they print: nothing of anybody's own is replaced or deleted, and nothing is printed that a
//! terminal would obey.

use super::files::{contents, copy_folder, entries};
use super::golden::golden;
use super::program::retune_in;
use super::{ADAPTER, Folder, Said, merge, model_copy, refused, retune, text, train};
use std::fs;
use std::path::Path;

const MINE: &str = "mine";

/// All that `retune train` writes into its folder, but for what it makes folders for.
const OF_A_RUN: [&str; 7] = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "loss.svg",
    "metrics.jsonl",
    "retune.json",
    "run.toml",
];

/// A folder with a file of this name, and what a person has written in it.
fn folder_with(folder: &Path, file: &str) {
    let file = folder.join(file);
    fs::create_dir_all(file.parent().expect("a folder")).expect("made");
    fs::write(file, MINE).expect("written");
}

#[track_caller]
fn is_mine(file: &Path) {
    let found = fs::read_to_string(file).expect("still there");
    assert_eq!(found, MINE, "{}", file.display());
}

#[test]
fn a_file_of_somebodys_own_is_not_replaced_by_a_run() {
    let folder = Folder::new();
    for name in OF_A_RUN {
        let out = folder.path(&format!("with-{name}"));
        folder_with(&out, name);
        let said = train(&folder, &["--out", text(&out)]);
        let named = [name, "already holds", "`--overwrite`", "`--out`"];
        refused(&said, 1, &named);
        assert!(!said.err.contains("retune resume"), "{}", said.err);
        assert_eq!(entries(&out), [name]);
        is_mine(&out.join(name));
    }
    let out = folder.path("with-all");
    for name in OF_A_RUN.iter().chain(&["notes.txt"]) {
        folder_with(&out, name);
    }
    refused(&train(&folder, &["--out", text(&out)]), 1, &OF_A_RUN);
    // Told to, it replaces these, and nothing else.
    train(&folder, &["--out", text(&out), "--overwrite"]).done();
    for name in OF_A_RUN {
        let bytes = fs::read(out.join(name)).expect("written");
        assert!(bytes != MINE.as_bytes(), "{name}");
    }
    is_mine(&out.join("notes.txt"));
}

#[cfg(unix)]
#[test]
fn a_link_in_the_place_of_a_file_of_a_run_is_called_that() {
    let folder = Folder::new();
    let (out, elsewhere) = (folder.path("out"), folder.write("elsewhere", MINE));
    fs::create_dir(&out).expect("made");
    std::os::unix::fs::symlink(&elsewhere, out.join("README.md")).expect("linked");
    refused(&train(&folder, &[]), 1, &["`README.md` (a link)", "hint:"]);
    is_mine(&elsewhere);
}

#[test]
fn a_run_file_explains_what_a_run_has_left_and_nothing_else() {
    let folder = Folder::new();
    let out = folder.path("out");
    // Ended after its last step: all is written but the adapter.
    let ended = || {
        train(&folder, &["--overwrite", "--quiet"]).done();
        for file in ADAPTER {
            fs::remove_file(out.join(file)).expect("removed");
        }
    };
    ended();
    train(&folder, &[]).done();

    ended();
    folder_with(&out, "README.md");
    let resume = format!("`retune resume {}`", out.display());
    refused(&train(&folder, &[]), 1, &["`README.md`", &resume]);
    is_mine(&out.join("README.md"));

    ended();
    folder_with(&out, "adapter_model.safetensors");
    let named = ["`adapter_model.safetensors`", &resume];
    refused(&train(&folder, &[]), 1, &named);
    is_mine(&out.join("adapter_model.safetensors"));

    // One that somebody wrote by hand, for `--config`.
    ended();
    let file = out.join("run.toml");
    let written = fs::read_to_string(&file).expect("the options");
    let by_hand = written.lines().skip(1).collect::<Vec<_>>().join("\n");
    for other in [by_hand.as_str(), "steps = 3", ""] {
        fs::write(&file, other).expect("written");
        refused(&train(&folder, &[]), 1, &["`run.toml`", "`metrics.jsonl`"]);
        assert_eq!(fs::read_to_string(&file).expect("the options"), other);
    }

    // A run that has saved something is gone on with.
    train(&folder, &["--overwrite", "--save-every", "2"]).done();
    refused(&train(&folder, &[]), 1, &["`checkpoints`", &resume]);
    // Of one that is finished there is nothing to go on with.
    train(&folder, &["--overwrite"]).done();
    let said = train(&folder, &[]);
    refused(&said, 1, &["`adapter_config.json`", "`--overwrite`"]);
    assert!(!said.err.contains("retune resume"), "{}", said.err);
}

#[test]
fn what_lies_in_the_folders_of_a_run_and_is_not_of_one_is_not_removed_with_them() {
    let folder = Folder::new();
    let out = folder.path("out");
    let others = ["checkpoints/.DS_Store", "tensorboard/notes.txt"];
    let are_mine = || others.iter().for_each(|name| is_mine(&out.join(name)));
    others.iter().for_each(|name| folder_with(&out, name));
    let saving = ["--tensorboard", "--save-every", "2"];
    train(&folder, &saving).done();
    are_mine();
    train(&folder, &["--overwrite"]).done();
    are_mine();
    for place in ["checkpoints", "tensorboard"] {
        assert_eq!(entries(&out.join(place)).len(), 1, "{place}");
    }
    train(&folder, &[&saving[..], &["--overwrite"]].concat()).done();
    let remove = |name: &str| fs::remove_file(out.join(name)).expect("removed");
    others.into_iter().for_each(remove);
    train(&folder, &["--overwrite"]).done();
    assert!(!out.join("checkpoints").exists() && !out.join("tensorboard").exists());
}

/// Asserts that whatever stands under this name in `home`, where there is an empty folder `empty`, is named by `command`,
/// which changes nothing there.
#[track_caller]
fn is_in_the_way(home: &Path, name: &str, command: impl Fn() -> Said) {
    let (place, aside) = (home.join(name), home.join("aside"));
    let was_there = fs::rename(&place, &aside).is_ok();
    let is_refused = || {
        let before = contents(home);
        let said = command();
        refused(&said, 1, &[name, "hint: "]);
        assert!(!said.err.contains("training"), "{}", said.err);
        assert!(contents(home) == before, "{name}");
    };
    if place.extension().is_some() {
        fs::create_dir(&place).expect("made");
        is_refused();
        fs::remove_dir(&place).expect("removed");
    }
    #[cfg(unix)]
    for target in ["nowhere", "empty"] {
        std::os::unix::fs::symlink(home.join(target), &place).expect("linked");
        is_refused();
        fs::remove_file(&place).expect("removed");
    }
    if was_there {
        fs::rename(&aside, &place).expect("moved back");
    }
}

#[test]
fn what_stands_in_the_way_of_a_run_is_named_before_any_work_and_any_removal() {
    let folder = Folder::new();
    let out = folder.path("out");
    fs::create_dir_all(out.join("empty")).expect("made");
    for name in OF_A_RUN {
        is_in_the_way(&out, name, || train(&folder, &[]));
    }
    let options = ["--tensorboard", "--save-every", "2", "--overwrite"];
    train(&folder, &options).done();
    let folders = ["checkpoints", "checkpoints/step-000002", "tensorboard"];
    for name in OF_A_RUN.iter().chain(&folders) {
        is_in_the_way(&out, name, || train(&folder, &options));
    }
    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    is_in_the_way(&out, "README.md", || retune(["resume", text(&out)]));
    train(&folder, &options).done();
}

#[test]
fn a_base_is_no_place_for_an_adapter() {
    let folder = Folder::new();
    let base = model_copy(&folder);
    let before = entries(&base);
    let options: [&[&str]; 2] = [&[], &["--overwrite"]];
    for options in options {
        let at_base = ["--out", text(&base)];
        let said = train(&folder, &[&at_base[..], options].concat());
        let named = ["model: the folder holds a model", "name another one"];
        refused(&said, 1, &named);
        for impossible in ["`--overwrite`", "retune resume"] {
            assert!(!said.err.contains(impossible), "{}", said.err);
        }
        assert_eq!(entries(&base), before);
    }
    // Not even if it looks as if a run had been there, too.
    fs::create_dir_all(base.join("checkpoints/step-000004")).expect("made");
    let said = train(&folder, &["--out", text(&base), "--overwrite"]);
    refused(&said, 1, &["the folder holds a model"]);
    assert!(base.join("checkpoints/step-000004").exists());
}

fn compare(folder: &Folder, out: &Path, more: &[&str]) -> Said {
    let (model, data) = (golden("models/llama"), folder.data());
    let fixed = ["compare", "--model", text(&model), "--data", text(&data)];
    let more_fixed = ["--out", text(out), "--steps", "1", "--batch-size", "4"];
    retune([&fixed[..], &more_fixed, more].concat())
}

#[test]
fn a_file_of_somebodys_own_is_not_replaced_by_a_comparison() {
    let folder = Folder::new();
    let methods = ["--methods", "prompt"];
    for name in ["rows.json", "results.json", "comparison.svg"] {
        let out = folder.path(&format!("with-{name}"));
        folder_with(&out, name);
        let said = compare(&folder, &out, &methods);
        refused(&said, 1, &["already holds", "`--overwrite`"]);
        assert_eq!(entries(&out), [name]);
        is_mine(&out.join(name));
    }
    let out = folder.path("with-both");
    for name in ["rows.json", "results.json", "notes.txt"] {
        folder_with(&out, name);
    }
    let said = compare(&folder, &out, &methods);
    refused(&said, 1, &["`rows.json`, `results.json`"]);
    compare(&folder, &out, &[&methods[..], &["--overwrite"]].concat()).done();
    is_mine(&out.join("notes.txt"));
}

#[test]
fn a_method_that_finds_nothing_to_train_is_refused_before_the_first_row() {
    let folder = Folder::new();
    let out = folder.path("comparison");
    let mut options = vec!["--methods", "prompt"];
    options.extend(["--with", "lora --targets q_prj"]);
    let said = compare(&folder, &out, &options);
    let named = [
        "`lora --targets q_prj` cannot be trained on this base",
        "no layer matches `q_prj`",
        "hint: the model has",
        "`q_proj`",
    ];
    refused(&said, 1, &named);
    for part in ["retune resume", "training prompt"] {
        assert!(!said.err.contains(part), "{}", said.err);
    }
    assert!(!out.exists());
}

#[test]
fn more_epochs_than_any_run_can_take_are_refused() {
    let folder = Folder::new();
    let (model, data, out) = (
        golden("models/llama"),
        folder.data(),
        folder.path("comparison"),
    );
    let run = |command: &[&str], epochs: &str| {
        let fixed = ["--model", text(&model), "--data", text(&data)];
        let more = ["--out", text(&out), "--batch-size", "1"];
        retune([command, &fixed, &more, &["--epochs", epochs]].concat())
    };
    let commands: [&[&str]; 3] = [
        &["train", "lora"],
        &["plan", "train", "lora"],
        &["compare", "--methods", "lora"],
    ];
    for command in commands {
        refused(&run(command, "1e30"), 2, &["epochs or steps at most"]);
        // Few enough, but not over twenty examples.
        let named = ["`--epochs` is 1000000000000", "steps", "hint:"];
        refused(&run(command, "1e12"), 2, &named);
        assert!(!out.exists());
    }
}

#[test]
fn a_folder_that_holds_more_than_a_merged_model_is_not_replaced() {
    let folder = Folder::new();
    let (model, adapter) = (golden("models/llama"), golden("adapters/lora-llama"));
    let out = folder.path("merged");
    let overwrite = |model: &Path| {
        let inputs = ["merge", "--model", text(model), "--adapter", text(&adapter)];
        retune([&inputs[..], &["--out", text(&out), "--overwrite"]].concat())
    };
    // A project of somebody's.
    for name in ["config.json", "src/main.rs", "thesis.tex"] {
        folder_with(&out, name);
    }
    let refused_with = |named: &[&str]| {
        let before = contents(&out);
        refused(&overwrite(&model), 1, &[named, &["hint:"]].concat());
        assert!(contents(&out) == before);
    };
    refused_with(&["is not empty", "only an earlier merge"]);
    fs::remove_dir_all(&out).expect("removed");
    // Another base, of which no merge says that it wrote it.
    copy_folder(&golden("models/llama-tied"), &out);
    refused_with(&["is not empty", "only an earlier merge"]);

    fs::remove_dir_all(&out).expect("removed");
    let model = model_copy(&folder);
    folder_with(&model, "LICENSE.txt");
    folder_with(&model, "additional_chat_templates/rag.jinja");
    folder_with(&model, "additional_chat_templates/notes.txt");
    let overwrite = || overwrite(&model);
    merge(&model, &adapter, &out).done();
    let whole = contents(&out);
    assert!(whole.contains_key(Path::new("additional_chat_templates/rag.jinja")));
    assert!(!whole.contains_key(Path::new("additional_chat_templates/notes.txt")));
    overwrite().done();
    assert!(contents(&out) == whole);
    for name in [
        "README.md",
        "license_keys.db",
        "tokenizer_notes.py",
        "vocab.mine",
        "mine.safetensors",
        "src/main.rs",
        "additional_chat_templates/my-novel.txt",
        "additional_chat_templates/mine/rag.jinja",
    ] {
        folder_with(&out, name);
        let before = contents(&out);
        let said = overwrite();
        refused(&said, 1, &["belongs to no earlier output", "would delete"]);
        assert!(contents(&out) == before, "{name}");
        fs::remove_file(out.join(name)).expect("removed");
        let _ = fs::remove_dir(out.join(name).parent().expect("a folder"));
    }
    overwrite().done();
    assert!(contents(&out) == whole);
}

/// Makes `base` of the shape and the text in `home`, in one step.
fn pretrain(home: &Path, more: &[&str]) -> Said {
    let files = ["pretrain", "--shape", "shape.toml", "--data", "text.jsonl"];
    let fixed = ["--out", "base", "--steps", "1", "--batch-size", "1"];
    retune_in(home, [&files[..], &fixed, more].concat())
}

#[test]
fn a_file_of_somebodys_own_is_not_replaced_by_the_records_of_a_pretraining() {
    let folder = Folder::new();
    folder.write(
        "shape.toml",
        "model_type = \"llama\"\nvocabulary = 270\nhidden_size = 16\nintermediate_size = 32\n\
         layers = 1\nattention_heads = 2\nmax_positions = 16\n[special_tokens]\neos = \"<|end|>\"\n",
    );
    let lines: Vec<String> = (0..60)
        .map(|day| format!(r#"{{"text": "On day {day} the baker sold the bread of the day."}}"#))
        .collect();
    folder.write("text.jsonl", &lines.join("\n"));
    let home = folder.0.path();
    let run = folder.path("base-run");
    let whole = ["--eval-fraction", "0"];
    for name in ["metrics.jsonl", "loss.svg", "run.json"] {
        folder_with(&run, name);
        let said = pretrain(home, &whole);
        refused(&said, 1, &[name, "hint:", "another folder"]);
        is_mine(&run.join(name));
        assert!(!folder.path("base").exists());
        fs::remove_dir_all(&run).expect("removed");
    }
    fs::create_dir_all(run.join("empty")).expect("made");
    for name in ["metrics.jsonl", "loss.svg", "run.json"] {
        is_in_the_way(&run, name, || pretrain(home, &whole));
    }
    folder_with(&run, "checkpoints/best.pt");
    pretrain(home, &whole).done();
    is_mine(&run.join("checkpoints/best.pt"));
    let said = train(&folder, &["--out", text(&run), "--overwrite"]);
    let named = ["a run of `retune pretrain`", "hint:"];
    refused(&said, 1, &named);
    // Its own it begins again with, and with what it leaves when it is killed at once.
    fs::remove_dir_all(folder.path("base")).expect("removed");
    pretrain(home, &whole).done();
    fs::remove_dir_all(folder.path("base")).expect("removed");
    fs::remove_file(run.join("run.json")).expect("removed");
    fs::remove_file(run.join("loss.svg")).expect("removed");
    fs::write(run.join("metrics.jsonl"), "").expect("emptied");
    pretrain(home, &whole).done();
}

#[cfg(unix)]
#[test]
fn a_terminal_has_nothing_to_obey_in_what_is_said_of_damage() {
    use super::files::copy_files;
    use super::{killed_before_step, weights};
    let folder = Folder::new();
    let run = folder.path("\u{1b}[31mrun\u{9b}2J");
    let options = ["--out", text(&run), "--save-every", "2", "--quiet"];
    train(&folder, &options).done();
    let whole = weights(&run);
    killed_before_step(&run, 4);
    let step_2 = run.join("checkpoints/step-000002");
    let step_3 = run.join("checkpoints/step-000003");
    copy_files(&step_2, &step_3, &["state.json"]);
    let said = retune(["resume", text(&run)]).done();
    for part in ["warning: ", r"\u{1b}[31mrun\u{9b}2J", "is damaged"] {
        assert!(said.err.contains(part), "no `{part}` in:\n{}", said.err);
    }
    assert!(!said.err.contains(['\u{1b}', '\u{9b}']), "{:?}", said.err);
    assert!(weights(&run) == whole);
}

#[test]
fn another_program_gets_the_text_of_a_model_as_it_is() {
    let folder = Folder::new();
    let model = model_copy(&folder);
    let tokenizer = model.join("tokenizer.json");
    let vocabulary = fs::read_to_string(&tokenizer).expect("a tokenizer");
    let mut vocabulary: serde_json::Value = serde_json::from_str(&vocabulary).expect("JSON");
    // Every word rings.
    let words = vocabulary["model"]["vocab"].as_object().expect("words");
    let ringing = words.iter().map(|(word, id)| match word.strip_prefix('w') {
        Some(number) => (format!("\u{7}{number}"), id.clone()),
        None => (word.clone(), id.clone()),
    });
    vocabulary["model"]["vocab"] = ringing.collect::<serde_json::Map<_, _>>().into();
    fs::write(&tokenizer, vocabulary.to_string()).expect("written");
    let said = retune([
        "generate",
        "--model",
        text(&model),
        "--prompt",
        "\u{7}3 \u{7}14",
        "--max-tokens",
        "8",
    ])
    .done();
    assert!(said.out.contains('\u{7}'), "{:?}", said.out);
    assert!(!said.out.contains(r"\u{7}"), "{:?}", said.out);
}
