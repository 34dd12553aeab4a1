//! Output that is either there in full or not there at all: files and whole folders.

use crate::model::files;
use crate::{Context, Error, IntoError, Result};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

pub use retune_adapters::storage::{sync_folder, write_bytes, write_file};

/// What to do with an output folder that already has something in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Fail.
    Refuse,
    /// Put the new folder in its place, if it is an earlier merge and holds nothing but the files that its weights say it
    /// has.
    ///
    /// Replacing deletes, so every other folder is refused: a slip like `--out ~` costs nothing.
    Replace,
}

/// A new output folder, invisible under its name until it is complete.
///
/// Files are written under [`AtomicFolder::path`]; [`AtomicFolder::finish`] puts them in place. Dropped before that, it
/// leaves nothing behind, and what a killed process has left is removed by the next that makes the same output. Only if
/// everything is there and the name turns out to be taken, the complete output is kept under another, which the error
/// says.
#[derive(Debug)]
pub struct AtomicFolder {
    /// The name as it was asked for, and what it resolves to.
    asked: PathBuf,
    target: PathBuf,
    staging: TempDir,
    /// Keeps other processes from taking the folder for left behind: the system's own lock, which ends with the process.
    _lock: Option<File>,
    placement: Placement,
}

const STAGING_PREFIX: &str = ".retune-";
const STAGING_SUFFIX: &str = ".partial";
/// Random letters and digits between the two.
const STAGING_RANDOM: usize = 6;

fn is_staging(name: &OsStr) -> bool {
    name.to_str()
        .is_some_and(|name| name.starts_with(STAGING_PREFIX) && name.ends_with(STAGING_SUFFIX))
}

/// Whether nothing but random letters and digits stands between `prefix` and the end of a temporary name.
fn is_staging_after(prefix: &str, name: &OsStr) -> bool {
    let random = name
        .to_str()
        .and_then(|name| name.strip_prefix(prefix)?.strip_suffix(STAGING_SUFFIX));
    random.is_some_and(|random| {
        random.len() == STAGING_RANDOM && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
    })
}

/// Removes the files that killed processes left half-written in `folder`, which need not exist: those under the temporary
/// names of [`write_file`], and nothing else.
///
/// For a folder that no other process writes to, because it is locked.
pub fn remove_half_written(folder: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.at(folder.display())?,
    };
    for entry in entries {
        let entry = entry.at(folder.display())?;
        let path = entry.path();
        let is_file = entry.file_type().at(path.display())?.is_file();
        if is_file && is_staging_after(STAGING_PREFIX, &entry.file_name()) {
            std::fs::remove_file(&path).at(path.display())?;
        }
    }
    Ok(())
}

/// How the finished folder gets its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placement {
    /// Nothing is there: one rename.
    Rename,
    /// An empty folder is there, which may be a mount point or the working directory: its entries are moved in.
    MoveIn,
    /// An earlier output is there: both swap names, then the old one is deleted.
    Replace,
}

impl AtomicFolder {
    /// Starts the folder that will be `asked`. Parent folders are created.
    pub fn create(asked: &Path, existing: Existing) -> Result<Self> {
        let placement = placement(asked, existing)?;
        // "." and "out/.." have no name of their own, but if they exist the system knows it.
        let target = match placement {
            Placement::Rename => asked.to_path_buf(),
            Placement::MoveIn | Placement::Replace => asked.canonicalize().at(asked.display())?,
        };
        let beside = match placement {
            Placement::MoveIn => target.clone(),
            Placement::Rename | Placement::Replace => {
                let parent = parent(&target);
                std::fs::create_dir_all(parent).map_err(|error| not_writable(error, parent))?;
                parent.to_path_buf()
            }
        };
        let prefix = staging_prefix(&target);
        remove_left_behind(&beside, &prefix);
        let (staging, lock) =
            stage(&beside, &prefix).map_err(|error| not_writable(error, &beside))?;
        Ok(Self {
            asked: asked.to_path_buf(),
            target,
            staging,
            _lock: lock,
            placement,
        })
    }

