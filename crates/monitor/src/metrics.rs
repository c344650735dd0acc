//! What was measured, as data.

use std::collections::BTreeMap;

use mlx_engine_core::{Backend, EngineStatistics, FinishReason, Usage};
use serde::{Deserialize, Serialize};

use crate::{Distribution, ErrorKind};

/// What an engine did, at one moment.
///
/// Every request that was submitted is in flight, finished, failed or cancelled, and in one of them:
/// `total.submitted == in_flight() + total.ended()`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InferenceMetrics {
    /// The model that is loaded, if one is.
    pub model: Option<String>,
    /// What computes the tokens.
    pub backend: Option<Backend>,
    /// Seconds since monitoring began.
    pub uptime_s: f64,
    /// Seconds that loading the model took, as far as the engine, its answers or the program have said so.
    pub load_time_s: Option<f64>,
    /// Requests that were submitted and not started.
    pub queued: u64,
    /// Requests that were started and not ended.
    pub running: u64,
    /// What the engine says of its inside, where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineStatistics>,
    /// Memory of the engine's process that is resident, in bytes: of this one, unless it has its own, whose memory is not known
    /// while it is started again. Known on Linux only.
    pub process_memory_bytes: Option<u64>,
    /// The generation that finished last.
    pub last: Option<LastGeneration>,
    /// Checks of health by a token. They are in no other number here.
    pub probes: ProbeCounts,
    /// Since monitoring began.
    pub total: Statistics,
    /// The length of the window in seconds. It moves by twelfths, and so reaches back between eleven twelfths of this
    /// and all of it.
    pub window_s: f64,
    /// The latest part of the time, by when something happened; tokens generated and times by when the request ended.
    pub window: Statistics,
}

impl InferenceMetrics {
    /// Requests that were submitted and not ended.
    pub fn in_flight(&self) -> u64 {
        self.queued + self.running
    }
}

/// Counts and times over a stretch of time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// Requests that were submitted: the future of `stream` or `generate` was polled.
    pub submitted: u64,
    /// Requests whose `Started` was seen.
    pub started: u64,
    /// Requests that finished, by the reason.
    pub finished: FinishCounts,
    /// Requests that failed, at admission or later, by the kind of the error.
    pub errors: BTreeMap<ErrorKind, u64>,
    /// Requests that the caller dropped before their end.
    pub cancelled: u64,
    /// Tokens of prompts, cached ones included.
    pub prompt_tokens: u64,
    /// Those of them that the prefix cache held.
    pub cached_tokens: u64,
    /// Tokens generated, those of cancelled and failed requests included as far as they were delivered.
    pub generated_tokens: u64,
    /// The part of the tokens of prompts that the prefix cache held, 0 to 1.
    pub cache_hit_rate: Option<f64>,
    /// Prefill of the finished requests: tokens of prompts that were not cached.
    pub prefill: Throughput,
    /// Decoding of the finished requests: tokens after the first. A rate of one request, not of all at once.
    pub decode: Throughput,
    /// The most device memory that had been in use when a finished request ended, in bytes; 0 for a backend that uses none. It is that of
    /// the process' life, unless the peak was reset.
    pub peak_memory_bytes: u64,
    /// From submission to the end, of finished requests. Its sum is the total generation time.
    pub generation_time: Distribution,
    /// From submission to `Started`.
    pub queue_time: Distribution,
    /// From submission to the first token: the engine's own measure where it gave one, otherwise when it was seen.
    pub time_to_first_token: Distribution,
    /// The mean time from token to token of each finished request.
    pub time_per_output_token: Distribution,
}

impl Statistics {
    /// Requests that failed.
    pub fn failed(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Requests that ended, in whatever way.
    pub fn ended(&self) -> u64 {
        self.finished.total() + self.failed() + self.cancelled
    }
}

/// Finished requests by why they finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishCounts {
    /// [`FinishReason::Stop`].
    pub stop: u64,
    /// [`FinishReason::ToolCalls`].
    #[serde(default)]
    pub tool_calls: u64,
    /// [`FinishReason::Length`].
    pub length: u64,
    /// [`FinishReason::Cancelled`]: the engine was asked to end it, and said so.
    pub cancelled: u64,
    /// A reason that this version does not know.
    pub other: u64,
}

impl FinishCounts {
    /// All of them.
    pub fn total(self) -> u64 {
        self.stop + self.tool_calls + self.length + self.cancelled + self.other
    }

    pub(crate) fn count(&mut self, reason: FinishReason) {
        *match reason {
            FinishReason::Stop => &mut self.stop,
            FinishReason::ToolCalls => &mut self.tool_calls,
            FinishReason::Length => &mut self.length,
            FinishReason::Cancelled => &mut self.cancelled,
            _ => &mut self.other,
        } += 1;
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.stop += other.stop;
        self.tool_calls += other.tool_calls;
        self.length += other.length;
        self.cancelled += other.cancelled;
        self.other += other.other;
    }
}

/// Tokens, and how fast they went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// How many tokens.
    pub tokens: u64,
    /// How long they took, in seconds, summed over requests.
    pub seconds: f64,
    /// One by the other, where there is any.
    pub tokens_per_second: Option<f64>,
}

/// One finished generation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastGeneration {
    /// From submission to the end, in seconds.
    pub duration_s: f64,
    /// From submission to the first token, in seconds.
    pub time_to_first_token_s: Option<f64>,
    /// Tokens a second in prefill.
    pub prefill_tokens_per_second: Option<f64>,
    /// Tokens a second after the first.
    pub decode_tokens_per_second: Option<f64>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens in and out.
    pub usage: Usage,
    /// The most device memory that had been in use in the process when it ended, in bytes.
    pub peak_memory_bytes: u64,
}

/// Checks of health by a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeCounts {
    /// A token came.
    pub passed: u64,
    /// An error came, or an answer without a token.
    pub failed: u64,
    /// The caller gave up waiting.
    pub abandoned: u64,
}
