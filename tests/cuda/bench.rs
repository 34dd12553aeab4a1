//! What `retune bench` tells of a GPU.

use super::{retune, said};
use crate::golden::golden;
use retune::{Context, Result};
use serde_json::Value;

fn bench(arguments: &[&str]) -> Result<Value> {
    let output = retune(0)
        .arg("bench")
        .args(arguments)
        .args(["--device", "cuda", "--batch", "2", "--length", "16"])
        .args(["--steps", "2", "--json", "--shape"])
        .arg(golden("models/llama"))
        .output()
        .context("retune")?;
    assert!(output.status.success(), "{}", said(&output));
    serde_json::from_slice(&output.stdout).context("JSON")
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn the_time_of_a_step_is_told_by_kind() -> Result<()> {
    for (arguments, nothing) in [
        (&["lora"][..], &[][..]),
        (&["prompt"], &["weight gradients"]),
        // Its norms and matrices are trained whole.
        (&["last-layers"], &[]),
    ] {
        let report = bench(arguments)?;
        let by_op = report["by_op"].as_object().expect("kinds");
        for (kind, seconds) in by_op {
            let seconds = seconds.as_f64().expect("a number");
            let is_nothing = nothing.contains(&kind.as_str());
            let is_rest = kind == "everything else";
            assert!(
                is_rest || is_nothing == (seconds == 0.0),
                "{arguments:?}, {kind}: {by_op:?}"
            );
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn its_memory_is_what_tensors_take_at_a_time() -> Result<()> {
    let peak = |arguments: &[&str]| -> Result<u64> {
        let peak = &bench(arguments)?["peak_memory_bytes"];
        Ok(peak.as_u64().expect("a number"))
    };
    let few = peak(&["last-layers", "--blocks", "1"])?;
    // The scratch memory of products, and a model of some thousand weights.
    assert!((32 << 20..36 << 20).contains(&few), "{few}");
    let kept = peak(&["last-layers", "--blocks", "1", "--later-epoch"])?;
    // Thirty-two rows of as many numbers.
    assert!(kept > few, "{few} and {kept}");
    Ok(())
}
