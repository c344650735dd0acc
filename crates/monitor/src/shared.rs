//! What all requests of an engine write to and every report reads from.
//!
//! The lock is taken three times in the life of a request: when it is submitted, started and ended. What happens for every
//! piece of text is atomic. No lock is held across an await.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mlx_engine_core::{Backend, EngineStatistics, GenerateSummary, LlmEngine, ModelConfiguration};

use crate::clock::nanos;
use crate::emit::{self, Look, Telemetry};
use crate::events::{HealthEvent, HealthEvents, Subscribers};
use crate::histogram::Histogram;
use crate::metrics::{InferenceMetrics, LastGeneration, ProbeCounts};
use crate::report::{LastFailure, LastProbe};
use crate::tally::{Ended, LEVELS, Outcome, Tally, Window, level};
use crate::verdict::{Facts, assess};
use crate::{
    Clock, EngineHealth, ErrorClass, ErrorKind, HealthConfiguration, HealthReport, ProbeFailure, memory,
};

/// What an engine says that it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) backend: Option<Backend>,
    pub(crate) model: Option<Arc<ModelConfiguration>>,
    /// What it says of its inside.
    pub(crate) statistics: Option<EngineStatistics>,
    /// Why it is not what was asked for.
    pub(crate) fallback: Option<String>,
    /// Whether it is in a process of its own.
    pub(crate) apart: bool,
}

impl Seen {
    /// What an engine says now.
    pub(crate) fn of(engine: &impl LlmEngine) -> Self {
        Self {
            backend: engine.backend(),
            model: engine.model(),
            statistics: engine.statistics(),
            fallback: engine.fallback_reason(),
            apart: engine.is_apart(),
        }
    }

    fn loaded(&self) -> bool {
        self.backend.is_some() && self.model.is_some()
    }

    pub(crate) fn model_id(&self) -> Option<&str> {
        self.model.as_ref().map(|model| model.id.as_str())
    }

    /// Resident memory of the process that the engine is in: its own, which it does not tell while there is none, or this one.
    fn process_memory_bytes(&self) -> Option<u64> {
        if self.apart {
            self.statistics.and_then(|engine| engine.process_memory_bytes)
        } else {
            memory::resident_bytes()
        }
    }

    /// Whether what was loaded before is loaded still.
    fn continues(&self, before: &Self) -> bool {
        self.backend == before.backend && self.model_id() == before.model_id() && self.load() == before.load()
    }

    /// Which load it is of, where it says so.
    fn load(&self) -> u64 {
        self.statistics.map(|engine| engine.load).unwrap_or_default()
    }
}

/// What came of a probe.
#[derive(Clone, Copy, Debug)]
struct Probe {
    at: Duration,
    failure: Option<ProbeFailure>,
    finished_since: u64,
}

#[derive(Debug)]
struct State {
    seen: Seen,
    total: Tally,
    window: Window,
    queued: u64,
    running: u64,
    load_time: Option<Duration>,
    last: Option<LastGeneration>,
    probes: ProbeCounts,
    probe: Option<Probe>,
    consecutive_failures: u32,
    last_success: Option<Duration>,
    last_failure: Option<(Duration, ErrorKind)>,
    /// Time per output token since the model was loaded, by the level of concurrency.
    baseline: [Histogram; LEVELS],
    process_memory_bytes: Option<u64>,
    published: EngineHealth,
    subscribers: Subscribers,
}

#[derive(Debug)]
pub(crate) struct Shared {
    clock: Arc<dyn Clock>,
    began: Duration,
    limits: HealthConfiguration,
    /// Tokens that requests in flight have delivered.
    streaming_tokens: AtomicU64,
    /// Requests whose caller waits for the engine, and not the engine for its caller.
    waiting: AtomicU64,
    /// Nanoseconds at which the silence began that lasts while somebody waits.
    silent_since: AtomicU64,
    /// Nanoseconds of silence before everyone who waited gave up. A hung engine is found out even if each of its
    /// callers loses patience soon.
    silence_before: AtomicU64,
    state: Mutex<State>,
}

