//! A scripted model that never poses as a real one.

#[cfg(test)]
use std::ops::AddAssign;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mlx_engine_core::{EngineError, GenerateParams};
use mlx_engine_text::{GgufVocabulary, TextError, Tokenizer};
use serde::{Deserialize, Serialize};

use crate::{Chosen, Feed, FeedError, TokenModel};

/// What a fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MockFault {
    /// The device fails.
    Device,
    /// The device is out of memory.
    OutOfMemory,
    /// The worker panics.
    Panic,
}

/// How the mock behaves.
///
/// Its tokens are bytes. Without a reply it answers with the end of the prompt, so that a test can tell its requests
/// apart.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MockScript {
    reply: Option<String>,
    load_delay: Duration,
    #[serde(skip)]
    load_hangs: Arc<AtomicBool>,
    load_failure: Option<String>,
    step_delay: Duration,
    faults: Vec<(u64, MockFault)>,
    context_length: Option<usize>,
    bytes_per_token: Option<u64>,
    whole_sequences: bool,
    /// Bytes of workspace, as they are estimated and as they turn out.
    workspace: Option<(u64, u64)>,
    chat_template: Option<String>,
    batch_limit: Option<usize>,
    draft: Option<Box<MockScript>>,
}

impl MockScript {
    /// A mock that gives the same answer to everything.
    pub fn reply(text: impl Into<String>) -> Self {
        Self {
            reply: Some(text.into()),
            ..Self::default()
        }
    }

    /// Takes this long to load.
    pub fn with_load_delay(mut self, delay: Duration) -> Self {
        self.load_delay = delay;
        self
    }

    /// Has every load that begins while this is true hang until it is given up. It is for a mock in this process.
    pub fn with_hanging_loads(mut self, hang: Arc<AtomicBool>) -> Self {
        self.load_hangs = hang;
        self
    }

    /// Fails to load, with this message.
    pub fn with_load_failure(mut self, message: impl Into<String>) -> Self {
        self.load_failure = Some(message.into());
        self
    }

    /// Takes this long for each step in which a token is chosen, which chunks of prompts are not but for the last.
    pub fn with_step_delay(mut self, delay: Duration) -> Self {
        self.step_delay = delay;
        self
    }

    /// Fails at the token of this number, from 0, once in the model's life.
    pub fn with_fault(mut self, number: u64, fault: MockFault) -> Self {
        self.faults.push((number, fault));
        self
    }

    /// Has a context of this many tokens; 4096 unless told.
    pub fn with_context_length(mut self, tokens: usize) -> Self {
        self.context_length = Some(tokens);
        self
    }

    /// Counts this many bytes for each token of a sequence; 4 unless told, which is what the mock remembers of one.
    pub fn with_bytes_per_token(mut self, bytes: u64) -> Self {
        self.bytes_per_token = Some(bytes);
        self
    }

    /// Counts so many bytes of workspace, and finds others once it has run.
    pub fn with_workspace(mut self, estimated: u64, found: u64) -> Self {
        self.workspace = Some((estimated, found));
        self
    }

    /// Has sequences that cannot be cut, as those of a recurrent model.
    pub fn with_whole_sequences(mut self) -> Self {
        self.whole_sequences = true;
        self
    }

    /// Takes so many sequences in one step; 1 unless told.
    pub fn with_batch_limit(mut self, sequences: usize) -> Self {
        self.batch_limit = Some(sequences);
        self
    }

    /// Has this chat template, in place of one that writes roles and contents.
    pub fn with_chat_template(mut self, template: impl Into<String>) -> Self {
        self.chat_template = Some(template.into());
        self
    }

    /// Has the mock of another script guess where the configuration has a draft model; its own unless told.
    pub fn with_draft(mut self, script: MockScript) -> Self {
        self.draft = Some(Box::new(script));
        self
    }

    /// The script of the model that guesses.
    pub(crate) fn draft(&self) -> Self {
        self.draft.as_deref().unwrap_or(self).clone()
    }

