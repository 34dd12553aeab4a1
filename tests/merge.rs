//! Merging against PEFT's `merge_and_unload`, and against base and adapter run together.

mod files;
mod golden;

use candle_core::{DType, Device, Tensor};
use files::{copy_files, copy_folder, entries, json};
use golden::{ScoreFile, golden, score_difference};
use retune::adapter_folder::{Adapter, OtherBase};
use retune::adapters::hooks::NoAdapter;
use retune::adapters::storage::{AdapterWeights, PeftConfig, PeftFolder};
use retune::atomic::Existing;
use retune::merge::{MergeOptions, MergeReport, merge};
use retune::model::checkpoint::Checkpoint;
use retune::model::{self, ModelConfig};
use retune::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const TOLERANCE: f32 = 2e-5;

struct Merged {
    home: tempfile::TempDir,
    report: MergeReport,
}

impl Merged {
    fn folder(&self) -> PathBuf {
        self.home.path().join("out")
    }

    fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        tensors(&self.folder())
    }

    fn score_difference(&self, expected: &Path) -> Result<f32> {
        let weights = AdapterWeights::fresh(0, &Device::Cpu);
        let model = model::load(&self.folder(), &NoAdapter, weights, None)?;
        score_difference(&model, &ScoreFile::read(expected)?)
    }
}

fn tensors(folder: &Path) -> Result<BTreeMap<String, Tensor>> {
    let checkpoint = Checkpoint::open(folder)?;
    checkpoint
        .names()
        .map(|name| Ok((name.to_owned(), checkpoint.get(name)?.to_tensor()?)))
        .collect()
}

fn merged(base: &Path, adapters: &[(Adapter, f64)], options: &MergeOptions) -> Result<Merged> {
    let home = tempfile::tempdir().expect("a folder");
    let out = home.path().join("out");
    let report = merge(base, adapters, &out, options, &mut |_| Ok(()))?;
    assert_eq!(report.folder, out);
    assert_eq!(entries(home.path()), ["out"]);
    Ok(Merged { home, report })
}

fn fixture(name: &str) -> Result<(PathBuf, Adapter)> {
    let adapter = Adapter::open(&golden("adapters").join(name))?;
    let base = golden("").join(adapter.saved.config.base_model());
    Ok((base, adapter))
}

fn merged_fixture(name: &str, options: &MergeOptions) -> Result<Merged> {
    let (base, adapter) = fixture(name)?;
    merged(&base, &[(adapter, 1.0)], options)
}

fn refused(base: &Path, adapters: &[(Adapter, f64)], out: &Path, options: &MergeOptions) -> Error {
    merge(base, adapters, out, options, &mut |_| Ok(())).expect_err("this must be refused")
}

/// The largest difference, in f32.
fn difference(left: &Tensor, right: &Tensor) -> Result<f32> {
    let difference = (left.to_dtype(DType::F32)? - right.to_dtype(DType::F32)?)?;
    Ok(difference.abs()?.flatten_all()?.max(0)?.to_scalar()?)
}

/// A LoRA with random weights on `targets` of a golden base, as PEFT would store it.
fn lora_on(base: &str, targets: &[&str], folder: &Path) -> Result<Adapter> {
    let config = ModelConfig::read(&golden("models").join(base))?;
    let mut weights = AdapterWeights::fresh(7, &Device::Cpu);
    let noise = retune::adapters::storage::Init::Normal { deviation: 0.2 };
    let (vocabulary, hidden) = (config.vocabulary, config.hidden_size);
    for target in targets {
        if *target == "embed_tokens" {
            let path = "base_model.model.model.embed_tokens";
            weights.var(&format!("{path}.lora_embedding_A"), (4, vocabulary), noise)?;
            weights.var(&format!("{path}.lora_embedding_B"), (hidden, 4), noise)?;
            continue;
        }
        assert_eq!(*target, "q_proj");
        let queries = config.attention_heads * config.head_dim;
        for layer in 0..config.layers {
            let path = format!("base_model.model.model.layers.{layer}.self_attn.q_proj");
            weights.var(&format!("{path}.lora_A.weight"), (4, hidden), noise)?;
            weights.var(&format!("{path}.lora_B.weight"), (queries, 4), noise)?;
        }
    }
    let saved = PeftConfig::new("LORA")
        .with("r", 4)
        .with("lora_alpha", 6)
        .with("target_modules", targets);
    PeftFolder::save(folder, &saved, &weights)?;
    Adapter::open(folder)
}

