//! All examples of a run, and a report of what became of its records.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::data::examples::{Made, check_kind, example};
use crate::data::order::permutation;
use crate::data::{Example, Learn, Origin, Record, Tokenizer, read_records};
use crate::digest::hexadecimal;
use crate::{Error, Result};

/// How data files become examples.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataOptions {
    /// Which tokens the loss counts.
    pub learn: Learn,
    /// The most tokens an example may have; the head is kept. No limit if `None`.
    pub max_length: Option<usize>,
    /// How many records may be unusable before loading fails.
    pub skip_bad: usize,
}

/// What became of the records. A number that is not zero and not expected deserves a line on the screen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataReport {
    /// How many records the files hold, usable or not.
    pub records: usize,
    /// How many of them were unusable and skipped.
    pub skipped: usize,
    /// The first reasons for skipping, each with file and line.
    pub skip_reasons: Vec<String>,
    /// How many examples were cut at the maximum length.
    pub truncated: usize,
    /// How many tokens the examples have together.
    pub tokens: usize,
    /// How many of them the loss counts.
    pub target_tokens: usize,
    /// The tokens of the longest example.
    pub longest: usize,
    /// Tokens that stand for text the vocabulary lacks.
    pub unknown_tokens: usize,
    /// Learned turns that the chat template changes because others follow, such as by dropping their reasoning: the
    /// model learns them as changed.
    pub rewritten_turns: usize,
    /// Learned turns with no special token at their end: the model does not learn to stop there.
    pub unended_turns: usize,
}

/// All examples of a run.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    /// The examples, in the order of the files.
    pub examples: Vec<Example>,
    /// What became of the records.
    pub report: DataReport,
}

/// How many problems an error or a report spells out.
const SHOWN: usize = 5;
/// How many records are turned into examples at a time, on all cores.
const CHUNK: usize = 1024;
/// Bytes of text of so many records, at most: fewer are taken where they are long.
const CHUNK_BYTES: usize = 64 << 20;
/// How long bad records may take to fail, all together, once there are more than are allowed: till then the others are
/// tried, so that all bad ones can be named. A chat template or a tokenizer may take seconds for each.
const PATIENCE: Duration = Duration::from_secs(2);

impl Dataset {
    /// Reads the files one after the other and makes examples of their records.
    ///
    /// Unusable records are reported together; up to `skip_bad` of them are skipped instead. Where there are more and it
    /// takes long to try the others, the first ones are reported.
    pub fn load(files: &[PathBuf], tokenizer: &Tokenizer, options: &DataOptions) -> Result<Self> {
        Self::load_within(PATIENCE, files, tokenizer, options)
    }

    fn load_within(
        patience: Duration,
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        options: &DataOptions,
    ) -> Result<Self> {
        let mut loading = Loading {
            dataset: Self::default(),
            bad: 0,
            shown: Vec::new(),
            waiting: Vec::new(),
            waiting_bytes: 0,
            spent: Duration::ZERO,
            patience,
            tokenizer,
            options,
        };
        for file in files {
            let before = loading.dataset.report.records;
            read_records(file, |origin, record| loading.take(origin, record))?;
            if loading.dataset.report.records == before {
                return Err(Error::new("the file holds no record").at(file.display()));
            }
        }
        loading.finish()
    }

    /// The number of examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// SHA-256 of the tokens and of which of them are learned, in order: equal for the same examples.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for example in &self.examples {
            hash.update((example.tokens.len() as u64).to_le_bytes());
            for (token, learn) in example.tokens.iter().zip(&example.learn) {
                hash.update(token.to_le_bytes());
                hash.update([u8::from(*learn)]);
            }
        }
        hexadecimal(&hash.finalize())
    }

    /// Tokens of the longest example.
    pub fn longest(&self) -> usize {
        let lengths = self.examples.iter().map(|example| example.tokens.len());
        lengths.max().unwrap_or(0)
    }

    /// Whether there is no example.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// Takes a fraction of the examples out, chosen by seed: what remains and what was taken, each in file order.
    ///
    /// The number taken is the fraction of all, rounded. It is an error if either side would be empty.
    pub fn split(self, fraction: f64, seed: u64) -> Result<(Self, Self)> {
        let all = self.len();
        let wanted = (all as f64 * fraction).round();
        if !(wanted >= 1.0 && wanted < all as f64) {
            return Err(Error::new(format!(
                "{fraction} of {all} examples cannot be held out: one side would be empty"
            ))
            .hint(
                "give a fraction between 0 and 1 that leaves at least one example on each side",
            ));
        }
        let mut held_out = vec![false; all];
        // A stream of its own: the training order of epoch e uses stream e.
        for index in permutation(all, seed, u64::MAX)
            .into_iter()
            .take(wanted as usize)
        {
            held_out[index] = true;
        }
        let (mut kept, mut taken) = (Self::default(), Self::default());
        for (example, held_out) in self.examples.into_iter().zip(held_out) {
            let side = if held_out { &mut taken } else { &mut kept };
            side.report.records += 1;
            side.report.count(&example);
            side.examples.push(example);
        }
        Ok((kept, taken))
    }
}

