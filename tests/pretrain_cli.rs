//! `retune pretrain` as a user meets it.

use assert_cmd::Command;
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

/// Exit code, standard output and standard error.
fn pretrain(home: &Path, more: &[&str]) -> (i32, String, String) {
    let fixed = [
        "pretrain",
        "--shape",
        "shape.toml",
        "--data",
        "text.jsonl",
        "--out",
        "base",
    ];
    let output = Command::cargo_bin("retune")
        .expect("built")
        .current_dir(home)
        .args(fixed.iter().chain(more))
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("started");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (
        output.status.code().expect("ended by itself"),
        text(output.stdout),
        text(output.stderr),
    )
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
    let (code, out, err) = pretrain(home.path(), &options);
    assert_eq!(code, 0, "{err}");
    let result: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(result["steps"], 6);
    assert!(
        result["last_loss"].as_f64() < result["first_loss"].as_f64(),
        "{out}"
    );
    assert!(
        err.contains("segments held out") && err.contains("trained to step 6"),
        "{err}"
    );
    for file in [
        "base/model.safetensors",
        "base/README.md",
        "base-run/metrics.jsonl",
        "base-run/loss.svg",
    ] {
        assert!(home.path().join(file).is_file(), "{file}");
    }
    let evaluated = Command::cargo_bin("retune")
        .expect("built")
        .current_dir(home.path())
        .args([
            "evaluate",
            "--model",
            "base",
            "--data",
            "text.jsonl",
            "--json",
            "--quiet",
        ])
        .output()
        .expect("started");
    assert!(evaluated.status.success(), "{evaluated:?}");
    let evaluated: serde_json::Value = serde_json::from_slice(&evaluated.stdout).expect("JSON");
    assert!(
        evaluated["loss"].as_f64().is_some_and(|loss| loss < 5.7),
        "{evaluated}"
    );

    let (code, _, err) = pretrain(home.path(), &options);
    assert_eq!(code, 1);
    assert!(
        err.contains("base: the output folder is not empty"),
        "{err}"
    );
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
    let (code, _, err) = pretrain(home.path(), &options);
    assert_eq!(code, 0, "{err}");
    let whole = fs::read(home.path().join("base/model.safetensors")).expect("the base");
    fs::rename(home.path().join("base"), home.path().join("first")).expect("renamed");

    let (code, _, err) = pretrain(home.path(), &options);
    assert_eq!(code, 1);
    assert!(err.contains("`--resume`"), "{err}");

    fs::remove_dir_all(home.path().join("base-run/checkpoints/step-000004")).expect("removed");
    let other = [&options[..], &["--resume", "--learning-rate", "1e-3"]].concat();
    let (code, _, err) = pretrain(home.path(), &other);
    assert_eq!(code, 1);
    assert!(err.contains("another training"), "{err}");

    let resume = Command::cargo_bin("retune")
        .expect("built")
        .current_dir(home.path())
        .args(["resume", "base-run"])
        .output()
        .expect("started");
    let err = String::from_utf8_lossy(&resume.stderr);
    assert_eq!(resume.status.code(), Some(1), "{err}");
    assert!(
        err.contains("base-run: the folder holds a run of `retune pretrain`"),
        "{err}"
    );
    assert!(
        err.contains("hint: ") && err.contains("`--resume`"),
        "{err}"
    );

    // As two killed processes leave them.
    let file = home.path().join("base-run/.retune-QNPV7l.partial");
    fs::write(&file, "half").expect("written");
    let folder = home.path().join(".retune-base-QNPV7l.partial");
    fs::create_dir(&folder).expect("a folder");
    fs::write(folder.join("model.safetensors"), "half").expect("written");
    let (code, _, err) = pretrain(home.path(), &[&options[..], &["--resume"]].concat());
    assert_eq!(code, 0, "{err}");
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
    let (code, out, err) = pretrain(home.path(), &[]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.starts_with("error: shape.toml: line 6: unknown field `layerz`"),
        "{err}"
    );
    assert!(err.contains("\nhint: `retune pretrain --help`"), "{err}");
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
        let (code, _, err) = pretrain(home.path(), options);
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(named) && err.contains("hint: "), "{err}");
        assert!(!home.path().join("base-run").exists());
    }
}

#[test]
fn a_length_past_the_models_positions_is_wrong_usage() {
    let home = home();
    let (code, _, err) = pretrain(home.path(), &["--length", "64"]);
    assert_eq!(code, 2);
    assert!(err.contains("`--length` is 64, expected 2 to 32"), "{err}");
}
