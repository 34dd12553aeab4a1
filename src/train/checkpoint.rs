//! Checkpoints of a run: everything that the rest of it depends on.
//!
//! `checkpoints/step-000040/` holds `weights.safetensors`, `optimizer.safetensors`, `best.safetensors` (when held-out
//! data is scored), `state.json`, which also says how long these are, and `SHA256SUMS` over all of them, which
//! `sha256sum -c` checks too. A folder is written under another name and renamed when all of it is on the disk; it is
//! read only after every file has been found to be what was written.

use super::inputs::Inputs;
use super::optimizer::AdamW;
use crate::adapters::storage::{
    AdapterWeights, read_adapter_tensors, read_small, read_text, write_bytes,
};
use crate::atomic::{parent, swap, sync_folder};
use crate::digest::hexadecimal;
use crate::{Context, Error, IntoError, Result};
use candle_core::{Shape, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Version of the layout; a reader refuses others.
const VERSION: u32 = 2;

const WEIGHTS: &str = "weights.safetensors";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
const BEST: &str = "best.safetensors";
const STATE: &str = "state.json";
const SUMS: &str = "SHA256SUMS";

/// How the name of a folder begins that is not complete.
const WRITING: &str = ".writing-";

/// Where a run stands. Random streams and the data cursor follow from the step and the run's seed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Optimizer steps taken, those left out included.
    pub step: usize,
    /// Steps left out: not finite, or far above those before them.
    pub skipped: usize,
    /// How many of them were the last steps.
    pub skipped_in_a_row: usize,
    /// Losses of the last steps that were taken, by which the next is judged, oldest first.
    #[serde(default)]
    pub recent_losses: Vec<f64>,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// The newest evaluation's loss.
    pub final_eval_loss: Option<f64>,
    /// Evaluations since the best one.
    pub evaluations_without_gain: usize,
    /// Seconds spent in steps.
    pub seconds: f64,
    /// Tokens that went through the model in steps.
    pub tokens: u64,
}

/// The evaluation with the lowest loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps before it.
    pub step: usize,
    /// Its loss.
    pub loss: f64,
}

/// The checkpoints of one run folder.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    inputs: Option<Inputs>,
}

/// One checkpoint, read back.
#[derive(Debug)]
pub struct Saved {
    /// Where it lies.
    pub folder: PathBuf,
    /// Where the run stood.
    pub state: TrainState,
    /// The trained weights.
    pub weights: BTreeMap<String, Tensor>,
    /// AdamW's moments.
    pub optimizer: BTreeMap<String, Tensor>,
    /// The weights of the best evaluation.
    pub best: BTreeMap<String, Tensor>,
    /// Newer checkpoints that were passed over, newest first.
    pub damaged: Vec<Damaged>,
}

impl Saved {
    /// The trained weight `name` as it was saved, in the shape that it has now; so is its best value, if one is kept.
    pub(super) fn weight(&self, name: &str, now: &Tensor) -> Result<&Tensor> {
        if !self.best.is_empty() {
            expect_tensor(&self.best, name, now.shape())
                .map_err(|error| self.not_the_runs(BEST, error))?;
        }
        expect_tensor(&self.weights, name, now.shape())
            .map_err(|error| self.not_the_runs(WEIGHTS, error))
    }

    /// The error of a file whose checksum is right, and which holds something else than the run.
    pub(super) fn not_the_runs(&self, file: &str, error: Error) -> Error {
        error.at(self.folder.join(file).display()).hint(
            "the checkpoint is of another run, or someone changed it: remove its folder, and the one before is used",
        )
    }
}

/// The tensor `name`, which must be there and have this shape.
pub(super) fn expect_tensor<'a>(
    tensors: &'a BTreeMap<String, Tensor>,
    name: &str,
    shape: &Shape,
) -> Result<&'a Tensor> {
    match tensors.get(name) {
        Some(tensor) if tensor.shape() == shape => Ok(tensor),
        Some(tensor) => Err(Error::new(format!(
            "`{name}` is {:?}, the run has {:?}",
            tensor.dims(),
            shape.dims()
        ))),
        None => Err(Error::new(format!("there is no `{name}` in it"))),
    }
}

/// A checkpoint whose files are not what was written.
#[derive(Debug)]
pub struct Damaged {
    /// Where it lies.
    pub folder: PathBuf,
    /// The file that shows it, and how.
    pub reason: Error,
}

