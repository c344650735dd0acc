//! The text of tokens as they come.

use crate::Tokenizer;

/// Gives the text of one sequence of tokens, piece by piece, and never half a character.
///
/// A token's text may depend on the tokens before it (a space that is left out at the beginning, a character of
/// several tokens), so a short window is decoded again with each token and the new end is given out: the method of
/// Hugging Face's text-generation-inference.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    window: Vec<u32>,
    /// Tokens at the window's beginning whose text was given out.
    given: usize,
}

/// Tokens after which a window that shows no whole character is given out as it is: no character has more bytes.
const LONGEST_CHARACTER: usize = 8;

impl Detokenizer {
    /// A detokenizer at the beginning of a sequence. With `skip_special`, special tokens have no text.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            window: Vec::new(),
            given: 0,
        }
    }

    /// Takes the next token and returns the text that is whole now.
    pub fn push(&mut self, token: u32) -> String {
        self.window.push(token);
        let before = self.text(self.given);
        let after = self.text(self.window.len());
        let open = after.ends_with(char::REPLACEMENT_CHARACTER)
            && self.window.len() - self.given < LONGEST_CHARACTER;
        if open || after.len() <= before.len() {
            return String::new();
        }
        let piece = tail(&before, &after);
        self.window.drain(..self.given);
        self.given = self.window.len();
        piece
    }

    /// The text that was held back, at the end of the sequence.
    pub fn finish(&mut self) -> String {
        let piece = tail(&self.text(self.given), &self.text(self.window.len()));
        self.window.clear();
        self.given = 0;
        piece
    }

    fn text(&self, len: usize) -> String {
        self.tokenizer.decode(&self.window[..len], self.skip_special)
    }
}

/// What `after` has more than `before`.
fn tail(before: &str, after: &str) -> String {
    after.get(before.len()..).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vocabulary::tests::{byte_level, spm};

    fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> (String, Vec<String>) {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), false);
        let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
        pieces.push(detokenizer.finish());
        (pieces.concat(), pieces)
    }

    #[test]
    fn a_character_of_several_tokens_comes_whole() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("aß🦀", false).unwrap();
        assert_eq!(ids.len(), 7);
        let (_, pieces) = stream(&tokenizer, &ids);
        assert_eq!(pieces, ["a", "", "ß", "", "", "", "🦀", ""]);
    }

    #[test]
    fn what_never_becomes_a_character_is_given_out_at_the_end() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("🦀", false).unwrap();
        let (text, _) = stream(&tokenizer, &ids[..2]);
        assert_eq!(text, tokenizer.decode(&ids[..2], false));
    }

    proptest! {
        #[test]
        fn pieces_add_up_to_the_whole(text in "\\PC{0,24}") {
            for tokenizer in [byte_level(), spm()] {
                let ids = tokenizer.encode(&text, false).unwrap();
                let (streamed, pieces) = stream(&tokenizer, &ids);
                prop_assert_eq!(&streamed, &tokenizer.decode(&ids, false));
                let half = pieces.iter().any(|piece| piece.contains(char::REPLACEMENT_CHARACTER));
                prop_assert!(!half || text.contains(char::REPLACEMENT_CHARACTER));
            }
        }
    }
}