    /// Where to write the files for now.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// Makes everything durable and gives the folder its name, which is returned.
    pub fn finish(self) -> Result<PathBuf> {
        let Self {
            asked,
            target,
            staging,
            _lock,
            placement,
        } = self;
        sync_tree(staging.path())?;
        if let Err(error) = put_in_place(staging.path(), &target, placement) {
            // The work is done, and throwing it away would help nobody: now, or when the command is run again.
            let staged = staging.keep();
            let complete = staged.with_extension("complete");
            let kept = match std::fs::rename(&staged, &complete) {
                Ok(()) => complete,
                Err(_) => staged,
            };
            return Err(error.hint(format!("the complete output is in `{}`", kept.display())));
        }
        match placement {
            // What stood under the temporary name is the output now.
            Placement::Rename => drop(staging.keep()),
            // Under the temporary name is nothing any more, or what was replaced.
            Placement::MoveIn | Placement::Replace => staging.close().at(asked.display())?,
        }
        Ok(asked)
    }
}

/// How the temporary names of the output `target` begin.
fn staging_prefix(target: &Path) -> String {
    // Long names are cut: the system has a longest one.
    const LONGEST: usize = 50;
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().take(LONGEST).collect();
    format!("{STAGING_PREFIX}{name}-")
}

/// A new folder in `beside` under a temporary name, and its lock, where the system can lock folders.
fn stage(beside: &Path, prefix: &str) -> io::Result<(TempDir, Option<File>)> {
    loop {
        let staging = tempfile::Builder::new()
            .prefix(prefix)
            .suffix(STAGING_SUFFIX)
            .rand_bytes(STAGING_RANDOM)
            .tempdir_in(beside)?;
        let folder = File::open(staging.path()).ok();
        let lock = folder.filter(|folder| folder.lock().is_ok());
        // Another process may have come in between, and removed it as left behind.
        if staging.path().exists() {
            return Ok((staging, lock));
        }
    }
}

/// Removes the folders that killed processes left in `beside` under temporary names with this beginning. The lock of a
/// living one keeps its folder.
fn remove_left_behind(beside: &Path, prefix: &str) {
    for name in entry_names(beside).unwrap_or_default() {
        let path = beside.join(&name);
        let is_folder = || {
            path.symlink_metadata()
                .is_ok_and(|metadata| metadata.is_dir())
        };
        if is_staging_after(prefix, &name)
            && is_folder()
            && let Ok(folder) = File::open(&path)
            && folder.try_lock().is_ok()
        {
            // It takes room and is in nobody's way: what cannot be removed stays.
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}

/// Gives what is in `staging` the name `target`.
fn put_in_place(staging: &Path, target: &Path, placement: Placement) -> Result<()> {
    match placement {
        Placement::Rename => std::fs::rename(staging, target).at(target.display())?,
        Placement::Replace => {
            // What appeared meanwhile would be deleted too.
            refuse_others(target)?;
            swap(staging, target).at(target.display())?;
        }
        Placement::MoveIn => {
            let names = entry_names(staging).at(staging.display())?;
            let taken = names
                .iter()
                .find(|name| target.join(name).symlink_metadata().is_ok());
            if let Some(name) = taken {
                return Err(Error::new("appeared while the command was running")
                    .at(target.join(name).display()));
            }
            for name in names {
                let place = target.join(&name);
                std::fs::rename(staging.join(&name), &place).at(place.display())?;
            }
            return sync_folder(target);
        }
    }
    sync_folder(parent(target))
}

/// Fails if a file could not be created in `folder`, which need not exist yet. Creates nothing.
///
/// To be called before work whose result goes there.
pub fn check_writable(folder: &Path) -> Result<()> {
    check_name(folder)?;
    let mut existing = folder;
    let metadata = loop {
        match std::fs::metadata(existing) {
            Ok(metadata) => break metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => match existing.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => existing = parent,
                Some(_) => existing = Path::new("."),
                None => return Err(not_writable(error, folder)),
            },
            Err(error) => return Err(not_writable(error, folder)),
        }
    };
    if !metadata.is_dir() {
        return Err(not_a_folder(existing));
    }
    tempfile::tempfile_in(existing)
        .map(drop)
        .map_err(|error| not_writable(error, existing))
}

fn placement(target: &Path, existing: Existing) -> Result<Placement> {
    check_name(target)?;
    match std::fs::metadata(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Placement::Rename),
        Err(error) => return Err(not_writable(error, target)),
        Ok(metadata) if !metadata.is_dir() => return Err(not_a_folder(target)),
        Ok(_) => {}
    }
    let mut names = entry_names(target).at(target.display())?;
    // What a killed command left does not count.
    names.retain(|name| !is_staging(name));
    if names.is_empty() {
        return Ok(Placement::MoveIn);
    }
    let refused = Error::new("the output folder is not empty").at(target.display());
    match existing {
        Existing::Refuse => {
            Err(refused.hint("choose another folder, or remove this one if it is no longer needed"))
        }
        Existing::Replace if is_mount_point(target) => Err(refused
            .hint("it is a mount point, which cannot be replaced: choose a folder inside it")),
        Existing::Replace => refuse_others(target).map(|()| Placement::Replace),
    }
}