impl fmt::Display for Damaged {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} is damaged ({})",
            self.folder.display(),
            self.reason
        )
    }
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    version: u32,
    state: TrainState,
    #[serde(default)]
    inputs: Option<Inputs>,
    /// The other files, and how long they are.
    bytes: BTreeMap<String, u64>,
}

/// What a state file of any version says.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Why a checkpoint cannot be used.
enum Fault {
    /// Its files are not what was written: the one before it may still be intact.
    Damaged(Error),
    /// It is as it was written, and not for this version: an older one would not be what was asked for.
    Refused(Error),
}

impl Fault {
    /// A file that is not there is damage. One that cannot be read today may be whole tomorrow.
    fn of_reading(error: io::Error, path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::IsADirectory => {
                Self::Damaged(error.into_error().at(name))
            }
            _ => Self::Refused(error.into_error().at(path.display())),
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Damaged(error)
    }
}

impl Checkpoints {
    /// The checkpoints below `run`, which need not exist yet.
    pub fn of_run(run: &Path) -> Self {
        Self {
            folder: run.join("checkpoints"),
            inputs: None,
        }
    }

    /// The same, of a run on these inputs: they are saved with each checkpoint, and one of a run on others is refused.
    pub fn on(self, inputs: Inputs) -> Self {
        Self {
            inputs: Some(inputs),
            ..self
        }
    }

    /// Writes a checkpoint and removes all but the newest `keep`, of which those do not count that were found `damaged`.
    ///
    /// When it returns, the checkpoint survives a power failure. An earlier one of the same step changes places with it,
    /// and nothing is removed before.
    pub fn save(
        &self,
        state: &TrainState,
        weights: &AdapterWeights,
        optimizer: &AdamW,
        best: &BTreeMap<String, Tensor>,
        keep: usize,
        damaged: &[Damaged],
    ) -> Result<()> {
        fs::create_dir_all(&self.folder).at(self.folder.display())?;
        sync_folder(parent(&self.folder))?;
        let weights: BTreeMap<String, Tensor> = weights
            .iter()
            .map(|(name, var)| (name.to_owned(), var.as_tensor().clone()))
            .collect();
        let mut writing = Writing::begin(&self.folder)?;
        writing.tensors(WEIGHTS, &weights)?;
        writing.tensors(OPTIMIZER, &optimizer.state().0)?;
        if !best.is_empty() {
            writing.tensors(BEST, best)?;
        }
        let complete = writing.finish(state, self.inputs.clone())?;

        let folder = self.folder.join(format!("step-{:06}", state.step));
        let placed = if folder.exists() {
            swap(complete.path(), &folder)
        } else {
            fs::rename(complete.path(), &folder)
        };
        placed.at(folder.display())?;
        sync_folder(&self.folder)?;
        // Under the temporary name is nothing any more, or what was replaced, which goes with the other remains.
        drop(complete.keep());
        self.remove_old(state.step, keep, damaged)
    }

    /// The run folder, if it exists yet.
    pub fn run(&self) -> Option<&Path> {
        self.folder.parent().filter(|run| run.is_dir())
    }

    /// The newest intact checkpoint.
    ///
    /// A damaged one is passed over for the one before it, and the result says so. One of another version or of a run on
    /// other inputs is an error, however many there are before it.
    pub fn latest(&self) -> Result<Saved> {
        let mut damaged = Vec::new();
        for (_, folder) in self.folders()?.into_iter().rev() {
            match intact(&folder) {
                Ok(file) => return self.read(folder, file, damaged),
                Err(Fault::Damaged(reason)) => damaged.push(Damaged { folder, reason }),
                Err(Fault::Refused(error)) => return Err(error),
            }
        }
        if damaged.is_empty() {
            return Err(Error::new("no checkpoint to resume from")
                .at(self.folder.display())
                .hint(
                    "a run leaves checkpoints with `--save-every N`, and where it is interrupted or a step fails",
                ));
        }
        let each: Vec<String> = damaged.iter().map(ToString::to_string).collect();
        Err(
            Error::new(format!("no checkpoint is intact: {}", each.join("; "))).hint(
                "put the files back from a copy, or remove these folders and start the run again",
            ),
        )
    }

    /// The folder of the newest checkpoint, intact or not.
    pub fn newest_folder(&self) -> Result<Option<PathBuf>> {
        Ok(self.folders()?.pop().map(|(_, folder)| folder))
    }

