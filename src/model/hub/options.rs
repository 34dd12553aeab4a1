//! Where the cache is and how to reach the hub: the variables of huggingface_hub, read by whoever may read them.
//!
//! Source: <https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>.

use crate::{Context, Error, Result};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Whether the network may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// What is not in the cache is downloaded.
    Online,
    /// Only the cache is used.
    Offline,
}

/// A key to private and gated repositories. It is not shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Checks that it can be sent: letters, digits and signs, as the hub makes them.
    pub fn new(text: &str) -> Result<Self> {
        if text.is_empty() || !text.chars().all(|letter| letter.is_ascii_graphic()) {
            return Err(Error::new(
                "the hub token contains spaces or other characters that no token has",
            )
            .hint("copy it again from https://huggingface.co/settings/tokens"));
        }
        Ok(Self(text.to_owned()))
    }

    pub(super) fn text(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Token(…)")
    }
}

/// How to get models from the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubOptions {
    /// The folder that holds `models--org--name` folders.
    pub cache: PathBuf,
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// Sent to the hub, and to no other host.
    pub token: Option<Token>,
    /// Whether the network may be used.
    pub access: Access,
    /// Address of a proxy for all requests.
    pub proxy: Option<String>,
    /// Hosts that are reached without the proxy.
    pub proxy_exceptions: Vec<String>,
    /// How often a request is made that brings nothing, before giving up.
    pub attempts: u32,
    /// The pause before the second attempt; each further one is twice as long.
    pub pause: Duration,
    /// How long the other side may be silent.
    pub timeout: Duration,
}

impl HubOptions {
    /// The defaults, with the cache in `cache`.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            cache: cache.into(),
            endpoint: "https://huggingface.co".to_owned(),
            token: None,
            access: Access::Online,
            proxy: None,
            proxy_exceptions: Vec::new(),
            attempts: 5,
            pause: Duration::from_secs(1),
            timeout: Duration::from_secs(30),
        }
    }

    /// What the environment says, through `read`: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and the token
    /// file, `HF_HUB_OFFLINE`, `HF_HUB_DOWNLOAD_TIMEOUT`, `HTTPS_PROXY` and `NO_PROXY`.
    pub fn from_variables(read: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let first = |names: &[&str]| {
            names.iter().find_map(|name| {
                read(name)
                    .map(|value| value.trim().to_owned())
                    .filter(|value| !value.is_empty())
            })
        };
        let user = first(&["HOME", "USERPROFILE"]).map(PathBuf::from);
        let path = |text: String| match (text.strip_prefix("~/"), &user) {
            (Some(rest), Some(user)) => user.join(rest),
            _ => PathBuf::from(text),
        };
        let home = first(&["HF_HOME"])
            .map(path)
            .or_else(|| Some(path(first(&["XDG_CACHE_HOME"])?).join("huggingface")))
            .or_else(|| Some(user.clone()?.join(".cache").join("huggingface")));
        let cache = first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
            .map(path)
            .or_else(|| Some(home.as_ref()?.join("hub")))
            .ok_or_else(|| {
                Error::new("there is no place for downloaded models: neither `HF_HOME` nor a home folder is known")
                    .hint("set `HF_HOME` to a folder with enough space")
            })?;
        let mut options = Self::new(cache);

        if let Some(endpoint) = first(&["HF_ENDPOINT"]) {
            if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
                return Err(Error::usage(format!(
                    "`HF_ENDPOINT` is `{endpoint}`, which is no web address"
                ))
                .hint("it should look like `https://huggingface.co`, or be unset"));
            }
            // It is quoted in messages.
            let authority = endpoint
                .split("://")
                .nth(1)
                .and_then(|rest| rest.split('/').next());
            if authority.is_some_and(|authority| authority.contains('@')) {
                return Err(Error::usage("`HF_ENDPOINT` holds a name or a password")
                    .hint("give the address without them; a token goes into `HF_TOKEN`"));
            }
            if endpoint.contains(['?', '#']) {
                return Err(Error::usage(
                    "`HF_ENDPOINT` goes on after its path, with `?` or `#`, and paths are put after it",
                )
                .hint("give the address up to there; a token goes into `HF_TOKEN`"));
            }
            options.endpoint = endpoint.trim_end_matches('/').to_owned();
        }
        let is_on = |name: &str| {
            first(&[name]).is_some_and(|value| {
                matches!(
                    value.to_ascii_uppercase().as_str(),
                    "1" | "ON" | "YES" | "TRUE"
                )
            })
        };
        if is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE") {
            options.access = Access::Offline;
        }
        options.token = match first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]) {
            Some(token) => Some(Token::new(&token).at("HF_TOKEN")?),
            None if is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") => None,
            None => match first(&["HF_TOKEN_PATH"])
                .map(path)
                .or_else(|| Some(home?.join("token")))
            {
                Some(file) => read_token(&file)?,
                None => None,
            },
        };
        if let Some(seconds) = first(&["HF_HUB_DOWNLOAD_TIMEOUT"]) {
            let whole = seconds
                .parse()
                .ok()
                .filter(|seconds| (1..=86_400).contains(seconds))
                .ok_or_else(|| {
                    Error::usage(format!(
                        "`HF_HUB_DOWNLOAD_TIMEOUT` is `{seconds}`, expected a number of seconds"
                    ))
                })?;
            options.timeout = Duration::from_secs(whole);
        }
        options.proxy = first(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]);
        options.proxy_exceptions = first(&["NO_PROXY", "no_proxy"])
            .map(|hosts| {
                hosts
                    .split(',')
                    .map(|host| host.trim().to_owned())
                    .collect()
            })
            .unwrap_or_default();
        Ok(options)
    }
}

/// The token that `hf auth login` has saved, if it has.
fn read_token(file: &Path) -> Result<Option<Token>> {
    match std::fs::read_to_string(file) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => Token::new(text.trim()).map(Some).at(file.display()),
        // Not being logged in is the ordinary case.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at(file.display()),
    }
}
