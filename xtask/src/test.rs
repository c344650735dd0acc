//! `cargo xtask test`: every test there is, with all that the tests need.

use std::fs;
use std::process::Command;
use std::time::Instant;

use crate::error::{Context, Result};
use crate::packages::{self, Package, Workspace, bound_to_mlx};
use crate::setup::{self, Cache};
use crate::workspace::{self, cargo, on_path, run as go};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run the lean tests alone: no MLX, nothing to set up
    #[arg(long)]
    lean: bool,

    /// Arguments for the test runner, such as `-p mlx-engine-text` or part of a test's name; a selection runs once,
    /// without the documentation tests and the lean tests
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    selection: Vec<String>,
}

/// The feature of tests that compare with recorded output of other programs.
const ORACLE: &str = "oracle";

/// The feature of tests that need Gemma 3.
const GEMMA: &str = "gemma";

pub(crate) fn run(args: &Args) -> Result<()> {
    let started = Instant::now();
    let workspace = packages::read()?;
    let nextest = on_path("cargo-nextest");
    let mut suites = Vec::new();
    if !args.lean {
        suites.extend(full(&workspace, nextest, &args.selection)?);
    }
    if args.lean || args.selection.is_empty() {
        suites.extend(lean(&workspace, nextest, &args.selection)?);
    }
    for suite in &mut suites {
        println!("test: {} ({})", suite.name, workspace::spell(&suite.command));
        go(&mut suite.command)?;
    }
    let names: Vec<_> = suites.iter().map(|suite| suite.name).collect();
    let seconds = started.elapsed().as_secs();
    let plural = if suites.len() == 1 { "" } else { "s" };
    println!(
        "test: {} suite{plural} passed in {seconds} s ({})",
        suites.len(),
        names.join(", ")
    );
    Ok(())
}

struct Suite {
    name: &'static str,
    command: Command,
}

/// The tests with MLX, the test model and the test data.
fn full(workspace: &Workspace, nextest: bool, selection: &[String]) -> Result<Vec<Suite>> {
    let cache = setup::fill(None, true)?;
    let mut selected = [&scope(selection)[..], &oracles(&workspace.packages, selection)].concat();
    if cache.gemma().is_some() {
        selected.extend(with(GEMMA, &workspace.packages, selection));
    } else {
        println!("test: the tests of Gemma 3 are left out: cargo xtask setup --gemma brings the model");
    }
    let mut suites = runs(["with MLX", "documentation"], nextest, &selected, selection);
    for suite in &mut suites {
        with_data(&mut suite.command, &cache)?;
    }
    Ok(suites)
}

/// Names what the tests read: the models, the data and the oracles of the cache.
pub(crate) fn with_data(command: &mut Command, cache: &Cache) -> Result<()> {
    command.env("MLX_ENGINE_TEST_MODEL", cache.test_model());
    command.env("MLX_ENGINE_TEST_DATA", cache.test_data());
    if let Some(gemma) = cache.gemma() {
        command.env("MLX_ENGINE_TEST_GEMMA", gemma);
    }
    command.env("MLX_ENGINE_TEST_PYTHONPATH", cache.oracle()?);
    Ok(())
}

/// The tests of what works without MLX, built where no MLX can leak in.
fn lean(workspace: &Workspace, nextest: bool, selection: &[String]) -> Result<Vec<Suite>> {
    let target = workspace.target.join("lean");
    let empty = target.join("no-cache");
    fs::create_dir_all(&empty).context("make the folder", &empty)?;
    let mut selected = scope(selection);
    selected.push("--no-default-features".to_owned());
    if selects_all(&selected) {
        selected.extend(excluded(&workspace.packages));
    }
    let mut suites = runs(["lean", "lean documentation"], nextest, &selected, selection);
    for suite in &mut suites {
        suite.command.env("CARGO_TARGET_DIR", &target);
        suite.command.env("MLX_ENGINE_CACHE", &empty);
        suite.command.env_remove("MLX_ENGINE_TEST_MODEL");
        suite.command.env_remove("MLX_ENGINE_TEST_DATA");
        suite.command.env_remove("MLX_ENGINE_TEST_PYTHONPATH");
    }
    Ok(suites)
}

