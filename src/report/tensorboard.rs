//! Event files for TensorBoard: `tensorboard --logdir <run folder>`.
//!
//! A file is a list of records (length, checksum, bytes, checksum), each an `Event` message of TensorFlow's
//! `event.proto`. Only the fields that scalars need are declared here.

use super::metrics::{EvalReport, StepReport};
use crate::{Context, Result};
use crc::{CRC_32_ISCSI, Crc};
use prost::{Message, Oneof};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What the name of a file begins with; the second when it was begun follows.
const NAME: &str = "events.out.tfevents.";

/// The last second that the name of a file in `folder` says.
fn newest(folder: &Path) -> Option<u64> {
    let seconds = |name: &str| {
        let rest = name.strip_prefix(NAME)?;
        rest.split('.').next()?.parse::<u64>().ok()
    };
    folder
        .read_dir()
        .ok()?
        .flatten()
        .filter_map(|entry| seconds(&entry.file_name().to_string_lossy()))
        .max()
}

/// The event file of a run in progress.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Starts a new file in `folder`, under a name that TensorBoard looks for.
    pub fn create(folder: &Path) -> Result<Self> {
        // TensorBoard reads files in the order of their names, whatever the clock has done meanwhile.
        let after = newest(folder).map_or(0, |newest| newest.saturating_add(1));
        let time = (seconds_since_1970() as u64).max(after);
        let host = gethostname::gethostname().to_string_lossy().into_owned();
        let process = std::process::id();
        let mut number = 0;
        let (path, file) = loop {
            let name = format!("{NAME}{time:010}.{host}.{process}.{number}");
            let path = folder.join(name);
            match File::create_new(&path) {
                Ok(file) => break (path, file),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(error).at(path.display()),
            }
        };
        let mut events = Self { path, file };
        events.write(0, What::FileVersion("brain.Event:2".to_owned()))?;
        Ok(events)
    }

    /// Removes the files in `folder`, and it as well unless something else lies there.
    pub fn remove_all(folder: &Path) -> Result<()> {
        let mut others = false;
        for entry in folder.read_dir().at(folder.display())? {
            let entry = entry.at(folder.display())?;
            let is_file = entry.file_type().at(entry.path().display())?.is_file();
            match is_file && entry.file_name().to_string_lossy().starts_with(NAME) {
                true => std::fs::remove_file(entry.path()).at(entry.path().display())?,
                false => others = true,
            }
        }
        match others {
            true => Ok(()),
            false => std::fs::remove_dir(folder).at(folder.display()),
        }
    }

    /// Starts a further file for a run that is resumed after `step`.
    ///
    /// It tells TensorBoard to forget what earlier files say of later steps, for these will be made again.
    pub fn resume(folder: &Path, step: u64) -> Result<Self> {
        let mut events = Self::create(folder)?;
        let start = SessionLog {
            status: SESSION_START,
        };
        events.write(step.saturating_add(1), What::SessionLog(start))?;
        Ok(events)
    }

    /// Adds a training step.
    pub fn step(&mut self, report: &StepReport) -> Result<()> {
        self.scalars(
            report.step,
            &[
                ("train/loss", report.loss),
                ("train/learning_rate", report.learning_rate),
                ("train/gradient_norm", report.gradient_norm),
                ("train/tokens_per_second", report.tokens_per_second),
            ],
        )
    }

    /// Adds an evaluation.
    pub fn eval(&mut self, report: &EvalReport) -> Result<()> {
        self.scalars(report.step, &[("eval/loss", report.eval_loss)])?;
        match report.accuracy {
            Some(accuracy) => self.scalars(report.step, &[("eval/accuracy", accuracy)]),
            None => Ok(()),
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let values = values
            .iter()
            .map(|(tag, value)| Value {
                tag: (*tag).to_owned(),
                simple_value: Some(*value as f32),
            })
            .collect();
        self.write(step, What::Summary(Summary { values }))
    }

    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let event = Event {
            wall_time: seconds_since_1970(),
            step: step as i64,
            what: Some(what),
        };
        // One call, so that a reader never sees half a record of a living run.
        self.file
            .write_all(&record(&event.encode_to_vec()))
            .at(self.path.display())
    }
}

/// `data` as one record of a TFRecord file.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_checksum(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_checksum(data).to_le_bytes());
    record
}

