//! Requests to the hub: redirects followed by hand, so that the token goes to the hub alone, and answers as errors
//! that say what to do.

use super::cache::is_commit;
use super::download::Remote;
use super::{HubId, HubOptions, Progress, checkpoint};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Component, Path};
use std::time::Duration;
use ureq::http::{HeaderMap, Response, StatusCode, Uri};
use ureq::{Agent, Body, Proxy};

const NOT_THE_HUB: &str =
    "check `HF_ENDPOINT`, and that no proxy or login page answers in its place";

/// Bytes of a listing, at most: a file takes a few hundred.
const LONGEST_LISTING: u64 = 64 << 20;
/// Files of a repository, at most: those of models have dozens, with many checkpoints thousands.
const MOST_FILES: usize = 100_000;

/// Why a request brought nothing.
pub(super) enum Failure {
    /// The same request may succeed later.
    Connection(Error),
    /// It will not.
    Final(Error),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Connection(error) | Failure::Final(error) => error,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// What a repository holds at a commit.
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: BTreeMap<String, ListedFile>,
}

#[derive(Default)]
pub(super) struct ListedFile {
    size: Option<u64>,
    sha256: Option<String>,
}

/// What the headers of the hub say about a file.
#[derive(Default)]
struct Facts {
    etag: Option<String>,
    size: Option<u64>,
    commit: Option<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum Method {
    /// Facts only: ends where the hub hands over to another host.
    Head,
    /// Content, from a byte on.
    Get { from: u64 },
}

pub(super) struct Client<'a> {
    agent: Agent,
    options: &'a HubOptions,
    id: &'a HubId,
}

impl<'a> Client<'a> {
    pub(super) fn new(options: &'a HubOptions, id: &'a HubId) -> Result<Self> {
        let config = Agent::config_builder()
            .user_agent(concat!("retune/", env!("CARGO_PKG_VERSION")))
            // A compressed answer has neither the size nor the ranges of the file.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(Some(options.timeout))
            .timeout_connect(Some(options.timeout))
            .timeout_recv_response(Some(options.timeout))
            .timeout_per_read(Some(options.timeout))
            .proxy(proxy(options)?)
            .build();
        Ok(Self {
            agent: config.into(),
            options,
            id,
        })
    }

    pub(super) fn attempts(&self) -> u32 {
        self.options.attempts
    }

