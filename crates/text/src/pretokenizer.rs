//! How byte-level vocabularies of GGUF files split text before it is merged.
//!
//! The expressions are those of `llama-vocab.cpp` of llama.cpp, which the key `tokenizer.ggml.pre` chooses from.

use crate::TextError;

/// How one kind of vocabulary splits text.
pub(crate) struct PreTokenizer {
    /// Expressions that split one after the other, each the pieces that the one before left.
    pub(crate) patterns: &'static [&'static str],
    /// Whether a piece that is a token as a whole is taken without merging.
    pub(crate) ignore_merges: bool,
    /// Whether a text begins with the bos token where the file does not say.
    pub(crate) adds_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The kinds that are known, by all their names.
const KNOWN: &[(&[&str], PreTokenizer)] = &[
    (
        &[
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        PreTokenizer {
            patterns: &[LLAMA3],
            ignore_merges: true,
            adds_bos: true,
        },
    ),
    (
        &["dbrx", "smaug-bpe", "chatglm-bpe"],
        PreTokenizer {
            patterns: &[LLAMA3],
            ignore_merges: false,
            adds_bos: false,
        },
    ),
    (
        &[
            "qwen2",
            "stablelm2",
            "deepseek-r1-qwen",
            "hunyuan",
            "megrez",
            "solar-open",
        ],
        PreTokenizer {
            patterns: &[QWEN2],
            ignore_merges: false,
            adds_bos: false,
        },
    ),
    (
        &["qwen35"],
        PreTokenizer {
            patterns: &[QWEN35],
            ignore_merges: false,
            adds_bos: false,
        },
    ),
    (
        &[
            "gpt-2",
            "default",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "mpt",
            "olmo",
            "jais",
        ],
        PreTokenizer {
            patterns: &[GPT2],
            ignore_merges: false,
            adds_bos: false,
        },
    ),
    (
        &[
            "starcoder",
            "refact",
            "command-r",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        PreTokenizer {
            patterns: &[r"\p{N}", GPT2],
            ignore_merges: false,
            adds_bos: false,
        },
    ),
    (
        &["falcon"],
        PreTokenizer {
            patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"],
            ignore_merges: false,
            adds_bos: false,
        },
    ),
    (
        &["deepseek-llm"],
        PreTokenizer {
            patterns: &[
                r"[\r\n]",
                // Letters that have a case; llama.cpp lists them one range after the other.
                r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
                r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
                r"\s+$",
                r"[一-龥ࠀ-一가-퟿]+",
                r"\p{N}+",
            ],
            ignore_merges: false,
            adds_bos: false,
        },
    ),
    (
        &["deepseek-coder"],
        PreTokenizer {
            patterns: &[
                r"[\r\n]",
                r"\s?\p{L}+",
                r"\s?\p{P}+",
                r"[一-龥ࠀ-一가-퟿]+",
                r"\p{N}",
            ],
            ignore_merges: false,
            adds_bos: false,
        },
    ),
    (
        &["tekken"],
        PreTokenizer {
            patterns: &[TEKKEN],
            ignore_merges: true,
            adds_bos: true,
        },
    ),
    (
        &["gpt-4o", "llama4", "kanana2"],
        PreTokenizer {
            patterns: &[GPT4O],
            ignore_merges: false,
            adds_bos: false,
        },
    ),
];

/// The pre-tokenizer of a name; a vocabulary without one splits as GPT-2's.
pub(crate) fn pre_tokenizer(name: Option<&str>) -> Result<&'static PreTokenizer, TextError> {
    let name = name.unwrap_or("default");
    KNOWN
        .iter()
        .find(|(names, _)| names.contains(&name))
        .map(|(_, found)| found)
        .ok_or_else(|| {
            let mut known: Vec<&str> = KNOWN.iter().flat_map(|(names, _)| *names).copied().collect();
            known.sort_unstable();
            TextError::Vocabulary {
                message: format!(
                    "the pre-tokenizer `{name}` is not known, known are: {}",
                    known.join(", ")
                ),
            }
        })
}