impl Shared {
    pub(crate) fn new(
        clock: Arc<dyn Clock>,
        limits: HealthConfiguration,
        load_time: Option<Duration>,
        seen: Seen,
    ) -> Self {
        let now = clock.now();
        let mut state = State {
            seen,
            total: Tally::default(),
            window: Window::new(seconds(limits.window_s).unwrap_or_default()),
            queued: 0,
            running: 0,
            load_time,
            last: None,
            probes: ProbeCounts::default(),
            probe: None,
            consecutive_failures: 0,
            last_success: None,
            last_failure: None,
            baseline: Default::default(),
            process_memory_bytes: None,
            published: EngineHealth::default(),
            subscribers: Subscribers::default(),
        };
        state.published = assess(&state.facts(Duration::ZERO, &limits), &limits).status;
        Self {
            clock,
            began: now,
            limits,
            streaming_tokens: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            silent_since: AtomicU64::new(0),
            silence_before: AtomicU64::new(0),
            state: Mutex::new(state),
        }
    }

    /// The time since monitoring began.
    pub(crate) fn now(&self) -> Duration {
        self.clock.now().saturating_sub(self.began)
    }

    pub(crate) fn limits(&self) -> &HealthConfiguration {
        &self.limits
    }

    pub(crate) fn subscribe(&self) -> HealthEvents {
        self.lock().subscribers.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and tells who listens if that changed the health.
    fn change<T>(&self, now: Duration, change: impl FnOnce(&mut State) -> T) -> (T, HealthReport) {
        let mut state = self.lock();
        let result = change(&mut state);
        let report = self.assess(&state, now);
        state.publish(&report, now);
        (result, report)
    }

    fn assess(&self, state: &State, now: Duration) -> HealthReport {
        let mut facts = state.facts(now, &self.limits);
        facts.waiting = self.waiting.load(Ordering::Relaxed);
        let silence = if facts.waiting > 0 {
            nanos(now).saturating_sub(self.silent_since.load(Ordering::Relaxed))
        } else {
            self.silence_before.load(Ordering::Relaxed)
        };
        facts.silent_s = Duration::from_nanos(silence).as_secs_f64();
        assess(&facts, &self.limits)
    }

    /// The health now, given what the engine says that it is.
    pub(crate) fn health(&self, seen: &Seen) -> HealthReport {
        let memory = self.limits.process_memory_limit_bytes.is_some() || emit::LOOKS_ARE_TOLD;
        let resident = if memory { seen.process_memory_bytes() } else { None };
        let now = self.now();
        let look = |state: &mut State| {
            state.see(seen.clone());
            state.process_memory_bytes = resident;
            Look {
                queued: state.queued,
                running: state.running,
                uptime_s: now.as_secs_f64(),
                load_time_s: state.load_time_s(seen),
                process_memory_bytes: resident,
            }
        };
        let (look, report) = self.change(now, look);
        emit::looked(&look, &report, seen);
        report
    }

    /// Somebody begins to wait for the engine.
    pub(crate) fn wait(&self) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) == 0 {
            let before = self.silence_before.load(Ordering::Relaxed);
            let since = nanos(self.now()).saturating_sub(before);
            self.silent_since.fetch_max(since, Ordering::Relaxed);
        }
    }

    /// The engine gave a sign of life, to one who waited or not.
    pub(crate) fn hear(&self, now: Duration, waited: bool) {
        self.silent_since.fetch_max(nanos(now), Ordering::Relaxed);
        self.silence_before.store(0, Ordering::Relaxed);
        if waited {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Somebody hears that what was asked for cannot be, which the engine need not have been asked for.
    pub(crate) fn excuse(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// Somebody gives up waiting.
    pub(crate) fn give_up(&self, now: Duration) {
        let silence = nanos(now).saturating_sub(self.silent_since.load(Ordering::Relaxed));
        if self.waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.silence_before.store(silence, Ordering::Relaxed);
        }
    }

    /// Tokens of a request in flight were delivered.
    pub(crate) fn deliver(&self, tokens: u64) {
        self.streaming_tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    pub(crate) fn submit(&self, now: Duration, seen: &Seen) {
        let (queued, running) = self
            .change(now, |state| {
                state.see(seen.clone());
                state.queued += 1;
                state.total.submitted += 1;
                state.window.at(now).submitted += 1;
                (state.queued, state.running)
            })
            .0;
        emit::in_flight(queued, running, seen);
    }

    /// Returns how many requests run now.
    pub(crate) fn start(&self, now: Duration, prompt: u64, cached: u64, queued: Duration) -> u64 {
        let mut state = self.lock();
        state.queued = state.queued.saturating_sub(1);
        state.running += 1;
        state.total.start(prompt, cached, queued);
        state.window.at(now).start(prompt, cached, queued);
        state.running
    }

    /// A request is over. `delivered` are the tokens that were given to [`deliver`](Self::deliver) on its behalf.
    pub(crate) fn end(
        &self,
        now: Duration,
        mut ended: Ended,
        started: bool,
        delivered: u64,
        summary: Option<&GenerateSummary>,
        telemetry: &Telemetry,
    ) {
        let ((seen, queued, running), _) = self.change(now, |state| {
            if started {
                ended.running = ended.running.max(state.running);
                state.running = state.running.saturating_sub(1);
            } else {
                state.queued = state.queued.saturating_sub(1);
            }
            self.streaming_tokens.fetch_sub(delivered, Ordering::Relaxed);
            if let (Outcome::Finished(_), Some(engine)) = (ended.outcome, &mut state.seen.statistics) {
                // The turn that it was at when it was asked last is over.
                engine.turn_s = None;
            }
            state.end(now, &ended, summary);
            (state.seen.clone(), state.queued, state.running)
        });
        emit::in_flight(queued, running, &seen);
        telemetry.end(&ended, summary, &seen);
    }

    pub(crate) fn probed(&self, now: Duration, took: Duration, failure: Option<ProbeFailure>, seen: Seen) {
        let patience = seconds(self.limits.probe_patience_s).unwrap_or_default();
        if failure.is_none() {
            self.hear(now, false);
        }
        self.change(now, |state| {
            state.see(seen);
            let conclusive = match failure {
                None => {
                    state.probes.passed += 1;
                    state.consecutive_failures = 0;
                    state.last_success = Some(now);
                    true
                }
                Some(ProbeFailure::Abandoned { .. }) => {
                    state.probes.abandoned += 1;
                    took >= patience
                }
                Some(_) => {
                    state.probes.failed += 1;
                    true
                }
            };
            if conclusive {
                state.probe = Some(Probe {
                    at: now,
                    failure,
                    finished_since: 0,
                });
            }
        });
    }

    pub(crate) fn metrics(&self, seen: &Seen) -> InferenceMetrics {
        let process_memory_bytes = seen.process_memory_bytes();
        let now = self.now();
        let state = self.lock();
        let mut total = state.total.statistics();
        total.generated_tokens += self.streaming_tokens.load(Ordering::Relaxed);
        InferenceMetrics {
            model: seen.model_id().map(str::to_owned),
            backend: seen.backend,
            uptime_s: now.as_secs_f64(),
            load_time_s: state.load_time_s(seen),
            queued: state.queued,
            running: state.running,
            engine: seen.statistics,
            process_memory_bytes,
            last: state.last,
            probes: state.probes,
            total,
            window_s: self.limits.window_s,
            window: state.window.statistics(now),
        }
    }

    pub(crate) fn history(&self) -> History {
        let now = self.now();
        let ago = |at: Duration| now.saturating_sub(at).as_secs_f64();
        let state = self.lock();
        History {
            consecutive_failures: state.consecutive_failures,
            last_success_s_ago: state.last_success.map(ago),
            last_failure: state
                .last_failure
                .map(|(at, kind)| LastFailure { s_ago: ago(at), kind }),
            last_probe: state.probe.map(|probe| LastProbe {
                s_ago: ago(probe.at),
                failure: probe.failure,
            }),
        }
    }
}

/// What happened when.
pub(crate) struct History {
    pub(crate) consecutive_failures: u32,
    pub(crate) last_success_s_ago: Option<f64>,
    pub(crate) last_failure: Option<LastFailure>,
    pub(crate) last_probe: Option<LastProbe>,
}

impl State {
    /// Takes note of what the engine is. A model that was not there before begins with a clean record.
    fn see(&mut self, seen: Seen) {
        if let Some(engine) = seen.statistics {
            // One that was loaded since begins to count anew.
            let before = self.seen.statistics.filter(|before| before.load == engine.load);
            let before = before.map(|before| before.batch_sizes).unwrap_or_default();
            emit::batched(&engine.batch_sizes.since(&before), &seen);
        }
        if !seen.continues(&self.seen) && seen.loaded() {
            self.consecutive_failures = 0;
            self.probe = None;
            self.load_time = None;
            self.baseline.iter_mut().for_each(Histogram::clear);
        }
        self.seen = seen;
    }

    /// Seconds that the load took, as the engine or the program says.
    fn load_time_s(&self, seen: &Seen) -> Option<f64> {
        let told = seen.statistics.and_then(|engine| engine.load_s);
        told.or(self.load_time.map(|time| time.as_secs_f64()))
    }

    fn end(&mut self, now: Duration, ended: &Ended, summary: Option<&GenerateSummary>) {
        self.total.end(ended);
        self.window.at(now).end(ended);
        match ended.outcome {
            Outcome::Finished(finish_reason) => {
                self.consecutive_failures = 0;
                self.last_success = Some(now);
                if let Some(probe) = &mut self.probe {
                    probe.finished_since += 1;
                }
                if let Some(time) = ended.decode.time_per_token() {
                    self.baseline[level(ended.running)].record(time);
                }
                if let Some(summary) = summary {
                    self.load_time = seconds(summary.timings.load_s).or(self.load_time);
                    self.last = Some(LastGeneration {
                        duration_s: ended.duration.as_secs_f64(),
                        time_to_first_token_s: ended.time_to_first_token.map(|time| time.as_secs_f64()),
                        prefill_tokens_per_second: ended.prefill.tokens_per_second(),
                        decode_tokens_per_second: ended.decode.tokens_per_second(),
                        finish_reason,
                        usage: summary.usage,
                        peak_memory_bytes: summary.peak_memory_bytes,
                    });
                }
            }
            Outcome::Failed(kind) => {
                self.last_failure = Some((now, kind));
                if kind.class() == ErrorClass::Fault {
                    self.consecutive_failures = self.consecutive_failures.saturating_add(1);
                }
            }
            Outcome::Dropped => {}
        }
    }

    fn facts(&self, now: Duration, limits: &HealthConfiguration) -> Facts {
        let mut facts = Facts {
            loaded: self.seen.loaded(),
            mock: self
                .seen
                .model_id()
                .filter(|_| self.seen.backend == Some(Backend::Mock))
                .map(str::to_owned),
            probe: self
                .probe
                .and_then(|probe| Some((probe.failure?, probe.finished_since))),
            consecutive_failures: self.consecutive_failures,
            last_failure: self.last_failure.map(|(_, kind)| kind),
            fallback: self.seen.fallback.clone(),
            process_memory_bytes: self.process_memory_bytes,
            turn_s: self
                .seen
                .statistics
                .and_then(|engine| engine.turn_s)
                .unwrap_or_default(),
            ..Facts::default()
        };
        let mut peak = 0;
        let mut decode = [crate::tally::Work::default(); LEVELS];
        for part in self.window.parts(now) {
            facts.finished += part.finished.total();
            facts.faults += part.failed(ErrorClass::Fault);
            facts.refused += part.failed(ErrorClass::Capacity);
            facts.out_of_memory += part.errors.get(&ErrorKind::OutOfMemory).copied().unwrap_or(0);
            peak = peak.max(part.peak_memory_bytes);
            for (sum, &work) in decode.iter_mut().zip(&part.decode_at) {
                sum.add(work);
            }
        }
        // A peak is that of the process' life, and would never be over.
        let allocated = self.seen.statistics.and_then(|engine| engine.memory);
        facts.device_memory_bytes = allocated.map_or(peak, |memory| memory.active_bytes);
        let compared = decode.iter().zip(&self.baseline).filter_map(|(work, baseline)| {
            let enough = work.requests >= u64::from(limits.min_requests)
                && baseline.count() >= u64::from(limits.baseline_requests);
            let usual = baseline.quantile(500).filter(|time| enough && !time.is_zero())?;
            Some((work.tokens_per_second()?, usual.as_secs_f64().recip()))
        });
        facts.decode = compared.min_by(|one, other| (one.0 / one.1).total_cmp(&(other.0 / other.1)));
        facts
    }

    fn publish(&mut self, report: &HealthReport, now: Duration) {
        if report.status == self.published {
            return;
        }
        let event = HealthEvent {
            at_s: now.as_secs_f64(),
            from: self.published,
            to: report.status,
            reasons: report.reasons.clone(),
            missed: 0,
        };
        self.published = report.status;
        emit::changed(&event);
        self.subscribers.publish(event);
    }
}

/// A measured time in seconds; what is not above 0, not finite or too long to hold was not measured.
pub(crate) fn seconds(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|time| !time.is_zero())
}
