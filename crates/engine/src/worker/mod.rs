//! The thread that owns the model: it does what the scheduler decides.

mod active;
mod command;
mod maintain;
mod memory;
mod scoring;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mlx_engine_core::{
    Backend, Device, EngineError, FinishReason, GenerateSummary, GenerationEvent, ParamError,
};
use mlx_engine_text::Tokenizer;
use tokio::sync::mpsc;

use self::active::{Active, forced, read};
pub(crate) use self::command::{Command, Maintenance, PrefixCommand};
use self::memory::Memory;
use self::scoring::Scoring;
use crate::clock::Clock;
use crate::config::EngineConfig;
use crate::disk::DiskCache;
use crate::gauges::Gauges;
use crate::prefix::PrefixCache;
use crate::request::{Answer, Request};
use crate::scheduler::{Admission, Ask, Chunk, Id, Limits, Refusal, Scheduler};
use crate::{Feed, TokenModel};

/// What every answer says of the engine.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) model: Arc<str>,
    pub(crate) backend: Backend,
    pub(crate) device: Device,
    pub(crate) load_s: f64,
}

pub(crate) struct Worker<M: TokenModel, C> {
    model: M,
    tokenizer: Tokenizer,
    identity: Identity,
    clock: C,
    memory: Memory,
    /// The longest sequence, in tokens.
    context_length: usize,
    scheduler: Scheduler,
    prefixes: PrefixCache<M::Sequence>,
    waiting: Vec<(Id, Request)>,
    /// In the order in which they were admitted.
    active: Vec<Active<M::Sequence>>,
    scoring: Scoring<M::Sequence>,
    disk: Option<DiskCache>,
    /// Turns since a chunk was written.
    turns: u32,
    /// Requests so far.
    submitted: Id,
    gauges: Arc<Gauges>,
    /// Whether a turn has come to its end since the worker went on after a panic.
    sound: bool,
}

/// Turns between two chunks that are handed over to be written while there is something else to do.
const TURNS_BETWEEN_CHUNKS: u32 = 16;

/// Requests that an error of this turn ends.
type Failed = Vec<(Id, EngineError)>;

impl<M: TokenModel, C: Clock> Worker<M, C> {
    pub(crate) fn new(
        model: M,
        tokenizer: Tokenizer,
        identity: Identity,
        config: &EngineConfig,
        clock: C,
        gauges: Arc<Gauges>,
    ) -> Result<Self, EngineError> {
        let disk = config.prefix_cache.disk.as_ref();
        let disk = disk.map(|disk| {
            let refused = || {
                ParamError::new(
                    "prefix_cache.disk",
                    "set",
                    "unset, as the model's state cannot be written",
                )
            };
            let identity = model.identity().ok_or_else(refused)?;
            DiskCache::open(disk, &identity)
        });
        let disk = disk.transpose()?;
        let (memory, limits, kept) = limits(&model, config);
        let context_length = config
            .context_length
            .unwrap_or(usize::MAX)
            .min(model.context_length());
        Ok(Self {
            prefixes: PrefixCache::new(kept),
            model,
            tokenizer,
            identity,
            clock,
            memory,
            context_length,
            scheduler: Scheduler::new(limits),
            waiting: Vec::new(),
            active: Vec::new(),
            scoring: Scoring::new(),
            disk,
            turns: 0,
            submitted: 0,
            gauges,
            sound: true,
        })
    }

