//! `retune resume` on folders that strangers have had: it goes on or says what is wrong, and touches nothing else.

use super::changes::{Form, changed};
use super::golden::golden;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Changed files of each kind: each is a process of its own.
const CASES: u64 = 24;
/// A run of a few tiny steps that has not ended by then never will.
const LONGEST: Duration = Duration::from_secs(60);

/// What `retune` said, and its exit code.
struct Said {
    code: i32,
    text: String,
}

fn retune(arguments: &[&str]) -> Said {
    let output = tempfile::tempfile().expect("a file");
    let errors = output.try_clone().expect("the same file");
    let mut child = Command::new(env!("CARGO_BIN_EXE_retune"))
        .args(arguments)
        .env_remove("RUST_BACKTRACE")
        // A changed path may look like the name of a repository.
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::null())
        .stdout(output.try_clone().expect("the same file"))
        .stderr(errors)
        .spawn()
        .expect("started");
    let started = Instant::now();
    let status = loop {
        match child.try_wait().expect("a child") {
            Some(status) => break status,
            None if started.elapsed() > LONGEST => {
                child.kill().expect("killed");
                panic!("{arguments:?} does not come to an end");
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    Said {
        code: status.code().expect("ended by itself"),
        text: all_of(output),
    }
}

fn all_of(mut file: fs::File) -> String {
    use std::io::{Read, Seek};
    file.rewind().expect("the start");
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).expect("read");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Data, and beside it an interrupted run and an interrupted comparison.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a folder"));
        let lines: Vec<String> = (0..12)
            .map(|index| format!(r#"{{"prompt": "w{}", "completion": " w7"}}"#, index % 9))
            .collect();
        let data = place.path("data.jsonl");
        fs::write(&data, lines.join("\n")).expect("written");
        let model = golden("models/llama");
        let common = ["--model", text(&model), "--data", text(&data), "--quiet"];
        let more = ["--steps", "4", "--batch-size", "4", "--save-every", "2"];

        let run = place.path("run");
        let train = ["train", "lora", "--out", text(&run)];
        let said = retune(&[&train[..], &common, &more].concat());
        assert_eq!(said.code, 0, "{}", said.text);
        fs::remove_file(run.join("adapter_config.json")).expect("removed");

        let comparison = place.path("comparison");
        let compare = ["compare", "--out", text(&comparison)];
        let methods = ["--methods", "lora,prompt"];
        let said = retune(&[&compare[..], &methods, &common, &more].concat());
        assert_eq!(said.code, 0, "{}", said.text);
        // Begun again, and the second row cannot be written: the first two wait in `rows.json`.
        fs::remove_file(comparison.join("results.json")).expect("removed");
        let row = comparison.join("prompt");
        fs::remove_dir_all(&row).expect("removed");
        let obstacle = row.join("retune.json");
        fs::create_dir_all(&obstacle).expect("a folder");
        let said = retune(&["resume", text(&comparison)]);
        assert_eq!(said.code, 1, "{}", said.text);
        fs::remove_dir(&obstacle).expect("removed");
        assert!(comparison.join("rows.json").exists(), "{}", said.text);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, (folder, file): (&str, &str)) -> String {
        fs::read_to_string(self.path(folder).join(file)).expect("valid")
    }

    /// What `resume` says about a copy of `folder` in which `file` has these bytes.
    fn resumed(&self, (folder, file): (&str, &str), bytes: &[u8]) -> Said {
        let around = tempfile::tempdir_in(self.0.path()).expect("a folder");
        let copy = around.path().join("inside");
        copy_folder(&self.path(folder), &copy);
        fs::write(copy.join(file), bytes).expect("written");
        let before = listing(self.0.path(), &copy);
        let said = retune(&["resume", text(&copy)]);
        let case = String::from_utf8_lossy(bytes);
        assert_eq!(
            listing(self.0.path(), &copy),
            before,
            "something was written beside the folder by {file}:\n{case}"
        );
        assert!(
            (0..=2).contains(&said.code) && !said.text.contains("panicked"),
            "exit code {} after {file}:\n{case}\n{}",
            said.code,
            said.text
        );
        assert!(
            said.code == 0 || said.text.contains("error: "),
            "{file}:\n{case}\n{}",
            said.text
        );
        said
    }

    /// Every case of `file` is refused with these words.
    fn refused(&self, file: (&str, &str), cases: &[(String, &str)]) {
        for (bytes, words) in cases {
            let said = self.resumed(file, bytes.as_bytes());
            assert!(
                said.code != 0 && said.text.contains(words),
                "no `{words}` after {file:?}:\n{bytes}\n{}",
                said.text
            );
        }
    }

    /// It is gone on with `file` cut short and changed, or each is refused.
    fn survives(&self, file: (&str, &str), form: Form) {
        let valid = self.read(file);
        let parts = cut(&valid).into_iter().map(|part| part.as_bytes().to_vec());
        let changes = (0..CASES).map(|seed| changed(valid.as_bytes(), form, seed));
        for bytes in parts.chain(changes) {
            let _ = self.resumed(file, &bytes);
        }
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            fs::copy(&path, target).expect("copied");
        }
    }
}

/// Every file below `folder` with its content, but for those below `without`.
fn listing(folder: &Path, without: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path == without {
            continue;
        }
        if path.is_dir() {
            files.extend(listing(&path, without));
        } else {
            let content = fs::read(&path).expect("a file");
            files.insert(path, content);
        }
    }
    files
}

