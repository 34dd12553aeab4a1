//! Folders and files that are damaged, or a stranger's: what is wrong with them is named.

use super::files::copy_files;
use super::golden::golden;
use super::{
    ADAPTER, Folder, Said, evaluate, forge, merge, model_copy, no_adapter_in, refused, replace,
    retune, text, train, while_replaced,
};
use std::fs;
use std::path::{Path, PathBuf};

/// A copy of a golden adapter that a test may damage.
fn adapter_copy(folder: &Folder, name: &str) -> PathBuf {
    let copy = folder.path(name);
    copy_files(&golden("adapters").join(name), &copy, &ADAPTER);
    copy
}

#[test]
fn a_truncated_checkpoint_is_refused() {
    let folder = Folder::new();
    let (model, data) = (model_copy(&folder), folder.data());
    let weights = model.join("model.safetensors");
    let bytes = fs::read(&weights).expect("read");
    fs::write(&weights, &bytes[..bytes.len() / 2]).expect("written");
    let said = evaluate(&model, &data, &[]);
    refused(&said, 1, &["model.safetensors", "hint:"]);
}

#[test]
fn a_missing_tokenizer_is_named() {
    let folder = Folder::new();
    let (model, data) = (model_copy(&folder), folder.data());
    fs::remove_file(model.join("tokenizer.json")).expect("removed");
    let said = evaluate(&model, &data, &[]);
    refused(&said, 1, &["tokenizer.json", "hint:"]);
}

#[cfg(unix)]
#[test]
fn nothing_outside_of_a_base_is_copied_and_pipes_and_devices_are_refused() {
    use std::os::unix::fs::symlink;
    let folder = Folder::new();
    train(&folder, &[]).done();
    let (model, adapter) = (model_copy(&folder), folder.path("out"));
    let secret = folder.write("secret", "not for others");
    symlink(&secret, model.join("tokenizer_notes.txt")).expect("linked");
    let merged = folder.path("merged");
    let said = merge(&model, &adapter, &merged);
    refused(&said, 1, &["tokenizer_notes.txt", "leads out of", "hint:"]);
    assert!(!merged.exists());
    fs::remove_file(model.join("tokenizer_notes.txt")).expect("removed");
    merge(&model, &adapter, &merged).done();

    let data = folder.path("data.jsonl");
    for name in [
        "generation_config.json",
        "tokenizer_config.json",
        "config.json",
    ] {
        let file = model.join(name);
        let before = fs::read(&file).expect("read");
        fs::remove_file(&file).expect("removed");
        symlink("/dev/zero", &file).expect("linked");
        refused(&evaluate(&model, &data, &[]), 1, &[name, "a device"]);
        fs::remove_file(&file).expect("removed");
        fs::write(&file, before).expect("written");
    }
}

#[test]
fn a_soft_prompt_of_another_length_or_width_is_seen_by_inspect() {
    let folder = Folder::new();
    let adapter = adapter_copy(&folder, "prompt-llama");
    retune(["inspect", text(&adapter)]).done();
    let config = adapter.join("adapter_config.json");
    let changed = |from: &str, to: &str, more: &[&str], named: &[&str]| {
        let inspect = [&["inspect", text(&adapter)][..], more].concat();
        let said = while_replaced(&config, from, to, || retune(inspect));
        refused(&said, 1, named);
    };
    let (count, width) = ("\"num_virtual_tokens\": 4", "\"token_dim\": 32");
    let named = ["`prompt_embeddings` is [4, 32]", "needs [5, 32]"];
    changed(count, "\"num_virtual_tokens\": 5", &[], &named);
    let model = golden("models/llama");
    let base = ["--model", text(&model)];
    changed(count, "\"num_virtual_tokens\": 5", &base, &named);
    let named = ["`prompt_embeddings` is [4, 32]", "needs [4, 48]"];
    changed(width, "\"token_dim\": 48", &[], &named);

    // The base is what it must fit, whatever the adapter says of itself.
    let copy = model_copy(&folder);
    let config = copy.join("config.json");
    replace(&config, "\"hidden_size\": 32", "\"hidden_size\": 64");
    let said = retune(["inspect", text(&adapter), "--model", text(&copy)]);
    refused(
        &said,
        1,
        &["`prompt_embeddings` is [4, 32]", "needs [4, 64]"],
    );
}

