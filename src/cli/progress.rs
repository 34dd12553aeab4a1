//! Progress of long work, on standard error: a bar on a terminal, plain lines elsewhere.

use super::output::spelt_out;
use crate::report::format;
use crate::report::metrics::{EvalReport, StepReport};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Least time between two lines of the same work where there is no bar.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Time after which a spinner turns and the elapsed time is drawn anew.
const TICK: Duration = Duration::from_millis(120);

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Show {
    /// A bar that is drawn over and over.
    Bar,
    /// One line now and then.
    Lines,
    /// Nothing at all.
    Nothing,
}

impl Show {
    /// What suits standard error. `quiet` is the command-line option.
    pub(super) fn on_stderr(quiet: bool) -> Self {
        let draws = || std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb");
        if quiet {
            Self::Nothing
        } else if io::stderr().is_terminal() && draws() {
            Self::Bar
        } else {
            Self::Lines
        }
    }
}

/// Progress of a download, of loading, of a pass over files. Dropped before its end, it vanishes.
#[derive(Debug)]
pub(super) struct Progress {
    name: String,
    unit: Unit,
    total: u64,
    display: Display,
    state: Mutex<State>,
    started: Instant,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Bytes,
    Items,
    Nothing,
}

impl Unit {
    fn text(self, count: u64) -> String {
        match self {
            Self::Bytes => format::bytes(count),
            Self::Items | Self::Nothing => format::whole(count),
        }
    }
}

#[derive(Debug)]
struct State {
    done: u64,
    last_line: Instant,
}

impl Progress {
    /// A download or a copy of `total` bytes.
    pub(super) fn bytes(show: Show, name: &str, total: u64) -> Self {
        let template = "{msg} {bar:24.cyan/dim} {binary_bytes:>11} / {binary_total_bytes}  {binary_bytes_per_sec}  ETA {eta}";
        Self::new(show, name, Unit::Bytes, total, bar(total, template))
    }

    /// Work on `total` things, such as examples or files.
    pub(super) fn items(show: Show, name: &str, total: u64) -> Self {
        let template = "{msg} {bar:24.cyan/dim} {human_pos} / {human_len}  ETA {eta}";
        Self::new(show, name, Unit::Items, total, bar(total, template))
    }

    /// Work of unknown length.
    pub(super) fn spinner(show: Show, name: &str) -> Self {
        let bar = ProgressBar::no_length().with_style(style("{spinner:.cyan} {msg}  {elapsed}"));
        Self::new(show, name, Unit::Nothing, 0, bar)
    }

    fn new(show: Show, name: &str, unit: Unit, total: u64, bar: ProgressBar) -> Self {
        let display = Display::new(show, || {
            bar.set_message(name.to_owned());
            bar.enable_steady_tick(TICK);
            bar
        });
        let now = Instant::now();
        Self {
            name: name.to_owned(),
            unit,
            total,
            display,
            state: Mutex::new(State {
                done: 0,
                last_line: now,
            }),
            started: now,
        }
    }

    /// Notes that `amount` more is done.
    pub(super) fn advance(&self, amount: u64) {
        let done = lock(&self.state).done.saturating_add(amount);
        self.set(done);
    }

    /// Notes that `done` of the total is done.
    pub(super) fn set(&self, done: u64) {
        let mut state = lock(&self.state);
        state.done = done;
        match &self.display {
            Display::Bar(bar) => bar.set_position(done),
            Display::Lines(_) if state.last_line.elapsed() >= LINE_INTERVAL => {
                state.last_line = Instant::now();
                self.display.line(&self.progress_line(done));
            }
            Display::Lines(_) | Display::Nothing => {}
        }
    }

    /// Ends the work and leaves one line.
    pub(super) fn finish(self) {
        let done = lock(&self.state).done;
        let took = format::duration(self.started.elapsed());
        let line = match self.unit {
            Unit::Nothing => format!("{}: done in {took}", self.name),
            Unit::Bytes | Unit::Items => {
                format!("{}: {} in {took}", self.name, self.unit.text(done))
            }
        };
        self.display.finish(&line);
    }

    fn progress_line(&self, done: u64) -> String {
        let (done_text, total_text) = (self.unit.text(done), self.unit.text(self.total));
        let share = 100.0 * done as f64 / self.total.max(1) as f64;
        format!("{}: {done_text} of {total_text} ({share:.0} %)", self.name)
    }
}

