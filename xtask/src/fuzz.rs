//! `cargo xtask fuzz`: bytes that nobody meant, for everything that reads from outside.
//!
//! libFuzzer counts which code an input reaches. The counters are passes of LLVM that the stable compiler can be asked for, so
//! that no nightly one and no further tool is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result};
use crate::workspace::{self, cargo, run as go};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long each target runs, in seconds
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,

    /// The targets to run; all where there are none
    targets: Vec<String>,
}

/// The folder of the targets, a workspace of its own.
const FOLDER: &str = "fuzz";

/// Inputs longer than this say nothing more.
const LONGEST: u32 = 16 << 10;

/// An input that allocates more than this at once, in MiB, is a fault: nothing in it can be so large.
const LARGEST_ALLOCATION: u32 = 512;

/// An input that takes longer than this, in seconds, is a fault.
const SLOWEST: u32 = 20;

/// Counters at each edge, a table of where they are, and the operands of comparisons.
const FLAGS: [&str; 6] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = workspace::root().join(FOLDER);
    let all = targets(&folder)?;
    if let Some(unknown) = args.targets.iter().find(|target| !all.contains(target)) {
        let message = format!(
            "there is no fuzz target `{unknown}`\n  the targets are {}",
            all.join(", ")
        );
        return Err(Error::Refused(message));
    }
    let wanted = if args.targets.is_empty() {
        &all
    } else {
        &args.targets
    };
    let host = workspace::host()?;
    let mut build = cargo();
    build
        .args(["build", "--release", "--manifest-path"])
        .arg(folder.join("Cargo.toml"));
    // With a target of its own, so that build scripts and macros are built without counters.
    build.args(["--target", &host]);
    for target in wanted {
        build.args(["--bin", target]);
    }
    build.env("RUSTFLAGS", FLAGS.join(" "));
    go(&mut build)?;
    let programs = folder.join("target").join(&host).join("release");
    for target in wanted {
        let mut command = program(&folder, &programs, target, args.seconds)?;
        println!("fuzz: {target}, {} s", args.seconds);
        go(&mut command)?;
    }
    println!(
        "fuzz: {} targets, {} s each, no panic, no hang and no allocation of {LARGEST_ALLOCATION} MiB",
        wanted.len(),
        args.seconds
    );
    Ok(())
}

/// The command that runs a target: what it finds new is kept under `target`, seeds stay as they are.
fn program(folder: &Path, programs: &Path, target: &str, seconds: u32) -> Result<Command> {
    let kept = folder.join("target/corpus").join(target);
    let faults = folder.join("target/faults").join(target);
    for folder in [&kept, &faults] {
        fs::create_dir_all(folder).context("make the folder", folder)?;
    }
    let mut command = Command::new(programs.join(target));
    command.current_dir(folder);
    command.arg(kept).arg(folder.join("seeds").join(target));
    command.arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-max_len={LONGEST}"));
    command.arg(format!("-malloc_limit_mb={LARGEST_ALLOCATION}"));
    command.arg(format!("-timeout={SLOWEST}"));
    command.arg(format!("-artifact_prefix={}/", faults.display()));
    command.args(["-rss_limit_mb=4096", "-print_final_stats=1", "-verbosity=0"]);
    Ok(command)
}

/// The targets, by their files.
fn targets(folder: &Path) -> Result<Vec<String>> {
    let sources = folder.join("targets");
    let mut found = Vec::new();
    for entry in fs::read_dir(&sources).context("list", &sources)? {
        let path: PathBuf = entry.context("list", &sources)?.path();
        found.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_in_the_manifest_and_has_seeds() {
        let folder = workspace::root().join(FOLDER);
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        let targets = targets(&folder).unwrap();
        assert_eq!(manifest.matches("[[bin]]").count(), targets.len());
        for target in targets {
            assert!(manifest.contains(&format!("name = \"{target}\"")), "{target}");
            let seeds = folder.join("seeds").join(&target);
            assert!(fs::read_dir(&seeds).unwrap().count() > 0, "{}", seeds.display());
        }
    }
}
