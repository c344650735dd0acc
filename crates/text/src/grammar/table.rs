//! The bytes of a vocabulary as a tree, shared by all requests of a model.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::earley::SlicedBiasComputer;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Map, Value, json};
use toktrie::{INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use super::{CompiledGrammar, Grammar, Source};
use crate::{TextError, Tokenizer};

/// Tokens longer than this have no place in the tree, and no grammar allows them. None in use is.
const LONGEST_TOKEN: usize = 1000;

/// A character that no vocabulary merges with others.
const ANCHOR: &str = "\u{2}";

/// The vocabulary of a tokenizer, prepared for grammars. Making one takes a good part of a second for a large
/// vocabulary; clones share it.
#[derive(Clone)]
pub struct TokenTable {
    factory: Arc<ParserFactory>,
}

impl fmt::Debug for TokenTable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("TokenTable")
            .field("tokens", &self.len())
            .finish_non_exhaustive()
    }
}

impl TokenTable {
    /// Prepares a vocabulary.
    ///
    /// # Errors
    ///
    /// [`TextError::Vocabulary`] where the tokens of the tokenizer have no bytes of their own, or are too many.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let mut words = tokenizer.token_bytes()?;
        for (id, word) in words.iter_mut().enumerate() {
            let id = id as u32;
            if tokenizer.is_special(id) || tokenizer.eos_ids().contains(&id) {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            } else if word.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) || word.len() > LONGEST_TOKEN {
                // The byte 0xFF, which no text in UTF-8 has, would be read as the mark.
                word.clear();
            }
        }
        let eos: Vec<TokenId> = tokenizer
            .eos_ids()
            .iter()
            .copied()
            .filter(|&id| (id as usize) < words.len())
            .collect();
        let failed = |reason: String| TextError::Vocabulary {
            message: format!("it does not fit the tree that grammars need: {reason}"),
        };
        let info = TokRxInfo::new(words.len() as u32, eos.first().copied().unwrap_or(INVALID_TOKEN));
        let trie = catch_unwind(AssertUnwindSafe(|| TokTrie::from(&info, &words)))
            .map_err(|_| failed(format!("{} tokens", words.len())))?;
        let trie = if eos.is_empty() {
            trie
        } else {
            trie.with_eos_tokens(&eos)
        };
        let vocabulary = Vocabulary::new(trie, tokenizer.clone());
        let env: TokEnv = Arc::new(vocabulary);
        let capabilities = InferenceCapabilities {
            ff_tokens: true,
            ..InferenceCapabilities::default()
        };
        let mut factory = ParserFactory::new(&env, capabilities, &SlicedBiasComputer::general_slices())
            .map_err(|error| failed(error.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self {
            factory: Arc::new(factory),
        })
    }

    /// Ids that the table knows: one more than the highest.
    pub fn len(&self) -> usize {
        self.factory.tok_env().tok_trie().vocab_size()
    }

    /// Whether the vocabulary has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of a token; none for special tokens and ids out of the vocabulary.
    pub fn bytes(&self, token: u32) -> &[u8] {
        let trie = self.factory.tok_env().tok_trie();
        if (token as usize) < trie.vocab_size() && !trie.is_special_token(token) {
            trie.token(token)
        } else {
            &[]
        }
    }

    /// Compiles a grammar for this vocabulary.
    ///
    /// # Errors
    ///
    /// [`TextError::Grammar`] with the reason where the grammar is damaged, allows nothing, uses a keyword that could not
    /// be enforced, or is too large.
    pub fn compile(&self, grammar: &Grammar) -> Result<CompiledGrammar, TextError> {
        let refused = |reason: String| TextError::Grammar {
            kind: grammar.kind(),
            reason,
        };
        let source = match &grammar.source {
            Source::JsonSchema(schema) => {
                TopLevelGrammar::from_json_schema(compact(schema).map_err(refused)?)
            }
            Source::Regex(pattern) => TopLevelGrammar::from_regex(pattern),
            Source::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let mut matcher = Matcher::new(self.factory.create_parser(source));
        if let Some(error) = matcher.get_error() {
            return Err(refused(plain(&error)));
        }
        if let Some(warning) = matcher.grammar_warnings().first() {
            return Err(refused(warning.clone()));
        }
        Ok(CompiledGrammar::new(matcher, self.len()))
    }
}

