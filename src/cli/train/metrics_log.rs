//! The metrics that a run writes down while it goes on.

use super::arguments::TrainArgs;
use crate::Result;
use crate::report::metrics::{EvalReport, METRICS_FILE, MetricsFile, StepReport};
use crate::report::tensorboard::EventFile;
use crate::train::run_folder::{has_own_folder, make_folder};
use std::path::Path;

/// Folder of TensorBoard's files in a run folder.
pub(super) const EVENT_FOLDER: &str = "tensorboard";

/// `metrics.jsonl`, and TensorBoard's files if they were asked for.
pub(super) struct MetricsLog {
    metrics: MetricsFile,
    events: Option<EventFile>,
}

impl MetricsLog {
    /// That of a new run, or of one that is `resumed` after so many steps, which may be none.
    pub(super) fn open(arguments: &TrainArgs, resumed: Option<usize>) -> Result<Self> {
        let events = if arguments.tensorboard {
            let folder = arguments.out.join(EVENT_FOLDER);
            make_folder(&folder)?;
            Some(match resumed {
                None => EventFile::create(&folder)?,
                Some(step) => EventFile::resume(&folder, step as u64)?,
            })
        } else {
            None
        };
        let metrics = arguments.out.join(METRICS_FILE);
        let metrics = match resumed {
            None => MetricsFile::create(&metrics)?,
            Some(step) => MetricsFile::append(&metrics, step as u64)?,
        };
        Ok(Self { metrics, events })
    }

    pub(super) fn step(&mut self, report: &StepReport) -> Result<()> {
        self.metrics.step(report)?;
        self.events
            .as_mut()
            .map_or(Ok(()), |events| events.step(report))
    }

    pub(super) fn eval(&mut self, report: &EvalReport) -> Result<()> {
        self.metrics.eval(report)?;
        self.events
            .as_mut()
            .map_or(Ok(()), |events| events.eval(report))
    }

    /// Makes what `metrics.jsonl` has so far survive a power failure.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.metrics.sync()
    }
}

/// Removes TensorBoard's files of a run that starts again.
pub(super) fn remove_events(run: &Path) -> Result<()> {
    let events = run.join(EVENT_FOLDER);
    if has_own_folder(&events)? {
        EventFile::remove_all(&events)?;
    }
    Ok(())
}
