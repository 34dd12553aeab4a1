//! Memory of long runs and of long examples. One test, alone in its process: memory is the process's.
#![cfg(target_os = "linux")]

mod golden;

use candle_core::Device;
use golden::golden;
use retune::adapters::lora::Lora;
use retune::adapters::storage::AdapterWeights;
use retune::data::{DataReport, Dataset, Example, Order};
use retune::report::memory::{peak_bytes, reset_peak, resident_bytes};
use retune::train::{Budget, Control, Event, TrainOptions, Trainer};
use retune::{Result, model};

const MIB: u64 = 1 << 20;

fn example(length: usize) -> Example {
    let tokens = (0..length).map(|position| (position * 7 % 31) as u32);
    Example::new(tokens.collect(), vec![true; length])
}

fn dataset(lengths: impl Iterator<Item = usize>) -> Dataset {
    Dataset {
        examples: lengths.map(example).collect(),
        report: DataReport::default(),
    }
}

#[test]
fn memory_grows_neither_with_steps_nor_with_the_square_of_the_length() -> Result<()> {
    let method = Lora::default();
    let weights = AdapterWeights::fresh(0, &Device::Cpu);
    let model = model::load(&golden("models/llama"), &method, weights, None)?;
    let run = |steps: usize, batch_size: usize, data: &Dataset, on_step: &mut dyn FnMut(u64)| {
        let options = TrainOptions {
            budget: Budget::Steps(steps),
            batch_size,
            ..TrainOptions::default()
        };
        Trainer::new(model.decoder.as_ref(), &model.weights, &options)?.run(
            data,
            &mut Order::shuffled(data.len(), 0),
            None,
            None,
            &mut |event| {
                if let Event::Step(report) = event {
                    on_step(report.step);
                }
                Ok(Control::Continue)
            },
        )
    };

    // Examples of many lengths, so that no two steps are alike.
    let (mut early, mut late) = (0, 0);
    run(
        1000,
        3,
        &dataset((0..97).map(|index| 10 + index * 2)),
        &mut |step| {
            let now = resident_bytes().expect("Linux says");
            match step {
                ..=300 => early = early.max(now),
                701.. => late = late.max(now),
                _ => {}
            }
        },
    )?;
    assert!(late < early + 4 * MIB, "{early} bytes early, {late} late");

    // Scores of all pairs would be 1 GiB for each head.
    let before = resident_bytes().expect("Linux says");
    assert!(reset_peak());
    run(1, 1, &dataset(std::iter::once(1 << 14)), &mut |_| {})?;
    let used = peak_bytes().expect("Linux says") - before;
    assert!(used < 256 * MIB, "{} MiB", used / MIB);
    Ok(())
}
