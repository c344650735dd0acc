//! What the scheduler runs.

use std::ops::Range;

use mlx_engine_core::{EngineError, GenerateParams};

/// A token that a model chose.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The token.
    pub token: u32,
    /// Its log-probability, where the request asked for it.
    pub logprob: Option<f32>,
    /// The likeliest tokens with their log-probabilities, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// What a step feeds to one sequence.
#[derive(Debug)]
pub struct Feed<'a, S> {
    /// The sequence.
    pub sequence: &'a mut S,
    /// The parameters of its request.
    pub params: &'a GenerateParams,
    /// The tokens, one at least; the one that is being chosen, unread, where `None`.
    pub tokens: Option<&'a [u32]>,
    /// After how many of the last of them a choice is begun: after none of a part of a prompt that is not its end, after one
    /// where an answer goes on, after each where all but the first are guesses.
    pub choices: usize,
    /// The number of the first token that is chosen, in the answer; those that follow have the numbers that follow.
    pub number: u64,
    /// All tokens before these that were read, prompt and answer: what a choice looks back at. Where none is begun it may be empty.
    pub before: &'a [u32],
    /// Where the answer begins.
    pub prompt_len: usize,
}

/// Why a step was not taken.
#[derive(Clone, Debug)]
pub struct FeedError {
    /// What happened.
    pub error: EngineError,
    /// Which of those that were fed is to blame, where it is one: then none of them was fed, and the others can be fed
    /// without it. Where `None`, each has to be [taken back](TokenModel::undo) first.
    pub culprit: Option<usize>,
}

impl From<EngineError> for FeedError {
    fn from(error: EngineError) -> Self {
        Self { error, culprit: None }
    }
}

/// A model as the scheduler sees it: sequences that take tokens and give tokens.
///
/// All calls come from the one thread that the model lives on. An error ends the request that the sequence belongs to
/// and no other; where it is not known to which, each is fed alone.
pub trait TokenModel {
    /// What the model remembers of one sequence.
    type Sequence;

    /// The longest sequence, prompt and answer together, in tokens.
    fn context_length(&self) -> usize;

    /// Tokens of a prompt that are fed at once, unless the configuration says otherwise.
    fn prefill_chunk(&self) -> usize {
        2048
    }

    /// A sequence that has seen nothing.
    fn open(&mut self) -> Self::Sequence;

    /// Tokens that a sequence has seen.
    fn len(&self, sequence: &Self::Sequence) -> usize;

    /// Forgets all but the first `len` tokens. `false` where that cannot be; then the sequence is of no more use.
    fn truncate(&mut self, sequence: &mut Self::Sequence, len: usize) -> bool;

    /// Takes back what a step that failed may have left of a sequence behind its first `len` tokens. `false` where that
    /// cannot be known or done; then the sequence is of no more use.
    fn undo(&mut self, sequence: &mut Self::Sequence, len: usize) -> bool {
        self.truncate(sequence, len)
    }