    /// The folder of the newest checkpoint whose files are what was written.
    pub fn newest_intact(&self) -> Result<Option<PathBuf>> {
        let mut folders = self.folders()?.into_iter().map(|(_, folder)| folder);
        Ok(folders.rfind(|folder| intact(folder).is_ok()))
    }

    /// Removes all checkpoints.
    pub fn remove(&self) -> Result<()> {
        // Out of sight first: half of a checkpoint would be taken for a damaged one.
        for (step, folder) in self.folders()? {
            let hidden = self.folder.join(format!("{WRITING}{step}"));
            fs::rename(&folder, &hidden).at(folder.display())?;
        }
        if self.folder.exists() {
            fs::remove_dir_all(&self.folder).at(self.folder.display())?;
        }
        Ok(())
    }

    /// Reads the files of an intact checkpoint.
    fn read(&self, folder: PathBuf, file: StateFile, damaged: Vec<Damaged>) -> Result<Saved> {
        if let (Some(saved), Some(found)) = (&file.inputs, &self.inputs) {
            saved.refuse_others(found).at(folder.display())?;
        }
        Ok(Saved {
            state: file.state,
            weights: read_adapter_tensors(&folder.join(WEIGHTS))?,
            optimizer: read_adapter_tensors(&folder.join(OPTIMIZER))?,
            best: if file.bytes.contains_key(BEST) {
                read_adapter_tensors(&folder.join(BEST))?
            } else {
                BTreeMap::new()
            },
            damaged,
            folder,
        })
    }

    /// Removes what the checkpoint of `step`, just saved, leaves without use: all but the newest `keep` up to it, those
    /// found `damaged` that still are, what a killed process left behind, and later ones. Had these been intact, the run
    /// would have gone on from them.
    fn remove_old(&self, step: usize, keep: usize, damaged: &[Damaged]) -> Result<()> {
        let is_damaged = |folder: &Path| {
            damaged.iter().any(|damaged| damaged.folder == folder) && intact(folder).is_err()
        };
        let (kept, mut removed): (Vec<_>, Vec<_>) = self
            .folders()?
            .into_iter()
            .partition(|(other, folder)| *other == step || (*other < step && !is_damaged(folder)));
        let surplus = kept.len().saturating_sub(keep.max(1));
        removed.extend(kept.into_iter().take(surplus));
        let remains = self.entries()?.into_iter();
        let remains = remains.filter(|(name, _)| name.starts_with(WRITING));
        let removed = removed.into_iter().map(|(_, folder)| folder);
        for folder in removed.chain(remains.map(|(_, folder)| folder)) {
            fs::remove_dir_all(&folder).at(folder.display())?;
        }
        Ok(())
    }

    /// Step and folder of every checkpoint, oldest first.
    fn folders(&self) -> Result<Vec<(usize, PathBuf)>> {
        let mut folders: Vec<_> = self
            .entries()?
            .into_iter()
            .filter_map(|(name, path)| {
                let step: usize = name.strip_prefix("step-")?.parse().ok()?;
                Some((step, path))
            })
            .collect();
        folders.sort();
        Ok(folders)
    }

    /// Name and path of everything that lies among the checkpoints.
    fn entries(&self) -> Result<Vec<(String, PathBuf)>> {
        if !self.folder.exists() {
            return Ok(Vec::new());
        }
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.folder).at(self.folder.display())? {
            let entry = entry.at(self.folder.display())?;
            let name = entry.file_name().to_string_lossy().into_owned();
            entries.push((name, entry.path()));
        }
        Ok(entries)
    }
}

/// A checkpoint under its temporary name.
struct Writing {
    folder: TempDir,
    /// Length of each file so far.
    bytes: BTreeMap<String, u64>,
    /// What `SHA256SUMS` will say.
    sums: String,
}

impl Writing {
    fn begin(beside: &Path) -> Result<Self> {
        Ok(Self {
            folder: tempfile::Builder::new()
                .prefix(WRITING)
                .tempdir_in(beside)
                .at(beside.display())?,
            bytes: BTreeMap::new(),
            sums: String::new(),
        })
    }

    fn tensors(&mut self, name: &str, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let bytes = safetensors::serialize(tensors.iter(), None).at(name)?;
        self.file(name, &bytes)
    }

