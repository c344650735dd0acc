//! What runs when: the decisions of the worker, without the model, the clock and the callers.
//!
//! A request waits, is fed its prompt in chunks, has its answer decoded, and is gone. All that the scheduler knows of it
//! are numbers; the worker asks it what to do and tells it what was done. It has no clock: whoever asks says what time
//! it is, so that every decision can be repeated.

mod rates;

use std::time::{Duration, Instant};

use mlx_engine_core::Priority;

use self::rates::Rates;
pub(crate) use self::rates::Steps;

/// Tells requests apart. Numbers are given in the order in which requests come.
pub(crate) type Id = u64;

/// How much earlier a request counts for each step of priority: one that has waited this much longer comes before what
/// is one step more urgent.
const AGEING: Duration = Duration::from_secs(10);

/// Tokens of a text that are scored at once; the logits of each are kept until they are read.
pub(crate) const SCORED_AT_ONCE: usize = 128;

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// An answer to a prompt, of so many tokens at most; at least 1.
    Answer(usize),
    /// How likely the tokens of the prompt are.
    Score,
}

/// What the scheduler keeps to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Requests that run at the same time.
    pub(crate) max_batch: usize,
    /// Requests that wait beside as many as a batch has.
    pub(crate) max_queue: usize,
    /// Tokens of prompts that are fed at once; at least 1.
    pub(crate) prefill_chunk: usize,
    /// Bytes for the sequences of all that run; no limit where `None`.
    pub(crate) available: Option<u64>,
}

/// What a request asks for, in numbers.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) id: Id,
    /// Tokens of its prompt; at least 1.
    pub(crate) prompt: usize,
    /// Positions in the prompt at which a chunk has to end, in order.
    pub(crate) cuts: Vec<usize>,
    pub(crate) work: Work,
    /// The most bytes that its sequence comes to take.
    pub(crate) bytes: u64,
    pub(crate) priority: Priority,
    /// When it was submitted.
    pub(crate) arrived: Instant,
    /// How long it may wait.
    pub(crate) queue_limit: Option<Duration>,
    /// How long it may take in all.
    pub(crate) limit: Option<Duration>,
}

/// Why a request is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// As many wait as may.
    Full { retry_after: Duration },
    /// It would not fit if it ran alone.
    TooLarge { required: u64, available: u64 },
}

/// What becomes of the request that waits first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It runs from now on.
    Run(Id),
    /// It would not fit if it ran alone, as memory was taken since it came. It is gone.
    TooLarge { id: Id, required: u64, available: u64 },
}

/// Tokens of one prompt that are fed in a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) id: Id,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Whether the prompt ends here, so that the first token of the answer is begun.
    pub(crate) last: bool,
}

/// What a turn does: chunks of prompts and of texts that are scored, which together are no longer than one chunk may be, so
/// that no answer waits for more, and a token of each answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    /// By rank.
    pub(crate) chunks: Vec<Chunk>,
    /// Parts of texts that are scored, by rank: each is a step of its own.
    pub(crate) scored: Vec<Chunk>,
    /// In the order in which they were admitted.
    pub(crate) decode: Vec<Id>,
}

#[derive(Debug)]
struct Running {
    ask: Ask,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nobody has looked up yet what is known of the prompt.
    Admitted,
    /// Some of what is known of the prompt is being read.
    Reading,
    /// As many tokens of the prompt of another are its own too, and it waits until that one has been fed them.
    Behind { other: Id, tokens: usize },
    /// So many tokens of the prompt have been fed.
    Prefilling(usize),
    /// So many tokens of the answer have been read.
    Decoding(usize),
    /// So many tokens of the text have been scored.
    Scoring(usize),
}

/// All requests that are not over.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    /// The first to come is the first.
    waiting: Vec<Ask>,
    /// In the order in which they were admitted.
    running: Vec<Running>,
    rates: Rates,
    /// Bytes that something else has taken of those that are available.
    taken: u64,
}

impl Phase {
    /// Whether the request has not come to its turn.
    fn waits(self) -> bool {
        matches!(self, Self::Admitted | Self::Reading | Self::Behind { .. })
    }
}

