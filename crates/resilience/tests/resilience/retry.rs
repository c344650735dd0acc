//! What is tried again, when, and what is not.

use std::time::Duration;

use futures::StreamExt;
use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};
use mlx_engine_resilience::{BreakerState, ResilienceConfiguration, Resilient};
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