impl DataReport {
    fn count(&mut self, example: &Example) {
        self.tokens += example.tokens.len();
        self.target_tokens += example.target_tokens();
        self.longest = self.longest.max(example.tokens.len());
    }
}

/// A dataset on its way.
struct Loading<'run> {
    dataset: Dataset,
    bad: usize,
    /// The first bad records, as errors.
    shown: Vec<Error>,
    waiting: Vec<(Origin, Result<Record>)>,
    /// Bytes of text in them.
    waiting_bytes: usize,
    /// What the bad records took that are more than are allowed.
    spent: Duration,
    patience: Duration,
    tokenizer: &'run Tokenizer,
    options: &'run DataOptions,
}

impl Loading<'_> {
    fn take(&mut self, origin: Origin, record: Result<Record>) -> Result<()> {
        if let Ok(record) = &record {
            check_kind(record, self.tokenizer).map_err(|error| error.at(&origin))?;
            self.waiting_bytes += record.text_bytes();
        }
        self.dataset.report.records += 1;
        self.waiting.push((origin, record));
        if self.waiting.len() == CHUNK || self.waiting_bytes >= CHUNK_BYTES {
            self.make()?;
        }
        Ok(())
    }

    /// Makes examples of the waiting records, in their order.
    fn make(&mut self) -> Result<()> {
        let Self {
            tokenizer, options, ..
        } = *self;
        let waiting = std::mem::take(&mut self.waiting);
        self.waiting_bytes = 0;
        let found = Mutex::new(Found {
            before: self.bad,
            places: Vec::new(),
            spent: self.spent,
            patience: self.patience,
            allowed: options.skip_bad,
        });
        let found = || found.lock().unwrap_or_else(PoisonError::into_inner);
        let made: Vec<Option<Result<Made>>> = waiting
            .into_par_iter()
            .enumerate()
            .map(|(place, (origin, record))| {
                if found().ends_before(place) {
                    return None;
                }
                let started = Instant::now();
                let made = record.and_then(|record| {
                    example(&record, tokenizer, options.learn, options.max_length)
                });
                if made.is_err() {
                    found().add(place, started.elapsed());
                }
                Some(made.map_err(|error| error.at(origin)))
            })
            .collect();
        self.spent = found().spent;
        for made in made {
            match made {
                Some(Ok(made)) => self.add(made),
                Some(Err(error)) => {
                    self.bad += 1;
                    if self.shown.len() < SHOWN {
                        self.shown.push(error);
                    }
                }
                None => return Err(first_bad_records(&self.shown, options.skip_bad)),
            }
        }
        Ok(())
    }

    fn add(&mut self, made: Made) {
        let report = &mut self.dataset.report;
        report.count(&made.example);
        report.truncated += usize::from(made.truncated);
        report.rewritten_turns += made.rewritten_turns;
        report.unended_turns += made.unended_turns;
        if let Some(unknown) = self.tokenizer.unknown() {
            report.unknown_tokens += made
                .example
                .tokens
                .iter()
                .filter(|token| **token == unknown)
                .count();
        }
        self.dataset.examples.push(made.example);
    }

    fn finish(mut self) -> Result<Dataset> {
        self.make()?;
        let records = self.dataset.report.records;
        if self.bad > self.options.skip_bad {
            return Err(all_bad_records(&self.shown, self.bad, records));
        }
        if self.dataset.examples.is_empty() {
            return Err(Error::new(format!(
                "none of the {records} records is usable"
            )));
        }
        self.dataset.report.skipped = self.bad;
        self.dataset.report.skip_reasons = self.shown.iter().map(Error::to_string).collect();
        Ok(self.dataset)
    }
}

/// The bad records of a chunk, as threads find them in any order.
struct Found {
    /// How many there were before the chunk.
    before: usize,
    /// Their places in the chunk.
    places: Vec<usize>,
    spent: Duration,
    patience: Duration,
    allowed: usize,
}

