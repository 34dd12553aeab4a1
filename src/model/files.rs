//! Files of a model's folder beside its configuration and its weights, by their names.

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
