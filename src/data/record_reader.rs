//! Data files: JSON lines or a JSON array, plain or gzipped, one record at a time.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use flate2::bufread::MultiGzDecoder;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::adapters::json_fault;
use crate::data::Record;
use crate::{Context, Error, Result};

/// Bytes of a line, at most: a few kilobytes of gzip can stand for any number.
const LONGEST_LINE: u64 = 256 << 20;
/// The same of an array, which is held in memory.
const LONGEST_ARRAY: u64 = 1 << 30;
/// The same of a record, several times the longest text. What JSON stands for takes up to forty times its bytes.
const LONGEST_RECORD: usize = 32 << 20;

/// Where a record was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: Arc<Path>,
    /// The line on which the record starts, from 1.
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.file.display(), self.line)
    }
}

/// Hands every record of a file to `visit`, in order, with where it was read.
///
/// JSON lines are streamed; a JSON array is read as a whole. Blank lines are no records. A record that cannot be
/// understood is an error for `visit` to count; what makes the rest of the file unreadable is an error of this function.
pub fn read_records(
    file: &Path,
    visit: impl FnMut(Origin, Result<Record>) -> Result<()>,
) -> Result<()> {
    read_records_from(open(file)?, file, visit)
}

fn read_records_from(
    source: impl BufRead,
    file: &Path,
    mut visit: impl FnMut(Origin, Result<Record>) -> Result<()>,
) -> Result<()> {
    read_values_from(source, file, |origin, value| {
        visit(origin, value.and_then(Record::from_json))
    })
}

/// The same for records of any form.
pub(super) fn read_values(
    file: &Path,
    visit: impl FnMut(Origin, Result<Value>) -> Result<()>,
) -> Result<()> {
    read_values_from(open(file)?, file, visit)
}

fn open(file: &Path) -> Result<BufReader<File>> {
    // Some systems open a folder, and fail only when it is read.
    if file.is_dir() {
        return Err(Error::new("this is a folder, and a file is needed")
            .at(file.display())
            .hint("name the files in it"));
    }
    File::open(file).map(BufReader::new).at(file.display())
}

fn read_values_from(
    mut source: impl BufRead,
    file: &Path,
    visit: impl FnMut(Origin, Result<Value>) -> Result<()>,
) -> Result<()> {
    let start = source.fill_buf().at(file.display())?;
    if start.starts_with(b"\x1f\x8b") {
        let inside = BufReader::new(MultiGzDecoder::new(source));
        return read_text(inside, file, visit);
    }
    read_text(source, file, visit)
}

fn read_text(
    mut source: impl BufRead,
    file: &Path,
    mut visit: impl FnMut(Origin, Result<Value>) -> Result<()>,
) -> Result<()> {
    let file: Arc<Path> = file.into();
    let mut line = Vec::new();
    let mut number = 0;
    let mut records = 0;
    loop {
        line.clear();
        let read = source
            .by_ref()
            .take(LONGEST_LINE + 1)
            .read_until(b'\n', &mut line)
            .map_err(|error| unreadable(&error).at(file.display()))?;
        if read == 0 {
            return Ok(());
        }
        number += 1;
        if number == 1 {
            refuse_other_formats(&line).at(file.display())?;
            if line.starts_with(b"\xef\xbb\xbf") {
                line.drain(..3);
            }
        }
        let is_array = records == 0 && line.trim_ascii_start().starts_with(b"[");
        if read as u64 > LONGEST_LINE && !is_array {
            return Err(too_long("a line", LONGEST_LINE, &file));
        }
        let record = line.trim_ascii();
        if record.is_empty() {
            continue;
        }
        let origin = Origin {
            file: Arc::clone(&file),
            line: number,
        };
        if is_array {
            let read = source
                .take(LONGEST_ARRAY + 1)
                .read_to_end(&mut line)
                .map_err(|error| unreadable(&error).at(file.display()))?;
            if read as u64 > LONGEST_ARRAY {
                return Err(too_long("the JSON array", LONGEST_ARRAY, &file));
            }
            return read_array(&line, &origin, visit);
        }
        records += 1;
        visit(origin, parse(record))?;
    }
}

