//! Health over the life of an engine.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::StreamExt;
use futures::executor::block_on;
use mlx_engine_core::{
    Backend, EngineError, FinishReason, GenerateParams, GenerationEvent, LlmEngine, Prompt,
};
use mlx_engine_monitor::{
    DetailedStatus, EngineHealth, HealthConfiguration, HealthReason, HealthReport, ManualClock, MemoryKind,
    Monitored, ProbeFailure,
};

use crate::support::{Script, Scripted, Step, idle, started, summary, text};
use EngineHealth::{Degraded, Healthy, Unhealthy};

struct Watched {
    engine: Monitored<Arc<Scripted>>,
    clock: ManualClock,
}

impl Watched {
    fn new(backend: Backend) -> Self {
        let clock = ManualClock::default();
        let builder = Monitored::builder(Arc::new(Scripted::new(backend)));
        let engine = builder
            .clock(clock.clone())
            .build()
            .expect("as the test sets it up");
        Self { engine, clock }
    }

    fn wait(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }

    /// Runs a request.
    fn ask(&self, script: Script) -> Result<(), EngineError> {
        self.engine.engine().next(script);
        let output = self.engine.generate(Prompt::text("x"), GenerateParams::default());
        block_on(output).map(drop)
    }

    fn fail(&self, error: EngineError) {
        self.ask(Script::refuse(error))
            .expect_err("as the test sets it up");
    }

    #[track_caller]
    fn check(&self, status: EngineHealth, live: bool, reasons: &[&str]) {
        check(&self.engine.health(), status, live, reasons);
    }

    #[track_caller]
    fn probe(&self, script: Script, status: EngineHealth, live: bool, reasons: &[&str]) {
        self.engine.engine().next(script);
        check(&block_on(self.engine.check_health()), status, live, reasons);
    }
}

#[track_caller]
fn check(report: &HealthReport, status: EngineHealth, live: bool, reasons: &[&str]) {
    let name = |reason: &HealthReason| {
        serde_json::to_value(reason).expect("as the test sets it up")["reason"].clone()
    };
    let found: Vec<_> = report.reasons.iter().map(name).collect();
    assert_eq!(found, reasons, "{report:?}");
    let ready = status != Unhealthy;
    assert_eq!(
        (report.status, report.is_live(), report.is_ready()),
        (status, live, ready)
    );
}

fn device() -> EngineError {
    EngineError::device("x", "y")
}

#[test]
fn a_mock_is_degraded_and_an_engine_without_a_model_is_not_ready() {
    let watched = Watched::new(Backend::Mock);
    watched.check(Degraded, true, &["mock_in_use"]);
    block_on(watched.engine.unload()).unwrap();
    watched.check(Unhealthy, true, &["not_loaded"]);
    assert!(watched.engine.is_live() && !watched.engine.is_ready());
    // Nobody is asked for a token.
    assert_eq!(block_on(watched.engine.check_health()).status, Unhealthy);
    assert_eq!(watched.engine.metrics().probes.failed, 0);
    watched.engine.engine().load(Backend::Mlx);
    watched.check(Healthy, true, &[]);
}

#[test]
fn faults_in_a_row_are_unhealthy_until_a_request_finishes() {
    let watched = Watched::new(Backend::Mlx);
    watched.fail(device());
    watched.fail(EngineError::EmptyPrompt);
    watched.fail(device());
    watched.check(Healthy, true, &[]);
    watched.fail(EngineError::NotLoaded {
        model: "tiny".to_owned(),
    });
    watched.check(Unhealthy, false, &["consecutive_failures"]);
    watched.ask(Script::answer(2, 0.0)).unwrap();
    watched.check(Healthy, true, &[]);
}

#[test]
fn a_model_that_was_loaded_anew_begins_with_a_clean_record() {
    let watched = Watched::new(Backend::Mlx);
    for _ in 0..3 {
        watched.fail(device());
    }
    watched.check(Unhealthy, false, &["consecutive_failures"]);
    block_on(watched.engine.unload()).unwrap();
    watched.engine.engine().load(Backend::Mlx);
    watched.check(Healthy, true, &[]);
}

#[test]
fn a_rate_of_faults_counts_in_the_window() {
    let watched = Watched::new(Backend::Mlx);
    watched.fail(device());
    for _ in 0..9 {
        watched.check(Healthy, true, &[]);
        watched.ask(Script::answer(2, 0.0)).unwrap();
    }
    watched.check(Degraded, true, &["error_rate"]);
    for _ in 0..8 {
        watched.fail(device());
        watched.ask(Script::answer(2, 0.0)).unwrap();
    }
    watched.check(Degraded, true, &["error_rate"]);
    // 9 and 8 of each before; now 11 of 28 and more until half of them failed.
    for _ in 0..4 {
        watched.fail(device());
        watched.fail(device());
        watched.ask(Script::answer(2, 0.0)).unwrap();
    }
    watched.check(Degraded, true, &["error_rate"]);
    for _ in 0..2 {
        watched.fail(device());
        watched.fail(device());
        watched.fail(EngineError::OutOfMemory);
        watched.ask(Script::answer(2, 0.0)).unwrap();
    }
    watched.check(Unhealthy, true, &["error_rate", "out_of_memory"]);
    watched.wait(60);
    watched.check(Healthy, true, &[]);
}

