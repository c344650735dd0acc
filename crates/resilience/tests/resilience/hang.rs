//! An engine that hangs is found and replaced by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::StreamExt;
use mlx_engine_core::{EngineError, EventStream, GenerateParams, GenerationEvent, LlmEngine, Prompt};
use mlx_engine_monitor::Monitored;
use mlx_engine_resilience::{RecoveryStep, Reloadable, ResilienceConfiguration, Resilient, StepOutcome};
use tokio::time::Instant;

use crate::support::{Fate, Fated};

type Engine = Resilient<Monitored<Reloadable<Fated>>>;

/// Each engine that is loaded has the next of these fates.
async fn engine(
    fates: impl IntoIterator<Item = Vec<Fate>>,
    change: impl FnOnce(&mut ResilienceConfiguration),
) -> (Engine, Arc<AtomicU32>) {
    let loads = Arc::new(AtomicU32::new(0));
    let (counted, fates) = (Arc::clone(&loads), fates.into_iter().collect::<Vec<_>>());
    let load = move || {
        let load = counted.fetch_add(1, Ordering::Relaxed) as usize;
        let engine = Fated::new(fates.get(load).cloned().unwrap_or_default());
        Box::pin(async { Ok(engine) }) as _
    };
    let engine = Reloadable::load(load).await.expect("it loads");
    let engine = engine.with_unload_limit(Duration::from_secs(1));
    let mut configuration = ResilienceConfiguration::default();
    configuration.recovery.hang_limit = Some(Duration::from_secs(40));
    change(&mut configuration);
    let builder = Resilient::builder(Monitored::new(engine)).recoverable();
    (
        builder.configuration(configuration).build().expect("it is valid"),
        loads,
    )
}

async fn submit(engine: &Engine) -> EventStream {
    let submitted = engine.stream(Prompt::text("x"), GenerateParams::default());
    submitted.await.expect("it is taken")
}

/// How a stream ends.
async fn end(mut events: EventStream) -> Result<(), EngineError> {
    loop {
        match events.next().await.expect("an end") {
            Ok(GenerationEvent::Finished(_)) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_runs_may_be_tried_again_and_what_had_not_begun_is_answered() {
    let fates = vec![Fate::Hang, Fate::Queued, Fate::Queued, Fate::Unadmitted];
    let (engine, loads) = engine([fates], |_| {}).await;
    let began = Instant::now();
    let running = submit(&engine).await;
    let queued = [submit(&engine).await, submit(&engine).await];
    let unadmitted = submit(&engine);
    let queued = futures::future::join_all(queued.map(end));
    let (running, queued, unadmitted) =
        futures::join!(end(running), queued, async { end(unadmitted.await).await });
    let error = running.unwrap_err();
    assert!(
        matches!(error, EngineError::Unavailable { .. }) && error.is_retryable(),
        "{error}"
    );
    assert!(
        queued.iter().all(Result::is_ok) && unadmitted.is_ok(),
        "{queued:?} {unadmitted:?}"
    );
    // It was found within a quarter of the limit, and given up a second later.
    let took = began.elapsed().as_secs_f64();
    assert!((40.0..=51.1).contains(&took), "{took}");
    assert_eq!(loads.load(Ordering::Relaxed), 2);
    assert_eq!(engine.status().counts.handed_over_again, 3);
    let report = engine.status().last_recovery.expect("it was recovered");
    assert!(
        report.automatic && report.recovered && report.before.is_some(),
        "{report:?}"
    );
    let steps: Vec<_> = report
        .steps
        .iter()
        .map(|step| (step.step, &step.outcome))
        .collect();
    assert_eq!(steps, [(RecoveryStep::ReloadModel, &StepOutcome::Recovered)]);
    let metrics = engine.engine().metrics();
    assert_eq!(
        (metrics.in_flight(), metrics.total.ended()),
        (0, metrics.total.submitted)
    );
}

#[tokio::test(start_paused = true)]
async fn recovery_from_hangs_has_its_limits() {
    let change = |configuration: &mut ResilienceConfiguration| configuration.recovery.max_automatic = 2;
    // Those that are loaded later give the token that proves them, and then hang.
    let later = || vec![Fate::Answer, Fate::Hang];
    let (engine, loads) = engine([vec![Fate::Hang], later(), later()], change).await;
    for _ in 0..2 {
        let error = end(submit(&engine).await).await.unwrap_err();
        assert!(error.is_retryable(), "{error}");
    }
    let mut third = Box::pin(end(submit(&engine).await));
    let waits = tokio::time::timeout(Duration::from_secs(400), &mut third);
    assert!(waits.await.is_err(), "two is what may be");
    assert_eq!(
        (loads.load(Ordering::Relaxed), engine.status().recoveries),
        (3, 2)
    );
    // Until the window has passed the first.
    assert!(third.await.unwrap_err().is_retryable());
    assert_eq!(
        (loads.load(Ordering::Relaxed), engine.status().recoveries),
        (4, 3)
    );
}

#[tokio::test(start_paused = true)]
async fn nobody_looks_where_nothing_runs_or_nobody_is_to() {
    let (idle, loads) = engine([], |_| {}).await;
    end(submit(&idle).await).await.unwrap();
    // A turn that is written down and nobody waits for, as one that scores a text.
    *idle.engine().engine().engine().unwrap().turn.lock().unwrap() = Some(Instant::now());
    tokio::time::sleep(Duration::from_secs(1000)).await;
    assert_eq!((loads.load(Ordering::Relaxed), idle.status().recoveries), (1, 0));
    for change in [
        |configuration: &mut ResilienceConfiguration| configuration.recovery.hang_limit = None,
        |configuration: &mut ResilienceConfiguration| configuration.recovery.automatic = false,
    ] {
        let (engine, loads) = engine([vec![Fate::Hang]], change).await;
        let waits = tokio::time::timeout(Duration::from_secs(1000), end(submit(&engine).await));
        assert!(waits.await.is_err());
        assert_eq!(loads.load(Ordering::Relaxed), 1);
    }
}