/// The tests, and, where nothing narrower is selected, those of the documentation.
fn runs(names: [&'static str; 2], nextest: bool, selected: &[String], selection: &[String]) -> Vec<Suite> {
    let [tests, documentation] = names;
    let suite = |name, program: &[&str], rest: &[String]| {
        let mut command = cargo();
        command.args(program).args(selected).args(rest);
        Suite { name, command }
    };
    if !nextest {
        return vec![suite(tests, &["test"], selection)];
    }
    // The documentation first: a crate without examples ends with "0 passed", which should not be the last word.
    let mut suites = Vec::new();
    if selection.is_empty() {
        suites.push(suite(documentation, &["test", "--doc"], &[]));
    }
    suites.push(suite(tests, &["nextest", "run"], selection));
    suites
}

/// The whole workspace, unless packages are named.
fn scope(selection: &[String]) -> Vec<String> {
    let named = selection.iter().any(|argument| {
        argument.starts_with("-p") || argument.starts_with("--package") || argument == "--manifest-path"
    });
    if named {
        Vec::new()
    } else {
        vec!["--workspace".to_owned()]
    }
}

fn selects_all(selected: &[String]) -> bool {
    selected.iter().any(|argument| argument == "--workspace")
}

/// Turns the oracle tests on where there are some. `--all-features` would ask for Metal and CUDA at once.
pub(crate) fn oracles(packages: &[Package], selection: &[String]) -> Vec<String> {
    with(ORACLE, packages, selection)
}

/// Turns a feature of tests on where it is.
fn with(wanted: &str, packages: &[Package], selection: &[String]) -> Vec<String> {
    let named = !selects_all(&scope(selection));
    packages
        .iter()
        .filter(|package| package.features.iter().any(|feature| feature == wanted))
        .filter(|package| !named || selection.iter().any(|argument| names(argument, &package.name)))
        .flat_map(|package| ["--features".to_owned(), format!("{}/{wanted}", package.name)])
        .collect()
}

/// Whether an argument names a package: by itself, behind `-p`, or behind `--package=`.
fn names(argument: &str, package: &str) -> bool {
    let rest = argument.strip_suffix(package);
    rest.is_some_and(|before| ["", "-p", "-p=", "--package="].contains(&before))
}

/// The packages that the lean run leaves out: those that are nothing without MLX, and this one, which has no part in
/// the engine.
fn excluded(packages: &[Package]) -> Vec<String> {
    let mut names = bound_to_mlx(packages);
    names.insert(env!("CARGO_PKG_NAME"));
    names
        .into_iter()
        .flat_map(|name| ["--exclude".to_owned(), name.to_owned()])
        .collect()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;
    use crate::packages::tests::sample;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn naming_a_package_narrows_the_scope() {
        assert_eq!(scope(&[]), ["--workspace"]);
        assert_eq!(scope(&strings(&["some_test"])), ["--workspace"]);
        assert!(scope(&strings(&["-p", "mlx-engine-text"])).is_empty());
        assert!(scope(&strings(&["--package=mlx-engine-text"])).is_empty());
    }

    #[test]
    fn oracles_are_on_only_where_they_exist_and_are_selected() {
        let mut text = sample("mlx-engine-text", &[]);
        text.features = strings(&["default", "oracle"]);
        let packages = [text, sample("mlx-engine-core", &[])];
        assert_eq!(oracles(&packages, &[]), ["--features", "mlx-engine-text/oracle"]);
        assert!(oracles(&packages, &strings(&["-p", "mlx-engine-core"])).is_empty());
        assert!(oracles(&packages[1..], &[]).is_empty());
        // The facade's name is the beginning of all others.
        let mut facade = sample("mlx-engine", &[]);
        facade.features = strings(&["oracle"]);
        let packages = [&packages[..], &[facade]].concat();
        for named in [
            &["-p", "mlx-engine-text"][..],
            &["-pmlx-engine-text"],
            &["--package=mlx-engine-text"],
        ] {
            assert_eq!(
                oracles(&packages, &strings(named)),
                ["--features", "mlx-engine-text/oracle"],
                "{named:?}"
            );
        }
    }

    #[test]
    fn the_lean_run_leaves_out_what_needs_mlx() {
        let packages = [
            sample("mlx-engine-models", &["mlx-rs"]),
            sample("mlx-engine-core", &[]),
        ];
        assert_eq!(
            excluded(&packages),
            ["--exclude", "mlx-engine-models", "--exclude", "xtask"]
        );
    }

    #[test]
    fn nextest_brings_the_documentation_along() {
        let all = strings(&["--workspace"]);
        let spelled = |suites: Vec<Suite>| -> Vec<String> {
            suites
                .iter()
                .map(|suite| workspace::spell(&suite.command))
                .collect()
        };
        assert_eq!(
            spelled(runs(["a", "b"], true, &all, &[])),
            ["cargo test --doc --workspace", "cargo nextest run --workspace"]
        );
        assert_eq!(
            spelled(runs(["a", "b"], false, &all, &[])),
            ["cargo test --workspace"]
        );
        assert_eq!(
            spelled(runs(["a", "b"], true, &all, &strings(&["one"]))),
            ["cargo nextest run --workspace one"]
        );
    }

    #[test]
    fn the_lean_run_sees_an_empty_cache() {
        let folder = tempfile::tempdir().unwrap();
        let workspace = Workspace {
            packages: Vec::new(),
            target: folder.path().to_path_buf(),
        };
        for suite in lean(&workspace, true, &[]).unwrap() {
            let (_, cache) = suite
                .command
                .get_envs()
                .find(|(name, _)| *name == "MLX_ENGINE_CACHE")
                .unwrap();
            let cache = std::path::Path::new(cache.unwrap_or(OsStr::new("")));
            assert_eq!(fs::read_dir(cache).unwrap().count(), 0);
            assert!(workspace::spell(&suite.command).contains("--no-default-features"));
        }
    }
}
