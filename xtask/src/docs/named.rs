//! What pages name in code: files of the repository, and commands of this program.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser as _;

use crate::Cli;
use crate::error::{Context, Result};

/// Folders at the root: a word that begins with one of them is a path.
const FOLDERS: [&str; 6] = ["crates/", "xtask/", "docs/", "benches/", "fuzz/", ".github/"];

/// The files that pages name and that are not there, and the commands that this program would refuse, each as a line.
pub(super) fn wrong(root: &Path, pages: &[PathBuf]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for page in pages {
        let text = fs::read_to_string(page).context("read", page)?;
        let name = page.strip_prefix(root).unwrap_or(page).display();
        let folded = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for code in spans(&folded) {
            if let Some(path) = path(code).filter(|path| !root.join(path).exists()) {
                found.push(format!("{name}: `{path}` is not there"));
            }
        }
        let commands = spans(&folded)
            .chain(text.lines())
            .filter_map(|code| code.trim_start().strip_prefix("cargo xtask "))
            .map(|rest| rest.split(" #").next().unwrap_or(rest).trim());
        for command in commands {
            if let Err(error) = refused(command) {
                found.push(format!("{name}: `cargo xtask {command}`: {error}"));
            }
        }
    }
    found.dedup();
    Ok(found)
}

/// What stands between single backticks. Lines have to be joined before, as a span may go over their end.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The path that a piece of code is, if it is one without gaps.
fn path(code: &str) -> Option<&str> {
    let whole = code.split([':', '#']).next().unwrap_or(code);
    let known = FOLDERS.iter().any(|folder| whole.starts_with(folder));
    let gap = whole.contains(['*', '…', ' ', '<', '{']);
    (known && !gap).then_some(whole)
}

fn refused(command: &str) -> std::result::Result<(), String> {
    let words = ["cargo xtask"].into_iter().chain(command.split_whitespace());
    match Cli::try_parse_from(words) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string().lines().next().unwrap_or_default().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_not_there_and_commands_that_are_none_are_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("crates/core")).unwrap();
        let page = folder.path().join("page.md");
        let text = "`crates/core/`, `crates/none.rs`, `crates/…/a.rs` and `docs/*.md`: run `cargo\nxtask lint`\n\
                    ```sh\ncargo xtask bench --peers    # a table\ncargo xtask fly\n```\nor `cargo xtask fuzz --second 3`.\n";
        fs::write(&page, text).unwrap();
        let found = wrong(folder.path(), &[page]).unwrap();
        assert_eq!(found.len(), 3, "{found:#?}");
        for (line, part) in found
            .iter()
            .zip(["crates/none.rs", "fuzz --second", "cargo xtask fly"])
        {
            assert!(line.contains(part), "{line}");
        }
    }
}