    /// Serves requests until nobody can send any and all are answered, or until it is told to give them up. A panic that no
    /// step of a request is to blame for ends what runs and not the worker, unless it comes again at once.
    pub(crate) fn run(mut self, mut commands: mpsc::Receiver<Command>, abort: &AtomicBool) {
        while let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.serve(&mut commands, abort))) {
            let error = panicked(&*panic);
            if !self.sound {
                tracing::error!(%error, "the worker panics whatever it does and ends");
                self.fail_all(&error);
                return;
            }
            tracing::error!(%error, "the worker panicked and goes on");
            self.sound = false;
            self.revive(&error);
        }
    }

    fn serve(&mut self, commands: &mut mpsc::Receiver<Command>, abort: &AtomicBool) {
        loop {
            if self.is_idle() && !self.save(true) {
                match commands.blocking_recv() {
                    Some(command) => self.accept(command),
                    None => return,
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.accept(command);
            }
            if abort.load(Ordering::Acquire) {
                // The engine was unloaded: nobody waits for what is left.
                let model = self.identity.model.to_string();
                self.fail_all(&EngineError::NotLoaded { model });
                return;
            }
            self.turn();
            self.sound = true;
        }
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.scoring.is_empty()
    }

    // Who asked may have gone, and is not told then.
    fn accept(&mut self, command: Command) {
        match command {
            Command::Generate { request, taken } => {
                let _ = taken.send(self.submit(*request));
            }
            Command::Score { tokens, reply } => {
                let required = self.model.sequence_bytes(tokens.len());
                let lack = self.memory.available().filter(|&available| required > available);
                if let Some(available) = lack {
                    let error = EngineError::InsufficientMemory { required, available };
                    let _ = reply.send(Err(error));
                } else {
                    let sequence = self.model.open();
                    self.scoring.add(tokens, sequence, reply);
                }
            }
            Command::Prefixes(command) => self.manage(command),
            Command::Maintain { what, reply } => {
                let done = self.maintain(what);
                self.note();
                let _ = reply.send(done);
            }
        }
    }

    fn manage(&mut self, command: PrefixCommand) {
        let Self { model, prefixes, .. } = self;
        match command {
            PrefixCommand::Report(reply) => drop(reply.send(prefixes.report())),
            PrefixCommand::Clear(reply) => drop(reply.send(prefixes.clear())),
            PrefixCommand::Pin { tokens, pinned } => {
                let result = guarded(|| prefixes.pin(model, &tokens)).map(|known| {
                    let lack = || EngineError::InsufficientMemory {
                        required: model.sequence_bytes(tokens.len()),
                        available: prefixes.max_bytes().saturating_sub(prefixes.pinned_bytes()),
                    };
                    (!known).then(lack)
                });
                drop(pinned.send(result));
            }
            PrefixCommand::Unpin { tokens, unpinned } => drop(unpinned.send(prefixes.unpin(&tokens))),
        }
        self.scheduler.set_taken(self.prefixes.pinned_bytes());
        self.make_room();
    }

    /// Puts a request into the queue.
    pub(crate) fn submit(&mut self, request: Request) -> Result<(), EngineError> {
        let context_length = self.context_length;
        let prompt = request.tokens.len();
        if prompt >= context_length {
            return Err(EngineError::PromptTooLong {
                prompt_tokens: prompt as u64,
                context_length: context_length as u64,
            });
        }
        if prompt == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        // Who has gone holds no place.
        self.sweep();
        let answer = (request.params.max_tokens as usize).min(context_length - prompt);
        let limit = |seconds: Option<f64>| Duration::try_from_secs_f64(seconds?).ok();
        let ask = Ask {
            id: self.submitted,
            prompt,
            cuts: self.checkpoints(&request.tokens),
            answer,
            bytes: self.model.sequence_bytes(prompt + answer),
            priority: request.params.priority,
            arrived: request.submitted,
            queue_limit: limit(request.params.queue_timeout_s),
            limit: limit(request.params.timeout_s),
        };
        let id = ask.id;
        self.scheduler.submit(ask).map_err(|refusal| match refusal {
            Refusal::Full { retry_after } => EngineError::QueueFull { retry_after },
            Refusal::TooLarge { required, available } => {
                EngineError::InsufficientMemory { required, available }
            }
        })?;
        self.submitted += 1;
        self.waiting.push((id, request));
        self.note();
        Ok(())
    }

    /// Takes out requests whose caller has gone and those whose time is over.
    fn sweep(&mut self) {
        let gone = |request: &Request| request.events.is_closed();
        let waiting = self
            .waiting
            .iter()
            .filter(|(_, request)| gone(request))
            .map(|(id, _)| *id);
        let active = self
            .active
            .iter()
            .filter(|active| gone(&active.request))
            .map(|active| active.id);
        for id in waiting.chain(active).collect::<Vec<_>>() {
            self.scheduler.cancel(id);
            self.end(id, Self::retire, drop);
        }
        let now = self.clock.now();
        while let Some((id, limit)) = self.scheduler.expire(now) {
            let error = EngineError::DeadlineExceeded { limit };
            let told = error.clone();
            self.end(
                id,
                |worker, active| {
                    let _ = active.request.events.send(Err(error));
                    worker.retire(active);
                },
                |request| {
                    let _ = request.events.send(Err(told));
                },
            );
        }
    }

    /// Takes a request out of where it is.
    fn end(
        &mut self,
        id: Id,
        running: impl FnOnce(&mut Self, Active<M::Sequence>),
        waiting: impl FnOnce(Request),
    ) {
        if let Some(at) = self.waiting.iter().position(|(other, _)| *other == id) {
            waiting(self.waiting.remove(at).1);
        } else if let Some(at) = self.active.iter().position(|active| active.id == id) {
            let active = self.active.remove(at);
            running(self, active);
        }
    }

    /// Where the state of a prompt is kept while it is fed: behind its first and its last message, where a conversation
    /// that begins alike goes another way. None where any state can be had from a later one.
    fn checkpoints(&self, tokens: &[u32]) -> Vec<usize> {
        if self.model.forks_anywhere() {
            return Vec::new();
        }
        let ends = self.tokenizer.eos_ids();
        let behind = |(at, token): (usize, &u32)| ends.contains(token).then_some(at + 1);
        let mut behind = tokens
            .iter()
            .enumerate()
            .filter_map(behind)
            .filter(|&at| at < tokens.len());
        let first = behind.next();
        first.into_iter().chain(behind.next_back()).collect()
    }

    /// Lets requests run for which there is room.
    fn admit(&mut self) {
        while let Some(admission) = self.scheduler.admit() {
            let (Admission::Run(id) | Admission::TooLarge { id, .. }) = admission;
            let Some(at) = self.waiting.iter().position(|(other, _)| *other == id) else {
                self.scheduler.cancel(id);
                continue;
            };
            let (_, request) = self.waiting.remove(at);
            if let Admission::TooLarge {
                required, available, ..
            } = admission
            {
                let error = EngineError::InsufficientMemory { required, available };
                let _ = request.events.send(Err(error));
                continue;
            }
            let sequence = match guarded(|| Ok(self.model.open())) {
                Ok(sequence) => sequence,
                Err(error) => {
                    self.scheduler.cancel(id);
                    let _ = request.events.send(Err(error));
                    continue;
                }
            };
            self.active.push(Active {
                id,
                answer: Answer::new(&self.tokenizer, &request),
                tokens: request.tokens.clone(),
                prompt_len: request.tokens.len(),
                checkpoints: self.checkpoints(&request.tokens),
                request,
                sequence,
                cached: None,
                shared: 0,
                started: self.clock.now(),
                ahead: false,
                finished: None,
            });
        }
        self.make_room();
    }

    /// Corrects what was thought that steps take, now that they were run.
    fn measure(&mut self) {
        let running = self.active.iter().map(|active| self.model.len(&active.sequence));
        let running: u64 = running.map(|len| self.model.sequence_bytes(len)).sum();
        let held = running.saturating_add(self.prefixes.bytes());
        self.memory.measure(self.model.measured_bytes(), held);
        self.scheduler.set_available(self.memory.available());
    }

    /// What is only kept makes room for what runs.
    fn make_room(&mut self) {
        if let Some(available) = self.memory.available() {
            let free = available.saturating_sub(self.scheduler.reserved());
            self.prefixes.shrink(free);
        }
    }

    /// Takes a chunk of a prompt, and every answer a token further.
    pub(crate) fn turn(&mut self) {
        self.sweep();
        self.admit();
        let began = self.clock.now();
        let mut turn = self.scheduler.turn();
        self.gauges.begin(began, turn.decode.len());
        let mut failed = Failed::new();
        if let Some(chunk) = turn.chunk {
            let fed = self.begin(chunk).and_then(|chunk| {
                turn.chunk = Some(chunk);
                self.prefill(chunk)?;
                self.scheduler.fed(chunk);
                Ok(())
            });
            if let Err(error) = fed {
                failed.push((chunk.id, error));
            }
        }
        self.scoring.step(&mut self.model);
        let due = &turn.decode;
        let context_length = self.context_length;
        self.feed(due, &mut failed, |model, active| {
            let more = active.wants_more(context_length);
            let free = active.request.walk.is_none() && !active.answer.may_force(&active.request.params);
            (more && free && model.can_look_ahead(&active.sequence)).then_some(None)
        });
        self.prepare(due, &mut failed);
        let read = self.read(due, &mut failed) + self.force(due, &mut failed);
        self.feed(due, &mut failed, |_, active| {
            let stands = active.finished.is_none() && !active.ahead;
            stands.then(|| active.tokens.last().copied())
        });
        for active in &mut self.active {
            active.ahead = false;
        }
        if turn.chunk.is_some() || !turn.decode.is_empty() {
            self.scheduler
                .turned(&turn, self.clock.now().saturating_duration_since(began));
        }
        if turn.chunk.is_some() {
            self.measure();
        }
        self.gauges.end(read);
        self.take_out(failed);
        self.make_room();
        self.note();
        self.turns += 1;
        if self.turns >= TURNS_BETWEEN_CHUNKS {
            self.turns = 0;
            self.save(false);
        }
    }

    /// Hands a chunk of what was computed over to be written; `false` where there is none, and, unless it may wait, no
    /// place for it.
    fn save(&mut self, wait: bool) -> bool {
        let Self {
            model,
            prefixes,
            disk: Some(disk),
            ..
        } = self
        else {
            return false;
        };
        let Some(piece) = disk.piece() else {
            return false;
        };
        let Some(sequence) = prefixes.with(&piece.tokens) else {
            // It had to make room.
            disk.give_up();
            return true;
        };
        match guarded(|| model.export(sequence, piece.range.clone())) {
            Ok(block) => disk.write(&piece, &block, wait),
            Err(error) => {
                tracing::warn!(%error, "what was computed could not be written");
                disk.give_up();
                true
            }
        }
    }

    /// The beginning of a prompt that is on disk, where that is longer than `known`.
    fn read_disk(&mut self, prompt: &[u32], known: usize) -> Option<(M::Sequence, usize)> {
        let disk = self.disk.as_ref().filter(|disk| disk.known(prompt) > known)?;
        let blocks = disk.load(prompt);
        if blocks.is_empty() {
            return None;
        }
        let model = &mut self.model;
        match guarded(|| model.import(&blocks)) {
            Ok(sequence) => {
                let len = model.len(&sequence);
                (len > known && len <= prompt.len()).then_some((sequence, len))
            }
            Err(error) => {
                tracing::warn!(%error, "what is on disk is of no use and is given up");
                disk.refuse(prompt);
                None
            }
        }
    }

    /// Looks for what is known of a prompt before its first chunk, and says what the chunk is then.
    fn begin(&mut self, chunk: Chunk) -> Result<Chunk, EngineError> {
        let position = |active: &Active<M::Sequence>| active.id == chunk.id && active.cached.is_none();
        let Some(at) = self.active.iter().position(position) else {
            return Ok(chunk);
        };
        // The last token is fed in any case: the logits after it are wanted.
        let active = &self.active[at];
        let prompt = &active.tokens[..active.prompt_len - 1].to_vec();
        let (known, cached) = match guarded(|| self.known(prompt))? {
            Some((sequence, len)) => (Some(sequence), len),
            None => (None, 0),
        };
        let (known, cached, shared) = match self.read_disk(prompt, cached) {
            Some((sequence, len)) => (Some(sequence), len, 0),
            None => (known, cached, cached),
        };
        self.prefixes.count(cached);
        let now = self.clock.now();
        let active = &mut self.active[at];
        if let Some(sequence) = known {
            active.sequence = sequence;
        }
        (active.cached, active.shared, active.started) = (Some(cached), shared, now);
        let event = GenerationEvent::Started {
            prompt_tokens: active.prompt_len as u32,
            cached_tokens: cached as u32,
        };
        let _ = active.request.events.send(Ok(event));
        Ok(self.scheduler.reused(chunk.id, cached).unwrap_or(chunk))
    }

    /// A sequence that has seen as much of a prompt as one that is kept or runs.
    fn known(&mut self, prompt: &[u32]) -> Result<Option<(M::Sequence, usize)>, EngineError> {
        let Self {
            model,
            active,
            prefixes,
            ..
        } = self;
        let begun = active.iter_mut().filter(|active| active.cached.is_some());
        let running = begun
            .map(|active| {
                let alike = active
                    .tokens
                    .iter()
                    .zip(prompt)
                    .take_while(|(a, b)| a == b)
                    .count();
                (alike.min(model.len(&active.sequence)), active)
            })
            .max_by_key(|(len, _)| *len);
        if let Some((len, active)) = running.filter(|(len, _)| *len > prefixes.known(prompt))
            && let Some(fork) = model.fork(&mut active.sequence, len)?
        {
            return Ok(Some((fork, len)));
        }
        prefixes.fork(model, prompt)
    }

    fn prefill(&mut self, chunk: Chunk) -> Result<(), EngineError> {
        let Self {
            model,
            active,
            prefixes,
            ..
        } = self;
        let Some(active) = active.iter_mut().find(|active| active.id == chunk.id) else {
            return Ok(());
        };
        let tokens = &active.tokens[chunk.from..chunk.to];
        let (sequence, params) = (&mut active.sequence, &active.request.params);
        guarded(|| {
            if chunk.last {
                // Its first token is read in the next turn, so that it is chosen meanwhile.
                model.begin(sequence, tokens, params, 0)?;
            } else {
                model.prefill(sequence, tokens)?;
            }
            let kept = active.checkpoints.contains(&chunk.to) || chunk.last && !model.forks_anywhere();
            if kept && let Some(fork) = model.fork(sequence, chunk.to)? {
                prefixes.keep(model, &active.tokens[..chunk.to], fork, active.shared);
            }
            Ok(())
        })
    }

    /// Feeds a token to every answer that is due and for which `token` gives one, `Some(None)` being the one that is not
    /// read yet, as many at once as the model takes.
    fn feed(
        &mut self,
        due: &[Id],
        failed: &mut Failed,
        token: impl Fn(&M, &Active<M::Sequence>) -> Option<Option<u32>>,
    ) {
        let Self { model, active, .. } = self;
        let mut fed = Vec::new();
        for active in standing(active, due, failed) {
            if let Some(token) = token(model, active) {
                fed.push((active, token));
            }
        }
        let mut ended = Failed::new();
        for some in fed.chunks_mut(model.batch_limit().max(1)) {
            let mut batch: Vec<Feed<'_, M::Sequence>> = some
                .iter_mut()
                .map(|(active, token)| {
                    let read = u32::from(token.is_none());
                    Feed {
                        number: (active.answer.generated() + read).into(),
                        sequence: &mut active.sequence,
                        params: &active.request.params,
                        token: *token,
                    }
                })
                .collect();
            match guarded(|| model.feed(&mut batch)) {
                Ok(()) => some.iter_mut().for_each(|(active, _)| active.ahead = true),
                // The step was theirs together.
                Err(error) => ended.extend(some.iter().map(|(active, _)| (active.id, error.clone()))),
            }
        }
        failed.append(&mut ended);
    }

    /// Finds out what may come, of every answer that is due and held to a grammar: while the device computes.
    fn prepare(&mut self, due: &[Id], failed: &mut Failed) {
        let mut ended = Failed::new();
        for active in standing(&mut self.active, due, failed) {
            if let Some(walk) = &mut active.request.walk
                && let Err(error) = guarded(|| walk.prepare())
            {
                ended.push((active.id, error));
            }
        }
        failed.append(&mut ended);
    }

    /// Takes the tokens that need no choice behind those that were read, feeds them in one step, and says how many they were.
    fn force(&mut self, due: &[Id], failed: &mut Failed) -> usize {
        self.generate(due, failed, |model, active, context_length, clock| {
            if active.finished.is_some() || active.ahead {
                return Ok(0);
            }
            let forced = forced(active, context_length, clock)?;
            if forced > 0 && active.finished.is_none() {
                let fed = model.len(&active.sequence);
                let (params, number) = (&active.request.params, active.answer.generated().into());
                model.begin(&mut active.sequence, &active.tokens[fed..], params, number)?;
                active.ahead = true;
            }
            Ok(forced)
        })
    }

    /// Reads a token of every answer that is due, and says of how many that went well.
    fn read(&mut self, due: &[Id], failed: &mut Failed) -> usize {
        self.generate(due, failed, |model, active, context_length, clock| {
            active.finished = read(model, active, context_length, clock)?;
            Ok(1)
        })
    }

    /// Lets every answer that is due get some tokens, and says how many they were. What fails ends its own request.
    fn generate(
        &mut self,
        due: &[Id],
        failed: &mut Failed,
        mut tokens_of: impl FnMut(&mut M, &mut Active<M::Sequence>, usize, &C) -> Result<usize, EngineError>,
    ) -> usize {
        let Self {
            model,
            active,
            scheduler,
            clock,
            context_length,
            ..
        } = self;
        let (mut sum, mut ended) = (0, Failed::new());
        for active in standing(active, due, failed) {
            match guarded(|| tokens_of(model, active, *context_length, clock)) {
                Ok(tokens) => {
                    (0..tokens).for_each(|_| scheduler.generated(active.id));
                    sum += tokens;
                }
                Err(error) => ended.push((active.id, error)),
            }
        }
        failed.append(&mut ended);
        sum
    }

    /// Takes out requests that have failed or finished.
    fn take_out(&mut self, mut failed: Failed) {
        let mut index = 0;
        while index < self.active.len() {
            let id = self.active[index].id;
            let error = failed
                .iter()
                .position(|(other, _)| *other == id)
                .map(|at| failed.swap_remove(at).1);
            let finished = self.active[index].finished;
            if error.is_none() && finished.is_none() {
                index += 1;
                continue;
            }
            // In order, so that who came first stays first.
            let active = self.active.remove(index);
            if let Some(error) = error {
                // Its memory goes with it: what it holds may be half written.
                tracing::warn!(error = %error, model = %self.identity.model, "request failed");
                if matches!(error, EngineError::OutOfMemory) {
                    self.prefixes.clear();
                }
                self.scheduler.cancel(id);
                // What is written down is true when the caller hears of the end.
                self.note();
                let _ = active.request.events.send(Err(error));
            } else if let Some(reason) = finished {
                self.scheduler.finish(id);
                self.note();
                self.finish(active, reason);
            }
        }
    }

    fn finish(&mut self, active: Active<M::Sequence>, finish_reason: FinishReason) {
        let usage = active
            .answer
            .usage(active.prompt_len, active.cached.unwrap_or_default());
        let summary = GenerateSummary {
            model: self.identity.model.to_string(),
            backend: self.identity.backend,
            device: self.identity.device,
            finish_reason,
            usage,
            timings: active.answer.timings(self.identity.load_s, active.started, usage),
            peak_memory_bytes: self.model.peak_memory_bytes(),
        };
        let _ = active.request.events.send(Ok(GenerationEvent::Finished(summary)));
        self.retire(active);
    }

    /// Keeps what a request has computed.
    fn retire(&mut self, active: Active<M::Sequence>) {
        let Active {
            mut sequence,
            mut tokens,
            shared,
            ..
        } = active;
        // A step that looked ahead was fed a token that the answer does not have.
        tokens.truncate(self.model.len(&sequence));
        if self.model.truncate(&mut sequence, tokens.len()) {
            self.prefixes.keep(&self.model, &tokens, sequence, shared);
            if let Some(disk) = &mut self.disk {
                disk.note(&tokens);
            }
        }
    }
}