    /// Repeats a request while the connection fails, with growing pauses.
    pub(super) fn retrying<T>(
        &self,
        attempts: u32,
        progress: &mut dyn Progress,
        request: impl Fn(&Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut attempt = 1;
        loop {
            match request(self) {
                Err(Failure::Connection(error)) if attempt < attempts => {
                    progress.notice(&format!("{error}; trying again"));
                    self.pause(attempt, progress)?;
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    /// Waits before the next attempt: a pause, twice as long each time, a minute at most.
    pub(super) fn pause(&self, attempt: u32, progress: &dyn Progress) -> Result<()> {
        let factor = 1 << attempt.saturating_sub(1).min(10);
        let mut left = self
            .options
            .pause
            .saturating_mul(factor)
            .min(Duration::from_secs(60));
        while !left.is_zero() {
            if progress.stop_requested() {
                return Err(Error::interrupted("stopped while waiting for the network"));
            }
            let step = left.min(Duration::from_millis(100));
            std::thread::sleep(step);
            left -= step;
        }
        Ok(())
    }

    /// The commit and the files of the revision.
    pub(super) fn listing(&self) -> Result<Listing, Failure> {
        #[derive(serde::Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
            size: Option<u64>,
            lfs: Option<LargeFile>,
        }
        #[derive(serde::Deserialize)]
        struct LargeFile {
            sha256: Option<String>,
        }
        let path = format!(
            "/api/models/{}/revision/{}?blobs=true",
            self.id.repository(),
            encoded(self.id.revision())
        );
        let (response, _) = self.request(Method::Get { from: 0 }, &path, None)?;
        let body = response
            .into_body()
            .into_with_config()
            .limit(LONGEST_LISTING)
            .read_to_vec()
            .map_err(|error| match error {
                ureq::Error::BodyExceedsLimit(_) => Failure::Final(too_much(self.id)),
                other => self.connection(&other),
            })?;
        let answer: Answer = serde_json::from_slice(&body).map_err(|error| {
            Error::new(format!(
                "the answer of {} is not what the hub sends: {error}",
                self.options.endpoint
            ))
            .hint(NOT_THE_HUB)
        })?;
        if answer.siblings.len() > MOST_FILES {
            return Err(too_much(self.id).into());
        }
        if !is_commit(&answer.sha) {
            return Err(Error::new(format!(
                "the hub names a commit that is none: {:?}",
                answer.sha
            ))
            .hint(NOT_THE_HUB)
            .into());
        }
        let hostile: Vec<&str> = answer
            .siblings
            .iter()
            .map(|file| file.rfilename.as_str())
            .filter(|name| {
                !Path::new(name)
                    .components()
                    .all(|part| matches!(part, Component::Normal(_)))
            })
            .collect();
        if !hostile.is_empty() {
            return Err(Error::new(format!(
                "`{}` lists files outside of itself: {}",
                self.id,
                checkpoint::listed(&hostile)
            ))
            .hint("do not use this repository; if the name is right, report it to the hub")
            .into());
        }
        let files = answer.siblings.into_iter().map(|file| {
            let sha256 = file.lfs.and_then(|large| large.sha256);
            (
                file.rfilename,
                ListedFile {
                    size: file.size,
                    sha256,
                },
            )
        });
        Ok(Listing {
            commit: answer.sha.to_ascii_lowercase(),
            files: files.collect(),
        })
    }

    /// Size and checksum of a file at the commit of `listing`.
    pub(super) fn remote(
        &self,
        listing: &Listing,
        name: &str,
        progress: &mut dyn Progress,
    ) -> Result<Remote> {
        let path = self.file_path(&listing.commit, name);
        let (_, facts) = self.retrying(self.options.attempts, progress, |client| {
            client.request(Method::Head, &path, Some(name))
        })?;
        if facts
            .commit
            .as_ref()
            .is_some_and(|commit| *commit != listing.commit)
        {
            return Err(Error::new(format!(
                "the hub answered for another commit of `{}` than was asked for",
                self.id
            ))
            .at(name)
            .hint("run the command again; if it stays, the mirror in `HF_ENDPOINT` is at fault"));
        }
        let unlisted = ListedFile::default();
        let listed = listing.files.get(name).unwrap_or(&unlisted);
        let etag = facts
            .etag
            .or_else(|| listed.sha256.clone())
            .ok_or_else(|| {
                Error::new(
                    "the hub does not say which version of the file it has: there is no `ETag`",
                )
                .at(name)
                .hint("the mirror in `HF_ENDPOINT` is at fault")
            })?;
        // It becomes a file name.
        let harmless = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_');
        if etag.is_empty() || etag.len() > 128 || !etag.chars().all(harmless) {
            return Err(Error::new(format!(
                "the hub sends an `ETag` that cannot be one: {etag:?}"
            ))
            .at(name)
            .hint(NOT_THE_HUB));
        }
        // Large files have their SHA-256 as `ETag`, small ones the hash that git gives them.
        let is_sha256 = etag.len() == 64 && etag.bytes().all(|digit| digit.is_ascii_hexdigit());
        let sha256 = listed
            .sha256
            .clone()
            .or_else(|| is_sha256.then(|| etag.clone()));
        Ok(Remote {
            name: name.to_owned(),
            etag,
            size: facts.size.or(listed.size),
            sha256,
        })
    }

    /// The content of a file, from byte `from` on if the server knows how to.
    pub(super) fn content(
        &self,
        commit: &str,
        name: &str,
        from: u64,
    ) -> Result<Response<Body>, Failure> {
        let path = self.file_path(commit, name);
        self.request(Method::Get { from }, &path, Some(name))
            .map(|(response, _)| response)
    }

    fn file_path(&self, commit: &str, name: &str) -> String {
        format!(
            "/{}/resolve/{commit}/{}",
            self.id.repository(),
            encoded(name)
        )
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        file: Option<&str>,
    ) -> Result<(Response<Body>, Facts), Failure> {
        let mut address = format!("{}{path}", self.options.endpoint);
        let hub = origin(&address)?;
        let mut facts = Facts::default();
        for _ in 0..10 {
            let is_hub = origin(&address)? == hub;
            let mut request = match method {
                Method::Head => self.agent.head(&address),
                Method::Get { .. } => self.agent.get(&address),
            };
            if let Method::Get { from } = method
                && from > 0
            {
                request = request.header("Range", format!("bytes={from}-"));
            }
            if let Some(token) = self.options.token.as_ref().filter(|_| is_hub) {
                request = request.header("Authorization", format!("Bearer {}", token.text()));
            }
            let response = request.call().map_err(|error| self.connection(&error))?;
            facts.learn(&response);
            if response.status().is_redirection() && response.status() != StatusCode::NOT_MODIFIED {
                let next = target(&address, response.headers())?;
                if method == Method::Head && facts.etag.is_some() && origin(&next)? != hub {
                    return Ok((response, facts));
                }
                address = next;
                continue;
            }
            // Past the end: the caller has more bytes than there are and starts again.
            if response.status().is_success()
                || response.status() == StatusCode::RANGE_NOT_SATISFIABLE
            {
                return Ok((response, facts));
            }
            return Err(match is_hub {
                true => self.refusal(&response, file),
                false => self.storage_refusal(&response, file),
            });
        }
        Err(
            Error::new(format!("{} redirects in a circle", self.options.endpoint))
                .hint(NOT_THE_HUB)
                .into(),
        )
    }

    /// No answer, or half of one.
    pub(super) fn connection(&self, error: &ureq::Error) -> Failure {
        let host = self.options.endpoint.as_str();
        let fact = match error {
            ureq::Error::HostNotFound => {
                format!("no connection to {host}: the name is not known, or there is no network")
            }
            ureq::Error::Timeout(_) => format!(
                "no answer from {host} in {} seconds",
                self.options.timeout.as_secs()
            ),
            other => format!("no connection to {host}: {other}"),
        };
        Failure::Connection(Error::new(fact).hint(
            "check the network; `HF_ENDPOINT` names a mirror, `HTTPS_PROXY` a proxy, and a folder works without either",
        ))
    }

    /// The hub says no.
    fn refusal(&self, response: &Response<Body>, file: Option<&str>) -> Failure {
        let (id, repository, endpoint) = (self.id, self.id.repository(), &self.options.endpoint);
        let status = response.status();
        let code = text(response.headers(), "x-error-code").unwrap_or_default();
        let page = format!("{endpoint}/{repository}");
        let login = format!("set `HF_TOKEN` to a token from {endpoint}/settings/tokens");
        let with_token = self.options.token.is_some();
        let error = match (status.as_u16(), code.as_str()) {
            (401 | 403, "GatedRepo") if with_token => Error::new(format!(
                "`{repository}` is gated, and this token has no access to it ({status})"
            ))
            .hint(format!(
                "ask for access at {page} with the account of the token"
            )),
            (401 | 403, "GatedRepo") => Error::new(format!(
                "`{repository}` is gated: it needs a token ({status})"
            ))
            .hint(format!("ask for access at {page}, then {login}")),
            // To those it does not know, the hub says 401 whether a repository is private or does not exist.
            (401, _) if !with_token => Error::new(format!(
                "the hub has no public model `{repository}` ({status})"
            ))
            .hint(format!(
                "check the spelling at {page}; if it is private or gated, {login}"
            )),
            (401, _) => Error::new(format!("the hub does not accept the token ({status})"))
                .hint(format!("it may have expired: {login}")),
            (403, _) => Error::new(format!("no permission to read `{repository}` ({status})"))
                .hint(format!(
                    "the token may lack the right to read gated or private repositories: {login}"
                )),
            (404, "RevisionNotFound") => Error::new(format!(
                "`{repository}` has no revision `{}`",
                id.revision()
            ))
            .hint(format!(
                "its branches and tags are listed at {page}/tree/main"
            )),
            (404, "EntryNotFound") => {
                Error::new(format!("`{id}` has no file `{}`", file.unwrap_or_default()))
                    .hint("the repository may have changed meanwhile: run the command again")
            }
            (404, code) => {
                let revision = match (id.revision(), code) {
                    ("main", _) | (_, "RepoNotFound") => String::new(),
                    (revision, _) => format!(", or it has no revision `{revision}`"),
                };
                Error::new(format!("the hub has no model `{repository}`{revision} (404), and there is no such folder here"))
                    .hint(format!("check the spelling at {page}; a private model needs a token: {login}"))
            }
            (429 | 500..=599, _) => {
                return Failure::Connection(
                    Error::new(format!("{endpoint} cannot answer now: {status}"))
                        .hint("try again later, or with another `HF_ENDPOINT`"),
                );
            }
            _ => {
                let message = text(response.headers(), "x-error-message").unwrap_or_default();
                Error::new(format!("{endpoint} refuses `{id}`: {status} {message}")).hint(
                    "check `HF_ENDPOINT`, and that no proxy or login page answers in its place",
                )
            }
        };
        Failure::Final(error)
    }

    /// The host of the content says no. Its addresses expire, so a new one from the hub may work.
    fn storage_refusal(&self, response: &Response<Body>, file: Option<&str>) -> Failure {
        Failure::Connection(
            Error::new(format!(
                "the storage behind {} refuses `{}`: {}",
                self.options.endpoint,
                file.unwrap_or("a file"),
                response.status()
            ))
            .hint(
                "try again later; a proxy or firewall may block the host that the hub redirects to",
            ),
        )
    }
}

impl Facts {
    /// Takes what a response says; a later hop of the same request completes an earlier one.
    fn learn(&mut self, response: &Response<Body>) {
        let headers = response.headers();
        // The linked values are those of the file, the plain ones may be those of a pointer to it.
        let is_content = response.status().is_success();
        let etag = text(headers, "x-linked-etag")
            .or_else(|| text(headers, "etag").filter(|_| self.etag.is_none()));
        if let Some(etag) = etag {
            self.etag = Some(etag.trim_start_matches("W/").trim_matches('"').to_owned());
        }
        let length = text(headers, "content-length").filter(|_| is_content && self.size.is_none());
        if let Some(size) = text(headers, "x-linked-size")
            .or(length)
            .and_then(|size| size.parse().ok())
        {
            self.size = Some(size);
        }
        if self.commit.is_none() {
            self.commit = text(headers, "x-repo-commit").map(|commit| commit.to_ascii_lowercase());
        }
    }
}

fn too_much(id: &HubId) -> Error {
    Error::new(format!("`{id}` lists more files than any model has")).hint(NOT_THE_HUB)
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Where a redirect leads.
fn target(address: &str, headers: &HeaderMap) -> Result<String> {
    let location = text(headers, "location")
        .ok_or_else(|| Error::new(format!("{address} redirects to nowhere")).hint(NOT_THE_HUB))?;
    let (scheme, host, port) = origin(address)?;
    let next = match location.strip_prefix("//") {
        Some(rest) => format!("{scheme}://{rest}"),
        None if location.starts_with('/') => format!("{scheme}://{host}:{port}{location}"),
        None => location,
    };
    if scheme == "https" && origin(&next)?.0 != "https" {
        return Err(Error::new(format!(
            "{address} redirects to an address without encryption"
        ))
        .hint("the mirror in `HF_ENDPOINT` is at fault"));
    }
    Ok(next)
}

/// Scheme, host and port: what decides who gets the token.
fn origin(address: &str) -> Result<(String, String, u16)> {
    let error = || Error::new(format!("`{address}` is not a web address")).hint(NOT_THE_HUB);
    let uri: Uri = address.parse().map_err(|_| error())?;
    let scheme = uri.scheme_str().ok_or_else(error)?.to_ascii_lowercase();
    let default = match scheme.as_str() {
        "https" => 443,
        "http" => 80,
        _ => return Err(error()),
    };
    let host = uri.host().ok_or_else(error)?.to_ascii_lowercase();
    Ok((scheme, host, uri.port_u16().unwrap_or(default)))
}

/// A text as one part of an address: all but letters, digits and `-._~` in percent form.
fn encoded(part: &str) -> String {
    let mut encoded = String::with_capacity(part.len());
    for byte in part.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte))
            }
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    encoded
}

fn proxy(options: &HubOptions) -> Result<Option<Proxy>> {
    let Some(address) = &options.proxy else {
        return Ok(None);
    };
    let bad = |error: ureq::Error| {
        Error::new(format!("the proxy cannot be used: {error}"))
            .hint("`HTTPS_PROXY` should look like `http://host:port`")
    };
    let plain = Proxy::new(address).map_err(bad)?;
    let mut builder = Proxy::builder(plain.protocol())
        .host(plain.host())
        .port(plain.port());
    if let (Some(name), Some(password)) = (plain.username(), plain.password()) {
        builder = builder.username(name).password(password);
    }
    let builder = options
        .proxy_exceptions
        .iter()
        .fold(builder, |builder, host| builder.no_proxy(host));
    builder.build().map(Some).map_err(bad)
}
