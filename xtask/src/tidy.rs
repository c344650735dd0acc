//! House rules that neither rustfmt nor clippy knows.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::packages::Workspace;
use crate::workspace;

/// What no source may hold, and what to do instead. Split, so that this file passes.
const BANNED: [(&str, &str); 8] = [
    (concat!("todo", "!("), "write it, or return an error"),
    (concat!("unimplemented", "!("), "write it, or return an error"),
    (concat!("dbg", "!("), "use tracing"),
    (concat!("#[", "ignore"), "a test runs, or it goes"),
    (concat!("#[", "allow("), "use #[expect(.., reason = \"..\")]"),
    (concat!("#![", "allow("), "use #![expect(.., reason = \"..\")]"),
    (concat!("// TO", "DO"), "do it, or file an issue"),
    (concat!("// FIX", "ME"), "do it, or file an issue"),
];

/// The crate whose code is mostly generated from C headers, and which sets its lints itself.
const OWN_LINTS: &str = "mlx-sys";

/// What is untidy in the repository, each as a line.
pub(crate) fn untidy(workspace: &Workspace) -> Result<Vec<String>> {
    let root = workspace::root();
    let mut found = Vec::new();
    for file in sources(&root)? {
        let path = root.join(&file);
        // A file deleted but not yet committed is still listed.
        if path.is_file() {
            let text = fs::read_to_string(&path).context("read", &path)?;
            found.extend(banned(&text).map(|(line, what)| format!("{}:{line}: {what}", file.display())));
        }
    }
    found.extend(unpinned(&root.join(".github/workflows"))?);
    for package in &workspace.packages {
        let text = fs::read_to_string(&package.manifest).context("read", &package.manifest)?;
        if package.name != OWN_LINTS && !inherits_lints(&text) {
            found.push(format!(
                "{}: add `lints.workspace = true`",
                package.manifest.display()
            ));
        }
        for target in &package.targets {
            let crates = target
                .kinds
                .iter()
                .any(|kind| ["lib", "bin", "proc-macro"].contains(&kind.as_str()));
            if crates && !documented(&fs::read_to_string(&target.source).context("read", &target.source)?) {
                found.push(format!(
                    "{}: say with //! what the crate is for",
                    target.source.display()
                ));
            }
        }
    }
    Ok(found)
}

/// The actions of workflows that are named by a tag, which its owner can move, and not by a commit.
fn unpinned(workflows: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(workflows).context("list", workflows)? {
        let path = entry.context("list", workflows)?.path();
        let text = fs::read_to_string(&path).context("read", &path)?;
        let actions = text.lines().filter_map(|line| line.split_once("uses: "));
        for (_, action) in actions {
            let commit = action.split_once('@').map_or("", |(_, commit)| commit);
            let commit = commit.split_whitespace().next().unwrap_or_default();
            if commit.len() != 40 || !commit.chars().all(|c| c.is_ascii_hexdigit()) {
                found.push(format!("{}: `{action}`: name the commit", path.display()));
            }
        }
    }
    Ok(found)
}

/// The Rust sources that git knows, or would.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut git = std::process::Command::new("git");
    git.current_dir(root).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        "*.rs",
    ]);
    let output = workspace::output(&mut git)?;
    if !output.status.success() {
        return Err(Error::Failed {
            command: workspace::spell(&git),
            status: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    let names = String::from_utf8_lossy(&output.stdout);
    Ok(names
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(PathBuf::from)
        .collect())
}

fn banned(text: &str) -> impl Iterator<Item = (usize, String)> {
    text.lines().enumerate().flat_map(|(index, line)| {
        let hits = BANNED.iter().filter(move |(word, _)| line.contains(word));
        hits.map(move |(word, instead)| (index + 1, format!("`{word}`: {instead}")))
    })
}

fn documented(text: &str) -> bool {
    text.lines()
        .map(str::trim_start)
        .find(|line| !line.is_empty() && !line.starts_with("#!"))
        .is_some_and(|line| line.strip_prefix("//!").is_some_and(|doc| !doc.trim().is_empty()))
}

fn inherits_lints(manifest: &str) -> bool {
    manifest
        .parse::<toml::Table>()
        .is_ok_and(|table| table.get("lints").and_then(|lints| lints.get("workspace")) == Some(&true.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banned_words_are_found_with_their_lines() {
        for (word, _) in BANNED {
            let text = format!("fn a() {{}}\n    {word}\n");
            let found: Vec<_> = banned(&text).collect();
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].0, 2);
        }
        assert_eq!(
            banned("#[expect(dead_code, reason = \"x\")]\nfn ignore() {}\n").count(),
            0
        );
    }

    #[test]
    fn a_crate_begins_with_what_it_is_for() {
        assert!(documented("//! Kernels.\n"));
        assert!(documented("\n#![no_std]\n//! Kernels.\n"));
        assert!(!documented("//!\nuse std::fs;\n"));
        assert!(!documented("use std::fs;\n//! late\n"));
        assert!(!documented(""));
    }

    #[test]
    fn lints_come_from_the_workspace() {
        assert!(inherits_lints("[lints]\nworkspace = true\n"));
        assert!(inherits_lints("lints.workspace = true\n"));
        assert!(!inherits_lints("[package]\nname = \"x\"\n"));
        assert!(!inherits_lints("[lints]\nworkspace = false\n"));
    }

    #[test]
    fn an_action_by_a_tag_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let pinned = "0123456789abcdef0123456789abcdef01234567";
        let text = format!("      - uses: a/b@{pinned} # v1.2.3\n      - uses: c/d@v4\n");
        fs::write(folder.path().join("ci.yml"), text).unwrap();
        let found = unpinned(folder.path()).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("c/d@v4"), "{found:?}");
    }

    #[test]
    fn this_program_is_among_the_sources() {
        let sources = sources(&workspace::root()).unwrap();
        assert!(
            sources.contains(&PathBuf::from("xtask/src/main.rs")),
            "{sources:?}"
        );
    }
}