    /// The mock's tokenizer, with its template.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer, TextError> {
        tokenizer(self.chat_template.as_deref().unwrap_or(TEMPLATE))
    }

    /// Waits as long as a load is to take. Who gives it up has to wake this thread.
    pub(crate) fn take_time(&self, given_up: &AtomicBool) -> Result<(), EngineError> {
        let hangs = self.load_hangs.load(Ordering::Relaxed);
        let began = Instant::now();
        while !given_up.load(Ordering::Relaxed) {
            let left = self.load_delay.saturating_sub(began.elapsed());
            match (hangs, left) {
                (true, _) => thread::park(),
                (false, Duration::ZERO) => return Ok(()),
                (false, left) => thread::park_timeout(left),
            }
        }
        Err(EngineError::Cancelled)
    }

    pub(crate) fn load(self) -> Result<MockModel, EngineError> {
        match self.load_failure {
            Some(message) => Err(EngineError::model_load("mock", message)),
            None => Ok(MockModel {
                script: self,
                most_seen: 0,
                alive: Arc::default(),
                #[cfg(test)]
                fed: Vec::new(),
                #[cfg(test)]
                pace: None,
            }),
        }
    }
}

/// The model that follows a [`MockScript`].
#[derive(Debug)]
pub struct MockModel {
    script: MockScript,
    /// Tokens of the longest sequence so far.
    most_seen: usize,
    /// Every sequence has a clone.
    alive: Arc<()>,
    /// Of each step so far the tokens of each sequence.
    #[cfg(test)]
    pub(crate) fed: Vec<Vec<usize>>,
    /// What time it takes to read a step.
    #[cfg(test)]
    pub(crate) pace: Option<Pace>,
}

/// A clock in milliseconds that goes on when a step is waited for, or when it is fed.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    pub(crate) clock: Arc<std::sync::atomic::AtomicU64>,
    /// For a step of any number of tokens, and for each of them.
    pub(crate) step: u64,
    pub(crate) token: u64,
    /// Whether a step runs when it is fed, as on a device that takes no more before.
    pub(crate) eager: bool,
    /// What each step takes, in order.
    pub(crate) steps: Vec<u64>,
    /// Steps that have run.
    pub(crate) run: usize,
}

#[cfg(test)]
impl Pace {
    /// Runs the first so many steps that have not.
    fn run(&mut self, steps: usize) {
        let spent = self.steps[self.run.min(steps)..steps].iter().sum();
        self.clock.fetch_add(spent, std::sync::atomic::Ordering::Relaxed);
        self.run = self.run.max(steps);
    }
}

/// What the mock remembers: the tokens it has seen, and those that it has chosen and nobody has read.
#[derive(Debug, Default)]
pub struct MockSequence {
    seen: Vec<u32>,
    chosen: Vec<u32>,
    /// How many steps there were with the one that chose each.
    #[cfg(test)]
    begun: Vec<usize>,
    /// The answer, chosen when its first token is.
    answer: Vec<u32>,
    /// Whether it was fed a guess that is not what it chose.
    astray: bool,
    _alive: Arc<()>,
}

/// The id of the token that ends an answer: the one behind the bytes.
const END: u32 = 256;

/// Bytes of the prompt's end that the mock says back.
const ECHO: usize = 64;

/// The bytes at the end of a prompt.
fn echo(seen: &[u32]) -> Vec<u32> {
    let said: Vec<u32> = seen.iter().copied().filter(|&token| token < END).collect();
    said[said.len().saturating_sub(ECHO)..].to_vec()
}

#[cfg(test)]
impl MockSequence {
    /// The tokens that it has seen.
    pub(crate) fn seen(&self) -> &[u32] {
        &self.seen
    }
}

impl MockModel {
    /// How many sequences there are.
    #[cfg(test)]
    pub(crate) fn alive(&self) -> usize {
        std::sync::Arc::strong_count(&self.alive) - 1
    }

    /// Fails where it is to fail at the token of this number.
    fn fault(&mut self, number: u64) -> Result<(), EngineError> {
        let Some(at) = self.script.faults.iter().position(|(at, _)| *at == number) else {
            return Ok(());
        };
        match self.script.faults.remove(at).1 {
            MockFault::Device => Err(EngineError::Device {
                message: "scripted fault".to_owned(),
                source: None,
            }),
            MockFault::OutOfMemory => Err(EngineError::OutOfMemory),
            MockFault::Panic => std::panic::panic_any("scripted panic"),
        }
    }

