//! SentencePiece's BPE as llama.cpp runs it on a vocabulary with scores: neighbours are merged, the pair with the
//! highest score first, and what no token stands for becomes bytes.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use crate::vocabulary::BYTE;
use crate::{GgufVocabulary, TextError};

/// The character that stands for a space.
const SPACE: &str = "\u{2581}";

/// A SentencePiece vocabulary.
#[derive(Debug)]
pub(crate) struct Spm {
    ids: HashMap<String, u32>,
    tokens: Vec<String>,
    scores: Vec<f32>,
    /// The token of each byte.
    bytes: Vec<Option<u32>>,
    /// The byte of each token of a byte.
    byte_of: HashMap<u32, u8>,
    /// Tokens that are found before the text is split, longest first.
    added: Vec<(String, u32)>,
    control: Vec<bool>,
    unknown: u32,
    space_prefix: bool,
}

/// A part of the text that is to be merged: a range of bytes in a linked list.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// A pair of neighbours that make a token.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        // The highest score first, the leftmost of equals.
        self.score
            .total_cmp(&other.score)
            .then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl Spm {
    pub(crate) fn new(vocabulary: &GgufVocabulary) -> Result<Self, TextError> {
        if vocabulary.scores.is_empty() {
            return Err(TextError::Vocabulary {
                message: "a SentencePiece vocabulary has no scores".to_owned(),
            });
        }
        let mut ids = HashMap::with_capacity(vocabulary.tokens.len());
        let mut bytes = vec![None; 256];
        let mut byte_of = HashMap::new();
        let mut added = Vec::new();
        for (id, token) in vocabulary.tokens.iter().enumerate() {
            let number = id as u32;
            // The first of equal tokens counts, as there.
            ids.entry(token.clone()).or_insert(number);
            if vocabulary.token_type(id) == BYTE
                && let Some(byte) = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'))
                && let Ok(byte) = u8::from_str_radix(byte, 16)
            {
                bytes[usize::from(byte)] = Some(number);
                byte_of.insert(number, byte);
            }
            if vocabulary.is_added(id) && !token.is_empty() {
                added.push((token.clone(), number));
            }
        }
        added.sort_by_key(|(token, _)| std::cmp::Reverse(token.len()));
        Ok(Self {
            ids,
            tokens: vocabulary.tokens.clone(),
            scores: vocabulary.scores.clone(),
            bytes,
            byte_of,
            added,
            control: (0..vocabulary.tokens.len())
                .map(|id| vocabulary.is_control(id))
                .collect(),
            unknown: vocabulary.unknown.unwrap_or(0),
            space_prefix: vocabulary.add_space_prefix.unwrap_or(true),
        })
    }

    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        let mut rest = text;
        let mut after_special = true;
        while !rest.is_empty() {
            let found = self.next_added(rest);
            let (plain, special) = found.map_or((rest, None), |(at, token)| (&rest[..at], Some(token)));
            if !plain.is_empty() {
                let prefix = if self.space_prefix && after_special {
                    " "
                } else {
                    ""
                };
                self.merge(&format!("{prefix}{plain}").replace(' ', SPACE), &mut out);
            }
            let Some((token, id)) = special else { break };
            out.push(id);
            rest = &rest[plain.len() + token.len()..];
            after_special = true;
        }
        out
    }

    /// The first added token in a text; the longest where several begin there.
    fn next_added(&self, text: &str) -> Option<(usize, (&str, u32))> {
        let found = self
            .added
            .iter()
            .filter_map(|(token, id)| Some((text.find(token)?, (token.as_str(), *id))));
        found.min_by_key(|(at, (token, _))| (*at, std::cmp::Reverse(token.len())))
    }

    fn merge(&self, text: &str, out: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = Vec::new();
        for (start, character) in text.char_indices() {
            let index = symbols.len();
            let end = start + character.len_utf8();
            symbols.push(Symbol {
                start,
                end,
                previous: index.checked_sub(1),
                next: Some(index + 1),
            });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.consider(text, &symbols, right - 1, right, &mut queue);
        }
        while let Some(pair) = queue.pop() {
            let (left, right) = (symbols[pair.left], symbols[pair.right]);
            // One of the two was merged with another since.
            if left.end == left.start || right.end == right.start || right.end - left.start != pair.len {
                continue;
            }
            symbols[pair.left].end = right.end;
            symbols[pair.left].next = right.next;
            symbols[pair.right].end = right.start;
            if let Some(next) = right.next {
                symbols[next].previous = Some(pair.left);
                self.consider(text, &symbols, pair.left, next, &mut queue);
            }
            if let Some(previous) = left.previous {
                self.consider(text, &symbols, previous, pair.left, &mut queue);
            }
        }
        let mut at = (!symbols.is_empty()).then_some(0);
        while let Some(index) = at {
            let symbol = symbols[index];
            self.token_or_bytes(&text[symbol.start..symbol.end], out);
            at = symbol.next;
        }
    }

    fn consider(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: usize,
        right: usize,
        queue: &mut BinaryHeap<Pair>,
    ) {
        let (start, end) = (symbols[left].start, symbols[right].end);
        if let Some(&id) = self.ids.get(&text[start..end]) {
            queue.push(Pair {
                score: self.scores[id as usize],
                left,
                right,
                len: end - start,
            });
        }
    }

    fn token_or_bytes(&self, piece: &str, out: &mut Vec<u32>) {
        if let Some(&id) = self.ids.get(piece) {
            out.push(id);
            return;
        }
        out.extend(
            piece
                .bytes()
                .map(|byte| self.bytes[usize::from(byte)].unwrap_or(self.unknown)),
        );
    }

    /// The bytes of each token in the middle of a text; none for the unknown token.
    #[cfg(feature = "grammar")]
    pub(crate) fn token_bytes(&self) -> Vec<Vec<u8>> {
        let tokens = self.tokens.iter().enumerate();
        tokens
            .map(|(id, token)| match self.byte_of.get(&(id as u32)) {
                Some(&byte) => vec![byte],
                None if id as u32 == self.unknown => Vec::new(),
                None => token.replace(SPACE, " ").into_bytes(),
            })
            .collect()
    }

    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if let Some(&byte) = self.byte_of.get(&id) {
                bytes.push(byte);
            } else if let Some(token) = self.tokens.get(id as usize)
                && !(skip_special && self.control[id as usize])
            {
                bytes.extend(token.replace(SPACE, " ").bytes());
            }
        }
        // The space that encoding put in front.
        let text = if self.space_prefix && bytes.first() == Some(&b' ') {
            &bytes[1..]
        } else {
            &bytes
        };
        String::from_utf8_lossy(text).into_owned()
    }
}
