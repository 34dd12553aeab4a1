//! Folds adapters into a base: a new checkpoint that needs no adapter.
//!
//! No model is built for it. The sites of the base are walked by name, each changed weight is made in f32 from the
//! stored one, rounded once to the type it is stored in, and written: the memory is that of one tensor. Several
//! adapters add up, `W + Σ weight · (W adapted by it - W)`. Linear layers come out as PEFT's `merge_and_unload` makes
//! them; an embedding in half precision may differ by one step, because PEFT rounds its update before adding it.
//!
//! Then what was written is read again: each merged layer must do what base and adapter do side by side, to within the
//! rounding of its type, and so must the logits of the whole model: see [`Probe`].

mod check;
mod files;
mod probe;
mod shards;
mod sites;
mod stack;

pub use check::LayerCheck;

use crate::adapter_folder::{Adapter, OtherBase};
use crate::adapters::hooks::{AdapterMethod, ModelShape, NoAdapter};
use crate::adapters::storage::AdapterWeights;
use crate::atomic::{AtomicFolder, Existing};
use crate::model::checkpoint::Checkpoint;
use crate::model::{self, ModelConfig, inventory};
use crate::ops;
use crate::{Context, Error, Result};
use candle_core::{DType, Device};
use serde::Serialize;
use sites::{Base, find_changes};
use stack::Stack;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// How to merge.
#[derive(Debug, Clone, Copy)]
pub struct MergeOptions {
    /// The type to write all weights in: f32, f16 or bf16. `None` keeps each weight's own.
    pub dtype: Option<DType>,
    /// Whether an adapter of another base may be merged.
    pub other_base: OtherBase,
    /// Cut the weights into files of at most this many bytes. `None` keeps the base's files.
    pub max_shard_bytes: Option<u64>,
    /// What to do if the output folder has something in it.
    pub existing: Existing,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            other_base: OtherBase::Refuse,
            max_shard_bytes: None,
            existing: Existing::Refuse,
        }
    }
}

/// What a merge is doing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MergeProgress<'a> {
    /// Runs the probe through base and adapters.
    Probing,
    /// Writes a tensor.
    Writing {
        /// Its name.
        tensor: &'a str,
        /// The file it goes into.
        file: &'a str,
        /// Bytes of all tensors before it.
        done: u64,
        /// Bytes of all tensors.
        total: u64,
    },
    /// Loads what was written and runs the probe through it.
    Checking {
        /// Bytes of all tensors.
        total: u64,
    },
}

/// Logits of a few sequences of arbitrary tokens, compared between base with adapters and merged model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Probe {
    /// The largest difference of two logits.
    pub difference: f64,
    /// The largest difference that rounding explains; a merge that exceeds it fails.
    pub bound: f64,
    /// The largest difference that the adapters make to the base's logits.
    pub effect: f64,
}

/// What a merge made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergeReport {
    /// The new checkpoint.
    pub folder: PathBuf,
    /// Number of tensors written.
    pub tensors: usize,
    /// Number of those that the adapters changed.
    pub merged: usize,
    /// Number of files of weights.
    pub files: usize,
    /// Size of all weights.
    pub bytes: u64,
    /// Whether the output head was the embedding matrix and is one of its own now.
    pub untied_head: bool,
    /// The files copied from the base.
    pub copied: Vec<String>,
    /// How near each merged weight by itself is to base and adapters.
    pub layers: LayerCheck,
    /// How near the merged model is to base and adapters.
    pub probe: Probe,
}