    /// Feeds a sequence, and chooses what follows.
    fn take(&mut self, feed: &mut Feed<'_, MockSequence>) {
        let sequence = &mut *feed.sequence;
        let unread = sequence.chosen.last().copied();
        let tokens = match feed.tokens {
            Some(tokens) => tokens,
            None => unread.as_slice(),
        };
        let (before, guessed) =
            tokens.split_at(tokens.len() - feed.choices.saturating_sub(1).min(tokens.len()));
        sequence.seen.extend_from_slice(before);
        self.most_seen = self.most_seen.max(sequence.seen.len());
        if feed.choices == 0 {
            return;
        }
        self.choose(sequence, feed.number);
        for (&guess, number) in guessed.iter().zip(feed.number + 1..) {
            sequence.astray |= sequence.chosen.last() != Some(&guess);
            sequence.seen.push(guess);
            self.most_seen = self.most_seen.max(sequence.seen.len());
            self.choose(sequence, number);
        }
    }

    fn choose(&mut self, sequence: &mut MockSequence, number: u64) {
        self.script(sequence, number);
        let scripted = sequence.answer.get(number as usize).copied().unwrap_or(END);
        #[cfg(test)]
        if let Some(pace) = &mut self.pace {
            let token = pace.token;
            pace.steps
                .last_mut()
                .expect("it was fed in a step")
                .add_assign(token);
            sequence.begun.push(pace.steps.len());
        }
        // Behind a wrong guess a model says something, and something else than it would have said.
        let token = if sequence.astray {
            (scripted + 1) % END
        } else {
            scripted
        };
        sequence.chosen.push(token);
    }

    /// Has the answer at hand, which depends on the prompt.
    fn script(&self, sequence: &mut MockSequence, number: u64) {
        if number == 0 || sequence.answer.is_empty() {
            let prompt = sequence.seen.len().saturating_sub(number as usize);
            sequence.answer = match &self.script.reply {
                Some(reply) => reply.bytes().map(u32::from).collect(),
                None => echo(&sequence.seen[..prompt]),
            };
        }
    }
}

impl TokenModel for MockModel {
    type Sequence = MockSequence;

    fn context_length(&self) -> usize {
        self.script.context_length.unwrap_or(4096)
    }

    fn open(&mut self) -> MockSequence {
        MockSequence {
            _alive: Arc::clone(&self.alive),
            ..MockSequence::default()
        }
    }

    fn len(&self, sequence: &MockSequence) -> usize {
        sequence.seen.len()
    }

    fn truncate(&mut self, sequence: &mut MockSequence, len: usize) -> bool {
        let can = !self.script.whole_sequences || len == sequence.seen.len();
        sequence.seen.truncate(len);
        sequence.chosen.clear();
        #[cfg(test)]
        sequence.begun.clear();
        sequence.astray = false;
        can
    }

    fn fork(&mut self, sequence: &mut MockSequence, len: usize) -> Result<Option<MockSequence>, EngineError> {
        let can = !self.script.whole_sequences || len == sequence.seen.len();
        let seen = sequence.seen.get(..len).filter(|_| can);
        Ok(seen.map(|seen| MockSequence {
            seen: seen.to_vec(),
            _alive: Arc::clone(&self.alive),
            ..MockSequence::default()
        }))
    }

    fn forks_anywhere(&self) -> bool {
        !self.script.whole_sequences
    }

    fn batch_limit(&self) -> usize {
        self.script.batch_limit.unwrap_or(1)
    }

