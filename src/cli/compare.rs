//! `retune compare`: several methods on one task, one table.

mod contenders;
mod folder;
mod results;
mod table;

use super::args::{LoopArgs, ModelArgs, RecordArgs, check_warm_up};
use super::note;
use super::output::{print_line, say};
use super::placement::settled as settled_placement;
use super::progress::{Progress, Show};
use super::train::with_resume;
use super::{interrupt, run_file, run_lock};
use crate::adapters::storage::write_bytes;
use crate::atomic::remove_half_written;
use crate::compare::{
    ComparisonEvent, Contender, Row, Task, compare as compare_methods, forget_failed,
};
use crate::data::Dataset;
use crate::model::{Model, ModelConfig, Placement};
use crate::ops::Quantization;
use crate::report::loss_plot::{Curve, comparison_svg};
use crate::train::{Budget, Control, Moved};
use crate::{Context, Error, ErrorKind, Result};
use clap::{ArgMatches, Args, Command, FromArgMatches};
use contenders::{all_methods, contenders, most_prompt_rows, refuse_impossible, refuse_too_large};
use folder::{check_folder, lock_rows, prepare_folder};
use results::{curve, file_names, refuse_failed, request};
use serde_json::json;
use std::path::{Path, PathBuf};
use table::{decimals, table};

/// The options, from the start on: what the folder of a comparison is known by.
const COMPARE_FILE: &str = "compare.toml";
/// The finished rows, until all are.
const ROWS_FILE: &str = "rows.json";
const RESULTS_FILE: &str = "results.json";
const CHART_FILE: &str = "comparison.svg";
const DEFAULT_EVAL_FRACTION: f64 = 0.1;

/// What `retune compare` can be told.
#[derive(Debug, Args)]
#[command(after_help = "\
Every method gets the same data, order, budget and seeds, and its own learning
rate. The first row is the base.

`retune resume DIR` goes on with a comparison that was interrupted, to the same
results: its options are in `compare.toml`, which stays, and the rows that were
finished in `rows.json`, which becomes `results.json`. A method whose loss is no
number any more fails alone; `retune resume DIR --retry-failed` tries it again.

Examples:
  retune compare --model ./base --data train.jsonl --out comparison
  retune compare --model ./base --data train.jsonl --eval-data eval.jsonl \\
      --unrelated other.jsonl --methods prompt --with \"lora --rank 4\" \\
      --with \"lora --rank 32 --learning-rate 1e-4\" --out comparison")]
pub(super) struct CompareArgs {
    #[command(flatten)]
    base: ModelArgs,

    /// Training data: JSON lines or a JSON array, plain or .gz
    #[arg(long, required = true, num_args = 1.., value_name = "FILE", help_heading = "Data")]
    data: Vec<PathBuf>,

    #[command(flatten)]
    records: RecordArgs,

    /// Held-out data that every method is scored on
    #[arg(long, num_args = 1.., value_name = "FILE", conflicts_with = "eval_fraction", help_heading = "Data")]
    eval_data: Vec<PathBuf>,

    /// Hold out this share of the training data instead, chosen by the seed [default: 0.1]
    #[arg(long, value_name = "SHARE", help_heading = "Data")]
    eval_fraction: Option<f64>,

    /// Text of another kind: how much its loss rises is how much a method forgets
    #[arg(long, num_args = 1.., value_name = "FILE", help_heading = "Data")]
    unrelated: Vec<PathBuf>,

    /// Methods to compare, with their default options [default: all, unless `--with` is given]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    methods: Vec<String>,

    /// One more method, with options: "lora --rank 32 --learning-rate 1e-4"; can be repeated
    #[arg(long = "with", value_name = "METHOD OPTIONS")]
    with: Vec<String>,

    /// Train every method once for each of these seeds [default: the one of `--seed`]
    #[arg(long, value_delimiter = ',', value_name = "N")]
    seeds: Vec<u64>,

    /// Let each model answer the first N held-out records, and count the answers that equal the data's
    #[arg(long, default_value_t = 0, value_name = "N")]
    exact_match: usize,