#[test]
fn refusals_and_exhaustion_are_degraded_for_the_window() {
    let watched = Watched::new(Backend::Mlx);
    watched.fail(EngineError::QueueFull {
        retry_after: Duration::from_secs(1),
    });
    watched.check(Degraded, true, &["saturated"]);
    watched.wait(30);
    watched.fail(EngineError::OutOfMemory);
    watched.check(Degraded, true, &["saturated", "out_of_memory"]);
    watched.wait(30);
    watched.check(Degraded, true, &["out_of_memory"]);
    watched.wait(30);
    watched.check(Healthy, true, &[]);
}

#[test]
fn an_engine_that_hangs_is_found_out_even_by_impatient_callers() {
    let watched = Watched::new(Backend::Mlx);
    let hang = || {
        let (first, last) = (Step::Event(started(4, 1)), Step::Hang);
        watched.engine.engine().next(Script::steps([first, last]));
        let admitted = watched
            .engine
            .stream(Prompt::text("x"), GenerateParams::default());
        let mut events = block_on(admitted).unwrap();
        while events.poll_next_unpin(&mut idle()).is_ready() {}
        events
    };
    let first = hang();
    watched.wait(29);
    watched.check(Healthy, true, &[]);
    watched.wait(1);
    watched.check(Degraded, true, &["stalled"]);
    drop(first);
    watched.check(Degraded, true, &["stalled"]);
    // An hour in which nobody asks is no silence of the engine.
    watched.wait(3600);
    watched.check(Degraded, true, &["stalled"]);
    // That an answer begins is a sign of life.
    let second = hang();
    watched.check(Healthy, true, &[]);
    watched.wait(300);
    watched.check(Unhealthy, false, &["stalled"]);
    watched.ask(Script::answer(1, 0.0)).unwrap();
    watched.check(Healthy, true, &[]);
    drop(second);
    watched.check(Healthy, true, &[]);
}

#[test]
fn a_probe_that_passes_ends_a_stall_and_a_request_that_cannot_be_does_not() {
    let watched = Watched::new(Backend::Mlx);
    watched.engine.engine().next(Script::steps([Step::Hang]));
    let admitted = watched
        .engine
        .stream(Prompt::text("x"), GenerateParams::default());
    let mut events = block_on(admitted).unwrap();
    assert!(events.poll_next_unpin(&mut idle()).is_pending());
    watched.wait(30);
    watched.check(Degraded, true, &["stalled"]);
    watched.fail(EngineError::EmptyPrompt);
    // Also where that took a while.
    let script = Script {
        admission: 1,
        ..Script::refuse(EngineError::EmptyPrompt)
    };
    watched.ask(script).unwrap_err();
    watched.check(Degraded, true, &["stalled"]);
    // What is refused before anybody has waited for it was refused on the caller's side.
    let full = EngineError::QueueFull {
        retry_after: Duration::from_secs(1),
    };
    let unavailable = EngineError::Unavailable {
        reason: "told to".to_owned(),
        retry_after: Duration::ZERO,
    };
    for error in [full.clone(), unavailable] {
        watched.fail(error);
        watched.check(Degraded, true, &["saturated", "stalled"]);
    }
    // The engine's own word is a sign of life, as one has to wait for it.
    let script = Script {
        admission: 1,
        ..Script::refuse(full)
    };
    watched.ask(script).unwrap_err();
    watched.check(Degraded, true, &["saturated"]);
    watched.wait(90);
    watched.check(Degraded, true, &["stalled"]);
    let mut changes = watched.engine.subscribe();
    watched.probe(Script::answer(1, 0.0), Healthy, true, &[]);
    let better = changes.next().now_or_never().flatten().unwrap();
    assert_eq!((better.from, better.to), (Degraded, Healthy));
    // It is counted from there.
    watched.wait(29);
    watched.check(Healthy, true, &[]);
    drop(events);
    assert_eq!(watched.engine.metrics().in_flight(), 0);
}

#[test]
fn a_caller_who_does_not_read_is_no_stall() {
    let watched = Watched::new(Backend::Mlx);
    let admitted = watched
        .engine
        .stream(Prompt::text("x"), GenerateParams::default());
    let events = block_on(admitted).unwrap();
    watched.wait(3600);
    watched.check(Healthy, true, &[]);
    drop(events);
    watched.check(Healthy, true, &[]);
}

