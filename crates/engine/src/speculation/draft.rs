//! Guesses of a smaller model.

use std::time::Duration;

#[cfg(feature = "mlx")]
use mlx_engine_core::ParamError;
use mlx_engine_core::{EngineError, GenerateParams};
use mlx_engine_text::Tokenizer;

use super::policy::note;
use crate::{Feed, TokenModel};

/// A draft model, and what its guesses were measured to take.
#[derive(Debug)]
pub(crate) struct Drafter<M> {
    pub(crate) model: M,
    /// Tokens that it is fed at once where it has some to catch up with.
    chunk: usize,
    /// Ids from here on are none of the vocabulary.
    vocabulary: u32,
    /// Seconds for a guess.
    seconds: Option<f64>,
}

/// What it is to guess, and behind what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    /// Prompt and answer so far.
    pub(crate) tokens: &'a [u32],
    pub(crate) prompt_len: usize,
    pub(crate) params: &'a GenerateParams,
    /// The number of the first guess in the answer.
    pub(crate) number: u64,
    pub(crate) count: usize,
}

impl<M: TokenModel> Drafter<M> {
    pub(crate) fn new(model: M, chunk: Option<usize>, tokenizer: &Tokenizer) -> Self {
        Self {
            chunk: chunk.unwrap_or_else(|| model.prefill_chunk()),
            vocabulary: tokenizer.vocab_size() as u32,
            model,
            seconds: None,
        }
    }

    /// Seconds that a guess is thought to take; none before one was measured.
    pub(crate) fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(0.0)
    }

    /// So many guesses took so long.
    pub(crate) fn took(&mut self, count: usize, spent: Duration) {
        if count > 0 {
            note(&mut self.seconds, spent.as_secs_f64() / count as f64);
        }
    }

    /// The most guesses that there is room for in the draft model's context.
    pub(crate) fn room(&self, tokens: usize) -> usize {
        self.model.context_length().saturating_sub(tokens)
    }

    /// Forgets what the sequence has seen beyond the tokens of the request that have been fed to the model: guesses, which were wrong
    /// or will be fed again.
    pub(crate) fn forget(&mut self, sequence: &mut Option<M::Sequence>, fed: usize) {
        if let Some(seen) = sequence
            && self.model.len(seen) > fed
            && !self.model.truncate(seen, fed)
        {
            *sequence = None;
        }
    }

    /// Whether the sequence has seen all that a guess needs but for a chunk.
    pub(crate) fn is_near(&self, sequence: Option<&M::Sequence>, tokens: usize) -> bool {
        tokens - sequence.map_or(0, |sequence| self.model.len(sequence)) <= self.chunk
    }

    /// Feeds a chunk of what the sequence has not seen.
    pub(crate) fn catch_up(
        &mut self,
        sequence: &mut Option<M::Sequence>,
        tokens: &[u32],
        params: &GenerateParams,
    ) -> Result<(), EngineError> {
        let sequence = sequence.get_or_insert_with(|| self.model.open());
        let seen = self.model.len(sequence);
        let chunk = tokens.len().min(seen + self.chunk);
        let feed = Feed {
            sequence,
            params,
            tokens: Some(&tokens[seen..chunk]),
            choices: 0,
            number: 0,
        };
        self.model.feed(&mut [feed]).map_err(|fault| fault.error)
    }

    /// Guesses tokens. They are chosen by the parameters and the random numbers that choose the tokens of the answer, so that
    /// a guess is right as often as it can be; their device waits for none of them before the last is begun.
    pub(crate) fn guess(
        &mut self,
        sequence: &mut Option<M::Sequence>,
        asked: Asked<'_>,
    ) -> Result<Vec<u32>, EngineError> {
        let Asked { params, number, .. } = asked;
        let model = &mut self.model;
        let sequence = sequence.get_or_insert_with(|| model.open());
        let seen = model.len(sequence);
        let params = GenerateParams {
            logprobs: false,
            top_logprobs: 0,
            ..params.clone()
        };
        let feed = |model: &mut M, sequence: &mut M::Sequence, tokens: Option<&[u32]>, number| {
            let feed = Feed {
                sequence,
                params: &params,
                tokens,
                choices: 1,
                number,
            };
            model.feed(&mut [feed]).map_err(|fault| fault.error)
        };
        feed(model, sequence, Some(&asked.tokens[seen..]), number)?;
        let count = asked.count as u64;
        let mut begun = 1;
        while begun < count && model.can_look_ahead(sequence) {
            feed(model, sequence, None, number + begun)?;
            begun += 1;
        }
        let mut tokens = asked.tokens.to_vec();
        for read in 1..=count {
            let token = model
                .read(sequence, &params, &tokens, asked.prompt_len, &mut |_| {})?
                .token;
            if token >= self.vocabulary {
                // Ids that only fill the matrix up.
                break;
            }
            tokens.push(token);
            if read == begun && begun < count {
                feed(model, sequence, Some(&[token]), number + begun)?;
                begun += 1;
            }
        }
        Ok(tokens.split_off(asked.tokens.len()))
    }
}

/// Refuses a draft model whose tokens are others than the model's.
#[cfg(feature = "mlx")]
pub(crate) fn same_vocabulary(model: &Tokenizer, draft: &Tokenizer, name: &str) -> Result<(), EngineError> {
    let refused = |allowed: String| {
        ParamError::new("speculation.draft.model", format_args!("`{name}`"), allowed).into()
    };
    let (own, other) = (model.vocab_size(), draft.vocab_size());
    if own != other {
        return Err(refused(format!(
            "a model with the vocabulary of the model, which has {own} tokens and not {other}"
        )));
    }
    for id in 0..own as u32 {
        let (own, other) = (model.id_to_token(id), draft.id_to_token(id));
        if own != other {
            let shown =
                |token: Option<String>| token.map_or_else(|| "none".to_owned(), |token| format!("`{token}`"));
            return Err(refused(format!(
                "a model with the vocabulary of the model, where token {id} is {} and not {}",
                shown(own),
                shown(other)
            )));
        }
    }
    Ok(())
}
