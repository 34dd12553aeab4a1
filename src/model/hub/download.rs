//! One file: continued where it stopped, checked, and only then put in its place.

use super::Progress;
use super::cache::Cache;
use super::client::{Client, Failure};
use crate::digest::hexadecimal;
use crate::{Context, Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use ureq::http::StatusCode;

/// Bytes of a file whose size nobody says, at most: it is none of the weights, and must not fill the disk.
const LARGEST_OF_UNKNOWN_SIZE: u64 = 256 << 20;

/// A file on the hub.
pub(super) struct Remote {
    pub(super) name: String,
    /// Names the content, and the blob in the cache.
    pub(super) etag: String,
    pub(super) size: Option<u64>,
    pub(super) sha256: Option<String>,
}

/// Brings a file into the snapshot of `commit`.
pub(super) fn download(
    client: &Client<'_>,
    cache: &Cache,
    commit: &str,
    remote: &Remote,
    progress: &mut dyn Progress,
) -> Result<()> {
    let blob = cache.blob(&remote.etag);
    if let Some(folder) = blob.parent() {
        fs::create_dir_all(folder).at(folder.display())?;
    }
    let _lock = cache.lock(&remote.etag, &remote.name, progress)?;
    // Another revision may have brought the same content, or another process while we waited.
    if !fs::metadata(&blob).is_ok_and(|file| remote.size.is_none_or(|size| size == file.len())) {
        let mut partial = Partial::open(cache, remote)?;
        partial.complete(client, commit, remote, progress)?;
        partial
            .file
            .sync_all()
            .map_err(|error| disk(error, remote))?;
        fs::rename(cache.partial(&remote.etag), &blob).at(blob.display())?;
    }
    progress.advance(&remote.name, remote.size.unwrap_or_default());
    cache.link(&remote.etag, commit, &remote.name)
}

/// A file that grows, and the checksum of what is in it.
struct Partial {
    file: File,
    length: u64,
    hash: Sha256,
    hashed: u64,
}

impl Partial {
    fn open(cache: &Cache, remote: &Remote) -> Result<Self> {
        let path = cache.partial(&remote.etag);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .at(path.display())?;
        let length = file.metadata().at(path.display())?.len();
        Ok(Self {
            file,
            length,
            hash: Sha256::new(),
            hashed: 0,
        })
    }

    /// Transfers until all is there and right. Attempts are counted from the last one that brought something.
    fn complete(
        &mut self,
        client: &Client<'_>,
        commit: &str,
        remote: &Remote,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let mut continued = self.length > 0;
        let mut attempt = 1;
        loop {
            let before = self.length;
            match self.transfer(client, commit, remote, progress) {
                Ok(()) => match self.check(remote) {
                    Err(_) if continued => {
                        progress.notice(&format!("what was left of an earlier download of `{}` is damaged: starting again", remote.name));
                        self.clear().map_err(|error| disk(error, remote))?;
                        continued = false;
                    }
                    Err(error) => {
                        self.clear().map_err(|error| disk(error, remote))?;
                        return Err(error);
                    }
                    Ok(()) => return Ok(()),
                },
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Connection(error)) => {
                    if self.length > before {
                        attempt = 1;
                    }
                    if attempt >= client.attempts() {
                        let hint = error.hint_text().unwrap_or_default().to_owned();
                        return Err(error.hint(format!(
                            "run the command again to continue at byte {}; {hint}",
                            self.length
                        )));
                    }
                    progress.notice(&format!(
                        "{error}; going on with `{}` at byte {}",
                        remote.name, self.length
                    ));
                    client.pause(attempt, progress)?;
                    attempt += 1;
                }
            }
        }
    }

    /// Asks for what is missing and appends it.
    fn transfer(
        &mut self,
        client: &Client<'_>,
        commit: &str,
        remote: &Remote,
        progress: &mut dyn Progress,
    ) -> Result<(), Failure> {
        let full = |error| Failure::Final(disk(error, remote));
        if remote.size.is_some_and(|size| self.length > size) {
            self.clear().map_err(full)?;
        }
        self.hash_present().map_err(full)?;
        progress.advance(&remote.name, self.length);
        if remote.size == Some(self.length) {
            return Ok(());
        }
        let response = client.content(commit, &remote.name, self.length)?;
        let encoding = response.headers().get("content-encoding");
        if let Some(encoding) = encoding.filter(|encoding| *encoding != "identity") {
            // Neither its length nor its checksum would be the file's.
            return Err(Error::new(format!(
                "the server sends the file encoded ({encoding:?}), which was not asked for"
            ))
            .at(&remote.name)
            .hint("a proxy or the mirror in `HF_ENDPOINT` changes the file")
            .into());
        }
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = response
                    .headers()
                    .get("content-range")
                    .and_then(|range| range.to_str().ok());
                let start = range.and_then(|range| {
                    range
                        .strip_prefix("bytes ")?
                        .split('-')
                        .next()?
                        .trim()
                        .parse()
                        .ok()
                });
                if start != Some(self.length) {
                    return Err(Error::new(format!(
                        "asked for the file from byte {} on, the server answered with {}",
                        self.length,
                        range.unwrap_or("no range")
                    ))
                    .at(&remote.name)
                    .into());
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                self.clear().map_err(full)?;
                return Err(Failure::Connection(
                    Error::new("the server has less of the file than is here").at(&remote.name),
                ));
            }
            // The whole file: a server that does not know ranges, or nothing was here yet.
            _ => self.clear().map_err(full)?,
        }
        let mut content = response.into_body().into_reader();
        let mut block = vec![0; 1 << 18];
        loop {
            if progress.stop_requested() {
                return Err(Error::interrupted(format!(
                    "stopped at byte {} of `{}`",
                    self.length, remote.name
                ))
                .hint("run the command again to continue there")
                .into());
            }
            let read = match content.read(&mut block) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(client.connection(&ureq::Error::from(error))),
            };
            let bytes = block.get(..read).unwrap_or_default();
            let most = remote.size.unwrap_or(LARGEST_OF_UNKNOWN_SIZE);
            if self.length + read as u64 > most {
                self.clear().map_err(full)?;
                return Err(Error::new(format!(
                    "the server sends more than the {most} bytes that the file may have"
                ))
                .at(&remote.name)
                .into());
            }
            self.file.write_all(bytes).map_err(full)?;
            self.hash.update(bytes);
            self.length += read as u64;
            self.hashed = self.length;
            progress.advance(&remote.name, self.length);
        }
        match remote.size {
            Some(size) if self.length < size => Err(Failure::Connection(
                Error::new(format!(
                    "the connection ended at byte {} of {size}",
                    self.length
                ))
                .at(&remote.name),
            )),
            _ => Ok(()),
        }
    }

    /// Brings the checksum up to what is in the file, and the file to its end.
    fn hash_present(&mut self) -> io::Result<()> {
        if self.hashed < self.length {
            self.file.seek(SeekFrom::Start(self.hashed))?;
            io::copy(
                &mut (&self.file).take(self.length - self.hashed),
                &mut HashWriter(&mut self.hash),
            )?;
            self.hashed = self.length;
        }
        self.file.seek(SeekFrom::Start(self.length)).map(|_| ())
    }

    fn clear(&mut self) -> io::Result<()> {
        (self.length, self.hashed, self.hash) = (0, 0, Sha256::new());
        self.file.set_len(0)?;
        self.file.rewind()
    }

    fn check(&self, remote: &Remote) -> Result<()> {
        let Some(expected) = &remote.sha256 else {
            return Ok(());
        };
        let found = hexadecimal(&self.hash.clone().finalize());
        if found.eq_ignore_ascii_case(expected) {
            return Ok(());
        }
        Err(Error::new(format!("the file arrived damaged: its SHA-256 is {found}, and the hub says {expected}"))
            .at(&remote.name)
            .hint("run the command again; if it stays, a proxy or the mirror in `HF_ENDPOINT` changes the file"))
    }
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What went wrong with writing the file here.
fn disk(error: io::Error, remote: &Remote) -> Error {
    if !matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    ) {
        return crate::IntoError::into_error(error).at(&remote.name);
    }
    let size = remote
        .size
        .map(|size| format!(" of {size} bytes"))
        .unwrap_or_default();
    Error::new(format!("the disk is full: there is no room for the file{size}"))
        .at(&remote.name)
        .hint("free some space or set `HF_HOME` to a folder on another disk; what has arrived is kept and continued")
}
