//! An engine is brought back, and proves it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use mlx_engine_core::{EngineError, EngineWrapper, EventStream, GenerateParams, LlmEngine, Prompt};
use mlx_engine_monitor::{EngineHealth, ErrorKind, Monitored, ProbeFailure};
use mlx_engine_resilience::{
    BreakerState, Recover, RecoveryStep, Reloadable, ResilienceConfiguration, Resilient, StepOutcome,
};

use tokio::time::Instant;

use crate::support::{Fate, Fated};

type Engine = Resilient<Monitored<Reloadable<Fated>>>;

/// The first `broken` engines that are loaded fail every request; the mock is what it falls back to.
async fn engine(broken: u32, change: impl FnOnce(&mut ResilienceConfiguration)) -> (Engine, Arc<AtomicU32>) {
    let loads = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&loads);
    let load = move || {
        let load = counted.fetch_add(1, Ordering::Relaxed);
        let engine = if load < broken {
            Fated::broken()
        } else {
            Fated::default()
        };
        Box::pin(async { Ok(engine) }) as _
    };
    let engine = Reloadable::load(load).await.expect("it loads");
    let engine = engine.with_fall_back(|| Box::pin(async { Ok(Fated::default()) }));
    let mut configuration = ResilienceConfiguration::default();
    change(&mut configuration);
    let builder = Resilient::builder(Monitored::new(engine)).recoverable();
    (
        builder.configuration(configuration).build().expect("it is valid"),
        loads,
    )
}

