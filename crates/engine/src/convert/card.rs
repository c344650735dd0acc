//! The model card, `README.md`, in the hub's format.

use std::path::Path;

use mlx_engine_checkpoint::Metadata;
use serde_json::json;

use super::{ConvertReport, Origin};

/// Bytes of a card that are read at most.
const MAX_CARD: u64 = 1 << 20;

/// What a GGUF file says of where it is from, as far as `origin` does not.
pub(super) fn origin_of_gguf(origin: &Origin, metadata: &Metadata) -> Origin {
    let text = |key: &str| match metadata.optional_string(key) {
        Ok(Some(text)) if !text.is_empty() => Some(text.to_owned()),
        _ => None,
    };
    let base_model = || {
        let url = text("general.source.repo_url").or_else(|| text("general.base_model.0.repo_url"))?;
        Some(
            url.strip_prefix("https://huggingface.co/")
                .unwrap_or(&url)
                .to_owned(),
        )
    };
    Origin {
        base_model: origin.base_model.clone().or_else(base_model),
        licence: origin.licence.clone().or_else(|| text("general.license")),
    }
}

/// What the card of a folder says of its licence, as far as `origin` does not.
pub(super) fn origin_of_folder(origin: &Origin, folder: &Path) -> Origin {
    let path = folder.join("README.md");
    let small = std::fs::metadata(&path).is_ok_and(|about| about.len() <= MAX_CARD);
    // A card that cannot be read says nothing.
    let card = small
        .then(|| std::fs::read_to_string(&path).ok())
        .flatten()
        .unwrap_or_default();
    Origin {
        base_model: origin.base_model.clone(),
        licence: origin.licence.clone().or_else(|| licence_of_card(&card)),
    }
}

fn licence_of_card(card: &str) -> Option<String> {
    let mut lines = card.lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let licence = lines
        .take_while(|line| line.trim_end() != "---")
        .find_map(|line| line.strip_prefix("license:"))?;
    let licence = licence.trim().trim_matches(['"', '\'']);
    (!licence.is_empty()).then(|| licence.to_owned())
}

/// The card of what was written.
pub(super) fn card(report: &ConvertReport) -> String {
    let Origin { base_model, licence } = &report.origin;
    // A JSON string is one of YAML too, whatever is in it.
    let field = |key: &str, value: &Option<String>| {
        value
            .as_ref()
            .map_or_else(String::new, |value| format!("{key}: {}\n", json!(value)))
    };
    let (licence, base) = (field("license", licence), field("base_model", base_model));
    let name = report.path.file_name().unwrap_or_default().to_string_lossy();
    let from = base_model
        .as_deref()
        .map_or_else(String::new, |base| format!(" from `{}`", base.replace('`', "'")));
    let version = env!("CARGO_PKG_VERSION");
    let ConvertReport {
        parameters, bytes, ..
    } = report;
    let kinds: Vec<String> = report
        .conversions
        .iter()
        .map(|kind| {
            format!(
                "| {} | {} | {} | {} | {} |\n",
                kind.from, kind.to, kind.tensors, kind.exact, kind.elements
            )
        })
        .collect();
    let kinds = kinds.concat();
    format!(
        r#"---
library_name: mlx
pipeline_tag: text-generation
{licence}{base}tags:
- mlx
---

# {name}

Converted{from} to MLX's format by mlx-engine {version}: {parameters} weights in {bytes} bytes.

| from | to | tensors | of them without loss | weights |
|---|---|---|---|---|
{kinds}
```sh
mlx-engine generate --model . --prompt "Hello"
mlx_lm.generate --model . --prompt "Hello"
```
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_licence_is_in_the_front_matter() {
        let of = |card: &str| licence_of_card(card);
        assert_eq!(
            of("---\nlanguage: en\nlicense: apache-2.0\n---\n"),
            Some("apache-2.0".to_owned())
        );
        assert_eq!(of("---\nlicense: \"mit\"\r\n---\n"), Some("mit".to_owned()));
        assert_eq!(of("---\nlanguage: en\n---\nlicense: mit\n"), None);
        assert_eq!(of("# A model\nlicense: mit\n"), None);
        assert_eq!(of("---\nlicense:\n- mit\n---\n"), None);
        assert_eq!(of(""), None);
    }
}
