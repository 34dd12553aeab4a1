//! `retune pretrain` as a user meets it.

mod program;

use program::{Said, refused, retune_in};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const SHAPE: &str = r#"
model_type = "llama"
vocabulary = 290
hidden_size = 16
intermediate_size = 32
layers = 2
attention_heads = 2
max_positions = 32

[special_tokens]
eos = "<|end|>"
"#;

/// A folder with a shape and a little text.
fn home() -> TempDir {
    let home = tempfile::tempdir().expect("a temporary folder");
    const WHO: [&str; 7] = [
        "farmer", "sailor", "baker", "weaver", "miller", "painter", "gardener",
    ];
    const WHAT: [&str; 5] = ["bread", "candles", "herring", "copper", "woollen socks"];
    const WHERE: [&str; 6] = [
        "harbour",
        "village",
        "mountain",
        "lighthouse",
        "orchard",
        "riverside",
    ];
    let lines: Vec<String> = (0..210)
        .map(|day| {
            let (who, what, place) = (WHO[day % 7], WHAT[day % 5], WHERE[day % 6]);
            format!(r#"{{"text": "On day {day} the {who} sold {what} at the {place}."}}"#)
        })
        .collect();
    fs::write(home.path().join("text.jsonl"), lines.join("\n")).expect("written");
    fs::write(home.path().join("shape.toml"), SHAPE).expect("written");
    home
}

fn pretrain(home: &Path, more: &[&str]) -> Said {
    let files = ["pretrain", "--shape", "shape.toml", "--data", "text.jsonl"];
    retune_in(home, [&files[..], &["--out", "base"], more].concat())
}

#[test]
fn a_base_is_made_and_scored() {
    let home = home();
    let options = [
        "--steps",
        "6",
        "--batch-size",
        "4",
        "--eval-fraction",
        "0.2",
        "--json",
    ];
    let said = pretrain(home.path(), &options).done();
    let result = said.json();
    assert_eq!(result["steps"], 6);
    assert!(
        result["last_loss"].as_f64() < result["first_loss"].as_f64(),
        "{result}"
    );
    for part in ["segments held out", "trained to step 6"] {
        assert!(said.err.contains(part), "no `{part}` in:\n{}", said.err);
    }
    for file in [
        "base/model.safetensors",
        "base/README.md",
        "base-run/metrics.jsonl",
        "base-run/loss.svg",
    ] {
        assert!(home.path().join(file).is_file(), "{file}");
    }
    let evaluate = ["evaluate", "--model", "base", "--data", "text.jsonl"];
    let quietly = ["--json", "--quiet"];
    let evaluated = retune_in(home.path(), evaluate.into_iter().chain(quietly));
    let evaluated = evaluated.done().json();
    assert!(
        evaluated["loss"].as_f64().is_some_and(|loss| loss < 5.7),
        "{evaluated}"
    );

    let said = pretrain(home.path(), &options);
    refused(&said, 1, &["base: the output folder is not empty"]);
}

#[test]
fn checkpoints_are_gone_on_with_or_left_alone() {
    let home = home();
    let options = [
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--save-every",
        "2",
        "--quiet",
    ];
    pretrain(home.path(), &options).done();
    let whole = fs::read(home.path().join("base/model.safetensors")).expect("the base");
    fs::rename(home.path().join("base"), home.path().join("first")).expect("renamed");

    refused(&pretrain(home.path(), &options), 1, &["`--resume`"]);

    fs::remove_dir_all(home.path().join("base-run/checkpoints/step-000004")).expect("removed");
    let other = [&options[..], &["--resume", "--learning-rate", "1e-3"]].concat();
    refused(&pretrain(home.path(), &other), 1, &["another training"]);

    refused(
        &retune_in(home.path(), ["resume", "base-run"]),
        1,
        &[
            "base-run: the folder holds a run of `retune pretrain`",
            "hint: ",
            "`--resume`",
        ],
    );

    // As two killed processes leave them.
    let file = home.path().join("base-run/.retune-QNPV7l.partial");
    fs::write(&file, "half").expect("written");
    let folder = home.path().join(".retune-base-QNPV7l.partial");
    fs::create_dir(&folder).expect("a folder");
    fs::write(folder.join("model.safetensors"), "half").expect("written");
    let begun = home.path().join("base-run/run.json");
    let text = fs::read_to_string(&begun).expect("what it was begun as");
    let elsewhere = text.replace("\"machine\": \"retune ", "\"machine\": \"retune 0.0 for ");
    fs::write(&begun, elsewhere).expect("written");
    let said = pretrain(home.path(), &[&options[..], &["--resume"]].concat()).done();
    let warning = "warning: the run was computed by retune 0.0 for ";
    assert!(said.err.contains(warning), "{}", said.err);
    assert!(!file.exists());
    assert_eq!(folder.exists(), cfg!(not(unix)));
    let resumed = fs::read(home.path().join("base/model.safetensors")).expect("the base");
    assert!(whole == resumed, "a resumed run makes the same base");
}

#[test]
fn a_bad_shape_is_refused_at_once() {
    let home = home();
    fs::write(
        home.path().join("shape.toml"),
        SHAPE.replace("layers", "layerz"),
    )
    .expect("written");
    let said = pretrain(home.path(), &[]);
    refused(&said, 1, &["\nhint: `retune pretrain --help`"]);
    let first = "error: shape.toml: line 6: unknown field `layerz`";
    assert!(said.err.starts_with(first), "{}", said.err);
    assert_eq!(said.out, "");
    assert!(!home.path().join("base-run").exists());
}

#[test]
fn options_that_would_be_typed_in_vain_are_refused() {
    let home = home();
    let cases: [(&[&str], &str); 2] = [
        (
            &["--steps", "4", "--warmup-steps", "5"],
            "`--warmup-steps` is 5, and the run has 4 steps",
        ),
        (
            &["--eval-fraction", "0", "--eval-every", "2"],
            "`--eval-every` needs held-out text",
        ),
    ];
    for (options, named) in cases {
        refused(&pretrain(home.path(), options), 2, &[named, "hint: "]);
        assert!(!home.path().join("base-run").exists());
    }
}

#[test]
fn a_length_past_the_models_positions_is_wrong_usage() {
    let home = home();
    let said = pretrain(home.path(), &["--length", "64"]);
    refused(&said, 2, &["`--length` is 64, expected 2 to 32"]);
}
