//! `retune inspect`: what a checkpoint, an adapter or a run is, and whether it is whole.

use super::output::print_line;
use super::printable;
use super::progress::{Progress, Show};
use super::table::{Column, Table};
use crate::inspect::{
    AdapterFacts, CheckpointFacts, InspectOptions, Inspection, ReadWeights, RunFacts, TensorFacts,
    Values, inspect as look_at,
};
use crate::report::format;
use crate::{Error, Result};
use clap::Args;
use serde_json::Value;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  retune inspect ./base                   architecture, sizes, files, values that are not finite
  retune inspect my-adapter               method, options, and how far it moves each kind of module
  retune inspect my-adapter --model ./base --tensors
  retune inspect my-run                   progress, last loss, checkpoints

Exit code 0 if nothing is wrong, 1 if the folder holds something that does not work as it should.";

/// What `retune inspect` can be told.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct InspectArgs {
    /// Folder of a checkpoint, an adapter or a training run
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,

    /// Base to measure an adapter against [default: the folder that the adapter names]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// List every tensor
    #[arg(long)]
    tensors: bool,

    /// Read names and shapes only, not the values: a large checkpoint takes a moment instead of minutes
    #[arg(long)]
    quick: bool,

    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `retune inspect`.
pub(super) fn inspect(arguments: &InspectArgs) -> Result<()> {
    let show = Show::on_stderr(arguments.json);
    let options = InspectOptions {
        base: arguments.model.as_deref(),
        weights: match arguments.quick {
            true => ReadWeights::Headers,
            false => ReadWeights::All,
        },
    };
    let mut bar = None;
    let inspection = look_at(&arguments.folder, &options, &mut |done, total| {
        // What takes no time needs no bar.
        const LARGE: u64 = 1 << 30;
        if total >= LARGE && options.weights == ReadWeights::All {
            bar.get_or_insert_with(|| Progress::bytes(show, "reading", total))
                .set(done);
        }
        Ok(())
    })?;
    drop(bar);
    if arguments.json {
        print_line!("{}", json(&inspection, arguments.tensors)?)?;
    } else {
        match &inspection {
            Inspection::Checkpoint(facts) => checkpoint(facts, arguments)?,
            Inspection::Adapter(facts) => adapter(facts, arguments)?,
            Inspection::Run(facts) => run(facts, arguments)?,
        }
    }
    match inspection.problems().as_slice() {
        [] => Ok(()),
        [one] => Err(Error::new(*one).at(arguments.folder.display())),
        many => Err(Error::new(format!("{} problems", many.len())).at(arguments.folder.display())),
    }
}

/// Everything, or everything but the list of tensors.
fn json(inspection: &Inspection, tensors: bool) -> Result<Value> {
    let mut value = serde_json::to_value(inspection)
        .map_err(|error| Error::new(format!("cannot write this as JSON: {error}")))?;
    if !tensors {
        for place in ["", "/adapter"] {
            if let Some(facts) = value.pointer_mut(place).and_then(Value::as_object_mut) {
                facts.remove("tensors");
            }
        }
    }
    Ok(value)
}