    /// Another sequence that has seen the first `len` tokens of this one, with nothing chosen; both go their own ways. A
    /// token of this one may be being chosen meanwhile. `None` where it cannot be cut there: a model whose sequences
    /// cannot be cut gives one for its whole length alone.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn fork(
        &mut self,
        sequence: &mut Self::Sequence,
        len: usize,
    ) -> Result<Option<Self::Sequence>, EngineError>;

    /// Whether [`fork`](Self::fork) and [`truncate`](Self::truncate) cut sequences anywhere.
    fn forks_anywhere(&self) -> bool {
        true
    }

    /// How many of the last tokens of a sequence [`truncate`](Self::truncate) can always forget: as many guesses as a step
    /// can be fed.
    fn takes_back(&self) -> usize {
        if self.forks_anywhere() { usize::MAX } else { 0 }
    }

    /// Whether the token that is being chosen can be fed unread.
    fn can_look_ahead(&self, sequence: &Self::Sequence) -> bool;

    /// How many sequences [`feed`](Self::feed) takes in one step: 1 where each needs a step of its own.
    fn batch_limit(&self) -> usize {
        1
    }

    /// Feeds tokens to each of several sequences in one step, and begins to choose what follows them. Where nothing is
    /// chosen, it waits until the step has been taken.
    ///
    /// # Errors
    ///
    /// What the device says, and whose fault it is where that is known.
    fn feed(&mut self, batch: &mut [Feed<'_, Self::Sequence>]) -> Result<(), FeedError>;

    /// A seed for a request that brings none.
    fn seed(&self) -> u64 {
        0
    }

    /// Waits for the oldest token that is being chosen. `tokens` are all so far, the answer begins at `prompt_len`; of
    /// those that were fed beyond them as guesses, the model knows what it chose.
    /// Where the parameters have a constraint, `mask` makes the logits of tokens that may not come minus infinity.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn read(
        &mut self,
        sequence: &mut Self::Sequence,
        params: &GenerateParams,
        tokens: &[u32],
        prompt_len: usize,
        mask: &mut dyn FnMut(&mut [f32]),
    ) -> Result<Chosen, EngineError>;

    /// Feeds some tokens and gives the log-probability of each of `next`, which follow each of them: as many as there are
    /// tokens, or one less at the end.
    ///
    /// # Errors
    ///
    /// What the device says, and that a model has no probabilities.
    fn score(
        &mut self,
        sequence: &mut Self::Sequence,
        tokens: &[u32],
        next: &[u32],
    ) -> Result<Vec<f32>, EngineError>;

    /// Bytes of the weights; 0 for a model without.
    fn weight_bytes(&self) -> u64 {
        0
    }

    /// Bytes that steps take beside weights and sequences which feed so many tokens of a prompt and decode so many
    /// answers, as an estimate.
    fn workspace_bytes(&self, chunk: usize, batch: usize) -> u64 {
        let _ = (chunk, batch);
        0
    }

    /// Keeps to another limit of bytes from now on, where there is something that can.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn limit_memory(&mut self, bytes: u64) -> Result<(), EngineError> {
        let _ = bytes;
        Ok(())
    }

    /// The most bytes that all have taken at once since the model was loaded; `None` where that was not measured.
    fn measured_bytes(&self) -> Option<u64> {
        None
    }

    /// Bytes that a sequence of this many tokens takes.
    fn sequence_bytes(&self, tokens: usize) -> u64 {
        let _ = tokens;
        0
    }

    /// Bytes of a sequence that a fork at this length goes on sharing with it.
    fn shared_bytes(&self, len: usize) -> u64 {
        self.sequence_bytes(len)
    }

    /// All that keys and values depend on beside the tokens, as a text: the content of the model, and how it computes.
    /// `None` where they cannot be written, and where nobody asked for it when the model was loaded.
    fn identity(&self) -> Option<String> {
        None
    }

    /// The keys and values of 256 tokens of a sequence, from a multiple of 256 on, as bytes that
    /// [`import`](Self::import) reads.
    ///
    /// # Errors
    ///
    /// What the device says, and that a model cannot write them.
    fn export(&mut self, sequence: &Self::Sequence, range: Range<usize>) -> Result<Vec<u8>, EngineError> {
        let _ = sequence;
        Err(EngineError::internal(format!(
            "the keys and values of {range:?} cannot be written"
        )))
    }

    /// The sequence whose keys and values these are, from position 0 on.
    ///
    /// # Errors
    ///
    /// For bytes that are damaged or of another model.
    fn import(&mut self, blocks: &[Vec<u8>]) -> Result<Self::Sequence, EngineError> {
        Err(EngineError::internal(format!(
            "{} blocks of keys and values cannot be read",
            blocks.len()
        )))
    }

    /// The most bytes that the model had allocated at once.
    fn peak_memory_bytes(&self) -> u64;

    /// Gives memory back that is held for speed alone.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn clear_caches(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    /// Whether it computes on a stream of a device.
    fn has_stream(&self) -> bool {
        false
    }

    /// Makes a new stream on the device, for sequences that are opened from now on.
    ///
    /// # Errors
    ///
    /// What the device says.
    fn rebuild_stream(&mut self) -> Result<(), EngineError> {
        Ok(())
    }
}
