//! How well words describe a model.

use crate::{ModelEntry, suggest};

/// The words of a query, folded.
pub(crate) fn words(query: &str) -> Vec<String> {
    query
        .split_whitespace()
        .map(fold)
        .filter(|word| !word.is_empty())
        .collect()
}

/// Lower case, without what people write in one way or another: `Llama-3.2` is `llama3.2`.
fn fold(text: &str) -> String {
    text.to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || *c == '.')
        .collect()
}

/// How well a model meets all the words, from 0 up; `None` where it does not meet one of them.
pub(crate) fn score(words: &[String], model: &ModelEntry) -> Option<u32> {
    let texts = Texts::of(model);
    words.iter().map(|word| texts.score(word)).sum()
}

/// What is searched in a model.
struct Texts {
    /// Ids, names and aliases as wholes.
    wholes: Vec<String>,
    /// Their words, and the family.
    words: Vec<String>,
    /// The words of what says something about it.
    remarks: Vec<String>,
}

impl Texts {
    fn of(model: &ModelEntry) -> Self {
        let names = || [&model.id, &model.name].into_iter().chain(&model.aliases);
        let split = |text: &str| -> Vec<String> {
            text.split(|c: char| !c.is_alphanumeric() && c != '.')
                .map(|word| fold(word.trim_matches('.')))
                .filter(|word| !word.is_empty())
                .collect()
        };
        let capabilities = model.capabilities.iter().map(ToString::to_string);
        let remarks = [
            model.description.clone(),
            model.licence.clone(),
            model.model_type.to_string(),
        ];
        Self {
            wholes: names()
                .map(|name| fold(name.rsplit('/').next().unwrap_or(name)))
                .collect(),
            words: names()
                .chain([&model.family])
                .flat_map(|name| split(name))
                .collect(),
            remarks: remarks
                .into_iter()
                .chain(capabilities)
                .flat_map(|text| split(&text))
                .collect(),
        }
    }

    /// The better a word is met, the more; the steps are apart, so that one good match outweighs no other.
    fn score(&self, word: &str) -> Option<u32> {
        if self.wholes.iter().any(|whole| whole == word) {
            return Some(60);
        }
        if self.words.iter().any(|own| own == word) {
            return Some(50);
        }
        // A number that goes on is another number: `7b` is no end of `27b`, `3` no beginning of `30b`.
        if self
            .wholes
            .iter()
            .chain(&self.words)
            .any(|own| is_part(word, own))
        {
            return Some(40);
        }
        if self.remarks.iter().any(|own| own == word) {
            return Some(30);
        }
        if word.chars().count() > 2 && self.remarks.iter().any(|own| is_part(word, own)) {
            return Some(20);
        }
        self.wholes
            .iter()
            .chain(&self.words)
            .chain(&self.remarks)
            .any(|own| is_misspelt(word, own))
            .then_some(10)
    }
}

/// Whether the word is a part of the text that does not cut a number in two.
fn is_part(word: &str, text: &str) -> bool {
    let is_number = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit() || c == '.');
    text.match_indices(word).any(|(start, _)| {
        let cuts_before = is_number(word.chars().next()) && is_number(text[..start].chars().next_back());
        let cuts_after =
            is_number(word.chars().next_back()) && is_number(text[start + word.len()..].chars().next());
        !cuts_before && !cuts_after
    })
}

/// Whether few edits make the word of the text, none of them in its digits.
fn is_misspelt(word: &str, text: &str) -> bool {
    let digits = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>();
    let most = match word.chars().count() {
        ..4 => return false,
        4..8 => 1,
        _ => 2,
    };
    digits(word) == digits(text) && suggest::typing_distance(word, text) <= most
}

#[cfg(test)]
mod tests {
    use mlx_engine_core::{ModelConfiguration, ModelType};

    use super::*;
    use crate::Capability;

    fn model() -> ModelEntry {
        ModelEntry {
            licence: "apache-2.0".to_owned(),
            capabilities: vec![Capability::Tools],
            ..ModelEntry::from(ModelConfiguration {
                name: "Scribe 7B".to_owned(),
                family: "llama".to_owned(),
                description: "Writes letters, well.".to_owned(),
                aliases: vec!["poet-small".to_owned()],
                ..ModelConfiguration::new("owner/Scribe-v1.5-7B-4bit", ModelType::Code)
            })
        }
    }

    #[test]
    fn words_are_folded_and_what_is_none_is_left_out() {
        assert_eq!(words("  Llama-3.2  1B -- "), ["llama3.2", "1b"]);
        assert!(words(" - ").is_empty());
    }

    #[test]
    fn the_better_a_word_is_met_the_more_it_counts() {
        for (query, expect) in [
            // Whole names: of the id without its owner, the name, an alias.
            ("scribe-v1.5-7b-4bit", Some(60)),
            ("scribe7b", Some(60)),
            ("PoetSmall", Some(60)),
            // Words of them, the owner's, and the family.
            ("scribe", Some(50)),
            ("v1.5", Some(50)),
            ("small", Some(50)),
            ("owner", Some(50)),
            ("llama", Some(50)),
            // A part of them.
            ("cribe", Some(40)),
            ("b4", Some(40)),
            ("o", Some(40)),
            // Words of what is said about it, and parts of those that are long enough to mean something.
            ("apache", Some(30)),
            ("well", Some(30)),
            ("tools", Some(30)),
            ("code", Some(30)),
            ("2.0", Some(30)),
            ("ode", Some(20)),
            ("ett", Some(20)),
            ("ac", None),
            // A typing error.
            ("lettres", Some(10)),
            ("scrible", Some(10)),
            ("tooks", Some(10)),
            ("verse", None),
            // All words have to be met, and each counts.
            ("scribe letters", Some(80)),
            ("scribe tools lettres", Some(90)),
            ("scribe verse", None),
            ("", Some(0)),
        ] {
            assert_eq!(score(&words(query), &model()), expect, "{query}");
        }
    }

    #[test]
    fn a_part_cuts_no_number() {
        for (word, text, expect) in [
            ("7b", "mistral7b", true),
            ("7b", "qwen27b", false),
            ("7b", "qwen2.57b", false),
            ("3", "qwen3", true),
            ("3", "qwen30b", false),
            ("3", "qwen3.5", false),
            ("coder", "qwen2.5coder7b", true),
            // Another place may do.
            ("7b", "27b7b", true),
            ("7b", "27b27b", false),
            (".5", "qwen2.5", false),
            ("qwen", "qwen2", true),
            ("x", "y", false),
        ] {
            assert_eq!(is_part(word, text), expect, "{word} in {text}");
        }
    }

    #[test]
    fn digits_have_to_be_right_and_letters_nearly() {
        for (word, text, expect) in [
            ("qwne", "qwen", true),
            ("lama", "llama", true),
            ("mistrall", "mistral", true),
            ("depseekk", "deepseek", true),
            ("qwen2", "qwen3", false),
            ("phi", "pho", false),
            ("", "qwen", false),
            // From four letters on one error, from eight on two.
            ("abcd", "abxd", true),
            ("abcdefg", "abxdxfg", false),
            ("abcdefgh", "abxdxfgh", true),
            ("abcdefgh", "abxdxfxh", false),
            ("abcd1", "abxd1", true),
            ("1abcd", "abcd1", false),
        ] {
            assert_eq!(is_misspelt(word, text), expect, "{word} for {text}");
        }
    }
}