    /// The checksum is of what is meant to be written, so that it tells when something else is read.
    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let sum = hexadecimal(&Sha256::digest(bytes));
        self.sums.push_str(&format!("{sum}  {name}\n"));
        self.bytes.insert(name.to_owned(), bytes.len() as u64);
        write_bytes(&self.folder.path().join(name), bytes)
    }

    /// Adds the state and the checksums. Each file and its name in the folder are on the disk then.
    fn finish(mut self, state: &TrainState, inputs: Option<Inputs>) -> Result<TempDir> {
        let state_file = StateFile {
            version: VERSION,
            state: state.clone(),
            inputs,
            bytes: self.bytes.clone(),
        };
        let json = serde_json::to_vec_pretty(&state_file).context("cannot write the state")?;
        self.file(STATE, &json)?;
        write_bytes(&self.folder.path().join(SUMS), self.sums.as_bytes())?;
        Ok(self.folder)
    }
}

/// The state of a checkpoint, if every file of it is what was written.
fn intact(folder: &Path) -> Result<StateFile, Fault> {
    let path = folder.join(STATE);
    let text = read_small(&path).map_err(|error| Fault::of_reading(error, &path))?;
    let sums = read_sums(&folder.join(SUMS));
    if let Ok(sums) = &sums {
        compare(sums, STATE, &hexadecimal(&Sha256::digest(&text)))?;
    }
    // Without checksums it may be of another version: the first had none, and a later one may keep them elsewhere.
    let found: Version = serde_json::from_slice(&text).at(STATE)?;
    if found.version != VERSION {
        let error = Error::new(format!(
            "layout version {} is not known here",
            found.version
        ));
        return Err(Fault::Refused(
            error
                .at(path.display())
                .hint("resume with the version of retune that wrote it"),
        ));
    }
    let sums = sums?;
    let file: StateFile = serde_json::from_slice(&text).at(STATE)?;
    for (name, written) in &file.bytes {
        if ![WEIGHTS, OPTIMIZER, BEST].contains(&name.as_str()) {
            let error = Error::new(format!("names `{name}`, which is no part of a checkpoint"));
            return Err(Fault::Damaged(error.at(STATE)));
        }
        let path = folder.join(name);
        let length = fs::metadata(&path)
            .map_err(|error| Fault::of_reading(error, &path))?
            .len();
        if length != *written {
            let fact = format!("has {length} bytes, and {written} were written");
            return Err(Fault::Damaged(Error::new(fact).at(name)));
        }
        let sum = sum_of_file(&path).map_err(|error| Fault::of_reading(error, &path))?;
        compare(&sums, name, &sum)?;
    }
    Ok(file)
}

/// The checksum of each file, by its name.
fn read_sums(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = read_text(path).at(SUMS)?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once("  "))
        .map(|(sum, name)| (name.to_owned(), sum.to_owned()))
        .collect())
}

fn compare(sums: &BTreeMap<String, String>, name: &str, found: &str) -> Result<()> {
    match sums.get(name) {
        Some(written) if written == found => Ok(()),
        Some(_) => Err(Error::new(format!("its checksum is not the one in `{SUMS}`")).at(name)),
        None => Err(Error::new(format!("has no checksum in `{SUMS}`")).at(name)),
    }
}

/// The SHA-256 of a file, which is never in memory as a whole.
fn sum_of_file(path: &Path) -> io::Result<String> {
    let mut hash = HashWriter(Sha256::new());
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(hexadecimal(&hash.0.finalize()))
}

