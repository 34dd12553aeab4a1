//! `retune pretrain`: a base from scratch.

use super::args::check_warm_up;
use super::output::print_line;
use super::progress::{Progress, Show};
use super::{interrupt, note, run_lock, taken};
use crate::adapters::storage::{read_small, write_bytes};
use crate::atomic::{check_writable, remove_half_written};
use crate::pretrain::{
    PretrainOptions, Pretrained, Pretraining, RUN_FILE, Shape, Start, check_run_folder, moved,
};
use crate::report::format;
use crate::report::loss_plot::loss_svg;
use crate::report::memory;
use crate::report::metrics::{self, METRICS_FILE, MetricsFile};
use crate::report::model_card::Results;
use crate::train::{Budget, Checkpoints, Control, Event, Outcome, Schedule, TrainOptions};
use crate::{Context, Error, Result};
use clap::Args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// How the loss of a run went.
const CHART_FILE: &str = "loss.svg";
/// The records of a run, beside its checkpoints.
const WRITTEN: [&str; 3] = [RUN_FILE, METRICS_FILE, CHART_FILE];

const HELP: &str = "\
A shape file is TOML; its chat template lies in the file's own folder or below:

  model_type = \"qwen3\"           # llama, mistral, qwen2 or qwen3
  vocabulary = 3072              # tokens, the 256 bytes and the special ones included
  hidden_size = 256              # length of a hidden state
  intermediate_size = 704        # width of the feed-forward layers
  layers = 6
  attention_heads = 4
  key_value_heads = 2            # default: as many as attention_heads
  head_dim = 64                  # default: hidden_size / attention_heads
  tied_head = true               # the output head is the embedding matrix (default)
  max_positions = 512            # longest sequence
  rope_theta = 10000.0           # default
  rms_norm_epsilon = 1e-6        # default
  dtype = \"bf16\"                 # of the stored weights: bf16 (default), f16, f32
  chat_template = \"chat.jinja\"   # needed for records with `messages`

  [special_tokens]
  eos = \"<|end|>\"                # follows every document; generation stops there
  bos = \"<|start|>\"              # optional: precedes every text
  pad = \"<|pad|>\"                # optional, as is unk
  extra = [\"<|turn|>\"]           # the marks of the chat template
  stop = [\"<|turn|>\"]            # of these, the ones that end a turn

Documents are laid end to end and cut into segments of `--length` tokens, every one of which is learned. The base in \
`--out` is an ordinary Hugging Face folder; records of the run go to a folder beside it.

Examples:
  retune pretrain --shape shape.toml --data text.jsonl --out base
  retune pretrain --shape shape.toml --data text.jsonl --out base --steps 2000 --save-every 200

If that run was interrupted, the same command goes on with it; once it is finished, there is nothing to resume:
  retune pretrain --shape shape.toml --data text.jsonl --out base --steps 2000 --save-every 200 --resume";

/// What `retune pretrain` can be told.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct PretrainArgs {
    /// The model to be made: a TOML file, described below
    #[arg(long, value_name = "FILE")]
    shape: PathBuf,

    /// Text to learn from: JSON lines or a JSON array, plain or .gz, with `text` or `messages`
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    data: Vec<PathBuf>,

    /// Folder for the base, which appears when it is finished
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Tokens of a segment [default: `max_positions` of the shape]
    #[arg(long, value_name = "TOKENS", help_heading = "Data")]
    length: Option<usize>,

    /// Share of the documents that is only scored, chosen by the seed; 0 holds out none
    #[arg(
        long,
        default_value_t = 0.01,
        value_name = "SHARE",
        help_heading = "Data"
    )]
    eval_fraction: f64,

    /// Go on although up to this many records cannot be used
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Data")]
    skip_bad_records: usize,

    /// Passes over the text; parts are allowed [default: 1]
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "steps",
        help_heading = "Training"
    )]
    epochs: Option<f64>,

    /// Optimizer steps, instead of epochs
    #[arg(long, value_name = "N", help_heading = "Training")]
    steps: Option<usize>,

    /// Segments per optimizer step
    #[arg(
        long,
        default_value_t = 16,
        value_name = "N",
        help_heading = "Training"
    )]
    batch_size: usize,

    /// Most tokens in memory at once: cuts a step into passes
    #[arg(
        long,
        default_value_t = 4096,
        value_name = "N",
        help_heading = "Training"
    )]
    tokens_per_pass: usize,

    /// Highest learning rate
    #[arg(
        long,
        default_value_t = 2e-3,
        value_name = "X",
        help_heading = "Training"
    )]
    learning_rate: f64,

    /// How the learning rate moves after the warm-up
    #[arg(long, value_enum, default_value_t = Schedule::Cosine, value_name = "NAME", help_heading = "Training")]
    schedule: Schedule,

    /// Optimizer steps until the learning rate is reached [default: 3 % of all steps]
    #[arg(long, value_name = "N", help_heading = "Training")]
    warmup_steps: Option<usize>,

    /// AdamW's weight decay
    #[arg(
        long,
        default_value_t = 0.1,
        value_name = "X",
        help_heading = "Training"
    )]
    weight_decay: f64,

    /// AdamW's decay of the mean gradient
    #[arg(
        long,
        default_value_t = 0.9,
        value_name = "X",
        help_heading = "Training"
    )]
    beta1: f64,

    /// AdamW's decay of the mean squared gradient
    #[arg(
        long,
        default_value_t = 0.95,
        value_name = "X",
        help_heading = "Training"
    )]
    beta2: f64,

    /// Scale gradients longer than this down to it; 0 leaves them alone
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "X",
        help_heading = "Training"
    )]
    max_gradient_norm: f64,

    /// Seed of everything random
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Training")]
    seed: u64,

    /// Steps between evaluations on the held-out text; 0 evaluates at the start and the end [default: 10 times in all]
    #[arg(long, value_name = "N", help_heading = "Training")]
    eval_every: Option<usize>,

    /// Number of threads; results do not depend on it [default: all cores]
    #[arg(long, value_name = "N", value_parser = super::args::thread_count, help_heading = "Training")]
    threads: Option<usize>,

    /// Folder for the records of the run [default: `--out` with `-run` added]
    #[arg(long, value_name = "DIR", help_heading = "Run folder")]
    run: Option<PathBuf>,

    /// Steps between checkpoints to resume from; 0 saves only where it is interrupted or a step fails
    #[arg(
        long,
        default_value_t = 0,
        value_name = "N",
        help_heading = "Run folder"
    )]
    save_every: usize,

    /// Number of checkpoints to keep
    #[arg(
        long,
        default_value_t = 2,
        value_name = "N",
        help_heading = "Run folder"
    )]
    keep: usize,

    /// Go on from the run folder's newest checkpoint; all other options as they were
    #[arg(long, help_heading = "Run folder")]
    resume: bool,

    /// Steps between progress lines where no bar can be drawn
    #[arg(long, default_value_t = 10, value_name = "N")]
    log_every: usize,

    /// Say nothing but errors and the result
    #[arg(long)]
    quiet: bool,

    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `retune pretrain`.