/// Writes the checkpoint `out`: the base in the folder `base` with every adapter folded in, each times its weight.
///
/// The folder appears only when it is complete and its probe agrees; on an error nothing is left. An error returned
/// by `on_progress` stops the merge.
pub fn merge(
    base: &Path,
    adapters: &[(Adapter, f64)],
    out: &Path,
    options: &MergeOptions,
    on_progress: &mut dyn FnMut(MergeProgress) -> Result<()>,
) -> Result<MergeReport> {
    check_request(base, adapters, out)?;
    let config = ModelConfig::read(base)?;
    let checkpoint = Checkpoint::open(base)?;
    let fingerprint = checkpoint.fingerprint()?;
    for (adapter, _) in adapters {
        adapter.check_base(&fingerprint, options.other_base)?;
    }
    let folder = AtomicFolder::create(out, options.existing)?;

    let source = Base {
        checkpoint: &checkpoint,
        shape: config.shape(),
        parameters: inventory(&config),
    };
    let borrowed: Vec<(&Adapter, f64)> = adapters
        .iter()
        .map(|(adapter, weight)| (adapter, *weight))
        .collect();
    let stack = Stack::new(&borrowed, &source.shape, &source.parameters, &|name| {
        source.values(name)
    })?;
    let changes = find_changes(&source, &stack)?;
    on_progress(MergeProgress::Probing)?;
    let unchanged = logits(base, &NoAdapter, AdapterWeights::fresh(0, &Device::Cpu))?;
    let adapted = logits(base, &stack, stack.replaced())?;

    let tied_head = source.shape.tied_head && !changes.unties_head;
    files::write_config(base, folder.path(), options.dtype, tied_head)?;
    let copied = files::copy(base, folder.path())?;
    let shards = shards::layout(&source, &changes, options.dtype, options.max_shard_bytes)?;
    shards::write_index(folder.path(), &shards)?;
    let written = copied.iter().map(String::as_str);
    let written = written.chain([files::CONFIG]).chain(shards::files(&shards));
    let written: BTreeSet<&str> = written.collect();
    let outputs = || shards.iter().flat_map(|shard| &shard.tensors);
    let total = outputs().map(|output| output.bytes as u64).sum();
    let mut done = 0;
    for shard in &shards {
        shards::write_shard(folder.path(), shard, &source, &written, &mut |output| {
            on_progress(MergeProgress::Writing {
                tensor: &output.name,
                file: &shard.file,
                done,
                total,
            })?;
            done += output.bytes as u64;
            Ok(())
        })?;
    }

    on_progress(MergeProgress::Checking { total })?;
    let written = Checkpoint::open(folder.path())?;
    let shape = ModelShape {
        tied_head,
        ..source.shape.clone()
    };
    let target = Base {
        checkpoint: &written,
        shape,
        parameters: source.parameters.clone(),
    };
    let layers = check::every_layer(&source, &target, &changes)?;
    let merged = logits(
        folder.path(),
        &NoAdapter,
        AdapterWeights::fresh(0, &Device::Cpu),
    )
    .context("the merged model cannot be loaded")?;
    let roundoff = shards::roundoff(&shards, &source)?;
    let probe = Probe {
        difference: probe::largest_difference(&adapted, &merged),
        bound: bound(roundoff, config.layers, probe::scale(&adapted)),
        effect: probe::largest_difference(&unchanged, &adapted),
    };
    probe.check()?;
    let (tensors, merged) = (
        outputs().count(),
        outputs().filter(|output| output.change.is_some()).count(),
    );
    Ok(MergeReport {
        folder: folder.finish()?,
        tensors,
        merged,
        files: shards.len(),
        bytes: total,
        untied_head: changes.unties_head,
        copied,
        layers,
        probe,
    })
}

/// How far an adapter moves one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct UpdateNorm {
    /// Name of the weight.
    pub name: String,
    /// Norm of what is added to it.
    pub update: f64,
    /// Norm of the weight itself.
    pub base: f64,
}

