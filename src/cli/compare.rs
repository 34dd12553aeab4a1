//! `retune compare`: several methods on one task, one table.

mod table;

use super::args::{LoopArgs, ModelArgs, RecordArgs, check_warm_up};
use super::memory_limit::refuse_large_run;
use super::note;
use super::output::{print_line, say};
use super::placement::settled as settled_placement;
use super::pretrain::is_pretraining;
use super::progress::{Progress, Show};
use super::train::with_resume;
use super::{interrupt, run_file, run_lock, taken};
use crate::adapter_folder::IDENTITY_FILE;
use crate::adapters::METHODS;
use crate::adapters::hooks::MethodEntry;
use crate::adapters::storage::{AdapterWeights, CONFIG_FILE, WEIGHTS_FILE, write_bytes};
use crate::atomic::{check_writable, remove_half_written, sync_folder};
use crate::compare::{
    ComparisonEvent, Contender, Row, Task, compare as compare_methods, forget_failed,
};
use crate::data::{Dataset, Order};
use crate::model::{Model, ModelConfig, Placement};
use crate::ops::Quantization;
use crate::plan::{check_sites, memory};
use crate::report::loss_plot::{Curve, comparison_svg};
use crate::report::metrics::METRICS_FILE;
use crate::train::run_folder::{has_own_folder, make_folder, remove_own_file};
use crate::train::{Budget, Checkpoints, Control};
use crate::{Context, Error, ErrorKind, Result};
use candle_core::DType;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use table::{decimals, table};

/// The options, from the start on: what the folder of a comparison is known by.
const COMPARE_FILE: &str = "compare.toml";
/// The finished rows, until all are.
const ROWS_FILE: &str = "rows.json";
const RESULTS_FILE: &str = "results.json";
const CHART_FILE: &str = "comparison.svg";
/// What a comparison writes into its folder, and into that of each row beside the checkpoints.
const WRITTEN: [&str; 4] = [COMPARE_FILE, ROWS_FILE, RESULTS_FILE, CHART_FILE];
const WRITTEN_BY_A_ROW: [&str; 4] = [CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, IDENTITY_FILE];
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

/// Whether nothing is left to do: the rows go when the results have been written.
fn is_finished(out: &Path) -> bool {
    out.join(RESULTS_FILE).exists() && !out.join(ROWS_FILE).exists()
}

/// What was typed must make sense, and no earlier work may be lost by it, before anything is touched.
fn check_folder(arguments: &CompareArgs, start: Start) -> Result<()> {
    let out = &arguments.out;
    let folders = row_folders(arguments)?;
    match start {
        Start::Unfinished | Start::WithoutFailed if is_finished(out) => {
            return Err(
                Error::new("the comparison is finished: there is nothing to resume")
                    .at(out.display())
                    .hint("replace it by `retune compare --overwrite`"),
            );
        }
        Start::Unfinished | Start::WithoutFailed => {}
        Start::Fresh => {
            taken::refuse_works(out, &OTHER_WORKS)?;
            refuse_obstacles(arguments)?;
            if !arguments.overwrite {
                refuse_taken(out, &folders)?;
            }
        }
    }
    check_writable(out)
}

/// Works of other commands, of which some files have the names of a comparison's.
const OTHER_WORKS: [taken::Work; 2] = [
    ("a run of `retune train`", run_file::is_run),
    ("a run of `retune pretrain`", is_pretraining),
];

/// Fails by whatever stands where the comparison writes or removes, and is not what a comparison has put there.
fn refuse_obstacles(arguments: &CompareArgs) -> Result<()> {
    taken::refuse_obstacles(&arguments.out, &WRITTEN)?;
    for row in existing_rows(arguments)? {
        taken::refuse_works(&row, &OTHER_WORKS)?;
        taken::refuse_obstacles(&row, &WRITTEN_BY_A_ROW)?;
        Checkpoints::of_run(&row).newest_folder()?;
    }
    Ok(())
}

/// The folders that are there of the rows asked for, and of those of an earlier comparison.
fn existing_rows(arguments: &CompareArgs) -> Result<Vec<PathBuf>> {
    let out = &arguments.out;
    let mut rows = row_folders(arguments)?;
    if is_comparison(out) {
        let earlier = recorded(out)
            .and_then(|earlier| row_folders(&parsed(&earlier)?))
            .map_err(|error| error.hint("name another folder with `--out`, or remove this one"))?;
        rows.extend(earlier);
    }
    let mut existing = Vec::new();
    for row in rows {
        if has_own_folder(&row)? {
            existing.push(row);
        }
    }
    Ok(existing)
}

fn refuse_taken(out: &Path, row_folders: &BTreeSet<PathBuf>) -> Result<()> {
    const OTHERWISE: &str = "replace it with `--overwrite`, or name another folder with `--out`";
    if is_finished(out) {
        return Err(Error::new("the folder already holds a comparison")
            .at(out.display())
            .hint(OTHERWISE));
    }
    if is_comparison(out) {
        return Err(
            Error::new("the folder already holds an unfinished comparison")
                .at(out.display())
                .hint(format!(
                    "go on with it by `retune resume {}`, {OTHERWISE}",
                    out.display()
                )),
        );
    }
    let files = taken::files(out, &WRITTEN);
    if !files.is_empty() {
        return Err(taken::error(out, &files).hint(OTHERWISE));
    }
    match row_folders.iter().find(|folder| folder.exists()) {
        Some(folder) => Err(Error::new("a row of the table would be written here")
            .at(folder.display())
            .hint(OTHERWISE)),
        None => Ok(()),
    }
}

