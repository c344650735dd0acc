//! The vocabulary that a GGUF file carries.

use crate::TextError;

/// The values of a GGUF file's `tokenizer.*` keys.
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` for byte-level BPE, `llama` for SentencePiece.
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is split before it is merged.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`: of SentencePiece, as many as tokens.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`, as many as tokens: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: of BPE, two tokens with a space between.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: the end of a turn.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`: the end of a message.
    pub eom: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
/// The type of the 256 tokens that stand for single bytes.
pub(crate) const BYTE: i32 = 6;

impl GgufVocabulary {
    /// Checks what the tokenizers rely on.
    pub(crate) fn validate(&self) -> Result<(), TextError> {
        let invalid = |message: String| Err(TextError::Vocabulary { message });
        let len = self.tokens.len();
        if len == 0 {
            return invalid("it has no tokens".to_owned());
        }
        for (what, count) in [
            ("scores", self.scores.len()),
            ("token types", self.token_types.len()),
        ] {
            if count != 0 && count != len {
                return invalid(format!("it has {len} tokens and {count} {what}"));
            }
        }
        for (what, id) in [
            ("bos", self.bos),
            ("eos", self.eos),
            ("eot", self.eot),
            ("eom", self.eom),
            ("unknown", self.unknown),
        ] {
            if let Some(id) = id.filter(|&id| id as usize >= len) {
                return invalid(format!("the {what} token is {id} of {len} tokens"));
            }
        }
        Ok(())
    }

    /// The type of a token; normal where the file gives none.
    pub(crate) fn token_type(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(1)
    }

    /// Whether a token has no text of its own.
    pub(crate) fn is_control(&self, id: usize) -> bool {
        self.token_type(id) == CONTROL
    }

    /// Whether a token is found in text before the text is split.
    pub(crate) fn is_added(&self, id: usize) -> bool {
        matches!(self.token_type(id), CONTROL | USER_DEFINED)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::Tokenizer;

    /// The character that stands for a byte in byte-level vocabularies, as OpenAI's `bytes_to_unicode`.
    fn byte_character(byte: u8) -> char {
        let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
        if printable(byte) {
            return char::from(byte);
        }
        let before = (0..byte).filter(|&byte| !printable(byte)).count() as u32;
        char::from_u32(256 + before).unwrap()
    }

    /// 256 bytes, a few merges and a control token.
    pub(crate) fn byte_level_vocabulary() -> GgufVocabulary {
        let mut tokens: Vec<String> = (0..=255).map(|byte| byte_character(byte).to_string()).collect();
        tokens.extend(["he", "ll", "hell", "hello", "<|end|>"].map(str::to_owned));
        let mut token_types = vec![1; tokens.len()];
        token_types[260] = 3;
        GgufVocabulary {
            model: "gpt2".to_owned(),
            pre: Some("gpt-2".to_owned()),
            tokens,
            token_types,
            merges: ["h e", "l l", "he ll", "hell o"].map(str::to_owned).to_vec(),
            eos: Some(260),
            ..GgufVocabulary::default()
        }
    }

    pub(crate) fn byte_level() -> Tokenizer {
        Tokenizer::from_vocabulary(byte_level_vocabulary()).unwrap()
    }

    /// Three controls, 256 bytes and a few pieces.
    pub(crate) fn spm_vocabulary() -> GgufVocabulary {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        tokens.extend(["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello"].map(str::to_owned));
        let mut token_types = vec![1; tokens.len()];
        token_types[..3].copy_from_slice(&[2, 3, 3]);
        token_types[3..259].fill(6);
        let scores = (0..tokens.len())
            .map(|id| if id < 264 { -100.0 } else { id as f32 - 300.0 })
            .collect();
        GgufVocabulary {
            model: "llama".to_owned(),
            tokens,
            scores,
            token_types,
            bos: Some(1),
            eos: Some(2),
            unknown: Some(0),
            add_bos: Some(true),
            ..GgufVocabulary::default()
        }
    }

    pub(crate) fn spm() -> Tokenizer {
        Tokenizer::from_vocabulary(spm_vocabulary()).unwrap()
    }
}