fn checkpoint(facts: &CheckpointFacts, arguments: &InspectArgs) -> Result<()> {
    let mut lines = vec![
        ("checkpoint", facts.folder.display().to_string()),
        (
            "architecture",
            facts
                .architecture
                .clone()
                .unwrap_or_else(|| "unknown".to_owned()),
        ),
    ];
    if let Some(shape) = &facts.shape {
        lines.push((
            "shape",
            format!(
                "{} blocks of {}, feed-forward {}, {} heads of {} ({} for keys and values)",
                shape.layers,
                shape.hidden_size,
                shape.intermediate_size,
                shape.attention_heads,
                shape.head_dim,
                shape.key_value_heads
            ),
        ));
        let tied = if shape.tied_head {
            "tied to the embedding"
        } else {
            "a matrix of its own"
        };
        lines.push((
            "tokens",
            format!(
                "{} in the vocabulary, up to {} positions",
                format::whole(shape.vocabulary as u64),
                format::whole(shape.max_positions as u64)
            ),
        ));
        lines.push(("output head", tied.to_owned()));
    }
    let kinds: Vec<String> = facts
        .parameters_by_kind
        .iter()
        .map(|(kind, count)| format!("{kind} {}", format::count(*count)))
        .collect();
    lines.push((
        "parameters",
        format!("{} ({})", format::whole(facts.parameters), kinds.join(", ")),
    ));
    let types: Vec<String> = facts
        .types
        .iter()
        .map(|count| {
            format!(
                "{} in {} ({} tensors)",
                format::bytes(count.bytes),
                count.dtype,
                count.tensors
            )
        })
        .collect();
    lines.push(("weights", types.join(", ")));
    lines.push((
        "tokenizer",
        match (facts.tokenizer, facts.chat_template) {
            (true, true) => "yes, with a chat template",
            (true, false) => "yes, without a chat template",
            (false, _) => "none that can be used",
        }
        .to_owned(),
    ));
    if let Some(fingerprint) = &facts.fingerprint {
        lines.push(("fingerprint", fingerprint.clone()));
    }
    lines.push(("values", health(&facts.tensors)));
    Table::facts(lines).print()?;
    print_line!("")?;
    let mut files = Table::new(&[Column::Text("file"), Column::Number("size")]);
    for file in &facts.files {
        files.row([file.name.clone(), format::bytes(file.bytes)]);
    }
    files.print()?;
    if arguments.tensors {
        tensors(&facts.tensors)?;
    }
    remarks(&facts.problems, &facts.notes)
}

fn adapter(facts: &AdapterFacts, arguments: &InspectArgs) -> Result<()> {
    let method = facts
        .method
        .clone()
        .unwrap_or_else(|| format!("{} (not implemented)", facts.peft_type));
    let mut lines = vec![
        ("adapter", facts.folder.display().to_string()),
        ("method", method),
        ("parameters", format::whole(facts.parameters)),
        ("size", format::bytes(facts.bytes)),
        (
            "base",
            facts.base.clone().unwrap_or_else(|| "not named".to_owned()),
        ),
    ];
    if let Some(fingerprint) = &facts.base_fingerprint {
        lines.push(("base fingerprint", fingerprint.clone()));
    }
    if let Some(same) = facts.base_is_the_same {
        lines.push((
            "base at hand",
            if same {
                "the one it was trained on"
            } else {
                "another one"
            }
            .to_owned(),
        ));
    }
    for (name, value) in &facts.options {
        lines.push((name, plain(value)));
    }
    Table::facts(lines).print()?;
    print_line!("")?;
    let columns = [
        Column::Text("tensors (* is the layer)"),
        Column::Number("number"),
        Column::Number("values"),
        Column::Number("mean size"),
        Column::Number("largest"),
    ];
    let mut groups = Table::new(&columns);
    for group in &facts.groups {
        groups.row([
            group.name.clone(),
            group.tensors.to_string(),
            format::count(group.values.count),
            number(group.values.rms),
            number(f64::from(group.values.largest)),
        ]);
    }
    groups.print()?;
    if !facts.update.is_empty() {
        print_line!("")?;
        let columns = [
            Column::Text("what it changes"),
            Column::Number("weights"),
            Column::Number("update / weight"),
            Column::Number("largest"),
        ];
        let mut updates = Table::new(&columns);
        for update in &facts.update {
            let percent = |share: f64| format!("{} %", number(100.0 * share));
            updates.row([
                update.name.clone(),
                update.tensors.to_string(),
                percent(update.mean),
                percent(update.largest),
            ]);
        }
        updates.print()?;
    }
    if arguments.tensors {
        tensors(&facts.tensors)?;
    }
    remarks(&facts.problems, &facts.notes)
}

