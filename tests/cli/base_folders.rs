//! What a base's folder may hold, and what its chat template may do: nothing of it changes results without a word.

use super::files::copy_folder;
use super::golden::golden;
use super::{Folder, evaluate, killed_before_step, refused, replace, retune, text, train, weights};
#[cfg(unix)]
use super::{Said, merge};
use safetensors::SafeTensors;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A copy of a golden base that a test may change.
fn copy_of(folder: &Folder, model: &str) -> PathBuf {
    let copy = folder.path(model);
    copy_folder(&golden("models").join(model), &copy);
    copy
}

/// The golden template after a word that tells the second of the minute.
const DATED: &str = "w{{ strftime_now('%S') | int }}{% for message in messages %} <|{{ message.role }}|> \
                     {{ message.content }} </s>{% endfor %}{% if add_generation_prompt %} <|assistant|>{% endif %}";

/// Twenty conversations and a template that reads the date.
fn dated(folder: &Folder) -> (PathBuf, PathBuf) {
    let lines: Vec<String> = (0..20)
        .map(|index| conversation(&format!("w{index}")))
        .collect();
    let data = folder.write("data.jsonl", &lines.join("\n"));
    (data, folder.write("chat.jinja", DATED))
}

fn conversation(asked: &str) -> String {
    format!(
        r#"{{"messages": [{{"role": "user", "content": "{asked}"}}, {{"role": "assistant", "content": "w3 w4"}}]}}"#
    )
}

/// Until a clock shows another second.
fn a_second_later() {
    sleep(Duration::from_millis(1100));
}

/// The line of a run file that has the date.
fn recorded_date(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).expect("a run file");
    let mut lines = text.lines();
    lines
        .find(|line| line.starts_with("template-date = "))
        .map(str::to_owned)
}

#[test]
fn a_run_goes_on_and_is_repeated_with_the_date_that_its_template_read() {
    let folder = Folder::new();
    let (_, template) = dated(&folder);
    let options = ["--chat-template", text(&template), "--save-every", "2"];
    let said = train(&folder, &options).done();
    let (out, again) = (folder.path("out"), folder.path("again"));
    let whole = weights(&out);
    let date = recorded_date(&out.join("run.toml")).expect("a date");
    let date = date.split('"').nth(1).expect("a text");
    let told = format!("the chat template reads the date, {date}");
    assert!(said.err.contains(&told), "no `{told}` in:\n{}", said.err);

    a_second_later();
    killed_before_step(&out, 4);
    retune(["resume", text(&out)]).done();
    assert!(weights(&out) == whole);
    let run = out.join("run.toml");
    let repeat = ["train", "--config", text(&run), "--out", text(&again)];
    retune(repeat).done();
    assert!(weights(&again) == whole);
    let typed = ["--overwrite", "--template-date"];
    train(&folder, &[&options[..], &typed, &[date]].concat()).done();
    assert!(weights(&out) == whole);
    // The date is what makes the difference.
    let second = if date.ends_with("31") { "32" } else { "31" };
    let other = format!("2031-01-02T03:04:{second}");
    train(&folder, &[&options[..], &typed, &[other.as_str()]].concat()).done();
    assert!(weights(&out) != whole);
}

#[test]
fn a_run_that_did_not_record_its_date_goes_on_where_it_is_written_into_its_file() {
    let folder = Folder::new();
    let (_, template) = dated(&folder);
    let options = ["--chat-template", text(&template), "--save-every", "2"];
    train(&folder, &options).done();
    let out = folder.path("out");
    let (whole, run) = (weights(&out), out.join("run.toml"));
    let line = recorded_date(&run).expect("a date");
    replace(&run, &format!("{line}\n"), "");
    a_second_later();
    killed_before_step(&out, 4);
    let said = retune(["resume", text(&out)]);
    let named = ["the training data has changed", "reads the date, ", "hint:"];
    refused(&said, 1, &named);
    // As a date of TOML, which has no quotes.
    let method = "method = ";
    let dated = format!("{}\n{method}", line.replace('"', ""));
    replace(&run, method, &dated);
    retune(["resume", text(&out)]).done();
    assert!(weights(&out) == whole);
}

#[test]
fn a_comparison_goes_on_with_the_date_that_its_template_read() {
    let folder = Folder::new();
    let (data, template) = dated(&folder);
    let (model, out) = (golden("models/llama"), folder.path("comparison"));
    let mut options = vec!["compare", "--model", text(&model), "--data", text(&data)];
    options.extend(["--out", text(&out), "--methods", "lora", "--steps", "2"]);
    retune([&options[..], &["--chat-template", text(&template)]].concat()).done();
    let whole = weights(&out.join("lora"));
    assert!(recorded_date(&out.join("compare.toml")).is_some());

    a_second_later();
    fs::remove_file(out.join("results.json")).expect("removed");
    retune(["resume", text(&out)]).done();
    assert!(weights(&out.join("lora")) == whole);
}