/// The records of a JSON array, which starts at `origin`.
fn read_array(
    text: &[u8],
    origin: &Origin,
    mut visit: impl FnMut(Origin, Result<Value>) -> Result<()>,
) -> Result<()> {
    let lines = |range: Range<usize>| text[range].iter().filter(|byte| **byte == b'\n').count();
    let at = |line: usize| Origin {
        line,
        ..origin.clone()
    };
    if let Err(error) = std::str::from_utf8(text) {
        let line = origin.line + lines(0..error.valid_up_to());
        return Err(Error::new("not valid UTF-8")
            .at(at(line))
            .hint("write the file as UTF-8"));
    }
    serde_json::from_slice::<IgnoredAny>(text).map_err(|error| {
        let line = origin.line + error.line().saturating_sub(1);
        not_json(&error).at(at(line)).hint(
            "a file that starts with `[` must be one JSON array; without brackets and commas it would be JSON lines",
        )
    })?;
    let mut counted = 0;
    let mut line = origin.line;
    each_element(text, |element| {
        line += lines(counted..element.start);
        counted = element.start;
        visit(at(line), parse(&text[element]))
    })
}

/// Calls `visit` with the bytes of each element of an array that is known to be valid JSON.
fn each_element(text: &[u8], mut visit: impl FnMut(Range<usize>) -> Result<()>) -> Result<()> {
    let mut depth = 0usize;
    let mut start = None;
    let mut end = 0;
    let mut in_string = false;
    let mut escaped = false;
    for (index, byte) in text.iter().enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            end = index + 1;
            continue;
        }
        match byte {
            b',' | b']' if depth == 1 => {
                if let Some(start) = start.take() {
                    visit(start..end)?;
                }
            }
            b' ' | b'\t' | b'\r' | b'\n' => continue,
            _ if depth >= 1 => {
                start.get_or_insert(index);
                end = index + 1;
            }
            _ => {}
        }
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => in_string = true,
            _ => {}
        }
    }
    Ok(())
}

fn parse(bytes: &[u8]) -> Result<Value> {
    if bytes.len() > LONGEST_RECORD {
        return Err(Error::new(format!(
            "the record has {} MiB, more than {}",
            bytes.len() >> 20,
            LONGEST_RECORD >> 20
        ))
        .hint("split it into several, or leave out the fields that are not used"));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Error::new(format!(
            "not valid UTF-8 at byte {} of the line",
            error.valid_up_to() + 1
        ))
        .hint("write the file as UTF-8")
    })?;
    serde_json::from_str(text).map_err(|error| {
        let fact = not_json(&error);
        match error.is_eof() {
            true => fact.hint("a record must be on one line, or all of them in one JSON array"),
            false => fact,
        }
    })
}

/// What serde_json says, without the line that counts from the start of the record.
fn not_json(error: &serde_json::Error) -> Error {
    let said = json_fault(error);
    let what = said.split(" at line ").next().unwrap_or_default();
    Error::new(format!(
        "not valid JSON at column {}: {what}",
        error.column()
    ))
}

fn too_long(what: &str, limit: u64, file: &Path) -> Error {
    Error::new(format!("{what} is longer than {} MiB", limit >> 20))
        .at(file.display())
        .hint("write one record a line, as JSON lines")
}

fn unreadable(error: &std::io::Error) -> Error {
    use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    match error.kind() {
        UnexpectedEof | InvalidData | InvalidInput => {
            Error::new(format!("the gzip file is damaged: {error}"))
                .hint("the file may be cut short: compare its size with the original")
        }
        _ => Error::new(error.to_string()),
    }
}

/// Files that are no text in UTF-8, told by how they start.
fn refuse_other_formats(line: &[u8]) -> Result<()> {
    // The last column unpacks what is only packed.
    let known: [(&[u8], &str, &str); 10] = [
        (b"PAR1", "a Parquet file", ""),
        (b"PK\x03\x04", "a zip archive", ""),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive", ""),
        (b"\xff\xfe", "text in UTF-16", ""),
        (b"\xfe\xff", "text in UTF-16", ""),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -d"),
        (b"\xfd7zXZ\0", "compressed with xz", "xz -d"),
        (b"BZh", "compressed with bzip2", "bzip2 -d"),
        (b"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -d"),
        (b"\x1f\x9d", "compressed with compress", "uncompress"),
    ];
    match known.iter().find(|(start, ..)| line.starts_with(start)) {
        Some((_, what, "")) => Err(Error::new(format!("this is {what}"))
            .hint("convert it to JSON lines in UTF-8, one record a line, gzipped or not")),
        Some((_, what, tool)) => Err(Error::new(format!("this is {what}")).hint(format!(
            "unpack it with `{tool}`, and pack it with `gzip` if it is to stay small"
        ))),
        None => Ok(()),
    }
}