/// CRC-32C, changed so that the checksum of data that holds checksums is sound too.
fn masked_checksum(data: &[u8]) -> u32 {
    const CHECKSUM: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
    CHECKSUM
        .checksum(data)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

fn seconds_since_1970() -> f64 {
    // A clock before 1970 is wrong anyway.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |duration| duration.as_secs_f64())
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    // Optional, because a plain zero would not be written at all.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SessionLog.START` in `event.proto`.
const SESSION_START: i32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of a file whose lengths and checksums all hold.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).expect("a file");
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let number = |range: std::ops::Range<usize>| {
                u32::from_le_bytes(rest[range].try_into().expect("four bytes"))
            };
            let length = u64::from_le_bytes(rest[..8].try_into().expect("eight bytes")) as usize;
            let data = &rest[12..12 + length];
            assert_eq!(number(8..12), masked_checksum(&rest[..8]));
            assert_eq!(number(12 + length..16 + length), masked_checksum(data));
            events.push(Event::decode(data).expect("an event"));
            rest = &rest[16 + length..];
        }
        events
    }

    fn scalars(events: &[Event]) -> Vec<(i64, String, f32)> {
        let mut scalars = Vec::new();
        for event in events {
            if let Some(What::Summary(summary)) = &event.what {
                for value in &summary.values {
                    let number = value.simple_value.expect("a number");
                    scalars.push((event.step, value.tag.clone(), number));
                }
            }
        }
        scalars
    }

    #[test]
    fn checksums_are_the_known_ones() {
        // RFC 3720, B.4: 32 bytes of zeros have CRC-32C 0x8a9136aa.
        let plain = masked_checksum(&[0; 32])
            .wrapping_sub(0xa282_ead8)
            .rotate_left(15);
        assert_eq!(plain, 0x8a91_36aa);
        // tensorboard's `masked_crc32c(b"abc")`.
        assert_eq!(masked_checksum(b"abc"), 0x21f1_576e);
    }

    #[test]
    fn a_record_has_the_known_bytes() {
        let event = Event {
            wall_time: 1.0,
            step: 300,
            what: Some(What::Summary(Summary {
                values: vec![Value {
                    tag: "eval/loss".to_owned(),
                    simple_value: Some(0.5),
                }],
            })),
        };
        // What tensorboard 2.21's own `RecordWriter` writes for the same event.
        let mut expected = vec![0x20, 0, 0, 0, 0, 0, 0, 0, 0x29, 0xed, 0xa9, 0x50];
        expected.extend([0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0x10, 0xac, 0x02]);
        expected.extend([0x2a, 0x12, 0x0a, 0x10, 0x0a, 0x09]);
        expected.extend(b"eval/loss");
        expected.extend([0x15, 0, 0, 0, 0x3f, 0x3d, 0x2e, 0x42, 0x43]);
        assert_eq!(record(&event.encode_to_vec()), expected);
    }

    #[test]
    fn a_file_holds_each_scalar() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut file = EventFile::create(folder.path()).expect("a new file");
        let report = StepReport {
            step: 7,
            loss: 1.25,
            learning_rate: 0.0,
            gradient_norm: 0.5,
            target_tokens: 10,
            tokens_per_second: 100.0,
            peak_memory_bytes: 1,
            epoch: 0.1,
        };
        file.step(&report).expect("written");
        let report = EvalReport {
            step: 7,
            eval_loss: 2.5,
            eval_tokens: 10,
            accuracy: Some(0.75),
            epoch: 0.1,
        };
        file.eval(&report).expect("written");

        let events = read(file.path());
        assert_eq!(
            events[0].what,
            Some(What::FileVersion("brain.Event:2".to_owned()))
        );
        let expected = [
            ("train/loss", 1.25),
            ("train/learning_rate", 0.0),
            ("train/gradient_norm", 0.5),
            ("train/tokens_per_second", 100.0),
            ("eval/loss", 2.5),
            ("eval/accuracy", 0.75),
        ];
        assert_eq!(
            scalars(&events),
            expected.map(|(tag, value)| (7, tag.to_owned(), value))
        );
    }

    #[test]
    fn a_resumed_run_has_a_file_of_its_own() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = EventFile::create(folder.path()).expect("a new file");
        let second = EventFile::resume(folder.path(), 40).expect("a further file");
        assert_ne!(first.path(), second.path());
        let events = read(second.path());
        assert_eq!(events[1].step, 41);
        let start = SessionLog {
            status: SESSION_START,
        };
        assert_eq!(events[1].what, Some(What::SessionLog(start)));
    }
}
