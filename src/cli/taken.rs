//! What lies in a folder already that a command would take the place of, or that stands in its way.

use crate::train::run_folder::has_own_file;
use crate::{Error, Result};
use std::path::Path;

/// Those of `names` under which `folder` has what a file would take the place of.
///
/// A folder is not among them: no file takes its place, and [`refuse_obstacles`] names it.
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

/// The work of another command: what it is called, and whether a folder holds it.
pub(super) type Work = (&'static str, fn(&Path) -> bool);

/// Fails if `folder` holds one of these works, which no option replaces.
pub(super) fn refuse_works(folder: &Path, works: &[Work]) -> Result<()> {
    match works.iter().find(|(_, is_there)| is_there(folder)) {
        None => Ok(()),
        Some((work, _)) => Err(Error::new(format!("the folder holds {work}"))
            .at(folder.display())
            .hint("name another folder with `--out`")),
    }
}

/// Fails by whatever stands in `folder` under one of `names` and is not a file: a folder, a link, a pipe.
///
/// For all names that a command writes or removes, before it has worked or removed anything.
pub(super) fn refuse_obstacles(folder: &Path, names: &[&str]) -> Result<()> {
    names
        .iter()
        .try_for_each(|name| has_own_file(&folder.join(name)).map(drop))
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
        refuse_obstacles(folder.path(), &["file", "none"]).expect("no obstacle");
        let obstacle = refuse_obstacles(folder.path(), &names).expect_err("a folder");
        assert!(obstacle.to_string().contains("folder: "), "{obstacle}");
        let message = error(folder.path(), &expected).to_string();
        assert!(message.contains("already holds `file`"), "{message}");
        assert_eq!(message.contains("`link` (a link)"), cfg!(unix));
    }
}
