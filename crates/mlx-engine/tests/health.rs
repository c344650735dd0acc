//! Metrics, health, retry and recovery, as a program sees them on the facade.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use mlx_engine::prelude::*;
use mlx_engine::{EngineHealth, MockFault, MockScript};

fn mock(script: MockScript) -> InferenceEngine {
    InferenceEngine::new()
        .with_backend(BackendChoice::Mock)
        .with_mock(script)
}

#[tokio::test]
async fn health_follows_the_model() {
    let engine = mock(MockScript::reply("Paris"));
    assert_eq!(
        engine.health().status,
        EngineHealth::Unhealthy,
        "nothing is loaded"
    );
    engine.load_model("tiny").await.unwrap();
    let report = engine.check_health().await;
    assert_eq!(
        report.status,
        EngineHealth::Degraded,
        "a mock is no model: {report:?}"
    );
    engine.unload().await.unwrap();
    assert_eq!(engine.health().status, EngineHealth::Unhealthy);
    let report = engine.attempt_recovery().await;
    assert!(!report.recovered, "what was unloaded on purpose stays so");
}

#[tokio::test]
async fn a_load_is_told_with_its_time_before_anything_is_asked() {
    let engine = mock(MockScript::reply("Paris"));
    let mut changes = engine.health_events();
    engine.load_model("tiny").await.unwrap();
    let change = changes.next().await.unwrap();
    assert_eq!(
        (change.from, change.to),
        (EngineHealth::Unhealthy, EngineHealth::Degraded)
    );
    let first = engine.performance_metrics();
    assert_eq!(first.load_time_s, engine.load_seconds());
    assert!(first.load_time_s.is_some());
    engine.load_model("tiny").await.unwrap();
    let second = engine.performance_metrics();
    assert_eq!(second.load_time_s, engine.load_seconds());
    let load = |metrics: &mlx_engine::InferenceMetrics| metrics.engine.map(|engine| engine.load);
    assert!(load(&second) > load(&first));
}

#[tokio::test]
async fn what_was_answered_is_counted() {
    let engine = mock(MockScript::reply("Paris"));
    engine.load_model("tiny").await.unwrap();
    for _ in 0..3 {
        engine
            .generate("Where?", GenerateParams::default())
            .await
            .unwrap();
    }
    let mut stream = engine.stream("Where?", GenerateParams::default()).await.unwrap();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    let metrics = engine.performance_metrics();
    assert_eq!((metrics.total.submitted, metrics.total.cancelled), (4, 1));
    // Five bytes and the end, three times, and what was there of the fourth.
    assert!(metrics.total.generated_tokens >= 18, "{metrics:?}");
    let page = engine.prometheus();
    let submitted = page
        .lines()
        .find(|line| line.starts_with("mlx_engine_requests_submitted_total"));
    assert!(submitted.is_some_and(|line| line.ends_with(" 4")), "{page}");
    assert!(page.contains("\nmlx_engine_circuit_open 0\n"), "{page}");
    let status = engine.detailed_status();
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(
        (&json["live"], &json["resilience"]["breaker"]),
        (&true.into(), &"closed".into())
    );
    assert_eq!(
        serde_json::from_value::<mlx_engine::EngineStatus>(json).unwrap(),
        status
    );
}

/// How often as many requests at once were answered, and were refused.
async fn all_at_once(requests: usize, config: mlx_engine::EngineConfig) -> (u64, u64) {
    let script = MockScript::reply("Paris").with_step_delay(Duration::from_millis(1));
    let engine = mock(script).with_config(config);
    engine.load_model("tiny").await.expect("it loads");
    let ask = || engine.generate("Where?", GenerateParams::default());
    let answers = futures::future::join_all((0..requests).map(|_| ask())).await;
    for answer in answers {
        match answer {
            Ok(output) => assert_eq!(output.text, "Paris"),
            Err(error) => assert!(matches!(error, EngineError::QueueFull { .. }), "{error}"),
        }
    }
    // What the engine did not hear of is not in these.
    let total = engine.performance_metrics().total;
    assert_eq!(total.submitted, requests as u64);
    (total.finished.total(), total.failed())
}

