//! `retune generate` and `retune chat` as a user runs them.

mod files;
mod golden;
mod program;

use assert_cmd::Command;
use files::{copy_files, json_lines};
use golden::golden;
use program::{Said, program, refused};

/// `retune <command> --model <the llama fixture>`.
fn retune(command: &str) -> Command {
    let mut retune = program();
    let model = golden("models/llama");
    retune.arg(command).arg("--model").arg(model);
    retune
}

/// Standard output and error of a run that succeeds.
fn succeeds(command: &mut Command) -> (String, String) {
    let said = Said::by(command).done();
    (said.out, said.err)
}

/// Asserts that a run says `parts` on standard error, and on standard output nothing.
fn fails(command: &mut Command, code: i32, parts: &[&str]) {
    let said = Said::by(command);
    refused(&said, code, parts);
    assert_eq!(said.out, "");
}

#[test]
fn a_prompt_is_the_same_from_an_argument_a_file_and_standard_input() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "w3 w14\n").expect("written");
    let (typed, figures) =
        succeeds(retune("generate").args(["--prompt", "w3 w14", "--max-tokens", "8"]));
    let (from_file, _) = succeeds(
        retune("generate")
            .args(["--max-tokens", "8", "--prompt-file"])
            .arg(&file),
    );
    let (piped, _) = succeeds(
        retune("generate")
            .args(["--max-tokens", "8"])
            .write_stdin("w3 w14\n"),
    );
    assert!(!typed.trim().is_empty());
    assert!(typed.ends_with('\n'));
    assert_eq!(from_file, typed);
    assert_eq!(piped, typed);
    assert!(figures.contains("text: 8 tokens"), "{figures}");
    assert!(figures.contains("cut off by `--max-tokens`"), "{figures}");
}

#[test]
fn json_says_what_the_text_says() {
    let arguments = ["--prompt", "w3 w14", "--max-tokens", "8"];
    let (text, _) = succeeds(retune("generate").args(arguments));
    let quietly = ["--json", "--quiet"];
    let said = Said::by(retune("generate").args(arguments).args(quietly)).done();
    let json = said.json();
    assert_eq!(
        json["text"].as_str().map(str::trim_end),
        Some(text.trim_end())
    );
    assert_eq!(json["stop_reason"], "max_tokens");
    assert_eq!(json["tokens"].as_array().map(Vec::len), Some(8));
    assert_eq!(said.err, "");
}

#[test]
fn each_record_is_answered_on_a_line_of_its_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("records.jsonl");
    let records = r#"{"prompt": "w3 w14"}
{"prompt": "w3 w14", "completion": " w5"}
{"messages": [{"role": "user", "content": "w3 w14"}]}
"#;
    std::fs::write(&file, records).expect("written");
    let mut command = retune("generate");
    let (lines, figures) = succeeds(command.args(["--max-tokens", "6", "--data"]).arg(&file));
    let lines = json_lines(&lines);
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0]["tokens"], lines[1]["tokens"]);
    assert_eq!(lines[0].get("reference"), None);
    assert_eq!(lines[1]["reference"], " w5");
    assert!(
        lines[2]["prompt"]
            .as_str()
            .is_some_and(|prompt| prompt.ends_with("<|assistant|>"))
    );
    assert!(
        figures.contains("of 1 equal the data's answer"),
        "{figures}"
    );
}

#[test]
fn an_adapter_changes_the_text() {
    let arguments = ["--prompt", "w3 w14", "--max-tokens", "8", "--quiet"];
    let (base, _) = succeeds(retune("generate").args(arguments));
    let mut command = retune("generate");
    let adapter = golden("adapters/lora-llama");
    let (adapted, _) = succeeds(command.args(arguments).arg("--adapter").arg(adapter));
    assert_ne!(base, adapted);
}

#[test]
fn draws_repeat_with_their_seed() {
    let text = |seed: &str| {
        let arguments = [
            "--prompt",
            "w3 w14",
            "--max-tokens",
            "12",
            "--temperature",
            "1.5",
            "--quiet",
        ];
        succeeds(retune("generate").args(arguments).args(["--seed", seed])).0
    };
    assert_eq!(text("3"), text("3"));
    assert_ne!(text("3"), text("4"));
}

