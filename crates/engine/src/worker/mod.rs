//! The thread that owns the model: it does what the scheduler decides.

mod active;
mod command;
mod guesses;
mod maintain;
mod memory;
mod prompts;
mod queue;
mod redo;
mod scoring;
mod speculate;
mod stopwatch;
#[cfg(test)]
mod tests;
mod turn;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::executor::block_on;
use futures::future::{Either, select};
use mlx_engine_core::{Backend, Device, EngineError, ParamError};
use mlx_engine_text::Tokenizer;
use tokio::sync::mpsc;

use self::active::Active;
pub(crate) use self::command::{Command, Maintenance, PrefixCommand};
use self::memory::Memory;
use self::prompts::{MOMENT, Saved};
use self::scoring::Scoring;
use self::speculate::Speculation;
use self::stopwatch::Stopwatch;
use crate::TokenModel;
use crate::clock::Clock;
use crate::config::EngineConfig;
use crate::disk::DiskCache;
use crate::gauges::Gauges;
use crate::prefix::{Known, PrefixCache};
use crate::request::Request;
use crate::scheduler::{Id, Limits, Scheduler};

/// What every answer says of the engine.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) model: Arc<str>,
    pub(crate) backend: Backend,
    pub(crate) device: Device,
    pub(crate) load_s: f64,
    /// Which load it was.
    pub(crate) load: u64,
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
    prefixes: PrefixCache<Known<M::Sequence>>,
    waiting: Vec<(Id, Request)>,
    /// In the order in which they were admitted.
    active: Vec<Active<M::Sequence>>,
    scoring: Scoring<M::Sequence>,
    disk: Option<DiskCache>,
    speculation: Speculation<M>,
    stopwatch: Stopwatch,
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

impl<M: TokenModel, C: Clock> Worker<M, C> {
    pub(crate) fn new(
        (model, draft): (M, Option<M>),
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
        let (memory, limits, kept) = limits(&model, draft.as_ref(), config);
        let speculation = Speculation::new(config, draft, &tokenizer);
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
            speculation,
            stopwatch: Stopwatch::default(),
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
            if self.is_idle() && !self.rest(commands) {
                return;
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
            self.wait_for_disk();
            self.sound = true;
        }
    }

    /// Has written down what was computed, or waits for a command, where nobody waits for an answer. `false` where nobody can send
    /// any and all is written.
    fn rest(&mut self, commands: &mut mpsc::Receiver<Command>) -> bool {
        let room = match self.save() {
            Saved::Some => return true,
            Saved::Nothing => None,
            Saved::Later => self.disk.as_ref().map(DiskCache::room),
        };
        let command = match room {
            None => commands.blocking_recv(),
            Some(room) => match block_on(select(pin!(commands.recv()), pin!(room))) {
                Either::Left((Some(command), _)) => Some(command),
                Either::Left((None, _)) => {
                    // The disk alone is waited for, by who may give that up.
                    std::thread::sleep(MOMENT);
                    return true;
                }
                Either::Right(_) => return true,
            },
        };
        let Some(command) = command else { return false };
        self.accept(command);
        true
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    // Who asked may have gone, and is not told then.
    fn accept(&mut self, command: Command) {
        match command {
            Command::Generate { request, taken } => {
                let _ = taken.send(self.submit(*request));
            }
            Command::Score { tokens, reply } => self.submit_score(tokens, reply),
            Command::Prefixes(command) => self.manage(command),
            Command::Maintain { what, reply } => {
                let done = self.maintain(what);
                self.note();
                let _ = reply.send(done);
            }
        }
    }

    /// Bytes that sequences take.
    fn held(&self) -> u64 {
        let running = self.active.iter().map(|active| self.model.len(&active.sequence));
        let running: u64 = running.map(|len| self.model.sequence_bytes(len)).sum();
        let running = running.saturating_add(self.drafted_bytes());
        let kept = self
            .prefixes
            .bytes()
            .saturating_add(self.scoring.bytes(&self.model));
        running.saturating_add(kept)
    }

    /// Notes what sequences take and, where prompts were fed, corrects what was thought that steps take.
    fn measure(&mut self, fed: bool) {
        if self.memory.available().is_none() {
            return;
        }
        self.memory.hold(self.held());
        if fed {
            self.memory.measure(self.model.measured_bytes());
            self.scheduler.set_available(self.memory.available());
        }
    }

    /// What is only kept makes room for what runs.
    fn make_room(&mut self) {
        if let Some(available) = self.memory.available() {
            let free = available.saturating_sub(self.scheduler.reserved());
            self.prefixes.shrink(free);
        }
    }
}

/// What of the memory is for sequences, what the scheduler keeps to, and the bytes of sequences that are kept.
fn limits<M: TokenModel>(model: &M, draft: Option<&M>, config: &EngineConfig) -> (Memory, Limits, u64) {
    let (memory, prefill_chunk) = Memory::new(model, draft, config);
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

/// Runs a step of the model; a panic in it is an error.
pub(crate) fn guarded<T>(step: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| Err(panicked(&*panic)))
}

pub(crate) fn panicked(panic: &(dyn Any + Send)) -> EngineError {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    EngineError::WorkerPanicked {
        message: text.unwrap_or_else(|| "no message".to_owned()),
    }
}
