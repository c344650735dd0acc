//! The bytes that each token of a vocabulary stands for.

use std::collections::HashMap;

use tokenizers::{Decoder, DecoderWrapper};

use crate::TextError;

/// What is known of a token while the steps of a decoder are run over it.
enum Piece {
    Text(String),
    Bytes(Vec<u8>),
}

/// The bytes of the tokens of a `tokenizer.json`, by id; empty where an id has no token.
pub(crate) fn of_hugging_face(tokenizer: &tokenizers::Tokenizer) -> Result<Vec<Vec<u8>>, TextError> {
    let mut steps = Vec::new();
    if let Some(decoder) = tokenizer.get_decoder() {
        flatten(decoder, &mut steps);
    }
    let known = |step: &&DecoderWrapper| {
        !matches!(
            step,
            DecoderWrapper::BPE(_) | DecoderWrapper::WordPiece(_) | DecoderWrapper::CTC(_)
        )
    };
    if steps.is_empty() || !steps.iter().all(known) {
        let message = "its decoder is none that gives each token bytes of its own (byte level, or a replaced space with \
                       byte fallback), which grammars need";
        return Err(TextError::Vocabulary {
            message: message.to_owned(),
        });
    }
    let alphabet = byte_alphabet();
    let added = tokenizer.get_added_tokens_decoder();
    let vocabulary = tokenizer.get_vocab(true);
    let len = vocabulary.values().max().map_or(0, |&id| id as usize + 1);
    let mut table = vec![Vec::new(); len];
    for (token, id) in vocabulary {
        table[id as usize] = if added.contains_key(&id) {
            token.into_bytes()
        } else {
            bytes(token, &steps, &alphabet)
        };
    }
    Ok(table)
}

fn flatten<'a>(decoder: &'a DecoderWrapper, steps: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            for decoder in sequence.get_decoders() {
                flatten(decoder, steps);
            }
        }
        other => steps.push(other),
    }
}

fn bytes(token: String, steps: &[&DecoderWrapper], alphabet: &HashMap<char, u8>) -> Vec<u8> {
    let mut piece = Piece::Text(token);
    for step in steps {
        piece = match (piece, step) {
            (Piece::Text(text), DecoderWrapper::ByteLevel(_)) => {
                let mapped = text.chars().map(|character| alphabet.get(&character).copied());
                Piece::Bytes(
                    mapped
                        .collect::<Option<Vec<u8>>>()
                        .unwrap_or_else(|| text.into_bytes()),
                )
            }
            (Piece::Text(text), DecoderWrapper::ByteFallback(_)) => match byte_of(&text) {
                Some(byte) => Piece::Bytes(vec![byte]),
                None => Piece::Text(text),
            },
            (Piece::Text(text), DecoderWrapper::Metaspace(metaspace)) => {
                Piece::Text(text.replace(metaspace.get_replacement(), " "))
            }
            (Piece::Text(text), DecoderWrapper::Replace(replace)) => {
                let replaced = replace.decode_chain(vec![text.clone()]);
                Piece::Text(replaced.map_or(text, |parts| parts.concat()))
            }
            // What is stripped is stripped at the beginning of a whole text, and tokens of an answer follow a prompt.
            (piece, _) => piece,
        };
    }
    match piece {
        Piece::Text(text) => text.into_bytes(),
        Piece::Bytes(bytes) => bytes,
    }
}

/// The byte of a token such as `<0x0A>`.
pub(crate) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// The characters that stand for bytes in byte-level vocabularies: printable ones for themselves, the others for those
/// from U+0100 on.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut next = 256;
    let mut alphabet = HashMap::with_capacity(256);
    for byte in 0..=255_u8 {
        let character = if matches!(byte, 33..=126 | 161..=172 | 174..=255) {
            Some(char::from(byte))
        } else {
            next += 1;
            char::from_u32(next - 1)
        };
        alphabet.extend(character.map(|character| (character, byte)));
    }
    alphabet
}
