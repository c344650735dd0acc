//! The metrics are what an independent count of the same requests gives.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::support::{Script, Scripted, Step, idle, started, summary, text};
use futures::FutureExt;
use futures::StreamExt;
use futures::executor::block_on;
use futures::future::BoxFuture;
use mlx_engine_core::{
    Backend, EngineError, EventStream, FinishReason, GenerateParams, GenerationEvent, LlmEngine, Prompt,
};
use mlx_engine_monitor::{
    Distribution, ErrorKind, HealthConfiguration, InferenceMetrics, ManualClock, Monitored, Statistics,
};
use proptest::prelude::*;

/// What the caller of a request saw, and when.
#[derive(Clone, Debug)]
enum Saw {
    Submitted,
    Started {
        prompt: u64,
        cached: u64,
        waited: Duration,
    },
    Ended(End),
}

#[derive(Clone, Debug, Default)]
struct End {
    finished: Option<FinishReason>,
    error: Option<ErrorKind>,
    tokens: u64,
    /// Tokens of the prompt and cached ones that `Started` had not said.
    prompt: u64,
    cached: u64,
    took: Duration,
    first_token: Option<f64>,
    peak: u64,
}

/// One request in flight.
struct Request<'a> {
    admission: Option<BoxFuture<'a, Result<EventStream, EngineError>>>,
    events: Option<EventStream>,
    submitted: Duration,
    started: bool,
    tokens: u64,
    first_token: Option<Duration>,
}

#[derive(Debug, Clone)]
enum Act {
    Submit(Script),
    /// One poll of the request of this number, modulo those in flight.
    Poll(usize),
    Drop(usize),
    Advance(Duration),
}

struct Run<'a> {
    engine: &'a Monitored<Arc<Scripted>>,
    clock: ManualClock,
    now: Duration,
    flying: Vec<Request<'a>>,
    log: Vec<(Duration, Saw)>,
}

impl Run<'_> {
    fn act(&mut self, act: Act) {
        match act {
            Act::Submit(script) => {
                self.engine.engine().next(script);
                let admission = self.engine.stream(Prompt::text("x"), GenerateParams::default());
                self.flying.push(Request {
                    admission: Some(admission),
                    events: None,
                    submitted: self.now,
                    started: false,
                    tokens: 0,
                    first_token: None,
                });
                self.log.push((self.now, Saw::Submitted));
                self.poll(self.flying.len() - 1);
            }
            Act::Poll(at) if !self.flying.is_empty() => self.poll(at % self.flying.len()),
            Act::Drop(at) if !self.flying.is_empty() => {
                let request = self.flying.remove(at % self.flying.len());
                let end = self.end(&request);
                self.log.push((self.now, Saw::Ended(end)));
            }
            Act::Advance(by) => {
                self.clock.advance(by);
                self.now += by;
            }
            Act::Poll(_) | Act::Drop(_) => {}
        }
    }

    fn end(&self, request: &Request<'_>) -> End {
        End {
            tokens: request.tokens,
            took: self.now.saturating_sub(request.submitted),
            first_token: request.first_token.map(|time| time.as_secs_f64()),
            ..End::default()
        }
    }

    fn poll(&mut self, at: usize) {
        let mut request = self.flying.remove(at);
        let fail = |run: &mut Self, request: &Request<'_>, kind| {
            let error = Some(kind);
            let end = End {
                error,
                ..run.end(request)
            };
            run.log.push((run.now, Saw::Ended(end)));
        };
        if let Some(admission) = &mut request.admission {
            match admission.poll_unpin(&mut idle()) {
                Poll::Pending => {}
                Poll::Ready(Ok(events)) => {
                    request.admission = None;
                    request.events = Some(events);
                }
                Poll::Ready(Err(error)) => return fail(self, &request, ErrorKind::of(&error)),
            }
        } else if let Some(events) = &mut request.events {
            match events.poll_next_unpin(&mut idle()) {
                Poll::Pending => {}
                Poll::Ready(None) => return fail(self, &request, ErrorKind::Incomplete),
                Poll::Ready(Some(Err(error))) => return fail(self, &request, ErrorKind::of(&error)),
                Poll::Ready(Some(Ok(event))) => {
                    if self.take(&mut request, event) {
                        return;
                    }
                }
            }
        }
        self.flying.insert(at, request);
    }

    /// Takes note of an event; true where it was the last.
    fn take(&mut self, request: &mut Request<'_>, event: GenerationEvent) -> bool {
        match event {
            GenerationEvent::Started {
                prompt_tokens,
                cached_tokens,
            } => {
                request.started = true;
                let saw = Saw::Started {
                    prompt: prompt_tokens.into(),
                    cached: cached_tokens.into(),
                    waited: self.now.saturating_sub(request.submitted),
                };
                self.log.push((self.now, saw));
            }
            GenerationEvent::Text { tokens, .. } if !tokens.is_empty() => {
                request
                    .first_token
                    .get_or_insert(self.now.saturating_sub(request.submitted));
                request.tokens += tokens.len() as u64;
            }
            GenerationEvent::Finished(summary) => {
                let mut end = self.end(request);
                end.finished = Some(summary.finish_reason);
                end.tokens = end.tokens.max(summary.usage.completion_tokens.into());
                if !request.started {
                    end.prompt = summary.usage.prompt_tokens.into();
                    end.cached = summary.usage.cached_tokens.into();
                }
                if summary.timings.ttft_s > 0.0 {
                    end.first_token = Some(summary.timings.ttft_s);
                }
                end.peak = summary.peak_memory_bytes;
                self.log.push((self.now, Saw::Ended(end)));
                return true;
            }
            _ => {}
        }
        false
    }

    fn check(&self) {
        let metrics = self.engine.metrics();
        let mut all = expected(self.log.iter().map(|(_, saw)| saw));
        all.generated_tokens += self.flying.iter().map(|request| request.tokens).sum::<u64>();
        compare(&metrics.total, &all);
        let part = Duration::from_secs(5).as_nanos();
        let oldest = (self.now.as_nanos() / part).saturating_sub(11) * part;
        let recent = self.log.iter().filter(|(at, _)| at.as_nanos() >= oldest);
        compare(&metrics.window, &expected(recent.map(|(_, saw)| saw)));
        let running = self.flying.iter().filter(|request| request.started).count() as u64;
        assert_eq!(
            (metrics.running, metrics.in_flight()),
            (running, self.flying.len() as u64)
        );
        assert_eq!(
            metrics.total.submitted,
            metrics.in_flight() + metrics.total.ended()
        );
        let json = serde_json::to_string(&metrics).expect("as the test sets it up");
        assert_eq!(
            serde_json::from_str::<InferenceMetrics>(&json)
                .expect("as the test sets it up")
                .total
                .errors,
            all.errors
        );
    }
}

