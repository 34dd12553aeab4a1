//! `retune train <method>` and `retune resume`.

mod arguments;
mod beginning;
mod card;
mod failure;
mod finished;
mod metrics_log;
mod run_folder;

pub(super) use arguments::{ResumeArgs, TrainArgs, chosen, command, parsed};
pub(super) use failure::with_resume;

use super::args::check_warm_up;
use super::memory_limit::{MemoryLimit, fitted, with_room_beside_cache};
use super::note;
use super::output::say;
use super::progress::{Progress, Show, TrainingProgress};
use super::{interrupt, run_file, run_lock};
use crate::adapters::hooks::MethodEntry;
use crate::atomic::{check_writable, remove_half_written};
use crate::data::{Dataset, Tokenizer};
use crate::inspect::broken_weights;
use crate::model::checkpoint::Checkpoint;
use crate::model::{ModelConfig, Placement};
use crate::plan;
use crate::train::{
    CacheType, Checkpoints, Control, Event, Inputs, Outcome, TrainOptions, Trainer,
};
use crate::{Context, Error, Result};
use arguments::{method_command, own_options};
use beginning::Beginning;
use candle_core::DType;
use clap::ArgMatches;
use failure::explained;
use finished::Finished;
use metrics_log::{MetricsLog, remove_events};
use run_folder::{check_folder, clear_folder, refuse_finished, refuse_obstacles, write_run_file};
use std::path::Path;

/// Runs `retune train <method>`.
pub(super) fn train(matches: &ArgMatches) -> Result<()> {
    let (entry, matches) = chosen(matches)?;
    let arguments = parsed(matches)?;
    // What was typed must make sense before anything is touched.
    let method = (entry.from_args)(matches)?;
    arguments.options(method.default_learning_rate(), 1)?;
    arguments.check(entry, matches)?;
    run_file::check(&method_command(entry), matches)?;
    check_folder(&arguments)?;
    run(entry, matches, &arguments, Start::Fresh)
}

/// Runs `retune resume`.
pub(super) fn resume(arguments: &ResumeArgs) -> Result<()> {
    if super::compare::is_comparison(&arguments.run) {
        return super::compare::resume(&arguments.run, arguments.retry_failed);
    }
    if arguments.retry_failed {
        return Err(Error::usage("`--retry-failed` is for comparisons")
            .at(arguments.run.display())
            .hint("leave it out to go on with a run"));
    }
    if super::pretrain::is_pretraining(&arguments.run) {
        return Err(Error::new("the folder holds a run of `retune pretrain`")
            .at(arguments.run.display())
            .hint("go on with it by the same command as then, and `--resume`"));
    }
    let (method, mut options) = run_file::read(&arguments.run.join(run_file::RUN_FILE))
        .map_err(|error| error.hint("give the folder that the run's `--out` named"))?;
    refuse_finished(&arguments.run)?;
    refuse_obstacles(&arguments.run)?;
    options.insert(0, method.into());
    options.push(run_file::out(&arguments.run));
    let matches = command()
        .no_binary_name(true)
        .try_get_matches_from(options)
        .map_err(|error| {
            Error::new(format!("the run file does not fit this version: {error}"))
                .at(arguments.run.display())
        })?;
    let (entry, matches) = chosen(&matches)?;
    run(entry, matches, &parsed(matches)?, Start::Checkpoint)
}

#[derive(Clone, Copy, PartialEq)]
enum Start {
    Fresh,
    Checkpoint,
}

