//! The hub over the network.

mod system;

mod http;
mod retry;

mod info;
mod search;

mod select;

mod progress;

mod file;
mod sink;
mod snapshot;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use reqwest::Url;

pub use info::{ModelInfo, RepoFile};
pub use progress::{FetchEvent, FetchProgress};
pub use search::{HubQuery, HubSort, ModelSummary};
pub use select::FileSelection;
pub use snapshot::{Repaired, Snapshot, SnapshotRequest};
pub use system::{HubSystem, RealSystem};

use crate::error::Result;
use crate::{Environment, HubCache, HubError};
use http::Http;

/// How the hub is reached, and what is taken from it. The defaults are those of the environment.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HubOptions {
    /// Where things are, and who asks.
    pub environment: Environment,
    /// How many files are fetched at once.
    pub files_at_once: usize,
    /// How often a request is tried again. A download that gets on does not use them up.
    pub retries: usize,
    /// How long a server may send nothing.
    pub idle_timeout: Duration,
    /// The most files of a repository.
    pub max_files: usize,
    /// The most bytes that are fetched of a repository.
    pub max_bytes: u64,
    /// Time, chance and the disk's room.
    pub system: Arc<dyn HubSystem>,
}

impl HubOptions {
    /// The defaults, in an environment.
    pub fn new(environment: Environment) -> Self {
        Self {
            environment,
            files_at_once: 4,
            retries: 5,
            idle_timeout: Duration::from_secs(30),
            max_files: 10_000,
            max_bytes: 1 << 40,
            system: Arc::new(RealSystem::new()),
        }
    }
}

impl Default for HubOptions {
    fn default() -> Self {
        Self::new(Environment::read())
    }
}

/// The hub: searches for models, and fetches them into the cache. Clones share connections. Needs a tokio runtime, and
/// dropping a future ends what it does; what has come by then is kept.
///
/// ```no_run
/// use mlx_engine_hub::{Hub, HubReference, SnapshotRequest};
///
/// # async fn run() -> Result<(), mlx_engine_hub::HubError> {
/// let hub = Hub::from_env()?;
/// let reference: HubReference = "mlx-community/Qwen3-0.6B-4bit".parse()?;
/// let snapshot = hub.fetch(&SnapshotRequest::new(reference), &|event| println!("{event:?}")).await?;
/// println!("{}", snapshot.path.display());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Hub {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: HubOptions,
    cache: HubCache,
    endpoint: Url,
    /// Made when it is needed first: reading the system's certificates takes a while.
    http: OnceLock<Http>,
}

impl Hub {
    /// The hub of the environment.
    ///
    /// # Errors
    ///
    /// As [`with_options`](Self::with_options).
    pub fn from_env() -> Result<Self> {
        Self::with_options(HubOptions::default())
    }

    /// The hub of some options.
    ///
    /// # Errors
    ///
    /// [`HubError::NoCache`] and [`HubError::InvalidEndpoint`].
    pub fn with_options(options: HubOptions) -> Result<Self> {
        let cache = options.environment.cache.clone().ok_or(HubError::NoCache)?;
        let text = &options.environment.endpoint;
        let invalid = |why: String| HubError::InvalidEndpoint {
            url: crate::names::shown(text),
            why,
        };
        let endpoint = Url::parse(text).map_err(|error| invalid(error.to_string()))?;
        if !matches!(endpoint.scheme(), "http" | "https") {
            return Err(invalid("it has to begin with https:// or http://".to_owned()));
        }
        Ok(Self {
            inner: Arc::new(Inner {
                cache: HubCache::new(cache),
                endpoint,
                http: OnceLock::new(),
                options,
            }),
        })
    }

    /// The cache that models are fetched into.
    pub fn cache(&self) -> &HubCache {
        &self.inner.cache
    }

    /// Whether the network is left alone.
    pub fn is_offline(&self) -> bool {
        self.inner.options.environment.offline
    }

    fn options(&self) -> &HubOptions {
        &self.inner.options
    }

    /// The network, where it may be used. `what` is what is asked for.
    fn http(&self, what: &str) -> Result<&Http> {
        if self.is_offline() {
            return Err(HubError::Offline {
                what: what.to_owned(),
                cache: self.cache().root().to_owned(),
            });
        }
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(HubError::NoRuntime);
        }
        if let Some(http) = self.inner.http.get() {
            return Ok(http);
        }
        let http = Http::new(self.inner.endpoint.clone(), self.options())?;
        Ok(self.inner.http.get_or_init(|| http))
    }
}
