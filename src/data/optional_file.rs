//! Files that a folder may lack, told apart from those that are there and cannot be read.

use crate::{Context, Error, Result};
use std::fs::Metadata;
use std::io::ErrorKind;
use std::path::Path;

/// Whether there is a file at `path`. Absent is only what nothing has the name of: where a link leads nowhere, or a folder,
/// a pipe or a device stands in its place, going on without the file would silently give other results. That is an error.
pub(crate) fn has_file(path: &Path) -> Result<bool> {
    let fact = match behind_links(path)? {
        None => return Ok(false),
        Some(found) if found.is_file() => return Ok(true),
        Some(found) if found.is_dir() => "this is a folder, and a file is needed",
        Some(_) => "a pipe or a device, and a file is needed",
    };
    Err(Error::new(fact).at(path.display()))
}

/// The same of a folder.
pub(crate) fn has_folder(path: &Path) -> Result<bool> {
    let fact = match behind_links(path)? {
        None => return Ok(false),
        Some(found) if found.is_dir() => return Ok(true),
        Some(found) if found.is_file() => "this is a file, and a folder is needed",
        Some(_) => "a pipe or a device, and a folder is needed",
    };
    Err(Error::new(fact).at(path.display()))
}

/// What has this name or is linked to from it; `None` if nothing has it.
fn behind_links(path: &Path) -> Result<Option<Metadata>> {
    match path.symlink_metadata() {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        own => own.at(path.display())?,
    };
    match (path.metadata(), path.read_link()) {
        // A download cache links to its files, and may have been cleared without its links.
        (Err(error), Ok(target)) if error.kind() == ErrorKind::NotFound => Err(Error::new(format!(
            "this is a link to `{}`, which does not exist",
            target.display()
        ))
        .at(path.display())
        .hint(
            "put the file back, copy it in place of the link, or remove the link if there is to be no such file",
        )),
        (metadata, _) => metadata.at(path.display()).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nothing_has_the_name_of_is_absent() -> Result<()> {
        let home = tempfile::tempdir().expect("a folder");
        let (file, folder) = (home.path().join("file"), home.path().join("folder"));
        std::fs::write(&file, "text").expect("written");
        std::fs::create_dir(&folder).expect("made");
        assert!(has_file(&file)? && has_folder(&folder)?);
        for absent in [home.path().join("none"), file.join("below")] {
            assert!(!has_file(&absent)? && !has_folder(&absent)?);
        }
        for error in [has_file(&folder), has_folder(&file)] {
            assert!(error.is_err());
        }
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_what_it_leads_to() -> Result<()> {
        use std::os::unix::fs::symlink;
        let home = tempfile::tempdir().expect("a folder");
        let place = |name: &str| home.path().join(name);
        std::fs::write(place("file"), "text").expect("written");
        for (target, link) in [
            ("file", "good"),
            ("gone", "dead"),
            ("round", "round"),
            ("/dev/zero", "device"),
        ] {
            symlink(target, place(link)).expect("linked");
        }
        assert!(has_file(&place("good"))?);
        for (link, named) in [
            ("dead", "a link to `gone`, which does not exist"),
            ("round", "round: "),
            ("device", "a pipe or a device"),
        ] {
            for found in [has_file(&place(link)), has_folder(&place(link))] {
                let error = found.expect_err(link).to_string();
                assert!(error.contains(named), "{error}");
            }
        }
        Ok(())
    }
}