/// Trains from the start or from the newest checkpoint on, and writes down what came of it.
fn run(
    entry: &'static MethodEntry,
    matches: &ArgMatches,
    arguments: &TrainArgs,
    start: Start,
) -> Result<()> {
    interrupt::watch()?;
    let show = Show::on_stderr(arguments.quiet);
    let beginning = Beginning::of(entry, matches, arguments)?;
    let folder = arguments.base.folder(show)?;
    let tokenizer = arguments.base.tokenizer(&folder)?;
    let config = ModelConfig::read(&folder)?;
    let (data, held_out) = load_data(arguments, &tokenizer, config.max_positions, show)?;
    let placement = arguments.base.placement(&folder, show)?;

    let mut order = arguments.order(data.len())?;
    let options = arguments.options(
        beginning.method().default_learning_rate(),
        order.epoch_len(),
    )?;
    options.check_length(order.epoch_len())?;
    if start == Start::Fresh {
        check_warm_up(&options, order.epoch_len())?;
    }
    let dtype = config.dtype.unwrap_or(DType::F32);
    let held_out_tokens = held_out.as_ref().map_or(0, super::plan::tokens);
    let load = super::plan::load(&data, &mut order, &options, held_out_tokens);
    let smallest_pass = match start {
        Start::Fresh => data.longest(),
        // A run that goes on keeps its passes: with others its last bits would differ.
        Start::Checkpoint => options.tokens_per_pass,
    };
    let fit = |options: TrainOptions| {
        let limit = MemoryLimit::of(arguments.training.memory_limit, &placement);
        let method = beginning.method();
        let peak = |options: &TrainOptions| -> Result<u64> {
            Ok(plan::memory(&placement, &config, dtype, method, options, &load)?.peak())
        };
        let options = match start == Start::Fresh && shares_default_cache(&placement, &options) {
            true => with_room_beside_cache(options, limit, &peak)?,
            false => options,
        };
        fitted(options, smallest_pass, limit, &peak, show)
    };
    // A GPU must have room before anything is put there; what the machine has free is known best beside the mapped base.
    let on_gpu = placement.device.is_cuda();
    let cache_options = cache_options(&options);
    let options = if on_gpu { fit(options)? } else { options };
    // Before it is loaded: all threads read it, where loading reads one weight after the other.
    let weights = Checkpoint::open(&folder)?.digest();
    if !weights.finite {
        warn_of_broken_weights(&folder)?;
    }
    let model = beginning.load(arguments, &placement, &folder, &tokenizer)?;
    let options = if on_gpu { options } else { fit(options)? };
    let held_out_longest = held_out.as_ref().map_or(0, Dataset::longest);
    let longest = data.longest().max(held_out_longest);
    super::warn_of_length(show, &config, longest, model.prompt_rows());
    let method = beginning.method();
    if start == Start::Fresh {
        let keeps = options.budget.steps(order.epoch_len(), options.batch_size)
            * options.batch_size
            > data.len();
        let useless = match super::plan::leaves_blocks_alone(&config, method)? {
            false => Some("nothing lies below what is trained"),
            true if !keeps => Some("no example comes twice"),
            true => None,
        };
        for (option, reason) in cache_options.iter().zip(useless.into_iter().cycle()) {
            note(
                show,
                &format!("note: `{option}` has no effect: {reason}, so no hidden states are kept"),
            );
        }
    }
    let inputs = Inputs {
        start: beginning.digest()?,
        ..Inputs::of(
            &model,
            &weights.sha256,
            method,
            &options,
            &data,
            held_out.as_ref(),
            &order,
        )?
    };
    let checkpoints = Checkpoints::of_run(&arguments.out).on(inputs);
    let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?;
    std::fs::create_dir_all(&arguments.out).at(arguments.out.display())?;
    let _lock = run_lock::hold(&arguments.out)?;
    remove_half_written(&arguments.out)?;
    let resumed = match start {
        Start::Checkpoint => {
            check_writable(&arguments.out)?;
            go_back(&mut trainer, &checkpoints, &arguments.out, show)?
        }
        Start::Fresh => {
            check_folder(arguments)?;
            None
        }
    };
    super::warn_of_departures(trainer.damaged(), trainer.moved(), trainer.state().step);
    note(
        show,
        &format!(
            "training {} weights of {} with {}, {} steps at learning rate {}",
            model.weights.parameter_count(),
            arguments.base.model,
            entry.name,
            trainer.total_steps(&order),
            options.learning_rate
        ),
    );

    if start == Start::Fresh {
        clear_folder(&arguments.out)?;
        checkpoints.begin()?;
        write_run_file(entry, matches, arguments, &options, &placement)?;
    }
    let mut log = MetricsLog::open(arguments, resumed)?;
    let bar = Progress::training(
        show,
        trainer.total_steps(&order) as u64,
        arguments.log_every as u64,
    );
    let outcome = trainer
        .run(
            &data,
            &mut order,
            held_out.as_ref(),
            Some(&checkpoints),
            &mut |event| follow(event, &mut log, &bar),
        )
        .map_err(|error| explained(error, &folder, &checkpoints, &arguments.out))?;
    let step = trainer.state().step;
    bar.finish(&format!("trained to step {step}"));
    if outcome == Outcome::Interrupted {
        return Err(
            Error::interrupted(format!("stopped after step {step}; everything is saved")).hint(
                format!("go on with `retune resume {}`", arguments.out.display()),
            ),
        );
    }
    let finished = Finished {
        entry,
        arguments,
        folder: &folder,
        model: &model,
        method,
        options: &options,
        state: trainer.state(),
        data: &data,
        held_out: held_out.as_ref(),
        outcome,
        own_options: own_options(entry, matches, arguments),
    };
    let written = finished.write().map_err(|error| {
        // The work of the run must not be lost with the folder.
        match trainer.save_now(&checkpoints) {
            Ok(()) => error.hint(format!(
                "what was trained is in a checkpoint: when that is put right, `retune resume {}` writes the adapter",
                arguments.out.display()
            )),
            Err(_) => error,
        }
    })?;
    if arguments.save_every == 0 {
        checkpoints.remove()?;
    }
    finished.print(&written)
}

