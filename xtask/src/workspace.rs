//! The repository, and the programs that run in it.

use std::env;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::error::{Context, Error, Result};

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The user's own cargo, in the root of the repository.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(root());
    command
}

/// Runs a command and reads its output as JSON.
pub(crate) fn json(command: &mut Command) -> Result<Value> {
    let output = output(command)?;
    if !output.status.success() {
        return Err(Error::Failed {
            command: spell(command),
            status: format!(
                "{}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        });
    }
    serde_json::from_slice(&output.stdout).map_err(|error| Error::Failed {
        command: spell(command),
        status: format!("its answer is no JSON: {error}"),
    })
}

/// Runs a command to its end; failing is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|error| unstarted(command, &error))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Failed {
        command: spell(command),
        status: status.to_string(),
    })
}

/// Runs a command and keeps what it prints.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    command.output().map_err(|error| unstarted(command, &error))
}

/// The error of a program that did not start.
pub(crate) fn unstarted(command: &Command, error: &io::Error) -> Error {
    let tool = command.get_program().to_string_lossy().into_owned();
    if error.kind() == io::ErrorKind::NotFound && tool == PYTHON {
        return Error::MissingTool {
            tool,
            purpose: "fetching from PyPI",
            install: "install it (Debian: apt install python3 python3-pip) and run the command again",
        };
    }
    Error::Failed {
        command: spell(command),
        status: error.to_string(),
    }
}

/// The Python that fetches and that the oracle runs on.
pub(crate) const PYTHON: &str = "python3";

/// A command as one would type it.
pub(crate) fn spell(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut text = name.to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Whether a program is on the path.
pub(crate) fn on_path(program: &str) -> bool {
    if program.contains('/') {
        return Path::new(program).is_file();
    }
    env::var_os("PATH")
        .is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

/// The platform that this machine is.
pub(crate) fn host() -> Result<String> {
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc")));
    rustc.arg("-vV");
    let told = output(&mut rustc)?;
    let text = String::from_utf8_lossy(&told.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).ok_or_else(|| Error::Failed {
        command: spell(&rustc),
        status: "it does not say which platform this is".to_owned(),
    })
}

/// A wheel does not keep who may run a file.
#[cfg(unix)]
pub(crate) fn executable(program: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;

    std::fs::set_permissions(program, std::fs::Permissions::from_mode(0o755))
        .context("make executable", program)
}

#[cfg(not(unix))]
pub(crate) fn executable(_: &Path) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_has_the_workspace_manifest() {
        assert!(root().join("Cargo.toml").is_file());
        assert!(root().join("xtask").is_dir());
    }

    #[test]
    fn a_missing_python_says_what_to_install() {
        let error = unstarted(&Command::new(PYTHON), &io::ErrorKind::NotFound.into());
        assert!(
            error.to_string().contains("apt install python3 python3-pip"),
            "{error}"
        );
    }

    #[test]
    fn a_failing_command_is_named() {
        let error = run(cargo().args(["no-such-command", "--quiet"])).unwrap_err();
        assert!(
            error.to_string().contains("cargo no-such-command --quiet failed"),
            "{error}"
        );
    }

    #[test]
    fn this_machine_has_a_platform() {
        assert!(host().unwrap().contains('-'));
    }

    #[test]
    fn programs_are_looked_up_on_the_path() {
        assert!(on_path("sh"));
        assert!(on_path("/bin/sh"));
        assert!(!on_path("no-such-program-here"));
    }
}
