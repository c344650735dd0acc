//! The content of a model's files, in a few bytes.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Files up to this size are read whole.
const WHOLE: u64 = 1 << 20;

/// Bytes that are read at the beginning and the end of larger ones, where headers are.
const ENDS: u64 = 64 << 10;

/// Places in between that are read, and the bytes of each.
const SAMPLES: u64 = 64;
const SAMPLE: u64 = 4 << 10;

/// A hash over the lengths of the files that hold a model, their headers, and bytes from all over them: models that
/// differ in their weights differ in nearly all of them.
pub(crate) fn fingerprint(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    for file in files(path)? {
        let mut opened = File::open(&file)?;
        let len = opened.metadata()?.len();
        hash.update(len.to_le_bytes());
        for (at, bytes) in windows(len) {
            opened.seek(SeekFrom::Start(at))?;
            let mut window = vec![0; bytes as usize];
            opened.read_exact(&mut window)?;
            hash.update(&window);
        }
    }
    Ok(format!("{:x}", hash.finalize()))
}

/// The files that a model's numbers are in, by name.
fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        let weights = path.extension().is_some_and(|ending| ending == "safetensors");
        if weights || path.file_name().is_some_and(|name| name == "config.json") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Where a file is read, and how many bytes.
fn windows(len: u64) -> Vec<(u64, u64)> {
    if len <= WHOLE {
        return vec![(0, len)];
    }
    let between = (1..SAMPLES).map(|index| (len / SAMPLES * index, SAMPLE));
    let ends = [(0, ENDS), (len - ENDS, ENDS)];
    ends.into_iter().chain(between).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_content_is_another_fingerprint_and_another_place_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let mut bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
        let first = fingerprint(&write("a.gguf", &bytes)).unwrap();
        assert_eq!(fingerprint(&write("b.gguf", &bytes)).unwrap(), first);
        // Weights that differ throughout, a header that does, and a length.
        for at in 0..bytes.len() / 1000 {
            bytes[at * 1000] ^= 1;
        }
        let second = fingerprint(&write("a.gguf", &bytes)).unwrap();
        bytes[10] ^= 1;
        let third = fingerprint(&write("a.gguf", &bytes)).unwrap();
        bytes.push(0);
        let fourth = fingerprint(&write("a.gguf", &bytes)).unwrap();
        let all = std::collections::BTreeSet::from([first, second, third, fourth]);
        assert_eq!(all.len(), 4);
        assert!(fingerprint(&folder.path().join("missing")).is_err());

        write("model.safetensors", b"weights");
        let folder_before = fingerprint(folder.path()).unwrap();
        write("tokenizer.json", b"is no number");
        assert_eq!(fingerprint(folder.path()).unwrap(), folder_before);
        write("config.json", b"{}");
        assert_ne!(fingerprint(folder.path()).unwrap(), folder_before);
    }
}
