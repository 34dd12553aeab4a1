//! `retune plan train <method>`: parameters, memory and time before anything is loaded.

use super::output::print_line;
use super::progress::Show;
use super::table::Table;
use super::train::{self, TrainArgs};
use crate::adapters::hooks::AdapterMethod;
use crate::data::{Dataset, Order};
use crate::model::{ModelConfig, Placement};
use crate::plan::{Load, Plan, StepShape, plan as estimate, work_of_step};
use crate::report::format;
use crate::train::{Recompute, TrainOptions};
use crate::{Error, Result};
use candle_core::DType;
use clap::{ArgMatches, Command};

/// `retune plan train <method>`, with the options of `retune train`.
pub(super) fn command() -> Command {
    Command::new("plan")
        .about("Estimate memory and time of a run before its base is loaded")
        .after_help("Example:\n  retune plan train lora --model ./base --data train.jsonl --out my-adapter --rank 16")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(train::command())
}

/// Runs `retune plan train`.
pub(super) fn plan(matches: &ArgMatches) -> Result<()> {
    let matches = matches
        .subcommand_matches("train")
        .ok_or_else(|| Error::usage("what shall be planned? try `retune plan train --help`"))?;
    let (entry, matches) = train::chosen(matches)?;
    let arguments: TrainArgs = train::parsed(matches)?;
    let method = (entry.from_args)(matches)?;
    let folder = arguments.base.folder(Show::Nothing)?;
    let config = ModelConfig::read(&folder)?;
    let tokenizer = arguments.base.tokenizer(&folder)?;
    let data = arguments.records.load(
        &arguments.data,
        &tokenizer,
        config.max_positions,
        Show::Nothing,
    )?;
    let mut order = arguments.order(data.len())?;
    let options = arguments
        .training
        .options(method.default_learning_rate(), order.epoch_len())?;
    let held_out_tokens = match arguments.eval_fraction {
        Some(fraction) => (tokens(&data) as f64 * fraction) as usize,
        None if arguments.eval_data.is_empty() => 0,
        None => tokens(&arguments.records.load(
            &arguments.eval_data,
            &tokenizer,
            config.max_positions,
            Show::Nothing,
        )?),
    };
    let dtype = config.dtype.unwrap_or(DType::F32);
    let placement = arguments.base.placement(&folder, Show::Nothing)?;
    let result = estimate(
        &placement,
        &config,
        dtype,
        method.as_ref(),
        &options,
        &load(&data, &mut order, &options, held_out_tokens),
    )?;
    if arguments.json {
        let mut line = serde_json::json!(result);
        line["device"] = placement.device_name().into();
        line["compute_type"] = placement.compute.name().into();
        return print_line!("{line}");
    }
    table(&result, &placement).print()
}

pub(super) fn tokens(data: &Dataset) -> usize {
    let lengths = data.examples.iter().map(|example| example.tokens.len());
    lengths.sum()
}

/// What the steps of a run hold, in the order in which it visits its examples.
pub(super) fn load(
    data: &Dataset,
    order: &mut Order,
    options: &TrainOptions,
    held_out_tokens: usize,
) -> Load {
    let tokens = tokens(data);
    let targets: usize = data
        .examples
        .iter()
        .map(|example| example.target_tokens())
        .sum();
    Load {
        tokens_per_example: tokens as f64 / data.len() as f64,
        most_tokens_per_example: most_tokens(data, order, options) as f64
            / options.batch_size as f64,
        target_share: targets as f64 / tokens as f64,
        examples: data.len(),
        held_out_tokens,
    }
}

/// The tokens of the step that has most of them, among the first of a run that is longer than anybody would wait for.
fn most_tokens(data: &Dataset, order: &mut Order, options: &TrainOptions) -> usize {
    const MOST_VISITED: u64 = 1 << 22;
    let batch_size = options.batch_size as u64;
    let steps = options.budget.steps(order.epoch_len(), options.batch_size) as u64;
    let tokens_of = |step: u64| -> usize {
        let examples = order.examples(step * batch_size..(step + 1) * batch_size);
        let lengths = examples
            .iter()
            .map(|index| data.examples[*index].tokens.len());
        lengths.sum()
    };
    let steps = steps.min((MOST_VISITED / batch_size).max(1));
    (0..steps).map(tokens_of).max().unwrap_or(0)
}

/// Whether blocks lie below all that `method` trains on a base of shape `config`: in later epochs they need not run again.
pub(super) fn leaves_blocks_alone(
    config: &ModelConfig,
    method: &dyn AdapterMethod,
) -> Result<bool> {
    let work = |cached| {
        let step = StepShape {
            rows: 1.0,
            targets: 1.0,
            length: 1.0,
            recompute: Recompute::Never,
            cached,
        };
        work_of_step(config, method, &step)
    };
    Ok(work(true)? != work(false)?)
}

fn table(plan: &Plan, placement: &Placement) -> Table {
    let share = 100.0 * plan.trained_parameters as f64 / plan.base_parameters as f64;
    let trained = format!(
        "{} of {} ({share:.2} %)",
        format::whole(plan.trained_parameters),
        format::whole(plan.base_parameters)
    );
    let seconds = |seconds: Option<f64>| match seconds {
        Some(seconds) => format::duration(format::seconds(seconds)),
        None => "not measured: one block needs more memory than is free".to_owned(),
    };
    let (device, compute) = (placement.device_name(), placement.compute.name());
    Table::facts([
        ("device", format!("{device} in {compute}")),
        ("trained weights", trained),
        ("adapter", format::bytes(plan.adapter_bytes)),
        (
            "steps",
            format!("{} of {:.0} tokens", plan.steps, plan.tokens_per_step),
        ),
        ("peak memory", format::bytes(plan.peak_memory_bytes)),
        ("  program and data", format::bytes(plan.process_bytes)),
        ("  base", format::bytes(plan.base_bytes)),
        ("  weights in training", format::bytes(plan.training_bytes)),
        ("  activations", format::bytes(plan.activation_bytes)),
        (
            "with `--recompute`",
            format::bytes(plan.recomputing_peak_memory_bytes),
        ),
        ("a step", seconds(plan.step_seconds)),
        ("all steps", seconds(plan.seconds)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::last_layers::LastLayers;
    use crate::adapters::lora::Lora;
    use crate::adapters::prompt::Prompt;
    use crate::model::named_shape;

    #[test]
    fn only_what_trains_no_first_block_leaves_blocks_alone() -> Result<()> {
        let config = named_shape("stories15m")?;
        let methods: [(&dyn AdapterMethod, bool); 3] = [
            (&LastLayers::default(), true),
            (&Lora::default(), false),
            (&Prompt::default(), false),
        ];
        for (method, expected) in methods {
            let found = leaves_blocks_alone(&config, method)?;
            assert_eq!(found, expected, "{}", method.name());
        }
        Ok(())
    }
}
