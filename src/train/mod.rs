//! Training: the loop, top to bottom.

mod activation_cache;
mod batches;
mod checkpoint;
mod gradients;
mod inputs;
mod optimizer;
mod options;
pub(crate) mod run_folder;
mod spikes;

pub use crate::Control;
pub use crate::model::backward::Gradients;
pub use crate::ops::Fault;
pub use activation_cache::{ActivationCache, CacheType};
pub(crate) use checkpoint::sum_of_file;
pub use checkpoint::{Checkpoints, Damaged, TrainState};
pub use gradients::accumulate;
pub use inputs::{Inputs, Moved};
pub(crate) use inputs::{base_digest, changed_option, refuse_changed, unchanged};
pub use optimizer::AdamW;
pub use options::{
    Budget, OnNonfinite, OnSpike, Recompute, RecordedOptions, Schedule, TrainOptions,
};

use crate::adapters::hooks::Mode;
use crate::adapters::storage::AdapterWeights;
use crate::data::{Batch, Dataset, Order};
use crate::evaluate::{Evaluation, evaluate};
use crate::model::causal_lm::CausalLm;
use crate::ops::clock::{Kind, timed};
use crate::ops::{
    HeldWeights, Reaction, StepLimits, Verdict, begin_pass, release_all, release_unused,
    squared_norm,
};
use crate::report::metrics::{EvalReport, StepReport};
use crate::{Error, Result};
use batches::{Batches, StepBatch, batch_of};
use candle_core::{Device, Tensor};
use checkpoint::OPTIMIZER;
use gradients::{accumulate_unread, keep_below, lowest_trained_block};
use std::collections::BTreeMap;
use std::fmt;
use std::thread;
use std::time::Instant;

