//! Killed, cut short and starved at seeded random moments: what was saved is whole, and a run that goes on ends in the
//! same bytes as one that was left alone.
#![cfg(unix)]

mod files;
mod golden;
#[path = "faults/interruptions.rs"]
mod interruptions;
#[path = "faults/numbers.rs"]
mod numbers;
#[path = "faults/obstacles.rs"]
mod obstacles;
mod program;

use files::{contents, copy_folder};
use golden::golden;
use program::{Said, process, refused};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const WEIGHTS: &str = "adapter_model.safetensors";

/// Each with what it alone must bring back: random streams, the best weights so far, the activation cache.
const RUNS: [(&str, &[&str]); 3] = [
    ("lora", &["--dropout", "0.2"]),
    ("prompt", &["--eval-fraction", "0.2", "--eval-every", "3"]),
    (
        "last-layers",
        &[
            "--blocks",
            "1",
            "--activation-cache",
            "1",
            // An example or a few to a pass, other ones in each epoch.
            "--tokens-per-pass",
            "20",
        ],
    ),
];

/// The same command with a limit on the size of a file, in blocks of 512 bytes. A write beyond it ends the process in
/// the middle of the file, or fails as on a full disk where the signal is ignored.
fn limited(command: &Command, blocks: u64, ignore_signal: bool) -> Command {
    let mut shell = Command::new("sh");
    let trap = if ignore_signal { "trap '' XFSZ;" } else { "" };
    shell
        .arg("-c")
        .arg(format!("{trap} ulimit -f {blocks}; exec \"$0\" \"$@\""))
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    shell
}

fn said(mut command: Command) -> Said {
    Said::of(command.output().expect("started"))
}

#[track_caller]
fn done(command: Command) {
    said(command).done();
}