#[test]
fn every_adapter_merges_as_in_peft() -> Result<()> {
    let mut compared = 0;
    for name in golden::names("adapters")? {
        let expected = golden("adapters").join(&name);
        if !expected.join("merged.safetensors").exists() {
            continue;
        }
        let merged = merged_fixture(&name, &MergeOptions::default())?;
        let ours = merged.tensors()?;
        let theirs =
            candle_core::safetensors::load(expected.join("merged.safetensors"), &Device::Cpu)?;
        let names: BTreeMap<&String, ()> = theirs.keys().map(|name| (name, ())).collect();
        assert!(ours.keys().eq(names.into_keys()), "{name}");
        for (tensor, ours) in &ours {
            let theirs = &theirs[tensor];
            assert_eq!(ours.dtype(), theirs.dtype(), "{name}: {tensor}");
            let found = difference(ours, theirs)?;
            match ours.dtype() {
                DType::F32 => assert!(found <= 5e-7, "{name}: {tensor}: {found}"),
                _ => assert_eq!(found, 0.0, "{name}: {tensor}"),
            }
        }
        if !name.contains("bf16") {
            let found = merged.score_difference(&expected)?;
            assert!(found <= TOLERANCE, "{name}: {found}");
        }
        compared += 1;
    }
    assert!(compared >= 14, "{compared}");
    Ok(())
}

#[test]
fn files_of_the_base_come_along() -> Result<()> {
    let merged = merged_fixture("lora-llama", &MergeOptions::default())?;
    let base = golden("models/llama");
    for file in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        let read = |folder: &Path| std::fs::read(folder.join(file)).expect(file);
        assert_eq!(read(&merged.folder()), read(&base), "{file}");
    }
    assert_eq!(
        entries(&merged.folder()).len(),
        6,
        "score.json is no part of a model"
    );
    let file = std::fs::read(merged.folder().join("model.safetensors")).expect("the weights");
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).expect("a header");
    let format = metadata
        .metadata()
        .as_ref()
        .and_then(|texts| texts.get("format"));
    assert_eq!(format.map(String::as_str), Some("pt"));
    let weights: usize = merged.tensors()?.values().map(Tensor::elem_count).sum();
    assert_eq!(merged.report.bytes as usize, 4 * weights);
    assert_eq!((merged.report.tensors, merged.report.merged), (21, 14));
    Ok(())
}

#[test]
fn the_shards_of_the_base_are_kept() -> Result<()> {
    let (_, adapter) = fixture("lora-llama")?;
    let base = golden("models/llama-sharded");
    let options = MergeOptions {
        other_base: OtherBase::Allow,
        ..Default::default()
    };
    let sharded = merged(&base, &[(adapter, 1.0)], &options)?;
    let index = |folder: &Path| json(&folder.join("model.safetensors.index.json"));
    assert_eq!(index(&sharded.folder()), index(&base));
    assert_eq!(sharded.report.files, 4);

    // The fixture holds the same weights as the single file, so the merged ones are the same too.
    let single = merged_fixture("lora-llama", &MergeOptions::default())?;
    let (sharded, single) = (sharded.tensors()?, single.tensors()?);
    assert!(sharded.keys().eq(single.keys()));
    for (name, tensor) in &single {
        assert_eq!(difference(tensor, &sharded[name])?, 0.0, "{name}");
    }
    Ok(())
}

#[test]
fn weights_can_be_cut_into_files_of_a_size() -> Result<()> {
    for (largest, files) in [(40_000, 3), (1, 21), (u64::MAX, 1)] {
        let options = MergeOptions {
            max_shard_bytes: Some(largest),
            ..Default::default()
        };
        let merged = merged_fixture("lora-llama", &options)?;
        assert_eq!(merged.report.files, files, "{largest}");
        let checkpoint = Checkpoint::open(&merged.folder())?;
        assert_eq!(checkpoint.shards().count(), files);
        assert_eq!(
            merged.folder().join("model.safetensors").exists(),
            files == 1
        );
        if files == 3 {
            for (file, names) in checkpoint.shards() {
                let bytes: usize = names
                    .iter()
                    .map(|name| checkpoint.stored(name).expect("listed").data().len())
                    .sum();
                assert!(bytes <= 40_000, "{file}: {bytes}");
            }
            let (_, first) = checkpoint.shards().next().expect("files");
            assert!(first.contains(&"model.embed_tokens.weight"), "{first:?}");
        }
        assert!(merged.score_difference(&golden("adapters/lora-llama"))? <= TOLERANCE);
    }
    Ok(())
}