#[test]
fn weights_of_integers_are_seen_by_inspect() {
    let folder = Folder::new();
    let model = model_copy(&folder);
    retune(["inspect", text(&model)]).done();
    let weights = model.join("model.safetensors");
    replace(&weights, "\"F32\"", "\"U32\"");
    let said = retune(["inspect", text(&model)]);
    refused(&said, 1, &["stored as U32, which cannot be used", "BF16"]);
}

#[test]
fn an_adapter_in_a_pickle_is_named_with_the_way_to_convert_it() {
    let folder = Folder::new();
    let adapter = adapter_copy(&folder, "lora-llama");
    let pickle = adapter.join("adapter_model.bin");
    fs::rename(adapter.join("adapter_model.safetensors"), &pickle).expect("renamed");
    let named = ["pickle", "adapter_model.bin", "run code", "weights_only"];
    refused(&retune(["inspect", text(&adapter)]), 1, &named);
    fs::remove_file(adapter.join("adapter_config.json")).expect("removed");
    refused(&retune(["inspect", text(&adapter)]), 1, &named);
}

#[test]
fn the_numbers_of_an_adapter_are_named_with_file_and_field() {
    let folder = Folder::new();
    let (model, data) = (golden("models/llama"), folder.data());
    let adapter = adapter_copy(&folder, "lora-llama");
    let config = adapter.join("adapter_config.json");
    for (from, to, field) in [
        ("\"r\": 4", "\"r\": 1000000000000", "field `r`: a rank"),
        (
            "\"lora_dropout\": 0.0",
            "\"lora_dropout\": 1.5",
            "field `lora_dropout`: dropout",
        ),
        (
            "\"rank_pattern\": {}",
            "\"rank_pattern\": {\"q_proj\": 0}",
            "field `rank_pattern`: a rank",
        ),
    ] {
        let adapter = ["--adapter", text(&adapter)];
        let said = while_replaced(&config, from, to, || evaluate(&model, &data, &adapter));
        refused(&said, 1, &["adapter_config.json", field]);
    }
}

#[test]
fn a_file_that_cannot_be_used_is_told_apart_from_one_that_is_broken() {
    let folder = Folder::new();
    let model = model_copy(&folder);
    let evaluate = |data: &Path| evaluate(&model, data, &[]);
    // Half of a pair, alone or before something else.
    for half in ["\\ud83d", "\\ud83d!", "\\ud83d\\u0041", "\\ude00"] {
        let record = format!(r#"{{"prompt": "w1", "completion": "{half}"}}"#);
        let said = evaluate(&folder.write("half.jsonl", &record));
        refused(&said, 1, &["half.jsonl:1", "half of a character"]);
    }
    let packed = folder.path("packed.jsonl");
    for (start, named) in [
        (&b"\x28\xb5\x2f\xfd\x04\x58"[..], "`zstd -d`"),
        (&b"\xfd7zXZ\0\0\x04"[..], "`xz -d`"),
        (&b"BZh91AY&SY"[..], "`bzip2 -d`"),
    ] {
        fs::write(&packed, start).expect("written");
        refused(&evaluate(&packed), 1, &["packed.jsonl", named]);
    }

    let data = folder.data();
    for file in ["config.json", "tokenizer_config.json", "tokenizer.json"] {
        let bytes = fs::read(model.join(file)).expect("read");
        let marked = [&b"\xef\xbb\xbf"[..], bytes.as_slice()].concat();
        fs::write(model.join(file), marked).expect("written");
    }
    evaluate(&data).done();

    let weights = model.join("model.safetensors");
    fs::write(&weights, [0u8; 8]).expect("written");
    refused(&evaluate(&data), 1, &["header is empty", "hint:"]);
    fs::write(&weights, b"\x02\0\0\0\0\0\0\0{}").expect("written");
    refused(&evaluate(&data), 1, &["hold no tensor", "hint:"]);
    fs::remove_file(&weights).expect("removed");
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("blobs/gone", &weights).expect("linked");
        let named = ["model.safetensors", "a link to `blobs/gone`", "hint:"];
        refused(&evaluate(&data), 1, &named);
    }
}

