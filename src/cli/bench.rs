//! `retune bench <method>`: what a training step costs on this machine.

use super::output::print_line;
use super::placement::PlacementArgs;
use super::progress::{Progress, Show};
use super::table::{Column, Table};
use crate::adapters::METHODS;
use crate::adapters::hooks::MethodEntry;
use crate::adapters::storage::read_text;
use crate::bench::{BenchOptions, BenchReport, bench as measure};
use crate::model::{ModelConfig, named_shape, named_shapes};
use crate::ops::Quantization;
use crate::report::format;
use crate::train::Recompute;
use crate::{Context, Error, Result};
use candle_core::DType;
use clap::{ArgMatches, Args, Command, FromArgMatches, ValueEnum};
use serde_json::json;
use std::path::Path;

/// What every method's `bench` command takes beside the method's own options.
#[derive(Debug, Args)]
struct BenchArgs {
    /// Shape of the base, whose weights are random: a name, or the path of a config.json
    #[arg(long, default_value = "smol135m", value_name = "NAME|FILE")]
    shape: String,

    /// Examples per step
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,

    /// Tokens of an example
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    length: u32,

    /// Type that the base is stored in
    #[arg(long, value_enum, default_value = "f32", value_name = "TYPE")]
    dtype: StoredType,

    /// Compute each block again in the backward pass
    #[arg(long)]
    recompute: bool,

    /// Measure an epoch after the first: what lies below the lowest trained block is kept from it
    #[arg(long)]
    later_epoch: bool,

    /// Steps that are counted
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,

    /// Steps before them that are not
    #[arg(long, default_value_t = 1, value_name = "N")]
    warm_up: u32,

    #[command(flatten)]
    placement: PlacementArgs,

    /// Threads to compute on [default: all cores]
    #[arg(long, value_name = "N", value_parser = super::args::thread_count)]
    threads: Option<usize>,

    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum StoredType {
    F32,
    F16,
    Bf16,
}

/// `retune bench` with one subcommand for each row of `METHODS`.
pub(super) fn command() -> Command {
    let shapes: Vec<String> = named_shapes()
        .map(|(name, about)| format!("  {name:<12}{about}"))
        .collect();
    Command::new("bench")
        .about("Measure what a training step of a method costs on this machine")
        .after_help(format!(
            "Shapes:\n{}\n\nExample:\n  retune bench lora --shape smol135m --batch 4 --length 256",
            shapes.join("\n")
        ))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands(METHODS.iter().map(method_command))
}

fn method_command(entry: &MethodEntry) -> Command {
    (entry.command)(BenchArgs::augment_args(Command::new(entry.name)))
        .about(entry.about)
        .long_about(entry.about)
        .allow_negative_numbers(true)
}

/// Runs `retune bench <method>`.
pub(super) fn bench(matches: &ArgMatches) -> Result<()> {
    let (entry, matches) = super::train::chosen(matches)?;
    let arguments =
        BenchArgs::from_arg_matches(matches).map_err(|error| Error::usage(error.to_string()))?;
    let method = (entry.from_args)(matches)?;
    super::args::set_threads(arguments.threads)?;
    arguments.placement.check()?;
    let config = shape(&arguments.shape)?;
    if arguments.later_epoch && !super::plan::leaves_blocks_alone(&config, method.as_ref())? {
        return Err(Error::usage(format!(
            "`--later-epoch` has no effect: nothing lies below what `{}` trains, so all epochs cost the same",
            entry.name
        ))
        .hint("leave it out, or train later blocks alone"));
    }
    let options = BenchOptions {
        dtype: match arguments.dtype {
            StoredType::F32 => DType::F32,
            StoredType::F16 => DType::F16,
            StoredType::Bf16 => DType::BF16,
        },
        batch: arguments.batch as usize,
        length: arguments.length as usize,
        recompute: if arguments.recompute {
            Recompute::Blocks
        } else {
            Recompute::Never
        },
        later_epoch: arguments.later_epoch,
        steps: arguments.steps as usize,
        warm_up: arguments.warm_up as usize,
    };
    let total = options.steps + options.warm_up;
    let show = Show::on_stderr(arguments.json);
    let placement = arguments.placement.open(options.dtype, show)?;
    let bar = Progress::items(show, "measuring", total as u64);
    let report = measure(&placement, &config, method.as_ref(), &options, &mut |_| {
        bar.advance(1);
    })?;
    bar.finish();
    if arguments.json {
        let mut line = json!(report);
        line["shape"] = json!(arguments.shape);
        line["method"] = json!(entry.name);
        line["dtype"] = json!(options.dtype.as_str());
        line["batch"] = json!(options.batch);
        line["length"] = json!(options.length);
        line["recompute"] = json!(arguments.recompute);
        line["later_epoch"] = json!(arguments.later_epoch);
        line["threads"] = json!(rayon::current_num_threads());
        line["device"] = json!(placement.device_name());
        line["compute_type"] = json!(placement.compute.name());
        line["quantization"] = json!(placement.quantization.map(Quantization::name));
        return print_line!("{line}");
    }
    facts(&report).print()?;
    print_line!("")?;
    times(&report).print()
}

fn shape(shape: &str) -> Result<ModelConfig> {
    let path = Path::new(shape);
    if path.is_dir() {
        return ModelConfig::read(path);
    }
    if path.is_file() {
        let text = read_text(path).at(path.display())?;
        return ModelConfig::parse(&text).at(path.display());
    }
    named_shape(shape)
}

fn facts(report: &BenchReport) -> Table {
    let gigaflops = |flops: f64| format!("{:.0} GFLOP/s", flops / 1e9);
    Table::facts([
        (
            "trained weights",
            format!(
                "{} of {}",
                format::whole(report.trained_parameters),
                format::whole(report.base_parameters)
            ),
        ),
        (
            "speed",
            format!(
                "{:.0} tokens/s ({:.0} to {:.0})",
                report.tokens_per_second,
                report.lowest_tokens_per_second,
                report.highest_tokens_per_second
            ),
        ),
        ("a step", format!("{:.3} s", report.step_seconds)),
        ("products alone", gigaflops(report.gemm_peak_flops)),
        (
            "share of that",
            format!(
                "{:.2} ({})",
                report.gemm_fraction,
                gigaflops(report.work.useful() / report.step_seconds)
            ),
        ),
        ("peak memory", format::bytes(report.peak_memory_bytes)),
        (
            "loss",
            format!("{:.4} -> {:.4}", report.losses.0, report.losses.1),
        ),
    ])
}

fn times(report: &BenchReport) -> Table {
    let mut table = Table::new(&[Column::Text("a step's time"), Column::Number("seconds")]);
    let mut parts: Vec<_> = report.by_op.iter().collect();
    parts.sort_by(|left, right| right.1.total_cmp(left.1));
    for (name, seconds) in parts {
        table.row([(*name).to_owned(), format!("{seconds:.3}")]);
    }
    table
}