/// The count, one by one.
fn expected<'a>(log: impl Iterator<Item = &'a Saw>) -> Statistics {
    let mut sum = Statistics::default();
    let (mut took, mut waited, mut first): (Vec<f64>, Vec<f64>, Vec<f64>) = Default::default();
    for saw in log {
        match saw {
            Saw::Submitted => sum.submitted += 1,
            Saw::Started {
                prompt,
                cached,
                waited: queued,
            } => {
                sum.started += 1;
                sum.prompt_tokens += prompt;
                sum.cached_tokens += cached;
                waited.push(queued.as_secs_f64());
            }
            Saw::Ended(end) => {
                sum.prompt_tokens += end.prompt;
                sum.cached_tokens += end.cached;
                sum.generated_tokens += end.tokens;
                sum.peak_memory_bytes = sum.peak_memory_bytes.max(end.peak);
                first.extend(end.first_token);
                match (end.finished, end.error) {
                    (Some(reason), _) => {
                        took.push(end.took.as_secs_f64());
                        match reason {
                            FinishReason::Stop => sum.finished.stop += 1,
                            FinishReason::Length => sum.finished.length += 1,
                            FinishReason::Cancelled => sum.finished.cancelled += 1,
                            _ => sum.finished.other += 1,
                        }
                    }
                    (None, Some(kind)) => *sum.errors.entry(kind).or_default() += 1,
                    (None, None) => sum.cancelled += 1,
                }
            }
        }
    }
    sum.generation_time = distribution(took);
    sum.queue_time = distribution(waited);
    sum.time_to_first_token = distribution(first);
    sum
}

fn distribution(mut values: Vec<f64>) -> Distribution {
    values.sort_by(f64::total_cmp);
    let rank = |part: f64| {
        values
            .get(((values.len() as f64 * part).ceil() as usize).max(1) - 1)
            .copied()
    };
    Distribution {
        count: values.len() as u64,
        sum_s: values.iter().sum(),
        mean_s: (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64),
        min_s: values.first().copied(),
        max_s: values.last().copied(),
        p50_s: rank(0.5),
        p90_s: rank(0.9),
        p99_s: rank(0.99),
    }
}

fn compare(found: &Statistics, expected: &Statistics) {
    let counts = |of: &Statistics| {
        (
            (of.submitted, of.started, of.finished, of.cancelled),
            (
                of.prompt_tokens,
                of.cached_tokens,
                of.generated_tokens,
                of.peak_memory_bytes,
            ),
            of.errors.clone(),
        )
    };
    assert_eq!(counts(found), counts(expected));
    let times = [
        (found.generation_time, expected.generation_time),
        (found.queue_time, expected.queue_time),
        (found.time_to_first_token, expected.time_to_first_token),
    ];
    for (found, expected) in times {
        assert_eq!(found.count, expected.count);
        let near = |found: Option<f64>, expected: Option<f64>, relative: f64| {
            let (found, expected) = (found.unwrap_or(-1.0), expected.unwrap_or(-1.0));
            let off = (found - expected).abs();
            assert!(off <= expected.abs() * relative + 2e-9, "{found} for {expected}");
        };
        near(Some(found.sum_s), Some(expected.sum_s), 1e-9);
        for (found, expected) in [
            (found.mean_s, expected.mean_s),
            (found.min_s, expected.min_s),
            (found.max_s, expected.max_s),
        ] {
            near(found, expected, 1e-9);
        }
        for (found, expected) in [
            (found.p50_s, expected.p50_s),
            (found.p90_s, expected.p90_s),
            (found.p99_s, expected.p99_s),
        ] {
            near(found, expected, Distribution::RELATIVE_ERROR);
        }
    }
}