#[test]
fn a_checkpoint_of_other_tensors_is_named_with_file_tensor_and_shapes() {
    let folder = Folder::new();
    let out = folder.path("out");
    let a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let shape = ("\"shape\":[8,32]", "\"shape\":[32,8]");
    let shapes = ["is [32, 8], the run has [8, 32]", "hint:"];
    let first = format!("there is no `first.{a}` in it");
    let cases: [(&str, (&str, &str), &[&str]); 3] = [
        ("weights.safetensors", shape, &shapes),
        ("best.safetensors", shape, &shapes),
        (
            "optimizer.safetensors",
            (
                "first.base_model.model.model.layers.0.self_attn.q_proj",
                "third.base_model.model.model.layers.0.self_attn.q_proj",
            ),
            &[&first, "hint:"],
        ),
    ];
    for (file, (from, to), named) in cases {
        let options = ["--save-every", "2", "--eval-fraction", "0.2", "--overwrite"];
        train(&folder, &options).done();
        fs::remove_file(out.join("adapter_config.json")).expect("removed");
        forge(&out, file, from, to);
        let said = retune(["resume", text(&out)]);
        refused(&said, 1, &[&[file][..], named].concat());
    }
}

#[test]
fn sizes_that_no_model_has_are_refused_and_those_of_no_machine_are_planned_but_not_made() {
    let folder = Folder::new();
    let (model, data) = (model_copy(&folder), folder.data());
    let config = model.join("config.json");
    let original = fs::read(&config).expect("read");
    let sized = |sizes: &[(&str, &str)]| {
        fs::write(&config, &original).expect("written");
        for (name, size) in sizes {
            let now = match *name {
                "hidden_size" => "32",
                "intermediate_size" => "48",
                _ => "2",
            };
            let (from, to) = (
                format!("\"{name}\": {now},"),
                format!("\"{name}\": {size},"),
            );
            replace(&config, &from, &to);
        }
    };
    let plan = |method: &str| {
        let arguments = ["plan", "train", method, "--model", text(&model)];
        let data = ["--data", text(&data), "--out", "never", "--json"];
        retune(arguments.into_iter().chain(data))
    };
    let bench = || retune(["bench", "lora", "--shape", text(&config)]);
    let cases: [(&[(&str, &str)], &str); 4] = [
        (&[("hidden_size", "1099511627776")], "expected 1 to 1048576"),
        (&[("num_hidden_layers", "1000000000")], "expected 1 to 4096"),
        (
            &[("hidden_size", "18446744073709551616")],
            "expected a whole number",
        ),
        (
            &[
                ("hidden_size", "1048576"),
                ("intermediate_size", "4194304"),
                ("num_hidden_layers", "4096"),
            ],
            "the sizes make a model of",
        ),
    ];
    for (sizes, named) in cases {
        sized(sizes);
        refused(&plan("lora"), 1, &["config.json", named]);
        refused(&bench(), 1, &["config.json", named]);
    }

    // Twenty terabytes.
    sized(&[
        ("hidden_size", "131072"),
        ("intermediate_size", "524288"),
        ("num_hidden_layers", "64"),
    ]);
    // Elsewhere the system does not say what is free.
    if cfg!(target_os = "linux") {
        let named = ["the bench needs about", "the machine has free", "--shape"];
        refused(&bench(), 1, &named);
    }
    for method in ["lora", "last-layers", "prompt"] {
        let said = plan(method);
        assert_eq!(said.code, 0, "{method}: {}", said.err);
        let planned = said.json();
        assert!(planned["seconds"].is_null(), "{planned}");
        let bytes = planned["base_bytes"].as_f64().expect("a number");
        assert!(bytes > 2e13, "{planned}");
    }
}

#[test]
fn what_a_terminal_would_obey_is_not_printed_from_a_strangers_file() {
    let folder = Folder::new();
    let (model, data) = (model_copy(&folder), folder.data());
    let config = model.join("config.json");
    let changed = fs::read_to_string(&config).expect("read");
    let changed = changed.replace(
        "\"model_type\": \"llama\"",
        "\"model_type\": \"\\u001b[31mred\"",
    );
    fs::write(&config, changed).expect("written");
    let said = evaluate(&model, &data, &[]);
    refused(&said, 1, &["[31mred"]);
    assert!(!said.err.contains('\u{1b}'), "{:?}", said.err);
    let said = retune(["inspect", text(&model)]);
    refused(&said, 1, &["[31mred"]);
    let both = said.out + &said.err;
    assert!(!both.contains('\u{1b}'), "{both:?}");
}

