//! The rows that an unfinished comparison has so far, in one small file that is replaced as a whole.

use super::{ADAPTER_FILES, BASE, Contender, Row, Task};
use crate::adapters::storage::{read_small, write_bytes};
use crate::data::Dataset;
use crate::model::ModelConfig;
use crate::model::checkpoint::Checkpoint;
use crate::train::run_folder::{has_own_file, has_own_folder};
use crate::train::{
    Moved, RecordedOptions, base_digest, changed_option, refuse_changed, sum_of_file, unchanged,
};
use crate::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What every row is made from, most of it as digests. Comparisons that do not say one of the last three were begun before
/// it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sources {
    base: String,
    data: String,
    held_out: String,
    unrelated: Option<String>,
    /// Device and compute type.
    #[serde(default = "on_cpu")]
    placement: String,
    /// The methods' defaults are this version's.
    version: String,
    /// Every byte of the base's weights.
    weights: Option<String>,
    /// The training options, without those in which rows differ.
    training: Option<RecordedOptions>,
    /// How many held-out examples each row answers.
    answers: Option<usize>,
    /// What computes: rows of another are no error, but said.
    machine: Option<String>,
}

impl Sources {
    /// Those of `task` and its `contenders`, which train with the same options but for their rates and seeds.
    pub(super) fn of(task: &Task, contenders: &[Contender]) -> Result<Self> {
        let checkpoint = Checkpoint::open(task.base)?;
        let training = contenders
            .first()
            .map(|contender| RecordedOptions::of(&contender.options))
            .transpose()?;
        Ok(Self {
            base: base_digest(&checkpoint.fingerprint()?, &ModelConfig::read(task.base)?),
            data: task.data.digest(),
            held_out: task.held_out.digest(),
            unrelated: task.unrelated.map(Dataset::digest),
            placement: task.placement.summary(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            weights: Some(checkpoint.digest().sha256),
            training: training.map(|options| options.without(&["learning_rate", "seed"])),
            answers: Some(task.answers),
            machine: Some(task.placement.machine()),
        })
    }

    /// The digest of the base's weights.
    pub(super) fn weights(&self) -> &str {
        self.weights.as_deref().unwrap_or_default()
    }

    fn refuse_others(&self, found: &Self) -> Result<()> {
        let option = changed_option(self.training.as_ref(), found.training.as_ref());
        let pairs = [
            (
                option.as_deref().unwrap_or("an option has"),
                option.is_none(),
            ),
            (
                "`exact-match` has",
                unchanged(self.answers.as_ref(), found.answers.as_ref()),
            ),
            ("the base has", self.base == found.base),
            (
                "the base has",
                unchanged(self.weights.as_ref(), found.weights.as_ref()),
            ),
            ("the training data has", self.data == found.data),
            ("the held-out data has", self.held_out == found.held_out),
            ("the unrelated data has", self.unrelated == found.unrelated),
            (
                "the device, the compute type or the quantisation has",
                self.placement == found.placement,
            ),
            ("the version of retune has", self.version == found.version),
        ];
        refuse_changed(&pairs, COMPARISON, PUT_BACK)
    }
}

const COMPARISON: &str = "the comparison";
const PUT_BACK: &str =
    "put back what it was, or start the comparison again with `retune compare --overwrite`";

/// Where a comparison ran that does not say it.
fn on_cpu() -> String {
    "cpu f32".to_owned()
}

/// The rows that are finished, and what they were made from.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FinishedRows {
    #[serde(skip)]
    file: PathBuf,
    /// Where they were computed, if the others will be elsewhere.
    #[serde(skip)]
    pub(super) moved: Option<Moved>,
    /// What they were made from.
    sources: Sources,
    /// The rows, in the order of the comparison.
    pub(super) rows: Vec<Row>,
}

impl FinishedRows {
    /// The rows in `file`, which is none where it does not exist. Fails if they were not made from `sources`.
    pub(super) fn open(file: &Path, sources: Sources) -> Result<Self> {
        if !file.exists() {
            return Ok(Self {
                file: file.to_owned(),
                moved: None,
                sources,
                rows: Vec::new(),
            });
        }
        let mut saved = Self::read(file)?;
        saved.sources.refuse_others(&sources)?;
        saved.moved = Moved::between(&saved.sources.machine, &sources.machine);
        saved.sources.machine = sources.machine;
        Ok(saved)
    }

