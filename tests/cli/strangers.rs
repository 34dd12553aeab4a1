//! Folders and files that are damaged, or a stranger's: what is wrong with them is named.

use super::golden::golden;
use super::{Folder, Said, model_copy, no_adapter_in, refused, retune, text, train};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// A copy of a golden adapter that a test may damage.
fn adapter_copy(folder: &Folder, name: &str) -> PathBuf {
    let copy = folder.path(name);
    fs::create_dir(&copy).expect("made");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let original = golden("adapters").join(name).join(file);
        fs::copy(original, copy.join(file)).expect("copied");
    }
    copy
}

/// Replaces the one place in a file that has these bytes, which are as many as before in a safetensors header.
fn replace(file: &Path, from: &str, to: &str) {
    let before = fs::read(file).expect("read");
    let place = before
        .windows(from.len())
        .position(|window| window == from.as_bytes())
        .unwrap_or_else(|| panic!("no {from} in {}", file.display()));
    let after = [
        &before[..place],
        to.as_bytes(),
        &before[place + from.len()..],
    ]
    .concat();
    fs::write(file, after).expect("written");
}

/// Changes a file of a run's newest checkpoint, and its checksum with it.
fn forge(run: &Path, file: &str, from: &str, to: &str) {
    let newest = run.join("checkpoints/step-000004");
    let sum = || {
        let bytes = fs::read(newest.join(file)).expect("saved");
        let digest = Sha256::digest(&bytes);
        digest
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let before = sum();
    replace(&newest.join(file), from, to);
    // Two files may have the same bytes.
    let line = |sum: &str| format!("{sum}  {file}");
    replace(&newest.join("SHA256SUMS"), &line(&before), &line(&sum()));
}

#[test]
fn a_truncated_checkpoint_is_refused() {
    let folder = Folder::new();
    let (model, data) = (model_copy(&folder), folder.data());
    let weights = model.join("model.safetensors");
    let bytes = fs::read(&weights).expect("read");
    fs::write(&weights, &bytes[..bytes.len() / 2]).expect("written");
    let said = retune(["evaluate", "--model", text(&model), "--data", text(&data)]);
    refused(&said, 1, &["model.safetensors", "hint:"]);
}

#[test]
fn a_missing_tokenizer_is_named() {
    let folder = Folder::new();
    let (model, data) = (model_copy(&folder), folder.data());
    fs::remove_file(model.join("tokenizer.json")).expect("removed");
    let said = retune(["evaluate", "--model", text(&model), "--data", text(&data)]);
    refused(&said, 1, &["tokenizer.json", "hint:"]);
}

#[cfg(unix)]
#[test]
fn nothing_outside_of_a_base_is_copied_and_pipes_and_devices_are_refused() {
    use std::os::unix::fs::symlink;
    let folder = Folder::new();
    assert_eq!(train(&folder, &[]).code, 0);
    let (model, adapter) = (model_copy(&folder), folder.path("out"));
    let secret = folder.write("secret", "not for others");
    symlink(&secret, model.join("tokenizer_notes.txt")).expect("linked");
    let merged = folder.path("merged");
    let merge = [
        "merge",
        "--model",
        text(&model),
        "--adapter",
        text(&adapter),
        "--out",
        text(&merged),
    ];
    let said = retune(merge);
    refused(&said, 1, &["tokenizer_notes.txt", "leads out of", "hint:"]);
    assert!(!merged.exists());
    fs::remove_file(model.join("tokenizer_notes.txt")).expect("removed");
    assert_eq!(retune(merge).code, 0);

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
        let said = retune(["evaluate", "--model", text(&model), "--data", text(&data)]);
        refused(&said, 1, &[name, "a device"]);
        fs::remove_file(&file).expect("removed");
        fs::write(&file, before).expect("written");
    }
}

#[test]
fn a_soft_prompt_of_another_length_or_width_is_seen_by_inspect() {
    let folder = Folder::new();
    let adapter = adapter_copy(&folder, "prompt-llama");
    let said = retune(["inspect", text(&adapter)]);
    assert_eq!(said.code, 0, "{}", said.err);
    let config = adapter.join("adapter_config.json");
    let changed = |from: &str, to: &str, more: &[&str], named: &[&str]| {
        let before = fs::read(&config).expect("read");
        replace(&config, from, to);
        let arguments = ["inspect", text(&adapter)].into_iter();
        refused(&retune(arguments.chain(more.iter().copied())), 1, named);
        fs::write(&config, before).expect("written");
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
    let said = retune(["inspect", text(&model)]);
    assert_eq!(said.code, 0, "{}", said.err);
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
    let before = fs::read(&config).expect("read");
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
        replace(&config, from, to);
        let said = retune([
            "evaluate",
            "--model",
            text(&model),
            "--adapter",
            text(&adapter),
            "--data",
            text(&data),
        ]);
        refused(&said, 1, &["adapter_config.json", field]);
        fs::write(&config, &before).expect("written");
    }
}

#[test]
fn a_file_that_cannot_be_used_is_told_apart_from_one_that_is_broken() {
    let folder = Folder::new();
    let model = model_copy(&folder);
    let evaluate =
        |data: &Path| retune(["evaluate", "--model", text(&model), "--data", text(data)]);
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
    let said = evaluate(&data);
    assert_eq!(said.code, 0, "{}", said.err);

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
        let said = train(&folder, &options);
        assert_eq!(said.code, 0, "{}", said.err);
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
        let planned: serde_json::Value = serde_json::from_str(&said.out).expect("JSON");
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
    let said = retune(["evaluate", "--model", text(&model), "--data", text(&data)]);
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
        let merge = [
            "merge",
            "--model",
            text(&model),
            "--adapter",
            text(&adapter),
        ];
        let said = retune(merge.into_iter().chain(["--out", text(&out)]));
        refused(&said, 1, &named);
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
    let before = fs::read(&config).expect("read");
    for (from, to, field) in [
        ("\"lora_alpha\": 6", "\"lora_alpha\": 1e39", "`lora_alpha`"),
        (
            "\"alpha_pattern\": {}",
            "\"alpha_pattern\": {\"q_proj\": -1e39}",
            "`alpha_pattern`",
        ),
    ] {
        replace(&config, from, to);
        for said in uses("llama", &adapter, &data) {
            refused(&said, 1, &["adapter_config.json", field, "1e39"]);
        }
        fs::write(&config, &before).expect("written");
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
            assert_eq!(said.code, 0, "{}", said.err);
            assert_eq!(said.out, plain.out, "{name}");
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
