//! Links MLX and generates its bindings.
//!
//! On Linux, and on Apple targets where a prebuilt MLX is given, mlx-c and this crate's own C++ are compiled against
//! MLX's headers into one shared library, which the program opens at run time on Linux and links on Apple targets
//! ([`prebuilt`]). On other Apple targets MLX is built from source as upstream's crate does ([`apple`]). Neither path
//! touches the network, except that upstream's CMake project fetches MLX.

#![expect(unreachable_pub, reason = "the modules of a build script are one program")]

mod apple;
mod bindings;
mod cache;
mod locate;
mod prebuilt;

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // Cargo prints a failed script's stderr in full.
            eprintln!("\n{message}\n");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rustc-check-cfg=cfg(mlx_dynamic)");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=native");
    for name in [
        "MLX_PREFIX",
        "MLX_ENGINE_CACHE",
        "XDG_CACHE_HOME",
        "HOME",
        "LIBCLANG_PATH",
        "CXX",
    ] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let mlx_c = locate::mlx_c()?;
    let out = PathBuf::from(locate::env("OUT_DIR")?);
    let apple_target = locate::env("CARGO_CFG_TARGET_VENDOR")? == "apple";
    match locate::mlx()? {
        Some(mlx) => prebuilt::build(&mlx, &mlx_c, &out),
        None if apple_target => apple::build(&mlx_c, &out),
        None => Err(locate::missing_mlx()),
    }
}
