//! What the prefix cache has, for whoever wants to know.

use serde::{Deserialize, Serialize};

/// The sequences that are kept for requests that begin alike.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixCacheReport {
    /// Bytes of keys and values that may be kept.
    pub max_bytes: u64,
    /// Bytes that are kept; what several sequences share counts once.
    pub bytes: u64,
    /// Requests that looked for a beginning.
    pub lookups: u64,
    /// Those of them that found one.
    pub hits: u64,
    /// Tokens that they did not have to compute.
    pub reused_tokens: u64,
    /// The sequences, the one used last first.
    pub entries: Vec<PrefixEntry>,
}

/// A sequence that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixEntry {
    /// Its tokens.
    pub tokens: usize,
    /// Its bytes, with those that others share.
    pub bytes: u64,
    /// Whether it stays until it is unpinned.
    pub pinned: bool,
}