#[tokio::test]
async fn how_many_wait_is_what_the_engine_is_told_and_no_more() {
    use mlx_engine::EngineConfig;

    let config = |max_batch, max_queue| EngineConfig {
        max_batch,
        max_queue,
        ..EngineConfig::default()
    };
    assert_eq!(all_at_once(400, config(128, 1000)).await, (400, 0));
    let (answered, refused) = all_at_once(40, config(1, 2)).await;
    assert!(
        answered >= 3 && refused > 0 && answered + refused == 40,
        "{answered} {refused}"
    );
}

#[tokio::test]
async fn a_model_that_comes_late_serves_at_once() {
    use mlx_engine::{BreakerState, HealthConfiguration, ResilienceConfiguration};

    let engine = mock(MockScript::reply("Paris"));
    let ask = async |engine: &InferenceEngine| engine.generate("Where?", GenerateParams::default()).await;
    for _ in 0..5 {
        let error = ask(&engine).await.unwrap_err();
        assert!(matches!(error, EngineError::NotLoaded { .. }), "{error}");
    }
    let status = engine.resilience_status();
    assert_eq!((status.breaker, status.recoveries), (BreakerState::Closed, 0));
    engine.load_model("tiny").await.unwrap();
    assert_eq!(ask(&engine).await.unwrap().text, "Paris");

    // What failed before says nothing about what was loaded since.
    let mut resilience = ResilienceConfiguration::default();
    resilience.recovery.automatic = false;
    let broken = (0..5).fold(MockScript::reply("Paris"), |script, _| {
        script.with_fault(0, MockFault::Device)
    });
    let engine = mock(broken).with_resilience(resilience).unwrap();
    engine.load_model("tiny").await.unwrap();
    for _ in 0..5 {
        ask(&engine).await.unwrap_err();
    }
    assert_eq!(engine.resilience_status().breaker, BreakerState::Open);
    // By a handle with a circuit of its own.
    engine
        .clone()
        .with_mock(MockScript::reply("Paris"))
        .with_health(HealthConfiguration::default())
        .unwrap()
        .load_model("tiny")
        .await
        .unwrap();
    assert_eq!(engine.resilience_status().breaker, BreakerState::Closed);
    assert_eq!(ask(&engine).await.unwrap().text, "Paris");
}

#[tokio::test]
async fn a_fault_is_an_error_and_a_retry_answers() {
    for fault in [MockFault::Panic, MockFault::OutOfMemory, MockFault::Device] {
        let engine = mock(MockScript::reply("Paris").with_fault(2, fault));
        engine.load_model("tiny").await.unwrap();
        let error = engine
            .generate("Where?", GenerateParams::default())
            .await
            .unwrap_err();
        assert!(error.is_retryable(), "{error}");
        let output = engine
            .generate("Where?", GenerateParams::default())
            .await
            .unwrap();
        assert_eq!(output.text, "Paris");

        // The fault comes back with the model that is loaded again.
        engine.load_model("tiny").await.unwrap();
        let output = engine
            .generate_with_retry("Where?", GenerateParams::default())
            .await;
        assert_eq!(output.unwrap().text, "Paris");
        let report = engine.attempt_recovery().await;
        assert!(report.recovered && report.steps.is_empty(), "{report:?}");
        assert_eq!(engine.performance_metrics().total.errors.values().sum::<u64>(), 2);
    }
}

/// An engine whose first token fails after every load, up to eight times, and which recovers where it is asked to.
fn faulty(fall_back: bool) -> InferenceEngine {
    use mlx_engine::{RecoveryConfiguration, ResilienceConfiguration};

    let recovery = RecoveryConfiguration {
        fall_back,
        automatic: false,
        ..RecoveryConfiguration::default()
    };
    let resilience = ResilienceConfiguration {
        recovery,
        ..ResilienceConfiguration::default()
    };
    let script = (0..8).fold(MockScript::reply("Paris"), |script, _| {
        script.with_fault(0, MockFault::Device)
    });
    mock(script).with_resilience(resilience).expect("it is valid")
}