#[test]
fn decoding_is_compared_with_its_own_median() {
    let watched = Watched::new(Backend::Mlx);
    let ask = |requests, rate| {
        for _ in 0..requests {
            watched.ask(Script::answer(11, rate)).unwrap();
        }
    };
    ask(20, 100.0);
    watched.wait(60);
    ask(9, 40.0);
    watched.check(Healthy, true, &[]);
    ask(1, 40.0);
    watched.check(Degraded, true, &["slow_decode"]);
    ask(10, 100.0);
    watched.check(Healthy, true, &[]);
}

#[test]
fn a_probe_says_what_no_request_has_said() {
    let watched = Watched::new(Backend::Mlx);
    watched.probe(Script::answer(1, 0.0), Healthy, true, &[]);
    watched.probe(Script::refuse(device()), Unhealthy, false, &["probe_failed"]);
    watched.ask(Script::answer(1, 0.0)).unwrap();
    watched.check(Degraded, true, &["probe_failed"]);
    watched.probe(Script::answer(1, 0.0), Healthy, true, &[]);
    let silent = GenerationEvent::Finished(summary(FinishReason::Stop, 0));
    watched.probe(
        Script::steps([Step::Event(silent)]),
        Unhealthy,
        false,
        &["probe_failed"],
    );
    watched.probe(
        Script::steps([Step::Event(text(1)), Step::Break]),
        Unhealthy,
        false,
        &["probe_failed"],
    );
    watched.probe(
        Script::refuse(EngineError::QueueFull {
            retry_after: Duration::from_secs(1),
        }),
        Degraded,
        true,
        &["probe_failed"],
    );
    let metrics = watched.engine.metrics();
    assert_eq!((metrics.probes.passed, metrics.probes.failed), (2, 4));
    assert_eq!(metrics.total.submitted, 1, "a probe is no request");
}

#[test]
fn a_probe_that_is_given_up_says_something_only_after_a_while() {
    let watched = Watched::new(Backend::Mlx);
    let give_up_after = |seconds| {
        watched.engine.engine().next(Script::steps([Step::Hang]));
        let mut probe = Box::pin(watched.engine.check_health());
        assert!(probe.poll_unpin(&mut idle()).is_pending());
        watched.wait(seconds);
    };
    give_up_after(4);
    watched.check(Healthy, true, &[]);
    give_up_after(5);
    watched.check(Degraded, true, &["probe_failed"]);
    let status = watched.engine.detailed_status();
    let failure = status.last_probe.unwrap().failure;
    assert_eq!(failure, Some(ProbeFailure::Abandoned { after_s: 5.0 }));
    assert_eq!(status.metrics.probes.abandoned, 2);
}

#[test]
fn changes_are_told_as_they_come() {
    let watched = Watched::new(Backend::Mlx);
    let mut events = watched.engine.subscribe();
    watched.ask(Script::answer(1, 0.0)).unwrap();
    watched.wait(7);
    for _ in 0..4 {
        watched.fail(device());
    }
    watched.ask(Script::answer(1, 0.0)).unwrap();
    let mut next = || events.next().now_or_never().flatten();
    let worse = next().unwrap();
    assert_eq!((worse.at_s, worse.from, worse.to), (7.0, Healthy, Unhealthy));
    assert!(matches!(
        worse.reasons[..],
        [HealthReason::ConsecutiveFailures {
            count: 3,
            limit: 3,
            ..
        }]
    ));
    let better = next().unwrap();
    assert_eq!(
        (better.from, better.to, better.reasons.len()),
        (Unhealthy, Healthy, 0)
    );
    assert_eq!(next(), None);
}

#[test]
fn the_status_has_everything_and_can_be_written_and_read() {
    let watched = Watched::new(Backend::Mlx);
    watched.ask(Script::answer(3, 0.0)).unwrap();
    watched.wait(2);
    watched.fail(device());
    watched.wait(3);
    let status = watched.engine.detailed_status();
    assert_eq!(
        (status.live, status.ready, status.consecutive_failures),
        (true, true, 1)
    );
    assert_eq!(status.last_success_s_ago, Some(5.0));
    assert_eq!(status.last_failure.unwrap().s_ago, 3.0);
    assert_eq!(status.model.as_ref().unwrap().id, "tiny");
    assert_eq!(
        (
            status.metrics.uptime_s,
            status.metrics.last.unwrap().usage.completion_tokens
        ),
        (5.0, 3)
    );
    let json = serde_json::to_string(&status).unwrap();
    assert_eq!(serde_json::from_str::<DetailedStatus>(&json).unwrap(), status);
}

