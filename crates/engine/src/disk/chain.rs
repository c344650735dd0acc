//! The names of chunks: a hash over the model, all tokens before the chunk, and its own.

use std::fmt;

use sha2::{Digest, Sha256};

/// Tokens of a chunk.
pub(super) const CHUNK: usize = 256;

/// The format of files and blocks as this version writes them.
const VERSION: &str = "mlx-engine prefix 1";

/// A hash, written in hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name([u8; 32]);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Name {
    /// The name that is written so.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }
}

/// What the names of a model begin with.
pub(super) fn key(identity: &str) -> Name {
    let hash = Sha256::new()
        .chain_update(VERSION)
        .chain_update([0])
        .chain_update(identity);
    Name(hash.finalize().into())
}

/// The names of the whole chunks of some tokens.
pub(super) fn names(key: Name, tokens: &[u32]) -> impl Iterator<Item = Name> {
    tokens.chunks_exact(CHUNK).scan(key, |before, chunk| {
        let mut hash = Sha256::new().chain_update(before.0);
        for token in chunk {
            hash.update(token.to_le_bytes());
        }
        *before = Name(hash.finalize().into());
        Some(*before)
    })
}