    fn read(file: &Path) -> Result<Self> {
        const WAY_OUT: &str = "put the file back from a copy, or start the comparison again with `retune compare --overwrite`";
        let text = read_small(file).at(file.display())?;
        let saved: Self = serde_json::from_slice(&text)
            .at(file.display())
            .map_err(|error| error.hint(WAY_OUT))?;
        for row in &saved.rows {
            refuse_impossible(row).map_err(|error| error.at(file.display()).hint(WAY_OUT))?;
        }
        Ok(Self {
            file: file.to_owned(),
            ..saved
        })
    }

    /// Takes out the rows in `file` that failed, if it exists.
    pub(super) fn forget_failed(file: &Path) -> Result<()> {
        if !file.exists() {
            return Ok(());
        }
        let mut saved = Self::read(file)?;
        saved.rows.retain(|row| row.failed.is_none());
        saved.write()
    }

    /// Takes out the row of `contender` if its adapter is not what was written, and says what shows it.
    pub(super) fn forget_lost(&mut self, contender: &Contender) -> Result<Option<Error>> {
        let is_finished = |row: &Row| row.is_of(contender) && row.failed.is_none();
        let Some(index) = self.rows.iter().position(is_finished) else {
            return Ok(None);
        };
        // A link in the folder's place is no loss of what it leads to.
        has_own_folder(&contender.out)?;
        let reason = adapter_fault(&self.rows[index], &contender.out)?;
        if reason.is_some() {
            self.rows.remove(index);
        }
        Ok(reason)
    }

    /// Fails by a row that none of the `contenders` is, or two are: the file was not written by this comparison.
    pub(super) fn refuse_unasked(&self, contenders: &[Contender]) -> Result<()> {
        let unasked = self.rows.iter().enumerate().find(|(index, row)| {
            let earlier = &self.rows[..*index];
            let again = earlier
                .iter()
                .any(|other| other.method == row.method && other.seed == row.seed);
            let asked = match index {
                0 => row.method == BASE,
                _ => contenders.iter().any(|contender| row.is_of(contender)),
            };
            again || !asked
        });
        match unasked {
            None => Ok(()),
            Some((_, row)) => Err(Error::new(format!(
                "the row `{}` of seed {} is not one of this comparison",
                row.method, row.seed
            ))
            .at(self.file.display())
            .hint("start the comparison again with `retune compare --overwrite`")),
        }
    }

    /// Fails by a row that was trained at another learning rate than its contender has now.
    pub(super) fn refuse_other_rates(&self, contenders: &[Contender]) -> Result<()> {
        for row in &self.rows {
            let Some(contender) = contenders.iter().find(|contender| row.is_of(contender)) else {
                continue;
            };
            let (before, now) = (row.learning_rate, contender.options.learning_rate);
            let what = format!(
                "the learning rate of `{}`, {before} before and {now} now, has",
                row.method
            );
            refuse_changed(&[(what.as_str(), before == now)], COMPARISON, PUT_BACK)?;
        }
        Ok(())
    }

    /// Whether the row is there that was trained with this seed.
    pub(super) fn has(&self, method: &str, seed: u64) -> bool {
        self.rows
            .iter()
            .any(|row| row.method == method && row.seed == seed)
    }

    /// Adds a row: when it returns, the row survives a power failure.
    pub(super) fn add(&mut self, row: Row) -> Result<()> {
        self.rows.push(row);
        self.write()
    }

    fn write(&self) -> Result<()> {
        let json = serde_json::to_vec(self).context("cannot write the finished rows")?;
        write_bytes(&self.file, &json)
    }
}

/// What shows that `folder` does not hold the adapter of `row`, if anything does.
fn adapter_fault(row: &Row, folder: &Path) -> Result<Option<Error>> {
    for name in ADAPTER_FILES {
        let path = folder.join(name);
        match has_own_file(&path) {
            Ok(true) => {}
            Ok(false) => {
                return Ok(Some(Error::new("no such file").at(path.display())));
            }
            Err(error) => return Ok(Some(error)),
        }
        if let Some(written) = row.adapter_sha256.get(name)
            && *written != sum_of_file(&path).at(path.display())?
        {
            let error = Error::new("its checksum is another one");
            return Ok(Some(error.at(path.display())));
        }
    }
    Ok(None)
}

