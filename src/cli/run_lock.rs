//! One process at a time in a run folder.

use crate::{Context, Error, Result};
use std::fs::{File, TryLockError};
use std::path::Path;

/// Keeps other processes out of a run folder for as long as it lives.
///
/// The lock is the system's own, on the folder itself: it ends with the process however that ends, so none is ever
/// stale, and no file is left behind.
pub(super) struct RunLock {
    _folder: Option<File>,
}

/// Locks a folder, which must exist.
pub(super) fn hold(folder: &Path) -> Result<RunLock> {
    // Windows opens no folders, and some file systems know no locks: there the folder is not guarded.
    if cfg!(not(unix)) {
        return Ok(RunLock { _folder: None });
    }
    let opened = File::open(folder).at(folder.display())?;
    match opened.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Error::new("another run is writing to this folder")
            .at(folder.display())
            .hint("wait until it has ended, or name another folder")),
        _ => Ok(RunLock {
            _folder: Some(opened),
        }),
    }
}

/// Locks all of these folders, or none.
pub(super) fn hold_all<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Result<Vec<RunLock>> {
    folders.into_iter().map(hold).collect()
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_second_run_is_kept_out_until_the_first_has_ended() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = hold(folder.path()).expect("nobody is there");
        let message = hold(folder.path())
            .map(drop)
            .expect_err("taken")
            .to_string();
        assert!(message.contains("another run"), "{message}");
        drop(first);
        hold(folder.path()).expect("free again");
    }

    #[test]
    fn of_several_folders_all_are_locked_or_none() {
        let folders = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
        let paths = || folders.iter().map(tempfile::TempDir::path);
        let all = hold_all(paths()).expect("nobody is there");
        assert!(paths().all(|folder| hold(folder).is_err()));
        drop(all);
        let second = hold(folders[1].path()).expect("free again");
        assert!(hold_all(paths()).is_err());
        drop(second);
        assert!(hold_all(paths()).is_ok());
    }
}
