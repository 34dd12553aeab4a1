//! What a command finds in its way: folders that may not be written to, full disks, files that are gone or others, a clock
//! that went backwards.

use super::files::{contents, entries};
use super::golden::golden;
use super::program::{process, refused};
use super::{
    Place, RUNS, WEIGHTS, base_copy, done, finish, half_done, limited, nothing_is_left_behind,
    resume, said,
};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

fn merge(adapter: &Path, out: &Path) -> Command {
    let mut command = process();
    command
        .args(["merge", "--model"])
        .arg(golden("models/llama"))
        .arg("--adapter")
        .arg(adapter)
        .arg("--out")
        .arg(out);
    command
}

fn compare(place: &Place, out: &Path) -> Command {
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
}

/// The same command by a user whom permissions bind, which the superuser is not. `None` if such a user cannot so much as
/// start the program where it lies.
fn bound_by_permissions(place: &Place, mut command: Command) -> Option<Command> {
    const NOBODY: u32 = 65_534;
    let folder = place.folder.path();
    if folder.metadata().expect("a folder").uid() != 0 {
        return Some(command);
    }
    let mut show = Command::new("chmod");
    show.args(["-R", "a+rX"]).arg(folder);
    done(show);
    let mut start = process();
    start.arg("--version").uid(NOBODY).gid(NOBODY);
    let starts = start.output().is_ok_and(|output| output.status.success());
    command.uid(NOBODY).gid(NOBODY);
    starts.then_some(command)
}

#[test]
fn a_run_folder_that_may_not_be_written_to_is_named_and_stays_as_it_was() {
    let place = Place::new();
    let run = RUNS[0];
    // Where the other user may read it, too.
    let base = base_copy(&place);
    let out = place.path("out");
    let mut train = place.train(run, &out);
    train.arg("--model").arg(&base);
    let expected = half_done(train, &out);
    let before = contents(&out);
    let Some(command) = bound_by_permissions(&place, resume(&out)) else {
        return;
    };
    let permit = |mode: u32| {
        for folder in [out.join("checkpoints"), out.clone()] {
            fs::set_permissions(folder, Permissions::from_mode(mode)).expect("changed");
        }
    };
    permit(0o555);
    let said = said(command);
    permit(0o755);
    refused(&said, 1, &[&out.display().to_string()]);
    assert!(contents(&out) == before);
    assert!(finish(&place, run, &out) == expected);
}

/// Not even the superuser can make a file there.
#[cfg(target_os = "linux")]
#[test]
fn a_place_where_nothing_can_be_written_is_refused_before_any_work() {
    let place = Place::new();
    let out = Path::new("/proc/retune");
    let adapter = golden("adapters/lora-llama");
    for command in [
        place.train(RUNS[0], out),
        compare(&place, out),
        merge(&adapter, out),
    ] {
        let said = said(command);
        let parts = ["/proc: the output folder cannot be written to", "hint: "];
        refused(&said, 1, &parts);
        assert!(!said.err.contains("training"), "{}", said.err);
    }
}

#[test]
fn what_a_run_is_made_from_is_named_when_it_is_gone_or_another() {
    let place = Place::new();
    let run = RUNS[0];
    let base = base_copy(&place);
    let (held_out, order) = (place.path("held-out.jsonl"), place.path("order.txt"));
    fs::copy(&place.data, &held_out).expect("copied");
    fs::write(&order, "7\n3\n11\n0\n5\n").expect("written");
    let out = place.path("out");
    let mut train = place.train(run, &out);
    train.arg("--model").arg(&base);
    train.arg("--eval-data").arg(&held_out);
    train.arg("--order").arg(&order);
    let expected = half_done(train, &out);
    let before = contents(&out);

    let weights = base.join("model.safetensors");
    let tokenizer = base.join("tokenizer.json");
    // Without its weights a base is no base, which is what is named.
    for (gone, named) in [
        (&place.data, &place.data),
        (&held_out, &held_out),
        (&order, &order),
        (&weights, &base),
        (&tokenizer, &base),
        (&base, &base),
    ] {
        let away = place.path("away");
        fs::rename(gone, &away).expect("moved away");
        let said = said(resume(&out));
        fs::rename(&away, gone).expect("moved back");
        refused(&said, 1, &[&named.display().to_string()]);
        assert!(contents(&out) == before, "without {}", gone.display());
    }

    for (changed, now, named) in [
        (
            &place.data,
            fs::read_to_string(&place.data)
                .expect("the data")
                .replacen("w0", "w1", 1),
            "the training data has changed",
        ),
        (
            &held_out,
            r#"{"prompt": "w1", "completion": " w2"}"#.to_owned(),
            "the held-out data has changed",
        ),
        (
            &order,
            "7\n3\n11\n5\n0\n".to_owned(),
            "the order of the examples has changed",
        ),
    ] {
        let then = fs::read(changed).expect("read");
        fs::write(changed, now).expect("written");
        let said = said(resume(&out));
        fs::write(changed, then).expect("written");
        refused(&said, 1, &[named, "hint: "]);
        assert!(contents(&out) == before, "{named}");
    }
    assert!(finish(&place, run, &out) == expected);
}