#[test]
fn a_date_is_told_to_templates_that_read_it_and_to_no_others() {
    let folder = Folder::new();
    let said = train(&folder, &[]).done();
    assert!(!said.err.contains("reads the date"), "{}", said.err);
    assert_eq!(recorded_date(&folder.path("out/run.toml")), None);

    let (data, template) = dated(&folder);
    let model = golden("models/llama");
    let score = |date: &str| {
        let mut arguments = vec!["score", "--model", text(&model), "--data", text(&data)];
        arguments.extend(["--chat-template", text(&template)]);
        arguments.extend(["--template-date", date]);
        retune(arguments)
    };
    let scored = |date: &str| score(date).done().out;
    let first = scored("2031-01-02T03:04:05");
    a_second_later();
    assert!(first == scored("2031-01-02T03:04:05"));
    assert!(first != scored("2031-01-02T03:04:06"));
    assert!(scored("2031-01-02") == scored("2031-01-02T00:00:00"));
    let named = ["--template-date", "such as 2026-11-22T10:00:00"];
    refused(&score("2031-02-29"), 2, &named);
}

#[test]
fn a_template_that_fails_slowly_on_every_record_is_refused_soon() {
    let folder = Folder::new();
    let lines: Vec<String> = (0..10_000).map(|_| conversation("w1")).collect();
    folder.write("data.jsonl", &lines.join("\n"));
    let template = folder.write(
        "chat.jinja",
        "{% for _ in range(3000) %}{% for _ in range(3000) %}{% endfor %}{% endfor %}",
    );
    let started = Instant::now();
    let said = train(&folder, &["--chat-template", text(&template)]);
    let named = [
        "error: 1 or more records cannot be used",
        "data.jsonl:1: the chat template does not come to an end",
        "hint:",
        "--skip-bad-records N",
    ];
    refused(&said, 1, &named);
    assert!(!said.err.contains("data.jsonl:2:"), "{}", said.err);
    let time = started.elapsed();
    assert!(time < Duration::from_secs(60), "{time:?}");
}

/// What a command says of a base while something that is no file stands in the place of `name`.
#[cfg(unix)]
fn in_place_of(
    model: &Path,
    name: &str,
    make: impl FnOnce(&Path),
    command: impl FnOnce() -> Said,
) -> Said {
    let (place, aside) = (model.join(name), model.join("aside"));
    let had = place.exists();
    if had {
        fs::rename(&place, &aside).expect("renamed");
    }
    make(&place);
    let said = command();
    if place.symlink_metadata().expect("made").is_dir() {
        fs::remove_dir(&place).expect("removed");
    } else {
        fs::remove_file(&place).expect("removed");
    }
    if had {
        fs::rename(&aside, &place).expect("renamed");
    }
    said
}

#[cfg(unix)]
fn link_to(target: &str) -> impl FnOnce(&Path) {
    move |place| std::os::unix::fs::symlink(target, place).expect("linked")
}

#[cfg(unix)]
#[test]
fn a_file_that_is_there_and_cannot_be_read_is_not_taken_for_absent() {
    let folder = Folder::new();
    let (model, data) = (copy_of(&folder, "llama"), folder.data());
    let said = |name: &str, make: &dyn Fn(&Path)| {
        in_place_of(&model, name, make, || evaluate(&model, &data, &[]))
    };
    for name in [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "additional_chat_templates",
    ] {
        let said = said(name, &|place| link_to("gone")(place));
        let named = format!("{name}: this is a link to `gone`, which does not exist");
        refused(&said, 1, &[&named, "hint:"]);
    }
    let name = "chat_template.jinja";
    let place = format!("error: {}: ", model.join(name).display());
    let round = said(name, &|place| link_to(name)(place));
    refused(&round, 1, &[&place]);
    let made = said(name, &|place| fs::create_dir(place).expect("made"));
    refused(&made, 1, &[&place, "a folder, and a file is needed"]);
    let device = said(name, &|place| link_to("/dev/zero")(place));
    refused(&device, 1, &[&place, "a pipe or a device"]);
    let pipe = said(name, &|place| {
        let made = std::process::Command::new("mkfifo").arg(place).status();
        assert!(made.expect("started").success());
    });
    refused(&pipe, 1, &[&place, "a pipe or a device"]);

    // What leads to a file is one, and what is missing is.
    let linked = in_place_of(&model, name, link_to("aside"), || {
        retune(["inspect", text(&model)])
    });
    assert!(linked.done().out.contains("with a chat template"));
    fs::remove_file(model.join(name)).expect("removed");
    evaluate(&model, &data, &[]).done();
}

#[cfg(unix)]
#[test]
fn a_merge_leaves_no_file_out_because_its_link_is_dead() {
    let folder = Folder::new();
    let (model, adapter) = (copy_of(&folder, "llama"), golden("adapters/lora-llama"));
    let merged = folder.path("merged");
    for name in ["tokenizer.json", "LICENSE", "additional_chat_templates"] {
        let said = in_place_of(&model, name, link_to("gone"), || {
            merge(&model, &adapter, &merged)
        });
        let named = format!("{name}: this is a link to `gone`, which does not exist");
        refused(&said, 1, &[&named, "hint:"]);
        assert!(!merged.exists());
    }
    // What belongs to no model, and folders of other things, stay behind as ever.
    link_to("gone")(&model.join("notes.txt"));
    fs::create_dir(model.join("licenses")).expect("made");
    merge(&model, &adapter, &merged).done();
    assert!(merged.join("tokenizer.json").exists());
    assert!(!merged.join("licenses").exists());
}