    fn feed(&mut self, batch: &mut [Feed<'_, MockSequence>]) -> Result<(), FeedError> {
        #[cfg(test)]
        self.fed.push(
            batch
                .iter()
                .map(|feed| feed.tokens.map_or(1, <[u32]>::len))
                .collect(),
        );
        for (index, feed) in batch.iter().enumerate() {
            for number in (feed.number..).take(feed.choices) {
                self.fault(number).map_err(|error| FeedError {
                    error,
                    culprit: Some(index),
                })?;
            }
        }
        if batch.iter().any(|feed| feed.choices > 0) {
            thread::sleep(self.script.step_delay);
            #[cfg(test)]
            if let Some(pace) = &mut self.pace {
                pace.steps.push(pace.step);
            }
        }
        for feed in batch {
            self.take(feed);
        }
        #[cfg(test)]
        if let Some(pace) = self.pace.as_mut().filter(|pace| pace.eager) {
            pace.run(pace.steps.len());
        }
        Ok(())
    }

    fn can_look_ahead(&self, _sequence: &MockSequence) -> bool {
        true
    }

    fn read(
        &mut self,
        sequence: &mut MockSequence,
        params: &GenerateParams,
        tokens: &[u32],
        _prompt_len: usize,
        mask: &mut dyn FnMut(&mut [f32]),
    ) -> Result<Chosen, EngineError> {
        if sequence.chosen.is_empty() {
            return Err(EngineError::internal("a token was read that nobody chose"));
        }
        #[cfg(test)]
        if let Some(pace) = &mut self.pace {
            pace.run(sequence.begun.remove(0));
        }
        if sequence
            .seen
            .iter()
            .zip(tokens)
            .any(|(seen, token)| seen != token)
        {
            return Err(EngineError::internal(
                "a sequence was fed other tokens than its request has",
            ));
        }
        if params.logprobs {
            return Err(EngineError::unsupported(
                "the mock has no probabilities to report",
            ));
        }
        let mut token = sequence.chosen.remove(0);
        if params.constraint.is_some() {
            // The script's token where it may come, else the first that may.
            let mut logits: Vec<f32> = (0..=END).map(|id| f32::from(u8::from(id == token))).collect();
            mask(&mut logits);
            let allowed = |id: &u32| logits[*id as usize] > f32::NEG_INFINITY;
            let scripted = Some(token).filter(allowed);
            token = scripted.or_else(|| (0..=END).find(allowed)).unwrap_or(END);
        }
        Ok(Chosen {
            token,
            logprob: None,
            top: Vec::new(),
        })
    }

    fn score(
        &mut self,
        _sequence: &mut MockSequence,
        _tokens: &[u32],
        _next: &[u32],
    ) -> Result<Vec<f32>, EngineError> {
        Err(EngineError::unsupported(
            "the mock has no probabilities to score with",
        ))
    }

    fn workspace_bytes(&self, _chunk: usize, _batch: usize) -> u64 {
        self.script.workspace.map_or(0, |(estimated, _)| estimated)
    }

    fn measured_bytes(&self) -> Option<u64> {
        let (_, found) = self.script.workspace?;
        (self.most_seen > 0).then(|| found + self.sequence_bytes(self.most_seen))
    }

    fn identity(&self) -> Option<String> {
        (!self.script.whole_sequences).then(|| "mock".to_owned())
    }

    fn export(&mut self, sequence: &MockSequence, range: Range<usize>) -> Result<Vec<u8>, EngineError> {
        let tokens = sequence.seen.get(range);
        let tokens =
            tokens.ok_or_else(|| EngineError::internal("tokens were to be written that nobody has seen"))?;
        Ok(tokens.iter().flat_map(|token| token.to_le_bytes()).collect())
    }

    fn import(&mut self, blocks: &[Vec<u8>]) -> Result<MockSequence, EngineError> {
        let mut sequence = self.open();
        for block in blocks {
            let (tokens, rest) = block.as_chunks::<4>();
            if !rest.is_empty() {
                return Err(EngineError::internal("a block ends within a token"));
            }
            sequence
                .seen
                .extend(tokens.iter().map(|token| u32::from_le_bytes(*token)));
        }
        Ok(sequence)
    }

    fn sequence_bytes(&self, tokens: usize) -> u64 {
        tokens as u64 * self.script.bytes_per_token.unwrap_or(size_of::<u32>() as u64)
    }

    fn peak_memory_bytes(&self) -> u64 {
        0
    }
}

/// The character that stands for a byte in byte-level vocabularies: OpenAI's table for GPT-2.
fn byte_character(byte: u8) -> Option<char> {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return Some(char::from(byte));
    }
    let before = (0..byte).filter(|&byte| !printable(byte)).count() as u32;
    char::from_u32(256 + before)
}

/// Roles and contents.
const TEMPLATE: &str =
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: ";

/// The mock's tokenizer: a token is a byte.
fn tokenizer(template: &str) -> Result<Tokenizer, TextError> {
    let mut tokens: Vec<String> = (0..=255).filter_map(byte_character).map(String::from).collect();
    tokens.push("<|end|>".to_owned());
    let mut token_types = vec![1; tokens.len()];
    token_types[END as usize] = 3;
    Tokenizer::from_vocabulary(GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        tokens,
        token_types,
        eos: Some(END),
        chat_template: Some(template.to_owned()),
        ..GgufVocabulary::default()
    })
}