#[test]
fn a_template_that_would_use_up_the_memory_ends_the_program_with_an_error() {
    let folder = Folder::new();
    let message = r#"{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}"#;
    folder.write("data.jsonl", &format!(r#"{{"messages": [{message}]}}"#));
    for doubled in [
        "text.x ~ text.x",
        "text.x + text.x",
        "[text.x, text.x] | join",
    ] {
        let template = folder.write(
            "chat.jinja",
            &format!(
                "{{% set text = namespace(x='retune') %}}\
                 {{% for _ in range(50) %}}{{% set text.x = {doubled} %}}{{% endfor %}}{{{{ text.x | length }}}}"
            ),
        );
        let said = train(
            &folder,
            &["--chat-template", text(&template), "--learn", "all"],
        );
        refused(
            &said,
            1,
            &[
                "error: the chat template needs more than 2 GiB of memory",
                "hint:",
            ],
        );
        no_adapter_in(&folder.path("out"));
    }
}

/// Uses `adapter` on the golden base `base` in each way that says something of it.
fn uses(base: &str, adapter: &Path, data: &Path) -> [Said; 3] {
    let model = golden("models").join(base);
    let data = ["--data", text(data)];
    let prompt = ["--prompt", "w1 w2", "--max-tokens", "8"];
    let commands: [(&str, &[&str]); 3] =
        [("evaluate", &data), ("score", &data), ("generate", &prompt)];
    commands.map(|(command, options)| {
        let both = [command, "--model", text(&model), "--adapter", text(adapter)];
        retune(both.into_iter().chain(options.iter().copied()))
    })
}

#[test]
fn an_adapter_that_is_not_finite_is_named_and_not_its_base() {
    let folder = Folder::new();
    let (model, data) = (golden("models/llama"), folder.data());
    let adapter = adapter_copy(&folder, "lora-llama");
    let weights = adapter.join("adapter_model.safetensors");
    let before = fs::read(&weights).expect("read");
    let tensor = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight";
    let place = before.len() - 4;
    for value in [f32::NAN, f32::INFINITY] {
        let mut bytes = before.clone();
        bytes[place..].copy_from_slice(&value.to_le_bytes());
        fs::write(&weights, bytes).expect("written");
        let named = ["lora-llama/adapter_model.safetensors", tensor, "hint:"];
        for said in uses("llama", &adapter, &data) {
            refused(&said, 1, &named);
            assert!(said.err.contains("1 of the 64 values"), "{}", said.err);
            assert!(!said.err.contains("the loss is"), "{}", said.err);
        }
        let out = folder.path("merged");
        refused(&merge(&model, &adapter, &out), 1, &named);
        assert!(!out.exists());
        let bases: [&[&str]; 2] = [&[], &["--model", text(&model)]];
        for base in bases {
            let arguments = ["inspect", text(&adapter)].into_iter();
            let said = retune(arguments.chain(base.iter().copied()));
            refused(&said, 1, &[]);
            let problem = format!("`{tensor}` holds");
            assert_eq!(said.out.matches(&problem).count(), 1, "{}", said.out);
            assert_eq!(said.out.matches("problem: ").count(), 1, "{}", said.out);
        }
    }
    fs::write(&weights, before).expect("written");

    let config = adapter.join("adapter_config.json");
    for (from, to, field) in [
        ("\"lora_alpha\": 6", "\"lora_alpha\": 1e39", "`lora_alpha`"),
        (
            "\"alpha_pattern\": {}",
            "\"alpha_pattern\": {\"q_proj\": -1e39}",
            "`alpha_pattern`",
        ),
    ] {
        for said in while_replaced(&config, from, to, || uses("llama", &adapter, &data)) {
            refused(&said, 1, &["adapter_config.json", field, "1e39"]);
        }
    }
}

#[test]
fn blocks_and_patterns_that_peft_reads_are_no_fault_of_the_command_line() {
    let folder = Folder::new();
    let data = folder.data();
    for (name, from, to) in [
        (
            "lora-layers-qwen2",
            "\"layers_to_transform\": [\n    1\n  ]",
            "\"layers_to_transform\": [\n    1,\n    5\n  ]",
        ),
        (
            "lora-regex-qwen2",
            r"\\d+\\.(self_attn",
            r"\\d+\\.(?!cross)(self_attn",
        ),
    ] {
        let adapter = adapter_copy(&folder, name);
        let plain = uses("qwen2", &adapter, &data);
        replace(&adapter.join("adapter_config.json"), from, to);
        for (plain, said) in plain.iter().zip(uses("qwen2", &adapter, &data)) {
            assert_eq!(plain.code, 0, "{}", plain.err);
            assert_eq!(said.done().out, plain.out, "{name}");
        }
    }
    let adapter = folder.path("lora-regex-qwen2");
    let config = adapter.join("adapter_config.json");
    replace(&config, "(?!cross)(self_attn", "(self_attn");
    replace(&config, "mlp", "(mlp");
    for said in uses("qwen2", &adapter, &data) {
        refused(&said, 1, &["adapter_config.json", "`target_modules`"]);
    }

    refused(&train(&folder, &["--layers", "0,5"]), 1, &["`--layers`"]);
    let typed = ["--overwrite", "--targets", "all-linear,lm_head"];
    refused(&train(&folder, &typed), 2, &["`all-linear` stands alone"]);
    for patterns in [
        "q_proj=3,q_proj=400",
        "q_proj=3,layers.0.self_attn.q_proj=5",
    ] {
        let typed = ["--overwrite", "--rank-pattern", patterns];
        refused(&train(&folder, &typed), 1, &["never counts", "hint:"]);
    }
    no_adapter_in(&folder.path("out"));
}

#[test]
fn a_template_that_writes_more_than_a_text_may_have_is_refused_soon() {
    let folder = Folder::new();
    let message = r#"{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}"#;
    folder.write("data.jsonl", &format!(r#"{{"messages": [{message}]}}"#));
    // 2⁶⁰ times the word.
    let doubled = format!(
        "{{% set a = ['{}'] %}}{}",
        "w".repeat(1 << 16),
        "{% set a = [a, a] %}".repeat(60)
    );
    for (template, named) in [
        (format!("{doubled}{{{{ a }}}}"), "becomes too long"),
        (format!("{doubled}{{{{ a | tojson }}}}"), "becomes too long"),
        (
            format!("{doubled}{{{{ a | string | length }}}}"),
            "becomes too long",
        ),
        (
            "{{ '{:1000000000}'.format(1) }}".to_owned(),
            "format: at most",
        ),
        (
            "{{ '{:.1000000000f}'.format(1.5) }}".to_owned(),
            "format: at most",
        ),
        (
            "{{ '%1000000000d' | format(1) }}".to_owned(),
            "format: at most",
        ),
    ] {
        let file = folder.write("chat.jinja", &template);
        let said = train(&folder, &["--chat-template", text(&file), "--learn", "all"]);
        refused(
            &said,
            1,
            &["data.jsonl:1: the chat template fails", named, "hint:"],
        );
        no_adapter_in(&folder.path("out"));
    }
}

#[test]
fn a_record_whose_tokens_would_use_up_the_memory_is_a_bad_one() {
    let folder = Folder::new();
    // Six bytes in the file for each of them.
    let long = "\\u0077\\u0031\\u0020".repeat(3 << 19);
    let mut lines: Vec<String> = (0..20).map(super::record).collect();
    lines.push(format!(r#"{{"prompt": "w1", "completion": "{long}"}}"#));
    folder.write("data.jsonl", &lines.join("\n"));
    let said = train(&folder, &[]);
    let named = [
        "data.jsonl:21: the text has 4718594 bytes",
        "split the text",
        "--skip-bad-records 1",
    ];
    refused(&said, 1, &named);
    let said = train(&folder, &["--overwrite", "--skip-bad-records", "1"]).done();
    assert!(said.err.contains("1 records skipped"), "{}", said.err);

    let prompt = folder.write("prompt.txt", &"w1 ".repeat(2 << 20));
    let model = golden("models/llama");
    let layouts: [&[&str]; 2] = [&[], &["--chat"]];
    for layout in layouts {
        let arguments = [
            "generate",
            "--model",
            text(&model),
            "--prompt-file",
            text(&prompt),
        ];
        let said = retune(arguments.iter().chain(layout).copied());
        refused(&said, 1, &["the text has 6291456 bytes", "split the text"]);
    }
}

#[test]
fn a_head_that_config_json_ties_and_the_weights_do_not_is_one_of_its_own_for_every_command() {
    let folder = Folder::new();
    let (model, untied, data) = (model_copy(&folder), golden("models/llama"), folder.data());
    let tied = "\"tie_word_embeddings\": true";
    let config = model.join("config.json");
    replace(&config, "\"tie_word_embeddings\": false", tied);
    let on = |command: &[&str], model: &Path| {
        let arguments = command.iter().copied().chain(["--model", text(model)]);
        retune(arguments.collect::<Vec<_>>()).done()
    };
    let said = on(&["score", "--data", text(&data)], &model);
    assert!(
        said.err.contains("warning: `tie_word_embeddings` is true"),
        "{}",
        said.err
    );
    assert!(
        said.err.contains("`lm_head.weight` is not the embedding"),
        "{}",
        said.err
    );
    let expected = on(&["score", "--data", text(&data)], &untied);
    assert_eq!(said.out, expected.out);
    assert!(!expected.err.contains("warning"), "{}", expected.err);

    let said = retune(["inspect", text(&model)]).done();
    for part in ["note: `tie_word_embeddings` is true", "a matrix of its own"] {
        assert!(said.out.contains(part), "no `{part}` in:\n{}", said.out);
    }
    let plan = [
        "plan",
        "train",
        "lora",
        "--data",
        text(&data),
        "--out",
        "never",
        "--json",
    ];
    let base = |model: &Path| {
        let planned = on(&plan, model).json();
        (
            planned["base_parameters"].clone(),
            planned["base_bytes"].clone(),
        )
    };
    assert_eq!(base(&model), base(&untied));

    // What is merged says so to readers that look at the configuration alone.
    let (adapter, merged) = (folder.path("adapter"), folder.path("merged"));
    let train = [
        "train",
        "lora",
        "--data",
        text(&data),
        "--out",
        text(&adapter),
        "--steps",
        "2",
    ];
    on(&train, &model);
    on(
        &["merge", "--adapter", text(&adapter), "--out", text(&merged)],
        &model,
    );
    let written = fs::read_to_string(merged.join("config.json")).expect("read");
    assert!(!written.contains(tied), "{written}");
    let alone = on(&["evaluate", "--data", text(&data)], &merged);
    assert!(!alone.err.contains("warning"), "{}", alone.err);
}

#[test]
fn sequences_beyond_the_positions_of_the_model_are_warned_of() {
    let folder = Folder::new();
    let (model, out) = (golden("models/llama"), folder.path("out"));
    let long = "w1 w2 w3 w4 ".repeat(30);
    let lines: Vec<String> = (0..20)
        .map(|index| format!(r#"{{"prompt": "w{index}", "completion": " {long}"}}"#))
        .collect();
    let long = folder.write("long.jsonl", &lines.join("\n"));
    let short = folder.data();
    let warned =
        "warning: the longest example has 80 tokens, and the model was made for 64 positions";
    let options = ["--overwrite", "--steps", "1"];
    let table = folder.path("table");
    let trained = ["train", "lora", "--out", text(&out)];
    let compared = ["compare", "--methods", "lora", "--out", text(&table)];
    let commands: [(&[&str], &[&str]); 4] = [
        (&["evaluate"], &[]),
        (&["score"], &[]),
        (&trained, &options),
        (&compared, &options),
    ];
    for (command, options) in commands {
        let said = |data: &Path, more: &[&str]| {
            let shared = ["--model", text(&model), "--data", text(data)];
            let arguments = command.iter().chain(&shared).chain(options).chain(more);
            let said = retune(arguments.copied().collect::<Vec<_>>());
            assert_eq!(said.code, 0, "{command:?}: {}", said.err);
            said.err
        };
        let err = said(&long, &["--max-length", "80"]);
        assert!(err.contains(warned), "{command:?}: {err}");
        // By default examples are cut to what the model was made for.
        let err = said(&long, &[]);
        assert!(!err.contains("warning"), "{command:?}: {err}");
    }
    let prompt = [
        "train",
        "prompt",
        "--virtual-tokens",
        "63",
        "--out",
        text(&out),
    ];
    let shared = ["--model", text(&model), "--data", text(&short)];
    let said = retune(prompt.into_iter().chain(shared).chain(options)).done();
    let warned = "tokens after 63 rows of a soft prompt, and the model was made for 64 positions";
    assert!(said.err.contains(warned), "{}", said.err);
}

#[test]
fn names_in_a_strangers_files_are_shown_as_far_as_one_reads_them() {
    let folder = Folder::new();
    let long = "x".repeat(100_000);
    let shown = format!("`{}…`", "x".repeat(80));
    folder.write("data.jsonl", &format!(r#"{{"{long}": "w1"}}"#));
    let said = train(&folder, &[]);
    refused(&said, 1, &["its keys are", &shown]);
    assert!(said.err.len() < 1000, "{}", said.err);
    folder.write(
        "data.jsonl",
        &format!(r#"{{"messages": [{{"role": "{long}", "content": "w1"}}]}}"#),
    );
    let said = train(&folder, &[]);
    refused(&said, 1, &["no role is called", &shown]);
    assert!(said.err.len() < 1000, "{}", said.err);

    let (model, data) = (model_copy(&folder), folder.data());
    let weights = model.join("model.safetensors");
    let bytes = fs::read(&weights).expect("read");
    fs::remove_file(&weights).expect("removed");
    let index = format!(r#"{{"weight_map": {{"a": "{long}"}}}}"#);
    fs::write(model.join("model.safetensors.index.json"), index).expect("written");
    let evaluate = || evaluate(&model, &data, &[]);
    let said = evaluate();
    refused(&said, 1, &["file names in an index", &shown]);
    assert!(said.err.len() < 1000, "{}", said.err);
    fs::write(&weights, bytes).expect("written");

    let config = model.join("config.json");
    let field = format!("\"{long}\": true, \"model_type\"");
    replace(&config, "\"model_type\"", &field);
    let said = evaluate();
    refused(&said, 1, &["a field asks", &shown]);
    assert!(said.err.len() < 1000, "{}", said.err);
}

#[test]
fn what_stands_in_the_place_of_a_file_is_named() {
    let folder = Folder::new();
    let (model, here) = (model_copy(&folder), folder.path(""));
    let said = evaluate(&model, &here, &[]);
    refused(
        &said,
        1,
        &["this is a folder, and a file is needed", "hint:"],
    );

    #[cfg(unix)]
    {
        let (tokenizer, data) = (model.join("tokenizer.json"), folder.data());
        fs::remove_file(&tokenizer).expect("removed");
        std::os::unix::fs::symlink("/dev/zero", &tokenizer).expect("linked");
        let said = evaluate(&model, &data, &[]);
        refused(&said, 1, &["tokenizer.json", "a pipe or a device"]);
        let said = retune(["inspect", text(&model)]);
        refused(&said, 1, &["tokenizer.json", "a pipe or a device"]);
    }
}

#[test]
fn a_damaged_row_that_no_example_uses_is_warned_of_by_train() {
    let folder = Folder::new();
    let model = model_copy(&folder);
    let weights = model.join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("read");
    let header_end = 8 + u64::from_le_bytes(*bytes.first_chunk().expect("a header")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..header_end]).expect("JSON");
    let embedding = &header["model.embed_tokens.weight"]["data_offsets"][1];
    // The last row's last value.
    let end = header_end + embedding.as_u64().expect("an offset") as usize;
    bytes[end - 4..end].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).expect("written");
    let said = train(&folder, &["--model", text(&model), "--quiet"]).done();
    let warning =
        "warning: the base is damaged: `model.embed_tokens.weight` holds 1 NaN and 0 infinite of ";
    assert!(said.err.starts_with(warning), "{}", said.err);
}

#[test]
fn a_base_with_values_that_are_no_numbers_is_seen_by_inspect() {
    let folder = Folder::new();
    let model = model_copy(&folder);
    let weights = model.join("model.safetensors");
    let whole = fs::read(&weights).expect("read");
    for (value, named) in [
        (f32::NAN, "holds 1 NaN and 0 infinite of 32 values"),
        (f32::INFINITY, "holds 0 NaN and 1 infinite of 32 values"),
        (f32::NEG_INFINITY, "holds 0 NaN and 1 infinite of 32 values"),
    ] {
        let mut bytes = whole.clone();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&value.to_le_bytes());
        fs::write(&weights, bytes).expect("written");
        let said = retune(["inspect", text(&model)]);
        refused(&said, 1, &["`model.norm.weight`", named]);
        for part in ["1 of 21 tensors hold values that are not finite", named] {
            assert!(said.out.contains(part), "no `{part}` in:\n{}", said.out);
        }
        // Names and shapes alone do not show it, and are not taken for more.
        let said = retune(["inspect", text(&model), "--quick"]);
        assert_eq!(said.code, 0, "{}", said.err);
        assert!(said.out.contains("not read"), "{}", said.out);
        assert!(!said.out.contains("all finite"), "{}", said.out);
    }
}
