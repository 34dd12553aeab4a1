//! The end of a run: what it leaves in its folder, and what is said of it.

use super::arguments::TrainArgs;
use super::card::model_card;
use crate::Result;
use crate::adapter_folder;
use crate::adapters::hooks::{AdapterMethod, MethodEntry};
use crate::adapters::storage::{WEIGHTS_FILE, write_bytes};
use crate::cli::note;
use crate::cli::output::print_line;
use crate::cli::progress::Show;
use crate::data::Dataset;
use crate::model::Model;
use crate::ops::Quantization;
use crate::report::format;
use crate::report::loss_plot::loss_svg;
use crate::report::metrics::{self, METRICS_FILE, Metric};
use crate::report::model_card::{BaseModel, Course, Results};
use crate::train::{Outcome, TrainOptions, TrainState};
use serde_json::json;
use std::path::Path;

/// A run that is over, ready to be written down.
pub(super) struct Finished<'a> {
    pub(super) entry: &'static MethodEntry,
    pub(super) arguments: &'a TrainArgs,
    pub(super) folder: &'a Path,
    pub(super) model: &'a Model,
    pub(super) method: &'a dyn AdapterMethod,
    pub(super) options: &'a TrainOptions,
    pub(super) state: &'a TrainState,
    pub(super) data: &'a Dataset,
    pub(super) held_out: Option<&'a Dataset>,
    pub(super) outcome: Outcome,
    pub(super) own_options: Vec<(String, String)>,
}

impl Finished<'_> {
    /// Writes the adapter, its card and its chart; returns what was measured, as far as it is still known.
    pub(super) fn write(&self) -> Result<Vec<Metric>> {
        let out = &self.arguments.out;
        let metrics = metrics::read(&out.join(METRICS_FILE))?;
        self.note_missing(&metrics);
        let (BaseModel::Hub(base) | BaseModel::Folder(base)) = BaseModel::in_folder(self.folder);
        let title = format!("{} on {base}", self.entry.name);
        write_bytes(
            &out.join("loss.svg"),
            loss_svg(&title, &metrics)?.as_bytes(),
        )?;
        write_bytes(
            &out.join("README.md"),
            model_card(self, &metrics).to_markdown().as_bytes(),
        )?;
        // Last: a folder with an adapter is a finished run.
        adapter_folder::save(out, self.model, self.method, self.arguments.base_name())?;
        Ok(metrics)
    }

    /// Says so if the records of steps were lost, which an adapter is worth more than.
    fn note_missing(&self, metrics: &[Metric]) {
        let is_step = |metric: &&Metric| matches!(metric, Metric::Step(_));
        let known = metrics.iter().filter(is_step).count();
        let step = self.state.step;
        if known < step {
            note(
                Show::on_stderr(self.arguments.quiet),
                &format!(
                    "note: `{METRICS_FILE}` has {known} of {step} steps; chart and model card show no others"
                ),
            );
        }
    }

    /// Says how it went, and what to do next.
    pub(super) fn print(&self, metrics: &[Metric]) -> Result<()> {
        let (out, state) = (&self.arguments.out, self.state);
        let training = Results::of(metrics).training;
        let size = std::fs::metadata(out.join(WEIGHTS_FILE)).map_or(0, |file| file.len());
        let speed = state.tokens as f64 / state.seconds;
        let trained = self.model.weights.parameter_count();
        let placement = self.model.decoder.placement();
        let quantization = placement.quantization.map(Quantization::name);
        if self.arguments.json {
            let result = json!({
                "out": out, "method": self.entry.name, "quantization": quantization, "steps": state.step,
                "stopped_early": self.outcome == Outcome::StoppedEarly,
                "trained_weights": trained, "adapter_bytes": size,
                "first_loss": training.map(|course| course.first.1), "last_loss": training.map(|course| course.last.1),
                "best_eval_loss": state.best.map(|best| best.loss), "best_step": state.best.map(|best| best.step),
                "final_eval_loss": state.final_eval_loss, "skipped_steps": state.skipped, "tokens_per_second": speed, "seconds": state.seconds,
                "peak_memory_bytes": placement.peak_memory(),
            });
            print_line!("{result}")?;
            return Ok(());
        }
        if self.outcome == Outcome::StoppedEarly {
            print_line!(
                "stopped after step {}: the held-out loss had not improved for {} evaluations",
                state.step,
                self.options.patience
            )?;
        }
        let steps = state.step;
        match training {
            Some(Course { first, last, .. }) => print_line!(
                "loss {:.4} -> {:.4} in {steps} steps, {speed:.0} tokens/s",
                first.1,
                last.1
            )?,
            None => print_line!("{steps} steps, {speed:.0} tokens/s")?,
        }
        if state.skipped > 0 {
            print_line!(
                "{} of these steps were left out: not finite, or far above those before them",
                state.skipped
            )?;
        }
        if let Some(best) = state.best {
            print_line!(
                "held-out loss {:.4}, the best, after step {}: this adapter is kept",
                best.loss,
                best.step
            )?;
        }
        print_line!(
            "adapter: {} ({}, {} weights)",
            out.display(),
            format::bytes(size),
            format::whole(trained as u64)
        )?;
        let held = quantization.map_or(String::new(), |name| format!(" --quantize {name}"));
        let template = self.arguments.base.chat_template.as_ref();
        let template = template.map_or(String::new(), |file| {
            format!(" --chat-template {}", file.display())
        });
        print_line!(
            "next: retune generate --model {}{held}{template} --adapter {} --prompt \"...\"",
            self.arguments.base.model,
            out.display()
        )?;
        Ok(())
    }
}
