//! What is a run's own lies in its folder. Through a link there it would write to, or remove, what is somebody else's, and
//! a pipe or a device has no end. The folder itself may be a link.

use crate::{Context, Error, Result};
use std::fs::{self, FileType};
use std::io;
use std::path::Path;

/// Whether the file `path` of a run folder is there. Anything else in its place, a link above all, is an error.
pub(crate) fn has_own_file(path: &Path) -> Result<bool> {
    has(path, "file", FileType::is_file)
}

/// The same of a folder.
pub(crate) fn has_own_folder(path: &Path) -> Result<bool> {
    has(path, "folder", FileType::is_dir)
}

/// Removes the file `path` of a run folder, if it is there.
pub(crate) fn remove_own_file(path: &Path) -> Result<()> {
    if has_own_file(path)? {
        fs::remove_file(path).at(path.display())?;
    }
    Ok(())
}

/// Makes the folder `path` of a run folder, unless it is there.
pub(crate) fn make_folder(path: &Path) -> Result<()> {
    if !has_own_folder(path)? {
        fs::create_dir_all(path).at(path.display())?;
    }
    Ok(())
}

/// Fails if `path` is a link, wherever it leads.
pub(crate) fn refuse_link(path: &Path) -> Result<()> {
    if !path.is_symlink() {
        return Ok(());
    }
    Err(Error::new("a link, which a run does not follow")
        .at(path.display())
        .hint("put what it leads to in its place, or remove the link"))
}

fn has(path: &Path, wanted: &str, is_wanted: fn(&FileType) -> bool) -> Result<bool> {
    refuse_link(path)?;
    let found = match path.symlink_metadata() {
        Ok(metadata) => metadata.file_type(),
        // Below a file is nothing, either.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(false);
        }
        Err(error) => return Err(error).at(path.display()),
    };
    if is_wanted(&found) {
        return Ok(true);
    }
    let found = match (found.is_dir(), found.is_file()) {
        (true, _) => "a folder",
        (_, true) => "a file",
        _ => "a pipe or a device",
    };
    Err(Error::new(format!("{found}, and a {wanted} is needed"))
        .at(path.display())
        .hint("move it away"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_told_from_what_is_not_and_from_anything_else() -> Result<()> {
        let run = tempfile::tempdir().expect("a folder");
        let (file, folder) = (run.path().join("file"), run.path().join("folder"));
        assert!(!has_own_file(&file)? && !has_own_folder(&folder)?);
        fs::write(&file, "text").expect("written");
        make_folder(&folder)?;
        make_folder(&folder)?;
        assert!(has_own_file(&file)? && has_own_folder(&folder)?);
        assert!(!has_own_file(&file.join("below"))?);
        remove_own_file(&file.join("below"))?;
        remove_own_file(&file)?;
        assert!(!has_own_file(&file)?);
        fs::write(&file, "text").expect("written");
        for (error, fact) in [
            (has_own_file(&folder), "a folder, and a file is needed"),
            (has_own_folder(&file), "a file, and a folder is needed"),
        ] {
            let error = error.expect_err(fact);
            assert!(error.to_string().ends_with(fact), "{error}");
            assert!(error.hint_text().is_some());
        }
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn no_link_is_followed_and_no_device_is_a_file() {
        let run = tempfile::tempdir().expect("a folder");
        let (file, link) = (run.path().join("file"), run.path().join("link"));
        fs::write(&file, "text").expect("written");
        for target in [file.as_path(), run.path(), Path::new("nowhere")] {
            std::os::unix::fs::symlink(target, &link).expect("a link");
            for found in [has_own_file(&link), has_own_folder(&link)] {
                let error = found.expect_err("a link");
                assert!(error.to_string().contains("a link, which"), "{error}");
                assert!(error.hint_text().is_some());
            }
            assert!(make_folder(&link).is_err() && refuse_link(&link).is_err());
            assert!(remove_own_file(&link).is_err() && link.is_symlink());
            fs::remove_file(&link).expect("removed");
        }
        let error = has_own_file(&run.path().join("n".repeat(300))).expect_err("no name");
        assert!(error.to_string().contains("nnn"), "{error}");
        let error = has_own_file(Path::new("/dev/zero")).expect_err("a device");
        assert!(error.to_string().contains("a device"), "{error}");
    }
}
