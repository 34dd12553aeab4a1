//! What others have put into a run folder: nothing beside it is touched, nothing is waited for without end, and what is lost
//! or forged is named.

use super::files::json;
use super::golden::golden;
use super::program::program;
use super::{
    ADAPTER, Folder, Said, forge, refused, replace, retune, stopped_at_prompt, text, train, weights,
};
#[cfg(unix)]
use super::{files::entries, killed_before_step};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A run of a few tiny steps that has not ended by then never will.
const LONGEST: Duration = Duration::from_secs(120);

fn resume(run: &Path) -> Said {
    let mut program = program();
    Said::by(program.args(["resume", text(run)]).timeout(LONGEST))
}

/// A comparison on the golden llama, of which `more` says at least the methods.
fn compare(folder: &Folder, more: &[&str]) -> Said {
    let (data, out, model) = (
        folder.data(),
        folder.path("comparison"),
        golden("models/llama"),
    );
    let mut arguments = vec!["compare", "--model", text(&model), "--data", text(&data)];
    arguments.extend(["--out", text(&out), "--steps", "2", "--batch-size", "4"]);
    arguments.extend(more);
    retune(arguments)
}

/// A comparison that stopped at its second row, which cannot be written as long as there is the folder that is returned.
fn stopped_at_the_second_row(folder: &Folder) -> PathBuf {
    compare(folder, &["--methods", "lora,prompt"]).done();
    stopped_at_prompt(&folder.path("comparison"))
}

/// Every file at or below a place, with its bytes.
#[cfg(unix)]
fn contents(place: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    if place.is_file() {
        return vec![(place.to_owned(), fs::read(place).expect("read"))];
    }
    let names = entries(place).into_iter();
    names.flat_map(|name| contents(&place.join(name))).collect()
}

/// Asserts that `command` names a link in this place, wherever that leads, and leaves what is there as it is.
#[cfg(unix)]
#[track_caller]
fn stops_at_a_link(folder: &Folder, place: &Path, command: impl Fn() -> Said) {
    let (elsewhere, nowhere) = (folder.path("elsewhere"), folder.path("nowhere"));
    fs::rename(place, &elsewhere).expect("moved");
    let before = contents(&elsewhere);
    let name = place.file_name().and_then(|name| name.to_str());
    let named = format!("{}: a link, which", name.expect("UTF-8"));
    for target in [&elsewhere, &nowhere] {
        std::os::unix::fs::symlink(target, place).expect("a link");
        refused(&command(), 1, &[&named, "hint: "]);
        assert!(contents(&elsewhere) == before, "{named}");
        assert!(nowhere.symlink_metadata().is_err(), "{named}");
        fs::remove_file(place).expect("removed");
    }
    fs::rename(&elsewhere, place).expect("moved back");
}

#[cfg(unix)]
#[test]
fn a_run_follows_no_link_out_of_its_folder() {
    let folder = Folder::new();
    train(&folder, &["--save-every", "2", "--tensorboard", "--quiet"]).done();
    let out = folder.path("out");
    let whole = weights(&out);
    killed_before_step(&out, 4);
    for name in [
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "checkpoints/step-000002",
    ] {
        stops_at_a_link(&folder, &out.join(name), || resume(&out));
    }
    // One that starts again empties its files first.
    let checkpoints = folder.path("saved");
    fs::rename(out.join("checkpoints"), &checkpoints).expect("moved");
    for name in ["metrics.jsonl", "tensorboard"] {
        stops_at_a_link(&folder, &out.join(name), || resume(&out));
    }
    fs::rename(&checkpoints, out.join("checkpoints")).expect("moved back");
    resume(&out).done();
    assert!(weights(&out) == whole);
}

#[cfg(unix)]
#[test]
fn a_new_run_follows_no_link_either_but_its_folder_may_be_one() {
    let folder = Folder::new();
    let (out, real) = (folder.path("out"), folder.path("real"));
    fs::create_dir(&real).expect("a folder");
    std::os::unix::fs::symlink(&real, &out).expect("a link");
    let victim = folder.write("victim", "mine");
    std::os::unix::fs::symlink(&victim, real.join("metrics.jsonl")).expect("a link");
    refused(&train(&folder, &[]), 1, &["metrics.jsonl"]);
    assert_eq!(fs::read(&victim).expect("read"), b"mine");
    super::no_adapter_in(&out);
    fs::remove_file(real.join("metrics.jsonl")).expect("removed");
    train(&folder, &[]).done();
    assert!(real.join("metrics.jsonl").is_file() && out.is_symlink());
}