#[tokio::test]
async fn recovery_falls_back_only_where_it_may_and_says_so() {
    use mlx_engine::RecoveryStep;

    for (allowed, policy) in [
        (false, FallbackPolicy::OnLoadFailure),
        (true, FallbackPolicy::Never),
        (true, FallbackPolicy::OnLoadFailure),
    ] {
        let engine = faulty(allowed).with_fallback(policy);
        engine.load_model("tiny").await.unwrap();
        assert!(
            engine
                .generate("Where?", GenerateParams::default())
                .await
                .is_err()
        );
        let report = engine.attempt_recovery().await;
        let steps: Vec<_> = report.steps.iter().map(|step| step.step).collect();
        let before = [RecoveryStep::ClearCaches, RecoveryStep::ReloadModel];
        let falls = allowed && policy == FallbackPolicy::OnLoadFailure;
        let expected = if falls {
            [&before[..], &[RecoveryStep::FallBack]].concat()
        } else {
            before.to_vec()
        };
        assert_eq!(steps, expected, "{report:?}");
        // What is fallen back to is the same mock here, and no better.
        assert!(!report.recovered);
        assert_eq!(engine.fallback_reason().is_some(), falls);
        assert_eq!(
            engine
                .health()
                .reasons
                .iter()
                .any(|reason| reason.to_string().contains("a fallback serves")),
            falls
        );
    }
}

#[tokio::test]
async fn recovery_falls_back_to_the_model_that_is_named_and_tries_the_first_again() {
    use mlx_engine::RecoveryStep;

    let engine = faulty(true)
        .with_fallback(FallbackPolicy::Never)
        .with_fallback_model("smaller");
    engine.load_model("tiny").await.unwrap();
    let loaded = || engine.model().map(|model| model.id.clone());
    assert_eq!(loaded().as_deref(), Some("tiny"));
    let steps = async || -> Vec<RecoveryStep> {
        let report = engine.attempt_recovery().await;
        // What is named fails as the first one does here.
        assert!(!report.recovered, "{report:?}");
        report.steps.iter().map(|step| step.step).collect()
    };
    let before = [RecoveryStep::ClearCaches, RecoveryStep::ReloadModel];
    let all = [&before[..], &[RecoveryStep::FallBack]].concat();
    for _ in 0..2 {
        assert_eq!(steps().await, all);
        assert_eq!(loaded().as_deref(), Some("smaller"));
        assert_eq!(
            engine.fallback_reason().as_deref(),
            Some("`tiny` could not be brought back")
        );
    }
    let reasons = engine.health().reasons;
    assert!(
        reasons
            .iter()
            .any(|reason| reason.to_string().contains("a fallback serves")),
        "{reasons:?}"
    );
    // The next load is no fallback.
    engine.load_model("tiny").await.unwrap();
    assert_eq!(
        (loaded().as_deref(), engine.fallback_reason()),
        (Some("tiny"), None)
    );
}

/// A load that hangs is given up when the step has taken too long, and is tried again at the next recovery.
#[tokio::test]
async fn a_reload_that_is_given_up_may_be_tried_again() {
    use mlx_engine::{RecoveryConfiguration, RecoveryStep, ResilienceConfiguration, StepOutcome};

    let resilience = ResilienceConfiguration {
        recovery: RecoveryConfiguration {
            automatic: false,
            step_timeout: Duration::from_millis(1),
            ..RecoveryConfiguration::default()
        },
        ..ResilienceConfiguration::default()
    };
    let hangs = Arc::new(AtomicBool::new(false));
    // Broken until it is loaded anew, and then again.
    let script = MockScript::reply("Paris").with_hanging_loads(Arc::clone(&hangs));
    let script = (0..3).fold(script, |script, _| script.with_fault(0, MockFault::Device));
    let engine = mock(script).with_resilience(resilience).unwrap();
    engine.load_model("tiny").await.unwrap();
    hangs.store(true, Ordering::Relaxed);
    for recovery in 0..3 {
        let report = engine.attempt_recovery().await;
        let reload = report.steps.last().expect("it tries");
        assert_eq!(
            (reload.step, &reload.outcome),
            (RecoveryStep::ReloadModel, &StepOutcome::TimedOut),
            "{recovery}: {report:?}"
        );
        assert_eq!(engine.health().status, EngineHealth::Unhealthy);
    }
}

