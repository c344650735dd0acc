//! What an engine says of its inside at a moment.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// What an engine says of its inside at a moment. The numbers are read one after the other while it works, so that they
/// need not be of one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineStatistics {
    /// Requests that wait to be run.
    pub queued: u64,
    /// Requests that are run: their prompt is fed, or their answer decoded.
    pub running: u64,
    /// Answers that the last turn took a token further together.
    pub batch_size: u64,
    /// Turns since the model was loaded: a chunk of one prompt at most, and a token of each answer.
    pub turns: u64,
    /// Tokens of answers since the model was loaded.
    pub generated_tokens: u64,
    /// Tokens that were guessed and verified since the model was loaded; 0 where nothing is guessed.
    pub drafted_tokens: u64,
    /// Those of them that were right.
    pub accepted_tokens: u64,
    /// How long the turn that runs has taken so far, in seconds; `None` between turns. One that does not end is a hang.
    pub turn_s: Option<f64>,
    /// Bytes that the keys and values of all that runs may come to take.
    pub kv_reserved_bytes: u64,
    /// Bytes of the keys and values that are only kept, for requests that begin alike.
    pub prefix_cache_bytes: u64,
    /// Sequences of which they are.
    pub prefix_cache_sequences: u64,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Steps that were run again for one answer alone, as the step of several had failed.
    pub redone_steps: u64,
    /// How often the worker went on after a panic outside a step.
    pub worker_restarts: u64,
    /// What is allocated; `None` for a backend that allocates nothing.
    pub memory: Option<DeviceMemory>,
    /// Resident memory of the engine's process, in bytes; `None` where that is this process, or the system does not say.
    pub process_memory_bytes: Option<u64>,
    /// Which load of this process it was that brought the model, from 1; 0 where the engine does not say. A model that is loaded
    /// again has another number.
    pub load: u64,
    /// Seconds that the load took; `None` where the engine does not say.
    pub load_s: Option<f64>,
}

/// A number for [`EngineStatistics::load`] that no other load of this process has.
pub fn next_load() -> u64 {
    static LOADS: AtomicU64 = AtomicU64::new(0);
    LOADS.fetch_add(1, Ordering::Relaxed) + 1
}

/// Memory that models of this process have allocated, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceMemory {
    /// In use.
    pub active_bytes: u64,
    /// Not in use, and not given back to the system, so that the next arrays are had sooner.
    pub cache_bytes: u64,
    /// The most that was in use at once.
    pub peak_bytes: u64,
}