impl Found {
    fn add(&mut self, place: usize, took: Duration) {
        self.places.push(place);
        if self.before + self.places.len() > self.allowed {
            self.spent += took;
        }
    }

    /// Whether the record at `place` need not be tried. Enough bad ones must lie before it: the first ones are then known,
    /// whichever thread was the fastest.
    fn ends_before(&self, place: usize) -> bool {
        let earlier = || self.places.iter().filter(|found| **found < place).count();
        self.spent >= self.patience && self.before + earlier() > self.allowed
    }
}

/// All bad records as one error.
fn all_bad_records(shown: &[Error], bad: usize, records: usize) -> Error {
    bad_records(
        &format!("{bad} of {records} records cannot be used"),
        (shown, bad),
        &format!("`--skip-bad-records {bad}` goes on without them"),
    )
}

/// The same where not all were tried: those by which there are more than `allowed`.
fn first_bad_records(shown: &[Error], allowed: usize) -> Error {
    let bad = allowed.saturating_add(1);
    bad_records(
        &format!("{bad} or more records cannot be used, and trying them all takes long"),
        (&shown[..bad.min(shown.len())], bad),
        "`--skip-bad-records N` goes on without up to N of them",
    )
}

/// Bad records as one error, with the hint of the first that has one.
fn bad_records(fact: &str, (shown, bad): (&[Error], usize), way_out: &str) -> Error {
    let mut lines: Vec<String> = shown.iter().map(|error| format!("\n  {error}")).collect();
    if bad > shown.len() {
        lines.push(format!("\n  and {} more", bad - shown.len()));
    }
    let hint = shown
        .iter()
        .find_map(Error::hint_text)
        .map_or(String::new(), |hint| format!("{hint}; "));
    Error::new(format!("{fact}:{}", lines.concat())).hint(format!("{hint}{way_out}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::golden;

    /// Four thousand conversations, of which those on the third, the fourth and a late line are refused by the template.
    /// It goes round `turns` times on each of the others.
    fn load(patience: Duration, turns: usize, skip_bad: usize) -> Result<Dataset> {
        let template = format!(
            "{{% for message in messages %}}{{% if message.content == 'bad' %}}{{{{ raise_exception('no') }}}}\
             {{% endif %}}{{% for _ in range({turns}) %}}{{% endfor %}}{{{{ message.content }}}}{{% endfor %}}"
        );
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("data.jsonl");
        let line = |number: usize| {
            let said = if [3, 4, 1501].contains(&number) {
                "bad"
            } else {
                "good as gold"
            };
            format!(r#"{{"messages": [{{"role": "user", "content": "{said}"}}]}}"#)
        };
        let lines: Vec<String> = (1..=4000).map(line).collect();
        std::fs::write(&file, lines.join("\n")).expect("written");
        let tokenizer = golden::tokenizer(&golden::read(), "byte_level", &template);
        let options = DataOptions {
            learn: Learn::All,
            skip_bad,
            ..DataOptions::default()
        };
        Dataset::load_within(patience, &[file], &tokenizer, &options)
    }

    #[test]
    fn where_it_takes_long_to_try_all_records_the_first_bad_ones_are_named() -> Result<()> {
        let lines = [3, 4, 1501];
        for skip_bad in 0..3 {
            let error = load(Duration::ZERO, 0, skip_bad).expect_err("more are bad");
            let (said, count) = (error.to_string(), skip_bad + 1);
            assert!(said.starts_with(&format!("{count} or more")), "{said}");
            for (index, line) in lines.iter().enumerate() {
                let named = said.contains(&format!("data.jsonl:{line}: the chat template"));
                assert_eq!(named, index < count, "{said}");
            }
            assert!(
                error
                    .hint_text()
                    .is_some_and(|hint| hint.contains("--skip-bad-records N"))
            );
        }
        assert_eq!(load(Duration::ZERO, 0, 3)?.report.skipped, 3);

        // What good records take does not count.
        for (patience, turns) in [(Duration::MAX, 0), (Duration::from_millis(100), 5000)] {
            let error = load(patience, turns, 0).expect_err("three are bad");
            let said = error.to_string();
            assert!(said.starts_with("3 of 4000 records"), "{said}");
            for line in lines {
                assert!(said.contains(&format!("data.jsonl:{line}: ")), "{said}");
            }
            let hint = error.hint_text().unwrap_or_default();
            assert!(hint.contains("--skip-bad-records 3"), "{hint}");
        }
        Ok(())
    }
}
