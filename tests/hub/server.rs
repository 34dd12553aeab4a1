//! A hub in miniature: a loopback server with the hub's addresses and headers, and a second one as the storage that
//! large files are redirected to.

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

/// A file of a repository: large ones lie in the storage.
#[derive(Clone)]
pub(crate) enum Content {
    Small(Vec<u8>),
    Large(Vec<u8>),
}

impl Content {
    pub(crate) fn bytes(&self) -> &[u8] {
        let (Self::Small(bytes) | Self::Large(bytes)) = self;
        bytes
    }

    /// As the hub has it: SHA-256 of large files, 40 digits for small ones.
    pub(crate) fn etag(&self) -> String {
        let hash = sha256(self.bytes());
        match self {
            Self::Small(_) => hash[..40].to_owned(),
            Self::Large(_) => hash,
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) line: String,
    pub(crate) range: Option<String>,
    pub(crate) token: Option<String>,
    pub(crate) to_storage: bool,
}

/// What the servers hold, how they misbehave, and what they were asked.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) commits: BTreeMap<String, BTreeMap<String, Content>>,
    pub(crate) references: BTreeMap<String, String>,
    storage: String,
    pub(crate) requests: Vec<Request>,
    /// After so many bytes of content the storage closes the connection, so many times.
    pub(crate) cuts: Vec<usize>,
    pub(crate) ignores_ranges: bool,
    pub(crate) damages: bool,
    /// Answers a request for the rest of a file with what lies one byte further.
    pub(crate) shifts: bool,
    /// Says that content is compressed.
    pub(crate) encodes: bool,
    /// Answers every request to the hub: status line and headers.
    pub(crate) refusal: Option<String>,
    pub(crate) extra_siblings: Vec<String>,
    pub(crate) etag: Option<String>,
    pub(crate) commit: Option<String>,
    pub(crate) answers: Vec<Vec<u8>>,
}

/// Serves the model `org/tiny`.
pub(crate) struct Server {
    state: Arc<Mutex<State>>,
    pub(crate) endpoint: String,
}

impl Server {
    /// With these files at `main`, which is `commit`.
    pub(crate) fn start(commit: &str, files: BTreeMap<String, Content>) -> Self {
        let state = Arc::new(Mutex::new(State {
            commits: BTreeMap::from([(commit.to_owned(), files)]),
            references: BTreeMap::from([("main".to_owned(), commit.to_owned())]),
            ..State::default()
        }));
        let address = |to_storage: bool| {
            let state = state.clone();
            listen(move |stream| answer(stream, &state, to_storage))
        };
        let (storage, endpoint) = (address(true), address(false));
        let server = Self { state, endpoint };
        server.state().storage = storage;
        server
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test thread panicked")
    }
}

/// Starts a server that answers with `head`, and then `block` over and over for as long as anyone listens.
pub(crate) fn without_end(head: &'static str, block: &'static [u8]) -> String {
    listen(move |mut stream| {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        while lines
            .next()
            .is_some_and(|line| line.is_ok_and(|line| !line.is_empty()))
        {}
        stream.write_all(head.as_bytes())?;
        loop {
            stream.write_all(block)?;
        }
    })
}

/// Answers each connection on a thread of its own, and returns the address.
fn listen(answer: impl Fn(TcpStream) -> std::io::Result<()> + Clone + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            // A client that goes away is no concern of the server.
            std::thread::spawn(move || drop(answer(stream)));
        }
    });
    address
}

