//! Files that are either there in full or not there at all.

use crate::{Context, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Writes `path` through `write`: a temporary file beside it, fsync, rename, fsync of the folder.
///
/// A reader sees the old file or the new one, never a part. If anything fails, the temporary file is removed and what
/// stood at `path` still stands.
pub fn write_file(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut temporary = tempfile::Builder::new();
    temporary.prefix(".retune-").suffix(".partial");
    #[cfg(unix)]
    {
        // A temporary file is private by default; an output file has whatever mode the umask leaves.
        use std::os::unix::fs::PermissionsExt;
        temporary.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let temporary = temporary.tempfile_in(folder).at(path.display())?;
    let (file, temporary_path) = temporary.into_parts();
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    write(&mut writer).at(path.display())?;
    writer.flush().at(path.display())?;
    writer.get_ref().sync_all().at(path.display())?;
    // Windows cannot rename an open file.
    drop(writer);
    temporary_path
        .persist(path)
        .map_err(|error| error.error)
        .at(path.display())?;
    sync_folder(folder)
}

/// Writes `bytes` to `path`, in full or not at all.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file(path, |writer| writer.write_all(bytes).at(path.display()))
}

/// Makes the names in `folder` survive a power failure.
pub fn sync_folder(folder: &Path) -> Result<()> {
    // A folder can be opened as a file on Unix only; elsewhere the system orders renames by itself.
    if cfg!(unix) {
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .at(folder.display())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .into_string()
                    .expect("UTF-8")
            })
            .collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_the_whole_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.json");
        write_bytes(&path, b"a long first version").expect("first");
        write_bytes(&path, b"second").expect("second");
        assert_eq!(std::fs::read(&path).expect("the file"), b"second");
        assert_eq!(names(folder.path()), ["a.json"]);
    }

    #[test]
    fn leaves_nothing_behind_when_writing_fails() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.json");
        write_bytes(&path, b"old").expect("first");
        let error = write_file(&path, |writer| {
            writer.write_all(b"half").at("the middle")?;
            Err(Error::new("out of paper"))
        })
        .expect_err("the writer failed");
        assert!(
            error.to_string().ends_with("a.json: out of paper"),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).expect("the file"), b"old");
        assert_eq!(names(folder.path()), ["a.json"]);
    }

    #[test]
    fn names_the_file_when_the_folder_is_missing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("missing").join("a.json");
        let error = write_bytes(&path, b"").expect_err("no folder");
        let text = error.to_string();
        assert!(text.contains("a.json: no such file or folder"), "{text}");
    }

    #[test]
    fn a_folder_in_the_way_is_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.json");
        std::fs::create_dir(&path).expect("a folder in the way");
        write_bytes(&path, b"x").expect_err("the name is taken");
        assert_eq!(names(folder.path()), ["a.json"]);
    }

    #[cfg(unix)]
    #[test]
    fn has_the_mode_of_an_ordinary_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let ordinary = folder.path().join("ordinary");
        let ours = folder.path().join("ours");
        std::fs::write(&ordinary, b"").expect("ordinary");
        write_bytes(&ours, b"").expect("ours");
        let mode = |path: &Path| {
            std::fs::metadata(path)
                .expect("a file")
                .permissions()
                .mode()
        };
        assert_eq!(mode(&ours), mode(&ordinary));
    }

    #[test]
    fn the_half_written_file_stands_beside_its_place() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.json");
        write_file(&path, |writer| {
            writer.write_all(b"half").at("the middle")?;
            let names = names(folder.path());
            assert_eq!(names.len(), 1);
            assert!(names[0].ends_with(".partial"), "{names:?}");
            Ok(())
        })
        .expect("written");
    }

    #[test]
    fn a_bare_name_is_of_the_working_folder() {
        // A name of its own, whose file is removed at the end.
        let place = tempfile::NamedTempFile::new_in(".")
            .expect("a name")
            .into_temp_path();
        let name = place.file_name().expect("a name");
        write_bytes(Path::new(name), b"here").expect("written");
        assert_eq!(std::fs::read(&place).expect("the file"), b"here");
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_is_missing_cannot_be_synced() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(sync_folder(folder.path()).is_ok());
        let error = sync_folder(&folder.path().join("missing")).expect_err("no folder");
        let text = error.to_string();
        assert!(text.ends_with("missing: no such file or folder"), "{text}");
    }
}
