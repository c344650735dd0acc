//! `cargo xtask sanitize`: the tests of the kernels under valgrind, which sees every read and write out of bounds and every
//! number that nobody wrote.
//!
//! valgrind knows AVX2 and not AVX-512, and says so to the program: what runs there are the portable kernels and those for
//! AVX2. The kernels are written once for all of them, and differ by what a vector of sixteen lanes is.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::workspace::{cargo, on_path, output, run as go, spell};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Cases of each property: each takes some fifty times as long as without valgrind
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    cases: u32,

    /// Parts of the names of the tests to run; all where there are none
    names: Vec<String>,
}

/// The crate whose unsafe code is looked at.
pub(crate) const PACKAGE: &str = "mlx-engine-kernels";

pub(crate) fn run(args: &Args) -> Result<()> {
    if !on_path("valgrind") {
        return Err(Error::MissingTool {
            tool: "valgrind".to_owned(),
            purpose: "looking at every access to memory",
            install: "install it (Debian: apt install valgrind) and run the command again",
        });
    }
    let mut build = cargo();
    build.args(["test", "-p", PACKAGE, "--lib", "--tests", "--no-run"]);
    let programs = built(&mut build)?;
    for program in &programs {
        let mut command = Command::new("valgrind");
        // Threads that spin must not keep those that work from the one processor that valgrind has.
        command.args(["--quiet", "--error-exitcode=99", "--fair-sched=yes"]);
        command.arg(program).args(&args.names).arg("--test-threads=1");
        // valgrind knows no process that sends no signal when it ends.
        command.args(["--skip", "a_child_"]);
        command.env("PROPTEST_CASES", args.cases.to_string());
        println!("sanitize: {}", spell(&command));
        go(&mut command)?;
    }
    println!(
        "sanitize: {} programs of tests, nothing out of bounds and nothing unwritten was read",
        programs.len()
    );
    Ok(())
}

/// Builds, and gives the programs.
pub(crate) fn built(build: &mut Command) -> Result<Vec<PathBuf>> {
    build.args(["--message-format", "json-render-diagnostics"]);
    build.stderr(std::process::Stdio::inherit());
    let built = output(build)?;
    if !built.status.success() {
        return Err(Error::Failed {
            command: spell(build),
            status: built.status.to_string(),
        });
    }
    Ok(programs(&String::from_utf8_lossy(&built.stdout)))
}

/// The programs that cargo has built, from what it tells of each artifact.
fn programs(messages: &str) -> Vec<PathBuf> {
    let artifacts = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    artifacts
        .filter_map(|artifact| artifact["executable"].as_str().map(PathBuf::from))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_told_from_libraries() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/t/layers-1\"}\n\
                        {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(programs(messages), [PathBuf::from("/t/layers-1")]);
    }
}
