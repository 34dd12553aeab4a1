//! `run.toml`: a run's options, as a file that repeats it; `compare.toml`: a comparison's, to go on with it.
//!
//! Its keys are the names of the options, so reading it is writing the command line out:
//! `rank = 8` is `--rank 8`, `recompute = true` is `--recompute`, a list is the option with several values.

use super::train;
use crate::adapters::storage::{read_text, write_bytes};
use crate::{Context, Error, Result};
use clap::{ArgAction, ArgMatches, Command};
use std::any::TypeId;
use std::collections::BTreeSet;
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
    let replaced: BTreeSet<&str> = rest.iter().filter_map(name).flat_map(instead_of).collect();
    options.retain(|option| name(option).is_none_or(|name| !replaced.contains(name)));
    let rest = without_taken_back(rest, &method);
    let mut all = vec![
        typed[0].clone(),
        "train".into(),
        typed_method.unwrap_or_else(|| method.into()),
    ];
    all.extend(options);
    all.extend(rest);
    Ok(all)
}

/// The name of an option, without its value.
fn name(option: &OsString) -> Option<&str> {
    let name = option.to_str()?.strip_prefix("--")?;
    Some(name.split_once('=').map_or(name, |(name, _)| name))
}

/// The typed options without the flags that a later one takes back, and those that do.
fn without_taken_back(typed: Vec<OsString>, method: &str) -> Vec<OsString> {
    let mut kept: Vec<OsString> = Vec::new();
    for option in typed {
        match takes_back(&option, method) {
            true => kept.retain(|earlier| name(earlier) != name(&option)),
            false => kept.push(option),
        }
    }
    kept
}

/// Whether this is `--recompute=false` or another flag of the method that a file may hold and this run is not to have.
fn takes_back(option: &OsString, method: &str) -> bool {
    let text = option.to_str().and_then(|text| text.strip_suffix("=false"));
    let Some(flag) = text.and_then(|text| text.strip_prefix("--")) else {
        return false;
    };
    let commands = train::command();
    let command = commands.find_subcommand(method);
    let mut options = command.into_iter().flat_map(Command::get_arguments);
    options.any(|known| {
        known.get_long() == Some(flag) && matches!(known.get_action(), ArgAction::SetTrue)
    })
}

/// The options of a file that one typed beside it takes the place of: itself, and those that say the same in another way
/// or of what it replaces.
fn instead_of(typed: &str) -> Vec<&str> {
    match typed {
        "model" => vec!["model", "base-name"],
        "epochs" | "steps" => vec!["epochs", "steps"],
        "eval-data" | "eval-fraction" => vec!["eval-data", "eval-fraction"],
        other => vec![other],
    }
}

/// Method and options, as arguments, of a run file.
pub(super) fn read(file: &Path) -> Result<(String, Vec<OsString>)> {
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
pub(super) fn read_options(file: &Path) -> Result<Vec<OsString>> {
    arguments(file, table(file)?)
}

/// The option that says where a run is, whatever the bytes of the name.
pub(super) fn out(folder: &Path) -> OsString {
    let mut option = OsString::from("--out=");
    option.push(folder);
    option
}

fn table(file: &Path) -> Result<Table> {
    let text = read_text(file).at(file.display())?;
    text.parse().map_err(|error: toml::de::Error| {
        Error::new(format!("not valid TOML: {}", error.message())).at(file.display())
    })
}

fn arguments(file: &Path, table: Table) -> Result<Vec<OsString>> {
    let mut arguments = Vec::new();
    for (name, value) in table {
        // One value per argument, joined to its name: nothing can be taken for another option.
        let mut push = |value: &Value| -> Result<()> {
            let argument = match value {
                Value::Boolean(true) => format!("--{name}"),
                Value::Boolean(false) => return Ok(()),
                Value::String(text) => format!("--{name}={text}"),
                Value::Integer(number) => format!("--{name}={number}"),
                Value::Float(number) => format!("--{name}={number}"),
                Value::Datetime(date) => format!("--{name}={date}"),
                other => {
                    return Err(
                        Error::new(format!("`{name}` cannot be `{other}`")).at(file.display())
                    );
                }
            };
            arguments.push(argument.into());
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
    table.extend(options(command, matches, settled)?);
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
    save(file, heading, &options(command, matches, settled)?)
}

/// Refuses values that a file cannot hold.
pub(super) fn check(command: &Command, matches: &ArgMatches) -> Result<()> {
    options(command, matches, &[]).map(drop)
}

fn options(command: &Command, matches: &ArgMatches, settled: &[(&str, Value)]) -> Result<Table> {
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
        let mut values = Vec::new();
        for value in raw {
            let path = Path::new(value);
            // A base is a folder or a name on the hub.
            let is_path = is_path || (name == "model" && path.is_dir());
            let full = match std::path::absolute(path) {
                Ok(full) if is_path => full.into_os_string(),
                _ => value.to_owned(),
            };
            match full.into_string() {
                Ok(text) if is_path || is_text => values.push(Value::String(text)),
                Ok(text) => values.push(typed(&text)),
                // The file lies there, and whoever repeats the run says where to.
                Err(_) if name == "out" => {}
                Err(_) => {
                    return Err(Error::usage(format!(
                        "`--{name}` is not UTF-8, and could not be written down for the run to go on with"
                    ))
                    .at(path.display())
                    .hint("give it another name, or a link to it"));
                }
            }
        }
        let value = match argument.get_action() {
            ArgAction::SetTrue => Value::Boolean(matches.get_flag(id)),
            ArgAction::Append => Value::Array(values),
            _ if values.is_empty() => continue,
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
    Ok(table)
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
