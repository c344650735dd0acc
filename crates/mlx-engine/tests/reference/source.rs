//! What the comments of the documentation say of types and their fields.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use syn::{Attribute, Expr, Fields, Item, ItemEnum, ItemStruct, Lit, Meta};

/// A file of the workspace.
pub(crate) struct Source {
    items: Vec<Item>,
}

impl Source {
    #[track_caller]
    pub(crate) fn read(file: &str) -> Self {
        let path = super::root().join(file);
        let text = std::fs::read_to_string(path).expect("a source");
        let items = syn::parse_file(&text).expect("Rust").items;
        Self { items }
    }

    /// The variants of an enum, with what is said of them.
    #[track_caller]
    pub(crate) fn variants(&self, name: &str) -> Vec<(String, String)> {
        let found = self.items.iter().find_map(|item| match item {
            Item::Enum(item) if item.ident == name => Some(item),
            _ => None,
        });
        let ItemEnum { variants, .. } = found.expect("the enum");
        let variants = variants.iter();
        variants
            .map(|variant| (variant.ident.to_string(), documentation(&variant.attrs)))
            .collect()
    }

    /// What is said of a struct, and of each of its public fields.
    #[track_caller]
    pub(crate) fn fields(&self, name: &str) -> (String, Vec<(String, String)>) {
        let found = self.items.iter().find_map(|item| match item {
            Item::Struct(item) if item.ident == name => Some(item),
            _ => None,
        });
        let ItemStruct { attrs, fields, .. } = found.expect("the struct");
        let Fields::Named(fields) = fields else {
            panic!("{name} has no named fields")
        };
        let fields = fields.named.iter().filter_map(|field| {
            let name = field.ident.as_ref()?.to_string();
            Some((name, documentation(&field.attrs)))
        });
        (documentation(attrs), fields.collect())
    }
}

/// The paragraphs before the first example, each in one line, with links as code.
fn documentation(attributes: &[Attribute]) -> String {
    let lines = attributes.iter().filter_map(|attribute| match &attribute.meta {
        Meta::NameValue(meta) if meta.path.is_ident("doc") => match &meta.value {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(text) => Some(text.value()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    });
    let mut text = String::new();
    for line in lines.take_while(|line| !line.contains("```")) {
        text.push_str(line.trim());
        text.push(' ');
    }
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    unlinked(&text).replace('|', "\\|")
}

/// Links of rustdoc lead to items, which pages of the book do not have: their text stays.
fn unlinked(text: &str) -> String {
    let mut parts = text.split('[');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        if let Some((label, rest)) = part.split_once("](") {
            plain.push_str(label);
            plain.push_str(rest.split_once(')').map_or("", |(_, rest)| rest));
        } else if let Some((label, rest)) = part.split_once("`]").filter(|_| part.starts_with('`')) {
            plain.push_str(label);
            plain.push('`');
            plain.push_str(rest);
        } else {
            plain.push('[');
            plain.push_str(part);
        }
    }
    plain
}

/// The Rust and C sources of programs and their builds, tests aside.
pub(crate) fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.join("crates"), root.join("xtask")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path
                .extension()
                .is_some_and(|extension| extension == "rs" || extension == "c")
                && !path.ends_with("mlx-engine/src/environment.rs")
            {
                found.push(path);
            }
        }
    }
    found
}

/// The names in quotes that begin as variables of ours and of Hugging Face do, or stand in a call that reads one.
pub(crate) fn variables(text: &str) -> BTreeSet<String> {
    const PREFIXES: [&str; 8] = [
        "MLX_ENGINE_",
        "MLX_RS_",
        "MLX_PREFIX",
        "HF_",
        "HUGGING_",
        "HUGGINGFACE_",
        "TRANSFORMERS_",
        "XDG_",
    ];
    const CALLS: [&str; 4] = ["env::var(", "env::var_os(", "getenv(", "rerun-if-env-changed="];
    let mut found = BTreeSet::new();
    for part in text.split('"') {
        let name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
        if part.len() < 3 || part.ends_with('_') || !part.chars().all(name) {
            continue;
        }
        let read = CALLS
            .iter()
            .any(|call| text.contains(&format!("{call}\"{part}\"")));
        let cargos = ["CARGO", "RUSTC", "RUSTDOC", "HOME", "PATH", "OUT_DIR"]
            .iter()
            .any(|own| part.starts_with(own));
        if PREFIXES.iter().any(|prefix| part.starts_with(prefix)) || read && !cargos {
            found.insert(part.to_owned());
        }
    }
    found
}
