//! `run.toml`: a run's options, as a file that repeats it; `compare.toml`: a comparison's, to go on with it.
//!
//! Its keys are the names of the options, so reading it is writing the command line out:
//! `rank = 8` is `--rank 8`, `recompute = true` is `--recompute`, a list is the option with several values.

use crate::adapters::storage::{read_text, write_bytes};
use crate::{Context, Error, Result};
use clap::{ArgAction, ArgMatches, Command};
use std::any::TypeId;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Name of the file in a run folder.
pub(super) const RUN_FILE: &str = "run.toml";
/// How a run file begins, after the mark of a comment.
pub(super) const REPEATS: &str = "Repeats this run: retune train";

/// Whether a run of `retune train` was begun in the folder, or is described there by hand.
pub(super) fn is_run(folder: &Path) -> bool {
    folder.join(RUN_FILE).exists()
}

/// Replaces `--config FILE` of `retune train` by the options that the file holds; options typed beside it win.
pub(super) fn expand(arguments: Vec<OsString>) -> Result<Vec<OsString>> {
    let is_train = arguments.get(1).is_some_and(|command| command == "train");
    let position = arguments.iter().position(|argument| {
        argument == "--config"
            || argument
                .to_str()
                .is_some_and(|text| text.starts_with("--config="))
    });
    let (true, Some(position)) = (is_train, position) else {
        return Ok(arguments);
    };
    let mut typed = arguments;
    let flag = typed.remove(position);
    let file = match flag
        .to_str()
        .and_then(|text| text.strip_prefix("--config="))
    {
        Some(file) => OsString::from(file),
        None if position < typed.len() => typed.remove(position),
        None => return Err(Error::usage("`--config` needs a file")),
    };
    let (method, mut options) = read(Path::new(&file))?;
    let typed_method = typed
        .get(2)
        .filter(|next| !next.to_string_lossy().starts_with('-'))
        .cloned();
    if let Some(other) = typed_method
        .as_ref()
        .filter(|typed| *typed != method.as_str())
    {
        let other = other.to_string_lossy();
        return Err(Error::usage(format!(
            "the run is of method `{method}`, not `{other}`"
        ))
        .at(Path::new(&file).display())
        .hint(format!(
            "repeat it by `retune train --config FILE`; a run of `{other}` has options of its own"
        )));
    }
    let rest = typed.split_off(if typed_method.is_some() { 3 } else { 2 });
    let names_base = |typed: &OsString| {
        let typed = typed.to_string_lossy();
        typed == "--model" || typed.starts_with("--model=")
    };
    if rest.iter().any(names_base) {
        // The file's is the name of another base.
        options.retain(|option| !option.starts_with("--base-name="));
    }
    let mut all = vec![
        typed[0].clone(),
        "train".into(),
        typed_method.unwrap_or_else(|| method.into()),
    ];
    all.extend(options.into_iter().map(OsString::from));
    all.extend(rest);
    Ok(all)
}

/// Method and options, as arguments, of a run file.
pub(super) fn read(file: &Path) -> Result<(String, Vec<String>)> {
    let mut table = table(file)?;
    let method = match table.remove("method") {
        Some(Value::String(method)) => method,
        _ => {
            return Err(Error::new("`method` is missing")
                .at(file.display())
                .hint("a run file names its method, such as `method = \"lora\"`"));
        }
    };
    Ok((method, arguments(file, table)?))
}

/// The same of a command that has no methods.
pub(super) fn read_options(file: &Path) -> Result<Vec<String>> {
    arguments(file, table(file)?)
}

fn table(file: &Path) -> Result<Table> {
    let text = read_text(file).at(file.display())?;
    text.parse().map_err(|error: toml::de::Error| {
        Error::new(format!("not valid TOML: {}", error.message())).at(file.display())
    })
}

