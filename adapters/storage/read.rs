//! Reading files that may come from strangers.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Bytes of a file of settings, a vocabulary or a template, at most: the largest known ones have a tenth of it.
const LARGEST_TEXT: u64 = 256 << 20;

/// The bytes of a file. A pipe or a device, which may have no end, is an error.
pub fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    read_at_most(path, u64::MAX)
}

/// The bytes of a file of settings, a vocabulary or a template: one of a length that such a file can have.
pub fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = read_at_most(path, LARGEST_TEXT)?;
    // Some editors put this mark before a text in UTF-8; JSON and templates have no place for it.
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    Ok(bytes)
}

/// The same as text.
pub fn read_text(path: &Path) -> io::Result<String> {
    let bytes = read_small(path)?;
    String::from_utf8(bytes)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not valid UTF-8"))
}

fn read_at_most(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    // Asked before it is opened: opening a pipe waits for a writer.
    let metadata = path.metadata()?;
    if metadata.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !metadata.is_file() {
        return Err(io::Error::other("a pipe or a device, and a file is needed"));
    }
    if metadata.len() > most {
        return Err(io::Error::other(format!(
            "the file has {} MiB, more than the {} that it may have",
            metadata.len() >> 20,
            most >> 20
        )));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0));
    File::open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_and_what_is_none_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        std::fs::write(&file, "text").expect("written");
        assert_eq!(read_bytes(&file).expect("a file"), b"text");
        assert_eq!(read_text(&file).expect("a file"), "text");
        std::fs::write(&file, "\u{feff}text").expect("written");
        assert_eq!(read_text(&file).expect("a file"), "text");
        let kind = |path: &Path| read_small(path).expect_err("no file").kind();
        assert_eq!(kind(folder.path()), io::ErrorKind::IsADirectory);
        assert_eq!(kind(&folder.path().join("none")), io::ErrorKind::NotFound);
        let error = read_at_most(&file, 3).expect_err("too long");
        assert!(error.to_string().contains("more than"), "{error}");
        if cfg!(unix) {
            let error = read_small(Path::new("/dev/zero")).expect_err("a device");
            assert!(error.to_string().contains("a device"), "{error}");
        }
    }

    #[test]
    fn a_file_of_the_greatest_length_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        std::fs::write(&file, "text").expect("written");
        assert_eq!(read_at_most(&file, 4).expect("a file"), b"text");
    }

    #[test]
    fn a_text_is_utf_8_and_its_mark_no_part_of_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        std::fs::write(&file, "\u{feff}").expect("written");
        assert_eq!(read_bytes(&file).expect("a file"), b"\xef\xbb\xbf");
        assert_eq!(read_small(&file).expect("a file"), b"");
        std::fs::write(&file, b"\xff").expect("written");
        let error = read_text(&file).expect_err("no text");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