/// Progress of a training run. Dropped before its end, its bar vanishes and its lines stay.
#[derive(Debug)]
pub(super) struct TrainingProgress {
    total_steps: u64,
    log_every: u64,
    display: Display,
    started: Instant,
    /// The first step seen, which is not 1 in a resumed run.
    first_step: Mutex<Option<u64>>,
}

impl Progress {
    /// A training run of `total_steps`, with a line every `log_every` steps where there is no bar.
    pub(super) fn training(show: Show, total_steps: u64, log_every: u64) -> TrainingProgress {
        let template = "{wide_bar:.cyan/dim} {human_pos}/{human_len}  {msg}";
        TrainingProgress {
            total_steps,
            log_every: log_every.max(1),
            display: Display::new(show, || {
                let bar = bar(total_steps, template);
                // The first step may take a while.
                bar.set_message("starting");
                bar.tick();
                bar
            }),
            started: Instant::now(),
            first_step: Mutex::new(None),
        }
    }
}

impl TrainingProgress {
    /// Shows a training step.
    pub(super) fn step(&self, report: &StepReport) {
        let first_step = *lock(&self.first_step).get_or_insert(report.step);
        let steps_here = report.step.saturating_sub(first_step) + 1;
        let left = self.total_steps.saturating_sub(report.step);
        let remaining = remaining(self.started.elapsed(), steps_here, left);
        match &self.display {
            Display::Bar(bar) => {
                bar.set_position(report.step);
                bar.set_message(step_text(report, remaining));
            }
            Display::Lines(_) if report.step.is_multiple_of(self.log_every) || left == 0 => {
                let total = format::whole(self.total_steps);
                let step = format!("{:>1$}", format::whole(report.step), total.len());
                let text = step_text(report, remaining);
                self.display.line(&format!("step {step}/{total}  {text}"));
            }
            Display::Lines(_) | Display::Nothing => {}
        }
    }

    /// Shows an evaluation, as a line that stays.
    pub(super) fn eval(&self, report: &EvalReport) {
        let accuracy = match report.accuracy {
            Some(accuracy) => format!("  accuracy {:.1} %", 100.0 * accuracy),
            None => String::new(),
        };
        self.display.line(&format!(
            "evaluation after step {}  loss {:.4}{accuracy}",
            format::whole(report.step),
            report.eval_loss
        ));
    }

    /// Shows a line that stays, such as where a checkpoint was saved.
    pub(super) fn message(&self, message: &str) {
        self.display.line(message);
    }

    /// Ends the run and leaves one line.
    pub(super) fn finish(self, message: &str) {
        self.display.finish(message);
    }
}

/// Loss, speed, time left and peak memory.
fn step_text(report: &StepReport, remaining: Duration) -> String {
    format!(
        "loss {:.4}  {} tokens/s  ETA {}  peak {}",
        report.loss,
        format::count(report.tokens_per_second.round() as u64),
        format::duration(remaining),
        format::bytes(report.peak_memory_bytes),
    )
}

/// Time for `left` more steps if they take as long as `steps` did, evaluations and all.
fn remaining(elapsed: Duration, steps: u64, left: u64) -> Duration {
    let seconds = elapsed.as_secs_f64() / steps.max(1) as f64 * left as f64;
    format::seconds(seconds)
}

/// Where progress goes.
enum Display {
    Bar(ProgressBar),
    Lines(Mutex<Box<dyn Write + Send>>),
    Nothing,
}

impl std::fmt::Debug for Display {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Bar(_) => "Bar",
            Self::Lines(_) => "Lines",
            Self::Nothing => "Nothing",
        })
    }
}

impl Display {
    fn new(show: Show, bar: impl FnOnce() -> ProgressBar) -> Self {
        match show {
            Show::Bar => Self::Bar(bar()),
            Show::Lines => Self::Lines(Mutex::new(Box::new(io::stderr()))),
            Show::Nothing => Self::Nothing,
        }
    }

    /// Writes a line that stays, above the bar if there is one.
    fn line(&self, line: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| write_line(&mut io::stderr(), line)),
            Self::Lines(writer) => write_line(&mut **lock(writer), line),
            Self::Nothing => {}
        }
    }

    fn finish(&self, line: &str) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
        self.line(line);
    }
}