/// Clears away what an earlier comparison left, and nothing else, and writes down what is asked of this one: only now
/// that all of it is known to be possible.
fn prepare_folder(
    matches: &ArgMatches,
    arguments: &CompareArgs,
    contenders: &[Contender],
    placement: &Placement,
) -> Result<()> {
    let out = &arguments.out;
    let rows = existing_rows(arguments)?;
    // A run of `retune train` may be at work in one of them.
    let _locks = run_lock::hold_all(rows.iter().map(PathBuf::as_path))?;
    check_folder(arguments, Start::Fresh)?;
    // First of all, and on the disk: as long as a row is in these, its folder is taken to be whole.
    for left in [ROWS_FILE, RESULTS_FILE, CHART_FILE] {
        remove_own_file(&out.join(left))?;
    }
    sync_folder(out)?;
    for row in rows {
        Checkpoints::of_run(&row).remove()?;
        for left in WRITTEN_BY_A_ROW {
            remove_own_file(&row.join(left))?;
        }
        // Stays if something else is in it.
        let _ = std::fs::remove_dir(row);
    }
    run_file::write_options(
        &out.join(COMPARE_FILE),
        "What was compared; `retune resume` goes on by it where the comparison stopped",
        &command(),
        matches,
        &settled(arguments, contenders, placement),
    )
}

/// Keeps other runs out of the folders of all rows, for as long as the locks live.
fn lock_rows(contenders: &[Contender]) -> Result<Vec<run_lock::RunLock>> {
    for contender in contenders {
        make_folder(&contender.out)?;
    }
    run_lock::hold_all(contenders.iter().map(|contender| contender.out.as_path()))
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
            } => {
                let after = resumed.map_or(String::new(), |step| format!(" after step {step}"));
                super::warn_of_damage(damaged, resumed.unwrap_or(0));
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

/// The results are written; that a row came to nothing must not look like success.
fn refuse_failed(failed: &[&Row], rows_file: &Path, out: &Path) -> Result<()> {
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

impl CompareArgs {
    fn base_name(&self) -> &str {
        self.base_name.as_deref().unwrap_or(&self.base.model)
    }
}

/// What was compared, as far as the command line says.
fn request(arguments: &CompareArgs, contenders: &[Contender]) -> Value {
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
        "eval_fraction": held_out_share(arguments),
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

/// How much of the training data is held out, unless other data was named.
fn held_out_share(arguments: &CompareArgs) -> Option<f64> {
    arguments
        .eval_data
        .is_empty()
        .then(|| arguments.eval_fraction.unwrap_or(DEFAULT_EVAL_FRACTION))
}

fn file_names(files: &[PathBuf]) -> String {
    let names: Vec<_> = files
        .iter()
        .filter_map(|file| file.file_name()?.to_str())
        .collect();
    names.join(", ")
}

/// Refuses a method that a GPU has no room to train, before the first is trained. What a machine has free is a guess.
fn refuse_too_large(
    contenders: &[Contender],
    config: &ModelConfig,
    placement: &Placement,
    data: &Dataset,
    held_out: &Dataset,
) -> Result<()> {
    if placement.device.is_cpu() {
        return Ok(());
    }
    let held_out_tokens = super::plan::tokens(held_out);
    for Contender {
        label,
        method,
        options,
        ..
    } in contenders
    {
        let mut order = Order::shuffled(data.len(), options.seed);
        let load = super::plan::load(data, &mut order, options, held_out_tokens);
        let dtype = config.dtype.unwrap_or(DType::F32);
        let memory = memory(placement, config, dtype, method.as_ref(), options, &load)?;
        refuse_large_run(label, placement, memory.peak())?;
    }
    Ok(())
}

fn contenders(arguments: &CompareArgs, examples: usize) -> Result<Vec<Contender>> {
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
fn refuse_impossible(
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
fn most_prompt_rows(contenders: &[Contender], config: &ModelConfig) -> Result<usize> {
    let (shape, weights) = (config.shape(), AdapterWeights::planned());
    let mut most = 0;
    for contender in contenders {
        let saved = contender.method.peft_config(&shape, &weights)?;
        let rows = saved.get("num_virtual_tokens").and_then(Value::as_u64);
        most = most.max(rows.unwrap_or(0) as usize);
    }
    Ok(most)
}

fn all_methods() -> Vec<&'static str> {
    METHODS.iter().map(|entry| entry.name).collect()
}

/// Where the adapters of all rows lie.
fn row_folders(arguments: &CompareArgs) -> Result<BTreeSet<PathBuf>> {
    let contenders = contenders(arguments, 1)?.into_iter();
    Ok(contenders.map(|contender| contender.out).collect())
}

fn seeds(arguments: &CompareArgs) -> Vec<u64> {
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

fn curve(row: &Row) -> Curve {
    Curve {
        name: row.method.clone(),
        points: row
            .curve
            .iter()
            .map(|(step, loss)| (*step as u64, *loss))
            .collect(),
    }
}