/// What a run tells its caller while it goes on.
pub enum Event<'a> {
    /// An optimizer step was taken.
    Step(&'a StepReport),
    /// A step was left out.
    Skipped(&'a FaultyStep),
    /// A step is about to be reported whose loss lies far above those before it; it was taken all the same.
    Spiked(&'a FaultyStep),
    /// The held-out data was scored.
    Evaluated(&'a EvalReport),
    /// The state up to here is about to be saved: what is written down beside it should be on the disk before it is.
    Saving(&'a TrainState),
    /// The state up to here can be resumed from.
    Saved(&'a TrainState),
}

/// A step that is not like those before it.
#[derive(Debug, Clone)]
pub struct FaultyStep {
    /// What it was, or would have been.
    pub report: StepReport,
    /// The examples in it, counted from 0 in the data.
    pub examples: Vec<usize>,
    /// What is wrong with it.
    pub fault: Fault,
}

impl fmt::Display for FaultyStep {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StepReport {
            step,
            loss,
            gradient_norm,
            ..
        } = self.report;
        match self.fault {
            Fault::NotFinite => write!(
                formatter,
                "step {step} is not finite (loss {loss}, gradient norm {gradient_norm}, examples {:?})",
                self.examples
            ),
            Fault::Spike { bound } => write!(
                formatter,
                "the loss of step {step} is {loss:.4}, where at most {bound:.4} was to be expected after those before \
                 it (gradient norm {gradient_norm:.4}, examples {:?})",
                self.examples
            ),
        }
    }
}

enum Step {
    Taken(StepReport),
    Spiked(FaultyStep),
    Skipped(FaultyStep),
}

/// After so many the run is over, not the batch at fault.
const MOST_SKIPPED_IN_A_ROW: usize = 10;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were taken.
    Finished,
    /// The held-out loss had stopped improving.
    StoppedEarly,
    /// The caller asked to stop; the state was saved.
    Interrupted,
}

/// Trains the adapter of `model` with AdamW.
pub struct Trainer<'a> {
    model: &'a dyn CausalLm,
    weights: &'a AdapterWeights,
    options: &'a TrainOptions,
    optimizer: AdamW,
    state: TrainState,
    best: BTreeMap<String, Tensor>,
    damaged: Vec<Damaged>,
    moved: Option<Moved>,
    cache: Option<ActivationCache>,
}

impl<'a> Trainer<'a> {
    /// A run that has not begun.
    pub fn new(
        model: &'a dyn CausalLm,
        weights: &'a AdapterWeights,
        options: &'a TrainOptions,
    ) -> Result<Self> {
        if weights.is_empty() {
            return Err(Error::new("the method trains nothing on this model"));
        }
        Ok(Self {
            model,
            weights,
            options,
            optimizer: AdamW::new(weights)?,
            state: TrainState::default(),
            best: BTreeMap::new(),
            damaged: Vec::new(),
            moved: None,
            cache: None,
        })
    }

    /// Goes back to where `checkpoints` last saved the run and it can still be read, see [`Trainer::damaged`]; returns
    /// the step reached.
    pub fn resume(&mut self, checkpoints: &Checkpoints) -> Result<usize> {
        let saved = checkpoints.latest()?;
        let device = &self.model.placement().device;
        for (name, var) in self.weights.iter() {
            var.set(&saved.weight(name, var)?.to_device(device)?)?;
        }
        let TrainState {
            step,
            skipped,
            skipped_in_a_row,
            ..
        } = saved.state;
        let taken = step
            .checked_sub(skipped)
            .filter(|_| skipped_in_a_row <= skipped)
            .ok_or_else(|| {
                Error::new("more steps were left out than taken").at(saved.folder.display())
            })?;
        let moments = on_device(&saved.optimizer, device)?;
        self.optimizer
            .restore(&moments, taken as u64)
            .map_err(|error| saved.not_the_runs(OPTIMIZER, error))?;
        self.best = on_device(&saved.best, device)?;
        self.damaged = saved.damaged;
        self.moved = saved.moved;
        self.state = saved.state;
        Ok(self.state.step)
    }

    /// The checkpoints that the run should have gone on from, but could not, newest first.
    pub fn damaged(&self) -> &[Damaged] {
        &self.damaged
    }

    /// Where the run was before, if it has gone back to a checkpoint that was made elsewhere.
    pub fn moved(&self) -> Option<&Moved> {
        self.moved.as_ref()
    }

    /// Runs to the end of the budget, the patience or the caller's. Afterwards the weights are the best ones seen if
    /// there is held-out data, the last ones otherwise.
    pub fn run(
        &mut self,
        data: &Dataset,
        order: &mut Order,
        held_out: Option<&Dataset>,
        checkpoints: Option<&Checkpoints>,
        on_event: &mut dyn FnMut(Event) -> Result<Control>,
    ) -> Result<Outcome> {
        let (total, epoch_len) = (self.total_steps(order), order.epoch_len());
        self.refuse_step_beyond(total)?;
        let mut control = Control::Continue;
        // A run that was interrupted before its first step has this behind it.
        if self.state.step == 0
            && self.state.best.is_none()
            && let Some(held_out) = held_out
        {
            control = self.evaluate(held_out, epoch_len, checkpoints, on_event)?;
        }
        self.cache = self.activation_cache(data, total, checkpoints)?;
        self.keep_again(data, order)?;
        let outcome = thread::scope(|scope| -> Result<Outcome> {
            let steps = self.state.step..total;
            let batches = Batches::ahead(scope, steps, data, order, self.options)?;
            while self.state.step < total {
                if self.out_of_patience() {
                    return Ok(Outcome::StoppedEarly);
                }
                if control == Control::Stop {
                    return Ok(Outcome::Interrupted);
                }
                let step = self.step(&batches, total, epoch_len, checkpoints)?;
                control = self.report(&step, on_event)?;
                let last = self.state.step == total;
                if let Some(held_out) = held_out
                    && (last || due(self.state.step, self.options.eval_every))
                {
                    control =
                        control.or(self.evaluate(held_out, epoch_len, checkpoints, on_event)?);
                }
                if let Some(checkpoints) = checkpoints
                    && due(self.state.step, self.options.save_every)
                {
                    control = control.or(self.save(checkpoints, on_event)?);
                }
            }
            Ok(Outcome::Finished)
        })?;
        self.cache = None;
        release_all();
        match (outcome, checkpoints) {
            (Outcome::Finished, _) => {}
            (_, Some(checkpoints)) => {
                self.save(checkpoints, on_event)?;
            }
            (_, None) => {}
        }
        if outcome != Outcome::Interrupted {
            self.refuse_state_without_number(checkpoints)?;
            for (name, best) in &self.best {
                if let Some(var) = self.weights.get(name) {
                    var.set(best)?;
                }
            }
        }
        Ok(outcome)
    }

    /// Fails if the run has gone back to a step that it does not have.
    fn refuse_step_beyond(&self, total: usize) -> Result<()> {
        let step = self.state.step;
        if step <= total {
            return Ok(());
        }
        Err(Error::new(format!(
            "the checkpoint is of step {step}, and the run has {total} steps"
        ))
        .hint("someone changed it: remove its folder, and the one before is used"))
    }

    /// Saves what the run can be resumed from, outside of its turn. Fails where that holds values that are no numbers: the
    /// checkpoints before it are worth more.
    pub fn save_now(&self, checkpoints: &Checkpoints) -> Result<()> {
        self.save_beside(checkpoints, self.options.keep)
    }

    fn save_beside(&self, checkpoints: &Checkpoints, keep: usize) -> Result<()> {
        self.refuse_state_without_number(Some(checkpoints))?;
        checkpoints.save(
            &self.state,
            self.weights,
            &self.optimizer,
            &self.best,
            keep,
            &self.damaged,
        )
    }

    fn out_of_patience(&self) -> bool {
        let patience = self.options.patience;
        patience > 0 && self.state.evaluations_without_gain >= patience
    }

    /// Number of optimizer steps of the whole run.
    pub fn total_steps(&self, order: &Order) -> usize {
        self.options
            .budget
            .steps(order.epoch_len(), self.options.batch_size)
    }

    /// Where the run stands.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// A cache for what lies below the lowest trained block, where that is worth it: something does, and examples come
    /// more than once.
    fn activation_cache(
        &self,
        data: &Dataset,
        total: usize,
        checkpoints: Option<&Checkpoints>,
    ) -> Result<Option<ActivationCache>> {
        let (memory, examples) = (self.options.activation_cache_bytes, data.len());
        let again = total.saturating_mul(self.options.batch_size) > examples;
        if memory == 0 || !again || lowest_trained_block(self.model) == 0 {
            return Ok(None);
        }
        let folder = checkpoints.and_then(Checkpoints::run);
        let width = self.model.shape().hidden_size;
        let number = self.options.activation_cache_type;
        let placement = self.model.placement();
        ActivationCache::new(placement, examples, width, number, memory, folder).map(Some)
    }

    /// Keeps what earlier steps of a run that goes on had kept, where its last bits are those of the passes of these steps.
    fn keep_again(&mut self, data: &Dataset, order: &mut Order) -> Result<()> {
        let Some(cache) = &mut self.cache else {
            return Ok(());
        };
        for step in 0..self.state.step {
            if !cache.lacks_earlier_passes() {
                break;
            }
            let StepBatch { examples, passes } = batch_of(step, data, order, self.options);
            let mut seen = 0;
            for pass in &passes {
                let held = &examples[seen..seen + pass.len()];
                seen += pass.len();
                if cache.takes(held, &pass.segments) {
                    keep_below(self.model, pass, Mode::Infer, cache, held)?;
                }
            }
        }
        Ok(())
    }

    /// One optimizer step: gradients of all passes, divided by the step's target tokens, clipped, applied.
    fn step(
        &mut self,
        batches: &Batches,
        total: usize,
        epoch_len: usize,
        checkpoints: Option<&Checkpoints>,
    ) -> Result<Step> {
        let started = Instant::now();
        let step = self.state.step + 1;
        let StepBatch {
            examples: chosen,
            passes,
        } = batches.next()?;

        let summed = self.gradients(step, &chosen, &passes);
        // Nothing has been moved yet: what failed, such as a GPU's memory used up, costs this step and not the run.
        let (gradients, losses) = summed.inspect_err(|_| self.keep(checkpoints))?;
        if step == 1 {
            self.refuse_weights_without_gradient(&gradients)?;
        }
        let learning_rate = self.options.schedule.learning_rate(
            self.options.learning_rate,
            step,
            self.options.warmup_steps,
            total,
        );
        let target_tokens = passes.iter().map(|pass| pass.target_tokens).sum();
        let limits = self.limits(target_tokens);
        let Verdict {
            loss,
            gradient_norm,
            fault,
            reaction,
            ..
        } = timed(Kind::Optimizer, || {
            self.optimizer.step(
                self.weights,
                &losses,
                &gradients,
                &limits,
                learning_rate,
                self.options,
            )
        })?;
        release_unused();

        let seconds = started.elapsed().as_secs_f64();
        let tokens: usize = passes.iter().map(|pass| pass.tokens.len()).sum();
        let report = StepReport {
            step: step as u64,
            loss,
            learning_rate,
            gradient_norm,
            target_tokens: target_tokens as u64,
            tokens_per_second: tokens as f64 / seconds,
            peak_memory_bytes: self.model.placement().peak_memory().unwrap_or(0),
            epoch: self.epoch(step, epoch_len),
        };
        let faulty = fault.map(|fault| FaultyStep {
            report: report.clone(),
            examples: chosen,
            fault,
        });
        if let (Some(faulty), Reaction::EndRun) = (&faulty, reaction) {
            // Where the weights are none any more, it was the step before that did it.
            self.refuse_state_without_number(checkpoints)?;
            self.keep(checkpoints);
            return Err(stopped_by(faulty, checkpoints));
        }
        self.state.step = step;
        self.state.seconds += seconds;
        self.state.tokens = self.state.tokens.saturating_add(tokens as u64);
        match faulty {
            Some(skipped) if reaction == Reaction::LeaveOut => {
                self.state.skipped += 1;
                self.state.skipped_in_a_row += 1;
                Ok(Step::Skipped(skipped))
            }
            taken => {
                self.state.skipped_in_a_row = 0;
                spikes::remember(&mut self.state.recent_losses, loss);
                Ok(taken.map_or(Step::Taken(report), Step::Spiked))
            }
        }
    }

    /// Gradients of the loss summed over all target tokens of these passes, and the loss of each pass.
    fn gradients(
        &mut self,
        step: usize,
        examples: &[usize],
        passes: &[Batch],
    ) -> Result<(Gradients, Vec<Tensor>)> {
        let (mut gradients, mut losses) = (Gradients::new(), Vec::new());
        let (mut seen, mut rows) = (0, 0);
        let _held_weights = HeldWeights::begin();
        for pass in passes {
            begin_pass(pass.tokens.len());
            let mode = Mode::Train {
                seed: step_seed(self.options.seed, step),
                first_row: rows,
            };
            let held = &examples[seen..seen + pass.len()];
            seen += pass.len();
            losses.push(accumulate_unread(
                self.model,
                self.weights,
                pass,
                mode,
                self.options.recompute,
                &mut gradients,
                self.cache.as_mut().map(|cache| (cache, held)),
            )?);
            rows += pass.tokens.len()
                + self
                    .model
                    .soft_prompt()
                    .map_or(0, |prompt| prompt.len() * (pass.segments.len() - 1));
        }
        Ok((gradients, losses))
    }

    /// Saves where the run stands before it ends with an error, which is what there is to say if that fails too.
    fn keep(&self, checkpoints: Option<&Checkpoints>) {
        if let Some(checkpoints) = checkpoints
            && self.state.step > 0
        {
            // What failed may fail again from here: the checkpoints before it stay.
            let _ = self.save_beside(checkpoints, usize::MAX);
        }
    }

    /// Tells the caller of a step; too many left out in a row end the run.
    fn report(
        &self,
        step: &Step,
        on_event: &mut dyn FnMut(Event) -> Result<Control>,
    ) -> Result<Control> {
        match step {
            Step::Taken(report) => on_event(Event::Step(report)),
            Step::Spiked(spiked) => {
                let control = on_event(Event::Spiked(spiked))?;
                Ok(control.or(on_event(Event::Step(&spiked.report))?))
            }
            Step::Skipped(skipped) => {
                let control = on_event(Event::Skipped(skipped))?;
                let in_a_row = self.state.skipped_in_a_row;
                if in_a_row >= MOST_SKIPPED_IN_A_ROW {
                    return Err(Error::not_finite(format!(
                        "{in_a_row} steps in a row were left out; the last: {skipped}"
                    ))
                    .hint("more of the same data will not help: try a lower `--learning-rate`, and look at these examples"));
                }
                Ok(control)
            }
        }
    }

    /// What a step of so many target tokens is judged by.
    fn limits(&self, target_tokens: usize) -> StepLimits {
        StepLimits {
            target_tokens,
            gradient_norm: self.options.max_gradient_norm,
            loss: spikes::bound(&self.state.recent_losses),
            on_nonfinite: match self.options.on_nonfinite {
                OnNonfinite::Skip => Reaction::LeaveOut,
                OnNonfinite::Stop => Reaction::EndRun,
            },
            on_spike: match self.options.on_spike {
                OnSpike::Warn => Reaction::Take,
                OnSpike::Skip => Reaction::LeaveOut,
                OnSpike::Stop => Reaction::EndRun,
            },
        }
    }

    /// Fails by the first weight or moment with values that are no numbers. No loss has shown yet what the last step has
    /// done: neither at the end nor at a checkpoint.
    fn refuse_state_without_number(&self, checkpoints: Option<&Checkpoints>) -> Result<()> {
        let (moments, _) = self.optimizer.state();
        let moments = moments.iter().map(|(name, moment)| (name.as_str(), moment));
        let weights = self
            .weights
            .iter()
            .map(|(name, var)| (name, var.as_tensor()));
        for (name, tensor) in weights.chain(moments) {
            if !squared_norm(tensor)?.is_finite() {
                return Err(Error::not_finite(format!(
                    "`{name}` holds values that are no numbers after step {}",
                    self.state.step
                ))
                .hint(format!(
                    "{}try a lower `--learning-rate` or a longer `--warmup-steps`",
                    last_good_state(checkpoints)
                )));
            }
        }
        Ok(())
    }

    fn refuse_weights_without_gradient(&self, gradients: &Gradients) -> Result<()> {
        let without: Vec<String> = self
            .weights
            .iter()
            .filter(|(name, _)| !gradients.contains_key(*name))
            .map(|(name, _)| format!("`{name}`"))
            .collect();
        if without.is_empty() {
            return Ok(());
        }
        Err(
            Error::new(format!("trained weights that got no gradient in the first step: {}", without.join(", ")))
                .hint("the method made them but its forward pass does not use them, or uses an operation without a backward"),
        )
    }

    fn evaluate(
        &mut self,
        held_out: &Dataset,
        epoch_len: usize,
        checkpoints: Option<&Checkpoints>,
        on_event: &mut dyn FnMut(Event) -> Result<Control>,
    ) -> Result<Control> {
        let Evaluation {
            loss,
            tokens,
            accuracy,
            ..
        } = {
            // Passes of an evaluation are as large as may be, those of a step only as large as its batch.
            release_all();
            evaluate(
                self.model,
                held_out,
                self.options.tokens_per_pass,
                &mut |_| {},
            )?
        };
        release_all();
        if !loss.is_finite() {
            self.refuse_state_without_number(checkpoints)?;
            return Err(Error::not_finite(format!(
                "the held-out loss after step {} is {loss}, which is no number",
                self.state.step
            ))
            .hint(format!(
                "{}a weight may be damaged that no training data uses, which `retune inspect` names, or `--learning-rate` too high",
                last_good_state(checkpoints)
            )));
        }
        if self.state.best.is_none_or(|best| loss < best.loss) {
            self.state.best = Some(checkpoint::Best {
                step: self.state.step,
                loss,
            });
            self.state.evaluations_without_gain = 0;
            self.best = snapshot(self.weights)?;
        } else {
            let without = &mut self.state.evaluations_without_gain;
            *without = without.saturating_add(1);
        }
        let report = EvalReport {
            step: self.state.step as u64,
            eval_loss: loss,
            eval_tokens: tokens as u64,
            accuracy: Some(accuracy),
            epoch: self.epoch(self.state.step, epoch_len),
        };
        self.state.final_eval_loss = Some(loss);
        on_event(Event::Evaluated(&report))
    }

    fn save(
        &mut self,
        checkpoints: &Checkpoints,
        on_event: &mut dyn FnMut(Event) -> Result<Control>,
    ) -> Result<Control> {
        let control = on_event(Event::Saving(&self.state))?;
        if let Err(error) = self.save_now(checkpoints) {
            // Hidden states that are kept in a file can be computed again; the disk that they fill is needed here.
            let cache = self.cache.as_mut();
            if !cache.is_some_and(ActivationCache::give_back_file) {
                return Err(error);
            }
            self.save_now(checkpoints)?;
        }
        Ok(control.or(on_event(Event::Saved(&self.state))?))
    }

    fn epoch(&self, step: usize, epoch_len: usize) -> f64 {
        (step * self.options.batch_size) as f64 / epoch_len as f64
    }
}

impl Control {
    fn or(self, other: Self) -> Self {
        if self == Self::Stop { self } else { other }
    }
}

/// Never if `every` is 0, of which 0 alone is a multiple: a step that was made has a number of at least 1.
fn due(step: usize, every: usize) -> bool {
    step.is_multiple_of(every)
}

/// Dropout differs from step to step, and not with how the step is cut into passes.
fn step_seed(seed: u64, step: usize) -> u64 {
    seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .wrapping_add(step as u64)
}

/// The same tensors where the model is.
fn on_device(
    tensors: &BTreeMap<String, Tensor>,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    let moved = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.to_device(device)?));
    tensors.iter().map(moved).collect()
}

