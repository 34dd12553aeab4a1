//! Comparisons: their rows and results, how they are resumed, and what they do not write over.

use super::files::{contents, json};
use super::golden::golden;
#[cfg(unix)]
use super::program::process;
use super::runs::with;
use super::{Folder, Said, record, refused, retune, stopped_at_prompt, text, train};
use std::fs;
use std::path::Path;

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

/// What a comparison found, but for times, speeds and memory.
fn lasting(out: &Path) -> serde_json::Value {
    let mut results = json(&out.join("results.json"));
    for row in results["rows"].as_array_mut().expect("rows") {
        for passing in ["tokens_per_second", "seconds", "peak_memory_bytes"] {
            row[passing] = serde_json::Value::Null;
        }
    }
    results
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
    ])
    .done();
    let results = json(&out.join("results.json"));
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
fn what_no_run_can_mean_is_refused_before_any_row() {
    let folder = Folder::new();
    let cases: [(&[&str], &str); 3] = [
        (&["--keep", "0"], "keep must be at least 1"),
        (&["--methods", "lora", "--batch-size", "0"], "batch-size"),
        (
            &["--with", "lora --learning-rate 0"],
            "learning-rate must be above 0",
        ),
    ];
    for (options, named) in cases {
        refused(&compare(&folder, options), 2, &[named]);
    }
    assert!(!folder.path("comparison").exists());
}

#[test]
fn a_comparison_says_what_it_compared_and_is_replaced_when_told() {
    let folder = Folder::new();
    let results = || json(&folder.path("comparison/results.json"));
    let adapter = |name: &str| {
        folder
            .path("comparison")
            .join(name)
            .join("adapter_config.json")
            .exists()
    };
    let data = folder.path("data.jsonl");
    // Two names that differ in signs alone, and one that no folder can have.
    let long = format!("lora --targets q_proj{}", ",q_proj".repeat(40));
    let said = compare(
        &folder,
        &[
            "--with",
            "lora --targets .*q_proj",
            "--with",
            "lora --targets .+q_proj",
            "--with",
            &long,
            "--unrelated",
            text(&data),
        ],
    )
    .done();
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
    compare(&folder, &["--methods", "prompt", "--overwrite"]).done();
    assert_eq!(results()["rows"][1]["method"], "prompt");
    assert!(adapter("prompt") && !names.iter().any(|name| adapter(name)));
    assert!(folder.path("comparison/notes.txt").exists());
}