/// How far `adapter` moves each weight of `base` that it changes; `None` if it changes none, like a soft prompt.
pub fn update_norms(
    base: &Path,
    adapter: &Adapter,
    other_base: OtherBase,
) -> Result<Option<Vec<UpdateNorm>>> {
    let config = ModelConfig::read(base)?;
    let checkpoint = Checkpoint::open(base)?;
    adapter.check_base(&checkpoint.fingerprint()?, other_base)?;
    let source = Base {
        checkpoint: &checkpoint,
        shape: config.shape(),
        parameters: inventory(&config),
    };
    let own = [(adapter, 1.0)];
    let stack = Stack::new(&own, &source.shape, &source.parameters, &|name| {
        source.values(name)
    })?;
    if stack.has_soft_prompt(&source.shape)? {
        return check_soft_prompt(adapter, &source.shape).map(|()| None);
    }
    let changes = find_changes(&source, &stack)?;
    let mut norms = Vec::new();
    for (name, change) in &changes.by_name {
        // A head that is untied starts as the embedding.
        let known = match checkpoint.contains(name) {
            true => name.as_str(),
            false => source.embedding_name(),
        };
        let values = source.values(known).at(name)?;
        let merged = change.apply(|| Ok(values.clone())).at(name)?;
        norms.push(UpdateNorm {
            name: name.clone(),
            update: ops::squared_norm(&(merged - &values)?)?.sqrt(),
            base: ops::squared_norm(&values)?.sqrt(),
        });
    }
    Ok(Some(norms))
}

/// Makes sure that a soft prompt has as many rows as its configuration says, each as wide as a hidden state of `shape`.
/// Other adapters pass.
pub(crate) fn check_soft_prompt(adapter: &Adapter, shape: &ModelShape) -> Result<()> {
    let own = [(adapter, 1.0)];
    let stack = Stack::new(&own, shape, &[], &|_| Err(Error::new("no base is at hand")))?;
    if !stack.has_soft_prompt(shape)? {
        return Ok(());
    }
    adapter.method.check(shape)?;
    stack.finish()
}

fn logits(folder: &Path, method: &dyn AdapterMethod, weights: AdapterWeights) -> Result<Vec<f32>> {
    probe::logits(&model::load(folder, method, weights, None)?)
}

impl Probe {
    fn check(&self) -> Result<()> {
        if self.difference <= self.bound {
            return Ok(());
        }
        Err(Error::new(format!(
            "the merged model is not the adapted one: logits differ by up to {:.2e}, where rounding explains {:.2e}",
            self.difference, self.bound
        ))
        .hint("nothing was written; `--dtype f32` shows whether rounding is to blame, `retune inspect` whether base or adapter hold values that are not finite"))
    }

    /// Whether rounding the merged weights loses a good part of what the adapters do.
    pub fn rounding_is_large(&self) -> bool {
        self.difference > 0.2 * self.effect
    }
}

/// What rounding explains: noise of f32 sums that are taken in another order, and weights off by up to `roundoff`,
/// whose effects add up like a random walk through the layers. Relative to the usual size of a logit.
///
/// With weights in half precision this is a coarse net: layers amplify what those before them rounded, and how much is
/// the model's own. That each layer is right to the last bit of its type, [`check`] has made sure before.
fn bound(roundoff: f64, layers: usize, scale: f64) -> f64 {
    const SUMS: f64 = 1e-4;
    /// The largest of many logits lies five deviations out; the rest is room for unlucky models. Tiny random ones,
    /// which are the worst, have been seen at 18.
    const DEVIATIONS: f64 = 64.0;
    scale * (SUMS + DEVIATIONS * roundoff * (layers as f64).sqrt())
}

/// Refuses what cannot be meant, before anything is read.
fn check_request(base: &Path, adapters: &[(Adapter, f64)], out: &Path) -> Result<()> {
    if adapters.is_empty() {
        return Err(Error::usage("a merge needs at least one adapter"));
    }
    for (adapter, weight) in adapters {
        if !weight.is_finite() {
            return Err(Error::usage(format!(
                "the weight of `{}` is {weight}",
                adapter.folder().display()
            )));
        }
    }
    // What does not exist yet cannot hold anything that a merge reads.
    let Ok(target) = out.canonicalize() else {
        return Ok(());
    };
    let sources = adapters.iter().map(|(adapter, _)| adapter.folder());
    for source in sources.chain([base]) {
        if source
            .canonicalize()
            .at(source.display())?
            .starts_with(&target)
        {
            return Err(Error::new(format!(
                "the output folder would take the place of `{}`, which the merge reads",
                source.display()
            ))
            .at(out.display())
            .hint("choose another folder for the output"));
        }
    }
    Ok(())
}
