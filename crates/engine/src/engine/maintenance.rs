//! What can be asked of an engine beside answers: what it keeps, and how it is kept well.

use std::sync::Arc;

use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, ParamError, Prompt};
use tokio::sync::oneshot;

use super::Engine;
use crate::PrefixCacheReport;
use crate::config::{EngineConfig, PrefixCacheConfig};
use crate::worker::{Command, Maintenance, PrefixCommand};

impl Engine {
    /// The sequences that are kept for requests that begin alike.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotLoaded`].
    pub async fn prefix_cache(&self) -> Result<PrefixCacheReport, EngineError> {
        self.manage(PrefixCommand::Report).await
    }

    /// Gives the sequences up that are kept and not pinned, and says how many bytes that were.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotLoaded`].
    pub async fn clear_prefix_cache(&self) -> Result<u64, EngineError> {
        self.manage(PrefixCommand::Clear).await
    }

    /// Keeps the keys and values of a prompt until [`unpin_prefix`](Self::unpin_prefix), computing them where they are not
    /// known: of a long system prompt, say. They count to the budget, and to what requests may not take.
    ///
    /// # Errors
    ///
    /// Those of a request, and [`EngineError::InsufficientMemory`] where the budget of the cache is too small.
    pub async fn pin_prefix(&self, prompt: Prompt) -> Result<(), EngineError> {
        let tokens = self.encoder.encode(&prompt)?;
        let pin = || {
            let tokens = tokens.clone();
            self.manage(|pinned| PrefixCommand::Pin { tokens, pinned })
        };
        if pin().await??.is_none() {
            return Ok(());
        }
        // A request leaves what it was fed.
        let params = GenerateParams::default().with_max_tokens(1).with_temperature(0.0);
        self.generate(Prompt::Tokens(tokens.clone()), params).await?;
        match pin().await?? {
            None => Ok(()),
            Some(lack) => Err(lack),
        }
    }

    /// Lets a prompt go that was pinned, when its time comes; `false` where it is not pinned.
    ///
    /// # Errors
    ///
    /// Those of the prompt, and [`EngineError::NotLoaded`].
    pub async fn unpin_prefix(&self, prompt: Prompt) -> Result<bool, EngineError> {
        let tokens = self.encoder.encode(&prompt)?;
        self.manage(|unpinned| PrefixCommand::Unpin { tokens, unpinned })
            .await
    }

    async fn manage<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> PrefixCommand,
    ) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.unless_lost(async {
            self.send(Command::Prefixes(command(reply))).await?;
            answer.await.map_err(|_| self.dropped())
        })
        .await
    }

    /// Gives memory back that is held for speed alone: sequences that are kept for requests that begin alike and not pinned,
    /// and what MLX keeps for its next arrays. What runs goes on.
    ///
    /// # Errors
    ///
    /// What the device says, and that the engine is not loaded.
    pub async fn clear_caches(&self) -> Result<(), EngineError> {
        self.maintain(Maintenance::ClearCaches).await
    }

    /// Makes a new stream on the device, after an error of it. What runs ends with
    /// [`WorkerLost`](EngineError::WorkerLost), what waits goes on, and what was kept of requests is given up, pinned or not:
    /// arrays of the old stream cannot be trusted.
    ///
    /// # Errors
    ///
    /// What the device says, and that the engine is not loaded.
    pub async fn rebuild_stream(&self) -> Result<(), EngineError> {
        self.maintain(Maintenance::RebuildStream).await
    }

    /// Schedules by another configuration from the next turn on; what runs goes on, and what waits stays.
    ///
    /// # Errors
    ///
    /// A value that is out of its range, and a field that only a load can change.
    pub async fn reconfigure(&self, config: EngineConfig) -> Result<(), EngineError> {
        config.validate()?;
        let now = self.config();
        let changed = EngineConfig {
            max_batch: config.max_batch,
            max_queue: config.max_queue,
            prefill_chunk: config.prefill_chunk,
            memory_limit: config.memory_limit,
            prefix_cache: PrefixCacheConfig {
                max_bytes: config.prefix_cache.max_bytes,
                ..now.prefix_cache.clone()
            },
            ..now
        };
        if config != changed {
            let message =
                "only `max_batch`, `max_queue`, `prefill_chunk`, `memory_limit` and `prefix_cache.max_bytes`";
            return Err(ParamError::new(
                "config",
                "changed elsewhere",
                format_args!("a change of {message}"),
            )
            .into());
        }
        let now = Arc::clone(&self.config);
        let config = Box::new(config);
        self.maintain(Maintenance::Reconfigure { config, now }).await
    }

    async fn maintain(&self, what: Maintenance) -> Result<(), EngineError> {
        let (reply, done) = oneshot::channel();
        self.unless_lost(async {
            self.send(Command::Maintain { what, reply }).await?;
            done.await.map_err(|_| self.dropped())?
        })
        .await
    }
}