#[test]
fn an_interrupted_comparison_resumes_to_the_same_bytes() {
    let folder = Folder::new();
    let (whole, halved) = (folder.path("comparison"), folder.path("halved"));
    let mut options = vec!["--methods", "lora,prompt", "--steps", "4"];
    options.extend(["--eval-every", "1", "--save-every", "2"]);
    compare(&folder, &options).done();

    // As if killed in the second row, after the checkpoint of step 2.
    options.extend(["--out", text(&halved)]);
    compare(&folder, &options).done();
    fs::remove_dir(stopped_at_prompt(&halved)).expect("removed");
    fs::remove_dir_all(halved.join("prompt/checkpoints/step-000004")).expect("removed");
    let rows = |file: &str| json(&halved.join(file))["rows"].clone();
    let finished = rows("rows.json");

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
    let said = retune(["resume", text(&halved)]).done();
    assert!(!said.err.contains("training lora"), "{}", said.err);
    assert!(
        said.err.contains("training prompt after step 2"),
        "{}",
        said.err
    );
    assert_eq!(lasting(&whole), lasting(&halved));
    // The rows that were finished are taken as they were, to the second.
    let rows = rows("results.json");
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
    let results = || json(&out.join("results.json"));
    let diverging = "lora --learning-rate 1e38";
    let mut options = vec!["--with", diverging, "--with", "prompt"];
    options.extend(["--steps", "3", "--warmup-steps", "0"]);
    options.extend(["--schedule", "constant"]);
    let said = compare(&folder, &options);
    let named = [
        "`lora --learning-rate 1e38` of seed 0: `base_model.",
        "no numbers after step 1",
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
            .is_some_and(|reason| reason.contains("no numbers after step 1")),
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

    train(&folder, &[]).done();
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
    let named = |name: &str| {
        let config = json(&out.join("prompt/adapter_config.json"));
        assert_eq!(config["base_model_name_or_path"], name);
        assert_eq!(json(&out.join("results.json"))["base"], name);
    };
    let options = ["--model", base, "--methods", "prompt"];
    compare(&folder, &options).done();
    named(base);
    let told = ["--overwrite", "--base-name", "org/base"];
    compare(&folder, &[&options[..], &told].concat()).done();
    named("org/base");
    let file = fs::read_to_string(out.join("compare.toml")).expect("the options");
    assert!(file.contains("base-name = \"org/base\""), "{file}");
}

/// A comparison of `methods`, of which `lora` is the first, that is at work on it and would be for days.
#[cfg(unix)]
fn comparison_at_work(folder: &Folder, methods: &str) -> std::process::Child {
    let (data, out, model) = (
        folder.data(),
        folder.path("comparison"),
        golden("models/llama"),
    );
    let mut comparison = process()
        .args(["compare", "--model", text(&model), "--data", text(&data)])
        .args(["--out", text(&out), "--methods", methods])
        .args(["--steps", "1000000"])
        .spawn()
        .expect("started");
    while !out.join("lora/metrics.jsonl").exists() {
        let ended = comparison.try_wait().expect("a process");
        assert!(ended.is_none(), "{ended:?}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    comparison
}

#[cfg(unix)]
#[test]
fn a_comparison_that_is_asked_to_stop_says_how_to_go_on() {
    let folder = Folder::new();
    let out = folder.path("comparison");
    let comparison = comparison_at_work(&folder, "lora");
    let asked = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("kill -INT {}", comparison.id()))
        .status()
        .expect("started");
    assert!(asked.success());
    let said = Said::of(comparison.wait_with_output().expect("ended"));
    let named = ["of `lora`; everything is saved", "hint: ", "retune resume"];
    refused(&said, 130, &named);
    assert!(out.join("lora/checkpoints").exists());

    let other = ["--methods", "prompt"];
    let unfinished = ["unfinished comparison", "retune resume", "--overwrite"];
    refused(&compare(&folder, &other), 1, &unfinished);
    compare(&folder, &[&other[..], &["--overwrite"]].concat()).done();
    assert!(out.join("results.json").exists() && !out.join("lora").exists());
}

#[test]
fn what_lies_where_a_row_would_be_written_is_not_replaced_unasked() {
    let folder = Folder::new();
    let row = folder.path("comparison/lora");
    fs::create_dir_all(&row).expect("a folder");
    let said = compare(&folder, &["--methods", "lora"]);
    refused(&said, 1, &["would be written here", "--overwrite"]);
    compare(&folder, &["--methods", "lora", "--overwrite"]).done();
    assert!(row.join("adapter_config.json").exists());
}

#[test]
fn a_comparison_does_not_take_a_limit_that_it_would_not_keep() {
    let said = compare(&Folder::new(), &["--memory-limit", "1"]);
    refused(&said, 2, &["--memory-limit", "--recompute"]);
}

#[test]
fn work_is_not_written_over_what_it_is_made_from_or_other_work() {
    let folder = Folder::new();
    train(&folder, &[]).done();
    let out = folder.path("out");
    let said = train(&folder, &["--init-adapter", text(&out), "--overwrite"]);
    refused(&said, 2, &["name the same folder", "hint:"]);
    let said = compare(&folder, &["--out", text(&out), "--overwrite"]);
    refused(&said, 1, &["a run of `retune train`", "hint:"]);
    assert!(out.join("adapter_model.safetensors").exists());

    // Nor where a row would be written, as long as it is not known to be the comparison's.
    let begun = folder.path("begun");
    let row = begun.join("lora");
    train(&folder, &["--out", text(&row), "--save-every", "2"]).done();
    let before = contents(&row);
    let here = ["--out", text(&begun), "--methods", "lora", "--overwrite"];
    let named = ["begun/lora: ", "a run of `retune train`", "hint:"];
    refused(&compare(&folder, &here), 1, &named);
    assert!(contents(&row) == before);

    let other = folder.path("compared");
    compare(&folder, &["--out", text(&other)]).done();
    let said = train(&folder, &["--out", text(&other), "--overwrite"]);
    refused(&said, 1, &["holds a comparison", "hint:"]);
}

#[test]
fn a_comparison_goes_on_with_the_options_it_was_begun_with() {
    let folder = Folder::new();
    let out = folder.path("comparison");
    let mut options = vec!["--methods", "lora,prompt", "--steps", "4"];
    options.extend(["--save-every", "2"]);
    compare(&folder, &options).done();
    // As if killed in the second row.
    fs::remove_dir(stopped_at_prompt(&out)).expect("removed");

    let file = out.join("compare.toml");
    let begun = fs::read_to_string(&file).expect("the options");
    for (name, value, named) in [
        ("steps", "8", "`steps`, 4 before and 8 now,"),
        ("batch-size", "2", "`batch-size`, 4 before and 2 now,"),
        ("learning-rate", "0.25", "the learning rate of `lora`, "),
        ("schedule", "\"linear\"", "`schedule`, "),
        ("epsilon", "0.001", "`epsilon`, "),
        ("tokens-per-pass", "16", "`tokens-per-pass`, "),
        ("exact-match", "3", "`exact-match` has"),
    ] {
        fs::write(&file, with(&begun, name, value)).expect("written");
        let parts = [named, "changed since the comparison", "--overwrite"];
        refused(&retune(["resume", text(&out)]), 1, &parts);
    }
    let free = [("keep", "5"), ("save-every", "1"), ("threads", "2")];
    let changed = free
        .iter()
        .fold(begun, |options, (name, value)| with(&options, name, value));
    fs::write(&file, changed).expect("written");
    retune(["resume", text(&out)]).done();
    assert!(out.join("results.json").exists());
}

#[test]
fn what_stands_in_the_way_of_any_row_is_named_before_the_results_are_removed() {
    let folder = Folder::new();
    let out = folder.path("comparison");
    let mut options = vec!["--methods", "lora,prompt", "--overwrite"];
    compare(&folder, &options).done();
    // The rows of the earlier comparison are in the way of this one, too, which would remove them.
    options[1] = "lora";
    let is_refused = |name: &str| {
        let before = contents(&out);
        refused(&compare(&folder, &options), 1, &[name, "hint:"]);
        assert!(contents(&out) == before, "{name}");
    };
    for name in ["comparison.svg", "prompt/metrics.jsonl", "lora/retune.json"] {
        let (place, aside) = (out.join(name), folder.path("aside"));
        fs::rename(&place, &aside).expect("moved");
        fs::create_dir(&place).expect("made");
        is_refused(name);
        fs::remove_dir(&place).expect("removed");
        fs::rename(&aside, &place).expect("moved back");
    }
    #[cfg(unix)]
    for name in ["prompt/checkpoints", "prompt/checkpoints/step-000001"] {
        let place = out.join(name);
        fs::create_dir_all(place.parent().expect("a folder")).expect("made");
        std::os::unix::fs::symlink("nowhere", &place).expect("linked");
        is_refused(name);
        fs::remove_file(&place).expect("removed");
    }
    compare(&folder, &options).done();
    assert!(!out.join("prompt/adapter_config.json").exists());
}

#[cfg(unix)]
#[test]
fn no_other_run_is_let_into_the_rows_of_a_comparison_that_is_at_work() {
    let folder = Folder::new();
    let out = folder.path("comparison");
    let mut comparison = comparison_at_work(&folder, "lora,prompt");
    // The row in training, and one that is still to come.
    let (lora, prompt) = (out.join("lora"), out.join("prompt"));
    let inside = [&lora, &prompt].map(|row| train(&folder, &["--out", text(row), "--overwrite"]));
    comparison.kill().expect("killed");
    comparison.wait().expect("ended");
    for said in inside {
        refused(&said, 1, &["another run is writing to this folder"]);
    }
    assert!(!lora.join("run.toml").exists() && !prompt.join("run.toml").exists());
    // The locks went with the process that held them.
    train(&folder, &["--out", text(&prompt)]).done();
}