/// Starts the command and kills it after a while; whether it had ended before.
fn killed(mut command: Command, after: Duration) -> bool {
    let started = Instant::now();
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("started");
    loop {
        if child.try_wait().expect("a child").is_some() {
            return true;
        }
        if started.elapsed() >= after {
            child.kill().expect("killed");
            child.wait().expect("ended");
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

struct Moments {
    random: ChaCha8Rng,
    longest: Duration,
}

impl Moments {
    /// Moments of something that takes about as long.
    fn of(seed: u64, longest: Duration) -> Self {
        Self {
            random: ChaCha8Rng::seed_from_u64(seed),
            longest,
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random.next_u64() % end
    }

    fn next(&mut self) -> Duration {
        let micros = self.longest.as_micros() as u64;
        // Not the last part: what has ended cannot be killed.
        Duration::from_micros(self.below((micros * 4 / 5).max(1)))
    }
}

struct Place {
    folder: TempDir,
    data: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let data = folder.path().join("data.jsonl");
        let records: Vec<String> = (0..20)
            .map(|index| {
                format!(
                    r#"{{"prompt": "{}w{} w{} w5", "completion": " w{} w7"}}"#,
                    "w3 ".repeat(index % 6),
                    index % 9,
                    index % 7,
                    index % 5
                )
            })
            .collect();
        fs::write(&data, records.join("\n")).expect("written");
        Self { folder, data }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn train(&self, (method, options): (&str, &[&str]), out: &Path) -> Command {
        let mut command = process();
        command
            .args(["train", method, "--model"])
            .arg(golden("models/llama"))
            .arg("--data")
            .arg(&self.data)
            .arg("--out")
            .arg(out)
            .args(["--steps", "12", "--batch-size", "4", "--save-every", "1"])
            .args(["--threads", "1"])
            .args(options);
        command
    }
}

fn resume(out: &Path) -> Command {
    let mut command = process();
    command.arg("resume").arg(out);
    command
}

/// Lets the run that was started in `out` come to its end, from wherever it is.
fn finish(place: &Place, run: (&str, &[&str]), out: &Path) -> Vec<u8> {
    let last = if out.join("run.toml").exists() {
        let said = said(resume(out));
        let is_finished = said.code == 0 || said.err.contains("the run is finished");
        assert!(
            is_finished && !said.err.contains("is damaged ("),
            "{}",
            said.err
        );
        fs::read(out.join(WEIGHTS))
    } else {
        done(place.train(run, out));
        fs::read(out.join(WEIGHTS))
    };
    nothing_is_left_behind(out);
    last.expect("an adapter")
}

/// No file or folder has the name that it had while it was written.
fn nothing_is_left_behind(folder: &Path) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let name = entry.expect("an entry").file_name();
        let name = name.to_string_lossy();
        assert!(!name.ends_with(".partial"), "{name} was left behind");
    }
}

/// Every adapter that is there can be read.
fn nothing_is_half_written(out: &Path) {
    let mut folders = vec![out.to_path_buf()];
    if let Ok(entries) = fs::read_dir(out.join("checkpoints")) {
        folders.extend(entries.map(|entry| entry.expect("an entry").path()));
    }
    for folder in folders {
        let hidden = folder
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with('.'));
        for file in [WEIGHTS, "weights.safetensors", "optimizer.safetensors"] {
            let path = folder.join(file);
            if !hidden && let Ok(bytes) = fs::read(&path) {
                safetensors::SafeTensors::deserialize(&bytes)
                    .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            }
        }
    }
}

/// The time that the command takes when it is left alone.
fn time_of(command: Command) -> Duration {
    let started = Instant::now();
    done(command);
    started.elapsed()
}

#[test]
fn a_run_killed_again_and_again_ends_in_the_same_bytes() {
    let place = Place::new();
    let (mut kills, mut runs) = (0, 0);
    for (seed, run) in RUNS.into_iter().enumerate() {
        let whole = place.path(&format!("{}-whole", run.0));
        let time = time_of(place.train(run, &whole));
        let expected = fs::read(whole.join(WEIGHTS)).expect("an adapter");
        let mut moments = Moments::of(seed as u64, time);
        let goal = (seed + 1) * KILLS / RUNS.len();
        while kills < goal {
            runs += 1;
            let out = place.path(&format!("{}-{runs}", run.0));
            for _ in 0..6 {
                let command = match out.join("run.toml").exists() {
                    true => resume(&out),
                    false => place.train(run, &out),
                };
                let ended = killed(command, moments.next());
                nothing_is_half_written(&out);
                if ended {
                    break;
                }
                kills += 1;
            }
            assert!(
                finish(&place, run, &out) == expected,
                "{}: other bytes in run {runs} after {kills} kills",
                run.0
            );
            fs::remove_dir_all(&out).expect("removed");
        }
    }
}

/// Kills of training runs; those of other commands come on top.
const KILLS: usize = 210;

#[test]
fn a_run_asked_to_stop_saves_and_goes_on_to_the_same_bytes() {
    let place = Place::new();
    let run = RUNS[0];
    // Long enough to be running still, and saved only because it is asked to stop.
    let steps = ["--steps", "400", "--save-every", "0"];
    let train = |out: &Path| {
        let mut command = place.train(run, out);
        command.args(steps);
        command
    };
    let whole = place.path("whole");
    done(train(&whole));
    let expected = fs::read(whole.join(WEIGHTS)).expect("an adapter");
    for (index, signal) in ["INT", "TERM", "INT"].into_iter().enumerate() {
        let out = place.path(signal).with_extension(index.to_string());
        let child = train(&out).spawn().expect("started");
        let steps =
            || fs::read_to_string(out.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
        while steps() < 30 * (index + 1) {
            std::thread::sleep(Duration::from_millis(1));
        }
        done({
            let mut kill = Command::new("sh");
            kill.arg("-c").arg(format!("kill -{signal} {}", child.id()));
            kill
        });
        let said = Said::of(child.wait_with_output().expect("ended"));
        refused(&said, 130, &["everything is saved", "retune resume"]);
        assert!(finish(&place, run, &out) == expected, "after {signal}");
    }
}

#[test]
fn a_write_that_ends_anywhere_loses_nothing() {
    let place = Place::new();
    let run = RUNS[0];
    let whole = place.path("whole");
    done(place.train(run, &whole));
    let expected = fs::read(whole.join(WEIGHTS)).expect("an adapter");
    let largest = fs::metadata(whole.join("checkpoints/step-000012/optimizer.safetensors"))
        .expect("a checkpoint")
        .len();
    let mut moments = Moments::of(7, Duration::ZERO);
    for attempt in 0..40 {
        let out = place.path(&format!("run-{attempt}"));
        let blocks = moments.below(largest / 512 + 2);
        let ignore_signal = attempt % 2 == 0;
        let said = said(limited(&place.train(run, &out), blocks, ignore_signal));
        nothing_is_half_written(&out);
        if ignore_signal && said.code != 0 {
            refused(&said, 1, &["error: "]);
        }
        assert!(
            finish(&place, run, &out) == expected,
            "other bytes after {blocks} blocks"
        );
    }
}

#[test]
fn a_merge_killed_at_any_moment_leaves_all_or_nothing() {
    let place = Place::new();
    let adapter = place.path("adapter");
    done(place.train(RUNS[0], &adapter));
    let merge = |out: &Path| {
        let mut command = process();
        command
            .args(["merge", "--model"])
            .arg(golden("models/llama"))
            .arg("--adapter")
            .arg(&adapter)
            .arg("--out")
            .arg(out);
        command
    };
    let whole = place.path("whole");
    let time = time_of(merge(&whole));
    let expected = contents(&whole);
    let mut moments = Moments::of(11, time);
    for attempt in 0..40 {
        let out = place.path(&format!("merged-{attempt}"));
        killed(merge(&out), moments.next());
        if out.exists() {
            assert!(contents(&out) == expected, "half a checkpoint");
        } else {
            done(merge(&out));
            assert!(contents(&out) == expected, "another checkpoint");
        }
        nothing_is_left_behind(place.folder.path());
    }
}

#[test]
fn a_comparison_killed_again_and_again_ends_in_the_same_adapters() {
    let place = Place::new();
    let compare = |out: &Path| {
        let mut command = process();
        command
            .args(["compare", "--model"])
            .arg(golden("models/llama"))
            .arg("--data")
            .arg(&place.data)
            .arg("--out")
            .arg(out)
            .args(["--methods", "lora,last-layers", "--steps", "8"])
            .args(["--batch-size", "4", "--save-every", "2", "--threads", "1"]);
        command
    };
    let adapters = |out: &Path| {
        ["lora", "last-layers"]
            .map(|row| fs::read(out.join(row).join(WEIGHTS)).expect("an adapter"))
    };
    // All but what the clock and the machine decide.
    let rows = |out: &Path| {
        let text = fs::read(out.join("results.json")).expect("results");
        let mut results: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let mut rows = results["rows"].take();
        for row in rows.as_array_mut().expect("rows") {
            let row = row.as_object_mut().expect("a row");
            row.retain(|name, _| {
                !["tokens_per_second", "seconds", "peak_memory_bytes"].contains(&name.as_str())
            });
        }
        rows
    };
    let whole = place.path("whole");
    let time = time_of(compare(&whole));
    let expected = (adapters(&whole), rows(&whole));
    assert_eq!(expected.1.as_array().map(Vec::len), Some(3));
    let mut moments = Moments::of(13, time);
    let mut kills = 0;
    for attempt in 0.. {
        if kills >= 40 {
            break;
        }
        let out = place.path(&format!("compared-{attempt}"));
        let again = |out: &Path| match out.join("compare.toml").exists() {
            true => resume(out),
            false => compare(out),
        };
        for _ in 0..5 {
            if killed(again(&out), moments.next()) {
                break;
            }
            kills += 1;
        }
        let said = said(again(&out));
        let is_finished = said.code == 0 || said.err.contains("finished");
        assert!(is_finished, "{}", said.err);
        for folder in [out.clone(), out.join("lora"), out.join("last-layers")] {
            nothing_is_left_behind(&folder);
        }
        assert!(
            (adapters(&out), rows(&out)) == expected,
            "other results in comparison {attempt}"
        );
    }
}

/// A copy of the golden llama that a test may change.
fn base_copy(place: &Place) -> PathBuf {
    let base = place.path("base");
    copy_folder(&golden("models/llama"), &base);
    base
}

/// Leaves in `out` what the run of twelve steps would if it were killed before its last checkpoint; the adapter that it
/// must come to.
fn half_done(train: Command, out: &Path) -> Vec<u8> {
    done(train);
    let expected = fs::read(out.join(WEIGHTS)).expect("an adapter");
    fs::remove_dir_all(out.join("checkpoints/step-000012")).expect("removed");
    for file in [WEIGHTS, "adapter_config.json"] {
        fs::remove_file(out.join(file)).expect("removed");
    }
    expected
}

#[test]
fn too_little_memory_ends_a_run_without_losing_what_was_saved() {
    let place = Place::new();
    // Told that there is enough: otherwise it would cut its steps into smaller passes, which shows in the last bits.
    let run = ("lora", &["--memory-limit", "100000"][..]);
    let whole = place.path("whole");
    done(place.train(run, &whole));
    let expected = fs::read(whole.join(WEIGHTS)).expect("an adapter");
    let out = place.path("out");
    let mut failed = 0;
    // Each ends elsewhere: while it loads, as it starts a thread, in a step, or not at all.
    for kibibytes in (24_000..36_000).step_by(500) {
        let command = match out.join("run.toml").exists() {
            true => resume(&out),
            false => place.train(run, &out),
        };
        let mut shell = Command::new("sh");
        shell
            .arg("-c")
            .arg(format!("ulimit -v {kibibytes}; exec \"$0\" \"$@\""))
            .arg(command.get_program())
            .args(command.get_args());
        let output = shell.output().expect("started");
        let error = String::from_utf8(output.stderr).expect("UTF-8");
        if !output.status.success() && !error.contains("is finished") {
            assert!(!error.is_empty(), "{kibibytes} KiB: ended without a word");
            // Rust's library may end the process so before `main`.
            let ours = !error.contains("thread 'main'") || !error.contains("alternative stack");
            assert!(!(ours && error.contains("panicked")), "{error}");
            failed += 1;
        }
        nothing_is_half_written(&out);
    }
    assert!(failed > 0, "there was always enough memory");
    assert!(finish(&place, run, &out) == expected);
}

#[test]
fn a_base_with_a_value_that_is_no_number_is_named_as_the_culprit() {
    let place = Place::new();
    let base = base_copy(&place);
    let weights = base.join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("weights");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).expect("written");
    let mut command = place.train(RUNS[0], &place.path("out"));
    command.arg("--model").arg(&base);
    let named = [
        "step 1 is not finite",
        "the base itself is damaged",
        "holds 1 NaN",
    ];
    refused(&said(command), 1, &named);
    assert!(!place.path("out").join(WEIGHTS).exists());
    assert!(!place.path("out/checkpoints/step-000000").exists());
}
