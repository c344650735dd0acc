//! `cargo xtask coverage`: how many of each crate's lines the tests run.
//!
//! All tests of the workspace with the real MLX, the test model and the oracles, counted by the compiler
//! (`-C instrument-coverage`), and read by `cargo llvm-cov`. What counts is each crate's code outside of its tests, run by whichever
//! crate's test.

mod lines;
mod tools;

use std::collections::BTreeMap;
use std::fs;

use serde_json::json;

use self::lines::Count;
use self::tools::Tools;
use crate::error::{Context, Error, Result};
use crate::packages;
use crate::workspace::{on_path, run as go, spell};
use crate::{setup, test};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The packages whose tests run and whose lines are counted; all where there are none
    #[arg(short, long = "package", value_name = "NAME")]
    packages: Vec<String>,

    /// Fail where a crate has fewer than this many percent of its lines covered
    #[arg(long, value_name = "PERCENT", default_value_t = 90, value_parser = clap::value_parser!(u8).range(0..=100))]
    least: u8,

    /// Name the files of each crate too
    #[arg(long)]
    files: bool,
}

/// The report of `cargo llvm-cov`, and ours.
const LCOV: &str = "lcov.info";
const REPORT: &str = "coverage.json";

pub(crate) fn run(args: &Args) -> Result<()> {
    let workspace = packages::read()?;
    let folder = workspace.target.join("coverage");
    fs::create_dir_all(&folder).context("make the folder", &folder)?;
    let tools = Tools::ready(&folder)?;
    let cache = setup::fill(None, true)?;
    let mut tests = tools.command()?;
    if on_path("cargo-nextest") {
        tests.arg("nextest");
    }
    tests.arg("--no-report");
    if args.packages.is_empty() {
        tests.args(["--workspace", "--exclude", env!("CARGO_PKG_NAME")]);
        tests.args(test::oracles(&workspace.packages, &[]));
    }
    for package in &args.packages {
        tests.args(["--package", package]);
    }
    test::with_data(&mut tests, &cache)?;
    println!("coverage: {}", spell(&tests));
    go(&mut tests)?;
    let lcov = folder.join(LCOV);
    go(tools
        .command()?
        .args(["report", "--lcov", "--output-path"])
        .arg(&lcov))?;

    let text = fs::read_to_string(&lcov).context("read", &lcov)?;
    let files = lines::per_file(&lines::read(&text), &workspace.packages)?;
    let mut crates: BTreeMap<&str, Count> = BTreeMap::new();
    for ((name, file), count) in &files {
        if !args.packages.is_empty() && !args.packages.contains(name) {
            continue;
        }
        let sum = crates.entry(name).or_default();
        sum.all += count.all;
        sum.run += count.run;
        if args.files {
            let missed = count.all - count.run;
            println!(
                "coverage: {:>5.1}% {missed:>5} missed  {}",
                count.percent(),
                file.display()
            );
        }
    }
    let report = folder.join(REPORT);
    let told = crates
        .iter()
        .map(|(name, count)| json!({"crate": name, "lines": count.all, "run": count.run, "percent": count.percent()}))
        .collect::<Vec<_>>();
    fs::write(&report, format!("{:#}\n", json!(told))).context("write", &report)?;
    for (name, count) in &crates {
        println!(
            "coverage: {name:<24} {:>5.1}% of {} lines",
            count.percent(),
            count.all
        );
    }
    enough(&crates, args.least)
}

/// Fails where a crate has too few.
fn enough(crates: &BTreeMap<&str, Count>, least: u8) -> Result<()> {
    let few: Vec<_> = crates
        .iter()
        .filter(|(_, count)| count.percent() < f64::from(least))
        .map(|(name, count)| format!("{name}: {:.1}%", count.percent()))
        .collect();
    if few.is_empty() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "fewer than {least}% of the lines are covered\n  {}",
        few.join("\n  ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_below_the_least_is_named() {
        let crates = BTreeMap::from([
            ("core", Count { all: 100, run: 89 }),
            ("text", Count { all: 100, run: 90 }),
        ]);
        let error = enough(&crates, 90).unwrap_err().to_string();
        assert!(
            error.contains("core: 89.0%") && !error.contains("text"),
            "{error}"
        );
        enough(&crates, 89).unwrap();
    }
}
