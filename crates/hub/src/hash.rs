//! The hashes that name a blob.

use std::fmt;
use std::str::FromStr;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::HubError;
use crate::names::shown;

/// What a file's content is known by, and what its blob in the cache is called: the SHA-256 of a large file, or, for a
/// small one that lies in git itself, git's SHA-1 over `blob LENGTH\0` and the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlobHash {
    /// SHA-256 of the content.
    Sha256([u8; 32]),
    /// SHA-1 of git's header and the content.
    GitSha1([u8; 20]),
}

impl BlobHash {
    /// Begins to compute a hash of this kind over a content of `length` bytes.
    pub(crate) fn hasher(&self, length: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Self::GitSha1(_) => {
                let mut hash = Sha1::new();
                hash.update(format!("blob {length}\0"));
                Hasher::GitSha1(hash)
            }
        }
    }
}

impl fmt::Display for BlobHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: &[u8] = match self {
            Self::Sha256(bytes) => bytes,
            Self::GitSha1(bytes) => bytes,
        };
        bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for BlobHash {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        fn digits<const N: usize>(text: &str) -> Option<[u8; N]> {
            let mut bytes = [0; N];
            for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
            }
            Some(bytes)
        }
        let plain = text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        let hash = match text.len() {
            64 if plain => digits(text).map(Self::Sha256),
            40 if plain => digits(text).map(Self::GitSha1),
            _ => None,
        };
        hash.ok_or_else(|| HubError::InvalidName {
            what: "hash",
            name: shown(text),
            why: "it is 64 or 40 hexadecimal digits",
        })
    }
}

/// A hash in the making.
#[derive(Clone, Debug)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    GitSha1(Sha1),
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::GitSha1(hash) => hash.update(bytes),
        }
    }

    /// Takes in everything that a reader gives, and returns its length.
    #[cfg(feature = "fetch")]
    pub(crate) fn read(&mut self, from: &mut impl std::io::Read) -> std::io::Result<u64> {
        use std::io;

        let mut buffer = vec![0; 1 << 17];
        let mut length = 0;
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return Ok(length),
                Ok(count) => {
                    self.update(&buffer[..count]);
                    length += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    pub(crate) fn finish(self) -> BlobHash {
        match self {
            Self::Sha256(hash) => BlobHash::Sha256(hash.finalize().into()),
            Self::GitSha1(hash) => BlobHash::GitSha1(hash.finalize().into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_of_the_standard() {
        let check = |content: &str, expected: &str| {
            let expected: BlobHash = expected.parse().unwrap();
            let mut hasher = expected.hasher(content.len() as u64);
            content.bytes().for_each(|byte| hasher.update(&[byte]));
            assert_eq!(hasher.finish(), expected, "{content}");
        };
        // From FIPS 180-4's examples and from `git hash-object`.
        check(
            "abc",
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        );
        check("", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        check("hello world", "95d09f2b10159347eece71399a7e2e907ea3df4f");
    }

    #[test]
    fn what_is_no_hash_is_told() {
        let hash = "95d09f2b10159347eece71399a7e2e907ea3df4f";
        assert_eq!(hash.parse::<BlobHash>().unwrap().to_string(), hash);
        for text in [
            "",
            "abc",
            "95D09F2B10159347EECE71399A7E2E907EA3DF4F",
            "+5d09f2b10159347eece71399a7e2e907ea3df4f",
        ] {
            assert!(text.parse::<BlobHash>().is_err(), "{text}");
        }
    }
}
