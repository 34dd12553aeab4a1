//! The program as a user runs it, and what it says.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several tests, each of which uses a part of it"
)]

use assert_cmd::Command;
use assert_cmd::cargo::cargo_bin;
use serde_json::Value;
use std::path::Path;
use std::process::{self, Output, Stdio};

/// What a command ended with.
pub struct Said {
    /// -1 if a signal ended it.
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    /// Waits for the end of `command`.
    pub fn by(command: &mut Command) -> Self {
        Self::of(command.output().expect("started"))
    }

    #[track_caller]
    pub fn of(output: Output) -> Self {
        let said = Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).expect("UTF-8"),
            err: String::from_utf8(output.stderr).expect("UTF-8"),
        };
        assert!(!said.err.contains("panicked"), "{}", said.err);
        said
    }

    /// Asserts that the command did what it was asked to.
    #[track_caller]
    pub fn done(self) -> Self {
        assert_eq!(self.code, 0, "{}", self.err);
        self
    }

    /// Standard output, which is one JSON value.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).expect("JSON")
    }
}

pub fn program() -> Command {
    process().into()
}

/// The same, to be started and then left to itself, interrupted or killed.
pub fn process() -> process::Command {
    let mut command = process::Command::new(cargo_bin("retune"));
    command
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

pub fn retune<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Said {
    Said::by(program().args(arguments))
}

/// The same, started in `folder`.
pub fn retune_in<'a>(folder: &Path, arguments: impl IntoIterator<Item = &'a str>) -> Said {
    Said::by(program().current_dir(folder).args(arguments))
}

/// Asserts exit code, and that fact, place and hint are all there.
#[track_caller]
pub fn refused(said: &Said, code: i32, parts: &[&str]) {
    assert_eq!(said.code, code, "{}", said.err);
    for part in parts {
        assert!(said.err.contains(part), "no `{part}` in:\n{}", said.err);
    }
}