impl Chunk {
    /// Tokens that are fed.
    fn len(&self) -> usize {
        self.to - self.from
    }
}

impl Ask {
    /// The order in which requests come to their turn. It does not change while they wait, and a request can only be
    /// overtaken by those that come within two steps of [`AGEING`] after it: none waits for ever.
    fn rank(&self) -> (Instant, Id) {
        let steps = match self.priority {
            Priority::High => 0,
            Priority::Normal => 1,
            Priority::Low => 2,
        };
        (self.arrived + AGEING * steps, self.id)
    }

    /// What of a text is scored next, at most `room` tokens.
    fn scored(&self, from: usize, room: usize) -> Chunk {
        self.chunk(from, room.min(SCORED_AT_ONCE))
    }

    /// What a prompt is fed next, at most `room` tokens.
    fn chunk(&self, from: usize, room: usize) -> Chunk {
        let cut = self
            .cuts
            .iter()
            .copied()
            .find(|&cut| cut > from)
            .unwrap_or(self.prompt);
        let to = cut.min(self.prompt).min(from.saturating_add(room));
        Chunk {
            id: self.id,
            from,
            to,
            last: to == self.prompt,
        }
    }

    /// The limit that is exceeded, if one is.
    fn exceeded(&self, waits: bool, now: Instant) -> Option<Duration> {
        let spent = now.saturating_duration_since(self.arrived);
        let queue_limit = self.queue_limit.filter(|_| waits);
        // The total first: who is told of it need not try with a longer wait.
        [self.limit, queue_limit]
            .into_iter()
            .flatten()
            .find(|limit| spent >= *limit)
    }
}

