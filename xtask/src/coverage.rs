//! `cargo xtask coverage`: how many of each crate's lines the tests run.
//!
//! All tests of the workspace with the real MLX, the test model and the oracles, counted by the compiler
//! (`-C instrument-coverage`). What counts is each crate's code outside of its tests, run by whichever crate's test.

pub(crate) mod compiler;
mod lines;
mod tools;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use self::lines::Count;
use self::tools::Tools;
use crate::error::{Context, Error, Result};
use crate::packages::{self, Package};
use crate::workspace::{cargo, on_path, output, run as go, spell};
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

/// What this command writes in `target/coverage`: what programs counted, their sum, the lines of it, and those of each crate.
const COUNTED: &str = "counted";
const SUM: &str = "sum.profdata";
const LINES: &str = "lcov.info";
const REPORT: &str = "coverage.json";

pub(crate) fn run(args: &Args) -> Result<()> {
    let workspace = packages::read()?;
    let folder = workspace.target.join("coverage");
    fs::create_dir_all(&folder).context("make the folder", &folder)?;
    let tools = Tools::ready(&folder)?;
    let cache = setup::fill(None, true)?;
    let selected = selected(&workspace.packages, &args.packages);
    let counted = folder.join(COUNTED);
    let call = |words: &[&str]| -> Result<Command> {
        let mut command = cargo();
        command.args(words).args(&selected);
        test::with_data(&mut command, &cache)?;
        compiler::count(&mut command).context("find this program below", &folder)?;
        // A few files for each program, which its processes add to.
        command.env("LLVM_PROFILE_FILE", counted.join("%4m.profraw"));
        Ok(command)
    };

    let programs = programs(&mut call(&[
        "test",
        "--no-run",
        "--message-format=json-render-diagnostics",
    ])?)?;
    // What build scripts and macros counted is no test's.
    match fs::remove_dir_all(&counted) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("empty", &counted);
        }
        _ => fs::create_dir_all(&counted).context("make the folder", &counted)?,
    }
    let runner: &[&str] = if on_path("cargo-nextest") {
        &["nextest", "run", "--no-fail-fast"]
    } else {
        &["test", "--no-fail-fast", "--lib", "--bins", "--tests"]
    };
    let mut tests = call(runner)?;
    println!("coverage: {}", spell(&tests));
    go(&mut tests)?;

    let text = lcov(&tools, &folder, &programs)?;
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

/// The packages whose tests run, all where none is named, with the oracles that these have.
fn selected(packages: &[Package], named: &[String]) -> Vec<String> {
    let named: Vec<_> = named
        .iter()
        .flat_map(|name| ["--package".to_owned(), name.clone()])
        .collect();
    let scope = if named.is_empty() {
        ["--workspace", "--exclude", env!("CARGO_PKG_NAME")]
            .map(str::to_owned)
            .to_vec()
    } else {
        named.clone()
    };
    [scope, test::oracles(packages, &named)].concat()
}

/// Builds the tests, and says which programs that made: tests, and those that tests start.
fn programs(build: &mut Command) -> Result<Vec<PathBuf>> {
    println!("coverage: {}", spell(build));
    build.stderr(std::process::Stdio::inherit());
    let built = output(build)?;
    if !built.status.success() {
        return Err(Error::Failed {
            command: spell(build),
            status: built.status.to_string(),
        });
    }
    Ok(executables(&String::from_utf8_lossy(&built.stdout)))
}

/// The programs that cargo's messages name.
fn executables(messages: &str) -> Vec<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect()
}

/// Adds up what was counted, and writes it as lcov's records.
fn lcov(tools: &Tools, folder: &Path, programs: &[PathBuf]) -> Result<String> {
    let sum = folder.join(SUM);
    let mut merge = Command::new(&tools.profdata);
    // A process that a test kills may leave a file that is not whole.
    merge
        .args(["merge", "-sparse", "--failure-mode=all", "-o"])
        .arg(&sum);
    merge.arg(folder.join(COUNTED));
    go(&mut merge)?;
    let mut export = Command::new(&tools.cov);
    export.args(["export", "--format=lcov", "--skip-expansions"]);
    export.arg("--ignore-filename-regex=/(registry|rustc|rustlib)/");
    export.arg(format!("--instr-profile={}", sum.display()));
    for (program, at) in programs.iter().zip(0..) {
        if at > 0 {
            export.arg("-object");
        }
        export.arg(program);
    }
    let told = output(&mut export)?;
    if !told.status.success() {
        return Err(Error::Failed {
            command: "llvm-cov export".to_owned(),
            status: String::from_utf8_lossy(&told.stderr).into_owned(),
        });
    }
    let path = folder.join(LINES);
    fs::write(&path, &told.stdout).context("write", &path)?;
    Ok(String::from_utf8_lossy(&told.stdout).into_owned())
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
    use crate::packages::tests::sample;

    #[test]
    fn oracles_are_compared_with_whatever_is_named() {
        let packages = ["mlx-engine", "mlx-engine-text", "mlx-engine-core"].map(|name| {
            let features = if name == "mlx-engine-core" {
                vec![]
            } else {
                vec!["oracle".to_owned()]
            };
            Package {
                features,
                ..sample(name, &[])
            }
        });
        let selected = |named: &[&str]| {
            let named: Vec<_> = named.iter().map(|&name| name.to_owned()).collect();
            selected(&packages, &named).join(" ")
        };
        assert_eq!(
            selected(&[]),
            "--workspace --exclude xtask --features mlx-engine/oracle --features mlx-engine-text/oracle"
        );
        assert_eq!(
            selected(&["mlx-engine-text", "mlx-engine-core"]),
            "--package mlx-engine-text --package mlx-engine-core --features mlx-engine-text/oracle"
        );
    }

    #[test]
    fn programs_are_those_that_cargo_names() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\nno JSON\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/w/target/debug/deps/a-1\"}\n";
        assert_eq!(executables(messages), [PathBuf::from("/w/target/debug/deps/a-1")]);
    }

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