/// The options with another value for one of them, as TOML writes it.
fn with(options: &str, name: &str, value: &str) -> String {
    let start = format!("{name} = ");
    let others = options.lines().filter(|line| !line.starts_with(&start));
    let mut lines: Vec<String> = others.map(str::to_owned).collect();
    lines.push(format!("{start}{value}"));
    lines.join("\n")
}

/// The text up to each quarter of its length.
fn cut(text: &str) -> Vec<&str> {
    (0..4)
        .filter_map(|quarter| text.get(..text.len() * quarter / 4))
        .collect()
}

const LARGEST: &str = "9223372036854775807";

#[test]
fn any_run_file_is_gone_on_with_or_refused() {
    let place = Place::new();
    let file = ("run", "run.toml");
    let valid = place.read(file);
    assert_eq!(place.resumed(file, valid.as_bytes()).code, 0);
    let with = |name: &str, value: &str| with(&valid, name, value);
    place.refused(
        file,
        &[
            (String::new(), "`method` is missing"),
            ("method = 3".to_owned(), "`method` is missing"),
            ("method = \"lora\"".to_owned(), "does not fit this version"),
            ("method = [".to_owned(), "not valid TOML"),
            (with("method", "\"../lora\""), "does not fit this version"),
            (with("method", "\"--help\""), "does not fit this version"),
            (with("help", "true"), "does not fit this version"),
            (
                with("config", "\"other.toml\""),
                "does not fit this version",
            ),
            (with("steps", LARGEST), "steps at most"),
            (with("steps", "-1"), "does not fit this version"),
            (with("steps", "nan"), "does not fit this version"),
            (with("steps", "{ a = 1 }"), "`steps` cannot be"),
            (with("learning-rate", "nan"), "learning-rate"),
            (with("learning-rate", "-inf"), "learning-rate"),
            (with("batch-size", LARGEST), "batch-size"),
            (with("rank", LARGEST), "a rank must be"),
            (with("threads", LARGEST), "1024"),
            (with("eval-fraction", "nan"), "cannot be held out"),
            (with("data", "[\"../nowhere.jsonl\"]"), "nowhere.jsonl"),
            (with("data", "[\"/\"]"), "/"),
            (with("model", "\"../nowhere\""), "nowhere"),
            (with("order", "\"nowhere.txt\""), "nowhere.txt"),
            (with("init-adapter", "\"..\""), ".."),
        ],
    );
    // It is written where it lies, whatever it says.
    let elsewhere = with("out", "\"../elsewhere\"");
    let said = place.resumed(file, elsewhere.as_bytes());
    assert_eq!(said.code, 0, "{}", said.text);
    let _ = place.resumed(file, with("memory-limit", LARGEST).as_bytes());
    place.survives(file, Form::Bytes);
}

