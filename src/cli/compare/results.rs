//! What a comparison says at its end.

use super::CompareArgs;
use super::contenders::seeds;
use crate::compare::{Contender, Row};
use crate::report::loss_plot::Curve;
use crate::train::Budget;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The results are written; that a row came to nothing must not look like success.
pub(super) fn refuse_failed(failed: &[&Row], rows_file: &Path, out: &Path) -> Result<()> {
    if failed.is_empty() {
        return Ok(());
    }
    let each: Vec<String> = failed
        .iter()
        .map(|row| {
            let reason = row.failed.as_deref().unwrap_or_default();
            format!("\n  `{}` of seed {}: {reason}", row.method, row.seed)
        })
        .collect();
    let fact = match failed.len() {
        1 => "a method failed".to_owned(),
        count => format!("{count} trainings failed"),
    };
    Err(
        Error::not_finite(format!("{fact}, the others are whole:{}", each.concat()))
            .at(rows_file.display())
            .hint(format!(
                "`retune resume {} --retry-failed` trains again what failed; with a lower `--learning-rate` it is another comparison",
                out.display()
            )),
    )
}

/// What was compared, as far as the command line says.
pub(super) fn request(arguments: &CompareArgs, contenders: &[Contender]) -> Value {
    let paths = |files: &[PathBuf]| -> Vec<String> {
        files
            .iter()
            .map(|file| file.display().to_string())
            .collect()
    };
    let mut request = json!({
        "retune_version": env!("CARGO_PKG_VERSION"),
        "base": arguments.base_name(),
        "data": paths(&arguments.data),
        "eval_data": paths(&arguments.eval_data),
        "eval_fraction": super::held_out_share(arguments),
        "unrelated": paths(&arguments.unrelated),
        "seeds": seeds(arguments),
    });
    if let Some(contender) = contenders.first() {
        match contender.options.budget {
            Budget::Steps(steps) => request["steps"] = steps.into(),
            Budget::Epochs(epochs) => request["epochs"] = epochs.into(),
        }
        request["batch_size"] = contender.options.batch_size.into();
    }
    request
}

pub(super) fn file_names(files: &[PathBuf]) -> String {
    let names: Vec<_> = files
        .iter()
        .filter_map(|file| file.file_name()?.to_str())
        .collect();
    names.join(", ")
}

pub(super) fn curve(row: &Row) -> Curve {
    Curve {
        name: row.method.clone(),
        points: row
            .curve
            .iter()
            .map(|(step, loss)| (*step as u64, *loss))
            .collect(),
    }
}
