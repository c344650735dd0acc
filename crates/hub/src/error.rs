//! What can go wrong, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a model could not be found, fetched or removed. Messages are lowercase fragments; [`hint`](Self::hint) says what
/// the user can do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// A name that is not allowed, from a user or from a server.
    #[error("{what} `{name}` is refused: {why}")]
    InvalidName {
        /// What it should name.
        what: &'static str,
        /// The name, without control characters and cut where it is long.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },

    /// An address that is none.
    #[error("`{url}` is no address of a hub: {why}")]
    InvalidEndpoint {
        /// The address.
        url: String,
        /// What is wrong with it.
        why: String,
    },

    /// There is no folder for the cache.
    #[error("there is no folder for the cache: neither HF_HUB_CACHE nor HOME is set")]
    NoCache,

    /// The network is to be left alone, and the cache does not have it.
    #[error("`{what}` is not in the cache at {}, and the network is to be left alone", cache.display())]
    Offline {
        /// What was asked for.
        what: String,
        /// The folder that was looked in.
        cache: PathBuf,
    },

    /// The cache does not have it.
    #[error("`{what}` is not in the cache at {}", cache.display())]
    NotCached {
        /// What was asked for.
        what: String,
        /// The folder that was looked in.
        cache: PathBuf,
    },

    /// The hub does not know the repository, the revision or the file.
    #[error("the hub has no `{what}`{}", said(message))]
    NotFound {
        /// What was asked for.
        what: String,
        /// What the hub said.
        message: String,
    },

    /// The hub wants to know who asks, or does not let them.
    #[error("the hub does not give `{what}` (status {status}){}", said(message))]
    Denied {
        /// What was asked for.
        what: String,
        /// 401 or 403.
        status: u16,
        /// Whether a token was sent.
        with_token: bool,
        /// What the hub said.
        message: String,
    },

    /// The hub has had too many requests.
    #[error("the hub takes no more requests for now (status 429){}", said(message))]
    RateLimited {
        /// How long it wants to be left alone.
        retry_after: Option<Duration>,
        /// What the hub said.
        message: String,
    },

    /// Another status than one that was hoped for.
    #[error("{url} answered with status {status}{}", said(message))]
    Status {
        /// The address, without its query.
        url: String,
        /// The status.
        status: u16,
        /// How long it wants to be left alone.
        retry_after: Option<Duration>,
        /// What the server said.
        message: String,
    },

    /// The server could not be reached, or went away.
    #[error("{url} could not be reached or went away")]
    Transport {
        /// The address, without its query.
        url: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// Who answers has no certificate that is believed.
    #[error("{url} could not be reached safely")]
    Untrusted {
        /// The address, without its query.
        url: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// Nothing came for a while.
    #[error("{url} sent nothing for {} s", limit.as_secs())]
    Stalled {
        /// The address, without its query.
        url: String,
        /// How long was waited.
        limit: Duration,
    },

    /// An answer that makes no sense.
    #[error("{url} gave an answer that makes no sense: {why}")]
    Answer {
        /// The address, without its query.
        url: String,
        /// What is wrong with it.
        why: String,
    },

    /// A redirect that is not followed.
    #[error("a redirect from {url} is not followed: {why}")]
    Redirect {
        /// The address, without its query.
        url: String,
        /// Why.
        why: &'static str,
    },

    /// Fewer bytes came than the file has.
    #[error("`{file}` ended after {got} of {expected} bytes")]
    Truncated {
        /// The file.
        file: String,
        /// Bytes that came.
        got: u64,
        /// Bytes of the file.
        expected: u64,
    },

    /// The bytes that came are not those that the hub promised.
    #[error("`{file}` has the wrong content: expected {expected}, got {got}")]
    WrongContent {
        /// The file.
        file: String,
        /// The hash or the length that the hub promised.
        expected: String,
        /// That of what came.
        got: String,
    },

    /// The hub has another file now than the one that was begun.
    #[error("`{file}` has changed on the hub meanwhile: expected {expected}, got {got}")]
    Changed {
        /// The file.
        file: String,
        /// The hash that the hub promised.
        expected: String,
        /// The hash that it names now.
        got: String,
    },

    /// The repository has more than is taken from anyone.
    #[error("`{repo}` has {found} {what}, more than the {limit} that are taken")]
    TooLarge {
        /// The repository.
        repo: String,
        /// What there is too much of.
        what: &'static str,
        /// How much there is.
        found: u64,
        /// How much is taken.
        limit: u64,
    },

    /// Nothing of the repository is wanted.
    #[error("`{repo}` has no file that {wanted}")]
    NothingToFetch {
        /// The repository.
        repo: String,
        /// What was looked for.
        wanted: String,
    },

    /// The disk has no room.
    #[error(
        "{} MB of disk space are needed in {}, {} MB are free",
        needed.div_ceil(1_000_000), folder.display(), available / 1_000_000
    )]
    DiskFull {
        /// Bytes that are still to be written.
        needed: u64,
        /// Bytes that are free.
        available: u64,
        /// Where.
        folder: PathBuf,
    },

    /// Another process works on it.
    #[error("`{what}` is being used by {holder}")]
    Busy {
        /// What is used.
        what: String,
        /// By whom.
        holder: String,
    },

    /// The caller ended it.
    #[error("it was cancelled")]
    Cancelled,

    /// Fetching needs a runtime of tokio around it.
    #[error("fetching needs a tokio runtime with input, output and time")]
    NoRuntime,

    /// The secure transport could not be set up.
    #[error("tls could not be set up: {why}")]
    Tls {
        /// Why.
        why: String,
    },

    /// The disk.
    #[error("failed to {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn said(message: &str) -> String {
    if message.is_empty() {
        String::new()
    } else {
        format!(": {message}")
    }
}

