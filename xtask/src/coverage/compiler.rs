//! The compiler, with counters in what it makes of this workspace.
//!
//! Cargo calls a wrapper for the members of a workspace alone, and keeps what it makes apart from the rest. So the
//! dependencies are those of the tests, built once, and what runs is counted in our own code alone.

use std::env;
use std::path::Path;
use std::process::{Command, ExitCode};

/// Has a call of cargo put counters into the workspace's code.
pub(super) fn count(command: &mut Command) -> std::io::Result<()> {
    command.env("RUSTC_WORKSPACE_WRAPPER", env::current_exe()?);
    Ok(())
}

/// Does what cargo asks of its wrapper, where this program is called as one: the compiler and its arguments.
pub(crate) fn stand_in() -> Option<ExitCode> {
    let mut arguments = env::args_os().skip(1);
    let compiler = arguments.next()?;
    // None of our commands is called so.
    if Path::new(&compiler).file_stem()? != "rustc" {
        return None;
    }
    let status = Command::new(&compiler)
        .args(arguments)
        .arg("-Cinstrument-coverage")
        // Not every build of LLVM's tools can read what is packed.
        .arg("-Cllvm-args=-enable-name-compression=false")
        .status();
    Some(match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {} did not start: {error}", compiler.display());
            ExitCode::FAILURE
        }
    })
}