struct HashWriter(Sha256);

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::storage::Init;
    use candle_core::{DType, Device};

    const FILES: [&str; 5] = [SUMS, BEST, OPTIMIZER, STATE, WEIGHTS];

    /// Saves a checkpoint of `step` with every value of every tensor equal to `value`.
    fn write(
        checkpoints: &Checkpoints,
        (step, value): (usize, f32),
        keep: usize,
        damaged: &[Damaged],
    ) -> Result<()> {
        let tensor = Tensor::from_vec(vec![value; 6], (2, 3), &Device::Cpu)?;
        let mut weights = AdapterWeights::fresh(0, &Device::Cpu);
        weights.var("a", (2, 3), Init::Values(&tensor))?;
        let mut optimizer = AdamW::new(&weights)?;
        let moments = BTreeMap::from([
            ("first.a".to_owned(), tensor.clone()),
            ("second.a".to_owned(), tensor.clone()),
        ]);
        optimizer.restore(&moments, step as u64)?;
        let best = BTreeMap::from([("a".to_owned(), tensor)]);
        let state = TrainState {
            step,
            ..TrainState::default()
        };
        checkpoints.save(&state, &weights, &optimizer, &best, keep, damaged)
    }

    fn save(checkpoints: &Checkpoints, steps: &[usize]) -> Result<()> {
        steps
            .iter()
            .try_for_each(|step| write(checkpoints, (*step, *step as f32), 9, &[]))
    }

    /// A run's checkpoints of steps 20 and 40, and the folder of the newer one.
    fn two(run: &TempDir) -> Result<(Checkpoints, PathBuf)> {
        let checkpoints = Checkpoints::of_run(run.path());
        save(&checkpoints, &[20, 40])?;
        let newest = checkpoints.newest_folder()?.expect("saved");
        Ok((checkpoints, newest))
    }

    fn run() -> TempDir {
        tempfile::tempdir().expect("a folder")
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name())
            .map(|name| name.into_string().expect("UTF-8"))
            .collect();
        names.sort();
        names
    }

    fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).expect("a file");
        change(&mut bytes);
        fs::write(path, bytes).expect("written");
    }

    /// Asserts that the newest checkpoint is passed over for that of step 20, and why.
    fn passed_over(checkpoints: &Checkpoints, newest: &Path, reason: &str) -> Result<()> {
        let saved = checkpoints.latest()?;
        assert_eq!(saved.state.step, 20, "{reason}");
        assert_eq!(saved.damaged.len(), 1, "{reason}");
        assert_eq!(saved.damaged[0].folder, newest);
        let said = saved.damaged[0].to_string();
        assert!(said.contains("step-000040 is damaged"), "{said}");
        assert!(said.contains(reason), "no `{reason}` in {said}");
        assert_eq!(checkpoints.newest_intact()?, Some(saved.folder));
        Ok(())
    }

    #[test]
    fn a_checkpoint_comes_back_as_it_was_saved() -> Result<()> {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        let saved = checkpoints.latest()?;
        assert_eq!((saved.state.step, &saved.folder), (40, &newest));
        for (tensors, name) in [
            (&saved.weights, "a"),
            (&saved.optimizer, "first.a"),
            (&saved.optimizer, "second.a"),
            (&saved.best, "a"),
        ] {
            assert_eq!(tensors[name].to_vec2::<f32>()?, [[40.0; 3]; 2], "{name}");
        }
        assert!(saved.damaged.is_empty());
        assert_eq!(names(&newest), FILES);
        Ok(())
    }

    #[test]
    fn the_checksums_are_those_of_sha256sum() -> Result<()> {
        let run = run();
        let (_, newest) = two(&run)?;
        let sums = fs::read_to_string(newest.join(SUMS)).expect("the checksums");
        let mut lines = Vec::new();
        for name in [WEIGHTS, OPTIMIZER, BEST, STATE] {
            let bytes = fs::read(newest.join(name)).expect("a file");
            lines.push(format!(
                "{}  {name}\n",
                hexadecimal(&Sha256::digest(&bytes))
            ));
        }
        assert_eq!(sums, lines.concat());
        // FIPS 180-2, appendix B.1.
        fs::write(newest.join(STATE), "abc").expect("written");
        assert_eq!(
            sum_of_file(&newest.join(STATE)).expect("a file"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        Ok(())
    }

    #[test]
    fn a_damaged_checkpoint_is_named_and_the_one_before_is_used() -> Result<()> {
        type Damage = fn(&mut Vec<u8>);
        let cut: Damage = |bytes| bytes.truncate(20);
        let longer: Damage = |bytes| bytes.push(0);
        let flipped: Damage = |bytes| {
            if let Some(last) = bytes.last_mut() {
                *last ^= 0x80;
            }
        };
        let emptied: Damage = Vec::clear;
        let garbage: Damage = |bytes| *bytes = b"{ \"version\": 2".to_vec();
        let other_sum = "its checksum is not the one in `SHA256SUMS`";
        for (name, damage, reason) in [
            (WEIGHTS, cut, "has 20 bytes, and "),
            (OPTIMIZER, longer, " were written"),
            (BEST, emptied, "has 0 bytes, and "),
            (WEIGHTS, flipped, other_sum),
            (OPTIMIZER, flipped, other_sum),
            (BEST, flipped, other_sum),
            (STATE, cut, other_sum),
            (STATE, garbage, other_sum),
            (SUMS, cut, "has no checksum in `SHA256SUMS`"),
            (SUMS, emptied, "has no checksum in `SHA256SUMS`"),
        ] {
            let run = run();
            let (checkpoints, newest) = two(&run)?;
            change(&newest.join(name), damage);
            passed_over(&checkpoints, &newest, reason)?;
        }
        for name in FILES {
            let run = run();
            let (checkpoints, newest) = two(&run)?;
            fs::remove_file(newest.join(name)).expect("removed");
            let reason = format!("({name}: no such file or folder)");
            passed_over(&checkpoints, &newest, &reason)?;
        }
        // Without checksums it is the text alone that tells.
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        fs::remove_file(newest.join(SUMS)).expect("removed");
        change(&newest.join(STATE), garbage);
        passed_over(&checkpoints, &newest, "(state.json: not valid JSON")
    }

    #[test]
    fn no_flipped_bit_of_state_or_checksums_goes_unseen() -> Result<()> {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        for name in [STATE, SUMS] {
            let path = newest.join(name);
            let whole = fs::read(&path).expect("a file");
            for place in 0..whole.len() {
                change(&path, |bytes| bytes[place] ^= 1);
                // Not even a version that became another one keeps the one before from being used.
                passed_over(&checkpoints, &newest, "SHA256SUMS")?;
                fs::write(&path, &whole).expect("written");
            }
        }
        assert!(checkpoints.latest()?.damaged.is_empty());
        Ok(())
    }

    #[test]
    fn when_all_are_damaged_the_error_names_each() -> Result<()> {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        change(&newest.join(WEIGHTS), |bytes| bytes.truncate(20));
        let older = newest.with_file_name("step-000020");
        fs::remove_file(older.join(STATE)).expect("removed");
        let error = checkpoints.latest().expect_err("all are damaged");
        let said = error.to_string();
        for part in [
            "no checkpoint is intact",
            &format!(
                "{} is damaged (weights.safetensors: has 20 bytes",
                newest.display()
            ),
            &format!("{} is damaged (state.json: no such file", older.display()),
        ] {
            assert!(said.contains(part), "no `{part}` in {said}");
        }
        assert!(error.hint_text().is_some());
        assert_eq!(checkpoints.newest_intact()?, None);
        assert_eq!(names(&run.path().join("checkpoints")).len(), 2);

        let none = Checkpoints::of_run(&run.path().join("other"));
        let error = none.latest().expect_err("there is none");
        assert!(error.to_string().ends_with("no checkpoint to resume from"));
        Ok(())
    }

    #[test]
    fn another_version_is_refused_although_an_older_one_would_do() -> Result<()> {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        let set_version = |from: u32, to: u32| {
            let path = newest.join(STATE);
            let text = fs::read_to_string(&path).expect("the state");
            let said = |version: u32| format!("\"version\": {version}");
            assert!(text.contains(&said(from)), "{text}");
            fs::write(&path, text.replace(&said(from), &said(to))).expect("written");
        };
        let refused = |version: u32| {
            let error = checkpoints.latest().expect_err("another version");
            let fact = format!("state.json: layout version {version} is not known here");
            assert!(error.to_string().ends_with(&fact), "{error}");
            assert!(error.hint_text().is_some());
        };
        let path = newest.join(STATE);
        let before = sum_of_file(&path).expect("the state");
        set_version(VERSION, 3);
        let after = sum_of_file(&path).expect("the state");
        let sums = fs::read_to_string(newest.join(SUMS)).expect("the checksums");
        fs::write(newest.join(SUMS), sums.replace(&before, &after)).expect("written");
        refused(3);
        // The first version had no checksums.
        fs::remove_file(newest.join(SUMS)).expect("removed");
        set_version(3, 1);
        refused(1);
        Ok(())
    }

    #[test]
    fn a_run_on_other_inputs_is_refused_although_an_older_one_would_do() -> Result<()> {
        let run = run();
        let on = |data: &str| {
            Checkpoints::of_run(run.path()).on(Inputs {
                base: "base".to_owned(),
                weights: None,
                training: None,
                method: "method".to_owned(),
                data: data.to_owned(),
                held_out: None,
                order: None,
                device: "cpu".to_owned(),
                compute_type: "f32".to_owned(),
                quantization: None,
            })
        };
        save(&on("mine"), &[20])?;
        save(&on("other"), &[40])?;
        let error = on("mine").latest().expect_err("other data");
        assert!(
            error.to_string().contains("the training data has changed"),
            "{error}"
        );
        Ok(())
    }

    #[test]
    fn the_newest_are_kept_and_the_one_just_saved_always() -> Result<()> {
        let run = run();
        let (checkpoints, _) = two(&run)?;
        let folder = run.path().join("checkpoints");
        write(&checkpoints, (60, 60.0), 2, &[])?;
        assert_eq!(names(&folder), ["step-000040", "step-000060"]);
        write(&checkpoints, (80, 80.0), 0, &[])?;
        assert_eq!(names(&folder), ["step-000080"]);
        Ok(())
    }

    #[test]
    fn damaged_checkpoints_do_not_count_among_those_kept() -> Result<()> {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        let folder = run.path().join("checkpoints");
        fs::remove_file(newest.join(BEST)).expect("removed");
        // Gone on from step 20, and saved before what is damaged: nothing older is lost to it.
        write(&checkpoints, (30, 30.0), 2, &checkpoints.latest()?.damaged)?;
        assert_eq!(names(&folder), ["step-000020", "step-000030"]);

        // Saved after what is damaged.
        save(&checkpoints, &[35])?;
        fs::remove_file(folder.join("step-000035").join(BEST)).expect("removed");
        write(&checkpoints, (40, 40.0), 3, &checkpoints.latest()?.damaged)?;
        assert_eq!(
            names(&folder),
            ["step-000020", "step-000030", "step-000040"]
        );

        // Saved in place of what is damaged: from then on it is as good as any.
        fs::remove_file(newest.join(BEST)).expect("removed");
        let damaged = checkpoints.latest()?.damaged;
        write(&checkpoints, (40, 41.0), 3, &damaged)?;
        assert_eq!(checkpoints.latest()?.state.step, 40);
        write(&checkpoints, (50, 50.0), 3, &damaged)?;
        assert_eq!(
            names(&folder),
            ["step-000030", "step-000040", "step-000050"]
        );
        Ok(())
    }

    #[test]
    fn a_step_saved_again_takes_the_place_of_the_first() -> Result<()> {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        write(&checkpoints, (40, 0.5), 2, &[])?;
        let saved = checkpoints.latest()?;
        assert_eq!(saved.folder, newest);
        assert_eq!(saved.weights["a"].to_vec2::<f32>()?, [[0.5; 3]; 2]);
        assert_eq!(names(&newest), FILES);
        assert_eq!(
            names(&run.path().join("checkpoints")),
            ["step-000020", "step-000040"]
        );
        Ok(())
    }

    #[test]
    fn removed_checkpoints_leave_a_run_without_any() -> Result<()> {
        let run = run();
        let (checkpoints, _) = two(&run)?;
        assert_eq!(checkpoints.run(), Some(run.path()));
        checkpoints.remove()?;
        assert_eq!(checkpoints.newest_folder()?, None);
        assert!(names(run.path()).is_empty());
        checkpoints.remove()?;
        assert_eq!(Checkpoints::of_run(&run.path().join("other")).run(), None);
        Ok(())
    }

    #[test]
    fn a_tensor_of_another_run_is_named_with_what_is_wrong() -> Result<()> {
        let run = run();
        let (checkpoints, _) = two(&run)?;
        let saved = checkpoints.latest()?;
        let tensor = |dims: (usize, usize)| Tensor::zeros(dims, DType::F32, &Device::Cpu);
        assert_eq!(saved.weight("a", &tensor((2, 3))?)?.dims(), [2, 3]);
        for (name, dims, fact) in [
            ("a", (3, 2), "`a` is [2, 3], the run has [3, 2]"),
            ("b", (2, 3), "there is no `b` in it"),
        ] {
            let error = saved.weight(name, &tensor(dims)?).expect_err(fact);
            assert!(error.to_string().ends_with(fact), "{error}");
        }
        Ok(())
    }

    #[test]
    fn what_a_killed_process_left_is_no_checkpoint_and_goes_with_the_next() -> Result<()> {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        let left = newest.with_file_name(".writing-1a2b3c");
        fs::create_dir(&left).expect("a folder");
        fs::write(left.join(WEIGHTS), b"half").expect("a file");
        assert_eq!(checkpoints.latest()?.state.step, 40);
        assert!(checkpoints.latest()?.damaged.is_empty());
        save(&checkpoints, &[60])?;
        assert_eq!(
            names(&run.path().join("checkpoints")),
            ["step-000020", "step-000040", "step-000060"]
        );
        Ok(())
    }
}