fn run(facts: &RunFacts, arguments: &InspectArgs) -> Result<()> {
    let method = facts.method.clone().unwrap_or_else(|| "unknown".to_owned());
    let total = facts
        .total_steps
        .map_or_else(|| "unknown".to_owned(), format::whole);
    let mut lines = vec![
        ("run", facts.folder.display().to_string()),
        ("method", method),
        (
            "state",
            match (facts.finished, facts.checkpoints.is_empty()) {
                (true, _) => "finished: the adapter is in the folder".to_owned(),
                (false, false) => format!(
                    "not finished; go on with `retune resume {}`",
                    facts.folder.display()
                ),
                (false, true) => {
                    "not finished, and there is no checkpoint to resume from".to_owned()
                }
            },
        ),
        (
            "steps",
            format!("{} of {total}", format::whole(facts.steps)),
        ),
    ];
    if let (Some(first), Some(last)) = (&facts.first_step, &facts.last_step) {
        lines.push(("loss", format!("{:.4} -> {:.4}", first.loss, last.loss)));
        lines.push((
            "speed",
            format!(
                "{} tokens/s",
                format::count(last.tokens_per_second.round() as u64)
            ),
        ));
        lines.push(("peak memory", format::bytes(last.peak_memory_bytes)));
    }
    if let Some(eval) = &facts.last_eval {
        lines.push((
            "held-out loss",
            format!("{:.4} after step {}", eval.eval_loss, eval.step),
        ));
    }
    if let Some(best) = &facts.best_eval {
        lines.push((
            "best",
            format!("{:.4} after step {}", best.eval_loss, best.step),
        ));
    }
    for checkpoint in &facts.checkpoints {
        let name = checkpoint
            .folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        lines.push((
            "checkpoint",
            format!("{name} ({})", format::bytes(checkpoint.bytes)),
        ));
    }
    Table::facts(lines).print()?;
    print_line!("")?;
    let options = facts
        .options
        .iter()
        .map(|(name, value)| (format!("--{name}"), plain(value)));
    Table::facts(options).print()?;
    if let Some(facts) = &facts.adapter {
        print_line!("")?;
        adapter(facts, arguments)?;
    }
    remarks(&facts.problems, &[])
}

fn tensors(tensors: &[TensorFacts]) -> Result<()> {
    print_line!("")?;
    let columns = [
        Column::Text("tensor"),
        Column::Text("type"),
        Column::Text("shape"),
        Column::Number("mean size"),
        Column::Number("largest"),
        Column::Number("not finite"),
    ];
    let mut table = Table::new(&columns);
    for tensor in tensors {
        let of = |read: fn(&Values) -> String| {
            tensor.values.as_ref().map_or_else(|| "-".to_owned(), read)
        };
        table.row([
            tensor.name.clone(),
            tensor.dtype.clone(),
            format!("{:?}", tensor.shape),
            of(|values| number(values.rms)),
            of(|values| number(f64::from(values.largest))),
            of(|values| format::whole(values.nan + values.infinite)),
        ]);
    }
    table.print()
}

fn health(tensors: &[TensorFacts]) -> String {
    let read: Vec<Values> = tensors.iter().filter_map(|tensor| tensor.values).collect();
    if read.is_empty() {
        return "not read".to_owned();
    }
    let broken = read.iter().filter(|values| values.broken()).count();
    match broken {
        0 => "all finite".to_owned(),
        count => format!(
            "{count} of {} tensors hold values that are not finite",
            read.len()
        ),
    }
}

fn remarks(problems: &[String], notes: &[String]) -> Result<()> {
    for problem in problems {
        print_line!("\nproblem: {}", printable(problem))?;
    }
    for note in notes {
        print_line!("\nnote: {}", printable(note))?;
    }
    Ok(())
}

/// Entries of a list that are shown.
const LISTED: usize = 8;

/// JSON as a person would write it: no quotes, lists with commas.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => {
            let shown: Vec<String> = values.iter().take(LISTED).map(plain).collect();
            match values.len().saturating_sub(LISTED) {
                0 => shown.join(", "),
                more => format!("{} and {more} more", shown.join(", ")),
            }
        }
        other => other.to_string(),
    }
}

/// Three digits, without an exponent where it can be helped.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        1e-3..1e4 => {
            let digits = 2 - (value.abs().log10().floor() as i32);
            format!("{value:.*}", digits.clamp(0, 5) as usize)
        }
        _ => format!("{value:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in [
            (0.0, "0"),
            (0.0123, "0.0123"),
            (1.5, "1.50"),
            (123.4, "123"),
            (1e-7, "1.00e-7"),
            (-42.0, "-42.0"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
