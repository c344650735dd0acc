//! Ids of tool calls.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Letters and digits: Mistral's templates take nothing else, and nine of them.
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const LENGTH: usize = 9;

/// An id that no other call of this process has, and hardly one of another process: a conversation may go on elsewhere.
pub(crate) fn call_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());
    spell(PROCESS.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)))
}

/// A number in the alphabet, the last digits of it.
fn spell(mut number: u64) -> String {
    let base = ALPHABET.len() as u64;
    let digit = |_| {
        let digit = ALPHABET[(number % base) as usize];
        number /= base;
        char::from(digit)
    };
    (0..LENGTH).map(digit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_are_nine_letters_and_digits() {
        let ids: std::collections::BTreeSet<String> = (0..1000).map(|_| call_id()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(
            ids.iter()
                .all(|id| id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()))
        );
    }
}