/// Refuses to replace a folder that is no earlier merge, or holds more than that.
fn refuse_others(target: &Path) -> Result<()> {
    const NAMED: usize = 5;
    let written = files::of_merge(target).ok_or_else(|| {
        Error::new("the output folder is not empty")
            .at(target.display())
            .hint("only an earlier merge is replaced, and no weights here say that they are of one: choose another folder")
    })?;
    let mut others = Vec::new();
    add_others(target, Path::new(""), &written, &mut others)?;
    if others.is_empty() {
        return Ok(());
    }
    if others.len() > NAMED {
        others.truncate(NAMED);
        others.push("…".to_owned());
    }
    Err(Error::new(format!(
        "the output folder holds what belongs to no earlier output: {}",
        others.join(", ")
    ))
    .at(target.display())
    .hint("replacing it would delete that: move it away, or choose another folder"))
}

/// Adds what lies in the folder `below` of `target` and is none of the files `written` there.
fn add_others(
    target: &Path,
    below: &Path,
    written: &BTreeSet<PathBuf>,
    others: &mut Vec<String>,
) -> Result<()> {
    for name in entry_names(&target.join(below)).at(target.display())? {
        let place = below.join(&name);
        let path = target.join(&place);
        // Not what a link leads to: nobody who writes a model makes one.
        let kind = path.symlink_metadata().at(path.display())?.file_type();
        let is_above = |file: &PathBuf| file.starts_with(&place);
        if kind.is_dir() && written.iter().any(is_above) {
            add_others(target, &place, written, others)?;
        } else if !(kind.is_file() && written.contains(&place) || is_staging(&name)) {
            others.push(format!("`{}`", place.display()));
        }
    }
    Ok(())
}

/// Refuses a name under which no folder can be: none at all, or one that leads over a link to nowhere.
fn check_name(folder: &Path) -> Result<()> {
    if folder.as_os_str().is_empty() {
        return Err(Error::usage("the output folder has no name"));
    }
    let is_missing = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
    let leads_nowhere =
        |place: &&Path| place.is_symlink() && place.metadata().is_err_and(is_missing);
    // Without a slash at its end, which would have the system follow the link.
    let places = folder.components().as_path();
    match places.ancestors().find(leads_nowhere) {
        None => Ok(()),
        Some(link) => Err(Error::new("a link that leads nowhere")
            .at(link.display())
            .hint("remove the link, or make the folder that it leads to")),
    }
}

/// The folder that `path` lies in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn entry_names(folder: &Path) -> io::Result<Vec<OsString>> {
    let mut names = std::fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn not_a_folder(path: &Path) -> Error {
    Error::new("is a file, and a folder is needed for the output").at(path.display())
}