/// The schema with the settings that it is compiled with, in llguidance's own keyword: no white space, and nothing that is
/// silently left out.
pub(super) fn compact(schema: &Value) -> Result<Value, String> {
    let object = match schema {
        Value::Bool(true) => Map::new(),
        Value::Bool(false) => return Err("the schema `false` allows nothing".to_owned()),
        Value::Object(object) => object.clone(),
        other => return Err(format!("a schema is an object or a boolean, this is {other}")),
    };
    if object.contains_key("x-guidance") {
        return Err("the keyword `x-guidance` is not for callers to set".to_owned());
    }
    let settings = json!({"whitespace_flexible": false, "lenient": false, "coerce_one_of": false});
    let mut schema = Value::Object(object);
    spaces(&mut schema);
    schema["x-guidance"] = settings;
    Ok(schema)
}

/// The characters that `\s` matches in the regular expressions of JSON schema, which are ECMA 262's. Those of the library
/// have U+0085 instead of U+FEFF.
const SPACES: &str = r"\t-\r \u{a0}\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}\u{feff}";

/// Writes `\s` and `\S` out in the patterns of a schema.
fn spaces(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(spaces),
        Value::Object(object) => {
            for (key, value) in object.iter_mut() {
                match (key.as_str(), &mut *value) {
                    ("const" | "enum" | "default" | "examples", _) => {}
                    ("pattern", Value::String(pattern)) => *pattern = written_out(pattern),
                    ("patternProperties", Value::Object(properties)) => {
                        let old = std::mem::take(properties);
                        properties.extend(old.into_iter().map(|(key, value)| (written_out(&key), value)));
                        properties.values_mut().for_each(spaces);
                    }
                    _ => spaces(value),
                }
            }
        }
        _ => {}
    }
}

fn written_out(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    let mut characters = pattern.chars();
    while let Some(character) = characters.next() {
        match (
            character,
            (character == '\\').then(|| characters.next()).flatten(),
        ) {
            ('\\', Some('s')) => out.extend(["[", SPACES, "]"]),
            ('\\', Some('S')) => out.extend(["[^", SPACES, "]"]),
            (first, second) => {
                out.push(first);
                out.extend(second);
            }
        }
    }
    out
}

/// An error of the library, without the traces of where it stood.
pub(super) fn plain(error: &str) -> String {
    let end = ["\n<non-verbose/>", "\n<backtrace>", "\n<state>"]
        .iter()
        .filter_map(|mark| error.find(mark))
        .min();
    error[..end.unwrap_or(error.len())].to_owned()
}

/// A tokenizer as the library wants it.
struct Vocabulary {
    trie: TokTrie,
    tokenizer: Tokenizer,
    /// The ids of [`ANCHOR`] where the tokenizer puts a space before a text.
    anchor: Option<Vec<u32>>,
}

impl Vocabulary {
    fn new(trie: TokTrie, tokenizer: Tokenizer) -> Self {
        let mut vocabulary = Self {
            trie,
            tokenizer,
            anchor: None,
        };
        let letter = vocabulary.encode("a");
        if vocabulary.spell(&letter) == b" a" {
            vocabulary.anchor = Some(vocabulary.encode(ANCHOR));
        }
        vocabulary
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text, false).unwrap_or_default()
    }

    fn spell(&self, ids: &[u32]) -> Vec<u8> {
        let known = ids.iter().filter(|&&id| (id as usize) < self.trie.vocab_size());
        known.flat_map(|&id| self.trie.token(id)).copied().collect()
    }

    /// The ids that the tokenizer gives a text in the middle of another one. Where they do not spell it (a normalizer
    /// changed it, it names a special token, the vocabulary does not have it), the longest tokens that do.
    fn middle(&self, text: &str) -> Vec<TokenId> {
        let ids = match &self.anchor {
            None => self.encode(text),
            Some(anchor) => self
                .encode(&format!("{ANCHOR}{text}"))
                .strip_prefix(anchor.as_slice())
                .map(<[u32]>::to_vec)
                .unwrap_or_default(),
        };
        if self.spell(&ids) == text.as_bytes() {
            ids
        } else {
            self.trie.greedy_tokenize(text.as_bytes())
        }
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie
            .tokenize_with_greedy_fallback(bytes, |text| self.middle(text))
    }
}
