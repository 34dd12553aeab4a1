//! The files of a model's folder: those beside its configuration and its weights, by their names, and those of a merge, by
//! what its weights say.

use super::checkpoint::Checkpoint;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Beginnings, in lower case, of the names of files that belong to a model whatever its weights are.
const BELONGING: [&str; 16] = [
    "added_tokens.json",
    "chat_template.",
    "generation_config.json",
    "licence",
    "license",
    "merges.txt",
    "notice",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer",
    "use_policy",
    "vocab.",
];

/// A folder of further chat templates, the only one in that of a model.
pub(crate) const TEMPLATES: &str = "additional_chat_templates";

/// Whether a file of this name belongs to a model whatever its weights are.
pub(crate) fn belongs(name: &str) -> bool {
    let lower = name.to_lowercase();
    BELONGING.iter().any(|start| lower.starts_with(start))
}

/// The key, among the texts in the header of weights that `merge` writes, of the names of all files that it writes beside
/// them: a JSON list.
pub(crate) const MERGED: &str = "retune_merge";

/// The files that a merge has written into `folder`, as its weights say; `None` if they are of no merge.
pub(crate) fn of_merge(folder: &Path) -> Option<BTreeSet<PathBuf>> {
    let checkpoint = Checkpoint::open(folder).ok()?;
    serde_json::from_str(checkpoint.metadata().get(MERGED)?).ok()
}
