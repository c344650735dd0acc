//! `cargo xtask coverage`: how many of each crate's lines the tests run.
//!
//! By `cargo llvm-cov` where it is installed, and by `cargo tarpaulin` elsewhere, which needs no tools of LLVM. Both are asked
//! for the same format, and what is reported is made of that.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::packages::{self, Package};
use crate::workspace::{self, cargo, on_path, run as go};
use crate::{setup, test};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The packages whose tests run; all where there are none
    #[arg(short, long = "package", value_name = "NAME")]
    packages: Vec<String>,

    /// Fail where a crate has fewer than this many percent of its lines covered
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    least: Option<u8>,
}

/// The report of either tool.
const REPORT: &str = "lcov.info";

pub(crate) fn run(args: &Args) -> Result<()> {
    let workspace = packages::read()?;
    let folder = workspace.target.join("coverage");
    fs::create_dir_all(&folder).context("make the folder", &folder)?;
    let report = folder.join(REPORT);
    let cache = setup::fill(None, true)?;
    let mut command = cargo();
    if on_path("cargo-llvm-cov") {
        command.args(["llvm-cov", "--lcov", "--output-path"]).arg(&report);
    } else if on_path("cargo-tarpaulin") {
        command.args([
            "tarpaulin",
            "--engine",
            "llvm",
            "--skip-clean",
            "--out",
            "lcov",
            "--output-dir",
        ]);
        command.arg(&folder);
        command.arg("--target-dir").arg(folder.join("target"));
    } else {
        return Err(Error::MissingTool {
            tool: "cargo-llvm-cov".to_owned(),
            purpose: "counting the lines that tests run",
            install: "install it (cargo install cargo-llvm-cov, and rustup component add llvm-tools), or cargo-tarpaulin, and run the command \
                      again",
        });
    }
    if args.packages.is_empty() {
        command.args(["--workspace", "--exclude", env!("CARGO_PKG_NAME")]);
        command.args(test::oracles(&workspace.packages, &[]));
    }
    for package in &args.packages {
        command.args(["--package", package]);
    }
    command.env("MLX_ENGINE_TEST_MODEL", cache.test_model());
    command.env("MLX_ENGINE_TEST_DATA", cache.test_data());
    command.env("MLX_ENGINE_TEST_PYTHONPATH", cache.oracle()?);
    println!("coverage: {}", workspace::spell(&command));
    go(&mut command)?;

    let text = fs::read_to_string(&report).context("read", &report)?;
    let crates = per_crate(&lines(&text), &workspace.packages);
    let mut few = Vec::new();
    for (name, count) in &crates {
        if !args.packages.is_empty() && !args.packages.contains(name) {
            continue;
        }
        let percent = count.percent();
        println!("coverage: {name:<24} {percent:>5.1}% of {} lines", count.all);
        if args.least.is_some_and(|least| percent < f64::from(least)) {
            few.push(format!("{name}: {percent:.1}%"));
        }
    }
    if few.is_empty() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "too few lines are covered\n  {}",
        few.join("\n  ")
    )))
}

/// Lines of code, and those of them that ran.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Count {
    all: u64,
    run: u64,
}

impl Count {
    fn percent(self) -> f64 {
        if self.all == 0 {
            return 100.0;
        }
        self.run as f64 / self.all as f64 * 100.0
    }
}

/// The lines of each file, from lcov's records: `SF:` begins a file, `DA:` is a line and how often it ran. A line that several
/// records have ran as often as they say together.
fn lines(lcov: &str) -> BTreeMap<PathBuf, BTreeMap<u64, u64>> {
    let mut files: BTreeMap<PathBuf, BTreeMap<u64, u64>> = BTreeMap::new();
    let mut file = PathBuf::new();
    for line in lcov.lines() {
        if let Some(name) = line.strip_prefix("SF:") {
            file = PathBuf::from(name);
        } else if let Some((number, times)) = line.strip_prefix("DA:").and_then(|rest| rest.split_once(',')) {
            let times = times.split(',').next().unwrap_or_default();
            if let (Ok(number), Ok(times)) = (number.parse(), times.parse::<u64>()) {
                let count = files.entry(file.clone()).or_default().entry(number).or_default();
                *count = count.saturating_add(times);
            }
        }
    }
    files
}

/// The counts of each package's own sources; its tests are no part of it.
fn per_crate(files: &BTreeMap<PathBuf, BTreeMap<u64, u64>>, packages: &[Package]) -> BTreeMap<String, Count> {
    let mut found: BTreeMap<String, Count> = BTreeMap::new();
    let root = workspace::root();
    for (file, lines) in files {
        let path = if file.is_absolute() {
            file.clone()
        } else {
            root.join(file)
        };
        let owner = packages.iter().find(|package| {
            let sources = package.manifest.parent().unwrap_or(Path::new("")).join("src");
            path.starts_with(sources)
        });
        if let Some(package) = owner {
            let count = found.entry(package.name.clone()).or_default();
            count.all += lines.len() as u64;
            count.run += lines.values().filter(|&&times| times > 0).count() as u64;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packages::tests::sample;

    #[test]
    fn lines_are_counted_once_and_by_crate() {
        let mut core = sample("core", &[]);
        core.manifest = PathBuf::from("/w/crates/core/Cargo.toml");
        let lcov = "TN:\nSF:/w/crates/core/src/a.rs\nDA:1,3\nDA:2,0\nend_of_record\n\
                    SF:/w/crates/core/src/a.rs\nDA:2,1\nDA:4,0,sum\nend_of_record\n\
                    SF:/w/crates/core/tests/b.rs\nDA:1,0\nend_of_record\n\
                    SF:/elsewhere/c.rs\nDA:1,0\nend_of_record\n";
        let found = per_crate(&lines(lcov), &[core]);
        assert_eq!(found.len(), 1);
        assert_eq!(found["core"], Count { all: 3, run: 2 });
        assert!((found["core"].percent() - 66.67).abs() < 0.01);
    }
}
