//! How often the host waits for the device while it trains: counted by the stand-in.

use super::{Run, said, start};
use retune::{Context, Result};
use std::path::Path;

/// What the host waited for in a whole run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Waits {
    copies: u64,
    bytes: u64,
    synchronisations: u64,
}

impl Waits {
    /// Those of a run of so many steps in `place`; none if it was on a GPU, which does not count.
    fn of(run: Run, steps: u64, place: &Path) -> Result<Option<Self>> {
        let counts = place.join("counts");
        let steps = steps.to_string();
        let output = start(run, &place.join(&steps), 0)
            .args(["--steps", &steps, "--save-every", "0"])
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
            Waits::of(run, 5, place.path())?,
            Waits::of(run, 5 + MORE, place.path())?,
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