async fn ask(engine: &Engine) -> Result<(), EngineError> {
    engine
        .generate(Prompt::text("x"), GenerateParams::default())
        .await
        .map(drop)
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_works_is_left_alone() {
    let (engine, loads) = engine(0, |_| {}).await;
    let report = engine.attempt_recovery().await;
    assert!(report.recovered && report.before.is_none() && report.steps.is_empty());
    assert_eq!(loads.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_broken_engine_is_loaded_again_and_proves_it() {
    let (engine, loads) = engine(1, |_| {}).await;
    ask(&engine).await.unwrap_err();
    assert_eq!(
        engine.engine().check_health().await.status,
        EngineHealth::Unhealthy
    );
    let report = engine.attempt_recovery().await;
    assert!(report.recovered && report.before.is_some(), "{report:?}");
    assert_eq!(report.steps.len(), 1);
    assert_eq!(
        (report.steps[0].step, &report.steps[0].outcome),
        (RecoveryStep::ReloadModel, &StepOutcome::Recovered)
    );
    assert_eq!(loads.load(Ordering::Relaxed), 2);
    ask(&engine).await.unwrap();
    assert_eq!(engine.engine().health().status, EngineHealth::Healthy);
    let json = serde_json::to_string(&engine.status()).unwrap();
    assert!(json.contains("reload_model"), "{json}");
}

#[tokio::test(start_paused = true)]
async fn it_falls_back_only_where_that_is_allowed() {
    let (unlucky, _) = engine(u32::MAX, |_| {}).await;
    let report = unlucky.attempt_recovery().await;
    assert!(!report.recovered);
    assert!(matches!(report.steps[..], [ref step] if matches!(step.outcome, StepOutcome::NoToken { .. })));
    let (unlucky, _) = engine(u32::MAX, |configuration| configuration.recovery.fall_back = true).await;
    let report = unlucky.attempt_recovery().await;
    let steps: Vec<_> = report.steps.iter().map(|step| step.step).collect();
    assert!(report.recovered);
    assert_eq!(steps, [RecoveryStep::ReloadModel, RecoveryStep::FallBack]);
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_was_unloaded_stays_unloaded() {
    let (engine, loads) = engine(0, |_| {}).await;
    engine.unload().await.unwrap();
    let report = engine.attempt_recovery().await;
    assert!(!report.recovered && report.steps.is_empty(), "{report:?}");
    assert_eq!(loads.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_circuit_that_opens_brings_recovery_and_who_waits_is_served() {
    let (engine, loads) = engine(1, |_| {}).await;
    for _ in 0..5 {
        ask(&engine).await.unwrap_err();
    }
    // This one waits for the recovery and never hears of it.
    ask(&engine).await.unwrap();
    let status = engine.status();
    assert_eq!((status.breaker, status.recoveries), (BreakerState::Closed, 1));
    assert!(
        status
            .last_recovery
            .is_some_and(|report| report.automatic && report.recovered)
    );
    assert_eq!(loads.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn recovery_begins_by_itself_only_so_often() {
    let (engine, loads) = engine(u32::MAX, |configuration| configuration.recovery.max_automatic = 2).await;
    for _ in 0..100 {
        let _ = ask(&engine).await;
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    assert_eq!(
        (engine.status().recoveries, loads.load(Ordering::Relaxed)),
        (2, 3)
    );
}

#[tokio::test(start_paused = true)]
async fn a_busy_engine_is_not_taken_from_its_requests() {
    let full = EngineError::QueueFull {
        retry_after: Duration::from_secs(1),
    };
    let engine = Fated::new([Fate::Refuse(full)]);
    let report = Resilient::new(engine).attempt_recovery().await;
    assert!(!report.recovered && report.before.is_some() && report.steps.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_engine_whose_queue_outlasts_the_proof_is_busy_and_one_that_stands_is_not() {
    for busy in [true, false] {
        let load = move || {
            let engine = Fated {
                busy: busy.then(Instant::now),
                ..Fated::new([Fate::Queued])
            };
            Box::pin(async { Ok(engine) }) as _
        };
        let engine = Reloadable::load(load).await.unwrap();
        let engine = Resilient::builder(engine).recoverable().build().unwrap();
        let report = engine.attempt_recovery().await;
        assert!(
            matches!(report.before, Some(ProbeFailure::Abandoned { .. })),
            "{report:?}"
        );
        assert_eq!(report.steps.is_empty(), busy, "{report:?}");
        assert_eq!(engine.status().recoveries, u64::from(!busy));
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_never_there_is_no_fault_and_no_recovery() {
    let not_loaded = || EngineError::NotLoaded {
        model: "none".to_owned(),
    };
    let (gone, _) = engine(0, |_| {}).await;
    gone.unload().await.unwrap();
    for _ in 0..10 {
        let error = ask(&gone).await.unwrap_err();
        assert!(matches!(error, EngineError::NotLoaded { .. }), "{error}");
    }
    assert!(!gone.attempt_recovery().await.recovered);
    let status = gone.status();
    assert_eq!((status.breaker, status.recoveries), (BreakerState::Closed, 0));

    // Where it can be loaded again, an engine that says so is broken.
    let (engine, _) = engine(0, |configuration| configuration.recovery.automatic = false).await;
    let current = engine.engine().engine().engine().expect("it is loaded");
    let refusals = std::iter::repeat_with(|| Fate::Refuse(not_loaded())).take(5);
    current.fates.lock().unwrap().extend(refusals);
    for _ in 0..5 {
        ask(&engine).await.unwrap_err();
    }
    assert_eq!(engine.status().breaker, BreakerState::Open);
    assert!(matches!(ask(&engine).await, Err(EngineError::Unavailable { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_recovery_ends_may_be_tried_again() {
    let (engine, _) = engine(1, |_| {}).await;
    let current = engine.engine().engine().engine().expect("it is loaded");
    let fate = Fate::SlowFailure(
        Duration::from_secs(5),
        EngineError::NotLoaded {
            model: "tiny".to_owned(),
        },
    );
    current.fates.lock().unwrap().push_back(fate);
    let mut events = engine
        .stream(Prompt::text("x"), GenerateParams::default())
        .await
        .unwrap();
    assert!(engine.attempt_recovery().await.recovered);
    let error = loop {
        if let Err(error) = events.next().await.unwrap() {
            break error;
        }
    };
    assert!(
        matches!(error, EngineError::Unavailable { .. }) && error.is_retryable(),
        "{error:?}"
    );
    assert_eq!(engine.status().breaker, BreakerState::Closed);
}

/// Thousands of requests at once, with faults at random: each ends once, nothing is held, and every attempt is counted.
#[tokio::test(start_paused = true)]
async fn nothing_is_lost_or_stuck_in_thousands_of_requests() {
    const REQUESTS: u64 = 5000;
    let mut random = 1_u64;
    let fates = std::iter::repeat_with(|| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        match random >> 60 {
            0 => Fate::Refuse(EngineError::OutOfMemory),
            1 => Fate::FailFirst(crate::support::device()),
            2 => Fate::FailLater(crate::support::device()),
            3 => Fate::Slow(Duration::from_secs(1), Duration::from_secs(1)),
            4 => Fate::Hang,
            _ => Fate::Answer,
        }
    });
    let fates: Vec<Fate> = fates.take(2 * REQUESTS as usize).collect();
    let mut configuration = ResilienceConfiguration::default();
    configuration.bulkhead.max_waiting = usize::MAX;
    configuration.timeouts.first_token = Some(Duration::from_secs(30));
    configuration.recovery.automatic = false;
    let engine = Resilient::builder(Monitored::new(Fated::new(fates)))
        .configuration(configuration)
        .build();
    let engine = engine.unwrap();
    let ask = |number: u64| {
        let engine = engine.clone();
        async move {
            let (prompt, params) = (Prompt::text("x"), GenerateParams::default());
            let request = engine.generate_with_retry(prompt, params);
            if number.is_multiple_of(7) {
                // A caller who loses patience.
                tokio::time::timeout(Duration::from_millis(number), request)
                    .await
                    .ok()
                    .map(|output| output.is_ok())
            } else {
                Some(request.await.is_ok())
            }
        }
    };
    let ended = futures::future::join_all((0..REQUESTS).map(ask)).await;
    assert_eq!(ended.len() as u64, REQUESTS);
    assert!(ended.contains(&Some(true)));
    let (status, metrics) = (engine.status(), engine.engine().metrics());
    assert_eq!((status.running, status.waiting, metrics.in_flight()), (0, 0, 0));
    assert_eq!(
        metrics.total.submitted,
        u64::from(engine.engine().engine().asked())
    );
    assert_eq!(metrics.total.ended(), metrics.total.submitted);
    let succeeded = ended.iter().filter(|end| **end == Some(true)).count() as u64;
    assert_eq!(metrics.total.finished.total(), succeeded);
}

/// Gives no token until it falls back, and takes every step before that badly, each in its own way.
#[derive(Default)]
struct Stubborn {
    engine: Fated,
    well: AtomicBool,
}

impl EngineWrapper for Stubborn {
    type Inner = Fated;

    fn inner(&self) -> &Fated {
        &self.engine
    }

    fn wrapped_stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        assert!(self.well.load(Ordering::Relaxed), "told to panic");
        self.engine.stream(prompt, params)
    }
}

impl Recover for Stubborn {
    fn can(&self, _: RecoveryStep) -> bool {
        true
    }

    fn recover(&self, step: RecoveryStep) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async move {
            match step {
                RecoveryStep::ClearCaches => panic!("told to panic"),
                RecoveryStep::RebuildStream => Err(crate::support::device()),
                RecoveryStep::RestartWorker => std::future::pending().await,
                RecoveryStep::FallBack => {
                    self.well.store(true, Ordering::Relaxed);
                    Ok(())
                }
                _ => Ok(()),
            }
        })
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_a_step_does_the_next_is_taken_and_the_report_says_what_came_of_each() {
    let mut configuration = ResilienceConfiguration::default();
    configuration.recovery.fall_back = true;
    let engine = Resilient::builder(Arc::new(Stubborn::default()))
        .recoverable()
        .configuration(configuration)
        .build()
        .unwrap();
    let report = engine.attempt_recovery().await;
    let panicked = ProbeFailure::Error {
        kind: ErrorKind::WorkerPanicked,
    };
    assert_eq!((report.recovered, report.before), (true, Some(panicked)));
    let failed = |kind, message: &str| StepOutcome::Failed {
        kind,
        message: message.to_owned(),
    };
    let outcomes: Vec<_> = report
        .steps
        .iter()
        .map(|step| (step.step, step.outcome.clone()))
        .collect();
    assert_eq!(
        outcomes,
        [
            (
                RecoveryStep::ClearCaches,
                failed(ErrorKind::WorkerPanicked, "the step panicked")
            ),
            (
                RecoveryStep::RebuildStream,
                failed(ErrorKind::Device, "device failed: x")
            ),
            (RecoveryStep::RestartWorker, StepOutcome::TimedOut),
            (
                RecoveryStep::ReloadModel,
                StepOutcome::NoToken { failure: panicked }
            ),
            (RecoveryStep::FallBack, StepOutcome::Recovered),
        ]
    );
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(
        serde_json::from_value::<mlx_engine_resilience::RecoveryReport>(json).unwrap(),
        report
    );
}

#[test]
fn a_recovery_whose_runtime_ends_claims_nothing() {
    let fates = std::iter::repeat_n(Fate::Hang, 1);
    let engine = Resilient::new(Fated::new(fates));
    let mut recovery = Box::pin(engine.attempt_recovery());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        assert!(futures::poll!(&mut recovery).is_pending());
        // The proof has begun, and waits.
        while engine.engine().asked() == 0 {
            tokio::task::yield_now().await;
        }
    });
    drop(runtime);
    let report = futures::executor::block_on(recovery);
    assert!(!report.recovered && report.steps.is_empty(), "{report:?}");
    assert!(!engine.status().recovering, "nobody waits for it");
}
