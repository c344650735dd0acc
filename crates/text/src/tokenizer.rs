//! Text to token ids and back.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::error::Source;
use crate::pretokenizer::{PreTokenizer, pre_tokenizer};
use crate::spm::Spm;
use crate::{GgufVocabulary, TextError};

/// A model's tokenizer. Clones share the vocabulary.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: Kind,
    bos: Option<u32>,
    eos: BTreeSet<u32>,
    eos_token: Option<String>,
    /// Tokens to put around a text that is encoded with its specials, for tokenizers that do not do so themselves.
    prefix: Option<u32>,
    suffix: Option<u32>,
    chat_template: Option<String>,
    special: BTreeSet<u32>,
}

#[derive(Debug)]
enum Kind {
    HuggingFace(Box<tokenizers::Tokenizer>),
    Spm(Box<Spm>, Vec<String>),
}

/// Texts of tokens that end a model's turn, whatever its configuration says: files in use often name the end of the
/// document alone. The list is llama.cpp's.
const END_OF_TURN: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "< EOT >",
    "_<EOT>",
];

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// Where the file cannot be read or is damaged.
    pub fn from_file(path: &Path) -> Result<Self, TextError> {
        Self::with_config(path, &Value::Null, None, BTreeSet::new())
    }

    /// Reads the tokenizer of a model folder: `tokenizer.json`, with `tokenizer_config.json`, `chat_template.jinja` and
    /// the ends of sequence of `generation_config.json` and `config.json` where they are there.
    ///
    /// # Errors
    ///
    /// Where there is no `tokenizer.json`, or a file is damaged.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(TextError::TokenizerMissing {
                folder: folder.to_owned(),
            });
        }
        let config = read_json(&folder.join("tokenizer_config.json"))?;
        let template = read_optional(&folder.join("chat_template.jinja"))?.or_else(|| template_of(&config));
        let mut eos = BTreeSet::new();
        for file in ["generation_config.json", "config.json"] {
            let config = read_json(&folder.join(file))?;
            // Indexing by name gives null where the file holds something else than an object.
            let ids = &config["eos_token_id"];
            let ids = ids.as_array().map_or(std::slice::from_ref(ids), Vec::as_slice);
            eos.extend(
                ids.iter()
                    .filter_map(Value::as_u64)
                    .filter_map(|id| u32::try_from(id).ok()),
            );
        }
        Self::with_config(&path, &config, template, eos)
    }

    fn with_config(
        path: &Path,
        config: &Value,
        chat_template: Option<String>,
        mut eos: BTreeSet<u32>,
    ) -> Result<Self, TextError> {
        let mut tokenizer = caught(|| tokenizers::Tokenizer::from_file(path))
            .and_then(|loaded| loaded)
            .map_err(|source| unreadable(path.to_owned(), source))?;
        // Settings of training: a prompt that is cut or filled up without a word is not what was asked.
        let without_truncation = tokenizer.with_truncation(None).map(|_| ());
        without_truncation.map_err(|source| unreadable(path.to_owned(), source))?;
        tokenizer.with_padding(None);
        let text_of = |key: &str| {
            let token = &config[key];
            token
                .as_str()
                .or_else(|| token["content"].as_str())
                .map(str::to_owned)
        };
        let eos_token = text_of("eos_token");
        let id_of = |token: &str| tokenizer.token_to_id(token);
        let bos = text_of("bos_token").and_then(|token| id_of(&token));
        eos.extend(eos_token.as_deref().and_then(id_of));
        eos.extend(END_OF_TURN.iter().filter_map(|token| id_of(token)));
        let special = specials(&tokenizer);
        let inner = Inner {
            kind: Kind::HuggingFace(Box::new(tokenizer)),
            bos,
            eos,
            eos_token,
            // The post-processor of the file puts these.
            prefix: None,
            suffix: None,
            chat_template,
            special,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    ///
    /// Where the vocabulary contradicts itself, or its model or pre-tokenizer is not known.
    pub fn from_vocabulary(vocabulary: GgufVocabulary) -> Result<Self, TextError> {
        vocabulary.validate()?;
        let find = |text: &str| {
            vocabulary
                .tokens
                .iter()
                .position(|token| token == text)
                .map(|id| id as u32)
        };
        let mut eos: BTreeSet<u32> = [vocabulary.eos, vocabulary.eot, vocabulary.eom]
            .into_iter()
            .flatten()
            .collect();
        eos.extend(
            END_OF_TURN
                .iter()
                .filter_map(|text| find(text))
                .filter(|&id| vocabulary.is_added(id as usize)),
        );
        let special = (0..vocabulary.tokens.len())
            .filter(|&id| vocabulary.is_control(id))
            .map(|id| id as u32)
            .collect();
        let eos_token = vocabulary.eos.map(|id| vocabulary.tokens[id as usize].clone());
        let (kind, adds_bos) = match vocabulary.model.as_str() {
            "gpt2" => {
                let pre = pre_tokenizer(vocabulary.pre.as_deref())?;
                let tokenizer = byte_level(&vocabulary, pre)?;
                (Kind::HuggingFace(Box::new(tokenizer)), pre.adds_bos)
            }
            "llama" => (
                Kind::Spm(Box::new(Spm::new(&vocabulary)?), vocabulary.tokens.clone()),
                true,
            ),
            other => {
                let message = format!("the tokenizer model `{other}` is not known, known are: gpt2, llama");
                return Err(TextError::Vocabulary { message });
            }
        };
        let inner = Inner {
            kind,
            bos: vocabulary.bos,
            eos,
            eos_token,
            prefix: vocabulary.bos.filter(|_| vocabulary.add_bos.unwrap_or(adds_bos)),
            suffix: vocabulary.eos.filter(|_| vocabulary.add_eos.unwrap_or(false)),
            chat_template: vocabulary.chat_template,
            special,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The ids of a text. Special tokens that are written out in it are found. With `add_special`, the tokens that
    /// begin and end a sequence are put around it where the model has them.
    ///
    /// # Errors
    ///
    /// Where the tokenizer fails, which those in use do not.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let inner = &self.inner;
        let mut ids = match &inner.kind {
            Kind::HuggingFace(tokenizer) => {
                let encoding = caught(|| tokenizer.encode_fast(text, add_special))
                    .and_then(|encoding| encoding)
                    .map_err(|source| TextError::Encode { source })?;
                encoding.get_ids().to_vec()
            }
            Kind::Spm(spm, _) => spm.encode(text),
        };
        if add_special {
            if let Some(prefix) = inner.prefix {
                ids.insert(0, prefix);
            }
            ids.extend(inner.suffix);
        }
        Ok(ids)
    }

    /// The text of ids. Bytes that are no characters become U+FFFD; ids out of the vocabulary have no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        match &self.inner.kind {
            Kind::HuggingFace(tokenizer) => caught(|| tokenizer.decode(ids, skip_special))
                .and_then(|text| text)
                .unwrap_or_default(),
            Kind::Spm(spm, _) => spm.decode(ids, skip_special),
        }
    }

    /// How many different tokens the vocabulary has. Ids may be larger, where it has gaps or a token twice.
    pub fn vocab_size(&self) -> usize {
        match &self.inner.kind {
            Kind::HuggingFace(tokenizer) => tokenizer.get_vocab_size(true),
            Kind::Spm(_, tokens) => tokens.len(),
        }
    }

    /// The id of a token's text, as the vocabulary has it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.inner.kind {
            Kind::HuggingFace(tokenizer) => tokenizer.token_to_id(token),
            Kind::Spm(_, tokens) => tokens.iter().position(|found| found == token).map(|id| id as u32),
        }
    }

    /// A token's text, as the vocabulary has it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.inner.kind {
            Kind::HuggingFace(tokenizer) => tokenizer.id_to_token(id),
            Kind::Spm(_, tokens) => tokens.get(id as usize).cloned(),
        }
    }

    /// The ids that end an answer.
    pub fn eos_ids(&self) -> &BTreeSet<u32> {
        &self.inner.eos
    }

    /// The id that begins a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.bos
    }

    /// The text of the token that begins a sequence.
    pub fn bos_token(&self) -> Option<String> {
        self.inner.bos.and_then(|id| self.id_to_token(id))
    }

    /// The text of the token that ends a sequence.
    pub fn eos_token(&self) -> Option<&str> {
        self.inner.eos_token.as_deref()
    }

    /// The chat template that came with the tokenizer.
    pub fn chat_template(&self) -> Option<&str> {
        self.inner.chat_template.as_deref()
    }

    /// The bytes that each token stands for, by id; empty where an id has no token. Special tokens have their text.
    ///
    /// # Errors
    ///
    /// Where the decoder gives tokens no bytes of their own.
    #[cfg(feature = "grammar")]
    pub(crate) fn token_bytes(&self) -> Result<Vec<Vec<u8>>, TextError> {
        match &self.inner.kind {
            Kind::HuggingFace(tokenizer) => crate::token_bytes::of_hugging_face(tokenizer),
            Kind::Spm(spm, _) => Ok(spm.token_bytes()),
        }
    }

    /// Whether a token is a special one, which has no text of its own.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.special.contains(&id)
    }
}

