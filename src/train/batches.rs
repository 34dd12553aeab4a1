//! The batches of steps to come, made ready on a thread of their own.

use super::options::TrainOptions;
use crate::data::{Batch, Dataset, Order, passes};
use crate::guard::{guarded, no_thread};
use crate::{Error, Result};
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, Scope};

/// What a step takes of the data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StepBatch {
    /// Its examples, counted from 0 in the data.
    pub(super) examples: Vec<usize>,
    /// The same, cut into passes.
    pub(super) passes: Vec<Batch>,
}

/// The batches of a run, one for each step and in their order: while a step runs, the next one's batch is made ready, so
/// that a GPU is not left waiting for it.
///
/// A batch follows from the number of its step. One that was made ready for a step that is never taken leaves no trace,
/// and what fails in making it is the error of that step alone.
pub(super) struct Batches(Receiver<Result<StepBatch>>);

impl Batches {
    /// Those of `steps`, counted from 0, made by a thread of `scope` that ends after the last of them, or when this is
    /// dropped.
    pub(super) fn ahead<'scope>(
        scope: &'scope Scope<'scope, '_>,
        steps: Range<usize>,
        data: &'scope Dataset,
        order: &'scope mut Order,
        options: &'scope TrainOptions,
    ) -> Result<Self> {
        // Nothing is kept in between: a batch is begun when the one before it has been taken.
        let (sender, receiver) = sync_channel(0);
        let make = move || {
            for step in steps {
                let batch = guarded(&format!("the batch of step {}", step + 1), || {
                    batch_of(step, data, order, options)
                });
                let failed = batch.is_err();
                // A batch that nobody takes any more: the run has ended early.
                if sender.send(batch).is_err() || failed {
                    break;
                }
            }
        };
        Builder::new()
            .spawn_scoped(scope, make)
            .map_err(|error| no_thread(&error))?;
        Ok(Self(receiver))
    }

    /// The next step's, as soon as it is ready.
    pub(super) fn next(&self) -> Result<StepBatch> {
        let batch = self.0.recv();
        batch.unwrap_or_else(|_| Err(Error::new("there is no batch for a further step")))
    }
}

/// The batch of `step`, counted from 0.
pub(super) fn batch_of(
    step: usize,
    data: &Dataset,
    order: &mut Order,
    options: &TrainOptions,
) -> StepBatch {
    let batch_size = options.batch_size as u64;
    let position = step as u64 * batch_size;
    let examples = order.examples(position..position + batch_size);
    let chosen: Vec<_> = examples
        .iter()
        .map(|index| &data.examples[*index])
        .collect();
    StepBatch {
        passes: passes(&chosen, options.tokens_per_pass),
        examples,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Example;
    use std::thread;

    fn data(examples: usize) -> Dataset {
        let example = |index: usize| {
            let length = 1 + index % 4;
            Example::new(vec![index as u32; length], vec![true; length])
        };
        Dataset {
            examples: (0..examples).map(example).collect(),
            ..Dataset::default()
        }
    }

    fn options() -> TrainOptions {
        TrainOptions {
            batch_size: 3,
            tokens_per_pass: 5,
            ..TrainOptions::default()
        }
    }

    #[test]
    fn batches_are_those_of_their_steps_from_wherever_a_run_goes_on() -> Result<()> {
        let (data, options) = (data(7), options());
        let made_ahead = |steps: Range<usize>| -> Result<Vec<StepBatch>> {
            let mut order = Order::shuffled(7, 1);
            thread::scope(|scope| -> Result<_> {
                let batches = Batches::ahead(scope, steps.clone(), &data, &mut order, &options)?;
                steps.map(|_| batches.next()).collect()
            })
        };
        let whole = made_ahead(0..9)?;
        // Epochs end within the third, the fifth and at the end of the seventh.
        let mut order = Order::shuffled(7, 1);
        for (step, batch) in (0..).zip(&whole) {
            let examples = order.examples(3 * step..3 * step + 3);
            let chosen: Vec<_> = examples
                .iter()
                .map(|index| &data.examples[*index])
                .collect();
            assert_eq!(batch.passes, passes(&chosen, 5));
            assert_eq!(batch.examples, examples);
        }
        assert!(whole.iter().any(|batch| batch.passes.len() > 1));
        assert_eq!(made_ahead(4..9)?, whole[4..]);
        Ok(())
    }

    #[test]
    fn a_run_that_ends_early_waits_for_nothing() -> Result<()> {
        let (data, options) = (data(7), options());
        let mut order = Order::as_stored(7);
        for taken in [0, 1, 3] {
            thread::scope(|scope| -> Result<()> {
                let batches = Batches::ahead(scope, 0..usize::MAX, &data, &mut order, &options)?;
                (0..taken).try_for_each(|_| batches.next().map(drop))
            })?;
        }
        Ok(())
    }

    #[test]
    fn a_panic_is_the_error_of_its_step_alone() -> Result<()> {
        let (data, options) = (data(5), options());
        let mut order = Order::as_stored(7);
        let mut taken = |count: usize| {
            thread::scope(|scope| -> Result<()> {
                let batches = Batches::ahead(scope, 0..4, &data, &mut order, &options)?;
                (0..count).try_for_each(|_| batches.next().map(drop))
            })
        };
        taken(1)?;
        let error = taken(2).expect_err("there is no sixth example").to_string();
        assert!(
            error.starts_with("the batch of step 2 cannot be used: "),
            "{error}"
        );
        Ok(())
    }

    #[test]
    fn after_the_last_batch_there_is_an_error() -> Result<()> {
        let (data, options) = (data(3), options());
        let mut order = Order::as_stored(3);
        thread::scope(|scope| -> Result<()> {
            let batches = Batches::ahead(scope, 0..1, &data, &mut order, &options)?;
            batches.next()?;
            let error = batches.next().expect_err("one step, one batch");
            assert_eq!(error.to_string(), "there is no batch for a further step");
            Ok(())
        })
    }
}
