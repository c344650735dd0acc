//! A page of the references.

use std::fmt::Write;
use std::path::Path;

/// Set by `cargo xtask docs`: the page is written, where it would be compared.
const WRITE: &str = "MLX_ENGINE_WRITE_REFERENCE";

pub(crate) struct Page(String);

impl Page {
    pub(crate) fn new(title: &str) -> Self {
        Self(format!(
            "<!-- Written by `cargo xtask docs` from the code; change it there. -->\n# {title}\n"
        ))
    }

    pub(crate) fn heading(&mut self, text: &str) {
        let _ = writeln!(self.0, "\n## {text}");
    }

    pub(crate) fn text(&mut self, text: &str) {
        let _ = writeln!(self.0, "\n{text}");
    }

    pub(crate) fn table<const N: usize>(
        &mut self,
        head: &[&str; N],
        rows: impl IntoIterator<Item = [String; N]>,
    ) {
        let _ = writeln!(self.0, "\n| {} |\n|{}", head.join(" | "), "---|".repeat(N));
        for row in rows {
            let _ = writeln!(self.0, "| {} |", row.join(" | "));
        }
    }

    /// Compares the page with the one in the book.
    #[track_caller]
    pub(crate) fn check(self, name: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../docs/reference")
            .join(name);
        if std::env::var_os(WRITE).is_some() {
            let beside = path.with_extension("md.new");
            let folder = path.parent().expect("a folder");
            std::fs::create_dir_all(folder).expect("the folder of the references");
            std::fs::write(&beside, &self.0).expect("the page is written");
            std::fs::rename(&beside, &path).expect("the page is replaced");
        }
        let is = std::fs::read_to_string(&path).unwrap_or_default();
        let differs = is.lines().zip(self.0.lines()).find(|(is, should)| is != should);
        assert!(
            is == self.0,
            "docs/reference/{name} is not what the code says; run `cargo xtask docs`: {differs:?}"
        );
    }
}

/// Code in a cell of a table.
pub(crate) fn cell(text: &str) -> String {
    let text = text.replace('|', "\\|");
    if text.contains('`') {
        format!("`` {text} ``")
    } else {
        format!("`{text}`")
    }
}
