//! Whether a checkpoint is what was written.

use super::state::{StateFile, VERSION, version};
use super::{BEST, OPTIMIZER, STATE, SUMS, WEIGHTS, step_of};
use crate::adapters::storage::{read_small, read_text};
use crate::digest::hexadecimal;
use crate::train::run_folder::has_own_file;
use crate::{Context, Error, IntoError, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

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

/// Why a checkpoint cannot be used.
pub(super) enum Fault {
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
            io::ErrorKind::NotADirectory => {
                Self::Damaged(Error::new("a file, and a folder is needed"))
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

/// The state of a checkpoint, if every file of it is what was written.
pub(super) fn intact(folder: &Path) -> Result<StateFile, Fault> {
    let path = folder.join(STATE);
    length(&path)?;
    let text = read_small(&path).map_err(|error| Fault::of_reading(error, &path))?;
    let sums = read_sums(&folder.join(SUMS));
    if let Ok(sums) = &sums {
        compare(sums, STATE, &hexadecimal(&Sha256::digest(&text)))?;
    }
    // Without checksums it may be of another version: the first had none, and a later one may keep them elsewhere.
    let found = version(&text).at(STATE)?;
    if found != VERSION {
        let error = Error::new(format!("layout version {found} is not known here"));
        return Err(Fault::Refused(
            error
                .at(path.display())
                .hint("resume with the version of retune that wrote it"),
        ));
    }
    let sums = sums?;
    let file: StateFile = serde_json::from_slice(&text).at(STATE)?;
    if step_of(folder) != Some(file.state.step) {
        let fact = format!("is of step {}, unlike its folder", file.state.step);
        return Err(Fault::Damaged(Error::new(fact).at(STATE)));
    }
    for (name, written) in &file.bytes {
        check_file(folder, name, *written, &sums)?;
    }
    Ok(file)
}

/// Finds the file `name` of a checkpoint to be as long as was `written`, and to have its checksum in `sums`.
fn check_file(
    folder: &Path,
    name: &str,
    written: u64,
    sums: &BTreeMap<String, String>,
) -> Result<(), Fault> {
    if ![WEIGHTS, OPTIMIZER, BEST].contains(&name) {
        let error = Error::new(format!("names `{name}`, which is no part of a checkpoint"));
        return Err(Fault::Damaged(error.at(STATE)));
    }
    let path = folder.join(name);
    let length = length(&path)?;
    if length != written {
        let fact = format!("has {length} bytes, and {written} were written");
        return Err(Fault::Damaged(Error::new(fact).at(name)));
    }
    let sum = sum_of_file(&path).map_err(|error| Fault::of_reading(error, &path))?;
    compare(sums, name, &sum).map_err(Fault::Damaged)
}

/// The length of a file of a checkpoint. What else is in its place is damage, and is not opened: a pipe has no end.
fn length(path: &Path) -> Result<u64, Fault> {
    let metadata = path
        .symlink_metadata()
        .map_err(|error| Fault::of_reading(error, path))?;
    has_own_file(path)?;
    Ok(metadata.len())
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
pub(crate) fn sum_of_file(path: &Path) -> io::Result<String> {
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
    use std::fs;

    #[test]
    fn the_checksum_of_a_file_is_that_of_the_standard() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        fs::write(&file, "abc").expect("written");
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            sum_of_file(&file).expect("a file"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
