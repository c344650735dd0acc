//! Guesses of a smaller model.

use std::time::Duration;

#[cfg(feature = "mlx")]
use mlx_engine_core::ParamError;
use mlx_engine_core::{EngineError, GenerateParams};
use mlx_engine_text::Tokenizer;

use super::policy::note;
use crate::clock::Clock;
use crate::worker::guarded;
use crate::{Feed, FeedError, TokenModel};

/// Tokens that a sequence has not seen at a guess whose last guess was right: that one, and the one that followed.
const KEEPING_UP: usize = 2;

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

/// What it is to guess for a request, and behind what.
#[derive(Debug)]
pub(crate) struct Asked<'a, S> {
    /// What it has seen of the request.
    pub(crate) sequence: &'a mut Option<S>,
    /// Prompt and answer so far.
    pub(crate) tokens: &'a [u32],
    pub(crate) prompt_len: usize,
    pub(crate) params: &'a GenerateParams,
    /// The number of the first guess in the answer.
    pub(crate) number: u64,
    /// How many tokens.
    pub(crate) count: usize,
}

/// Guesses that are being made for a request.
struct Guessing<'a, S> {
    sequence: &'a mut S,
    params: GenerateParams,
    prompt_len: usize,
    number: u64,
    count: usize,
    /// Prompt, answer and guesses so far.
    tokens: Vec<u32>,
    /// How many of them are no guesses.
    known: usize,
    /// Guesses that were begun.
    begun: usize,
    /// Where it went wrong.
    error: Option<EngineError>,
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
    fn took(&mut self, count: usize, spent: Duration) {
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

    /// Guesses tokens for several requests, in as many steps as the longest guess has. They are chosen by the parameters and the
    /// random numbers that choose the tokens of the answers, so that a guess is right as often as it can be; the device waits
    /// for none of them before the last is begun.
    ///
    /// First the sequences are fed what they have not seen, no more than a chunk in all: who has more to catch up with gets no
    /// guess yet. Says too whether all had seen their prompts: what it takes to read these is spent once, to learn what guesses take.
    pub(crate) fn guess(
        &mut self,
        asked: Vec<Asked<'_, M::Sequence>>,
        clock: &impl Clock,
    ) -> (Vec<Result<Vec<u32>, EngineError>>, bool) {
        let began = clock.now();
        let mut room = self.chunk;
        let mut all = Vec::with_capacity(asked.len());
        let mut first = Vec::with_capacity(asked.len());
        let mut had_prompts = true;
        for asked in asked {
            let sequence = asked.sequence.get_or_insert_with(|| self.model.open());
            let seen = self.model.len(sequence);
            had_prompts &= seen >= asked.prompt_len;
            let fed = (asked.tokens.len() - seen).min(room);
            room -= fed;
            let whole = seen + fed == asked.tokens.len();
            first.push(asked.tokens[seen..seen + fed].to_vec());
            all.push(Guessing {
                sequence,
                params: GenerateParams {
                    logprobs: false,
                    top_logprobs: 0,
                    ..asked.params.clone()
                },
                prompt_len: asked.prompt_len,
                number: asked.number,
                count: if whole { asked.count } else { 0 },
                tokens: asked.tokens.to_vec(),
                known: asked.tokens.len(),
                begun: 0,
                error: None,
            });
        }
        self.feed(&mut all, |_, index, _| {
            Some(Some(first[index].clone())).filter(|_| !first[index].is_empty())
        });
        let rounds = all.iter().map(|guessing| guessing.count).max().unwrap_or(0);
        for _ in 1..rounds {
            for guessing in &mut all {
                if guessing.goes_on() && !self.model.can_look_ahead(guessing.sequence) {
                    guessing.read(&mut self.model, self.vocabulary);
                }
            }
            self.feed(&mut all, |model, _, guessing| {
                let ahead = model.can_look_ahead(guessing.sequence);
                let read = || guessing.tokens.last().copied().into_iter().collect();
                guessing.goes_on().then(|| (!ahead).then(read))
            });
        }
        for guessing in &mut all {
            while guessing.error.is_none() && guessing.tokens.len() < guessing.known + guessing.begun {
                guessing.read(&mut self.model, self.vocabulary);
            }
        }
        let kept_up = first.iter().all(|tokens| tokens.len() <= KEEPING_UP);
        if kept_up {
            let count = all.iter().map(|guessing| guessing.tokens.len() - guessing.known);
            self.took(count.sum(), clock.now().saturating_duration_since(began));
        }
        let result = |mut guessing: Guessing<'_, M::Sequence>| match guessing.error {
            Some(error) => Err(error),
            None => Ok(guessing.tokens.split_off(guessing.known)),
        };
        (all.into_iter().map(result).collect(), had_prompts)
    }

    /// Feeds those for which `tokens` says what in one step: the token that is being chosen where that is `Some(None)`.
    fn feed(
        &mut self,
        all: &mut [Guessing<'_, M::Sequence>],
        tokens: impl Fn(&M, usize, &Guessing<'_, M::Sequence>) -> Option<Option<Vec<u32>>>,
    ) {
        let mut left: Vec<_> = all
            .iter_mut()
            .enumerate()
            .filter(|(_, guessing)| guessing.error.is_none())
            .filter_map(|(index, guessing)| Some((tokens(&self.model, index, guessing)?, guessing)))
            .collect();
        while !left.is_empty() {
            let count = left.len().min(self.model.batch_limit().max(1));
            let mut batch: Vec<_> = left[..count]
                .iter_mut()
                .map(|(tokens, guessing)| {
                    // Those that are fed are the last that are known, but where a prompt is fed in parts.
                    let before = guessing.tokens.len() - tokens.as_ref().map_or(0, Vec::len);
                    Feed {
                        sequence: &mut *guessing.sequence,
                        params: &guessing.params,
                        tokens: tokens.as_deref(),
                        choices: guessing.count.min(1),
                        number: guessing.number + guessing.begun as u64,
                        before: &guessing.tokens[..before],
                        prompt_len: guessing.prompt_len,
                    }
                })
                .collect();
            match guarded(|| Ok(self.model.feed(&mut batch))).unwrap_or_else(|error| Err(error.into())) {
                Ok(()) => {
                    for (_, guessing) in left.drain(..count) {
                        guessing.begun += guessing.count.min(1);
                    }
                }
                Err(FeedError { error, culprit }) => {
                    let blamed = culprit.filter(|&culprit| culprit < count);
                    let range = blamed.map_or(0..count, |culprit| culprit..culprit + 1);
                    for (_, guessing) in left.drain(range) {
                        guessing.error = Some(error.clone());
                    }
                }
            }
        }
    }
}

impl<S> Guessing<'_, S> {
    /// Whether another guess is to be begun.
    fn goes_on(&self) -> bool {
        self.error.is_none() && self.begun < self.count
    }

    /// Reads the oldest guess that was begun.
    fn read<M: TokenModel<Sequence = S>>(&mut self, model: &mut M, vocabulary: u32) {
        let chosen = guarded(|| {
            model.read(
                self.sequence,
                &self.params,
                &self.tokens,
                self.prompt_len,
                &mut |_| {},
            )
        });
        match chosen {
            Ok(chosen) if chosen.token < vocabulary => self.tokens.push(chosen.token),
            // An id that only fills the matrix up: what follows it is worth nothing.
            Ok(_) => {
                self.begun = self.tokens.len() - self.known;
                self.count = self.begun;
            }
            Err(error) => self.error = Some(error),
        }
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
