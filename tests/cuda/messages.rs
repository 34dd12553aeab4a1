//! What a user is told whose GPU cannot be used.

use super::{retune, said};
use crate::golden::golden;
use retune::{Context, Result};
use std::process::Output;

fn score(device: &str, settings: &[(&str, &str)]) -> Result<Output> {
    retune(0)
        .args(["score", "--device", device, "--model"])
        .arg(golden("models/llama"))
        .arg("--data")
        .arg(golden("train/lora/data.jsonl"))
        .envs(settings.iter().copied())
        .output()
        .context("retune")
}

type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [&'a str]);

const CASES: [Case<'_>; 4] = [
    (
        "cuda",
        &[("STAND_IN_DEVICES", "0")],
        &["no NVIDIA GPU was found", "hint:", "nvidia-smi"],
    ),
    (
        "cuda:1",
        &[],
        &[
            "there is no GPU 1: the only one is 0",
            "hint:",
            "nvidia-smi",
        ],
    ),
    (
        "cuda",
        &[("STAND_IN_DRIVER_VERSION", "12040")],
        &[
            "the NVIDIA driver is too old: it is for CUDA 12.4, and this program for CUDA 13",
            "hint: update the driver",
        ],
    ),
    (
        "cuda",
        &[("STAND_IN_CAPABILITY", "7.5")],
        &[
            "CUDA stand-in has compute capability 7.5, and 8.0 is the oldest",
            "hint:",
            "CPU",
        ],
    ),
];

#[test]
#[ignore = "needs the stand-in of tests/cuda_stand_in"]
fn a_gpu_that_cannot_be_used_is_an_error_with_a_way_out() -> Result<()> {
    if !said(&score("cuda", &[])?).contains("cuda stand-in: ") {
        return Ok(());
    }
    for (device, settings, parts) in CASES {
        let output = score(device, settings)?;
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        for part in parts {
            assert!(text.contains(part), "no `{part}`: {text}");
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs the stand-in of tests/cuda_stand_in"]
fn without_a_usable_gpu_the_cpu_is_taken_and_the_reason_said() -> Result<()> {
    let expected = score("cpu", &[])?.stdout;
    for (device, settings, parts) in CASES {
        if device != "cuda" {
            continue;
        }
        let output = score("auto", settings)?;
        let text = said(&output);
        if text.contains("computing on cuda:0") {
            // A GPU, which is not told what it is.
            return Ok(());
        }
        assert!(output.status.success(), "{text}");
        let reason = format!("computing on the CPU: {}", parts[0]);
        assert!(text.contains(&reason), "no `{reason}`: {text}");
        assert!(output.stdout == expected, "{settings:?}");
    }
    Ok(())
}
