//! What the documents promise of the house itself: the bundled base, the methods' table, who may name whom.

use candle_core::Device;
use retune::adapters::METHODS;
use retune::adapters::hooks::NoAdapter;
use retune::adapters::storage::AdapterWeights;
use retune::data::{DataOptions, Dataset, Tokenizer};
use retune::evaluate::evaluate;
use retune::{Context, Result, model};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).at(path.display())
}

#[test]
fn the_bundled_base_is_small_and_knows_its_own_language_but_not_the_domain() -> Result<()> {
    let base = root("examples/base/model");
    let mut size = 0;
    for entry in fs::read_dir(&base).at("the bundled base")? {
        size += entry.at("an entry")?.metadata().at("an entry")?.len();
    }
    assert!(size <= 8_000_000, "{size} bytes");

    let tokenizer = Tokenizer::load(&base)?;
    let bare = model::load(
        &base,
        &NoAdapter,
        AdapterWeights::fresh(0, &Device::Cpu),
        None,
    )?;
    let loss = |file: &str| -> Result<f64> {
        let data = Dataset::load(
            &[root(file)],
            &tokenizer,
            &DataOptions {
                max_length: Some(256),
                ..DataOptions::default()
            },
        )?;
        Ok(evaluate(bare.decoder.as_ref(), &data, 4096, &mut |_| {})?.loss)
    };
    let (own, domain) = (
        loss("examples/data/unrelated.jsonl")?,
        loss("examples/data/domain/eval.jsonl")?,
    );
    assert!(own < 2.0, "loss {own} on text of its own kind");
    assert!(
        domain > own + 0.5,
        "loss {domain} on the domain, {own} on its own kind"
    );
    Ok(())
}

#[test]
fn no_ticket_is_in_both_splits() -> Result<()> {
    let train = read(&root("examples/data/domain/train.jsonl"))?;
    let train: BTreeSet<&str> = train.lines().collect();
    let held_out = read(&root("examples/data/domain/eval.jsonl"))?;
    assert!(held_out.lines().count() >= 200);
    assert!(held_out.lines().all(|line| !train.contains(line)));
    Ok(())
}

#[test]
fn every_method_file_has_a_row_and_a_line_in_the_readme() -> Result<()> {
    let readme = read(&root("README.md"))?;
    for entry in fs::read_dir(root("adapters")).at("adapters")? {
        let name = entry
            .at("an entry")?
            .file_name()
            .to_string_lossy()
            .into_owned();
        let Some(file) = name
            .strip_suffix(".rs")
            .filter(|file| !["lib", "error"].contains(file))
        else {
            continue;
        };
        let method = file.replace('_', "-");
        assert!(
            METHODS.iter().any(|row| row.name == method),
            "`{method}` has no row in METHODS"
        );
        assert!(
            readme.contains(&format!("| `{method}` | `adapters/{name}` |")),
            "`{method}` has no line in README.md"
        );
    }
    Ok(())
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).at(folder.display())? {
        let path = entry.at(folder.display())?.path();
        if path.is_dir() {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[test]
fn the_library_names_no_method() -> Result<()> {
    let mut files = Vec::new();
    rust_files(&root("src"), &mut files)?;
    assert!(files.len() > 50);
    for path in files {
        let text = read(&path)?;
        // Tests may use a method to have one.
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let is_test = path.to_string_lossy().contains("test");
        for method in [
            "adapters::lora",
            "adapters::last_layers",
            "adapters::prompt",
        ] {
            assert!(
                is_test || !code.contains(method),
                "{} names {method}",
                path.display()
            );
        }
    }
    Ok(())
}

#[test]
fn unsafe_code_stands_only_where_it_is_named() -> Result<()> {
    const NAMED: [&str; 12] = [
        "src/bounded.rs",
        "src/model/checkpoint.rs",
        "src/ops/bf16_tile.rs",
        "src/ops/cuda/device.rs",
        "src/ops/cuda/driver.rs",
        "src/ops/cuda/launch.rs",
        "src/ops/cuda/products.rs",
        "src/ops/frozen_weight.rs",
        "src/ops/gemm.rs",
        "src/ops/lanes.rs",
        "src/ops/vectorised.rs",
        "src/train/activation_cache/host_rows.rs",
    ];
    let mut files = Vec::new();
    rust_files(&root("src"), &mut files)?;
    rust_files(&root("adapters"), &mut files)?;
    let mut found = BTreeSet::new();
    let security = read(&root("SECURITY.md"))?;
    for path in files {
        let text = read(&path)?;
        let blocks = text.matches("unsafe {").count() + text.matches("unsafe impl").count();
        if blocks > 0 {
            let proofs = text.matches("SAFETY:").count();
            assert!(
                proofs >= blocks,
                "{}: {blocks} unsafe blocks, {proofs} proofs",
                path.display()
            );
            let name = path.strip_prefix(root("")).unwrap_or(&path);
            found.insert(name.to_string_lossy().into_owned());
        }
    }
    assert_eq!(found, NAMED.map(str::to_owned).into());
    for name in NAMED {
        assert!(security.contains(name), "SECURITY.md does not name {name}");
    }
    Ok(())
}