fn snapshot(weights: &AdapterWeights) -> Result<BTreeMap<String, Tensor>> {
    weights
        .iter()
        .map(|(name, var)| Ok((name.to_owned(), var.as_tensor().copy()?.detach())))
        .collect()
}

/// Where to find the state before something went wrong, if it was saved: the beginning of a hint.
fn last_good_state(checkpoints: Option<&Checkpoints>) -> String {
    match checkpoints.and_then(|checkpoints| checkpoints.newest_intact().ok().flatten()) {
        Some(folder) => format!("the last good state is in `{}`; ", folder.display()),
        None => String::new(),
    }
}

fn stopped_by(faulty: &FaultyStep, checkpoints: Option<&Checkpoints>) -> Error {
    let kept = last_good_state(checkpoints);
    let fact = format!("{faulty}; the weights were left as they were before it");
    let (error, skip) = match faulty.fault {
        Fault::NotFinite => (Error::not_finite(fact), "on-nonfinite"),
        Fault::Spike { .. } => (Error::new(fact), "on-spike"),
    };
    error.hint(format!(
        "{kept}look at these examples: `--{skip} skip` leaves such steps out, and so does `{skip} = \"skip\"` in the \
         `run.toml` of a run that goes on; another run may need a lower `--learning-rate` or a longer `--warmup-steps`"
    ))
}
