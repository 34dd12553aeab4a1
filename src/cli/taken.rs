//! What lies in a folder already that a command would take the place of.

use crate::{Context, Error, Result};
use std::path::Path;

/// How all names begin that lie among the checkpoints of a run.
pub(super) const CHECKPOINTS: [&str; 2] = ["step-", ".writing-"];

/// Those of `names` under which `folder` has what a file would take the place of.
///
/// A folder is not among them: no file takes its place, and the attempt says so.
pub(super) fn files<'a>(folder: &Path, names: &[&'a str]) -> Vec<&'a str> {
    let mut taken = names.to_vec();
    taken.retain(|name| {
        let metadata = folder.join(name).symlink_metadata();
        metadata.is_ok_and(|metadata| !metadata.is_dir())
    });
    taken
}

/// The error that `folder` holds these already.
pub(super) fn error(folder: &Path, names: &[&str]) -> Error {
    let named: Vec<String> = names
        .iter()
        .map(|name| match folder.join(name).is_symlink() {
            true => format!("`{name}` (a link)"),
            false => format!("`{name}`"),
        })
        .collect();
    let named = named.join(", ");
    Error::new(format!("the folder already holds {named}")).at(folder.display())
}

/// Refuses a `folder` of a run, which is removed as a whole, that holds what no run has put there: names that begin unlike
/// its `own`. It need not exist.
pub(super) fn refuse_others(folder: &Path, own: &[&str]) -> Result<()> {
    // What cannot be listed is not removed either.
    let Ok(entries) = folder.read_dir() else {
        return Ok(());
    };
    for entry in entries {
        let name = entry.at(folder.display())?.file_name();
        let name = name.to_string_lossy();
        if !own.iter().any(|start| name.starts_with(start)) {
            return Err(Error::new(
                "no run wrote this, and it would be removed with the run's own files",
            )
            .at(folder.join(&*name).display())
            .hint("move it away, or name another folder"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_links_are_taken_and_folders_are_not() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("file"), "mine").expect("written");
        std::fs::create_dir(folder.path().join("folder")).expect("made");
        #[cfg(unix)]
        std::os::unix::fs::symlink("nowhere", folder.path().join("link")).expect("linked");
        let expected = match cfg!(unix) {
            true => vec!["file", "link"],
            false => vec!["file"],
        };
        let names = ["file", "folder", "link", "none"];
        assert_eq!(files(folder.path(), &names), expected);
        assert!(files(&folder.path().join("none"), &names).is_empty());
        let message = error(folder.path(), &expected).to_string();
        assert!(message.contains("already holds `file`"), "{message}");
        assert_eq!(message.contains("`link` (a link)"), cfg!(unix));
    }

    #[test]
    fn what_no_run_wrote_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["step-000004", ".writing-a1b2c3"] {
            std::fs::create_dir(folder.path().join(name)).expect("made");
        }
        refuse_others(folder.path(), &CHECKPOINTS).expect("a run's own");
        refuse_others(&folder.path().join("none"), &CHECKPOINTS).expect("nothing");
        std::fs::write(folder.path().join("notes.txt"), "mine").expect("written");
        let error = refuse_others(folder.path(), &CHECKPOINTS).expect_err("somebody's own");
        assert!(error.to_string().contains("notes.txt"), "{error}");
        assert!(error.hint_text().is_some());
    }
}