#[cfg(unix)]
#[test]
fn a_comparison_follows_no_link_to_a_row() {
    let folder = Folder::new();
    let obstacle = stopped_at_the_second_row(&folder);
    let out = folder.path("comparison");
    let row = out.join("prompt");
    fs::create_dir_all(row.join("checkpoints/step-000001")).expect("a folder");
    fs::write(row.join("checkpoints/step-000001/state.json"), "mine").expect("written");
    stops_at_a_link(&folder, &row, || resume(&out));
    stops_at_a_link(&folder, &row, || {
        compare(&folder, &["--methods", "lora,prompt", "--overwrite"])
    });
    // The row that is finished already.
    stops_at_a_link(&folder, &out.join("lora"), || resume(&out));
    assert!(obstacle.is_dir());
}

#[cfg(unix)]
#[test]
fn a_pipe_in_a_run_folder_is_not_waited_for() {
    let folder = Folder::new();
    train(&folder, &["--save-every", "2", "--quiet"]).done();
    let out = folder.path("out");
    let whole = weights(&out);
    let put_pipe = |place: &Path| {
        fs::remove_file(place).expect("removed");
        let made = std::process::Command::new("mkfifo").arg(place).status();
        assert!(made.expect("started").success());
    };
    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    put_pipe(&out.join("checkpoints/step-000004/weights.safetensors"));
    let said = resume(&out).done();
    let named = ["weights.safetensors: a pipe or a device", "after step 2"];
    assert!(
        named.iter().all(|part| said.err.contains(part)),
        "{}",
        said.err
    );
    assert!(weights(&out) == whole);

    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    put_pipe(&out.join("metrics.jsonl"));
    let named = ["metrics.jsonl: a pipe or a device", "hint: "];
    refused(&resume(&out), 1, &named);
    fs::remove_dir_all(out.join("checkpoints")).expect("removed");
    refused(&resume(&out), 1, &named);
}

#[test]
fn a_stray_file_among_the_checkpoints_is_named_and_in_their_place_refused() {
    let folder = Folder::new();
    train(&folder, &["--save-every", "2", "--quiet"]).done();
    let out = folder.path("out");
    let whole = weights(&out);
    let checkpoints = out.join("checkpoints");
    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    fs::write(checkpoints.join("step-000100"), "notes").expect("written");
    let said = resume(&out).done();
    let named = "step-000100 is damaged (a file, and a folder is needed)";
    assert!(said.err.contains(named), "{}", said.err);
    assert!(weights(&out) == whole);

    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    fs::remove_dir_all(&checkpoints).expect("removed");
    fs::write(&checkpoints, "notes").expect("written");
    let named = ["checkpoints: a file, and a folder is needed", "hint: "];
    refused(&resume(&out), 1, &named);
}

#[test]
fn a_run_whose_records_are_lost_ends_with_what_is_known() {
    const NOTE: &str = "note: `metrics.jsonl` has 0 of 4 steps";
    let folder = Folder::new();
    let out = folder.path("out");
    let resumed = |more: &[&str]| {
        train(&folder, &[&["--save-every", "2"][..], more].concat()).done();
        let whole = weights(&out);
        for file in ADAPTER.into_iter().chain(["metrics.jsonl"]) {
            fs::remove_file(out.join(file)).expect("removed");
        }
        let said = resume(&out).done();
        assert!(weights(&out) == whole);
        said
    };
    let said = resumed(&[]);
    assert!(said.err.contains(NOTE), "{}", said.err);
    assert!(said.out.contains("4 steps, "), "{}", said.out);
    assert!(!said.out.contains("loss"), "{}", said.out);
    let result = resumed(&["--overwrite", "--json"]).json();
    assert_eq!(result["steps"], 4);
    assert!(result["first_loss"].is_null() && result["last_loss"].is_null());

    // With the records of the last two steps.
    train(&folder, &["--save-every", "2", "--overwrite"]).done();
    let records = out.join("metrics.jsonl");
    let lines = fs::read_to_string(&records).expect("the records");
    let last: String = lines.split_inclusive('\n').skip(2).collect();
    fs::write(&records, last).expect("written");
    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    let said = resume(&out).done();
    let note = NOTE.replace("0 of", "2 of");
    assert!(said.err.contains(&note), "{}", said.err);
    assert!(said.out.contains("loss"), "{}", said.out);
}