#[tokio::test]
async fn a_load_that_fails_is_told_by_its_type_and_the_next_one_serves() {
    let broken = mock(MockScript::default().with_load_failure("no such tensor"));
    let health = |engine: &InferenceEngine| {
        let report = engine.health();
        (report.status, report.is_live(), report.is_ready())
    };
    let nothing = (EngineHealth::Unhealthy, true, false);
    assert_eq!(health(&broken), nothing, "before");
    let error = broken.load_model("tiny").await.unwrap_err();
    assert!(
        matches!(error, EngineError::ModelLoad { .. }) && !error.is_retryable(),
        "{error}"
    );
    assert_eq!(health(&broken), nothing, "after");
    let report = broken.attempt_recovery().await;
    assert!(
        !report.recovered && report.steps.is_empty(),
        "nothing was there to be brought back: {report:?}"
    );
    // Clones share the model.
    let sound = broken.clone().with_mock(MockScript::reply("Paris"));
    sound.load_model("tiny").await.unwrap();
    assert_eq!(health(&broken), (EngineHealth::Degraded, true, true));
    let output = broken.generate("Where?", GenerateParams::default()).await;
    assert_eq!(output.unwrap().text, "Paris");
}

#[tokio::test]
async fn a_configuration_is_measured_and_the_engine_keeps_the_one_that_is_told() {
    use mlx_engine::{EngineConfig, OptimizeGoal, OptimizeOptions};

    let engine = mock(MockScript::default());
    let options = OptimizeOptions {
        prompt_tokens: 64,
        answer_tokens: 4,
        ..OptimizeOptions::new(OptimizeGoal::Throughput)
    };
    let error = engine.optimize_performance(options.clone()).await.unwrap_err();
    assert!(matches!(error, EngineError::NotLoaded { .. }), "{error}");
    engine.load_model("tiny").await.unwrap();
    let report = engine.optimize_performance(options.clone()).await.unwrap();
    // Which is fastest is the machine's affair; what was tried, and what is left, is not.
    assert!(
        report.trials.iter().any(|trial| trial.knob == "max_batch"),
        "{report:?}"
    );
    assert!(
        report.trials.iter().all(|trial| trial.error.is_none()),
        "{report:?}"
    );
    assert_eq!(
        report.outcome == mlx_engine::OptimizeOutcome::Improved,
        report.config != EngineConfig::default()
    );
    let again = engine
        .optimize_performance(OptimizeOptions {
            time_limit_s: 0.0,
            ..options.clone()
        })
        .await
        .unwrap();
    assert_eq!(again.config, report.config, "it goes on from where it was left");
    assert_eq!(again.outcome, mlx_engine::OptimizeOutcome::OutOfTime);
    let output = engine
        .generate("Where?", GenerateParams::default())
        .await
        .unwrap();
    assert!(!output.text.is_empty());

    // What changes answers, and what depends on the question, only where that is said.
    let all = OptimizeOptions {
        goal: OptimizeGoal::Latency,
        sample: Some("Where is the sea?".to_owned()),
        kv_integers: true,
        ..options.clone()
    };
    let report = engine.optimize_performance(all).await.unwrap();
    for knob in ["prefill_chunk", "threads", "kv.bits", "speculation"] {
        assert!(
            report.trials.iter().any(|trial| trial.knob == knob),
            "{knob}: {report:?}"
        );
    }
    assert!(
        report.trials.iter().all(|trial| trial.error.is_none()),
        "{report:?}"
    );
    let applied = |config: &EngineConfig| {
        let config = config.clone();
        (
            config.threads,
            config.max_batch,
            config.prefill_chunk,
            config.kv,
            config.speculation,
        )
    };
    assert_eq!(
        applied(&engine.engine().unwrap().config()),
        applied(&report.config),
        "it is applied, and not what was tried last"
    );

    let wrong = OptimizeOptions {
        concurrency: 0,
        ..options.clone()
    };
    assert!(matches!(
        engine.optimize_performance(wrong).await,
        Err(EngineError::InvalidParameter(_))
    ));
    let long = OptimizeOptions {
        prompt_tokens: 5000,
        ..options
    };
    assert!(matches!(
        engine.optimize_performance(long).await,
        Err(EngineError::PromptTooLong { .. })
    ));
}
