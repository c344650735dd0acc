//! `cargo xtask cross`: the tests of the kernels for Arm, on a machine of another kind.
//!
//! qemu runs them as three processors, each of which has more instructions than the one before it, so that what is compiled for
//! one of them is also seen not to need the next. It counts no time: what a kernel costs is for a real processor to say.
//!
//! Where rustup has no network, Debian's compiler does too: `rustc` of this machine's architecture and `libstd-rust-dev:arm64` of
//! the same version, named by `RUSTC`.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};
use crate::sanitize::{self, PACKAGE};
use crate::workspace::{cargo, on_path, output, run as go, spell};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Cases of each property, on each processor
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    cases: u32,

    /// Parts of the names of the tests to run; all where there are none
    names: Vec<String>,
}

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const LINKER_VARIABLE: &str = "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER";

/// Names of the emulator: linked to the system's libraries or to none.
const EMULATORS: [&str; 2] = ["qemu-aarch64", "qemu-aarch64-static"];

/// With NEON alone, with dot products too, and with all that the emulator has.
const PROCESSORS: [&str; 3] = ["cortex-a53", "cortex-a76", "max"];

pub(crate) fn run(args: &Args) -> Result<()> {
    let Some(emulator) = EMULATORS.into_iter().find(|name| on_path(name)) else {
        return Err(missing(
            EMULATORS[0],
            "running programs for Arm",
            "install it (Debian: apt install qemu-user) and run the command again",
        ));
    };
    if !on_path(LINKER) {
        return Err(missing(
            LINKER,
            "linking programs for Arm",
            "install it (Debian: apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross) and run the command again",
        ));
    }
    if !has_library(&std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))? {
        return Err(missing(
            TARGET,
            "compiling for Arm",
            "add it (rustup target add aarch64-unknown-linux-gnu), or name a compiler that has it by RUSTC, and run the command again",
        ));
    }
    let libraries = libraries()?;
    let mut build = cargo();
    build.args([
        "test", "-p", PACKAGE, "--lib", "--tests", "--no-run", "--target", TARGET,
    ]);
    build.env(LINKER_VARIABLE, LINKER);
    let programs = sanitize::built(&mut build)?;
    for processor in PROCESSORS {
        for program in &programs {
            let mut command = Command::new(emulator);
            command.args(["-cpu", processor, "-L"]).arg(&libraries);
            command.arg(program).args(&args.names);
            command.env("PROPTEST_CASES", args.cases.to_string());
            println!("cross: {}", spell(&command));
            go(&mut command)?;
        }
    }
    println!(
        "cross: {} programs of tests on {} processors, each instruction set gives what it should",
        programs.len(),
        PROCESSORS.len()
    );
    Ok(())
}

fn missing(tool: &str, purpose: &'static str, install: &'static str) -> Error {
    Error::MissingTool {
        tool: tool.to_owned(),
        purpose,
        install,
    }
}

/// Whether the compiler has a standard library for the target.
fn has_library(rustc: &std::ffi::OsStr) -> Result<bool> {
    let mut command = Command::new(rustc);
    command.args(["--print", "target-libdir", "--target", TARGET]);
    let printed = output(&mut command)?;
    let folder = String::from_utf8_lossy(&printed.stdout);
    Ok(printed.status.success() && Path::new(folder.trim()).is_dir())
}

/// The folder in which the emulated program finds `lib/`, from where the linker has the C library.
fn libraries() -> Result<PathBuf> {
    let mut command = Command::new(LINKER);
    command.arg("-print-file-name=libc.so.6");
    let printed = output(&mut command)?;
    let library = String::from_utf8_lossy(&printed.stdout);
    let library = Path::new(library.trim()).canonicalize();
    let root = library.ok().as_deref().and_then(root_of);
    root.ok_or_else(|| {
        missing(
            "libc.so.6 for aarch64",
            "running programs for Arm",
            "install it (Debian: apt install libc6-arm64-cross) and run the command again",
        )
    })
}

/// `/usr/aarch64-linux-gnu` of `/usr/aarch64-linux-gnu/lib/libc.so.6`.
fn root_of(library: &Path) -> Option<PathBuf> {
    let folder = library.parent()?;
    folder
        .ends_with("lib")
        .then(|| folder.parent().map(Path::to_path_buf))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_a_library_is_above_its_lib_folder() {
        let root = |library: &str| root_of(Path::new(library));
        let expected = Some(PathBuf::from("/usr/aarch64-linux-gnu"));
        assert_eq!(root("/usr/aarch64-linux-gnu/lib/libc.so.6"), expected);
        assert_eq!(root("libc.so.6"), None);
    }
}