    /// What results and adapters call the base, such as the hub id of a folder [default: `--model` as typed]
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,

    /// Folder for `results.json`, `comparison.svg` and an adapter for each row
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Steps between checkpoints of the row in training, to resume from; 0 saves only where it is interrupted or a step fails
    #[arg(long, default_value_t = 0, value_name = "N")]
    save_every: usize,

    /// Number of checkpoints to keep while a row is trained
    #[arg(long, default_value_t = 2, value_name = "N")]
    keep: usize,

    /// Replace what an earlier comparison, finished or not, left in the folder
    #[arg(long)]
    overwrite: bool,

    #[command(flatten)]
    training: LoopArgs,

    /// Say nothing but errors and the result
    #[arg(long)]
    quiet: bool,

    /// Print the results as JSON instead of the table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Start {
    Fresh,
    Unfinished,
    /// The rows that failed are trained again.
    WithoutFailed,
}

/// `retune compare`, with options that a file can hold as well.
pub(super) fn command() -> Command {
    const ABOUT: &str =
        "Compare methods on one task: same data, order, budget and seeds, one table";
    CompareArgs::augment_args(Command::new("compare"))
        .about(ABOUT)
        .long_about(ABOUT)
        .display_order(3)
        .args_override_self(true)
}

/// Runs `retune compare`.
pub(super) fn compare(matches: &ArgMatches) -> Result<()> {
    run(matches, &parsed(matches)?, Start::Fresh)
}

/// Whether a comparison was started in the folder.
pub(super) fn is_comparison(folder: &Path) -> bool {
    folder.join(COMPARE_FILE).exists()
}

/// Runs `retune resume` on the folder of a comparison, whose failed rows stay as they are unless they are to be tried
/// again.
pub(super) fn resume(folder: &Path, retry_failed: bool) -> Result<()> {
    let matches = recorded(folder)?;
    let start = match retry_failed {
        true => Start::WithoutFailed,
        false => Start::Unfinished,
    };
    run(&matches, &parsed(&matches)?, start)
}

/// What the options mean, with paths in full as in [`COMPARE_FILE`]: results and adapters say the same when the
/// comparison is resumed, and from elsewhere.
fn parsed(matches: &ArgMatches) -> Result<CompareArgs> {
    let mut arguments =
        CompareArgs::from_arg_matches(matches).map_err(|error| Error::usage(error.to_string()))?;
    if arguments.base_name.is_none() {
        arguments.base_name = Some(arguments.base.model.clone());
    }
    let CompareArgs {
        data,
        eval_data,
        unrelated,
        ..
    } = &mut arguments;
    for file in data.iter_mut().chain(eval_data).chain(unrelated) {
        *file = std::path::absolute(&*file).at(file.display())?;
    }
    let base = Path::new(&arguments.base.model);
    if base.is_dir() {
        let base = std::path::absolute(base).at(base.display())?;
        arguments.base.model = base.to_string_lossy().into_owned();
    }
    Ok(arguments)
}

/// The options of the comparison in `folder`, wherever it was when they were written.
fn recorded(folder: &Path) -> Result<ArgMatches> {
    let file = folder.join(COMPARE_FILE);
    let mut options = run_file::read_options(&file)?;
    options.push(run_file::out(folder));
    command()
        .no_binary_name(true)
        .try_get_matches_from(options)
        .map_err(|error| {
            Error::new(format!(
                "its options do not fit this version of retune: {error}"
            ))
            .at(file.display())
        })
}

