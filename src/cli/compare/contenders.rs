//! Which methods are compared, with which options and seeds.

use super::CompareArgs;
use crate::adapters::METHODS;
use crate::adapters::hooks::MethodEntry;
use crate::adapters::storage::AdapterWeights;
use crate::cli::memory_limit::refuse_large_run;
use crate::cli::plan;
use crate::compare::Contender;
use crate::data::{Dataset, Order};
use crate::model::{ModelConfig, Placement};
use crate::plan::{check_sites, memory};
use crate::{Context, Error, Result};
use candle_core::DType;
use clap::{Arg, Command};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::PathBuf;

/// Refuses a method that a GPU has no room to train, before the first is trained. What a machine has free is a guess.
pub(super) fn refuse_too_large(
    contenders: &[Contender],
    config: &ModelConfig,
    placement: &Placement,
    data: &Dataset,
    held_out: &Dataset,
) -> Result<()> {
    if placement.device.is_cpu() {
        return Ok(());
    }
    let held_out_tokens = plan::tokens(held_out);
    for Contender {
        label,
        method,
        options,
        ..
    } in contenders
    {
        let mut order = Order::shuffled(data.len(), options.seed);
        let load = plan::load(data, &mut order, options, held_out_tokens);
        let dtype = config.dtype.unwrap_or(DType::F32);
        let memory = memory(placement, config, dtype, method.as_ref(), options, &load)?;
        refuse_large_run(label, placement, memory.peak())?;
    }
    Ok(())
}

/// Bytes of a label in the name of its folder; systems have room for 255, and a seed comes after it.
const LONGEST_FOLDER: usize = 200;

pub(super) fn contenders(arguments: &CompareArgs, examples: usize) -> Result<Vec<Contender>> {
    let typed = arguments.methods.iter().chain(&arguments.with);
    let mut wanted: Vec<String> = typed
        .map(|label| label.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    if wanted.is_empty() {
        wanted = all_methods().into_iter().map(str::to_owned).collect();
    }
    let seeds = seeds(arguments);
    refuse_twice("method", &wanted)?;
    refuse_twice("seed", &seeds)?;
    let mut contenders: Vec<Contender> = Vec::new();
    for label in &wanted {
        for seed in &seeds {
            let mut next = contender(arguments, label, *seed, seeds.len() > 1, examples)?;
            // Names that differ in signs alone, such as `a.b` and `a,b`, would share a folder.
            while contenders.iter().any(|other| other.out == next.out) {
                next.out.as_mut_os_string().push("_");
            }
            contenders.push(next);
        }
    }
    Ok(contenders)
}

/// Refuses a method that finds nothing to train on this base, or more epochs than any run can take: what is wrong with the
/// last row is said before the first one is trained.
pub(super) fn refuse_impossible(
    contenders: &[Contender],
    config: &ModelConfig,
    examples: usize,
) -> Result<()> {
    for contender in contenders {
        contender.options.check_length(examples)?;
        check_sites(contender.method.as_ref(), config).context(format!(
            "`{}` cannot be trained on this base",
            contender.label
        ))?;
    }
    Ok(())
}

/// The most rows that a method of the comparison puts before each example.
pub(super) fn most_prompt_rows(contenders: &[Contender], config: &ModelConfig) -> Result<usize> {
    let (shape, weights) = (config.shape(), AdapterWeights::planned());
    let mut most = 0;
    for contender in contenders {
        let saved = contender.method.peft_config(&shape, &weights)?;
        let rows = saved.get("num_virtual_tokens").and_then(Value::as_u64);
        most = most.max(rows.unwrap_or(0) as usize);
    }
    Ok(most)
}

pub(super) fn all_methods() -> Vec<&'static str> {
    METHODS.iter().map(|entry| entry.name).collect()
}

/// Where the adapters of all rows lie.
pub(super) fn row_folders(arguments: &CompareArgs) -> Result<BTreeSet<PathBuf>> {
    let contenders = contenders(arguments, 1)?.into_iter();
    Ok(contenders.map(|contender| contender.out).collect())
}

pub(super) fn seeds(arguments: &CompareArgs) -> Vec<u64> {
    if arguments.seeds.is_empty() {
        return vec![arguments.training.seed];
    }
    arguments.seeds.clone()
}

/// The same twice would be two rows that nothing tells apart.
fn refuse_twice<T: Ord + Display>(what: &str, items: &[T]) -> Result<()> {
    let mut seen = BTreeSet::new();
    match items.iter().find(|item| !seen.insert(*item)) {
        Some(twice) => Err(Error::usage(format!("the {what} `{twice}` is given twice"))
            .hint("each row of the table is one method, trained once with each seed")),
        None => Ok(()),
    }
}

fn contender(
    arguments: &CompareArgs,
    label: &str,
    seed: u64,
    several: bool,
    examples: usize,
) -> Result<Contender> {
    let mut words = label.split_whitespace();
    let name = words.next().unwrap_or_default();
    let entry: &MethodEntry = METHODS
        .iter()
        .find(|entry| entry.name == name)
        .ok_or_else(|| {
            Error::usage(format!("`{name}` is not a method"))
                .hint(format!("methods: {}", all_methods().join(", ")))
        })?;
    let rate = Arg::new("learning-rate")
        .long("learning-rate")
        .value_parser(clap::value_parser!(f64));
    let matches = (entry.command)(Command::new(entry.name).no_binary_name(true))
        .arg(rate)
        .try_get_matches_from(words)
        .map_err(|error| Error::usage(format!("`{label}`: {error}")))?;
    let method = (entry.from_args)(&matches)?;
    let mut options = arguments
        .training
        .options(method.default_learning_rate(), examples)?;
    if let Some(rate) = matches.get_one::<f64>("learning-rate") {
        options.learning_rate = *rate;
    }
    options.seed = seed;
    options.save_every = arguments.save_every;
    options.keep = arguments.keep;
    let options = options.validated()?;
    let mut folder: String = label
        .chars()
        .map(|letter| {
            if letter.is_alphanumeric() || letter == '-' {
                letter
            } else {
                '_'
            }
        })
        .collect();
    // A label may be longer than a name in a file system.
    folder.truncate(folder.floor_char_boundary(LONGEST_FOLDER));
    if several {
        folder += &format!("_seed_{seed}");
    }
    Ok(Contender {
        label: label.to_owned(),
        method,
        options,
        out: arguments.out.join(folder),
    })
}