#[test]
fn options_without_effect_or_meaning_are_refused() {
    let prompt = ["--prompt", "w3 w14"];
    let cases: [([&str; 2], &[&str]); 4] = [
        (
            ["--top-p", "0.9"],
            &["`--top-p` has no effect at temperature 0", "hint: "],
        ),
        (["--temperature", "-1"], &["temperature"]),
        (["--system", "w80 w81"], &[]),
        (["--data", "x.jsonl"], &[]),
    ];
    for (option, named) in cases {
        fails(retune("generate").args(prompt).args(option), 2, named);
    }
    for command in ["generate", "chat"] {
        let named = ["--adapter <DIR>"];
        fails(retune(command).arg("--allow-other-base"), 2, &named);
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_refused() {
    let long = "w3 w14 ".repeat(64);
    let named = ["the model's context holds 64"];
    fails(retune("generate").args(["--prompt", &long]), 1, &named);
}

#[test]
fn a_scripted_conversation_answers_each_line() {
    let chat = |input: &str| {
        succeeds(
            retune("chat")
                .args(["--max-tokens", "4"])
                .write_stdin(input.to_owned()),
        )
    };
    let (answer, _) = succeeds(retune("generate").args([
        "--chat",
        "--prompt",
        "w3 w14",
        "--max-tokens",
        "4",
        "--quiet",
    ]));
    let (first, _) = chat("w3 w14\n");
    assert_eq!(
        first, answer,
        "the first answer is that of `generate --chat`"
    );
    let (twice, _) = chat("w3 w14\n\nw3 w14\n");
    assert!(twice.starts_with(&answer));
    assert_ne!(twice, answer.repeat(2), "the second turn follows the first");
    let (reset, _) = chat("w3 w14\n/reset\nw3 w14");
    assert_eq!(reset, answer.repeat(2));
    let (left, _) = chat("w3 w14\n/quit\nw3 w14\n");
    assert_eq!(left, answer);
    let (system, _) = chat("/system w80 w81\nw3 w14\n");
    let mut command = retune("chat");
    let given = succeeds(
        command
            .args(["--max-tokens", "4", "--system", "w80 w81"])
            .write_stdin("w3 w14\n"),
    )
    .0;
    assert_eq!(system, given);
    assert_ne!(system, answer);
}

#[test]
fn what_cannot_be_obeyed_or_read_does_not_end_the_conversation() {
    let chat = |input: &[u8]| {
        succeeds(
            retune("chat")
                .args(["--max-tokens", "4"])
                .write_stdin(input.to_vec()),
        )
    };
    let (answer, _) = chat(b"w3 w14\n");
    let (unknown, notes) = chat(b"/rest\nw3 w14\n");
    assert_eq!(unknown, answer);
    assert!(notes.contains("no command is called `/rest`"), "{notes}");
    assert!(notes.contains("`/help`"), "{notes}");
    let (unreadable, notes) = chat(b"w3 \xff w14\nw3 w14\n");
    assert_eq!(unreadable, answer);
    assert!(
        notes.contains("a line that is not UTF-8 was left out"),
        "{notes}"
    );
    let (help, _) = succeeds(retune("chat").arg("--help"));
    for command in ["/reset", "/system", "/help", "/quit"] {
        assert!(help.contains(command), "{command}: {help}");
    }
}

#[test]
fn a_full_context_ends_a_scripted_conversation_with_a_hint() {
    let input = "w3 w14 w3 w14\n".repeat(20);
    let mut command = retune("chat");
    let said = Said::by(command.args(["--max-tokens", "4"]).write_stdin(input));
    let named = ["the model's context holds 64", "hint: `/reset`"];
    refused(&said, 1, &named);
}

#[test]
fn a_model_without_a_chat_template_cannot_chat() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("model");
    let files = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    copy_files(&golden("models/llama"), &model, &files);
    fails(
        program()
            .args(["chat", "--model"])
            .arg(model)
            .write_stdin("w3 w14\n"),
        1,
        &["the model has no chat template", "hint: "],
    );
}