/// Fails by a value that no training gives, as a file has that was made by hand.
fn refuse_impossible(row: &Row) -> Result<()> {
    let (share, amount) = (0.0..=1.0, 0.0..=f64::MAX);
    // That of a sure answer may be rounded to just below zero.
    let loss = -1e-3..=f64::MAX;
    let values = [
        ("learning_rate", Some(row.learning_rate), &amount),
        ("best_eval_loss", Some(row.best_eval_loss), &loss),
        ("final_eval_loss", Some(row.final_eval_loss), &loss),
        ("token_accuracy", Some(row.token_accuracy), &share),
        ("exact_match", row.exact_match, &share),
        ("unrelated_loss", row.unrelated_loss, &loss),
        ("tokens_per_second", Some(row.tokens_per_second), &amount),
        ("seconds", Some(row.seconds), &amount),
    ];
    for (name, value, range) in values {
        // What was no number, and is null in the file, is read as NaN.
        if let Some(value) = value.filter(|value| !value.is_nan())
            && !range.contains(&value)
        {
            return Err(Error::new(format!(
                "`{name}` of the row `{}` is {value}, which it cannot be",
                row.method
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::hooks::NoAdapter;
    use crate::compare::adapter_sums;
    use crate::train::{Budget, TrainOptions};
    use std::collections::BTreeMap;

    fn sources(data: &str) -> Sources {
        Sources {
            base: "base".to_owned(),
            data: data.to_owned(),
            held_out: "held out".to_owned(),
            unrelated: None,
            placement: on_cpu(),
            version: "1".to_owned(),
            weights: Some("weights".to_owned()),
            training: None,
            answers: Some(0),
            machine: None,
        }
    }

    fn row(seed: u64) -> Row {
        Row {
            method: "lora --rank 2".to_owned(),
            seed,
            adapter: Some("lora_--rank_2".to_owned()),
            adapter_sha256: BTreeMap::new(),
            trainable_parameters: 512,
            adapter_bytes: 4096,
            learning_rate: 5e-4,
            best_eval_loss: 0.1 + 0.2,
            best_step: 20,
            final_eval_loss: 1.0 / 3.0,
            token_accuracy: 0.5,
            exact_match: None,
            unrelated_loss: Some(2.5),
            forgetting: Some(-0.1),
            tokens_per_second: 1234.5,
            seconds: 6.75,
            peak_memory_bytes: 3 << 30,
            curve: vec![(0, 2.0), (20, 0.1 + 0.2), (40, 1.0 / 3.0)],
            failed: None,
        }
    }

    #[test]
    fn rows_that_failed_are_kept_until_they_are_to_be_forgotten() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("rows.json");
        let mut finished = FinishedRows::open(&file, sources("mine"))?;
        finished.add(row(1))?;
        finished.add(Row {
            failed: Some("step 2 is not finite".to_owned()),
            token_accuracy: f64::NAN,
            ..row(2)
        })?;
        let finished = FinishedRows::open(&file, sources("mine"))?;
        assert!(finished.has("lora --rank 2", 2) && finished.rows[1].token_accuracy.is_nan());
        FinishedRows::forget_failed(&file)?;
        let finished = FinishedRows::open(&file, sources("mine"))?;
        assert_eq!(finished.rows, [row(1)]);
        FinishedRows::forget_failed(&folder.path().join("none.json"))
    }

    #[test]
    fn rows_are_read_back_as_they_were_added() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("rows.json");
        let mut finished = FinishedRows::open(&file, sources("mine"))?;
        finished.add(row(1))?;
        finished.add(row(2))?;
        let finished = FinishedRows::open(&file, sources("mine"))?;
        assert_eq!(finished.rows, [row(1), row(2)]);
        assert!(finished.has("lora --rank 2", 2));
        assert!(!finished.has("lora --rank 2", 3) && !finished.has("lora", 1));
        Ok(())
    }

    #[test]
    fn a_loss_that_is_not_finite_is_read_back_as_nan() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("rows.json");
        let mut finished = FinishedRows::open(&file, sources("mine"))?;
        finished.add(Row {
            best_eval_loss: f64::INFINITY,
            curve: vec![(0, 2.0), (20, f64::NAN)],
            ..row(1)
        })?;
        let finished = FinishedRows::open(&file, sources("mine"))?;
        let row = &finished.rows[0];
        assert!(row.best_eval_loss.is_nan());
        assert!(row.curve[0] == (0, 2.0) && row.curve[1].1.is_nan());
        Ok(())
    }

    #[test]
    fn a_row_with_a_value_that_no_training_gives_is_refused() -> Result<()> {
        type Change = fn(&mut Row);
        let cases: [(Change, &str); 5] = [
            (|row| row.token_accuracy = 7.0, "`token_accuracy`"),
            (|row| row.exact_match = Some(-0.5), "`exact_match`"),
            (|row| row.best_eval_loss = -2.0, "`best_eval_loss`"),
            (|row| row.seconds = -1e308, "`seconds`"),
            (|row| row.tokens_per_second = -1.0, "`tokens_per_second`"),
        ];
        for (change, named) in cases {
            let folder = tempfile::tempdir().expect("a folder");
            let file = folder.path().join("rows.json");
            let mut made = row(1);
            change(&mut made);
            FinishedRows::open(&file, sources("mine"))?.add(made)?;
            let error = FinishedRows::open(&file, sources("mine")).expect_err(named);
            let said = error.to_string();
            assert!(said.contains(named) && said.contains("rows.json"), "{said}");
            assert!(error.hint_text().is_some());
        }
        Ok(())
    }

    #[test]
    fn a_row_is_taken_out_when_its_adapter_is_not_what_was_written() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let contender = Contender {
            label: "lora --rank 2".to_owned(),
            method: Box::new(NoAdapter),
            options: TrainOptions {
                seed: 1,
                ..TrainOptions::default()
            },
            out: folder.path().join("lora_--rank_2"),
        };
        let write = |name: &str, text: &str| {
            std::fs::write(contender.out.join(name), text).expect("written");
        };
        let whole = || {
            std::fs::create_dir_all(&contender.out).expect("a folder");
            ADAPTER_FILES.iter().for_each(|name| write(name, name));
        };
        let lost = |row: Row| -> Result<bool> {
            let file = folder.path().join("rows.json");
            let mut finished = FinishedRows::open(&file, sources("mine"))?;
            finished.rows = vec![row];
            let reason = finished.forget_lost(&contender)?;
            assert_eq!(reason.is_some(), finished.rows.is_empty());
            Ok(reason.is_some())
        };
        whole();
        let earlier = row(1);
        let recorded = Row {
            adapter_sha256: adapter_sums(&contender.out)?,
            ..row(1)
        };
        for row in [&earlier, &recorded] {
            assert!(!lost(row.clone())?);
            for name in ADAPTER_FILES {
                std::fs::remove_file(contender.out.join(name)).expect("removed");
                assert!(lost(row.clone())?, "without {name}");
                whole();
            }
            std::fs::remove_dir_all(&contender.out).expect("removed");
            assert!(lost(row.clone())?);
            whole();
        }
        for name in ADAPTER_FILES {
            write(name, "garbage");
            assert!(lost(recorded.clone())?, "another {name}");
            assert!(!lost(earlier.clone())?);
            whole();
        }
        // Of a row that failed nothing was written, and another seed's is another's.
        let failed = Row {
            failed: Some("step 2 is not finite".to_owned()),
            ..recorded
        };
        std::fs::remove_dir_all(&contender.out).expect("removed");
        assert!(!lost(failed)? && !lost(row(2))?);
        Ok(())
    }

    #[test]
    fn rows_of_another_base_budget_or_score_are_refused() -> Result<()> {
        let trained = |steps| -> Result<Sources> {
            let options = TrainOptions {
                budget: Budget::Steps(steps),
                ..TrainOptions::default()
            };
            Ok(Sources {
                training: Some(RecordedOptions::of(&options)?),
                ..sources("mine")
            })
        };
        let begun = trained(4)?;
        begun.refuse_others(&begun)?;
        for (found, said) in [
            (trained(8)?, "`steps`, 4 before and 8 now, has changed"),
            (
                Sources {
                    weights: Some("others".to_owned()),
                    ..begun.clone()
                },
                "the base has changed",
            ),
            (
                Sources {
                    answers: Some(9),
                    ..begun.clone()
                },
                "`exact-match` has changed",
            ),
        ] {
            let error = begun.refuse_others(&found).expect_err(said);
            assert!(error.to_string().starts_with(said), "{error}");
        }
        // Begun before they were recorded.
        let earlier = Sources {
            weights: None,
            training: None,
            answers: None,
            ..begun.clone()
        };
        earlier.refuse_others(&begun)
    }

    #[test]
    fn rows_of_other_data_are_refused() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("rows.json");
        FinishedRows::open(&file, sources("mine"))?.add(row(1))?;
        let error = FinishedRows::open(&file, sources("yours")).expect_err("other data");
        assert!(
            error.to_string().contains("the training data has changed"),
            "{error}"
        );
        assert!(error.hint_text().is_some());
        Ok(())
    }
}
