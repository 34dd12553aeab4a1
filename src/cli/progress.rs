//! Progress of long work (to be replaced).

use crate::report::metrics::{EvalReport, StepReport};

pub(super) struct Progress {
    quiet: bool,
}

impl Progress {
    pub(super) fn new(quiet: bool) -> Self {
        Self { quiet }
    }

    pub(super) fn message(&self, text: &str) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }

    pub(super) fn training(&self, total: usize, every: usize) -> TrainingBar {
        TrainingBar {
            quiet: self.quiet,
            total,
            every,
        }
    }
}

pub(super) struct TrainingBar {
    quiet: bool,
    total: usize,
    every: usize,
}

impl TrainingBar {
    pub(super) fn step(&self, report: &StepReport) {
        if !self.quiet && (report.step as usize).is_multiple_of(self.every.max(1)) {
            eprintln!(
                "step {}/{} loss {:.4} {:.0} tokens/s",
                report.step, self.total, report.loss, report.tokens_per_second
            );
        }
    }
    pub(super) fn eval(&self, report: &EvalReport) {
        if !self.quiet {
            eprintln!("step {} eval loss {:.4}", report.step, report.eval_loss);
        }
    }
    pub(super) fn finish(&self) {}
}

pub(super) struct Bar;

impl Progress {
    pub(super) fn items(&self, _name: &str, _total: u64) -> Bar {
        Bar
    }
}

impl Bar {
    pub(super) fn advance(&self, _count: u64) {}
    pub(super) fn finish(&self) {}
}