#[test]
fn a_forged_step_is_damage_or_refused_and_never_the_end_of_the_run() {
    let folder = Folder::new();
    let (out, options) = (folder.path("out"), ["--save-every", "2", "--overwrite"]);
    for step in ["4000", "9223372036854775808"] {
        train(&folder, &options).done();
        let whole = weights(&out);
        fs::remove_file(out.join("adapter_config.json")).expect("removed");
        let forged = format!("\"step\": {step},");
        forge(&out, "state.json", "\"step\": 4,", &forged);

        let newest = out.join("checkpoints/step-000004");
        let renamed = newest.with_file_name(format!("step-{step}"));
        fs::rename(&newest, &renamed).expect("renamed");
        let fact = format!("the checkpoint is of step {step}, and the run has 4 steps");
        refused(&resume(&out), 1, &[&fact, "hint: "]);
        assert!(!out.join("adapter_config.json").exists());

        fs::rename(&renamed, &newest).expect("renamed");
        let said = resume(&out).done();
        let named = format!("step-000004 is damaged (state.json: is of step {step}");
        assert!(said.err.contains(&named), "{}", said.err);
        assert!(weights(&out) == whole);
    }
}

#[test]
fn a_run_that_goes_on_on_another_machine_says_so() {
    let folder = Folder::new();
    let (out, options) = (folder.path("out"), ["--save-every", "2", "--quiet"]);
    train(&folder, &options).done();
    killed_before_step(&out, 4);
    let said = resume(&out).done();
    assert_eq!(said.err, "");

    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    let from = "\"machine\": \"retune ";
    forge(&out, "state.json", from, &format!("{from}0.0 for "));
    let said = resume(&out).done();
    let warning = "warning: the run was computed by retune 0.0 for ";
    assert!(said.err.starts_with(warning), "{}", said.err);
    assert!(
        said.err.contains("its last bits may differ"),
        "{}",
        said.err
    );
}

#[test]
fn a_comparison_that_goes_on_on_another_machine_says_so() {
    let folder = Folder::new();
    let obstacle = stopped_at_the_second_row(&folder);
    let out = folder.path("comparison");
    let from = "\"machine\":\"retune ";
    replace(&out.join("rows.json"), from, &format!("{from}0.0 for "));
    fs::remove_dir(&obstacle).expect("removed");
    let said = resume(&out).done();
    let warning = "warning: rows were computed by retune 0.0 for ";
    assert!(said.err.contains(warning), "{}", said.err);
}

#[test]
fn a_finished_row_without_its_adapter_is_named_and_trained_again() {
    let folder = Folder::new();
    let obstacle = stopped_at_the_second_row(&folder);
    let out = folder.path("comparison");
    let row = out.join("lora");
    let bytes = |name: &str| fs::read(row.join(name)).expect("written");
    let names = [ADAPTER[0], ADAPTER[1], "retune.json"];
    let files = || names.map(bytes);
    let whole = files();
    let rows = || json(&out.join("rows.json"))["rows"].clone();
    let sums = rows()[1]["adapter_sha256"].clone();
    assert!(names.iter().all(|name| sums[name].is_string()), "{sums}");
    let again = ["warning: the adapter of `lora` is not", "trained again"];
    let damages: [&dyn Fn(); 3] = [
        &|| fs::remove_dir_all(&row).expect("removed"),
        &|| fs::remove_file(row.join("adapter_config.json")).expect("removed"),
        &|| fs::write(row.join("adapter_model.safetensors"), "garbage").expect("written"),
    ];
    for damage in damages {
        damage();
        let named = [&again[..], &["`prompt` failed"]].concat();
        refused(&resume(&out), 1, &named);
        assert!(files() == whole);
        assert_eq!(rows().as_array().map(Vec::len), Some(2));
    }
    fs::remove_dir(&obstacle).expect("removed");
    let said = resume(&out).done();
    assert!(!said.err.contains("trained again"), "{}", said.err);
    assert!(files() == whole);
    let results = json(&out.join("results.json"));
    assert_eq!(results["rows"][1]["method"], "lora");
    assert_eq!(results["rows"][2]["method"], "prompt");
}

#[test]
fn a_score_that_no_model_has_is_refused() {
    let folder = Folder::new();
    stopped_at_the_second_row(&folder);
    let out = folder.path("comparison");
    let rows = out.join("rows.json");
    let score = "\"token_accuracy\":";
    replace(&rows, score, &format!("{score}7.0,\"was\":"));
    let fact = "rows.json: `token_accuracy` of the row `base` is 7";
    refused(&resume(&out), 1, &[fact, "hint: "]);
}
