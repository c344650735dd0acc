//! What the worker writes down of itself while it works, for everybody to read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use mlx_engine_core::{BatchSizes, EngineStatistics};

/// Numbers of the worker. They are written by its thread alone, a few stores a turn, and read by any.
#[derive(Debug)]
pub(crate) struct Gauges {
    origin: Instant,
    /// Nanoseconds from the origin to when the turn that runs began, and 1; 0 between turns.
    turn_since: AtomicU64,
    queued: AtomicU64,
    running: AtomicU64,
    batch_size: AtomicU64,
    batch_classes: [AtomicU64; BatchSizes::CLASSES],
    batched_answers: AtomicU64,
    turns: AtomicU64,
    generated_tokens: AtomicU64,
    drafted_tokens: AtomicU64,
    accepted_tokens: AtomicU64,
    kv_reserved_bytes: AtomicU64,
    prefix_cache_bytes: AtomicU64,
    prefix_cache_sequences: AtomicU64,
    weight_bytes: AtomicU64,
    redone_steps: AtomicU64,
    worker_restarts: AtomicU64,
}

/// What there is between two turns.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    pub(crate) queued: usize,
    pub(crate) running: usize,
    pub(crate) kv_reserved_bytes: u64,
    pub(crate) prefix_cache_bytes: u64,
    pub(crate) prefix_cache_sequences: usize,
}

impl Gauges {
    pub(crate) fn new(origin: Instant) -> Self {
        Self {
            origin,
            turn_since: AtomicU64::new(0),
            queued: AtomicU64::new(0),
            running: AtomicU64::new(0),
            batch_size: AtomicU64::new(0),
            batch_classes: Default::default(),
            batched_answers: AtomicU64::new(0),
            turns: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            drafted_tokens: AtomicU64::new(0),
            accepted_tokens: AtomicU64::new(0),
            kv_reserved_bytes: AtomicU64::new(0),
            prefix_cache_bytes: AtomicU64::new(0),
            prefix_cache_sequences: AtomicU64::new(0),
            weight_bytes: AtomicU64::new(0),
            redone_steps: AtomicU64::new(0),
            worker_restarts: AtomicU64::new(0),
        }
    }

    /// The model is there.
    pub(crate) fn loaded(&self, weight_bytes: u64) {
        self.weight_bytes.store(weight_bytes, Ordering::Relaxed);
    }

    /// A turn begins.
    pub(crate) fn begin(&self, now: Instant) {
        let since = now.saturating_duration_since(self.origin).as_nanos() as u64;
        self.turn_since.store(since.saturating_add(1), Ordering::Relaxed);
    }

    /// The turn takes so many answers further.
    pub(crate) fn batch(&self, answers: usize) {
        let answers = answers as u64;
        if let Some(class) = BatchSizes::class(answers) {
            self.batch_size.store(answers, Ordering::Relaxed);
            self.batch_classes[class].fetch_add(1, Ordering::Relaxed);
            self.batched_answers.fetch_add(answers, Ordering::Relaxed);
        }
    }

    /// The turn is over, in which so many tokens were read.
    pub(crate) fn end(&self, tokens: usize) {
        self.turn_since.store(0, Ordering::Relaxed);
        self.turns.fetch_add(1, Ordering::Relaxed);
        self.generated_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// The worker goes on after a panic.
    pub(crate) fn restarted(&self) {
        self.turn_since.store(0, Ordering::Relaxed);
        self.worker_restarts.fetch_add(1, Ordering::Relaxed);
    }

    /// A step is run again for one answer alone.
    pub(crate) fn redone(&self) {
        self.redone_steps.fetch_add(1, Ordering::Relaxed);
    }

    /// So many guesses were verified, and so many of them were right.
    pub(crate) fn verified(&self, drafted: u64, accepted: u64) {
        self.drafted_tokens.fetch_add(drafted, Ordering::Relaxed);
        self.accepted_tokens.fetch_add(accepted, Ordering::Relaxed);
    }

    pub(crate) fn load(&self, load: Load) {
        let store = |to: &AtomicU64, value: u64| to.store(value, Ordering::Relaxed);
        store(&self.queued, load.queued as u64);
        store(&self.running, load.running as u64);
        store(&self.kv_reserved_bytes, load.kv_reserved_bytes);
        store(&self.prefix_cache_bytes, load.prefix_cache_bytes);
        store(&self.prefix_cache_sequences, load.prefix_cache_sequences as u64);
    }

    /// What is known at this moment. The memory of the device is not known here.
    pub(crate) fn read(&self, now: Instant) -> EngineStatistics {
        let read = |from: &AtomicU64| from.load(Ordering::Relaxed);
        let now = now.saturating_duration_since(self.origin).as_nanos() as u64;
        let since = read(&self.turn_since).checked_sub(1);
        EngineStatistics {
            queued: read(&self.queued),
            running: read(&self.running),
            batch_size: read(&self.batch_size),
            batch_sizes: BatchSizes {
                turns: self.batch_classes.each_ref().map(read),
                answers: read(&self.batched_answers),
            },
            turns: read(&self.turns),
            generated_tokens: read(&self.generated_tokens),
            drafted_tokens: read(&self.drafted_tokens),
            accepted_tokens: read(&self.accepted_tokens),
            turn_s: since.map(|since| now.saturating_sub(since) as f64 / 1e9),
            kv_reserved_bytes: read(&self.kv_reserved_bytes),
            prefix_cache_bytes: read(&self.prefix_cache_bytes),
            prefix_cache_sequences: read(&self.prefix_cache_sequences),
            weight_bytes: read(&self.weight_bytes),
            redone_steps: read(&self.redone_steps),
            worker_restarts: read(&self.worker_restarts),
            memory: None,
            process_memory_bytes: None,
            load: 0,
            load_s: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_turn_that_does_not_end_is_seen_from_outside() {
        let origin = Instant::now();
        let gauges = Gauges::new(origin);
        let at = |seconds| origin + Duration::from_secs(seconds);
        assert_eq!(gauges.read(at(1)).turn_s, None);
        gauges.begin(at(1));
        gauges.batch(3);
        assert_eq!(gauges.read(at(1)).turn_s, Some(0.0));
        assert_eq!(gauges.read(at(61)).turn_s, Some(60.0));
        gauges.end(3);
        gauges.begin(at(62));
        gauges.batch(0);
        gauges.end(0);
        let read = gauges.read(at(70));
        assert_eq!((read.turn_s, read.turns, read.generated_tokens), (None, 2, 3));
        assert_eq!(read.batch_size, 3, "a turn of prompts alone has no batch");
        let sizes = read.batch_sizes;
        assert_eq!((sizes.turns[2], sizes.count(), sizes.answers), (1, 1, 3));
    }
}