fn arguments(file: &Path, table: Table) -> Result<Vec<String>> {
    let mut arguments = Vec::new();
    for (name, value) in table {
        // One value per argument, joined to its name: nothing can be taken for another option.
        let mut push = |value: &Value| -> Result<()> {
            match value {
                Value::Boolean(true) => arguments.push(format!("--{name}")),
                Value::Boolean(false) => {}
                Value::String(text) => arguments.push(format!("--{name}={text}")),
                Value::Integer(number) => arguments.push(format!("--{name}={number}")),
                Value::Float(number) => arguments.push(format!("--{name}={number}")),
                Value::Datetime(date) => arguments.push(format!("--{name}={date}")),
                other => {
                    return Err(
                        Error::new(format!("`{name}` cannot be `{other}`")).at(file.display())
                    );
                }
            }
            Ok(())
        };
        match &value {
            Value::Array(values) => values.iter().try_for_each(&mut push)?,
            single => push(single)?,
        }
    }
    Ok(arguments)
}

/// Writes every option of `matches`, defaults included, with the values that were `settled` since, so that the file means
/// the same to later versions; paths in full, so that it means the same everywhere.
pub(super) fn write(
    file: &Path,
    method: &str,
    command: &Command,
    matches: &ArgMatches,
    settled: &[(&str, Value)],
) -> Result<()> {
    let mut table = Table::new();
    table.insert("method".to_owned(), Value::String(method.to_owned()));
    table.extend(options(command, matches, settled));
    let heading = format!("{REPEATS} --config {RUN_FILE}");
    save(file, &heading, &table)
}

/// The same for a command that has no methods, below a comment that says what the file is for.
pub(super) fn write_options(
    file: &Path,
    heading: &str,
    command: &Command,
    matches: &ArgMatches,
    settled: &[(&str, Value)],
) -> Result<()> {
    save(file, heading, &options(command, matches, settled))
}

fn options(command: &Command, matches: &ArgMatches, settled: &[(&str, Value)]) -> Table {
    let mut table = Table::new();
    for argument in command.get_arguments() {
        let Some(name) = argument
            .get_long()
            .filter(|name| !["help", "overwrite"].contains(name))
        else {
            continue;
        };
        let id = argument.get_id().as_str();
        let Ok(Some(raw)) = matches.try_get_raw(id) else {
            continue;
        };
        let parsed_type = argument.get_value_parser().type_id();
        let is_path = parsed_type == TypeId::of::<PathBuf>();
        let is_text = parsed_type == TypeId::of::<String>();
        let mut values: Vec<Value> = raw
            .map(|value| {
                let path = Path::new(value);
                // A base is a folder or a name on the hub.
                match std::path::absolute(path) {
                    Ok(full) if is_path || (name == "model" && path.is_dir()) => {
                        Value::String(full.to_string_lossy().into_owned())
                    }
                    _ if is_text => Value::String(value.to_string_lossy().into_owned()),
                    _ => typed(&value.to_string_lossy()),
                }
            })
            .collect();
        let value = match argument.get_action() {
            ArgAction::SetTrue => Value::Boolean(matches.get_flag(id)),
            ArgAction::Append => Value::Array(values),
            _ if values.len() == 1 => values.remove(0),
            _ => Value::Array(values),
        };
        table.insert(name.to_owned(), value);
    }
    table.extend(
        settled
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone())),
    );
    table
}

fn save(file: &Path, heading: &str, table: &Table) -> Result<()> {
    let text = format!(
        "# {heading}\n{}",
        toml::to_string(table)
            .map_err(|error| Error::new(format!("cannot write the run file: {error}")))?
    );
    write_bytes(file, text.as_bytes())
}

/// A number of things, as an option has it.
pub(super) fn count(number: usize) -> Value {
    Value::Integer(i64::try_from(number).unwrap_or(i64::MAX))
}

fn typed(text: &str) -> Value {
    if let Ok(number) = text.parse::<i64>() {
        return Value::Integer(number);
    }
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && text.contains(['.', 'e']) => Value::Float(number),
        _ => Value::String(text.to_owned()),
    }
}