/// What was left open on the command line, so that it means the same to later versions.
fn settled(
    arguments: &CompareArgs,
    contenders: &[Contender],
    placement: &Placement,
) -> Vec<(&'static str, toml::Value)> {
    let mut settled = settled_placement(placement).to_vec();
    settled.extend(arguments.base.settled_date());
    // The file has the folder in full, results and adapters what was typed.
    let base_name = toml::Value::String(arguments.base_name().to_owned());
    settled.push(("base-name", base_name));
    if arguments.methods.is_empty() && arguments.with.is_empty() {
        settled.push(("methods", toml::Value::String(all_methods().join(","))));
    }
    if let Some(share) = held_out_share(arguments) {
        settled.push(("eval-fraction", toml::Value::Float(share)));
    }
    if let Some(Contender { options, .. }) = contenders.first() {
        settled.push(match options.budget {
            Budget::Steps(steps) => ("steps", run_file::count(steps)),
            Budget::Epochs(epochs) => ("epochs", toml::Value::Float(epochs)),
        });
        settled.push(("warmup-steps", run_file::count(options.warmup_steps)));
        settled.push(("eval-every", run_file::count(options.eval_every)));
    }
    settled
}

fn run(matches: &ArgMatches, arguments: &CompareArgs, start: Start) -> Result<()> {
    if arguments.training.memory_limit.is_some() {
        return Err(Error::usage("`compare` has no `--memory-limit`")
            .hint("ask for less by `--recompute` or `--tokens-per-pass`"));
    }
    run_file::check(&command(), matches)?;
    check_folder(arguments, start)?;
    interrupt::watch()?;
    let show = Show::on_stderr(arguments.quiet);
    let folder = arguments.base.folder(show)?;
    let tokenizer = arguments.base.tokenizer(&folder)?;
    let config = ModelConfig::read(&folder)?;
    let load = |files: &[PathBuf]| {
        let longest = config.max_positions;
        arguments.records.load(files, &tokenizer, longest, show)
    };
    let data = load(&arguments.data)?;
    let (data, held_out) = match held_out_share(arguments) {
        Some(share) => data.split(share, arguments.training.seed)?,
        None => (data, load(&arguments.eval_data)?),
    };
    let unrelated = if arguments.unrelated.is_empty() {
        None
    } else {
        Some(load(&arguments.unrelated)?)
    };
    let contenders = contenders(arguments, data.len())?;
    refuse_impossible(&contenders, &config, data.len())?;
    if start == Start::Fresh {
        for contender in &contenders {
            check_warm_up(&contender.options, data.len())?;
        }
    }
    let longest = [Some(&data), Some(&held_out), unrelated.as_ref()];
    let longest = longest.into_iter().flatten().map(Dataset::longest).max();
    let prompt_rows = most_prompt_rows(&contenders, &config)?;
    super::warn_of_length(show, &config, longest.unwrap_or(0), prompt_rows);
    let exact_match = |model: &Model| -> Result<f64> {
        Ok(super::exact_match(
            model,
            &tokenizer,
            &folder,
            &held_out,
            arguments.exact_match,
            show,
        )?
        .share())
    };
    let placement = arguments.base.placement(&folder, show)?;
    refuse_too_large(&contenders, &config, &placement, &data, &held_out)?;
    let task = Task {
        base: &folder,
        placement: &placement,
        base_name: arguments.base_name(),
        tokenizer: &tokenizer,
        data: &data,
        held_out: &held_out,
        unrelated: unrelated.as_ref(),
        exact_match: (arguments.exact_match > 0).then_some(&exact_match),
        answers: arguments.exact_match,
    };

    let out = &arguments.out;
    std::fs::create_dir_all(out).at(out.display())?;
    let _lock = run_lock::hold(out)?;
    // Another command may have come and gone since the folder was looked at first: it is looked at again.
    match start {
        Start::Fresh => prepare_folder(matches, arguments, &contenders, &placement)?,
        Start::Unfinished | Start::WithoutFailed => check_folder(arguments, start)?,
    }
    let _row_locks = lock_rows(&contenders)?;
    remove_half_written(out)?;
    for contender in &contenders {
        remove_half_written(&contender.out)?;
    }
    let rows_file = out.join(ROWS_FILE);
    if start == Start::WithoutFailed {
        forget_failed(&rows_file)?;
    }
    let mut bar = None;
    let rows = compare_methods(&task, &contenders, &rows_file, &mut |event| {
        match event {
            ComparisonEvent::Moved(Moved { from, to }) => {
                let moved = format!(
                    "rows were computed by {from}, and others will be by {to}: their times do not compare, nor do last digits"
                );
                say!("warning: {}", super::printable(&moved));
            }
            // Even a quiet one is told: it ends later than was to be expected.
            ComparisonEvent::Lost { label, reason } => {
                let lost = format!("the adapter of `{label}` is not what was written ({reason})");
                let lost = super::printable(&lost);
                say!("warning: {lost}; it is trained again");
            }
            ComparisonEvent::Started {
                label,
                steps,
                resumed,
                damaged,
                moved,
            } => {
                let after = resumed.map_or(String::new(), |step| format!(" after step {step}"));
                super::warn_of_departures(damaged, moved, resumed.unwrap_or(0));
                note(show, &format!("training {label}{after}"));
                bar = Some(Progress::training(
                    show,
                    steps as u64,
                    steps.div_ceil(10) as u64,
                ));
            }
            ComparisonEvent::Step(report) => bar.iter().for_each(|bar| bar.step(report)),
            ComparisonEvent::Skipped(skipped) => bar
                .iter()
                .for_each(|bar| bar.message(&format!("warning: {skipped}; it was left out"))),
            ComparisonEvent::Spiked(spiked) => bar
                .iter()
                .for_each(|bar| bar.message(&format!("warning: {spiked}"))),
            ComparisonEvent::Evaluated(report) => bar.iter().for_each(|bar| bar.eval(report)),
            ComparisonEvent::Finished(row) => {
                if let Some(bar) = bar.take() {
                    bar.finish(&match &row.failed {
                        Some(reason) => format!("{} failed: {reason}", row.method),
                        None => {
                            format!(
                                "{}: held-out loss {}",
                                row.method,
                                decimals(row.best_eval_loss)
                            )
                        }
                    });
                }
            }
        }
        Ok(if interrupt::asked() {
            Control::Stop
        } else {
            Control::Continue
        })
    })
    .map_err(|error| match error.kind() {
        ErrorKind::Interrupted => {
            error.hint(format!("go on with `retune resume {}`", out.display()))
        }
        _ => with_resume(error, out),
    })?;

    let mut results = request(arguments, &contenders);
    results["device"] = placement.device_name().into();
    results["compute_type"] = placement.compute.name().into();
    results["quantization"] = json!(placement.quantization.map(Quantization::name));
    results["examples"] = data.len().into();
    results["held_out_examples"] = held_out.len().into();
    results["rows"] = json!(rows);
    let (failed, trained): (Vec<&Row>, Vec<&Row>) =
        rows.iter().skip(1).partition(|row| row.failed.is_some());
    let curves: Vec<Curve> = trained.into_iter().map(curve).collect();
    let title = format!("Held-out loss on {}", file_names(&arguments.data));
    write_bytes(
        &out.join(CHART_FILE),
        comparison_svg(&title, &curves)?.as_bytes(),
    )
    .map_err(|error| with_resume(error, out))?;
    let results_file = out.join(RESULTS_FILE);
    let text = serde_json::to_vec_pretty(&results).context("cannot write the results")?;
    write_bytes(&results_file, &text).map_err(|error| with_resume(error, out))?;
    if failed.is_empty() {
        // Last: until then the comparison can be resumed, if only to write the rest.
        std::fs::remove_file(&rows_file).at(rows_file.display())?;
    }
    if arguments.json {
        print_line!("{results}")?;
    } else {
        table(&rows).print()?;
        print_line!("results: {}", results_file.display())?;
    }
    refuse_failed(&failed, &rows_file, out)
}

impl CompareArgs {
    fn base_name(&self) -> &str {
        self.base_name.as_deref().unwrap_or(&self.base.model)
    }
}

/// How much of the training data is held out, unless other data was named.
fn held_out_share(arguments: &CompareArgs) -> Option<f64> {
    arguments
        .eval_data
        .is_empty()
        .then(|| arguments.eval_fraction.unwrap_or(DEFAULT_EVAL_FRACTION))
}