/// What of the memory is for sequences, what the scheduler keeps to, and the bytes of sequences that are kept.
fn limits<M: TokenModel>(model: &M, config: &EngineConfig) -> (Memory, Limits, u64) {
    let (memory, prefill_chunk) = Memory::new(model, config);
    let available = memory.available();
    let limits = Limits {
        max_batch: config.max_batch,
        max_queue: config.max_queue,
        prefill_chunk,
        available,
    };
    let kept = config.prefix_cache.max_bytes;
    let kept = kept.or(available.map(|bytes| bytes / 4)).unwrap_or(1 << 30);
    (memory, limits, kept)
}

/// Those of the requests that are due and have not failed.
fn standing<'a, S>(
    active: &'a mut [Active<S>],
    due: &'a [Id],
    failed: &'a Failed,
) -> impl Iterator<Item = &'a mut Active<S>> {
    active
        .iter_mut()
        .filter(|active| due.contains(&active.id) && failed.iter().all(|(id, _)| *id != active.id))
}

/// Runs a step of the model; a panic in it is an error.
fn guarded<T>(step: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| Err(panicked(&*panic)))
}

pub(crate) fn panicked(panic: &(dyn Any + Send)) -> EngineError {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    EngineError::WorkerPanicked {
        message: text.unwrap_or_else(|| "no message".to_owned()),
    }
}
