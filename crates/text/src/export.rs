//! The vocabulary of a GGUF file as the files that Hugging Face's libraries read.

use std::collections::HashMap;
use std::str::FromStr;

use serde_json::{Map, Value, json};

use crate::pretokenizer::pre_tokenizer;
use crate::tokenizer::byte_level;
use crate::vocabulary::BYTE;
use crate::{GgufVocabulary, TextError};

/// The character that stands for a space in SentencePiece's vocabularies.
const SPACE: char = '\u{2581}';

/// The files of a tokenizer, as text.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer: String,
    /// `tokenizer_config.json`, with the chat template.
    pub config: String,
}

impl GgufVocabulary {
    /// Writes the vocabulary as a `tokenizer.json` and a `tokenizer_config.json`, which encode and decode as
    /// [`Tokenizer::from_vocabulary`](crate::Tokenizer::from_vocabulary) does.
    ///
    /// SentencePiece's scores become an order of merges, by which pieces of equal scores may be merged in another order.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::from_vocabulary`](crate::Tokenizer::from_vocabulary).
    pub fn export(&self) -> Result<TokenizerFiles, TextError> {
        self.validate()?;
        let invalid = |message: String| TextError::Vocabulary { message };
        let (mut tokenizer, adds_bos) = match self.model.as_str() {
            "gpt2" => {
                let pre = pre_tokenizer(self.pre.as_deref())?;
                let built = byte_level(self, pre)?;
                let json = serde_json::to_value(&built).map_err(|error| invalid(error.to_string()))?;
                (json, pre.adds_bos)
            }
            "llama" => (self.sentence_piece()?, true),
            other => {
                return Err(invalid(format!(
                    "the tokenizer model `{other}` is not known, known are: gpt2, llama"
                )));
            }
        };
        let prefix = self.bos.filter(|_| self.add_bos.unwrap_or(adds_bos));
        let suffix = self.eos.filter(|_| self.add_eos.unwrap_or(false));
        tokenizer["post_processor"] = self.post_processor(prefix, suffix);
        let tokenizer = tokenizer.to_string();
        // What the library does not read, nobody does.
        tokenizers::Tokenizer::from_str(&tokenizer).map_err(|error| invalid(error.to_string()))?;
        Ok(TokenizerFiles {
            tokenizer,
            config: format!("{:#}\n", self.config()),
        })
    }

    /// The tokens around a text.
    fn post_processor(&self, prefix: Option<u32>, suffix: Option<u32>) -> Value {
        if prefix.is_none() && suffix.is_none() {
            return Value::Null;
        }
        let text = |id: u32| self.tokens[id as usize].as_str();
        let around = |sequences: &[(&str, u32)]| {
            let mut pieces = Vec::new();
            for &(name, kind) in sequences {
                let special = |id: u32| json!({"SpecialToken": {"id": text(id), "type_id": kind}});
                pieces.extend(prefix.map(special));
                pieces.push(json!({"Sequence": {"id": name, "type_id": kind}}));
                pieces.extend(suffix.map(special));
            }
            pieces
        };
        let special: Map<String, Value> = [prefix, suffix]
            .into_iter()
            .flatten()
            .map(|id| {
                let text = text(id);
                (
                    text.to_owned(),
                    json!({"id": text, "ids": [id], "tokens": [text]}),
                )
            })
            .collect();
        json!({
            "type": "TemplateProcessing",
            "single": around(&[("A", 0)]),
            "pair": around(&[("A", 0), ("B", 1)]),
            "special_tokens": special,
        })
    }

    fn config(&self) -> Value {
        let text = |id: Option<u32>| id.map(|id| self.tokens[id as usize].clone());
        let mut config = Map::new();
        let entries = [
            ("tokenizer_class", Some(json!("PreTrainedTokenizerFast"))),
            ("bos_token", text(self.bos).map(Value::from)),
            ("eos_token", text(self.eos).map(Value::from)),
            ("unk_token", text(self.unknown).map(Value::from)),
            ("clean_up_tokenization_spaces", Some(json!(false))),
            ("chat_template", self.chat_template.clone().map(Value::from)),
        ];
        for (key, value) in entries {
            if let Some(value) = value {
                config.insert(key.to_owned(), value);
            }
        }
        Value::Object(config)
    }

