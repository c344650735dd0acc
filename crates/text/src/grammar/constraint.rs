//! One request's walk through a grammar.

use std::fmt;

use llguidance::Matcher;

use super::table::plain;
use crate::TextError;

/// A grammar compiled for a vocabulary. Requests with the same grammar can share it.
pub struct CompiledGrammar {
    matcher: Matcher,
    vocabulary: usize,
}

impl fmt::Debug for CompiledGrammar {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("CompiledGrammar").finish_non_exhaustive()
    }
}

impl CompiledGrammar {
    pub(super) fn new(matcher: Matcher, vocabulary: usize) -> Self {
        Self { matcher, vocabulary }
    }

    /// A walk from the beginning.
    pub fn constraint(&self) -> Constraint {
        Constraint {
            matcher: self.matcher.deep_clone(),
            vocabulary: self.vocabulary,
            mask: None,
        }
    }
}

/// The state of one answer under a grammar.
///
/// Before each token [`mask`](Self::mask) says which may come; the chosen one is given to [`commit`](Self::commit).
/// [`fast_forward`](Self::fast_forward) has tokens that need no choice. The end of sequence is allowed where the grammar
/// may end.
pub struct Constraint {
    matcher: Matcher,
    vocabulary: usize,
    /// The mask of this state, once it was asked for.
    mask: Option<Vec<u32>>,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Constraint")
            .field("stopped", &self.is_stopped())
            .finish_non_exhaustive()
    }
}

impl Constraint {
    /// The tokens that may come next. The first call in a state computes them, which takes from some microseconds to a
    /// few milliseconds and can be done while a device computes logits; further calls are free. In the end only those that
    /// end a sequence may come.
    ///
    /// # Errors
    ///
    /// [`TextError::Constraint`] where no token fits, or a step would take too long.
    pub fn mask(&mut self) -> Result<TokenMask<'_>, TextError> {
        let words = match self.mask.take() {
            Some(words) => words,
            None => self
                .matcher
                .compute_mask_or_eos()
                .map(Vec::from)
                .map_err(|error| failed(&error.to_string()))?,
        };
        Ok(TokenMask {
            words: self.mask.insert(words),
            vocabulary: self.vocabulary,
        })
    }

    /// Whether the mask of this state was computed, so that [`mask`](Self::mask) is free.
    pub fn is_masked(&self) -> bool {
        self.mask.is_some()
    }

    /// Takes the token that was chosen.
    ///
    /// # Errors
    ///
    /// [`TextError::Constraint`] where the grammar does not allow it; the answer cannot go on then.
    pub fn commit(&mut self, token: u32) -> Result<(), TextError> {
        self.mask = None;
        self.matcher
            .consume_token(token)
            .map_err(|error| failed(&format!("token {token}: {error}")))
    }

    /// How many of these tokens, from the first on, the grammar allows. Nothing is taken.
    ///
    /// # Errors
    ///
    /// [`TextError::Constraint`] where the walk has failed before.
    pub fn allowed_of(&mut self, tokens: &[u32]) -> Result<usize, TextError> {
        self.matcher
            .validate_tokens(tokens)
            .map_err(|error| failed(&error.to_string()))
    }

    /// Tokens that the grammar leaves no choice about, as the tokenizer would write them. They are not taken: commit each
    /// that is fed to the model. Empty where there is a choice.
    pub fn fast_forward(&mut self) -> Vec<u32> {
        if self.is_stopped() {
            return Vec::new();
        }
        self.matcher.compute_ff_tokens()
    }

    /// Takes the last tokens back.
    ///
    /// # Errors
    ///
    /// [`TextError::Constraint`] where fewer were committed, or the walk has failed.
    pub fn rollback(&mut self, tokens: usize) -> Result<(), TextError> {
        self.mask = None;
        self.matcher
            .rollback(tokens)
            .map_err(|error| failed(&error.to_string()))
    }

    /// Whether the answer may end here.
    pub fn is_accepting(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false)
    }

    /// Whether nothing can follow.
    pub fn is_stopped(&self) -> bool {
        self.matcher.is_stopped()
    }
}

fn failed(error: &str) -> TextError {
    TextError::Constraint { reason: plain(error) }
}

/// A set of tokens.
#[derive(Clone, Copy, Debug)]
pub struct TokenMask<'a> {
    words: &'a [u32],
    vocabulary: usize,
}

