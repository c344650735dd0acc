//! What is tried again, when, and what is not.

use std::time::Duration;

use futures::StreamExt;
use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};
use mlx_engine_resilience::{BreakerState, ResilienceConfiguration, ResilienceCounts, Resilient};
use proptest::prelude::*;
use tokio::time::Instant;

use crate::support::{Fate, Fated, device};

const SECOND: Duration = Duration::from_secs(1);

/// Waits of exactly 1, 2 and 4 seconds.
fn exact() -> ResilienceConfiguration {
    let mut configuration = ResilienceConfiguration::default();
    configuration.retry.base_delay = SECOND;
    configuration.retry.jitter = 0.0;
    configuration
}

fn resilient(configuration: ResilienceConfiguration, fates: Vec<Fate>) -> Resilient<Fated> {
    let builder = Resilient::builder(Fated::new(fates)).configuration(configuration);
    builder.build().expect("the configuration is valid")
}

async fn ask(engine: &Resilient<Fated>) -> Result<String, EngineError> {
    let output = engine.generate_with_retry(Prompt::text("x"), GenerateParams::default());
    output.await.map(|output| output.text)
}

#[tokio::test(start_paused = true)]
async fn what_may_succeed_later_is_tried_again_after_its_wait() {
    let fates = vec![Fate::Refuse(device()), Fate::FailLater(EngineError::OutOfMemory)];
    let engine = resilient(exact(), fates);
    let began = Instant::now();
    assert_eq!(ask(&engine).await.unwrap(), "x");
    assert_eq!((began.elapsed().as_secs(), engine.engine().asked()), (3, 3));
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_does_not_ask_for_it_gets_the_first_error() {
    let engine = resilient(exact(), vec![Fate::Refuse(device())]);
    let output = engine
        .generate(Prompt::text("x"), GenerateParams::default())
        .await;
    assert!(matches!(output, Err(EngineError::Device { .. })));
    assert_eq!(engine.engine().asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_succeed_is_not_tried_again() {
    let engine = resilient(exact(), vec![Fate::Refuse(EngineError::EmptyPrompt)]);
    assert!(matches!(ask(&engine).await, Err(EngineError::EmptyPrompt)));
    assert_eq!(engine.engine().asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn it_waits_as_long_as_the_engine_says() {
    let retry_after = SECOND * 25;
    let engine = resilient(
        exact(),
        vec![Fate::Refuse(EngineError::QueueFull { retry_after })],
    );
    let began = Instant::now();
    ask(&engine).await.unwrap();
    assert_eq!(began.elapsed().as_secs(), 25);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_wins_over_waiting() {
    let mut configuration = exact();
    configuration.timeouts.total = Some(SECOND * 2);
    let engine = resilient(
        configuration,
        vec![Fate::Refuse(device()), Fate::Refuse(device())],
    );
    let began = Instant::now();
    let error = ask(&engine).await.unwrap_err();
    assert!(matches!(error, EngineError::Device { .. }), "{error:?}");
    // One wait of a second; the next of two would be too long.
    assert_eq!((began.elapsed().as_secs(), engine.engine().asked()), (1, 2));
}

/// What the caller allows, and what the engine was asked for last.
async fn ask_within(engine: &Resilient<Fated>, params: GenerateParams) -> Result<(), EngineError> {
    let output = engine.generate_with_retry(Prompt::text("x"), params);
    output.await.map(drop)
}

#[tokio::test(start_paused = true)]
async fn the_time_of_a_request_is_for_all_its_attempts() {
    let fates = vec![Fate::SlowFailure(SECOND * 3, device())];
    let engine = resilient(exact(), fates);
    let params = GenerateParams::default().with_timeout_s(10.0);
    let params = params.with_queue_timeout_s(2.0);
    ask_within(&engine, params.clone()).await.unwrap();
    let asked = engine.engine().params.lock().unwrap().clone();
    // Three seconds of the first, and one of waiting. The queue is joined anew.
    assert_eq!((asked.timeout_s, asked.queue_timeout_s), (Some(6.0), Some(2.0)));

    let fates = vec![Fate::SlowFailure(SECOND * 3, device()), Fate::Hang];
    let engine = resilient(exact(), fates);
    let began = Instant::now();
    let error = ask_within(&engine, params).await.unwrap_err();
    assert!(
        matches!(error, EngineError::DeadlineExceeded { limit } if limit == SECOND * 10),
        "{error}"
    );
    assert_eq!((began.elapsed().as_secs(), engine.engine().asked()), (10, 2));
    assert_eq!(engine.status().running, 0);
}

#[tokio::test(start_paused = true)]
async fn the_time_of_a_request_runs_while_it_waits_for_a_place() {
    let mut configuration = exact();
    configuration.bulkhead.max_concurrent = 1;
    let engine = resilient(configuration, vec![Fate::Slow(SECOND * 5, SECOND * 2)]);
    let events = engine.stream(Prompt::text("x"), GenerateParams::default());
    let runs = tokio::spawn(events.await.unwrap().collect::<Vec<_>>());
    let check = async |params: GenerateParams, limit: Duration| {
        let began = Instant::now();
        let error = engine.generate(Prompt::text("x"), params).await.unwrap_err();
        assert!(
            matches!(error, EngineError::DeadlineExceeded { limit: found } if found == limit),
            "{error}"
        );
        assert_eq!((began.elapsed(), engine.engine().asked()), (limit, 1));
    };
    let params = GenerateParams::default();
    check(params.clone().with_timeout_s(1.0), SECOND).await;
    check(params.clone().with_queue_timeout_s(2.0), SECOND * 2).await;
    let both = params.with_queue_timeout_s(20.0).with_timeout_s(30.0);
    engine.generate(Prompt::text("x"), both).await.unwrap();
    let asked = engine.engine().params.lock().unwrap().clone();
    assert_eq!((asked.queue_timeout_s, asked.timeout_s), (Some(16.0), Some(26.0)));
    assert_eq!(runs.await.unwrap().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn the_time_of_a_request_runs_while_it_waits_for_a_recovery_and_in_the_queue() {
    let engine = resilient(exact(), vec![Fate::Hang, Fate::Queued, Fate::Queued]);
    let recovers = engine.clone();
    let recovers = tokio::spawn(async move { recovers.attempt_recovery().await });
    while engine.engine().asked() == 0 {
        tokio::task::yield_now().await;
    }
    let check = async |params: GenerateParams, asked: u32| {
        let began = Instant::now();
        let error = engine.generate(Prompt::text("x"), params).await.unwrap_err();
        assert!(
            matches!(error, EngineError::DeadlineExceeded { limit } if limit == SECOND),
            "{error}"
        );
        assert_eq!((began.elapsed(), engine.engine().asked()), (SECOND, asked));
        assert_eq!(engine.status().running, 0);
    };
    let timeout = GenerateParams::default().with_timeout_s(1.0);
    let queue_timeout = GenerateParams::default().with_queue_timeout_s(1.0);
    check(timeout.clone(), 1).await;
    check(queue_timeout.clone(), 1).await;
    assert!(!recovers.await.unwrap().recovered);
    // Where the engine does not see to it, as one whose process is started again.
    check(timeout, 2).await;
    check(queue_timeout, 3).await;
    assert_eq!(engine.status().breaker, BreakerState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_tried_again_only_before_its_first_token() {
    let fates = vec![Fate::FailFirst(device()), Fate::FailLater(device())];
    let engine = resilient(exact(), fates);
    let events = engine
        .stream_with_retry(Prompt::text("x"), GenerateParams::default())
        .await;
    let events: Vec<_> = events.unwrap().collect().await;
    assert_eq!(events.len(), 3, "started once, a token, the error");
    assert!(matches!(events[2], Err(EngineError::Device { .. })));
    assert_eq!(engine.engine().asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn each_phase_has_its_limit() {
    let check = async |fate: Fate, limit: Duration| {
        let mut configuration = exact();
        configuration.timeouts.first_token = Some(SECOND * 5);
        configuration.timeouts.between_tokens = Some(SECOND);
        configuration.timeouts.total = Some(SECOND * 6);
        let engine = resilient(configuration, vec![fate]);
        let error = engine
            .generate(Prompt::text("x"), GenerateParams::default())
            .await
            .unwrap_err();
        assert!(
            matches!(error, EngineError::DeadlineExceeded { limit: found } if found == limit),
            "{error:?}"
        );
        assert_eq!(engine.status().running, 0);
    };
    check(Fate::Hang, SECOND * 5).await;
    check(Fate::Slow(SECOND * 4, SECOND * 30), SECOND).await;
    let mut configuration = exact();
    configuration.timeouts.total = Some(SECOND * 6);
    let engine = resilient(configuration, vec![Fate::Slow(SECOND * 5, SECOND * 5)]);
    assert!(
        matches!(ask(&engine).await, Err(EngineError::DeadlineExceeded { limit }) if limit == SECOND * 6)
    );
}

#[tokio::test(start_paused = true)]
async fn what_the_engine_does_not_see_is_counted() {
    let mut configuration = exact();
    configuration.bulkhead.max_concurrent = 1;
    configuration.bulkhead.max_waiting = 0;
    configuration.timeouts.first_token = Some(SECOND * 5);
    configuration.breaker.min_requests = 2;
    configuration.recovery.automatic = false;
    let engine = resilient(configuration, vec![Fate::Refuse(device()), Fate::Hang]);
    // It is refused, tried again, and hangs until its time is over; beside it is no place.
    let (hangs, full) = futures::join!(ask(&engine), async {
        tokio::time::sleep(SECOND * 3).await;
        engine
            .generate(Prompt::text("x"), GenerateParams::default())
            .await
    });
    assert!(matches!(full, Err(EngineError::QueueFull { .. })), "{full:?}");
    assert!(
        matches!(hangs, Err(EngineError::DeadlineExceeded { .. })),
        "{hangs:?}"
    );
    let refused = engine
        .generate(Prompt::text("x"), GenerateParams::default())
        .await;
    assert!(
        matches!(refused, Err(EngineError::Unavailable { .. })),
        "{refused:?}"
    );
    let status = engine.status();
    let counts = ResilienceCounts {
        refused_by_breaker: 1,
        refused_by_bulkhead: 1,
        timed_out: 1,
        retried: 1,
        handed_over_again: 0,
    };
    assert_eq!(status.counts, counts);
    let page = status.prometheus();
    for line in [
        "mlx_engine_circuit_open 1",
        "mlx_engine_refused_by_breaker_total 1",
        "mlx_engine_recoveries_total 0",
        "# TYPE mlx_engine_retried_total counter",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}: {page}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_leaves_leaves_nothing_behind() {
    let engine = resilient(exact(), vec![Fate::Hang]);
    let limit = tokio::time::timeout(SECOND, ask(&engine)).await;
    assert!(limit.is_err());
    let status = engine.status();
    assert_eq!(
        (status.running, status.waiting, status.breaker),
        (0, 0, BreakerState::Closed)
    );
}

#[tokio::test(start_paused = true)]
async fn an_open_circuit_refuses_at_once_and_says_when_to_come_back() {
    let mut configuration = exact();
    configuration.recovery.automatic = false;
    let engine = resilient(configuration, vec![Fate::Refuse(device()); 5]);
    let once = || engine.generate(Prompt::text("x"), GenerateParams::default());
    for _ in 0..5 {
        once().await.unwrap_err();
    }
    assert_eq!(engine.status().breaker, BreakerState::Open);
    let error = once().await.unwrap_err();
    assert_eq!(
        (error.retry_after(), engine.engine().asked()),
        (Some(SECOND * 10), 5)
    );
    // With retries it comes back when it may, and succeeds.
    ask(&engine).await.unwrap();
    assert_eq!(
        (engine.status().breaker, engine.engine().asked()),
        (BreakerState::Closed, 6)
    );
}

/// What a request meets at one of its attempts.
#[derive(Clone, Copy, Debug)]
enum Meets {
    Answer,
    Device,
    /// The engine is full, and says for how many seconds.
    Full(u64),
    /// What no other attempt would change.
    Empty,
}

impl Meets {
    fn fate(self) -> Fate {
        match self {
            Self::Answer => Fate::Answer,
            Self::Device => Fate::Refuse(device()),
            Self::Full(seconds) => Fate::Refuse(EngineError::QueueFull {
                retry_after: SECOND * seconds as u32,
            }),
            Self::Empty => Fate::Refuse(EngineError::EmptyPrompt),
        }
    }
}

/// The rules, in whole seconds and said the short way.
struct Rules {
    max_retries: u32,
    longest: u64,
    total: Option<u64>,
    /// Tenths of retries that each request brings, those that are saved at most, and those that are.
    ratio: u32,
    reserve: u32,
    left: u32,
}

impl Rules {
    /// How many attempts a request makes, how long it waits in all, and whether it is answered.
    fn request(&mut self, mut meets: impl Iterator<Item = Meets>) -> (u32, u64, bool) {
        self.left = (self.left + self.ratio).min((10 * self.reserve).max(10));
        let (mut retries, mut waited) = (0, 0);
        loop {
            let least = match meets.next().unwrap_or(Meets::Answer) {
                Meets::Answer => return (retries + 1, waited, true),
                Meets::Empty => return (retries + 1, waited, false),
                Meets::Device => 0,
                Meets::Full(seconds) => seconds,
            };
            let wait = (1 << retries).min(self.longest).max(least);
            let in_time = self.total.is_none_or(|total| waited + wait < total);
            if retries == self.max_retries || !in_time || self.left < 10 {
                return (retries + 1, waited, false);
            }
            self.left -= 10;
            waited += wait;
            retries += 1;
        }
    }
}

fn meets() -> impl Strategy<Value = Meets> {
    prop_oneof![
        3 => Just(Meets::Answer),
        6 => Just(Meets::Device),
        2 => (0..12_u64).prop_map(Meets::Full),
        1 => Just(Meets::Empty),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Requests one after the other, whatever each meets.
    #[test]
    fn it_follows_its_rules(
        met in prop::collection::vec(meets(), 0..60), requests in 1..12_u32, max_retries in 0..6_u32, longest in 1..20_u64,
        total in prop::option::of(1..40_u64), reserve in 0..6_u32, ratio in 0..15_u32,
    ) {
        let mut configuration = exact();
        configuration.retry.max_retries = max_retries;
        configuration.retry.max_delay = SECOND * longest as u32;
        configuration.retry.budget.reserve = reserve;
        configuration.retry.budget.ratio = f64::from(ratio) / 10.0;
        configuration.timeouts.total = total.map(Duration::from_secs);
        // The circuit stays out of this.
        configuration.breaker.min_requests = 1024;
        let engine = resilient(configuration, met.iter().map(|meets| meets.fate()).collect());
        let mut rules = Rules { max_retries, longest, total, ratio, reserve, left: 10 * reserve };
        let mut met = met.into_iter();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            for request in 0..requests {
                let (began, before) = (Instant::now(), engine.engine().asked());
                let answered = ask(&engine).await.is_ok();
                let found = (engine.engine().asked() - before, began.elapsed().as_secs(), answered);
                assert_eq!(found, rules.request(&mut met), "request {request}");
            }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Requests that all fail now and then never cost the engine more than the budget allows.
    #[test]
    fn retries_do_not_multiply_load(
        fates in prop::collection::vec(any::<bool>(), 0..300), requests in 1..80_u32, reserve in 0..10_u32, tenths in 0..10_u32,
    ) {
        let mut configuration = exact();
        configuration.retry.budget.reserve = reserve;
        configuration.retry.budget.ratio = f64::from(tenths) / 10.0;
        // The circuit stays out of this.
        configuration.breaker.min_requests = 1024;
        let fates = fates.into_iter().map(|fails| if fails { Fate::Refuse(device()) } else { Fate::Answer });
        let engine = resilient(configuration, fates.collect());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            for _ in 0..requests {
                let _ = ask(&engine).await;
            }
        });
        let asked = f64::from(engine.engine().asked());
        let most = f64::from(requests) + f64::from(reserve) + f64::from(tenths) / 10.0 * f64::from(requests);
        prop_assert!(asked <= most + 1e-6, "{asked} of {most}");
        prop_assert!(engine.engine().asked() <= requests * 4);
    }
}
