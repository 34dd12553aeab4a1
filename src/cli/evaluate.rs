//! `retune evaluate`: loss, perplexity, accuracy, exact match.

use super::args::{AdapterArgs, ModelArgs, RecordArgs};
use super::output::print_line;
use super::progress::{Progress, Show};
use crate::evaluate::evaluate as evaluate_model;
use crate::ops::Quantization;
use crate::{Context, Result};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

/// What `retune evaluate` can be told.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  retune evaluate --model ./base --adapter my-adapter --data eval.jsonl --exact-match 100"
)]
pub(super) struct EvaluateArgs {
    #[command(flatten)]
    base: ModelArgs,

    #[command(flatten)]
    adapter: AdapterArgs,

    /// Data to score: JSON lines or a JSON array, plain or .gz
    #[arg(long, required = true, num_args = 1.., value_name = "FILE", help_heading = "Data")]
    data: Vec<PathBuf>,

    #[command(flatten)]
    records: RecordArgs,

    /// Let the model answer the first N records, and count the answers that equal the data's
    #[arg(long, default_value_t = 0, value_name = "N")]
    exact_match: usize,

    /// Most tokens in memory at once
    #[arg(long, default_value_t = 8192, value_name = "N", value_parser = super::args::at_least_one)]
    tokens_per_pass: usize,

    /// Print the result as JSON
    #[arg(long)]
    json: bool,

    /// Say nothing but the result and errors
    #[arg(long)]
    quiet: bool,
}

/// Runs `retune evaluate`.
pub(super) fn evaluate(arguments: &EvaluateArgs) -> Result<()> {
    let show = Show::on_stderr(arguments.json || arguments.quiet);
    let folder = arguments.base.folder(show)?;
    let tokenizer = arguments.base.tokenizer(&folder)?;
    let placement = arguments.base.placement(&folder, show)?;
    let model = arguments
        .adapter
        .load_onto(&folder, &tokenizer, &placement)?;
    let data = arguments.records.load(
        &arguments.data,
        &tokenizer,
        model.config.max_positions,
        show,
    )?;
    super::warn_of_length(show, &model.config, data.longest(), model.prompt_rows());
    let bar = Progress::items(show, "scoring", data.len() as u64);
    let result = evaluate_model(
        model.decoder.as_ref(),
        &data,
        arguments.tokens_per_pass,
        &mut |done| bar.advance(done as u64),
    )?;
    bar.finish();
    let result = result.finite().at(&arguments.base.model)?;
    let exact = match arguments.exact_match {
        0 => None,
        count => Some(super::exact_match(
            &model, &tokenizer, &folder, &data, count, show,
        )?),
    };
    if arguments.json {
        let mut line = json!(result);
        line["quantization"] = json!(placement.quantization.map(Quantization::name));
        if let Some(exact) = exact {
            line["exact_match"] = json!(exact.share());
            line["exact_match_examples"] = json!(exact.of);
        }
        print_line!("{line}")?;
        return Ok(());
    }
    print_line!("loss            {:.4} nats a token", result.loss)?;
    print_line!("perplexity      {:.3}", result.perplexity)?;
    print_line!("token accuracy  {:.2} %", 100.0 * result.accuracy)?;
    if let Some(exact) = exact {
        print_line!(
            "exact match     {:.1} % ({} of {})",
            100.0 * exact.share(),
            exact.right,
            exact.of
        )?;
    }
    print_line!(
        "over {} target tokens of {} examples",
        result.tokens,
        result.examples
    )?;
    Ok(())
}