#[test]
fn other_types_are_the_f32_merge_rounded_once() -> Result<()> {
    let exact = merged_fixture("lora-qwen3", &MergeOptions::default())?.tensors()?;
    for (dtype, name) in [
        (DType::F16, "float16"),
        (DType::BF16, "bfloat16"),
        (DType::F32, "float32"),
    ] {
        let options = MergeOptions {
            dtype: Some(dtype),
            ..Default::default()
        };
        let merged = merged_fixture("lora-qwen3", &options)?;
        for (tensor, values) in merged.tensors()? {
            assert_eq!(values.dtype(), dtype, "{tensor}");
            assert_eq!(
                difference(&values, &exact[&tensor].to_dtype(dtype)?)?,
                0.0,
                "{tensor}"
            );
        }
        assert_eq!(json(&merged.folder().join("config.json"))["dtype"], name);
        let layers = merged.report.layers;
        assert!(layers.tried > 0 && layers.of_bound <= 1.0, "{layers:?}");
        // Weights that were rounded show.
        assert_eq!(layers.difference > 1e-5, dtype != DType::F32, "{layers:?}");
        let probe = merged.report.probe;
        assert!(
            probe.difference <= probe.bound && probe.effect > 0.1,
            "{probe:?}"
        );
    }
    // And the other way: a base in half precision merged into f32 loses nothing.
    let options = MergeOptions {
        dtype: Some(DType::F32),
        ..Default::default()
    };
    let merged = merged_fixture("lora-llama-bf16", &options)?;
    assert!(merged.score_difference(&golden("adapters/lora-llama-bf16"))? <= TOLERANCE);
    Ok(())
}

#[test]
fn an_adapted_embedding_gets_a_head_of_its_own_in_a_tied_model() -> Result<()> {
    for base in ["llama-tied", "llama-tied-head-only", "qwen2"] {
        let home = tempfile::tempdir().expect("a folder");
        let adapter = lora_on(base, &["embed_tokens", "q_proj"], home.path())?;
        let folder = golden("models").join(base);
        let stored = tensors(&folder)?;
        let matrix = stored
            .get("model.embed_tokens.weight")
            .unwrap_or_else(|| &stored["lm_head.weight"]);

        let merged = merged(&folder, &[(adapter, 1.0)], &MergeOptions::default())?;
        assert!(merged.report.untied_head, "{base}");
        assert!(
            merged.report.probe.effect > 0.1,
            "{base}: {:?}",
            merged.report.probe
        );
        assert!(!ModelConfig::read(&merged.folder())?.tied_head, "{base}");
        let tensors = merged.tensors()?;
        assert_eq!(
            difference(&tensors["lm_head.weight"], matrix)?,
            0.0,
            "{base}"
        );
        assert!(
            difference(&tensors["model.embed_tokens.weight"], matrix)? > 0.01,
            "{base}"
        );
    }
    Ok(())
}

#[test]
fn a_tied_model_stays_tied_where_it_can() -> Result<()> {
    for (base, stored) in [
        ("llama-tied", "model.embed_tokens.weight"),
        ("llama-tied-head-only", "lm_head.weight"),
    ] {
        let home = tempfile::tempdir().expect("a folder");
        let adapter = lora_on(base, &["q_proj"], home.path())?;
        let merged = merged(
            &golden("models").join(base),
            &[(adapter, 1.0)],
            &MergeOptions::default(),
        )?;
        assert!(!merged.report.untied_head);
        assert!(ModelConfig::read(&merged.folder())?.tied_head);
        let matrices: Vec<String> = merged
            .tensors()?
            .into_keys()
            .filter(|name| name.contains("embed") || name.contains("head"))
            .collect();
        assert_eq!(matrices, [stored], "{base}");
    }
    Ok(())
}

#[test]
fn adapters_add_up_by_their_weights() -> Result<()> {
    let base = golden("models/llama");
    let open = |name: &str| fixture(name).map(|(_, adapter)| adapter);
    let only = |name: &str| merged_fixture(name, &MergeOptions::default())?.tensors();
    let (first, second) = (only("lora-llama")?, only("lora-embeddings-llama")?);
    let stored = tensors(&base)?;
    let adapters = [
        (open("lora-llama")?, 0.5),
        (open("lora-embeddings-llama")?, -1.5),
        (open("last-layers-llama")?, 1.0),
    ];
    let replaced = only("last-layers-llama")?;

    let merged = merged(&base, &adapters, &MergeOptions::default())?;
    for (name, ours) in merged.tensors()? {
        let base = &stored[&name];
        let deltas = ((&first[&name] - base)? * 0.5)? - ((&second[&name] - base)? * 1.5)?;
        // LoRA is folded into what the third adapter put in the base's place.
        let expected = (&replaced[&name] + deltas?)?;
        let found = difference(&ours, &expected)?;
        assert!(found < 2e-6, "{name}: {found}");
    }
    Ok(())
}