#[cfg(unix)]
#[test]
fn an_adapter_whose_base_cannot_be_told_is_refused() {
    let folder = Folder::new();
    train(&folder, &[]).done();
    let (model, adapter) = (golden("models/llama"), folder.path("out"));
    let data = folder.path("data.jsonl");
    let on_it = ["--adapter", text(&adapter)];
    let said = in_place_of(&adapter, "retune.json", link_to("gone"), || {
        evaluate(&model, &data, &on_it)
    });
    let named = "retune.json: this is a link to `gone`, which does not exist";
    refused(&said, 1, &[named, "hint:"]);
    // Other programs write none.
    fs::remove_file(adapter.join("retune.json")).expect("removed");
    evaluate(&model, &data, &on_it).done();
}

const UNUSED: &str = "not part of the model: ";

#[test]
fn weights_that_the_model_does_not_use_are_warned_of_once() {
    let folder = Folder::new();
    let (model, data) = (copy_of(&folder, "llama"), folder.data());
    let layers = "\"num_hidden_layers\": ";
    replace(
        &model.join("config.json"),
        &format!("{layers}2"),
        &format!("{layers}1"),
    );
    let (out, table) = (folder.path("out"), folder.path("table"));
    let on = ["--model", text(&model)];
    let with = ["--data", text(&data)];
    let steps = ["--steps", "1", "--overwrite"];
    let commands: [Vec<&str>; 5] = [
        [&["evaluate"][..], &on, &with].concat(),
        [&["score"][..], &on, &with].concat(),
        [
            &["generate"][..],
            &on,
            &["--prompt", "w1", "--max-tokens", "2"],
        ]
        .concat(),
        [
            &["train", "lora", "--out", text(&out)][..],
            &on,
            &with,
            &steps,
        ]
        .concat(),
        [
            &["compare", "--methods", "lora", "--out", text(&table)][..],
            &on,
            &with,
            &steps,
        ]
        .concat(),
    ];
    let warned = format!("warning: 9 weights are {UNUSED}`model.layers.1.input_layernorm.weight`");
    for command in &commands {
        let said = retune(command.iter().copied()).done();
        assert!(said.err.contains(&warned), "{command:?}: {}", said.err);
        assert!(said.err.contains(" and 3 more"), "{}", said.err);
        assert_eq!(said.err.matches(UNUSED).count(), 1, "{}", said.err);
        assert!(!said.out.contains(UNUSED), "{}", said.out);
        let quiet = retune(command.iter().copied().chain(["--quiet"])).done();
        assert!(!quiet.err.contains(UNUSED), "{}", quiet.err);
    }
    let said = retune(["inspect", text(&model)]).done();
    let noted = warned.replace("warning: ", "note: ");
    assert!(said.out.contains(&noted), "{}", said.out);

    let biased = copy_of(&folder, "llama-biases");
    let bias = "\"attention_bias\": ";
    replace(
        &biased.join("config.json"),
        &format!("{bias}true"),
        &format!("{bias}false"),
    );
    let said = evaluate(&biased, &data, &[]).done();
    let warned = format!("warning: 8 weights are {UNUSED}`model.layers.0.self_attn.k_proj.bias`");
    assert!(said.err.contains(&warned), "{}", said.err);
}

/// Adds a tensor to the weights of a base, with the values of another one.
fn add_tensor(model: &Path, name: &str, like: &str) {
    let file = model.join("model.safetensors");
    let bytes = fs::read(&file).expect("read");
    let stored = SafeTensors::deserialize(&bytes).expect("tensors");
    let mut tensors = stored.tensors();
    tensors.push((name.to_owned(), stored.tensor(like).expect(like)));
    let more = safetensors::serialize(tensors, None).expect("a file");
    fs::write(&file, more).expect("written");
}

#[test]
fn weights_that_nobody_misses_are_not_warned_of() {
    let folder = Folder::new();
    let (model, data) = (copy_of(&folder, "llama-tied"), folder.data());
    add_tensor(&model, "lm_head.weight", "model.embed_tokens.weight");
    for place in ["model", "model.layers.0.self_attn"] {
        let buffer = format!("{place}.rotary_emb.inv_freq");
        add_tensor(&model, &buffer, "model.norm.weight");
    }
    let said = evaluate(&model, &data, &[]).done();
    assert!(!said.err.contains("warning"), "{}", said.err);
    let said = retune(["inspect", text(&model)]).done();
    assert!(!said.out.contains(UNUSED), "{}", said.out);

    add_tensor(&model, "scale", "model.norm.weight");
    let said = evaluate(&model, &data, &[]).done();
    let warned = format!("warning: 1 weight is {UNUSED}`scale`");
    assert!(said.err.contains(&warned), "{}", said.err);
}