fn write_line(writer: &mut dyn Write, line: &str) {
    // When nobody reads standard error any more, the work is still worth finishing.
    let _ = writeln!(writer, "{}", spelt_out(line));
}

fn bar(total: u64, template: &str) -> ProgressBar {
    ProgressBar::new(total).with_style(style(template).progress_chars("━╸─"))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates of this file are well-formed")
}

/// The content; a panic elsewhere does not make a progress display worse.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Standard error as a test sees it.
    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Screen {
        fn display(&self) -> Display {
            Display::Lines(Mutex::new(Box::new(self.clone())))
        }

        fn text(&self) -> String {
            String::from_utf8(lock(&self.0).clone()).expect("UTF-8")
        }
    }

    fn step(step: u64) -> StepReport {
        StepReport {
            step,
            loss: 1.0,
            learning_rate: 2e-4,
            gradient_norm: 1.0,
            target_tokens: 512,
            tokens_per_second: 1234.4,
            peak_memory_bytes: 3 << 29,
            epoch: 0.5,
        }
    }

    #[test]
    fn training_has_a_line_every_so_many_steps_and_at_the_end() {
        let screen = Screen::default();
        let progress = TrainingProgress {
            display: screen.display(),
            ..Progress::training(Show::Nothing, 1005, 500)
        };
        for index in 1..=1005 {
            progress.step(&step(index));
        }
        progress.eval(&EvalReport {
            step: 1005,
            eval_loss: 0.75,
            eval_tokens: 1,
            accuracy: Some(0.5),
            epoch: 1.0,
        });
        progress.message("saved in my-adapter");
        progress.finish("trained");
        let text = screen.text();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert!(lines[0].starts_with("step   500/1,005  loss 1.0000  1,234 tokens/s  ETA "));
        assert!(lines[0].ends_with("  peak 1.50 GiB"));
        assert!(lines[1].starts_with("step 1,000/1,005"));
        assert!(lines[2].contains("ETA 0.00 s"));
        assert_eq!(
            lines[3],
            "evaluation after step 1,005  loss 0.7500  accuracy 50.0 %"
        );
        assert_eq!(lines[4..], ["saved in my-adapter", "trained"]);
    }

    #[test]
    fn a_line_has_nothing_that_a_terminal_would_obey() {
        let screen = Screen::default();
        let progress = TrainingProgress {
            display: screen.display(),
            ..Progress::training(Show::Nothing, 1, 1)
        };
        progress.message("warning: \u{1b}[31mred\u{9b}0m");
        progress.finish("trained\u{7}");
        assert_eq!(
            screen.text(),
            "warning: \\u{1b}[31mred\\u{9b}0m\ntrained\\u{7}\n"
        );
    }

    #[test]
    fn a_resumed_run_reckons_from_its_own_steps() {
        let progress = Progress::training(Show::Nothing, 100, 1);
        progress.step(&step(91));
        progress.step(&step(92));
        assert_eq!(*lock(&progress.first_step), Some(91));
        assert_eq!(
            remaining(Duration::from_secs(4), 2, 8),
            Duration::from_secs(16)
        );
        assert_eq!(
            remaining(Duration::from_secs(4), 0, 8),
            Duration::from_secs(32)
        );
    }

    #[test]
    fn a_download_has_its_size_at_the_end() {
        let screen = Screen::default();
        let progress = Progress {
            display: screen.display(),
            ..Progress::bytes(Show::Nothing, "model.safetensors", 3 << 20)
        };
        progress.advance(1 << 20);
        progress.advance(2 << 20);
        assert_eq!(
            progress.progress_line(3 << 19),
            "model.safetensors: 1.50 MiB of 3.00 MiB (50 %)"
        );
        progress.finish();
        let text = screen.text();
        assert!(
            text.starts_with("model.safetensors: 3.00 MiB in 0.0"),
            "{text}"
        );
    }

    #[test]
    fn every_template_is_well_formed() {
        for show in [Show::Bar, Show::Lines, Show::Nothing] {
            drop(Progress::bytes(show, "bytes", 1));
            drop(Progress::items(show, "items", 0));
            drop(Progress::spinner(show, "spinner"));
            drop(Progress::training(show, 1, 0));
        }
    }

    #[test]
    fn quiet_is_quiet() {
        assert_eq!(Show::on_stderr(true), Show::Nothing);
    }
}
