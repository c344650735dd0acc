//! LLVM's programs that read which lines ran.
//!
//! Those of the toolchain where it has some; elsewhere those that this workspace pins, so that nothing has to be
//! installed.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::downloads::{self, Host};
use crate::error::{Error, Result};
use crate::setup;
use crate::workspace::{self, executable, output};

/// `llvm-profdata`, which adds up what programs counted, and `llvm-cov`, which knows the lines.
#[derive(Debug)]
pub(crate) struct Tools {
    pub(crate) profdata: PathBuf,
    pub(crate) cov: PathBuf,
}

impl Tools {
    /// Finds them, or fetches them below `folder`.
    pub(crate) fn ready(folder: &Path) -> Result<Self> {
        let own = Self::within(&toolchain()?);
        if own.profdata.is_file() && own.cov.is_file() {
            return Ok(own);
        }
        let pinned = downloads::llvm_tools(Host::here()?).filter(|_| can_read(downloads::LLVM_TOOLS_MAJOR));
        let piece = pinned.ok_or_else(|| Error::MissingTool {
            tool: "llvm-profdata".to_owned(),
            purpose: "counting the lines that tests run",
            install: "install LLVM's tools (rustup component add llvm-tools) and run the command again",
        })?;
        setup::fill_beside(&[piece], folder)?;
        let pinned = Self::within(&folder.join(downloads::LLVM_TOOLS).join("bin"));
        executable(&pinned.profdata)?;
        executable(&pinned.cov)?;
        Ok(pinned)
    }

    fn within(folder: &Path) -> Self {
        let named = |name: &str| folder.join(format!("{name}{}", env::consts::EXE_SUFFIX));
        Self {
            profdata: named("llvm-profdata"),
            cov: named("llvm-cov"),
        }
    }
}

/// Where the component `llvm-tools` of a toolchain lies.
fn toolchain() -> Result<PathBuf> {
    let library = PathBuf::from(rustc(&["--print", "target-libdir"])?.trim());
    Ok(library.with_file_name("bin"))
}

/// Tools read what the same LLVM wrote, or an older one.
fn can_read(tools: u32) -> bool {
    rustc(&["-vV"])
        .ok()
        .and_then(|told| major(&told))
        .is_some_and(|compiler| compiler <= tools)
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
        assert!(can_read(u32::MAX) && !can_read(1));
        assert_eq!(major("rustc 1.95.0\nLLVM version: 22.1.2\n"), Some(22));
        assert_eq!(major("rustc 1.95.0\n"), None);
    }

    #[test]
    fn the_tools_of_a_toolchain_lie_beside_its_libraries() {
        let folder = toolchain().unwrap();
        assert!(
            folder.ends_with("bin") && folder.with_file_name("lib").is_dir(),
            "{}",
            folder.display()
        );
    }
}
