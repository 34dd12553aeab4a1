//! Files and folders, as tests copy, list and read them.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several tests, each of which uses a part of it"
)]

use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The names in a folder, in order.
#[track_caller]
pub fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

/// Everything below a folder by its path from there: the bytes of files, where links lead, and nothing of folders.
#[track_caller]
pub fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for name in entries(folder) {
        let path = folder.join(&name);
        let bytes = if path.is_symlink() {
            let target = fs::read_link(&path).expect("a link");
            target.into_os_string().into_encoded_bytes()
        } else if path.is_dir() {
            let below = contents(&path).into_iter();
            found.extend(below.map(|(below, bytes)| (Path::new(&name).join(below), bytes)));
            Vec::new()
        } else {
            fs::read(&path).expect("read")
        };
        found.insert(name.into(), bytes);
    }
    found
}

/// Makes the folder `to` with the files of `from`.
#[track_caller]
pub fn copy_folder(from: &Path, to: &Path) {
    copy_files(from, to, &entries(from));
}

/// Makes the folder `to` with some files of `from`.
#[track_caller]
pub fn copy_files(from: &Path, to: &Path, names: &[impl AsRef<Path>]) {
    fs::create_dir(to).expect("made");
    for name in names {
        fs::copy(from.join(name), to.join(name)).expect("copied");
    }
}

#[track_caller]
pub fn json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).expect("written")).expect("JSON")
}

/// The JSON value of each line.
#[track_caller]
pub fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}