impl HubError {
    /// Whether the same may succeed later, with nothing changed by the caller.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::RateLimited { .. }
            | Self::Transport { .. }
            | Self::Stalled { .. }
            | Self::Truncated { .. }
            | Self::Busy { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 425 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// Whether nobody could be asked, so that what is here is as good an answer as there is.
    pub fn is_about_the_way(&self) -> bool {
        match self {
            Self::Offline { .. }
            | Self::Untrusted { .. }
            | Self::Transport { .. }
            | Self::Stalled { .. }
            | Self::RateLimited { .. } => true,
            Self::Status { status, .. } => *status >= 500,
            _ => false,
        }
    }

    /// How long the server wants to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } | Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NoCache => "set HF_HUB_CACHE to a folder",
            Self::InvalidEndpoint { .. } => "HF_ENDPOINT has to be like https://huggingface.co",
            Self::Offline { .. } => "unset HF_HUB_OFFLINE, or fetch it where there is a network",
            Self::NotCached { .. } => "fetch it first",
            Self::NotFound { .. } => "look at the spelling; private repositories need HF_TOKEN",
            Self::Denied {
                with_token: false, ..
            } => {
                "set HF_TOKEN to a token that may read it; gated models want their terms accepted on the hub first"
            }
            Self::Denied { with_token: true, .. } => {
                "accept the model's terms on the hub, or set HF_TOKEN to a token that may read it"
            }
            Self::RateLimited { retry_after, .. } => {
                return Some(match retry_after {
                    Some(after) => format!(
                        "try again in {} s; with HF_TOKEN set the limits are higher",
                        after.as_secs()
                    ),
                    None => "try again later; with HF_TOKEN set the limits are higher".to_owned(),
                });
            }
            Self::Status { status, .. } if *status >= 500 => "the server has a problem; try again later",
            Self::Transport { .. } | Self::Stalled { .. } => {
                "look at the network, HTTPS_PROXY and HF_ENDPOINT; what has come is kept, and a new try goes on from there"
            }
            Self::Untrusted { .. } => {
                "a proxy that reads along has an authority of its own: add that to the system's certificates, or name its file in SSL_CERT_FILE"
            }
            Self::Truncated { .. } => "try again: what has come is kept",
            Self::WrongContent { .. } => {
                "what came was thrown away; try again, and look at proxies on the way if it stays so"
            }
            Self::Changed { .. } => "try again, which asks for the files of the new commit",
            Self::TooLarge { .. } => {
                "choose files by patterns, or raise the limit if you trust the repository"
            }
            Self::NothingToFetch { .. } => {
                "`models show` lists its files; weights are read from safetensors and GGUF"
            }
            Self::DiskFull { .. } => {
                "free some space (`models prune`, `models rm`), or set HF_HUB_CACHE to a larger disk"
            }
            Self::Busy { .. } => "wait for it to end, or end it",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// The result of anything here.
pub(crate) type Result<T, E = HubError> = std::result::Result<T, E>;

/// Says what was tried on which path.
pub(crate) trait Context<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| HubError::Io {
            action,
            path: path.to_owned(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denied_model_says_what_to_do() {
        let denied = |with_token| HubError::Denied {
            what: "a/b".to_owned(),
            status: 403,
            with_token,
            message: "gated".to_owned(),
        };
        assert_eq!(
            denied(false).to_string(),
            "the hub does not give `a/b` (status 403): gated"
        );
        assert!(denied(false).hint().unwrap().starts_with("set HF_TOKEN"));
        assert!(denied(true).hint().unwrap().starts_with("accept"));
        assert!(!denied(true).is_retryable());
    }

    #[test]
    fn what_may_pass_is_retryable() {
        let status = |status| HubError::Status {
            url: "http://h/x".to_owned(),
            status,
            retry_after: Some(Duration::from_secs(3)),
            message: String::new(),
        };
        assert!(status(503).is_retryable() && !status(400).is_retryable());
        assert_eq!(status(503).retry_after(), Some(Duration::from_secs(3)));
        assert_eq!(status(400).to_string(), "http://h/x answered with status 400");
        let limited = HubError::RateLimited {
            retry_after: Some(Duration::from_secs(7)),
            message: String::new(),
        };
        assert!(limited.hint().unwrap().contains("in 7 s"));
        let full = HubError::DiskFull {
            needed: 1,
            available: 0,
            folder: "/c".into(),
        };
        assert_eq!(
            full.to_string(),
            "1 MB of disk space are needed in /c, 0 MB are free"
        );
        assert!(full.hint().unwrap().contains("prune"));
    }
}
