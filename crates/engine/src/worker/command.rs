//! What reaches the worker.

use std::sync::{Arc, Mutex};

use mlx_engine_core::EngineError;
use tokio::sync::oneshot;

use super::scoring::Reply;
use crate::EngineConfig;
use crate::prefix::PrefixCacheReport;
use crate::request::Request;

#[derive(Debug)]
pub(crate) enum Command {
    Generate {
        request: Box<Request>,
        /// Hears whether the request is in the queue.
        taken: oneshot::Sender<Result<(), EngineError>>,
    },
    Score {
        tokens: Vec<u32>,
        reply: Reply,
    },
    Prefixes(PrefixCommand),
    Maintain {
        what: Maintenance,
        reply: oneshot::Sender<Result<(), EngineError>>,
    },
}

/// What can be done for a worker.
#[derive(Debug)]
pub(crate) enum Maintenance {
    ClearCaches,
    RebuildStream,
    Reconfigure {
        config: Box<EngineConfig>,
        /// Where the engine looks up what it works by.
        now: Arc<Mutex<EngineConfig>>,
    },
}

/// What is done with the sequences that are kept.
#[derive(Debug)]
pub(crate) enum PrefixCommand {
    Report(oneshot::Sender<PrefixCacheReport>),
    /// Hears how many bytes were given back.
    Clear(oneshot::Sender<u64>),
    Pin {
        tokens: Vec<u32>,
        /// Hears nothing, or that they are not known, as the error that it is where they have been computed for this.
        pinned: oneshot::Sender<Result<Option<EngineError>, EngineError>>,
    },
    Unpin {
        tokens: Vec<u32>,
        /// Hears whether they were pinned.
        unpinned: oneshot::Sender<bool>,
    },
}
