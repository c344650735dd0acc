//! Links between pages.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};

/// The links of these pages that lead to no file or to no heading, each as a line. Addresses on the web are not looked at.
pub(super) fn broken(pages: &[PathBuf]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for page in pages {
        let text = fs::read_to_string(page).context("read", page)?;
        for link in links(&text) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                page.clone()
            } else {
                page.parent().unwrap_or(Path::new("")).join(file)
            };
            if !target.exists() {
                found.push(format!("{}: ({link}) leads nowhere", page.display()));
            } else if !anchor.is_empty() {
                let there = fs::read_to_string(&target).context("read", &target)?;
                if !headings(&there).any(|heading| heading == anchor) {
                    found.push(format!("{}: ({link}) leads to no heading", page.display()));
                }
            }
        }
    }
    Ok(found)
}

/// The lines of a page outside of its blocks of code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut code = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    })
}

/// Where the links of a page lead.
fn links(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for line in prose(text) {
        for (at, _) in line.match_indices("](") {
            let in_code = line[..at].matches('`').count() % 2 == 1;
            let rest = &line[at + 2..];
            if let Some(end) = rest.find(')').filter(|_| !in_code) {
                found.push(&rest[..end]);
            }
        }
    }
    found
}

/// The headings of a page, as links name them.
fn headings(text: &str) -> impl Iterator<Item = String> {
    prose(text).filter(|line| line.starts_with('#')).map(|line| {
        line.trim_start_matches('#')
            .trim()
            .to_lowercase()
            .chars()
            .filter_map(|c| match c {
                ' ' => Some('-'),
                c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
                _ => None,
            })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_lead_nowhere_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("page.md");
        let other = folder.path().join("other.md");
        fs::write(&other, "# A heading, of words\n```\n# no heading\n```\n").unwrap();
        let text = "[a](other.md) [b](other.md#a-heading-of-words) [c](none.md) [d](other.md#no-heading)\n\
                    [e](#own) [f](https://x.org/y) `[g](code.md)`\n```\n[h](code.md)\n```\n## Own\n";
        fs::write(&page, text).unwrap();
        let found = broken(&[page, other]).unwrap();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("(none.md) leads nowhere"), "{found:?}");
        assert!(
            found[1].contains("(other.md#no-heading) leads to no heading"),
            "{found:?}"
        );
    }
}