fn not_writable(error: io::Error, folder: &Path) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull => error.into_error(),
        io::ErrorKind::NotADirectory => {
            Error::new("lies under a file, and a folder is needed for the output")
        }
        _ => Error::new("the output folder cannot be written to")
            .hint("choose another folder, or change its permissions")
            .caused_by(error),
    }
    .at(folder.display())
}

/// Whether another file system, or another part of one, begins at `folder`.
fn is_mount_point(folder: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
        // Unlike the device number, this tells of folders that are bound into a container.
        if let Ok(status) = statx(CWD, folder, AtFlags::empty(), StatxFlags::empty())
            && status
                .stx_attributes_mask
                .contains(StatxAttributes::MOUNT_ROOT)
        {
            return status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        }
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if let (Ok(inside), Ok(outside)) = (folder.metadata(), folder.join("..").metadata()) {
            return inside.dev() != outside.dev();
        }
    }
    // Only replacing asks, and then the rename at the end fails.
    let _ = folder;
    false
}

/// Lets two folders change places.
pub(crate) fn swap(new: &Path, old: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
            // Some network file systems cannot exchange; then there is a moment without either.
            Err(
                rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP,
            ) => {}
            result => return Ok(result?),
        }
    }
    let aside = new.with_extension("replaced");
    std::fs::rename(old, &aside)?;
    if let Err(error) = std::fs::rename(new, old) {
        std::fs::rename(&aside, old)?;
        return Err(error);
    }
    std::fs::rename(&aside, new)
}