impl Scheduler {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: Vec::new(),
            running: Vec::new(),
            rates: Rates::default(),
            taken: 0,
        }
    }

    /// Says how many of the bytes that are available something else has taken.
    pub(crate) fn set_taken(&mut self, bytes: u64) {
        self.taken = bytes;
    }

    /// Says how many bytes there are for the sequences of all that run.
    pub(crate) fn set_available(&mut self, bytes: Option<u64>) {
        self.limits.available = bytes;
    }

    /// Bytes for those that run.
    fn available(&self) -> Option<u64> {
        let available = self.limits.available?;
        Some(available.saturating_sub(self.taken))
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Bytes that the sequences of all that run may come to take.
    pub(crate) fn reserved(&self) -> u64 {
        self.running
            .iter()
            .fold(0, |sum, running| sum.saturating_add(running.ask.bytes))
    }

    /// Puts a request into the queue.
    pub(crate) fn submit(&mut self, ask: Ask) -> Result<(), Refusal> {
        if let Some(available) = self.available().filter(|&available| ask.bytes > available) {
            return Err(Refusal::TooLarge {
                required: ask.bytes,
                available,
            });
        }
        let Limits {
            max_batch, max_queue, ..
        } = self.limits;
        if self.waiting.len() + self.running.len() >= max_batch.saturating_add(max_queue) {
            return Err(Refusal::Full {
                retry_after: self.retry_after(),
            });
        }
        let at = self.waiting.partition_point(|other| other.rank() < ask.rank());
        self.waiting.insert(at, ask);
        Ok(())
    }

    /// Takes the first request out whose time is over, and says which limit it has exceeded. It waits for its turn until its
    /// prompt is begun.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<(Id, Duration)> {
        let waiting = self.waiting.iter().map(|ask| (ask, true));
        let running = self.running.iter();
        let running = running.map(|running| (&running.ask, running.phase.waits()));
        let (id, limit) = waiting
            .chain(running)
            .find_map(|(ask, waits)| Some((ask.id, ask.exceeded(waits, now)?)))?;
        self.remove(id);
        Some((id, limit))
    }

    /// Lets the first request run that waits, where there is a place and memory for it. Those behind it wait for it:
    /// a large request would never come to its turn otherwise.
    pub(crate) fn admit(&mut self) -> Option<Admission> {
        let first = self.waiting.first()?;
        let (id, required) = (first.id, first.bytes);
        let available = self.available().unwrap_or(u64::MAX);
        if required > available {
            self.waiting.remove(0);
            return Some(Admission::TooLarge {
                id,
                required,
                available,
            });
        }
        let fits = self.reserved().saturating_add(required) <= available;
        if !fits || self.running.len() >= self.limits.max_batch {
            return None;
        }
        let ask = self.waiting.remove(0);
        let phase = match ask.work {
            Work::Answer(_) => Phase::Admitted,
            Work::Score => Phase::Scoring(0),
        };
        self.running.push(Running { ask, phase });
        Some(Admission::Run(id))
    }

    /// The first request that would be fed in the next turn and of whose prompt nobody has looked up what is known. Before a
    /// [`turn`](Self::turn) there is none: each becomes [`reused`](Self::reused) or [waits](Self::wait_behind).
    pub(crate) fn unknown(&self) -> Option<Id> {
        let mut room = self.limits.prefill_chunk;
        for running in self.ranked() {
            if room == 0 {
                break;
            }
            match running.phase {
                Phase::Admitted => return Some(running.ask.id),
                Phase::Behind { other, tokens } if !self.is_fed_later(other, tokens) => {
                    return Some(running.ask.id);
                }
                Phase::Prefilling(fed) => room -= running.ask.chunk(fed, room).len(),
                Phase::Scoring(scored) => room -= running.ask.scored(scored, room).len(),
                Phase::Reading | Phase::Behind { .. } | Phase::Decoding(_) => {}
            }
        }
        None
    }

    /// Has a request wait until what is known of it [was read](Self::has_read).
    pub(crate) fn wait_for_disk(&mut self, id: Id) {
        self.enter(id, Phase::Reading);
    }

    /// Notes that what is known of a request was read, or will not be.
    pub(crate) fn has_read(&mut self, id: Id) {
        self.enter(id, Phase::Admitted);
    }

    /// Whether there is nothing to do before something was read, and nothing else that would come to its turn.
    pub(crate) fn waits_for_disk(&self) -> bool {
        let reads = self.running.iter().any(|running| running.phase == Phase::Reading);
        reads && self.unknown().is_none() && self.turn() == Turn::default()
    }

    /// Those whose prompts are fed before that of a request, by rank, and how much of each has been; nothing of one that waits
    /// for the disk.
    pub(crate) fn fed_before(&self, id: Id) -> Vec<(Id, usize)> {
        let ranked = self.ranked();
        let before = ranked.iter().take_while(|running| running.ask.id != id);
        before
            .filter_map(|running| match running.phase {
                Phase::Prefilling(fed) => Some((running.ask.id, fed)),
                Phase::Reading => Some((running.ask.id, 0)),
                Phase::Admitted | Phase::Behind { .. } | Phase::Decoding(_) | Phase::Scoring(_) => None,
            })
            .collect()
    }

    /// Has a request wait until one of [those before it](Self::fed_before) has been fed so many tokens, or is gone.
    pub(crate) fn wait_behind(&mut self, id: Id, other: Id, tokens: usize) {
        self.enter(id, Phase::Behind { other, tokens });
    }

    /// Whether a prompt will have been fed so many tokens, and has not yet.
    fn is_fed_later(&self, id: Id, tokens: usize) -> bool {
        let running = self.running.iter().find(|running| running.ask.id == id);
        running.is_some_and(|running| match running.phase {
            Phase::Reading => true,
            Phase::Prefilling(fed) => fed < tokens,
            Phase::Admitted | Phase::Behind { .. } | Phase::Decoding(_) | Phase::Scoring(_) => false,
        })
    }

    /// Those that run, in the order in which their prompts are fed.
    fn ranked(&self) -> Vec<&Running> {
        let mut ranked: Vec<&Running> = self.running.iter().collect();
        ranked.sort_by_key(|running| running.ask.rank());
        ranked
    }

    /// What to do next.
    pub(crate) fn turn(&self) -> Turn {
        let mut room = self.limits.prefill_chunk;
        let (mut chunks, mut scored) = (Vec::new(), Vec::new());
        for running in self.ranked() {
            if room == 0 {
                break;
            }
            let (chunk, to) = match running.phase {
                Phase::Prefilling(fed) => (running.ask.chunk(fed, room), &mut chunks),
                Phase::Scoring(done) => (running.ask.scored(done, room), &mut scored),
                Phase::Admitted | Phase::Reading | Phase::Behind { .. } | Phase::Decoding(_) => continue,
            };
            room -= chunk.len();
            to.push(chunk);
        }
        let decoding = |running: &&Running| matches!(running.phase, Phase::Decoding(_));
        Turn {
            chunks,
            scored,
            decode: self
                .running
                .iter()
                .filter(decoding)
                .map(|running| running.ask.id)
                .collect(),
        }
    }

    /// Notes that the beginning of a prompt need not be computed.
    pub(crate) fn reused(&mut self, id: Id, tokens: usize) {
        if let Some(running) = self.running.iter_mut().find(|running| running.ask.id == id) {
            // The last token is fed in any case: the logits after it are wanted.
            running.phase = Phase::Prefilling(tokens.min(running.ask.prompt - 1));
        }
    }

    /// Notes that a chunk was fed.
    pub(crate) fn fed(&mut self, chunk: Chunk) {
        let phase = if chunk.last {
            Phase::Decoding(0)
        } else {
            Phase::Prefilling(chunk.to)
        };
        self.enter(chunk.id, phase);
    }

    /// Notes that a part of a text was scored. The last of it is the end of the request.
    pub(crate) fn scored(&mut self, chunk: Chunk) {
        if chunk.last {
            self.finish(chunk.id);
        } else {
            self.enter(chunk.id, Phase::Scoring(chunk.to));
        }
    }

    /// Notes that a token of an answer was read.
    pub(crate) fn generated(&mut self, id: Id) {
        let running = self.running.iter_mut().find(|running| running.ask.id == id);
        if let Some(Running {
            phase: Phase::Decoding(tokens),
            ..
        }) = running
        {
            *tokens += 1;
        }
    }

    /// Notes how long steps took.
    pub(crate) fn took(&mut self, steps: Steps) {
        self.rates.took(steps);
    }

    /// How long it would take to feed so many tokens of a prompt, by what was measured.
    pub(crate) fn prefill_time(&self, tokens: usize) -> Duration {
        self.rates.prefill(tokens)
    }

    /// Takes a request out that ended by itself, and remembers how long its answer was.
    pub(crate) fn finish(&mut self, id: Id) {
        if let Some(Phase::Decoding(tokens)) = self.remove(id) {
            self.rates.answered(tokens);
        }
    }

    /// Takes a request out, wherever it is.
    pub(crate) fn cancel(&mut self, id: Id) {
        self.remove(id);
    }

    /// Takes all out that run.
    pub(crate) fn cancel_running(&mut self) {
        self.running.clear();
    }

    /// Keeps to other limits from now on. What runs beyond them goes on.
    pub(crate) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    fn enter(&mut self, id: Id, phase: Phase) {
        if let Some(running) = self.running.iter_mut().find(|running| running.ask.id == id) {
            running.phase = phase;
        }
    }

    fn remove(&mut self, id: Id) -> Option<Phase> {
        self.waiting.retain(|ask| ask.id != id);
        let at = self.running.iter().position(|running| running.ask.id == id)?;
        // In order, so that who came first stays first.
        Some(self.running.remove(at).phase)
    }

    /// When a place is likely to be free: when the first of those that run has ended, by what was measured so far.
    fn retry_after(&self) -> Duration {
        let mut ahead = 0;
        let ends = self.ranked().into_iter().map(|running| {
            let (prompt, generated) = match running.phase {
                Phase::Admitted | Phase::Reading | Phase::Behind { .. } => (running.ask.prompt, 0),
                Phase::Prefilling(fed) | Phase::Scoring(fed) => (running.ask.prompt - fed, 0),
                Phase::Decoding(generated) => (0, generated),
            };
            let answer = match running.ask.work {
                Work::Answer(most) => most,
                Work::Score => 0,
            };
            // What comes before it is fed before it.
            ahead += prompt;
            let prompt = if prompt > 0 { ahead } else { 0 };
            self.rates.remaining(prompt, generated, answer)
        });
        ends.min().unwrap_or_else(|| self.rates.remaining(0, 0, 1))
    }
}

#[cfg(test)]
mod tests;
