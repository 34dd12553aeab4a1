//! The folder of one repository in the cache: blobs by content, snapshots by commit, references by name.

use super::{HubId, Progress, checkpoint};
use crate::{Context, Error, Result};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) struct Cache {
    /// `models--org--name`.
    folder: PathBuf,
    locks: PathBuf,
}

impl Cache {
    pub(super) fn new(root: &Path, id: &HubId) -> Self {
        let name = format!("models--{}", id.repository().replace('/', "--"));
        Self {
            folder: root.join(&name),
            locks: root.join(".locks").join(name),
        }
    }

    /// The folder of a commit. The files in it are links to blobs.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Where a blob grows, under the name that huggingface_hub gives it.
    pub(super) fn partial(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    pub(super) fn partial_size(&self, etag: &str) -> u64 {
        fs::metadata(self.partial(etag)).map_or(0, |file| file.len())
    }

    /// Puts a blob into a snapshot under its name, by a relative link where the system has links.
    pub(super) fn link(&self, etag: &str, commit: &str, file: &str) -> Result<()> {
        let snapshot = self.snapshot(commit);
        fs::create_dir_all(&snapshot).at(snapshot.display())?;
        let place = snapshot.join(file);
        // A link to a blob that was deleted is in the way.
        if place.symlink_metadata().is_ok() {
            fs::remove_file(&place).at(place.display())?;
        }
        let target = Path::new("..").join("..").join("blobs").join(etag);
        #[cfg(unix)]
        let linked = std::os::unix::fs::symlink(&target, &place);
        #[cfg(windows)]
        let linked = std::os::windows::fs::symlink_file(&target, &place);
        let blob = self.blob(etag);
        linked
            .or_else(|_| fs::hard_link(&blob, &place))
            .or_else(|_| fs::rename(&blob, &place))
            .at(place.display())
    }

    /// Notes which commit a branch or tag stands for.
    pub(super) fn set_reference(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).at(folder.display())?;
        let mut file = tempfile::NamedTempFile::new_in(folder).at(folder.display())?;
        std::io::Write::write_all(&mut file, commit.as_bytes()).at(path.display())?;
        file.persist(&path)
            .map_err(|error| error.error)
            .at(path.display())?;
        Ok(())
    }

    /// Keeps other processes, Python's included, from writing the same blob. Held until the file is dropped.
    pub(super) fn lock(&self, etag: &str, file: &str, progress: &mut dyn Progress) -> Result<File> {
        fs::create_dir_all(&self.locks).at(self.locks.display())?;
        let path = self.locks.join(format!("{etag}.lock"));
        let lock = File::options()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .at(path.display())?;
        let mut told = false;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::WouldBlock) => {}
                // Some network file systems have no locks; a download is worth more than the protection.
                Err(TryLockError::Error(_)) => return Ok(lock),
            }
            if !told {
                progress.notice(&format!(
                    "another process is downloading `{file}`: waiting for it"
                ));
                told = true;
            }
            if progress.stop_requested() {
                return Err(Error::interrupted(
                    "stopped while waiting for another download",
                ));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// The snapshot of a revision, if all that a model needs is in it.
    pub(super) fn complete_snapshot(&self, id: &HubId) -> Result<PathBuf> {
        let reference = fs::read_to_string(self.folder.join("refs").join(id.revision())).ok();
        let commit = reference.as_deref().map_or(id.revision(), str::trim);
        let snapshot = self.snapshot(commit);
        if !is_commit(commit) || !snapshot.is_dir() {
            let error = Error::new(format!("`{id}` is not in the cache")).at(self.folder.display());
            return Err(match self.references().as_slice() {
                [] => error,
                others => error.hint(format!(
                    "the cache has these revisions of it: {}",
                    checkpoint::listed(others)
                )),
            });
        }
        let mut missing = Vec::new();
        if !snapshot.join("config.json").is_file() {
            missing.push("config.json".to_owned());
        }
        if !snapshot.join(checkpoint::SINGLE).is_file() {
            match snapshot.join(checkpoint::INDEX).is_file() {
                true => missing.extend(
                    checkpoint::shard_files(&snapshot)?
                        .into_iter()
                        .filter(|shard| !snapshot.join(shard).is_file()),
                ),
                false => missing.push(checkpoint::SINGLE.to_owned()),
            }
        }
        if missing.is_empty() {
            return Ok(snapshot);
        }
        Err(Error::new(format!(
            "the copy of `{id}` in the cache is incomplete: it lacks {}",
            checkpoint::listed(&missing)
        ))
        .at(snapshot.display()))
    }

    /// The names in `refs` that stand on its first level.
    fn references(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.join("refs")).into_iter().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| {
                entry
                    .ok()
                    .filter(|entry| entry.path().is_file())?
                    .file_name()
                    .into_string()
                    .ok()
            })
            .collect();
        names.sort();
        names
    }
}

/// Whether a text is a full commit hash: the only thing that may name a snapshot folder.
pub(super) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|digit| digit.is_ascii_hexdigit())
}