#[test]
fn half_of_a_whole_weight_is_half_way_to_it() -> Result<()> {
    let base = tensors(&golden("models/llama"))?;
    let whole = merged_fixture("last-layers-llama", &MergeOptions::default())?.tensors()?;
    let (folder, adapter) = fixture("last-layers-llama")?;
    let half = merged(&folder, &[(adapter, 0.5)], &MergeOptions::default())?;
    assert_eq!(half.report.merged, 9);
    for (name, ours) in half.tensors()? {
        let middle = ((&base[&name] + &whole[&name])? * 0.5)?;
        assert!(difference(&ours, &middle)? < 1e-6, "{name}");
    }
    Ok(())
}

#[test]
fn soft_prompts_are_refused_with_the_reason() -> Result<()> {
    let home = tempfile::tempdir().expect("a folder");
    let (base, adapter) = fixture("prompt-llama")?;
    let error = refused(
        &base,
        &[(adapter, 1.0)],
        &home.path().join("out"),
        &MergeOptions::default(),
    );
    assert!(
        chain(&error).contains("no weight of the model can hold it"),
        "{}",
        chain(&error)
    );
    assert!(
        error
            .hint_text()
            .is_some_and(|hint| hint.contains("--adapter"))
    );
    assert!(entries(home.path()).is_empty());
    Ok(())
}

#[test]
fn two_adapters_that_replace_the_same_weights_are_refused() -> Result<()> {
    let home = tempfile::tempdir().expect("a folder");
    let (base, first) = fixture("last-layers-llama")?;
    let (_, second) = fixture("last-layers-head-llama")?;
    let adapters = [(first, 1.0), (second, 1.0)];
    let error = refused(
        &base,
        &adapters,
        &home.path().join("out"),
        &MergeOptions::default(),
    );
    let text = chain(&error);
    assert!(
        text.contains("both replace `model.layers.1.") && text.contains("8 other weights"),
        "{text}"
    );
    assert!(entries(home.path()).is_empty());
    Ok(())
}

#[test]
fn an_adapter_that_does_not_fit_leaves_nothing() -> Result<()> {
    let home = tempfile::tempdir().expect("a folder");
    let (_, adapter) = fixture("lora-mistral")?;
    let error = refused(
        &golden("models/qwen3"),
        &[(adapter, 1.0)],
        &home.path().join("out"),
        &MergeOptions::default(),
    );
    assert!(
        chain(&error).contains("does not fit the model"),
        "{}",
        chain(&error)
    );
    assert!(entries(home.path()).is_empty());
    Ok(())
}

#[test]
fn an_adapter_of_another_base_is_refused_unless_allowed() -> Result<()> {
    let home = tempfile::tempdir().expect("a folder");
    let copy = home.path().join("adapter");
    let files = ["adapter_config.json", "adapter_model.safetensors"];
    copy_files(&golden("adapters/lora-llama"), &copy, &files);
    let identity = r#"{"retune_version": "0", "method": "lora", "base_fingerprint": "another"}"#;
    std::fs::write(copy.join("retune.json"), identity).expect("a file");
    let base = golden("models/llama");
    let adapters = [(Adapter::open(&copy)?, 1.0)];
    let error = refused(
        &base,
        &adapters,
        &home.path().join("out"),
        &MergeOptions::default(),
    );
    assert!(chain(&error).contains("another base"), "{}", chain(&error));
    let options = MergeOptions {
        other_base: OtherBase::Allow,
        ..Default::default()
    };
    merged(&base, &adapters, &options)?;
    Ok(())
}

