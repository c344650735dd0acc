//! The counts themselves: over the whole life of an engine, and over a rolling window of it.

use std::collections::BTreeMap;
use std::time::Duration;

use mlx_engine_core::FinishReason;

use crate::histogram::Histogram;
use crate::metrics::{FinishCounts, Statistics, Throughput};
use crate::{ErrorClass, ErrorKind};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Finished(FinishReason),
    Failed(ErrorKind),
    /// The caller dropped it.
    Dropped,
}

/// Tokens and the time that they took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) requests: u64,
    pub(crate) tokens: u64,
    pub(crate) time: Duration,
}

impl Work {
    /// The work of one request, or none where there were no tokens or where they took no time that could be measured.
    pub(crate) fn of_request(tokens: u64, time: Duration) -> Self {
        if tokens == 0 || time.is_zero() {
            return Self::default();
        }
        Self {
            requests: 1,
            tokens,
            time,
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.tokens += other.tokens;
        self.time = self.time.saturating_add(other.time);
    }

    pub(crate) fn tokens_per_second(self) -> Option<f64> {
        (!self.time.is_zero()).then(|| self.tokens as f64 / self.time.as_secs_f64())
    }

    pub(crate) fn time_per_token(self) -> Option<Duration> {
        (self.tokens > 0).then(|| self.time.div_f64(self.tokens as f64))
    }

    fn throughput(self) -> Throughput {
        Throughput {
            tokens: self.tokens,
            seconds: self.time.as_secs_f64(),
            tokens_per_second: self.tokens_per_second(),
        }
    }
}

/// Levels of concurrency that are told apart when speeds are compared: 1, 2, 3 to 4, 5 to 8, 9 to 16, more.
pub(crate) const LEVELS: usize = 6;

/// The level of as many running requests. A request decodes slower beside others, and that is no fault.
pub(crate) fn level(running: u64) -> usize {
    let doublings = u64::BITS - running.saturating_sub(1).leading_zeros();
    (doublings as usize).min(LEVELS - 1)
}

/// What is known of a request when it ends.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) generated_tokens: u64,
    /// Tokens of the prompt and cached ones, where `Started` did not say so before.
    pub(crate) late_prompt: Option<(u64, u64)>,
    pub(crate) duration: Duration,
    pub(crate) time_to_first_token: Option<Duration>,
    pub(crate) prefill: Work,
    pub(crate) decode: Work,
    /// The most requests that ran beside it when it started or ended, itself included.
    pub(crate) running: u64,
    pub(crate) peak_memory_bytes: u64,
}

/// Everything that is counted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) submitted: u64,
    pub(crate) started: u64,
    pub(crate) finished: FinishCounts,
    pub(crate) errors: BTreeMap<ErrorKind, u64>,
    pub(crate) cancelled: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) generated_tokens: u64,
    pub(crate) prefill: Work,
    pub(crate) decode: Work,
    /// The same decoding by the level of concurrency.
    pub(crate) decode_at: [Work; LEVELS],
    pub(crate) peak_memory_bytes: u64,
    pub(crate) generation_time: Histogram,
    pub(crate) queue_time: Histogram,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) time_per_output_token: Histogram,
}

impl Tally {
    pub(crate) fn start(&mut self, prompt_tokens: u64, cached_tokens: u64, queued: Duration) {
        self.started += 1;
        self.prompt(prompt_tokens, cached_tokens);
        self.queue_time.record(queued);
    }

    fn prompt(&mut self, prompt_tokens: u64, cached_tokens: u64) {
        self.prompt_tokens += prompt_tokens;
        self.cached_tokens += cached_tokens;
    }

    pub(crate) fn end(&mut self, ended: &Ended) {
        match ended.outcome {
            Outcome::Finished(reason) => {
                self.finished.count(reason);
                self.generation_time.record(ended.duration);
            }
            Outcome::Failed(kind) => *self.errors.entry(kind).or_default() += 1,
            Outcome::Dropped => self.cancelled += 1,
        }
        if let Some((prompt_tokens, cached_tokens)) = ended.late_prompt {
            self.prompt(prompt_tokens, cached_tokens);
        }
        self.generated_tokens += ended.generated_tokens;
        if let Some(time) = ended.time_to_first_token {
            self.time_to_first_token.record(time);
        }
        if let Some(time) = ended.decode.time_per_token() {
            self.time_per_output_token.record(time);
        }
        self.prefill.add(ended.prefill);
        self.decode.add(ended.decode);
        self.decode_at[level(ended.running)].add(ended.decode);
        self.peak_memory_bytes = self.peak_memory_bytes.max(ended.peak_memory_bytes);
    }

    fn merge(&mut self, other: &Self) {
        self.submitted += other.submitted;
        self.started += other.started;
        self.finished.add(other.finished);
        for (&kind, &count) in &other.errors {
            *self.errors.entry(kind).or_default() += count;
        }
        self.cancelled += other.cancelled;
        self.prompt(other.prompt_tokens, other.cached_tokens);
        self.generated_tokens += other.generated_tokens;
        self.prefill.add(other.prefill);
        self.decode.add(other.decode);
        for (mine, &theirs) in self.decode_at.iter_mut().zip(&other.decode_at) {
            mine.add(theirs);
        }
        self.peak_memory_bytes = self.peak_memory_bytes.max(other.peak_memory_bytes);
        self.generation_time.merge(&other.generation_time);
        self.queue_time.merge(&other.queue_time);
        self.time_to_first_token.merge(&other.time_to_first_token);
        self.time_per_output_token.merge(&other.time_per_output_token);
    }