    /// SentencePiece's BPE, as transformers writes a slow Llama tokenizer as a fast one.
    fn sentence_piece(&self) -> Result<Value, TextError> {
        if self.scores.is_empty() {
            return Err(TextError::Vocabulary {
                message: "a SentencePiece vocabulary has no scores".to_owned(),
            });
        }
        let mut ids: HashMap<&str, usize> = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            // The first of equal tokens counts.
            ids.entry(token).or_insert(id);
        }
        let added: Vec<Value> = (0..self.tokens.len())
            .filter(|&id| self.is_added(id) && !self.tokens[id].is_empty())
            .map(|id| {
                json!({
                    "id": id, "content": self.tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": self.is_control(id),
                })
            })
            .collect();
        let space_prefix = self.add_space_prefix.unwrap_or(true);
        let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let prepend = json!({"type": "Prepend", "prepend": SPACE});
        let normalizers = if space_prefix {
            vec![prepend, spaces]
        } else {
            vec![spaces]
        };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if space_prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let vocab: Map<String, Value> = ids
            .iter()
            .map(|(token, id)| ((*token).to_owned(), json!(id)))
            .collect();
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": self.tokens[self.unknown.unwrap_or(0) as usize],
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": true,
                "ignore_merges": false,
                "vocab": vocab,
                "merges": self.merges_by_score(&ids),
            },
        }))
    }

    /// Every way that a token is made of two others, those of higher scores first and of those the one with the longer left part.
    fn merges_by_score(&self, ids: &HashMap<&str, usize>) -> Vec<[&str; 2]> {
        let mut merges: Vec<(f32, [&str; 2])> = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let unknown = self.unknown == Some(id as u32);
            if self.is_control(id) || self.token_type(id) == BYTE || unknown {
                continue;
            }
            let mut parts: Vec<[&str; 2]> = token
                .char_indices()
                .skip(1)
                .map(|(at, _)| [&token[..at], &token[at..]])
                .filter(|[left, right]| ids.contains_key(left) && ids.contains_key(right))
                .collect();
            parts.sort_by_key(|[left, right]| (ids[left], ids[right]));
            merges.extend(parts.into_iter().map(|parts| (self.scores[id], parts)));
        }
        let characters = |text: &str| text.chars().count();
        merges.sort_by(|(score, parts), (other, others)| {
            other
                .total_cmp(score)
                .then_with(|| characters(others[0]).cmp(&characters(parts[0])))
                .then_with(|| characters(others[1]).cmp(&characters(parts[1])))
        });
        merges.into_iter().map(|(_, parts)| parts).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Tokenizer;
    use crate::vocabulary::tests::{byte_level_vocabulary, spm_vocabulary};

    fn exported(vocabulary: &GgufVocabulary) -> Tokenizer {
        let files = vocabulary.export().unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), files.tokenizer).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), files.config).unwrap();
        Tokenizer::from_folder(folder.path()).unwrap()
    }

    proptest! {
        #[test]
        fn texts_are_encoded_as_before(
            text in "([hello ▁é\n]|hello|<s>|</s>|<\\|end\\|>){0,12}",
            special in any::<bool>(),
        ) {
            for vocabulary in [byte_level_vocabulary(), spm_vocabulary()] {
                let before = Tokenizer::from_vocabulary(vocabulary.clone()).unwrap();
                let after = exported(&vocabulary);
                let ids = before.encode(&text, special).unwrap();
                prop_assert_eq!(&after.encode(&text, special).unwrap(), &ids, "{}", vocabulary.model);
                prop_assert_eq!(after.decode(&ids, true), before.decode(&ids, true));
                prop_assert_eq!(after.eos_ids(), before.eos_ids());
                prop_assert_eq!(after.bos_id(), before.bos_id());
            }
        }
    }

    #[test]
    fn the_template_comes_along() {
        let mut vocabulary = byte_level_vocabulary();
        vocabulary.chat_template = Some("{{ messages }}".to_owned());
        assert_eq!(exported(&vocabulary).chat_template(), Some("{{ messages }}"));
    }

    #[test]
    fn what_is_no_vocabulary_is_refused() {
        let mut vocabulary = spm_vocabulary();
        vocabulary.scores.clear();
        let error = vocabulary.export().unwrap_err().to_string();
        assert!(error.ends_with("has no scores"), "{error}");
        vocabulary.model = "bert".to_owned();
        let error = vocabulary.export().unwrap_err().to_string();
        assert!(error.contains("`bert` is not known"), "{error}");
    }
}