/// Makes every file under `folder` and every name survive a power failure.
fn sync_tree(folder: &Path) -> Result<()> {
    for name in entry_names(folder).at(folder.display())? {
        let path = folder.join(name);
        let kind = path.symlink_metadata().at(path.display())?.file_type();
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            // Windows syncs only files open for writing; elsewhere a copy may be read-only.
            File::options()
                .read(true)
                .write(cfg!(windows))
                .open(&path)
                .and_then(|file| file.sync_all())
                .at(path.display())?;
        }
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    use std::collections::HashMap;

    fn names(folder: &Path) -> Vec<String> {
        entry_names(folder)
            .expect("a folder")
            .into_iter()
            .map(|name| name.into_string().expect("UTF-8"))
            .collect()
    }

    fn fill(folder: &Path) {
        std::fs::create_dir(folder.join("shards")).expect("a folder");
        std::fs::write(folder.join("config.json"), b"new").expect("a file");
        std::fs::write(folder.join("shards/1"), b"shard").expect("a file");
    }

    #[test]
    fn appears_under_its_name_only_when_finished() {
        let home = tempfile::tempdir().expect("a folder");
        let target = home.path().join("deep/er/out");
        let folder = AtomicFolder::create(&target, Existing::Refuse).expect("a new folder");
        fill(folder.path());
        assert!(!target.exists());
        assert_eq!(folder.finish().expect("a finished folder"), target);
        assert_eq!(names(&target), ["config.json", "shards"]);
        assert_eq!(names(&home.path().join("deep/er")), ["out"]);
    }

    #[test]
    fn a_dropped_folder_leaves_nothing() {
        let home = tempfile::tempdir().expect("a folder");
        let folder =
            AtomicFolder::create(&home.path().join("out"), Existing::Refuse).expect("a new folder");
        fill(folder.path());
        drop(folder);
        assert!(names(home.path()).is_empty());
    }

    #[test]
    fn an_empty_folder_is_filled_in_place() {
        let home = tempfile::tempdir().expect("a folder");
        let folder =
            AtomicFolder::create(home.path(), Existing::Refuse).expect("an empty folder is free");
        fill(folder.path());
        folder.finish().expect("a finished folder");
        assert_eq!(names(home.path()), ["config.json", "shards"]);

        // Killed once, tried again.
        let other = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(other.path().join(".retune-1.partial")).expect("a folder");
        let folder = AtomicFolder::create(other.path(), Existing::Refuse).expect("as if empty");
        fill(folder.path());
        folder.finish().expect("a finished folder");

        let other = tempfile::tempdir().expect("a folder");
        drop(AtomicFolder::create(other.path(), Existing::Refuse).expect("an empty folder"));
        assert!(names(other.path()).is_empty());
    }

    #[test]
    fn the_files_of_killed_processes_are_removed_and_nothing_else() {
        let home = tempfile::tempdir().expect("a folder");
        let kept = [
            ".retune-QNPV7.partial",
            ".retune-QNPV7_.partial",
            ".retune-QNPV7l.part",
            ".retune-merged-QNPV7l.partial",
            ".tmpQNPV7l.partial",
        ];
        for name in kept {
            std::fs::write(home.path().join(name), b"theirs").expect("a file");
        }
        std::fs::create_dir(home.path().join(".retune-folder.partial")).expect("a folder");
        std::fs::write(home.path().join(".retune-QNPV7l.partial"), b"half").expect("a file");
        // As it would be left now, under the name that it has while it is written.
        let (before, mut left) = (names(home.path()), None);
        write_file(&home.path().join("a.json"), |_| {
            let mut now = names(home.path()).into_iter();
            left = now.find(|name| !before.contains(name));
            Ok(())
        })
        .expect("written");
        let left = left.expect("a file under a temporary name");
        std::fs::write(home.path().join(left), b"half").expect("a file");

        remove_half_written(home.path()).expect("removed");
        let mut expected = kept.map(str::to_owned).to_vec();
        expected.extend([".retune-folder.partial".to_owned(), "a.json".to_owned()]);
        expected.sort();
        assert_eq!(names(home.path()), expected);
        remove_half_written(&home.path().join("missing")).expect("nothing to remove");
    }

    #[cfg(unix)]
    #[test]
    fn the_folder_of_a_killed_process_goes_when_the_same_output_is_made_again() {
        let home = tempfile::tempdir().expect("a folder");
        let make = |name: &str| {
            AtomicFolder::create(&home.path().join(name), Existing::Refuse).expect("a new folder")
        };
        let leave = |name: &str| {
            let folder = home.path().join(name);
            std::fs::create_dir(&folder).expect("a folder");
            std::fs::write(folder.join("model.safetensors"), b"half").expect("a file");
        };
        leave(".retune-out-QNPV7l.partial");
        let others = [
            ".retune-QNPV7l.partial",
            ".retune-out-2-QNPV7l.partial",
            ".retune-out-QNPV7.partial",
            ".retune-out-QNPV7l.complete",
        ];
        for name in others {
            leave(name);
        }
        std::fs::write(home.path().join(".retune-out-a1file.partial"), b"").expect("a file");

        let first = make("out");
        fill(first.path());
        // It is at work still, and so is the other.
        let second = make("out");
        assert!(first.path().join("config.json").exists());
        assert!(second.path().exists());
        fill(second.path());
        first.finish().expect("a finished folder");
        drop(second);
        let mut expected = others.map(str::to_owned).to_vec();
        expected.extend([".retune-out-a1file.partial".to_owned(), "out".to_owned()]);
        expected.sort();
        assert_eq!(names(home.path()), expected);

        // What was complete is never taken for left behind.
        let folder = make("taken");
        fill(folder.path());
        std::fs::create_dir(home.path().join("taken")).expect("a folder");
        std::fs::write(home.path().join("taken/mine"), b"").expect("a file");
        folder.finish().expect_err("the name is taken");
        std::fs::remove_dir_all(home.path().join("taken")).expect("removed");
        drop(make("taken"));
        let complete = names(home.path())
            .into_iter()
            .find(|name| name.starts_with(".retune-taken-"))
            .expect("the complete output");
        assert_eq!(
            names(&home.path().join(complete)),
            ["config.json", "shards"]
        );
    }

    #[cfg(unix)]
    #[test]
    fn an_output_may_have_a_long_name() {
        let home = tempfile::tempdir().expect("a folder");
        let target = home.path().join("o".repeat(255));
        let folder = AtomicFolder::create(&target, Existing::Refuse).expect("a new folder");
        fill(folder.path());
        folder.finish().expect("a finished folder");
        assert_eq!(names(&target), ["config.json", "shards"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_that_leads_nowhere_is_called_that() {
        let home = tempfile::tempdir().expect("a folder");
        let link = home.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).expect("a link");
        for path in [link.clone(), link.join(""), link.join("out")] {
            for error in [
                check_writable(&path).expect_err("nothing can be there"),
                AtomicFolder::create(&path, Existing::Refuse)
                    .map(drop)
                    .expect_err("nothing can be there"),
            ] {
                let message = error.to_string();
                assert!(
                    message.ends_with("link: a link that leads nowhere"),
                    "{message}"
                );
                assert!(error.hint_text().is_some());
            }
        }
        // One that leads somewhere is as good as what it leads to.
        std::fs::create_dir(home.path().join("nowhere")).expect("a folder");
        check_writable(&link.join("out")).expect("a folder");
    }

    #[test]
    fn refuses_a_folder_with_something_in_it() {
        let home = tempfile::tempdir().expect("a folder");
        std::fs::write(home.path().join("letter.txt"), b"dear").expect("a file");
        for existing in [Existing::Refuse, Existing::Replace] {
            let error = AtomicFolder::create(home.path(), existing).expect_err("not ours");
            assert!(error.to_string().contains("is not empty"), "{error}");
            assert!(error.hint_text().is_some());
        }
        assert_eq!(names(home.path()), ["letter.txt"]);
    }

    /// Makes a folder of files that its weights, one of them, name as those of a merge.
    fn write_merged(folder: &Path, files: &[&str]) {
        std::fs::create_dir(folder).expect("a folder");
        for name in files {
            let file = folder.join(name);
            std::fs::create_dir_all(parent(&file)).expect("a folder");
            std::fs::write(file, b"old").expect("a file");
        }
        let list = serde_json::to_string(files).expect("JSON");
        let texts = HashMap::from([(files::MERGED.to_owned(), list)]);
        let weight = TensorView::new(Dtype::U8, vec![1], b"w").expect("a tensor");
        let weights = folder.join("model.safetensors");
        serialize_to_file([("weight", weight)], Some(texts), &weights).expect("written");
    }

    #[test]
    fn replaces_an_earlier_merge_when_told() {
        let home = tempfile::tempdir().expect("a folder");
        let target = home.path().join("out");
        write_merged(&target, &["config.json", "model.safetensors"]);
        drop(AtomicFolder::create(&target, Existing::Replace).expect("an earlier merge"));
        assert_eq!(names(&target), ["config.json", "model.safetensors"]);

        let folder = AtomicFolder::create(&target, Existing::Replace).expect("an earlier merge");
        fill(folder.path());
        folder.finish().expect("a finished folder");
        assert_eq!(names(&target), ["config.json", "shards"]);
        assert_eq!(
            std::fs::read(target.join("config.json")).expect("a file"),
            b"new"
        );
        assert_eq!(names(home.path()), ["out"]);
    }

    #[test]
    fn replaces_nothing_but_what_a_merge_has_written() {
        const WRITTEN: [&str; 4] = [
            "LICENSE.txt",
            "config.json",
            "model.safetensors",
            "templates/rag.jinja",
        ];
        let home = tempfile::tempdir().expect("a folder");
        let target = home.path().join("out");
        let write = |name: &str| std::fs::write(target.join(name), b"mine").expect("a file");
        let remove = |name: &str| std::fs::remove_file(target.join(name)).expect("removed");
        let create = || AtomicFolder::create(&target, Existing::Replace);
        let refused = |named: &str| {
            let before = names(&target);
            let error = create().map(drop).expect_err("not a merge alone");
            assert!(error.to_string().contains(named), "{error}");
            assert!(error.hint_text().is_some());
            assert_eq!(names(&target), before);
        };
        write_merged(&target, &WRITTEN);
        drop(create().expect("an earlier merge"));
        remove("LICENSE.txt");
        drop(create().expect("what is left of one"));

        for name in ["license_keys.db", "templates/mine.jinja"] {
            write(name);
            refused(&format!("`{name}`"));
            remove(name);
        }
        std::fs::create_dir_all(target.join("src/deep")).expect("a folder");
        refused("earlier output: `src`");
        for name in ["a", "b", "c", "d", "e"] {
            write(name);
        }
        refused("`a`, `b`, `c`, `d`, `e`, …");
        ["a", "b", "c", "d", "e"].into_iter().for_each(remove);
        std::fs::remove_dir_all(target.join("src")).expect("removed");
        #[cfg(unix)]
        for name in ["LICENSE.txt", "templates/rag.jinja"] {
            let _ = std::fs::remove_file(target.join(name));
            std::os::unix::fs::symlink("elsewhere", target.join(name)).expect("a link");
            refused(&format!("`{name}`"));
            remove(name);
        }

        // Neither is what comes while the new one is made.
        let folder = create().expect("an earlier merge");
        fill(folder.path());
        write("notes.txt");
        let staged = folder.path().with_extension("complete");
        let error = folder.finish().expect_err("somebody's own");
        assert!(error.to_string().contains("`notes.txt`"), "{error}");
        let hint = error.hint_text().expect("a way out");
        assert!(hint.contains(&staged.display().to_string()), "{hint}");
        assert_eq!(names(&staged), ["config.json", "shards"]);
        assert_eq!(
            std::fs::read(target.join("notes.txt")).expect("a file"),
            b"mine"
        );
    }

    #[test]
    fn what_appeared_meanwhile_is_not_overwritten() {
        let home = tempfile::tempdir().expect("a folder");
        let target = home.path().join("out");
        let folder = AtomicFolder::create(&target, Existing::Refuse).expect("a new folder");
        fill(folder.path());
        std::fs::create_dir(&target).expect("a folder");
        std::fs::write(target.join("config.json"), b"theirs").expect("a file");
        let staged = folder.path().with_extension("complete");
        let error = folder.finish().expect_err("the name is taken");
        // A long merge is not lost because of a name.
        let hint = error.hint_text().expect("a way out");
        assert!(hint.contains(&staged.display().to_string()), "{hint}");
        assert_eq!(names(&staged), ["config.json", "shards"]);
        std::fs::remove_dir_all(staged).expect("kept");
        assert_eq!(
            std::fs::read(target.join("config.json")).expect("a file"),
            b"theirs"
        );
        assert_eq!(names(home.path()), ["out"]);
    }

    #[test]
    fn check_writable_looks_at_the_nearest_folder_that_exists() {
        let home = tempfile::tempdir().expect("a folder");
        check_writable(home.path()).expect("a folder of our own");
        check_writable(&home.path().join("a/b/c")).expect("can be created");
        check_writable(Path::new("certainly-not-here")).expect("the working directory");
        assert!(names(home.path()).is_empty());

        let file = home.path().join("file");
        std::fs::write(&file, b"").expect("a file");
        let error = check_writable(&file).expect_err("a file");
        assert!(error.to_string().contains("is a file"), "{error}");
        let error = check_writable(&file.join("under")).expect_err("under a file");
        assert!(error.to_string().contains("lies under a file"), "{error}");
        AtomicFolder::create(&file.join("under"), Existing::Refuse).expect_err("under a file");
    }

    #[cfg(unix)]
    #[test]
    fn check_writable_refuses_a_folder_without_permission() {
        use std::os::unix::fs::PermissionsExt;
        let home = tempfile::tempdir().expect("a folder");
        let locked = home.path().join("locked");
        std::fs::create_dir(&locked).expect("a folder");
        std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(0o555)).expect("locked");
        // Permissions do not bind the superuser.
        if std::fs::write(locked.join("probe"), b"").is_ok() {
            return;
        }
        for path in [locked.clone(), locked.join("new")] {
            let error = check_writable(&path).expect_err("locked");
            assert!(
                error.to_string().contains("cannot be written to"),
                "{error}"
            );
            AtomicFolder::create(&path, Existing::Refuse).expect_err("locked");
        }
    }
}
