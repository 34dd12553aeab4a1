//! Models by name: `org/name` or `org/name@revision` becomes a folder, downloaded once into the Hugging Face cache.
//!
//! The cache has the layout of huggingface_hub (`models--org--name/{blobs,refs,snapshots}`), so what Python has
//! downloaded is found here and the reverse. Format: <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>;
//! the HTTP side as in `file_download.py` of huggingface_hub.
//!
//! The transfer is our own, over ureq. The crate hf-hub 0.5 sends the token on to the host that a download is
//! redirected to, appends the whole file to the part when a server ignores `Range`, uses an unchecked `ETag` as a file
//! name, and compares neither size nor checksum.

mod cache;
mod client;
mod download;
mod options;
#[cfg(test)]
mod tests;

use super::checkpoint;
use crate::{Error, Result};
use cache::Cache;
use client::{Client, Failure, Listing};
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

pub use options::{Access, HubOptions, Token};

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A folder on this machine.
    Folder(PathBuf),
    /// A repository on the hub.
    Hub(HubId),
}

/// A model repository at a revision. Both are checked: they become parts of paths and addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    repository: String,
    revision: String,
}

/// A file that a download needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedFile {
    /// Its name.
    pub name: String,
    /// Its size in bytes, if the hub says.
    pub size: Option<u64>,
    /// How many of its bytes are already here.
    pub present: u64,
}

/// Is told how a download goes. `()` shows nothing.
pub trait Progress {
    /// All files of the model, before the first byte.
    fn begin(&mut self, _files: &[PlannedFile]) {}
    /// `present` bytes of `file` are here; less than before when it had to be started again.
    fn advance(&mut self, _file: &str, _present: u64) {}
    /// `file` is complete and checked.
    fn finish(&mut self, _file: &str) {}
    /// Something a user may want to know, such as that a connection was lost and is tried again.
    fn notice(&mut self, _text: &str) {}
    /// Asked between blocks; true ends the download, to be continued by the next one.
    fn stop_requested(&self) -> bool {
        false
    }
}

impl Progress for () {}

impl ModelSource {
    /// Tells a folder from a hub id: a folder that exists wins, then comes what has the form of an id.
    pub fn parse(text: &str) -> Result<Self> {
        let path = Path::new(text);
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.is_file() {
            return Err(Error::new("expected a folder, found a file")
                .at(text)
                .hint("give the folder it lies in"));
        }
        HubId::parse(text).map(Self::Hub).ok_or_else(|| {
            // An address may hold a password.
            let shown = match text.split_once("://") {
                Some((protocol, rest)) if rest.contains('@') => format!("{protocol}://…"),
                _ => text.to_owned(),
            };
            let error = Error::new(format!("`{shown}` is neither an existing folder nor a hub id such as `org/name` or `org/name@revision`"));
            match text.split_once("://").and_then(|(_, rest)| rest.split_once('/')) {
                Some((_, id)) => error.hint(format!("give the name alone: `{id}`")),
                None => error.hint("check the spelling of the path, or give organisation and name of a model on the hub"),
            }
        })
    }

    /// The folder itself, downloaded first if need be.
    pub fn folder(&self, options: &HubOptions, progress: &mut dyn Progress) -> Result<PathBuf> {
        match self {
            Self::Folder(folder) => Ok(folder.clone()),
            Self::Hub(id) => fetch(id, options, progress),
        }
    }
}