fn answer(mut stream: TcpStream, state: &Mutex<State>, to_storage: bool) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let line = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut headers = BTreeMap::new();
    for header in lines {
        let header = header?;
        let Some((name, value)) = header.split_once(": ") else {
            break;
        };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let (head, body) = {
        let mut state = state.lock().expect("no test thread panicked");
        let range = headers.get("range").cloned();
        let token = headers.get("authorization").cloned();
        state.requests.push(Request {
            line: line.clone(),
            range: range.clone(),
            token,
            to_storage,
        });
        if let Some(garbage) = state.answers.pop() {
            return stream.write_all(&garbage);
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        match to_storage {
            true => from_storage(&mut state, &path, range.as_deref()),
            false => from_hub(&state, &path),
        }
    };
    let length = if head.contains("Content-Length") {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", body.len())
    };
    write!(stream, "HTTP/1.1 {head}{length}Connection: close\r\n\r\n")?;
    if !line.starts_with("HEAD") {
        stream.write_all(&body)?;
    }
    stream.flush()
}

fn from_hub(state: &State, path: &str) -> (String, Vec<u8>) {
    if let Some(refusal) = &state.refusal {
        return (refusal.clone(), Vec::new());
    }
    let not_found = |code: &str| {
        (
            format!("404 Not Found\r\nX-Error-Code: {code}\r\n"),
            Vec::new(),
        )
    };
    let resolve = |revision: &str| {
        let revision = revision.replace("%2F", "/");
        let commit = state.references.get(&revision).cloned().unwrap_or(revision);
        state
            .commits
            .get(&commit)
            .map(|files| (commit.clone(), files))
    };
    if let Some(revision) = path.strip_prefix("/api/models/org/tiny/revision/") {
        assert!(revision.ends_with("?blobs=true"), "{path}");
        let Some((commit, files)) = resolve(revision.trim_end_matches("?blobs=true")) else {
            return not_found("RevisionNotFound");
        };
        let commit = state.commit.clone().unwrap_or(commit);
        let siblings = files.iter().map(|(name, content)| match content {
            Content::Small(bytes) => serde_json::json!({"rfilename": name, "size": bytes.len(), "blobId": content.etag()}),
            Content::Large(bytes) => {
                serde_json::json!({"rfilename": name, "size": bytes.len(), "lfs": {"sha256": content.etag(), "size": bytes.len(), "pointerSize": 130}})
            }
        });
        let extra = state
            .extra_siblings
            .iter()
            .map(|name| serde_json::json!({"rfilename": name}));
        let siblings: Vec<_> = siblings.chain(extra).collect();
        let answer = serde_json::json!({"id": "org/tiny", "sha": commit, "siblings": siblings, "gated": false});
        return (
            "200 OK\r\nContent-Type: application/json\r\n".to_owned(),
            answer.to_string().into_bytes(),
        );
    }
    // The hub answers for small files under another address of its own.
    let (path, is_cache) = match path.strip_prefix("/api/resolve-cache/models") {
        Some(rest) => (rest, true),
        None => (path, false),
    };
    let Some((revision, name)) = path
        .strip_prefix("/org/tiny/resolve/")
        .and_then(|rest| rest.split_once('/'))
    else {
        return not_found("RepoNotFound");
    };
    let Some((commit, content)) =
        resolve(revision).and_then(|(commit, files)| Some((commit, files.get(name)?)))
    else {
        return not_found("EntryNotFound");
    };
    let etag = state.etag.clone().unwrap_or_else(|| content.etag());
    match content {
        Content::Small(_) if !is_cache => (
            format!("307 Temporary Redirect\r\nLocation: /api/resolve-cache/models{path}\r\n"),
            Vec::new(),
        ),
        Content::Small(bytes) => (
            format!("200 OK\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {commit}\r\n"),
            bytes.clone(),
        ),
        Content::Large(bytes) => (
            format!(
                "302 Found\r\nX-Repo-Commit: {commit}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\n\
                 ETag: \"pointer\"\r\nLocation: {}/blobs/{}?signature=1\r\n",
                bytes.len(),
                state.storage,
                content.etag()
            ),
            b"Found. Redirecting".to_vec(),
        ),
    }
}

fn from_storage(state: &mut State, path: &str, range: Option<&str>) -> (String, Vec<u8>) {
    let etag = path
        .trim_start_matches("/blobs/")
        .trim_end_matches("?signature=1");
    let content = state
        .commits
        .values()
        .flat_map(BTreeMap::values)
        .find(|content| content.etag() == etag);
    let Some(content) = content else {
        return ("403 Forbidden\r\n".to_owned(), Vec::new());
    };
    let mut bytes = content.bytes().to_vec();
    if state.damages
        && let Some(byte) = bytes.last_mut()
    {
        *byte ^= 1;
    }
    let whole = bytes.len();
    let start: usize = range
        .filter(|_| !state.ignores_ranges)
        .and_then(|range| {
            range
                .strip_prefix("bytes=")?
                .strip_suffix('-')?
                .parse()
                .ok()
        })
        .unwrap_or(0);
    let mut body = bytes.split_off(start.min(whole));
    let length = body.len();
    if let Some(cut) = state.cuts.pop() {
        body.truncate(cut);
    }
    let head = match start {
        0 => format!("200 OK\r\nContent-Length: {length}\r\n"),
        _ => format!(
            "206 Partial Content\r\nContent-Range: bytes {}-{}/{whole}\r\nContent-Length: {length}\r\n",
            start + usize::from(state.shifts),
            whole - 1
        ),
    };
    let encoding = match state.encodes {
        true => "Content-Encoding: gzip\r\n",
        false => "",
    };
    (head + encoding, body)
}