/// Whether hidden states are kept in a GPU's memory, and in as much of it as nobody has asked for.
fn shares_default_cache(placement: &Placement, options: &TrainOptions) -> bool {
    let default = TrainOptions::default().activation_cache_bytes;
    placement.device.is_cuda() && options.activation_cache_bytes == default
}

/// The options typed for hidden states that are kept from epoch to epoch.
fn cache_options(options: &TrainOptions) -> Vec<&'static str> {
    let default = TrainOptions::default().activation_cache_bytes;
    let asked = [
        (
            "--activation-cache-type",
            options.activation_cache_type != CacheType::F32,
        ),
        (
            "--activation-cache",
            ![0, default].contains(&options.activation_cache_bytes),
        ),
    ];
    let asked = asked.into_iter().filter(|(_, asked)| *asked);
    asked.map(|(option, _)| option).collect()
}

/// Names the weights of the base that hold a NaN or an infinite value, also where no step may meet them.
fn warn_of_broken_weights(folder: &Path) -> Result<()> {
    for line in broken_weights(folder)? {
        let line = super::printable(&line);
        say!(
            "warning: the base is damaged: {line}; a step that meets them fails, and so does `merge`"
        );
    }
    Ok(())
}

/// What is learned from, and what is only scored.
fn load_data(
    arguments: &TrainArgs,
    tokenizer: &Tokenizer,
    longest: usize,
    show: Show,
) -> Result<(Dataset, Option<Dataset>)> {
    let data = arguments
        .records
        .load(&arguments.data, tokenizer, longest, show)?;
    if let Some(share) = arguments.eval_fraction {
        let (data, held_out) = data.split(share, arguments.training.seed)?;
        return Ok((data, Some(held_out)));
    }
    if arguments.eval_data.is_empty() {
        return Ok((data, None));
    }
    let held_out = arguments
        .records
        .load(&arguments.eval_data, tokenizer, longest, show)?;
    Ok((data, Some(held_out)))
}

/// Goes back to the newest checkpoint of the run in `out`, if there is one; returns the step reached.
fn go_back(
    trainer: &mut Trainer,
    checkpoints: &Checkpoints,
    out: &Path,
    show: Show,
) -> Result<Option<usize>> {
    // Another process may have come and gone since this was asked first.
    refuse_finished(out)?;
    if checkpoints.newest_folder()?.is_some() {
        return trainer.resume(checkpoints).map(Some);
    }
    checkpoints.refuse_other_beginning()?;
    note(show, "no checkpoint was saved: the run starts again");
    remove_events(out)?;
    Ok(None)
}

/// Writes down and shows what the run tells, and lets it go on unless the user asked to stop.
fn follow(event: Event, log: &mut MetricsLog, bar: &TrainingProgress) -> Result<Control> {
    match event {
        Event::Step(report) => {
            log.step(report)?;
            bar.step(report);
        }
        Event::Evaluated(report) => {
            log.eval(report)?;
            bar.eval(report);
        }
        Event::Skipped(skipped) => {
            log.step(&skipped.report)?;
            bar.message(&format!("warning: {skipped}; it was left out"));
        }
        Event::Spiked(spiked) => bar.message(&format!("warning: {spiked}")),
        Event::Saving(_) => log.sync()?,
        Event::Saved(state) => bar.message(&format!("checkpoint after step {}", state.step)),
    }
    Ok(if interrupt::asked() {
        Control::Stop
    } else {
        Control::Continue
    })
}