impl<'a> TokenMask<'a> {
    /// The set as bits: token `i` is bit `i % 32` of word `i / 32`. Ids past the end are not in the set.
    pub fn words(&self) -> &'a [u32] {
        &self.words[..self.vocabulary.div_ceil(32).min(self.words.len())]
    }

    /// Whether a token is in the set.
    pub fn is_allowed(&self, token: u32) -> bool {
        let word = self.words().get(token as usize / 32);
        word.is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// The tokens of the set in order.
    pub fn tokens(&self) -> impl Iterator<Item = u32> + use<'a> {
        self.words().iter().enumerate().flat_map(|(at, &word)| {
            (0..32)
                .filter(move |bit| word >> bit & 1 == 1)
                .map(move |bit| at as u32 * 32 + bit)
        })
    }

    /// Makes the logits of all other tokens minus infinity. Logits past the vocabulary are padding and go too.
    pub fn apply(&self, logits: &mut [f32]) {
        for (at, chunk) in logits.chunks_mut(32).enumerate() {
            let word = self.words().get(at).copied().unwrap_or(0);
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in chunk.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{Grammar, TokenTable};
    use super::*;
    use crate::vocabulary::tests::{byte_level, spm};

    fn tables() -> [TokenTable; 2] {
        [byte_level(), spm()].map(|tokenizer| TokenTable::new(&tokenizer).unwrap())
    }

    /// Walks with the first of the allowed tokens that another walk would take, and gives the text.
    fn forced(table: &TokenTable, grammar: &Grammar) -> String {
        let mut walk = table.compile(grammar).unwrap().constraint();
        let mut bytes = Vec::new();
        while !walk.is_stopped() {
            let token = walk.mask().unwrap().tokens().next().unwrap();
            bytes.extend_from_slice(table.bytes(token));
            walk.commit(token).unwrap();
        }
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn what_is_forced_is_written_in_every_vocabulary() {
        for table in tables() {
            assert_eq!(forced(&table, &Grammar::regex("hello ß hello")), "hello ß hello");
            assert_eq!(
                forced(
                    &table,
                    &Grammar::json_schema(&json!({"const": {"hello": [1, "🦀"]}}))
                ),
                r#"{"hello":[1,"🦀"]}"#
            );
            assert_eq!(forced(&table, &Grammar::lark("start: \"he\" \"llo\"")), "hello");
            // The text of a special token, which is not the token.
            for special in ["<|end|>", "</s>"] {
                let quoted = forced(&table, &Grammar::json_schema(&json!({"const": special})));
                assert_eq!(quoted, format!("\"{special}\""));
            }
        }
    }

    #[test]
    fn the_end_is_allowed_where_the_grammar_may_end() {
        for (table, eos) in tables().iter().zip([260, 2]) {
            let mut walk = table.compile(&Grammar::regex("h+")).unwrap().constraint();
            let h = (0..table.len() as u32)
                .find(|&id| table.bytes(id) == b"h")
                .unwrap();
            assert!(!walk.is_accepting() && !walk.mask().unwrap().is_allowed(eos));
            walk.commit(h).unwrap();
            assert!(walk.is_accepting() && !walk.is_stopped());
            assert!(walk.mask().unwrap().is_allowed(eos) && walk.mask().unwrap().is_allowed(h));
            walk.commit(eos).unwrap();
            assert!(walk.is_stopped());
            assert_eq!(walk.mask().unwrap().tokens().collect::<Vec<_>>(), [eos]);
            assert_eq!(walk.fast_forward(), [0_u32; 0]);
        }
    }

    #[test]
    fn tokens_without_a_choice_are_given_and_can_be_taken_back() {
        let table = &tables()[0];
        let mut walk = table.compile(&Grammar::regex("hello[0-9]")).unwrap().constraint();
        let tokens = walk.fast_forward();
        assert_eq!(tokens, [259]);
        assert_eq!(walk.allowed_of(&[259, u32::from(b'x')]).unwrap(), 1);
        walk.commit(259).unwrap();
        walk.rollback(1).unwrap();
        assert_eq!(walk.fast_forward(), tokens);
        assert!(walk.rollback(1).is_err());
    }

    #[test]
    fn a_mask_is_put_on_logits() {
        let table = &tables()[0];
        let mut walk = table.compile(&Grammar::regex("[ab]")).unwrap().constraint();
        let mask = walk.mask().unwrap();
        let mut logits = vec![1.0; 300];
        mask.apply(&mut logits);
        for (id, logit) in logits.iter().enumerate() {
            assert_eq!(*logit == 1.0, mask.is_allowed(id as u32), "{id}");
        }
        assert_eq!(logits.iter().filter(|&&logit| logit == 1.0).count(), 2);
    }

    #[test]
    fn what_does_not_compile_is_refused_with_the_reason() {
        let table = &tables()[0];
        for (grammar, message) in [
            (Grammar::regex("["), "regular expression is refused"),
            (Grammar::lark("start: missing"), "Lark grammar is refused"),
            (
                Grammar::json_schema(&json!({"not": {}})),
                "JSON schema is refused",
            ),
            (Grammar::json_schema(&json!(false)), "allows nothing"),
            (Grammar::json_schema(&json!(3)), "an object or a boolean"),
            (
                Grammar::json_schema(&json!({"x-guidance": {"lenient": true}})),
                "x-guidance",
            ),
            (
                Grammar::json_schema(&json!({"oneOf": [{"type": "object"}, {"minProperties": 1}]})),
                "oneOf",
            ),
        ] {
            let error = table.compile(&grammar).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn a_token_that_is_not_allowed_ends_the_walk() {
        let table = &tables()[0];
        let grammar = table.compile(&Grammar::regex("h")).unwrap();
        let mut walk = grammar.constraint();
        assert!(matches!(
            walk.commit(u32::from(b'x')),
            Err(TextError::Constraint { .. })
        ));
        assert!(walk.mask().is_err() && walk.is_stopped() && !walk.is_accepting());
        // Others that share the grammar go on.
        assert!(grammar.constraint().mask().is_ok());
        assert!(grammar.constraint().commit(99_999).is_err());
    }

    #[test]
    fn walks_go_to_other_threads() {
        fn sent<T: Send>() {}
        fn shared<T: Send + Sync>() {}
        sent::<Constraint>();
        shared::<TokenTable>();
    }
}
