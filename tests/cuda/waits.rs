//! How often the host waits for the device while it trains and generates: counted by the stand-in.

use super::{Run, golden, retune, said, start};
use retune::{Context, Result};
use std::path::Path;
use std::process::Command;

/// What the host waited for from the start to the end of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Waits {
    copies: u64,
    bytes: u64,
    synchronisations: u64,
}

impl Waits {
    /// Those of a run of so many steps in `place`; none if it was on a GPU, which does not count.
    fn of_run(run: Run, steps: u64, place: &Path) -> Result<Option<Self>> {
        let steps = steps.to_string();
        let mut command = start(run, &place.join(&steps), 0);
        command.args(["--steps", &steps, "--save-every", "0"]);
        Self::of(command, place)
    }

    /// The same of a text of so many tokens.
    fn of_text(tokens: u64, options: &[&str], place: &Path) -> Result<Option<Self>> {
        let mut command = retune(0);
        command
            .args(["generate", "--device", "cuda", "--model"])
            .arg(golden("models/llama"))
            .args(["--prompt", "w3 w14", "--max-tokens", &tokens.to_string()])
            .args(options);
        Self::of(command, place)
    }

    fn of(mut command: Command, place: &Path) -> Result<Option<Self>> {
        let counts = place.join("counts");
        let output = command
            .env("STAND_IN_COUNT", &counts)
            .output()
            .context("retune")?;
        let text = said(&output);
        assert!(output.status.success(), "{text}");
        let Ok(counted) = std::fs::read_to_string(&counts) else {
            return Ok(None);
        };
        let number = |name: &str| -> u64 {
            let line = counted.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|number| number.trim().parse().ok());
            number.unwrap_or_else(|| panic!("no `{name}` in {counted}"))
        };
        Ok(Some(Self {
            copies: number("to_host_copies"),
            bytes: number("to_host_bytes"),
            synchronisations: number("synchronisations"),
        }))
    }
}

const RUNS: [Run; 8] = [
    ("lora", &["--dropout", "0.2"]),
    ("lora", &["--recompute", "--tokens-per-pass", "8192"]),
    ("lora", &["--quantize", "nf4", "--compute-type", "bf16"]),
    ("prompt", &[]),
    ("prompt", &["--recompute"]),
    ("last-layers", &["--blocks", "1"]),
    ("last-layers", &["--blocks", "1", "--activation-cache", "0"]),
    (
        "last-layers",
        &[
            "--blocks",
            "1",
            "--activation-cache-type",
            "bf16",
            "--recompute",
        ],
    ),
];

#[test]
#[ignore = "needs the stand-in of tests/cuda_stand_in"]
fn a_step_waits_once() -> Result<()> {
    const MORE: u64 = 10;
    for (number, run) in RUNS.into_iter().enumerate() {
        let place = tempfile::tempdir().context("a folder")?;
        // More steps than there are in an epoch: what was kept is used too.
        let (Some(few), Some(many)) = (
            Waits::of_run(run, 5, place.path())?,
            Waits::of_run(run, 5 + MORE, place.path())?,
        ) else {
            return Ok(());
        };
        let what = format!("run {number}, {run:?}: {few:?} and {many:?}");
        assert_eq!(many.copies - few.copies, MORE, "{what}");
        // The five numbers of a verdict.
        assert_eq!(many.bytes - few.bytes, MORE * 5 * 8, "{what}");
        assert_eq!(many.synchronisations - few.synchronisations, MORE, "{what}");
    }
    Ok(())
}

#[test]
#[ignore = "needs the stand-in of tests/cuda_stand_in"]
fn nothing_comes_back_for_a_token_but_the_token() -> Result<()> {
    let place = tempfile::tempdir().context("a folder")?;
    for options in [
        &[][..],
        &["--temperature", "1", "--top-p", "0.9", "--seed", "1"],
        &["--temperature", "1", "--repetition-penalty", "1.2"],
    ] {
        let waits = |tokens| Waits::of_text(tokens, options, place.path());
        let (Some(few), Some(many)) = (waits(4)?, waits(20)?) else {
            return Ok(());
        };
        // The token and whether the scores were sound, in one copy.
        assert_eq!(many.copies - few.copies, 16, "{options:?}");
        assert_eq!(many.bytes - few.bytes, 16 * 8, "{options:?}");
        assert_eq!(
            many.synchronisations - few.synchronisations,
            16,
            "{options:?}"
        );
    }
    Ok(())
}