pub(super) fn pretrain(arguments: &PretrainArgs) -> Result<()> {
    interrupt::watch()?;
    let show = Show::on_stderr(arguments.quiet);
    super::args::set_threads(arguments.threads)?;
    let options = arguments.options()?;
    let run = arguments.run_folder();
    check_writable(&run)?;
    let start = if arguments.resume {
        Start::Checkpoint
    } else {
        Start::Fresh
    };
    check_run_folder(&run, start)?;
    if start == Start::Fresh {
        refuse_taken(&run)?;
    }
    taken::refuse_obstacles(&run, &WRITTEN)?;
    let base = format!(
        "a {}-layer {}",
        options.shape.layers,
        options.shape.model_type.name()
    );
    let vocabulary = options.shape.vocabulary;

    let spinner = Progress::spinner(show, "learning the vocabulary and cutting the text");
    let pretraining = Pretraining::prepare(options, &arguments.out)?;
    spinner.finish();
    let held_out = pretraining.held_out.as_ref();
    let tokens = pretraining.data.report.tokens + held_out.map_or(0, |data| data.report.tokens);
    note(
        show,
        &format!(
            "data: {} segments, {} tokens of {vocabulary}, {:.2} bytes each; {} segments held out",
            format::whole(pretraining.data.len() as u64),
            format::whole(tokens as u64),
            pretraining.text_bytes as f64 / tokens as f64,
            held_out.map_or(0, |data| data.len()),
        ),
    );

    let training = arguments.training(pretraining.data.len())?;
    let steps = training
        .budget
        .steps(pretraining.data.len(), training.batch_size);
    note(
        show,
        &format!(
            "training {base} from scratch, {steps} steps at learning rate {}",
            training.learning_rate
        ),
    );
    let metrics_path = run.join(METRICS_FILE);
    let bar = Progress::training(show, steps as u64, arguments.log_every as u64);
    std::fs::create_dir_all(&run).at(run.display())?;
    let _lock = run_lock::hold(&run)?;
    remove_half_written(&run)?;
    let mut metrics_file = match start {
        Start::Fresh => MetricsFile::create(&metrics_path)?,
        Start::Checkpoint => {
            let saved = Checkpoints::of_run(&run).latest()?;
            let moved = moved(&run)?;
            super::warn_of_departures(&saved.damaged, moved.as_ref(), saved.state.step);
            MetricsFile::append(&metrics_path, saved.state.step as u64)?
        }
    };
    let pretrained = pretraining.train(&training, &run, start, &mut |event| {
        match event {
            Event::Step(report) => {
                metrics_file.step(report)?;
                bar.step(report);
            }
            Event::Evaluated(report) => {
                metrics_file.eval(report)?;
                bar.eval(report);
            }
            Event::Skipped(skipped) => {
                metrics_file.step(&skipped.report)?;
                bar.message(&format!("warning: {skipped}; it was left out"));
            }
            Event::Spiked(spiked) => bar.message(&format!("warning: {spiked}")),
            Event::Saving(_) => metrics_file.sync()?,
            Event::Saved(_) => (),
        }
        Ok(if interrupt::asked() {
            Control::Stop
        } else {
            Control::Continue
        })
    })?;
    let step = pretrained.state.step;
    bar.finish(&format!("trained to step {step}"));
    if pretrained.outcome == Outcome::Interrupted {
        return Err(
            Error::interrupted(format!("stopped after step {step}; everything is saved"))
                .hint("go on with the same command and `--resume`"),
        );
    }
    if arguments.save_every == 0 {
        Checkpoints::of_run(&run).remove()?;
    }
    arguments.finish(&run, &metrics_path, &pretrained)
}