fn specials(tokenizer: &tokenizers::Tokenizer) -> BTreeSet<u32> {
    let added = tokenizer.get_added_tokens_decoder();
    added
        .into_iter()
        .filter(|(_, token)| token.special)
        .map(|(id, _)| id)
        .collect()
}

/// A byte-level BPE from a GGUF vocabulary.
pub(crate) fn byte_level(
    vocabulary: &GgufVocabulary,
    pre: &PreTokenizer,
) -> Result<tokenizers::Tokenizer, TextError> {
    let invalid = |message: String| TextError::Vocabulary { message };
    let ids = vocabulary
        .tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), id as u32))
        .collect();
    let merges = vocabulary
        .merges
        .iter()
        .map(|merge| {
            // The first character of the left part may be the space itself in no byte-level vocabulary.
            let (left, right) = merge
                .split_once(' ')
                .ok_or_else(|| invalid(format!("the merge `{merge}` is no pair of tokens")))?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect::<Result<Vec<_>, TextError>>()?;
    let model = BPE::builder()
        .vocab_and_merges::<Vocab>(ids, merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|error| invalid(format!("its merges do not fit its tokens: {error}")))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let mut steps = Vec::with_capacity(pre.patterns.len() + 1);
    for pattern in pre.patterns {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| invalid(format!("its pre-tokenizer does not compile: {error}")))?;
        steps.push(PreTokenizerWrapper::Split(split));
    }
    steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)));
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let added = (0..vocabulary.tokens.len())
        .filter(|&id| vocabulary.is_added(id) && !vocabulary.tokens[id].is_empty());
    let (control, user): (Vec<usize>, Vec<usize>) = added.partition(|&id| vocabulary.is_control(id));
    let token =
        |id: usize, special| AddedToken::from(vocabulary.tokens[id].clone(), special).normalized(false);
    let failed = |source| TextError::Encode { source };
    tokenizer
        .add_special_tokens(control.into_iter().map(|id| token(id, true)).collect::<Vec<_>>())
        .map_err(failed)?;
    tokenizer
        .add_tokens(user.into_iter().map(|id| token(id, false)).collect::<Vec<_>>())
        .map_err(failed)?;
    Ok(tokenizer)
}