#[test]
fn thresholds_out_of_their_range_are_refused() {
    let health = HealthConfiguration {
        window_s: 0.0,
        ..HealthConfiguration::default()
    };
    let engine = Monitored::builder(Scripted::new(Backend::Mlx)).health(health);
    assert_eq!(engine.build().unwrap_err().field(), "window_s");
}

#[test]
fn a_turn_that_does_not_end_is_a_hang_and_ends_with_it() {
    let engine = Monitored::new(Arc::new(Scripted::new(Backend::Mlx)));
    let says = |turn_s| {
        let statistics = mlx_engine_core::EngineStatistics {
            turn_s,
            ..Default::default()
        };
        *engine.engine().statistics.lock().expect("not poisoned") = Some(statistics);
        let health = engine.health();
        (health.status, health.is_live())
    };
    assert_eq!(says(None), (EngineHealth::Healthy, true));
    assert_eq!(says(Some(29.9)), (EngineHealth::Healthy, true));
    assert_eq!(says(Some(30.0)), (EngineHealth::Degraded, true));
    assert_eq!(says(Some(120.0)), (EngineHealth::Unhealthy, false));
    assert_eq!(
        engine.metrics().engine.and_then(|engine| engine.turn_s),
        Some(120.0)
    );
    // A request that ends is a sign of life: what was said before is old.
    block_on(engine.generate(Prompt::text("x"), GenerateParams::default())).unwrap();
    assert_eq!(says(None), (EngineHealth::Healthy, true));
}

#[test]
fn a_hang_is_over_when_something_came_of_it_and_not_when_somebody_left() {
    let engine = Monitored::new(Arc::new(Scripted::new(Backend::Mlx)));
    let says = |turn_s| {
        let statistics = mlx_engine_core::EngineStatistics {
            turn_s,
            ..Default::default()
        };
        *engine.engine().statistics.lock().expect("not poisoned") = Some(statistics);
    };
    let mut changes = engine.subscribe();
    let mut next = || {
        let event = changes.next().now_or_never().flatten()?;
        Some((event.from, event.to))
    };
    says(Some(150.0));
    engine.engine().next(Script::steps([Step::Hang]));
    let admitted = engine.stream(Prompt::text("x"), GenerateParams::default());
    let events = block_on(admitted).unwrap();
    assert_eq!(next(), Some((Healthy, Unhealthy)));
    drop(events);
    engine.engine().next(Script::refuse(EngineError::EmptyPrompt));
    block_on(engine.generate(Prompt::text("x"), GenerateParams::default())).unwrap_err();
    assert_eq!(next(), None, "it hangs as before");
    // A recovery ends with a proof, which looks at the engine anew.
    says(None);
    block_on(engine.probe()).unwrap();
    assert_eq!(next(), Some((Unhealthy, Healthy)));
}

#[test]
fn the_same_model_that_was_loaded_again_begins_with_a_clean_record() {
    let watched = Watched::new(Backend::Mlx);
    let loaded = |load, load_s| {
        let statistics = mlx_engine_core::EngineStatistics {
            load,
            load_s: Some(load_s),
            ..Default::default()
        };
        *watched.engine.engine().statistics.lock().expect("not poisoned") = Some(statistics);
    };
    loaded(1, 3.0);
    assert_eq!(watched.engine.metrics().load_time_s, Some(3.0));
    watched.check(Healthy, true, &[]);
    for _ in 0..3 {
        watched.fail(device());
    }
    watched.check(Unhealthy, false, &["consecutive_failures"]);
    // Nobody has looked while it was away.
    loaded(2, 5.0);
    watched.check(Healthy, true, &[]);
    assert_eq!(watched.engine.metrics().load_time_s, Some(5.0));
}

/// Memory that was given back presses no more.
#[test]
fn memory_presses_as_long_as_it_is_allocated() {
    let limits = HealthConfiguration {
        device_memory_limit_bytes: Some(100),
        ..HealthConfiguration::default()
    };
    let engine = Monitored::builder(Scripted::new(Backend::Mlx)).health(limits);
    let engine = engine.build().unwrap();
    let allocated = |active_bytes| {
        let statistics = mlx_engine_core::EngineStatistics {
            memory: Some(mlx_engine_core::DeviceMemory {
                active_bytes,
                cache_bytes: 500,
                peak_bytes: 500,
            }),
            ..Default::default()
        };
        *engine.engine().statistics.lock().expect("not poisoned") = Some(statistics);
        engine.health()
    };
    assert_eq!(allocated(99).status, Healthy);
    let pressed = allocated(150);
    let reason = HealthReason::MemoryPressure {
        memory: MemoryKind::Device,
        used_bytes: 150,
        limit_bytes: 100,
    };
    assert_eq!((pressed.status, pressed.reasons), (Degraded, vec![reason]));
    assert_eq!(allocated(20).status, Healthy);
}