/// Refuses a folder for the records of a run that holds files of somebody's own in their place.
fn refuse_taken(run: &Path) -> Result<()> {
    if is_pretraining(run) {
        return Ok(());
    }
    let mut taken = taken::files(run, &WRITTEN);
    // A run that was killed at once has left an empty one.
    let is_empty = |file: PathBuf| file.symlink_metadata().is_ok_and(|file| file.len() == 0);
    taken.retain(|name| *name != METRICS_FILE || !is_empty(run.join(name)));
    match taken.is_empty() {
        true => Ok(()),
        false => Err(taken::error(run, &taken).hint(
            "the records of the run would replace that: move it away, or name another folder with `--run`",
        )),
    }
}

/// Whether a pretraining was begun in the folder: what it began as is there.
pub(super) fn is_pretraining(run: &Path) -> bool {
    let begun = read_small(&run.join(RUN_FILE)).ok();
    let begun: Option<Value> = begun.and_then(|text| serde_json::from_slice(&text).ok());
    begun.is_some_and(|begun| begun.get("model").is_some() && begun.get("training").is_some())
}

impl PretrainArgs {
    fn options(&self) -> Result<PretrainOptions> {
        if !(0.0..1.0).contains(&self.eval_fraction) {
            return Err(Error::usage(format!(
                "`--eval-fraction` is {}, expected 0 to below 1",
                self.eval_fraction
            )));
        }
        if self.eval_fraction == 0.0 && self.eval_every.is_some() {
            return Err(Error::usage(
                "`--eval-every` needs held-out text, and `--eval-fraction 0` holds out none",
            )
            .hint("leave one of them out"));
        }
        let shape = Shape::read(&self.shape)?;
        Ok(PretrainOptions {
            length: self.length.unwrap_or(shape.max_positions),
            shape,
            data: self.data.clone(),
            skip_bad: self.skip_bad_records,
            eval_fraction: (self.eval_fraction > 0.0).then_some(self.eval_fraction),
            seed: self.seed,
        })
    }

