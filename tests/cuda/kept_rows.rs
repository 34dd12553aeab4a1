//! Hidden states that stay on the GPU from epoch to epoch.

use super::{data, gpu, initial, options, retune, said, start, train};
use crate::golden::golden;
use retune::adapter_folder::save;
use retune::adapters::storage::WEIGHTS_FILE;
use retune::ops::ComputeType;
use retune::train::{CacheType, Outcome, Recompute, TrainOptions};
use retune::{Context, Result};

const METHOD: &str = "last-layers";

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn rows_that_are_kept_change_no_bit_of_a_run_that_is_resumed() -> Result<()> {
    let data = data(METHOD)?;
    for compute in [ComputeType::F32, ComputeType::Bf16] {
        let gpu = gpu(compute)?;
        let bytes = |bytes: usize, number: CacheType, stops: &[u64]| -> Result<Vec<u8>> {
            let folder = tempfile::tempdir().context("a folder")?;
            let (model, adapter) = initial(METHOD, &gpu)?;
            let method = adapter.method.as_ref();
            let options = TrainOptions {
                activation_cache_bytes: bytes,
                activation_cache_type: number,
                ..options(method, Recompute::Never)
            };
            for stop in stops {
                let (model, _) = initial(METHOD, &gpu)?;
                let run = Some(folder.path());
                let (_, outcome) = train(&model, &data, &options, run, Some(*stop))?;
                assert_eq!(outcome, Outcome::Interrupted);
            }
            let (_, outcome) = train(&model, &data, &options, Some(folder.path()), None)?;
            assert_eq!(outcome, Outcome::Finished);
            save(folder.path(), &model, method, "base")?;
            std::fs::read(folder.path().join(WEIGHTS_FILE)).context("the adapter")
        };
        let whole = bytes(usize::MAX, CacheType::F32, &[])?;
        // In the first epoch, which has three steps, and in later ones.
        assert!(whole == bytes(usize::MAX, CacheType::F32, &[2, 7])?);
        let rounded = bytes(usize::MAX, CacheType::Bf16, &[])?;
        assert!(rounded == bytes(usize::MAX, CacheType::Bf16, &[1, 11])?);
        // Nothing is lost of what is bf16 already.
        assert_eq!(rounded == whole, compute == ComputeType::Bf16);
        // None and some of them: on the stand-in a row of a product does not depend on how many there are.
        for room in [0, 5000] {
            let others = bytes(room, CacheType::F32, &[])?;
            let again = bytes(room, CacheType::F32, &[5])?;
            assert!(others == again, "{room}");
            if is_stand_in() {
                assert!(others == whole, "{room}");
            }
        }
    }
    Ok(())
}

/// What a GPU says of itself when it is asked for by a number that no machine has.
fn is_stand_in() -> bool {
    let folder = tempfile::tempdir().expect("a folder");
    let counts = folder.path().join("counts");
    let output = start((METHOD, &["--device", "cuda:99"]), folder.path(), 0)
        .env("STAND_IN_COUNT", &counts)
        .output();
    assert!(!output.expect("retune").status.success());
    counts.exists()
}

#[test]
#[ignore = "needs a GPU, or the stand-in of tests/cuda_stand_in"]
fn a_plan_counts_kept_rows_as_memory_of_the_gpu() -> Result<()> {
    let planned = |cache: &str| -> Result<u64> {
        let output = retune(0)
            .args(["plan", "train", METHOD, "--device", "cuda", "--model"])
            .arg(golden("models/llama"))
            .arg("--data")
            .arg(golden("train").join(METHOD).join("data.jsonl"))
            .args(["--out", "never", "--json", "--blocks", "1"])
            .args(["--activation-cache", cache])
            .output()
            .context("retune")?;
        assert!(output.status.success(), "{}", said(&output));
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).context("JSON")?;
        assert_eq!(plan["device"], "cuda:0");
        Ok(plan["activation_bytes"].as_u64().expect("a number"))
    };
    let rows = data(METHOD)?.examples;
    let rows: usize = rows.iter().map(|example| example.tokens.len()).sum();
    // Of the mean of all lengths.
    let kept = planned("1")? - planned("0")?;
    assert!(kept.abs_diff(rows as u64 * 32 * 4) <= 1, "{kept}");
    Ok(())
}

#[test]
#[ignore = "needs the stand-in of tests/cuda_stand_in"]
fn kept_rows_leave_room_for_the_run() -> Result<()> {
    let folder = tempfile::tempdir().context("a folder")?;
    let kept = |memory: &str, options: &'static [&str]| -> Result<Option<i64>> {
        let out = folder.path().join(memory);
        let output = start((METHOD, options), &out, 0)
            .env("STAND_IN_MEMORY", memory)
            .output()
            .context("retune")?;
        let text = said(&output);
        assert!(output.status.success(), "{text}");
        if !text.contains("cuda stand-in: ") {
            return Ok(None);
        }
        let file = std::fs::read_to_string(out.join("run.toml")).context("its options")?;
        let file: toml::Table = file.parse().expect("TOML");
        Ok(file["activation-cache"].as_integer())
    };
    let Some(half) = kept("1G", &[])? else {
        return Ok(());
    };
    // The program itself is taken to need 600 MiB.
    assert!((100..212).contains(&half), "{half}");
    assert_eq!(kept("8G", &[])?, Some(1024));
    assert_eq!(kept("2G", &["--activation-cache", "800"])?, Some(800));
    Ok(())
}
