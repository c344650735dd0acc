//! The book as mdbook makes it. Mdbook goes on where something is wrong and only warns, which here is an error.

use std::path::Path;
use std::process::Command;

use super::FOLDER;
use crate::error::{Error, Result};
use crate::workspace::{on_path, output, spell};

pub(super) fn build(root: &Path) -> Result<()> {
    if !on_path("mdbook") {
        return Err(Error::MissingTool {
            tool: "mdbook".to_owned(),
            purpose: "making the book",
            install: "install it (cargo install --locked mdbook) and run the command again",
        });
    }
    let mut command = Command::new("mdbook");
    command.current_dir(root).args(["build", FOLDER]);
    let told = output(&mut command)?;
    let said = String::from_utf8_lossy(&told.stderr).into_owned() + &String::from_utf8_lossy(&told.stdout);
    eprint!("{said}");
    if !told.status.success() {
        return Err(Error::Failed {
            command: spell(&command),
            status: told.status.to_string(),
        });
    }
    let warned = warnings(&said);
    if warned.is_empty() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "mdbook is not content\n  {}",
        warned.join("\n  ")
    )))
}

/// The lines of mdbook's log that are more than information: `[WARN] (…)` until version 0.4, ` WARN …` since.
fn warnings(said: &str) -> Vec<&str> {
    let more = |line: &&str| {
        let mut words = line.split_whitespace().take(4);
        words.any(|word| ["WARN", "ERROR"].contains(&word.trim_matches(['[', ']'])))
    };
    said.lines().filter(more).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_of_old_and_new_versions_are_found_and_nothing_else() {
        let said = "2026-11-30 10:00:00 [INFO] (mdbook::book): Book building has started\n\
                    2026-11-30 10:00:00 [WARN] (mdbook::renderer): a page is missing\n \
                    INFO Running the html backend, without an ERROR\n \
                    WARN unclosed HTML tag `<b>` found in `chat.md`\n\
                    ERROR a link leads nowhere\n";
        let found = warnings(said);
        assert_eq!(found.len(), 3, "{found:?}");
        for (line, part) in found
            .iter()
            .zip(["a page is missing", "unclosed", "leads nowhere"])
        {
            assert!(line.contains(part), "{line}");
        }
    }
}