    /// Empties it and keeps the memory of the histograms.
    fn clear(&mut self) {
        let mut empty = Self {
            generation_time: std::mem::take(&mut self.generation_time),
            queue_time: std::mem::take(&mut self.queue_time),
            time_to_first_token: std::mem::take(&mut self.time_to_first_token),
            time_per_output_token: std::mem::take(&mut self.time_per_output_token),
            ..Self::default()
        };
        empty.generation_time.clear();
        empty.queue_time.clear();
        empty.time_to_first_token.clear();
        empty.time_per_output_token.clear();
        *self = empty;
    }

    /// Requests that failed by an error of this class.
    pub(crate) fn failed(&self, class: ErrorClass) -> u64 {
        let of_class = self.errors.iter().filter(|(kind, _)| kind.class() == class);
        of_class.map(|(_, count)| count).sum()
    }

    pub(crate) fn statistics(&self) -> Statistics {
        Statistics {
            submitted: self.submitted,
            started: self.started,
            finished: self.finished,
            errors: self.errors.clone(),
            cancelled: self.cancelled,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            generated_tokens: self.generated_tokens,
            cache_hit_rate: (self.prompt_tokens > 0)
                .then(|| (self.cached_tokens as f64 / self.prompt_tokens as f64).min(1.0)),
            prefill: self.prefill.throughput(),
            decode: self.decode.throughput(),
            peak_memory_bytes: self.peak_memory_bytes,
            generation_time: self.generation_time.distribution(),
            queue_time: self.queue_time.distribution(),
            time_to_first_token: self.time_to_first_token.distribution(),
            time_per_output_token: self.time_per_output_token.distribution(),
        }
    }
}

/// Parts of the window. What is counted leaves the window part by part.
pub(crate) const PARTS: u64 = 12;

/// The latest counts. Time is cut into parts of a twelfth of the window's length; the window is the part that now is in and
/// the eleven before it.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    part: Duration,
    /// The number of the part of time, and what was counted in it.
    parts: Vec<(u64, Tally)>,
}

impl Window {
    pub(crate) fn new(length: Duration) -> Self {
        let part = Duration::from_nanos((length.as_nanos() / u128::from(PARTS)).max(1) as u64);
        Self {
            part,
            parts: vec![(0, Tally::default()); PARTS as usize],
        }
    }

    fn number(&self, now: Duration) -> u64 {
        u64::try_from(now.as_nanos() / self.part.as_nanos()).unwrap_or(u64::MAX)
    }

    /// The counts of the part that `now` is in.
    pub(crate) fn at(&mut self, now: Duration) -> &mut Tally {
        let number = self.number(now);
        let (held, tally) = &mut self.parts[(number % PARTS) as usize];
        // Two threads may come in the other order than they read the clock, by less than the window.
        if *held < number {
            *held = number;
            tally.clear();
        }
        tally
    }

    /// The parts that are in the window.
    pub(crate) fn parts(&self, now: Duration) -> impl Iterator<Item = &Tally> {
        let number = self.number(now);
        let inside = move |held: u64| held <= number && number - held < PARTS;
        self.parts
            .iter()
            .filter(move |(held, _)| inside(*held))
            .map(|(_, tally)| tally)
    }

    pub(crate) fn statistics(&self, now: Duration) -> Statistics {
        let mut sum = Tally::default();
        for tally in self.parts(now) {
            sum.merge(tally);
        }
        sum.statistics()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_double() {
        let levels = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, u64::MAX].map(level);
        assert_eq!(levels, [0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
    }

    #[test]
    fn the_window_forgets_part_by_part() {
        let mut window = Window::new(Duration::from_mins(1));
        let at = Duration::from_secs;
        window.at(at(0)).submitted += 1;
        window.at(at(9)).submitted += 2;
        let submitted = |window: &Window, now| window.statistics(now).submitted;
        assert_eq!(submitted(&window, at(9)), 3);
        assert_eq!(submitted(&window, at(59)), 3);
        assert_eq!(submitted(&window, at(60)), 2);
        assert_eq!(submitted(&window, at(64)), 2);
        assert_eq!(submitted(&window, at(65)), 0);
        // A part is used again for what comes a window later.
        window.at(at(61)).submitted += 5;
        assert_eq!(submitted(&window, at(61)), 7);
    }

    #[test]
    fn a_window_takes_any_time() {
        let mut window = Window::new(Duration::ZERO);
        window.at(Duration::MAX).submitted += 1;
        assert_eq!(window.statistics(Duration::MAX).submitted, 1);
        assert_eq!(window.statistics(Duration::ZERO).submitted, 0);
    }

    #[test]
    fn work_without_time_is_no_speed() {
        assert_eq!(Work::of_request(5, Duration::ZERO), Work::default());
        assert_eq!(Work::default().tokens_per_second(), None);
        assert_eq!(Work::default().time_per_token(), None);
        let work = Work::of_request(5, Duration::from_secs(2));
        assert_eq!(work.tokens_per_second(), Some(2.5));
        assert_eq!(work.time_per_token(), Some(Duration::from_millis(400)));
    }
}