#[test]
fn any_file_of_a_comparison_is_gone_on_with_or_refused() {
    let place = Place::new();
    let file = ("comparison", "compare.toml");
    let valid = place.read(file);
    assert_eq!(place.resumed(file, valid.as_bytes()).code, 0);
    let with = |name: &str, value: &str| with(&valid, name, value);
    place.refused(
        file,
        &[
            (String::new(), "do not fit this version"),
            ("steps = [".to_owned(), "not valid TOML"),
            (with("methods", "\"../../lora\""), "is not a method"),
            (with("methods", "3"), "is not a method"),
            (with("with", "[\"lora --out /\"]"), "lora --out /"),
            (with("seeds", "[-1]"), "do not fit this version"),
            (with("seeds", "\"1,1\""), "given twice"),
            (with("steps", LARGEST), "steps at most"),
            (with("eval-fraction", "nan"), "cannot be held out"),
            (with("data", "[\"../nowhere.jsonl\"]"), "nowhere.jsonl"),
            (with("model", "{ a = 1 }"), "`model` cannot be"),
            // Other rows than those in `rows.json`.
            (with("methods", "\"prompt\""), "not one of this comparison"),
        ],
    );
    let elsewhere = with("out", "\"../elsewhere\"");
    let said = place.resumed(file, elsewhere.as_bytes());
    assert_eq!(said.code, 0, "{}", said.text);
    place.survives(file, Form::Bytes);
}

#[test]
fn any_rows_of_a_comparison_are_gone_on_with_or_refused() {
    const NOT_JSON: &str = "rows.json: not valid JSON";
    const NOT_ASKED: &str = "not one of this comparison";
    let place = Place::new();
    let file = ("comparison", "rows.json");
    let valid = place.read(file);
    assert_eq!(place.resumed(file, valid.as_bytes()).code, 0);
    let with = |from: &str, to: &str| {
        assert!(valid.contains(from), "no {from} in {valid}");
        valid.replace(from, to)
    };
    let (row, base) = ("\"method\":\"lora\"", "\"method\":\"base\"");
    let mut cases = vec![
        ("{}".to_owned(), "missing field `sources`"),
        ("[]".to_owned(), NOT_JSON),
        (with(row, "\"method\":\"../../outside\""), NOT_ASKED),
        (with(row, base), NOT_ASKED),
        (with(base, row), NOT_ASKED),
        (
            with("\"data\":\"", "\"data\":\"0"),
            "the training data has changed",
        ),
    ];
    for seed in ["-1", "1e999", "NaN", "\"0\""] {
        let case = with("\"seed\":0", &format!("\"seed\":{seed}"));
        cases.push((case, NOT_JSON));
    }
    for part in cut(&valid) {
        cases.push((part.to_owned(), NOT_JSON));
    }
    place.refused(file, &cases);
    for (from, to) in [
        ("\"seconds\":", "\"seconds\":-1e308,\"was\":"),
        (
            "\"adapter_bytes\":",
            "\"adapter_bytes\":18446744073709551615,\"was\":",
        ),
        ("\"best_eval_loss\":", "\"best_eval_loss\":null,\"was\":"),
        ("\"curve\":[", "\"curve\":[[18446744073709551615,1e308],"),
        (
            "\"adapter\":\"lora\"",
            "\"adapter\":\"../../outside\\u001b[31m\"",
        ),
    ] {
        let said = place.resumed(file, with(from, to).as_bytes());
        assert!(!said.text.contains('\u{1b}'), "{:?}", said.text);
    }
    place.survives(file, Form::Json);
}

#[test]
fn recorded_options_that_are_none_are_named_and_never_obeyed() {
    let place = Place::new();
    let file = ("comparison", "rows.json");
    let valid = place.read(file);
    let start = "\"training\":{";
    assert!(valid.contains(start), "no {start} in {valid}");
    let with = |more: &str| valid.replace(start, &format!("{start}{more},"));
    place.refused(
        file,
        &[
            (with(r#""a\u001b[31m":[{}]"#), "has changed"),
            (with(r#""a":"\u001b[31m""#), "has changed"),
            (with(r#""a":1e999"#), "not valid JSON"),
            (
                valid.replace(start, "\"training\":[],\"was\":{"),
                "not valid JSON",
            ),
        ],
    );
    let said = place.resumed(file, with(r#""a\u001b[31m":"\u009b""#).as_bytes());
    assert!(!said.text.contains(['\u{1b}', '\u{9b}']), "{:?}", said.text);
    // Begun before they were recorded.
    let none = valid.replace(start, "\"training\":null,\"was\":{");
    let said = place.resumed(file, none.as_bytes());
    assert_eq!(said.code, 0, "{}", said.text);
}