/// Turns a panic of `tokenizers`, which it answers some damaged files with, into an error.
///
/// Nothing half done is used after the unwinding: what was being loaded is dropped, and encoding and decoding borrow the
/// tokenizer and change nothing but its caches of words, which take a word when it is finished and which a poisoned lock
/// merely turns off.
fn caught<T>(work: impl FnOnce() -> T) -> Result<T, Source> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let message = panic.downcast_ref::<String>().map(String::as_str);
        let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
        format!(
            "the tokenizer is damaged: {}",
            message.unwrap_or("no reason given")
        )
        .into()
    })
}

fn unreadable(path: PathBuf, source: impl Into<Source>) -> TextError {
    TextError::TokenizerFile {
        path,
        source: source.into(),
    }
}

fn read_optional(path: &Path) -> Result<Option<String>, TextError> {
    if !path.is_file() {
        return Ok(None);
    }
    std::fs::read_to_string(path)
        .map(Some)
        .map_err(|error| unreadable(path.to_owned(), error))
}

/// The JSON of a file, or null where there is none.
fn read_json(path: &Path) -> Result<Value, TextError> {
    read_optional(path)?.map_or(Ok(Value::Null), |text| {
        serde_json::from_str(&text).map_err(|error| unreadable(path.to_owned(), error))
    })
}

/// `chat_template` of a `tokenizer_config.json`: a string, or a list of named ones of which `default` counts.
fn template_of(config: &Value) -> Option<String> {
    let template = &config["chat_template"];
    let named = template
        .as_array()
        .into_iter()
        .flatten()
        .find(|named| named["name"] == "default");
    template
        .as_str()
        .or_else(|| named?["template"].as_str())
        .map(str::to_owned)
}
