//! Ended before their time: while they load, in the midst of a step, by a panic, and beside another process.

use super::files::contents;
use super::golden::golden;
use super::program::refused;
use super::{Place, RUNS, WEIGHTS, done, finish, half_done, nothing_is_half_written, resume, said};
use candle_core::Device;
use retune::adapters::lora::Lora;
use retune::adapters::storage::AdapterWeights;
use retune::data::{DataReport, Dataset, Example, Order};
use retune::train::{
    Budget, Checkpoints, Control, Event, Schedule, TrainOptions, TrainState, Trainer,
};
use retune::{Context, Result};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, SystemTime};

fn signal(name: &str, process: &Child) {
    let mut kill = Command::new("sh");
    kill.arg("-c").arg(format!("kill -{name} {}", process.id()));
    done(kill);
}

fn still_runs(process: &mut Child) {
    let ended = process.try_wait().expect("a child");
    assert!(ended.is_none(), "{ended:?}");
}

/// Waits until the process has made this file or folder.
fn until_it_has(process: &mut Child, made: &Path) {
    while !made.exists() {
        still_runs(process);
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until the process has begun to read the pipe; its other end, by which nothing ever comes.
fn until_it_reads(process: &mut Child, pipe: &Path) -> File {
    let (sender, opened) = mpsc::channel();
    let path = pipe.to_owned();
    // Opening waits for a reader, and would do so for ever if the process ended without reading.
    thread::spawn(move || drop(sender.send(File::options().write(true).open(path))));
    loop {
        if let Ok(end) = opened.recv_timeout(Duration::from_millis(1)) {
            return end.expect("a pipe");
        }
        still_runs(process);
    }
}

/// Interrupts the process, and again as soon as it has said that it heard; what it said in all.
fn interrupted_twice(mut process: Child) -> String {
    let mut errors = BufReader::new(process.stderr.take().expect("a pipe"));
    let mut text = String::new();
    signal("INT", &process);
    while !text.contains("press Ctrl-C again") {
        let read = errors.read_line(&mut text).expect("UTF-8");
        assert!(read > 0, "{text}");
    }
    signal("INT", &process);
    errors.read_to_string(&mut text).expect("UTF-8");
    let status = process.wait().expect("ended");
    assert_eq!(status.code(), Some(130), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

#[test]
fn a_run_that_is_ended_while_it_loads_has_changed_nothing() {
    let place = Place::new();
    let run = RUNS[0];
    let (begun, fresh) = (place.path("begun"), place.path("fresh"));
    let expected = half_done(place.train(run, &begun), &begun);
    let before = contents(&begun);

    let data = fs::read(&place.data).expect("the data");
    fs::remove_file(&place.data).expect("removed");
    let mut pipe = Command::new("mkfifo");
    pipe.arg(&place.data);
    done(pipe);
    for is_killed in [true, false] {
        for mut command in [resume(&begun), place.train(run, &fresh)] {
            let mut process = command.spawn().expect("started");
            let _data = until_it_reads(&mut process, &place.data);
            if is_killed {
                process.kill().expect("killed");
                process.wait().expect("ended");
            } else {
                interrupted_twice(process);
            }
            assert!(contents(&begun) == before, "killed: {is_killed}");
            assert!(!fresh.exists(), "killed: {is_killed}");
        }
    }
    fs::remove_file(&place.data).expect("removed");
    fs::write(&place.data, data).expect("written");

    for out in [&begun, &fresh] {
        assert!(finish(&place, run, out) == expected);
    }
}

#[test]
fn a_second_interruption_ends_a_run_in_the_midst_of_a_step() {
    let place = Place::new();
    let out = place.path("out");
    let mut train = place.train(RUNS[0], &out);
    // A step that takes far longer than two signals.
    train.args(["--steps", "1", "--batch-size", "100000"]);
    let mut process = train.spawn().expect("started");
    until_it_has(&mut process, &out.join("metrics.jsonl"));
    let text = interrupted_twice(process);
    assert!(!text.contains("everything is saved"), "{text}");
    let begun = contents(&out.join("checkpoints"));
    assert!(begun.keys().all(|file| file.ends_with("inputs.json")));
    assert!(!out.join(WEIGHTS).exists());
}

#[test]
fn a_living_run_is_left_alone_and_a_killed_one_leaves_no_lock() {
    let place = Place::new();
    let options = ["--dropout", "0.2", "--steps", "300", "--save-every", "50"];
    let run = ("lora", &options[..]);
    let whole = place.path("whole");
    done(place.train(run, &whole));
    let expected = fs::read(whole.join(WEIGHTS)).expect("an adapter");

    let out = place.path("out");
    let mut living = place.train(run, &out).spawn().expect("started");
    until_it_has(&mut living, &out.join("checkpoints/step-000050"));
    // It lives, and does not come to its end meanwhile.
    signal("STOP", &living);
    let mut again = place.train(run, &out);
    again.arg("--overwrite");
    // A lock that went by the clock would be a stale one now.
    let folder = File::open(&out).expect("a folder");
    folder
        .set_modified(SystemTime::UNIX_EPOCH)
        .expect("another time");
    for other in [resume(&out), again] {
        let named = ["another run is writing to this folder"];
        refused(&said(other), 1, &named);
    }
    living.kill().expect("killed");
    living.wait().expect("ended");
    assert!(finish(&place, run, &out) == expected);
}

#[test]
fn a_panic_in_the_midst_of_a_run_loses_nothing_that_was_saved() -> Result<()> {
    let dataset = |tokens: std::ops::Range<u32>| Dataset {
        examples: tokens
            .map(|first| Example::new((first..first + 5).collect(), vec![true; 5]))
            .collect(),
        report: DataReport::default(),
    };
    let (data, held_out) = (dataset(5..12), dataset(30..33));
    let options = TrainOptions {
        budget: Budget::Steps(9),
        batch_size: 2,
        learning_rate: 1e-2,
        schedule: Schedule::Constant,
        save_every: 2,
        eval_every: 3,
        ..TrainOptions::default()
    };
    let method = Lora {
        dropout: 0.2,
        ..Lora::default()
    };
    let run = |folder: &Path, panic_at: Option<&str>| -> Result<(Vec<Vec<f32>>, TrainState)> {
        let weights = AdapterWeights::fresh(0, &Device::Cpu);
        let model = retune::model::load(&golden("models/llama"), &method, weights, None)?;
        let checkpoints = Checkpoints::of_run(folder);
        let mut trainer = Trainer::new(model.decoder.as_ref(), &model.weights, &options)?;
        if checkpoints.newest_folder()?.is_some() {
            trainer.resume(&checkpoints)?;
        }
        trainer.run(
            &data,
            &mut Order::shuffled(data.len(), 1),
            Some(&held_out),
            Some(&checkpoints),
            &mut |event| {
                let now = match event {
                    Event::Step(report) => format!("step {}", report.step),
                    Event::Evaluated(report) => format!("evaluated after {}", report.step),
                    Event::Saving(state) => format!("saving after {}", state.step),
                    Event::Saved(state) => format!("saved after {}", state.step),
                    Event::Skipped(_) | Event::Spiked(_) => "unlike the others".to_owned(),
                };
                assert!(panic_at != Some(now.as_str()), "the caller fails at {now}");
                Ok(Control::Continue)
            },
        )?;
        let mut values = Vec::new();
        for (_, var) in model.weights.iter() {
            values.push(var.as_tensor().flatten_all()?.to_vec1::<f32>()?);
        }
        let state = TrainState {
            seconds: 0.0,
            ..trainer.state().clone()
        };
        Ok((values, state))
    };

    let undisturbed = tempfile::tempdir().context("a folder")?;
    let whole = run(undisturbed.path(), None)?;
    for (panic_at, saved) in [
        ("evaluated after 0", None),
        ("step 1", None),
        ("step 5", Some("step-000004")),
        ("saved after 6", Some("step-000006")),
        ("evaluated after 9", Some("step-000008")),
    ] {
        let folder = tempfile::tempdir().context("a folder")?;
        let panicked = catch_unwind(AssertUnwindSafe(|| run(folder.path(), Some(panic_at))));
        assert!(panicked.is_err(), "{panic_at}");
        nothing_is_half_written(folder.path());
        let newest = Checkpoints::of_run(folder.path()).newest_folder()?;
        let expected = saved.map(|name| folder.path().join("checkpoints").join(name));
        assert_eq!(newest, expected, "{panic_at}");
        assert!(run(folder.path(), None)? == whole, "{panic_at}");
    }
    Ok(())
}
