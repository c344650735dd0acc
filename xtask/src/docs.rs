//! `cargo xtask docs`: what the documentation takes from the code, and whether it holds together.
//!
//! Pages show examples as they are, between two marks; tables of errors, options and models are written by the tests of
//! the crates that have them. So neither can say anything else than the code.

mod book;
mod examples;
mod links;
mod named;

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::workspace::{self, cargo, run as go};
use crate::{packages, test};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only say what is out of date
    #[arg(long)]
    pub(crate) check: bool,

    /// Make the book too, with mdbook, whose warnings are errors
    #[arg(long)]
    pub(crate) book: bool,
}

/// The book.
const FOLDER: &str = "docs";

/// Set where the tests that hold the references write them.
const WRITE: &str = "MLX_ENGINE_WRITE_REFERENCE";

pub(crate) fn run(args: &Args) -> Result<()> {
    let root = workspace::root();
    let mut found = fill(&root, args.check)?;
    references(args.check)?;
    let pages = pages(&root)?;
    found.extend(links::broken(&pages)?);
    found.extend(named::wrong(&root, &pages)?);
    found.extend(unlisted(&root)?);
    found.extend(untested(&root)?);
    if found.is_empty() {
        println!("docs: all is as the code has it");
        return if args.book { book::build(&root) } else { Ok(()) };
    }
    Err(Error::Refused(format!(
        "the documentation is out of date: {} to put right (`cargo xtask docs` writes what comes from the code)\n  {}",
        found.len(),
        found.join("\n  ")
    )))
}

/// Puts the examples into the pages that show them; with `check` only says which pages have others.
fn fill(root: &Path, check: bool) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for page in pages(root)? {
        let is = fs::read_to_string(&page).context("read", &page)?;
        let name = page.strip_prefix(root).unwrap_or(&page).display().to_string();
        let should = match examples::filled(&is, |example| source(root, example)) {
            Ok(text) => text,
            Err(what) => {
                found.push(format!("{name}: {what}"));
                continue;
            }
        };
        if is == should {
            continue;
        }
        if check {
            found.push(format!("{name}: an example is not as its program has it"));
        } else {
            let beside = page.with_extension("md.new");
            fs::write(&beside, should).context("write", &beside)?;
            fs::rename(&beside, &page).context("replace", &page)?;
            println!("docs: {name}");
        }
    }
    Ok(found)
}

fn source(root: &Path, example: &str) -> Option<String> {
    let file = root
        .join("crates/mlx-engine/examples")
        .join(format!("{example}.rs"));
    fs::read_to_string(file).ok()
}

/// Runs the tests that hold the references, with the features of `cargo xtask test`, so that nothing is built twice.
fn references(check: bool) -> Result<()> {
    let mut command = cargo();
    command.args(["test", "--quiet", "--workspace"]);
    command.args(test::oracles(&packages::read()?.packages, &[]));
    command.args(["--test", "reference", "--bin", "mlx-engine", "reference"]);
    if !check {
        command.env(WRITE, "1");
    }
    go(&mut command)
}

/// The README and every page of the book, sorted.
fn pages(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![root.join("README.md"), root.join("CHANGELOG.md")];
    let mut folders = vec![root.join(FOLDER)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).context("list", &folder)? {
            let path = entry.context("list", &folder)?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The pages that the book's summary does not lead to.
fn unlisted(root: &Path) -> Result<Vec<String>> {
    let folder = root.join(FOLDER);
    let summary = folder.join("SUMMARY.md");
    let text = fs::read_to_string(&summary).context("read", &summary)?;
    let listed = |page: &Path| {
        let name = page
            .strip_prefix(&folder)
            .ok()
            .map(|name| name.display().to_string());
        name.is_none_or(|name| name == "SUMMARY.md" || text.contains(&format!("({name})")))
    };
    let pages = pages(root)?;
    let missing = pages.iter().filter(|page| !listed(page));
    Ok(missing
        .map(|page| format!("{}: SUMMARY.md does not lead to it", page.display()))
        .collect())
}

/// What has the pages tested as documentation.
const TESTED: &str = "crates/mlx-engine/src/book.rs";

/// The pages that show Rust which is not compiled as a test of the documentation.
fn untested(root: &Path) -> Result<Vec<String>> {
    let list = root.join(TESTED);
    let tested = fs::read_to_string(&list).context("read", &list)?;
    let mut found = Vec::new();
    for page in pages(root)? {
        let text = fs::read_to_string(&page).context("read", &page)?;
        let name = page.strip_prefix(root).unwrap_or(&page).display().to_string();
        let shows = text
            .lines()
            .any(|line| line == "```rust" || line.starts_with("```rust,"));
        if shows && !tested.contains(&format!("\"{name}\"")) {
            found.push(format!("{name}: shows Rust, and {TESTED} does not name it"));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_with_rust_that_nothing_compiles_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("README.md", "");
        write("CHANGELOG.md", "");
        write(TESTED, "pages! { One = \"docs/one.md\"; }");
        write("docs/one.md", "```rust\n```\n");
        write("docs/two.md", "```rust,no_run\n```\n");
        write("docs/three.md", "```sh\n```\n");
        let found = untested(folder.path()).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("docs/two.md"), "{found:?}");
    }

    #[test]
    fn the_book_holds_together() {
        let root = workspace::root();
        let mut found = fill(&root, true).unwrap();
        let pages = pages(&root).unwrap();
        found.extend(links::broken(&pages).unwrap());
        found.extend(named::wrong(&root, &pages).unwrap());
        found.extend(unlisted(&root).unwrap());
        found.extend(untested(&root).unwrap());
        assert!(found.is_empty(), "{found:#?}");
    }

    #[test]
    fn a_page_that_nothing_leads_to_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        fs::create_dir_all(folder.path().join("docs/guide")).unwrap();
        write("docs/SUMMARY.md", "- [One](one.md)\n- [Two](guide/two.md)\n");
        for page in ["docs/one.md", "docs/guide/two.md", "docs/guide/three.md"] {
            write(page, "");
        }
        let found = unlisted(folder.path()).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("three.md"), "{found:?}");
    }
}