/// Gives a folder and all below it the time.
fn set_time(folder: &Path, time: SystemTime) {
    for below in contents(folder).keys() {
        let file = File::open(folder.join(below)).expect("a file");
        file.set_modified(time).expect("another time");
    }
    let folder = File::open(folder).expect("a folder");
    folder.set_modified(time).expect("another time");
}

#[test]
fn a_clock_that_went_backwards_changes_nothing() {
    let place = Place::new();
    let run = ("lora", &["--dropout", "0.2", "--keep", "3"][..]);
    let out = place.path("out");
    let expected = half_done(place.train(run, &out), &out);
    let file = out.join("run.toml");
    let options = fs::read_to_string(&file).expect("the options");
    assert!(options.contains("keep = 3"), "{options}");
    fs::write(&file, options.replace("keep = 3", "keep = 2")).expect("written");

    let metrics = || fs::read_to_string(out.join("metrics.jsonl")).expect("the records");
    let steps = |text: &str| -> Vec<String> { text.lines().take(11).map(str::to_owned).collect() };
    let before = steps(&metrics());
    // The older a checkpoint is, the newer it looks; so does everything that the run is made from.
    let later = SystemTime::now() + Duration::from_secs(10 * 365 * 24 * 3600);
    set_time(&out, later);
    let checkpoints = out.join("checkpoints");
    set_time(&checkpoints.join("step-000010"), later);
    set_time(&checkpoints.join("step-000011"), SystemTime::UNIX_EPOCH);
    let data = File::open(&place.data).expect("the data");
    data.set_modified(later).expect("another time");

    assert!(finish(&place, run, &out) == expected);
    // Each line has the speed of its step, which no other run would have to the last digit.
    assert_eq!(steps(&metrics()), before, "steps were made again");
    assert_eq!(
        entries(&checkpoints),
        ["inputs.json", "step-000011", "step-000012"]
    );
}

#[test]
fn a_merge_on_a_full_disk_leaves_nothing() {
    let place = Place::new();
    let adapter = golden("adapters/lora-llama");
    let whole = place.path("whole");
    done(merge(&adapter, &whole));
    let expected = contents(&whole);
    let weights = fs::metadata(whole.join("model.safetensors")).expect("weights");
    let out = place.path("merged");
    for blocks in [0, 1, 8, weights.len() / 1024 - 1] {
        refused(
            &said(limited(&merge(&adapter, &out), blocks, true)),
            1,
            &["error: "],
        );
        assert!(!out.exists(), "after {blocks} blocks");
        nothing_is_left_behind(place.folder.path());
    }
    done(merge(&adapter, &out));
    assert!(contents(&out) == expected);
}

#[test]
fn a_comparison_on_a_full_disk_goes_on_where_it_stopped() {
    let place = Place::new();
    let adapters = |out: &Path| {
        ["lora", "last-layers"]
            .map(|row| fs::read(out.join(row).join(WEIGHTS)).expect("an adapter"))
    };
    let whole = place.path("whole");
    done(compare(&place, &whole));
    let expected = adapters(&whole);
    // Too few for the options, for the weights of a checkpoint, and for its moments.
    for blocks in [0, 20, 80] {
        let out = place.path(&format!("compared-{blocks}"));
        refused(
            &said(limited(&compare(&place, &out), blocks, true)),
            1,
            &["error: "],
        );
        let again = match out.join("compare.toml").exists() {
            true => resume(&out),
            false => compare(&place, &out),
        };
        done(again);
        assert!(adapters(&out) == expected, "after {blocks} blocks");
        for folder in [out.clone(), out.join("lora"), out.join("last-layers")] {
            nothing_is_left_behind(&folder);
        }
    }
}