    fn training(&self, segments: usize) -> Result<TrainOptions> {
        let budget = match (self.epochs, self.steps) {
            (_, Some(steps)) => Budget::Steps(steps),
            (epochs, None) => Budget::Epochs(epochs.unwrap_or(1.0)),
        };
        let steps = budget.steps(segments, self.batch_size.max(1));
        let options = TrainOptions {
            budget,
            batch_size: self.batch_size,
            tokens_per_pass: self.tokens_per_pass,
            learning_rate: self.learning_rate,
            schedule: self.schedule,
            warmup_steps: self.warmup_steps.unwrap_or(match self.schedule {
                Schedule::Constant => 0,
                _ => steps.div_ceil(33),
            }),
            weight_decay: self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            max_gradient_norm: self.max_gradient_norm,
            seed: self.seed,
            eval_every: self.eval_every.unwrap_or(steps.div_ceil(10)),
            save_every: self.save_every,
            keep: self.keep,
            ..TrainOptions::default()
        }
        .validated()?;
        options.check_length(segments)?;
        check_warm_up(&options, segments)?;
        Ok(options)
    }

    fn run_folder(&self) -> PathBuf {
        self.run.clone().unwrap_or_else(|| {
            // `base/` and `base` are the same folder.
            let mut run = self.out.components().as_path().as_os_str().to_owned();
            run.push("-run");
            run.into()
        })
    }

    fn finish(&self, run: &Path, metrics_path: &Path, pretrained: &Pretrained) -> Result<()> {
        let metrics = metrics::read(metrics_path)?;
        let picture = loss_svg("a base from scratch", &metrics)?;
        write_bytes(&run.join(CHART_FILE), picture.as_bytes())?;
        let training = Results::of(&metrics)
            .training
            .ok_or_else(|| Error::new("the run took no step"))?;
        let (first, last, state) = (training.first.1, training.last.1, &pretrained.state);
        let size =
            std::fs::metadata(self.out.join("model.safetensors")).map_or(0, |file| file.len());
        let speed = state.tokens as f64 / state.seconds;
        if self.json {
            let result = json!({
                "out": self.out, "run": run, "steps": state.step, "weights": pretrained.parameters, "bytes": size,
                "first_loss": first, "last_loss": last, "best_eval_loss": state.best.map(|best| best.loss),
                "best_step": state.best.map(|best| best.step), "final_eval_loss": state.final_eval_loss,
                "tokens": state.tokens, "tokens_per_second": speed, "seconds": state.seconds,
                "peak_memory_bytes": memory::peak_bytes(),
            });
            print_line!("{result}")?;
            return Ok(());
        }
        print_line!(
            "loss {first:.4} -> {last:.4} in {} steps, {speed:.0} tokens/s",
            state.step
        )?;
        if let Some(best) = state.best {
            print_line!(
                "held-out loss {:.4}, the best, after step {}: this base is kept",
                best.loss,
                best.step
            )?;
        }
        print_line!(
            "base: {} ({}, {} weights)",
            self.out.display(),
            format::bytes(size),
            format::whole(pretrained.parameters as u64)
        )?;
        print_line!(
            "next: retune generate --model {} --prompt \"...\"",
            self.out.display()
        )?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        arguments: PretrainArgs,
    }

    fn parsed(more: &[&str]) -> PretrainArgs {
        let fixed = [
            "pretrain", "--shape", "s.toml", "--data", "a,b", "--out", "base/",
        ];
        Cli::parse_from(fixed.iter().chain(more)).arguments
    }

    #[test]
    fn the_run_folder_lies_beside_the_base() {
        assert_eq!(parsed(&[]).run_folder(), Path::new("base-run"));
        assert_eq!(parsed(&["--run", "other"]).run_folder(), Path::new("other"));
    }

    #[test]
    fn the_example_that_resumes_says_of_what() {
        let (before, _) = HELP.rsplit_once("\n  retune pretrain").expect("examples");
        let said = before.lines().next_back().unwrap_or_default();
        assert!(HELP.ends_with("--resume"));
        assert!(said.contains("interrupted"), "{said}");
    }

    #[test]
    fn one_epoch_is_the_default() -> Result<()> {
        let training = parsed(&[]).training(160)?;
        assert_eq!(training.budget, Budget::Epochs(1.0));
        assert_eq!((training.warmup_steps, training.eval_every), (1, 1));
        assert_eq!(parsed(&["--steps", "330"]).training(160)?.warmup_steps, 10);
        Ok(())
    }
}
