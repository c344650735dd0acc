//! The programs that read which lines ran.
//!
//! A user's own where there are some; elsewhere those that this workspace pins, so that nothing has to be installed.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::downloads::{self, Host};
use crate::error::{Error, Result};
use crate::setup;
use crate::workspace::{self, cargo, executable, on_path, output};

/// What has been found.
#[derive(Debug)]
pub(crate) struct Tools {
    /// A folder with `cargo-llvm-cov`, where it is not on the path.
    folder: Option<PathBuf>,
    /// `llvm-cov` and `llvm-profdata`, where the toolchain has none and the user named none.
    llvm: Option<[PathBuf; 2]>,
}

impl Tools {
    /// Finds them, or fetches them below `folder`.
    pub(crate) fn ready(folder: &Path) -> Result<Self> {
        let own = on_path("cargo-llvm-cov");
        let named = ["LLVM_COV", "LLVM_PROFDATA"]
            .iter()
            .all(|name| env::var_os(name).is_some());
        let llvm = named || toolchain_has_them()?;
        let host = Host::here()?;
        let mut pieces = Vec::new();
        if !own {
            pieces.push(downloads::cargo_llvm_cov(host).ok_or_else(missing)?);
        }
        if !llvm {
            let ours = rustc_llvm()?;
            if ours > downloads::LLVM_TOOLS_MAJOR {
                return Err(missing());
            }
            pieces.push(downloads::llvm_tools(host).ok_or_else(missing)?);
        }
        setup::fill_beside(&pieces, folder)?;
        let programs = folder.join(downloads::CARGO_LLVM_COV);
        let tools = folder.join(downloads::LLVM_TOOLS).join("bin");
        let tools = ["llvm-cov", "llvm-profdata"].map(|name| tools.join(name));
        if !own {
            executable(&programs.join("cargo-llvm-cov"))?;
        }
        if !llvm {
            tools.iter().try_for_each(|tool| executable(tool))?;
        }
        Ok(Self {
            folder: (!own).then_some(programs),
            llvm: (!llvm).then_some(tools),
        })
    }

    /// `cargo llvm-cov`, with what it needs.
    pub(crate) fn command(&self) -> Result<Command> {
        let mut command = cargo();
        command.arg("llvm-cov");
        if let Some(folder) = &self.folder {
            let path = env::var_os("PATH").unwrap_or_default();
            let folders = env::split_paths(&path).chain([folder.clone()]);
            let path = env::join_paths(folders)
                .map_err(|error| Error::Refused(format!("the path cannot be set: {error}")))?;
            command.env("PATH", path);
        }
        if let Some([cov, profdata]) = &self.llvm {
            command.env("LLVM_COV", cov).env("LLVM_PROFDATA", profdata);
        }
        Ok(command)
    }
}

/// The error of tools that are not there and not pinned for this machine.
fn missing() -> Error {
    Error::MissingTool {
        tool: "cargo-llvm-cov, or LLVM's tools for it,".to_owned(),
        purpose: "counting the lines that tests run",
        install: "install them (cargo install cargo-llvm-cov, and rustup component add llvm-tools) and run the command again",
    }
}

/// Whether the toolchain came with LLVM's tools.
fn toolchain_has_them() -> Result<bool> {
    let told = rustc(&["--print", "target-libdir"])?;
    let library = PathBuf::from(told.trim());
    let tool = format!("llvm-profdata{}", env::consts::EXE_SUFFIX);
    Ok(library
        .parent()
        .is_some_and(|folder| folder.join("bin").join(tool).is_file()))
}

/// The version of LLVM that writes what the tools read; they read that of older ones.
fn rustc_llvm() -> Result<u32> {
    let told = rustc(&["-vV"])?;
    major(&told).ok_or_else(|| Error::Refused(format!("rustc does not say which LLVM it has: {told}")))
}

fn major(told: &str) -> Option<u32> {
    let version = told
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.trim().parse().ok()
}

fn rustc(arguments: &[&str]) -> Result<String> {
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.current_dir(workspace::root()).args(arguments);
    let told = output(&mut rustc)?;
    Ok(String::from_utf8_lossy(&told.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rustc_says_which_llvm_it_has() {
        assert!(rustc_llvm().unwrap() > 10);
        assert_eq!(major("rustc 1.95.0\nLLVM version: 22.1.2\n"), Some(22));
        assert_eq!(major("rustc 1.95.0\n"), None);
    }
}