fn error() -> impl Strategy<Value = EngineError> {
    prop_oneof![
        Just(EngineError::OutOfMemory),
        Just(EngineError::device("x", "y")),
        Just(EngineError::QueueFull {
            retry_after: Duration::from_secs(1)
        }),
        Just(EngineError::EmptyPrompt),
        Just(EngineError::WorkerPanicked {
            message: "x".to_owned()
        }),
        Just(EngineError::DeadlineExceeded {
            limit: Duration::from_secs(1)
        }),
    ]
}

fn script() -> impl Strategy<Value = Script> {
    let reason = prop_oneof![
        Just(FinishReason::Stop),
        Just(FinishReason::Length),
        Just(FinishReason::Cancelled)
    ];
    let finished =
        (reason, 0..9_u32, any::<bool>(), 0..1000_u64).prop_map(|(reason, tokens, timed, peak)| {
            let mut summary = summary(reason, tokens);
            summary.peak_memory_bytes = peak;
            if timed {
                summary.timings.ttft_s = 0.25;
                summary.timings.prompt_tps = 100.0;
                summary.timings.generation_tps = 50.0;
            }
            Step::Event(GenerationEvent::Finished(summary))
        });
    let end = prop_oneof![
        6 => finished,
        2 => error().prop_map(Step::Fail),
        1 => Just(Step::Break),
        1 => Just(Step::Hang),
    ];
    let middle = prop_oneof![
        Just(Step::Pending),
        (0..4_u32).prop_map(|tokens| Step::Event(text(tokens)))
    ];
    let first = prop::option::weighted(0.9, (1..9_u32, 0..2_u32));
    let refuse = prop::option::weighted(0.1, error());
    (0..3_u32, refuse, first, prop::collection::vec(middle, 0..6), end).prop_map(
        |(admission, refuse, first, middle, end)| {
            let first = first.map(|(prompt, cached)| Step::Event(started(prompt, cached)));
            Script {
                admission,
                refuse,
                steps: first.into_iter().chain(middle).chain([end]).collect(),
            }
        },
    )
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => script().prop_map(Act::Submit),
        14 => any::<usize>().prop_map(Act::Poll),
        1 => any::<usize>().prop_map(Act::Drop),
        2 => (0..4_000_000_000_u64).prop_map(|nanos| Act::Advance(Duration::from_nanos(nanos))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    /// About sixty requests a case, nearly eight thousand in all.
    #[test]
    fn metrics_are_the_count_of_what_callers_saw(acts in prop::collection::vec(act(), 1..800)) {
        let clock = ManualClock::default();
        let engine = Monitored::builder(Arc::new(Scripted::new(Backend::Mlx))).clock(clock.clone());
        let engine = engine.health(HealthConfiguration::default()).build().unwrap();
        let mut run = Run { engine: &engine, clock, now: Duration::ZERO, flying: Vec::new(), log: Vec::new() };
        for (number, act) in acts.into_iter().enumerate() {
            run.act(act);
            if number % 16 == 0 {
                run.check();
            }
        }
        run.check();
        while !run.flying.is_empty() {
            run.act(Act::Drop(0));
        }
        run.check();
    }
}

#[test]
fn nothing_is_lost_where_threads_submit_at_once() {
    const THREADS: u64 = 8;
    const EACH: u64 = 500;
    let engine = Monitored::new(Arc::new(Scripted::new(Backend::Mlx)));
    for number in 0..THREADS * EACH {
        engine.engine().next(match number % 4 {
            0 => Script::refuse(EngineError::EmptyPrompt),
            1 => Script::steps([
                Step::Event(started(4, 1)),
                Step::Event(text(2)),
                Step::Fail(EngineError::OutOfMemory),
            ]),
            _ => Script::answer(3, 0.0),
        });
    }
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..EACH {
                    // What becomes of it is counted below.
                    let _ = block_on(engine.generate(Prompt::text("x"), GenerateParams::default()));
                }
            });
        }
    });
    let metrics = engine.metrics();
    let all = THREADS * EACH;
    assert_eq!(
        (
            metrics.total.submitted,
            metrics.total.ended(),
            metrics.in_flight()
        ),
        (all, all, 0)
    );
    let errors = BTreeMap::from([
        (ErrorKind::EmptyPrompt, all / 4),
        (ErrorKind::OutOfMemory, all / 4),
    ]);
    assert_eq!(metrics.total.errors, errors);
    assert_eq!(metrics.total.finished.stop, all / 2);
    assert_eq!(metrics.total.generated_tokens, all / 4 * 2 + all / 2 * 3);
    assert_eq!(metrics.total.generation_time.count, all / 2);
}