impl HubId {
    /// Reads `org/name` or `org/name@revision`; `None` if it has another form.
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (organisation, name) = repository.split_once('/')?;
        let is_name = |name: &str| {
            !name.is_empty()
                && name.len() <= 96
                && name
                    .chars()
                    .all(|letter| letter.is_ascii_alphanumeric() || "._-".contains(letter))
                && !name.starts_with(['.', '-'])
                && !name.ends_with(['.', '-'])
                && !name.contains("..")
                && !name.contains("--")
        };
        let is_revision = revision.len() <= 200
            && revision
                .chars()
                .all(|letter| letter.is_ascii_alphanumeric() || "._-/".contains(letter))
            && revision
                .split('/')
                .all(|part| !part.is_empty() && !part.starts_with('.'));
        (is_name(organisation) && is_name(name) && is_revision).then(|| Self {
            repository: repository.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// Organisation and name.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Branch, tag or commit; `main` if none was given.
    pub fn revision(&self) -> &str {
        &self.revision
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => formatter.write_str(&self.repository),
            revision => write!(formatter, "{}@{revision}", self.repository),
        }
    }
}

/// Beside the weights, what a model needs to be read and used. All but the first may be absent.
const SMALL_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Brings a model into the cache, as far as it is not there yet, and returns the folder of its snapshot.
///
/// A broken download is continued where it stopped, in this call or in a later one. Files come by commit, so a
/// snapshot never mixes versions, and weights come last, so one that has them is complete.
pub fn fetch(id: &HubId, options: &HubOptions, progress: &mut dyn Progress) -> Result<PathBuf> {
    let cache = Cache::new(&options.cache, id);
    let cached = cache.complete_snapshot(id);
    if options.access == Access::Offline {
        return cached.map_err(|error| {
            error.hint("`HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` is set: unset it and run the command again to download")
        });
    }
    let client = Client::new(options, id)?;
    // Who has the model already should not wait for a network that is not there.
    let attempts = if cached.is_ok() { 1 } else { options.attempts };
    let listing = match client.retrying(attempts, progress, |client| client.listing()) {
        Ok(listing) => listing,
        Err(Failure::Final(error)) => return Err(error),
        Err(Failure::Connection(error)) => {
            return match cached {
                Ok(folder) => {
                    progress.notice(&format!("{error}; going on with the copy in the cache"));
                    Ok(folder)
                }
                Err(_) => Err(error),
            };
        }
    };
    let snapshot = download_all(id, &client, &cache, &listing, progress)?;
    cache.set_reference(id.revision(), &listing.commit)?;
    Ok(snapshot)
}

fn download_all(
    id: &HubId,
    client: &Client<'_>,
    cache: &Cache,
    listing: &Listing,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let snapshot = cache.snapshot(&listing.commit);
    let names: BTreeSet<&str> = listing.files.keys().map(String::as_str).collect();
    let mut files: Vec<String> = SMALL_FILES
        .into_iter()
        .filter(|name| names.contains(name))
        .map(str::to_owned)
        .collect();
    match weights_in(id, &names)? {
        Weights::Single => files.push(checkpoint::SINGLE.to_owned()),
        Weights::Sharded => {
            // The index says which files there are, so it comes before the plan.
            if !snapshot.join(checkpoint::INDEX).is_file() {
                let index = client.remote(listing, checkpoint::INDEX, progress)?;
                download::download(client, cache, &listing.commit, &index, &mut ())?;
            }
            let shards = checkpoint::shard_files(&snapshot)?;
            let absent: Vec<&String> = shards
                .iter()
                .filter(|shard| !names.contains(shard.as_str()))
                .collect();
            if !absent.is_empty() {
                return Err(Error::new(format!(
                    "the index of `{id}` lists files that the repository lacks: {}",
                    checkpoint::listed(&absent)
                ))
                .hint("the upload may be going on, or have failed: try another revision"));
            }
            files.push(checkpoint::INDEX.to_owned());
            files.extend(shards);
        }
    }

    let mut plan = Vec::new();
    let mut remotes = Vec::new();
    for name in files {
        let present = std::fs::metadata(snapshot.join(&name))
            .ok()
            .filter(std::fs::Metadata::is_file);
        let (size, present) = match present {
            Some(file) => (Some(file.len()), file.len()),
            None => {
                let remote = client.remote(listing, &name, progress)?;
                let facts = (remote.size, cache.partial_size(&remote.etag));
                remotes.push(remote);
                facts
            }
        };
        plan.push(PlannedFile {
            name,
            size,
            present,
        });
    }
    progress.begin(&plan);
    for remote in &remotes {
        download::download(client, cache, &listing.commit, remote, progress)?;
        progress.finish(&remote.name);
    }
    Ok(snapshot)
}

enum Weights {
    Single,
    Sharded,
}

/// Which form the weights have, or why there are none that can be used.
fn weights_in(id: &HubId, names: &BTreeSet<&str>) -> Result<Weights> {
    if names.contains("adapter_config.json") && !names.contains("config.json") {
        return Err(Error::new(format!("`{id}` is an adapter, not a model"))
            .hint("download it and give it as the adapter, with the model it was trained on as the model"));
    }
    if !names.contains("config.json") {
        return Err(Error::new(format!("`{id}` has no `config.json`"))
            .hint("expected a model in the format of transformers; a GGUF repository usually names the one it was made from"));
    }
    if names.contains(checkpoint::SINGLE) {
        return Ok(Weights::Single);
    }
    if names.contains(checkpoint::INDEX) {
        return Ok(Weights::Sharded);
    }
    let pickles: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| checkpoint::is_pickle(name))
        .collect();
    if !pickles.is_empty() {
        return Err(Error::new(format!(
            "`{id}` has its weights only as Python pickles, which can run any code when read: {}",
            checkpoint::listed(&pickles)
        ))
        .hint(format!(
            "look for a revision with safetensors (often `{0}@refs/pr/1`), or convert once, where you trust it: python -c \
             \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{0}').save_pretrained('converted')\"",
            id.repository
        )));
    }
    Err(Error::new(format!(
        "`{id}` has neither `{}` nor `{}`",
        checkpoint::SINGLE,
        checkpoint::INDEX
    ))
    .hint("expected weights as transformers saves them, in safetensors"))
}
