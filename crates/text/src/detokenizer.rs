//! The text of tokens as they come.

use crate::Tokenizer;

/// Gives the text of one sequence of tokens, piece by piece, and never half a character.
///
/// A token's text may depend on the tokens before it (a space that is left out at the beginning, a character of
/// several tokens), so a short window is decoded again with each token and what is new is given out: the method of
/// Hugging Face's text-generation-inference. Bytes that make no character yet show as U+FFFD at the end and are held
/// back.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    window: Vec<u32>,
    /// Tokens at the window's beginning that are there for the sake of those after them.
    context: usize,
    /// Bytes of the window's text that were given out.
    given: usize,
}

/// Bytes of a character that may be missing its last: as many U+FFFD stand for them at most.
const OPEN: usize = 3;

/// Tokens after which a window without a whole character at its end is cut all the same.
const LONGEST_WINDOW: usize = 32;

impl Detokenizer {
    /// A detokenizer at the beginning of a sequence. With `skip_special`, special tokens have no text.
    pub fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            window: Vec::new(),
            context: 0,
            given: 0,
        }
    }

    /// Takes the next token and returns the text that is whole now.
    pub fn push(&mut self, token: u32) -> String {
        self.window.push(token);
        let text = self.text();
        let whole = whole(&text);
        let piece = text.get(self.given..whole).unwrap_or_default().to_owned();
        self.given = self.given.max(whole);
        if whole == text.len() && !piece.is_empty() {
            self.shorten(self.context);
        } else if self.window.len() - self.context > LONGEST_WINDOW {
            // No character has more tokens than bytes, so what is open lies in the last of them.
            self.shorten(self.window.len() - 2 * OPEN);
        }
        piece
    }

    /// The text that was held back, at the end of the sequence.
    pub fn finish(&mut self) -> String {
        let piece = self.text().get(self.given..).unwrap_or_default().to_owned();
        self.window.clear();
        self.context = 0;
        self.given = 0;
        piece
    }

    /// Drops tokens at the window's beginning; all that is left was given out, but for what is open.
    fn shorten(&mut self, tokens: usize) {
        self.window.drain(..tokens);
        self.context = self.window.len();
        self.given = whole(&self.text());
    }

    fn text(&self) -> String {
        self.tokenizer.decode(&self.window, self.skip_special)
    }
}

/// Length of a text without what may be the beginning of a character.
fn whole(text: &str) -> usize {
    let open = text
        .chars()
        .rev()
        .take(OPEN)
        .take_while(|&last| last == char::REPLACEMENT_CHARACTER);
    text.len() - open.count() * char::REPLACEMENT_CHARACTER.len_utf8()
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

    #[test]
    fn bytes_without_end_do_not_pile_up() {
        let tokenizer = byte_level();
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), false);
        let ids = [tokenizer.encode("🦀", false).unwrap()[1]; 500];
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        assert!(detokenizer.window.len() <= 2 * LONGEST_WINDOW);
        text += &detokenizer.finish();
        assert_eq!(text, tokenizer.decode(&ids, false));
    }

    #[test]
    fn replacement_characters_of_the_text_itself_are_kept() {
        let tokenizer = byte_level();
        for text in [
            "\u{fffd}\u{fffd}🦀",
            "a\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}ß",
            "\u{fffd}",
        ] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(stream(&tokenizer, &ids).0, text);
        }
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
