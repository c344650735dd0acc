//! `cargo xtask fixtures`: what the tests compare with, made by mlx-lm.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result};
use crate::workspace::{root, run as go, spell, unstarted};
use crate::{oracle, packages, setup};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Make them in a copy and compare with what is committed
    #[arg(long)]
    check: bool,
}

const FIXTURES: &str = "tests/fixtures";

pub(crate) fn run(args: &Args) -> Result<()> {
    let crates = root().join("crates");
    let scripts = scripts(&crates)?;
    if scripts.is_empty() {
        println!("fixtures: there is nothing to make: no crates/*/{FIXTURES}/make_*.py");
        return Ok(());
    }
    let cache = setup::fill(None, true)?;
    let target = packages::read()?.target;
    let copy = target.join("fixtures-check");
    for script in &scripts {
        let folder = script.parent().unwrap_or(script);
        let work = if args.check {
            copied(folder, &crates, &copy)?
        } else {
            folder.to_path_buf()
        };
        let name = script.file_name().unwrap_or_default();
        println!(
            "fixtures: {}",
            script.strip_prefix(root()).unwrap_or(script).display()
        );
        let mut command = oracle::python(cache.oracle()?);
        command.arg(work.join(name)).current_dir(&work);
        command.env("MLX_ENGINE_TEST_MODEL", cache.test_model());
        command.env("MLX_ENGINE_TEST_DATA", cache.test_data());
        go(&mut command)?;
        if args.check {
            compare(folder, &work)?;
        }
    }
    let done = if args.check { "as committed" } else { "made" };
    println!("fixtures: {} scripts, {done}", scripts.len());
    Ok(())
}

/// Every `crates/*/tests/fixtures/make_*.py`, in order.
fn scripts(crates: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for package in entries(crates)? {
        let folder = package.join(FIXTURES);
        if folder.is_dir() {
            found.extend(entries(&folder)?.into_iter().filter(|path| is_script(path)));
        }
    }
    found.sort();
    Ok(found)
}

fn is_script(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "py")
        && path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("make_"))
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    fs::read_dir(folder)
        .context("read", folder)?
        .map(|entry| Ok(entry.context("read", folder)?.path()))
        .collect()
}

/// A fresh copy of a fixture folder below `copy`.
fn copied(folder: &Path, crates: &Path, copy: &Path) -> Result<PathBuf> {
    let to = copy.join(folder.strip_prefix(crates).unwrap_or(folder));
    if to.exists() {
        fs::remove_dir_all(&to).context("remove", &to)?;
    }
    copy_folder(folder, &to)?;
    Ok(to)
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).context("make the folder", to)?;
    for path in entries(from)? {
        let target = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_folder(&path, &target)?;
        } else {
            fs::copy(&path, &target).context("copy", &path)?;
        }
    }
    Ok(())
}

/// Lets git show what differs.
fn compare(committed: &Path, made: &Path) -> Result<()> {
    let mut git = Command::new("git");
    git.args(["--no-pager", "diff", "--no-index", "--exit-code", "--stat", "--"])
        .arg(committed)
        .arg(made);
    let status = git.status().map_err(|error| unstarted(&git, &error))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(1) => Err(Error::Refused(format!(
            "{} is not what its scripts make now\n  run cargo xtask fixtures, look at the difference and commit it",
            committed.display()
        ))),
        _ => Err(Error::Failed {
            command: spell(&git),
            status: status.to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        folder
    }

    #[test]
    fn scripts_are_found_in_every_crate() {
        let crates = tree(&[
            "text/tests/fixtures/make_templates.py",
            "text/tests/fixtures/templates.json",
            "models/tests/fixtures/make_tiny.py",
            "models/tests/fixtures/helper.py",
            "core/src/lib.rs",
        ]);
        let found = scripts(crates.path()).unwrap();
        let names: Vec<_> = found
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap())
            .collect();
        assert_eq!(names, ["make_tiny.py", "make_templates.py"]);
    }

    #[test]
    fn a_changed_fixture_is_told() {
        let crates = tree(&["text/tests/fixtures/a.json", "text/tests/fixtures/deep/b.json"]);
        let copy = tempfile::tempdir().unwrap();
        let folder = crates.path().join("text/tests/fixtures");
        let made = copied(&folder, crates.path(), copy.path()).unwrap();
        assert!(compare(&folder, &made).is_ok());
        fs::write(made.join("deep/b.json"), "changed").unwrap();
        let text = compare(&folder, &made).unwrap_err().to_string();
        assert!(text.contains("run cargo xtask fixtures"), "{text}");
        let made = copied(&folder, crates.path(), copy.path()).unwrap();
        assert!(compare(&folder, &made).is_ok());
    }
}
