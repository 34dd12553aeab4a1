//! `retune score`: the log-probability of every token, as JSON lines.

use super::args::{AdapterArgs, ModelArgs, RecordArgs};
use super::output;
use super::progress::{Progress, Show};
use crate::data::{Example, passes};
use crate::evaluate::no_number;
use crate::task::causal_lm::score as score_batch;
use crate::{Context, Control, Result};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

/// What `retune score` can be told.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints one JSON line for each record: `tokens` (ids), `logprobs` (natural logarithms; the first token has none: null) \
and `target` (whether the loss would count the token).

Example:
  retune score --model ./base --adapter my-adapter --data eval.jsonl > scores.jsonl")]
pub(super) struct ScoreArgs {
    #[command(flatten)]
    base: ModelArgs,

    #[command(flatten)]
    adapter: AdapterArgs,

    /// Data to score: JSON lines or a JSON array, plain or .gz
    #[arg(long, required = true, num_args = 1.., value_name = "FILE", help_heading = "Data")]
    data: Vec<PathBuf>,

    #[command(flatten)]
    records: RecordArgs,

    /// Most tokens in memory at once
    #[arg(long, default_value_t = 8192, value_name = "N", value_parser = super::args::at_least_one)]
    tokens_per_pass: usize,

    /// Say nothing but the scores and errors
    #[arg(long)]
    quiet: bool,
}

/// Runs `retune score`.
pub(super) fn score(arguments: &ScoreArgs) -> Result<()> {
    let show = Show::on_stderr(arguments.quiet);
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
    // Every token is scored, whatever the loss would count.
    let scored: Vec<Example> = data
        .examples
        .iter()
        .map(|example| Example::new(example.tokens.clone(), vec![true; example.tokens.len()]))
        .collect();
    let bar = Progress::items(show, "scoring", data.len() as u64);
    let mut examples = data.examples.iter().enumerate();
    for pass in passes(
        &scored.iter().collect::<Vec<_>>(),
        arguments.tokens_per_pass,
    ) {
        let mut scores = score_batch(model.decoder.as_ref(), &pass)?.into_iter();
        for (index, example) in examples.by_ref().take(pass.segments.len() - 1) {
            let logprobs: Vec<Option<f32>> = std::iter::once(None)
                .chain(
                    scores
                        .by_ref()
                        .take(example.tokens.len() - 1)
                        .map(|score| Some(score.log_probability)),
                )
                .collect();
            refuse_no_numbers(&logprobs, index).at(&arguments.base.model)?;
            let line =
                json!({"tokens": example.tokens, "logprobs": logprobs, "target": example.learn});
            if output::write(&format!("{line}\n"))? == Control::Stop {
                return Ok(());
            }
        }
        bar.advance(pass.segments.len() as u64 - 1);
    }
    bar.finish();
    Ok(())
}

/// JSON has no NaN and would say `null`, which is what a token without a score has. `index` counts from 0.
fn refuse_no_numbers(logprobs: &[Option<f32>], index: usize) -> Result<()> {
    let broken = logprobs
        .iter()
        .enumerate()
        .find_map(|(token, score)| Some((token, score.filter(|score| !score.is_finite())?)));
    match broken {
        None => Ok(()),
        Some((token, score)) => {
            let (token, record) = (token + 1, index + 1);
            let what = format!("the log-probability of token {token} of record {record}");
            Err(no_number(what, score))
        }
    }
}
