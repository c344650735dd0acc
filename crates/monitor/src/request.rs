//! One request, watched from its submission to its end.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use mlx_engine_core::{EngineError, EventStream, GenerateSummary, GenerationEvent};

use crate::emit::Telemetry;
use crate::shared::{Seen, Shared, seconds};
use crate::tally::{Ended, Outcome, Work};
use crate::{ErrorClass, ErrorKind};

/// A request in flight. However it ends, it is counted once; dropping it is the caller's cancelling.
#[derive(Debug)]
pub(crate) struct Ticket {
    shared: Arc<Shared>,
    telemetry: Telemetry,
    submitted: Duration,
    /// When it started, and how many tokens of prompt were to be computed.
    started: Option<(Duration, u64)>,
    first_token: Option<Duration>,
    last_token: Option<Duration>,
    /// Tokens delivered so far, and how many of them came with the first.
    delivered: u64,
    delivered_first: u64,
    running: u64,
    waiting: bool,
    /// Whether the caller ever waited.
    waited: bool,
    ended: bool,
}

impl Ticket {
    pub(crate) fn submit(shared: &Arc<Shared>, seen: &Seen, telemetry: Telemetry) -> Self {
        let submitted = shared.now();
        shared.submit(submitted, seen);
        Self {
            shared: Arc::clone(shared),
            telemetry,
            submitted,
            started: None,
            first_token: None,
            last_token: None,
            delivered: 0,
            delivered_first: 0,
            running: 0,
            waiting: false,
            waited: false,
            ended: false,
        }
    }

    /// Runs what the engine does for it on the caller's thread.
    pub(crate) fn scope<T>(&self, run: impl FnOnce() -> T) -> T {
        self.telemetry.scope(run)
    }

    /// The caller asked, and there is nothing yet.
    pub(crate) fn wait(&mut self) {
        if !self.waiting && !self.ended {
            (self.waiting, self.waited) = (true, true);
            self.shared.wait();
        }
    }

    /// The engine answered something.
    pub(crate) fn hear(&mut self) -> Duration {
        let now = self.shared.now();
        self.shared.hear(now, std::mem::take(&mut self.waiting));
        now
    }

    /// The request was not taken. Where nobody had to wait to hear so, it was found on the caller's side, as that too many wait
    /// already, and says nothing of what the engine works on.
    pub(crate) fn refuse(&mut self, error: &EngineError) {
        let kind = ErrorKind::of(error);
        self.fail(kind, self.waited && kind.class() != ErrorClass::Caller);
    }

    /// It ends with an error, which is a sign of life or not.
    fn fail(&mut self, kind: ErrorKind, heard: bool) {
        let now = if heard {
            self.hear()
        } else {
            if std::mem::take(&mut self.waiting) {
                self.shared.excuse();
            }
            self.shared.now()
        };
        self.end(now, Outcome::Failed(kind), None);
    }

    fn observe(&mut self, item: Option<&Result<GenerationEvent, EngineError>>) {
        let event = match item {
            Some(Ok(event)) => event,
            Some(Err(error)) => {
                let kind = ErrorKind::of(error);
                // What the caller did wrong is found before the engine's work begins.
                return self.fail(kind, kind.class() != ErrorClass::Caller);
            }
            None => {
                let now = self.hear();
                return self.end(now, Outcome::Failed(ErrorKind::Incomplete), None);
            }
        };
        let now = self.hear();
        match event {
            GenerationEvent::Started {
                prompt_tokens,
                cached_tokens,
            } if self.started.is_none() => {
                let (prompt, cached) = (u64::from(*prompt_tokens), u64::from(*cached_tokens));
                self.started = Some((now, prompt.saturating_sub(cached)));
                let queued = now.saturating_sub(self.submitted);
                self.running = self.shared.start(now, prompt, cached, queued);
            }
            GenerationEvent::Finished(summary) => {
                self.end(now, Outcome::Finished(summary.finish_reason), Some(summary));
            }
            event if !event.tokens().is_empty() => {
                let tokens = event.tokens().len() as u64;
                if self.first_token.is_none() {
                    self.first_token = Some(now);
                    self.delivered_first = tokens;
                }
                self.last_token = Some(now);
                self.delivered += tokens;
                self.shared.deliver(tokens);
            }
            _ => {}
        }
    }

    fn end(&mut self, now: Duration, outcome: Outcome, summary: Option<&GenerateSummary>) {
        self.ended = true;
        let seen_first = self.first_token.map(|first| first.saturating_sub(self.submitted));
        let mut ended = Ended {
            outcome,
            generated_tokens: self.delivered,
            late_prompt: None,
            duration: now.saturating_sub(self.submitted),
            time_to_first_token: seen_first,
            prefill: Work::default(),
            decode: Work::default(),
            running: self.running,
            peak_memory_bytes: 0,
        };
        if let Some(summary) = summary {
            let usage = summary.usage;
            let (prompt, cached) = (u64::from(usage.prompt_tokens), u64::from(usage.cached_tokens));
            let generated = u64::from(usage.completion_tokens);
            // A counter must not go back, so that what was delivered stays counted.
            ended.generated_tokens = self.delivered.max(generated);
            ended.late_prompt = self.started.is_none().then_some((prompt, cached));
            ended.time_to_first_token = seconds(summary.timings.ttft_s).or(seen_first);
            ended.prefill = at_rate(prompt.saturating_sub(cached), summary.timings.prompt_tps)
                .unwrap_or_else(|| self.prefill());
            ended.decode = at_rate(generated.saturating_sub(1), summary.timings.generation_tps)
                .unwrap_or_else(|| self.decode());
            ended.peak_memory_bytes = summary.peak_memory_bytes;
        }
        let started = self.started.is_some();
        self.shared
            .end(now, ended, started, self.delivered, summary, &self.telemetry);
    }

    /// Prefill as the caller saw it.
    fn prefill(&self) -> Work {
        let (Some((started, tokens)), Some(first)) = (self.started, self.first_token) else {
            return Work::default();
        };
        Work::of_request(tokens, first.saturating_sub(started))
    }

    /// Decoding as the caller saw it.
    fn decode(&self) -> Work {
        let (Some(first), Some(last)) = (self.first_token, self.last_token) else {
            return Work::default();
        };
        Work::of_request(self.delivered - self.delivered_first, last.saturating_sub(first))
    }
}

/// Tokens at the rate that the engine measured, if it did.
fn at_rate(tokens: u64, tokens_per_second: f64) -> Option<Work> {
    let time = seconds(tokens as f64 / tokens_per_second)?;
    Some(Work::of_request(tokens, time))
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let now = self.shared.now();
        if self.waiting {
            self.shared.give_up(now);
        }
        self.end(now, Outcome::Dropped, None);
    }
}

/// The events of a request on their way to the caller.
pub(crate) struct Observed {
    pub(crate) events: EventStream,
    pub(crate) ticket: Ticket,
}

impl Stream for Observed {
    type Item = Result<GenerationEvent, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { events, ticket } = &mut *self;
        let poll = ticket.scope(|| events.poll_next_unpin(cx));
        match &poll {
            // What an engine says after the end is its own affair.
            _ if self.ticket.ended => {}
            Poll::Pending => self.ticket.wait(),
            Poll::Ready(item) => self.ticket.observe(item.as_ref()),
        }
        poll
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.events.size_hint()
    }
}