#[test]
fn what_the_merge_reads_is_never_replaced() -> Result<()> {
    let home = tempfile::tempdir().expect("a folder");
    let base = home.path().join("base");
    copy_folder(&golden("models/llama"), &base);
    let (_, adapter) = fixture("lora-llama")?;
    let adapters = [(adapter, 1.0)];
    let overwrite = MergeOptions {
        existing: Existing::Replace,
        ..Default::default()
    };
    let before = std::fs::read(base.join("model.safetensors")).expect("weights");
    for out in [base.clone(), base.join("../base"), home.path().to_owned()] {
        let error = refused(&base, &adapters, &out, &overwrite);
        assert!(
            chain(&error).contains("take the place"),
            "{}",
            chain(&error)
        );
    }

    let out = home.path().join("out");
    merge(
        &base,
        &adapters,
        &out,
        &MergeOptions::default(),
        &mut |_| Ok(()),
    )?;
    let first = std::fs::read(out.join("model.safetensors")).expect("weights");
    let error = refused(&base, &adapters, &out, &MergeOptions::default());
    assert!(chain(&error).contains("not empty"), "{}", chain(&error));
    merge(&base, &adapters, &out, &overwrite, &mut |_| Ok(()))?;
    let again = std::fs::read(out.join("model.safetensors")).expect("weights");
    assert!(again == first, "the same merge gives the same bytes");
    assert!(std::fs::read(base.join("model.safetensors")).expect("weights") == before);
    Ok(())
}

#[test]
fn values_that_do_not_fit_are_refused() -> Result<()> {
    let home = tempfile::tempdir().expect("a folder");
    let huge = |value: f32, folder: &Path| -> Result<Adapter> {
        std::fs::create_dir_all(folder).expect("a folder");
        let mut saved = PeftFolder::load(&golden("adapters/lora-llama"))?;
        let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        let tensor = Tensor::full(value, saved.tensors[name].shape(), &Device::Cpu)?;
        saved.tensors.insert(name.to_owned(), tensor);
        let mut weights = AdapterWeights::loaded(saved.tensors.clone(), &Device::Cpu);
        for (name, tensor) in &saved.tensors {
            weights.var(name, tensor.shape(), retune::adapters::storage::Init::Zeros)?;
        }
        PeftFolder::save(folder, &saved.config, &weights.finish()?)?;
        Adapter::open(folder)
    };
    let base = golden("models/llama");
    let out = home.path().join("out");
    let nan = [(huge(f32::NAN, &home.path().join("nan"))?, 1.0)];
    let error = refused(&base, &nan, &out, &MergeOptions::default());
    assert!(chain(&error).contains("not finite"), "{}", chain(&error));

    let large = [(huge(1e6, &home.path().join("large"))?, 1.0)];
    let options = MergeOptions {
        dtype: Some(DType::F16),
        ..Default::default()
    };
    let error = refused(&base, &large, &out, &options);
    assert!(
        chain(&error).contains("too large for f16"),
        "{}",
        chain(&error)
    );
    assert_eq!(entries(home.path()), ["large", "nan"]);
    Ok(())
}

/// In what the adapter leaves alone: a norm, the last tensor of the file, and an embedding row that no probe sees.
#[test]
fn a_base_that_is_not_finite_where_no_adapter_acts_is_refused_by_name() -> Result<()> {
    let home = tempfile::tempdir().expect("a folder");
    let (_, adapter) = fixture("lora-llama")?;
    let adapters = [(adapter, 1.0)];
    for (name, value) in [
        ("model.norm.weight", f32::INFINITY),
        ("model.embed_tokens.weight", f32::NAN),
    ] {
        let base = home.path().join(name);
        copy_folder(&golden("models/llama"), &base);
        let place = {
            let view = Checkpoint::open(&base)?.get(name)?;
            assert_eq!(view.dtype, DType::F32);
            view.bytes.end - 4
        };
        let file = base.join("model.safetensors");
        let mut bytes = std::fs::read(&file).expect("weights");
        bytes[place..place + 4].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&file, bytes).expect("weights");
        for dtype in [None, Some(DType::BF16)] {
            let options = MergeOptions {
                dtype,
                ..Default::default()
            };
            let out = home.path().join("out");
            let text = chain(&refused(&base, &adapters, &out, &options));
            assert!(
                text.contains(name) && text.contains("1 of the "),
                "{dtype:?}: {text}"
            );
            assert!(!out.exists());
        }
    }
    Ok(())
}

#[test]
fn the_caller_can_stop_it() -> Result<()> {
    let home = tempfile::tempdir().expect("a folder");
    let (base, adapter) = fixture("lora-llama")?;
    let mut heard = 0;
    let stopped = merge(
        &base,
        &[(adapter, 1.0)],
        &home.path().join("out"),
        &MergeOptions::default(),
        &mut |_| {
            heard += 1;
            match heard {
                5 => Err(Error::interrupted("stopped")),
                _ => Ok(()),
            }
        },
    );
    assert_eq!(
        stopped.expect_err("stopped").kind(),
        retune::ErrorKind::Interrupted
    );
    assert!(entries(home.path()).is_empty());
    Ok(())
}

/// The error and its causes, as the command line prints them.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!("; {cause}");
        source = cause.source();
    }
    text
}
