//! The files beside the weights: configuration and tokenizer.

use crate::adapters::storage::{read_bytes, read_small};
use crate::data::{has_file, has_folder};
use crate::model::files;
use crate::{Context, Error, Result};
use candle_core::DType;
use serde_json::{Map, Value, json};
use std::path::Path;

pub(super) const CONFIG: &str = "config.json";

/// Copies the files that belong to the model `from` into the folder `to`; returns their names, in order.
pub(super) fn copy(from: &Path, to: &Path) -> Result<Vec<String>> {
    let mut copied = Vec::new();
    for entry in std::fs::read_dir(from).at(from.display())? {
        let Ok(name) = entry.at(from.display())?.file_name().into_string() else {
            continue;
        };
        let path = from.join(&name);
        if files::belongs(&name) && is_file(&path)? {
            copy_file(from, &path, &to.join(&name))?;
            copied.push(name);
        } else if name == files::TEMPLATES && has_folder(&path)? {
            std::fs::create_dir(to.join(&name)).at(to.display())?;
            for entry in std::fs::read_dir(&path).at(path.display())? {
                let Ok(own) = entry.at(path.display())?.file_name().into_string() else {
                    continue;
                };
                let (file, template) = (path.join(&own), format!("{name}/{own}"));
                if own.ends_with(".jinja") && is_file(&file)? {
                    copy_file(from, &file, &to.join(&template))?;
                    copied.push(template);
                }
            }
        }
    }
    copied.sort();
    Ok(copied)
}

/// Whether there is a file to copy. A folder such as `licenses` is none; one in the place of `tokenizer.json` is an error,
/// as is a link that leads nowhere.
fn is_file(path: &Path) -> Result<bool> {
    let extension = path.extension();
    let is_read = extension.is_some_and(|extension| extension == "json" || extension == "jinja");
    if path.is_dir() && !is_read {
        return Ok(false);
    }
    has_file(path)
}

/// Contents only: files in a download cache may be links, or read-only. A link may lead to the cache's own files, and
/// nowhere else: what it copies may be handed on.
fn copy_file(base: &Path, from: &Path, to: &Path) -> Result<()> {
    let target = from.canonicalize().at(from.display())?;
    let allowed = [base.to_path_buf(), base.join("../../blobs")];
    let is_inside = |folder: &std::path::PathBuf| {
        folder
            .canonicalize()
            .is_ok_and(|folder| target.starts_with(folder))
    };
    if !allowed.iter().any(is_inside) {
        return Err(Error::new("a link that leads out of the model's folder")
            .at(from.display())
            .hint("put a copy of the file in its place, or remove the link"));
    }
    let bytes = read_bytes(from).at(from.display())?;
    std::fs::write(to, bytes).at(to.display())
}

/// Writes `config.json`: the base's own bytes, unless the type or the tie of the head has changed.
pub(super) fn write_config(
    from: &Path,
    to: &Path,
    dtype: Option<DType>,
    tied_head: bool,
) -> Result<()> {
    let (source, target) = (from.join(CONFIG), to.join(CONFIG));
    let bytes = read_small(&source).at(source.display())?;
    let mut fields: Map<String, Value> = serde_json::from_slice(&bytes).at(source.display())?;
    if let Some(dtype) = dtype {
        let name = match dtype {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            other => {
                return Err(Error::usage(format!(
                    "weights cannot be written as {other:?}"
                )));
            }
        };
        let former = fields.contains_key("torch_dtype");
        if former {
            fields.insert("torch_dtype".to_owned(), json!(name));
        }
        if !former || fields.contains_key("dtype") {
            fields.insert("dtype".to_owned(), json!(name));
        }
    }
    // Also where the base's own weights have untied it: not every reader looks at them.
    let tie = fields.get("tie_word_embeddings").and_then(Value::as_bool);
    let unties_head = !tied_head && tie == Some(true);
    if unties_head {
        fields.insert("tie_word_embeddings".to_owned(), json!(false));
    }
    if dtype.is_none() && !unties_head {
        return std::fs::write(&target, bytes).at(target.display());
    }
    write_json(&target, &Value::Object(fields))
}

/// Writes JSON as transformers does: indented by two, with a final newline.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).at(path.display())?;
    text.push('\n');
    std::fs::write(path, text).at(path.display())
}
