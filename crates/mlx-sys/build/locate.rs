//! Finds MLX, mlx-c and libclang, and says what to do where one is missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache;

/// An MLX to link: its headers and the folder of its library.
pub struct Mlx {
    pub include: PathBuf,
    pub lib: PathBuf,
}

/// Reads a variable that cargo sets for build scripts.
pub fn env(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|error| format!("the environment variable {name} is unusable: {error}"))
}

/// The MLX to link, in this order: `MLX_PREFIX`, what set-up left in the cache, an installed Python package.
pub fn mlx() -> Result<Option<Mlx>, String> {
    if let Some(prefix) = std::env::var_os("MLX_PREFIX").filter(|value| !value.is_empty()) {
        let prefix = PathBuf::from(prefix);
        return match at(&prefix)? {
            Some(mlx) => Ok(Some(mlx)),
            None => Err(format!(
                "MLX_PREFIX is {}, which has no include/mlx/mlx.h with lib/{} beside it; point it at a folder that \
                 has both, or unset it and run `cargo xtask setup`",
                prefix.display(),
                library_name(),
            )),
        };
    }
    let cached = if cfg!(target_os = "macos") {
        &[cache::MLX_METAL][..]
    } else {
        &[cache::MLX_CUDA, cache::MLX_CPU]
    };
    if let Some(root) = cache::cache_dir() {
        for name in cached {
            let prefix = root.join(name).join("mlx");
            if let Some(mlx) = at(&prefix)? {
                // A folder that is not there is not watched: cargo takes it for changed at every build.
                println!("cargo::rerun-if-changed={}", prefix.display());
                return Ok(Some(mlx));
            }
        }
    }
    match installed() {
        Some(prefix) => at(&prefix),
        None => Ok(None),
    }
}

/// The folder of the mlx-c sources, `mlx/c/*.cpp` below it.
pub fn mlx_c() -> Result<PathBuf, String> {
    let folder = cache::cache_dir().map(|root| root.join(cache::MLX_C));
    match folder {
        Some(folder) if folder.join("mlx/c/array.h").is_file() => {
            println!("cargo::rerun-if-changed={}", folder.display());
            Ok(folder)
        }
        Some(folder) => Err(format!(
            "the mlx-c sources are not in {}; run `cargo xtask setup`, which brings them",
            folder.display()
        )),
        None => {
            Err("neither HOME nor MLX_ENGINE_CACHE is set, so there is no place to look for MLX".to_owned())
        }
    }
}

/// What to say where no MLX is found.
pub fn missing_mlx() -> String {
    let looked = cache::cache_dir().map_or_else(String::new, |root| {
        format!(
            " Looked in {} and for an installed Python package `mlx`.",
            root.display()
        )
    });
    format!(
        "MLX {} was not found.{looked}\nRun `cargo xtask setup`, which brings it, set MLX_PREFIX to a folder that has \
         include/mlx/mlx.h and lib/{}, or build with `--no-default-features` for an engine without MLX.",
        cache::MLX_VERSION,
        library_name(),
    )
}

/// The folder of a libclang from set-up, where bindgen is not told of one and will not find one by itself.
pub fn libclang() -> Option<PathBuf> {
    if std::env::var_os("LIBCLANG_PATH").is_some_and(|path| !path.is_empty()) {
        return None;
    }
    let folder = cache::cache_dir()?.join(cache::LIBCLANG);
    if !folder.is_dir() {
        return None;
    }
    println!("cargo::rerun-if-changed={}", folder.display());
    Some(folder)
}

fn library_name() -> &'static str {
    if cfg!(target_os = "macos") {
        "libmlx.dylib"
    } else {
        "libmlx.so"
    }
}

/// The MLX under `prefix`, checked to be the version that mlx-c is written for.
fn at(prefix: &Path) -> Result<Option<Mlx>, String> {
    let mlx = Mlx {
        include: prefix.join("include"),
        lib: prefix.join("lib"),
    };
    if !mlx.include.join("mlx/mlx.h").is_file() || !mlx.lib.join(library_name()).is_file() {
        return Ok(None);
    }
    let header = mlx.include.join("mlx/version.h");
    let text = std::fs::read_to_string(&header)
        .map_err(|error| format!("failed to read {}: {error}", header.display()))?;
    let number = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix("#define ")?.trim().strip_prefix(name))
            .map_or("?", str::trim)
    };
    let found = format!(
        "{}.{}.{}",
        number("MLX_VERSION_MAJOR"),
        number("MLX_VERSION_MINOR"),
        number("MLX_VERSION_PATCH")
    );
    if found == cache::MLX_VERSION {
        Ok(Some(mlx))
    } else {
        Err(format!(
            "the MLX in {} is version {found}, and mlx-c here is written for {}; run `cargo xtask setup`, or install \
             that version",
            prefix.display(),
            cache::MLX_VERSION
        ))
    }
}

/// The package folder of an `mlx` that pip installed.
fn installed() -> Option<PathBuf> {
    let find =
        "import importlib.util as u; s = u.find_spec('mlx'); print(next(iter(s.submodule_search_locations)))";
    let output = Command::new("python3").args(["-c", find]).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !path.trim().is_empty()).then(|| PathBuf::from(path.trim()))
}
