//! What health says of a fault, and what recovery does about it.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use mlx_engine_core::{EngineError, GenerationEvent, LlmEngine};
use mlx_engine_monitor::{EngineHealth, HealthConfiguration, Monitored};
use mlx_engine_resilience::{
    RecoveryConfiguration, RecoveryStep, Reloadable, ResilienceConfiguration, Resilient,
};

use super::plan::{Fault, Plan, Point};
use super::{KINDS, Kind, config, load, prompt, tokens, victim};
use crate::engine::Engine;

/// An engine that is watched and brought back, with a health that one fault changes.
async fn watched(kind: Kind, plan: &Arc<Plan>) -> Resilient<Monitored<Reloadable<Engine>>> {
    let again = Arc::clone(plan);
    let engine = Reloadable::load(move || {
        let plan = Arc::clone(&again);
        Box::pin(async move { load(kind, &plan, config()).await })
    })
    .await
    .expect("it loads")
    .with_unload_limit(Duration::from_millis(50));
    let health = HealthConfiguration {
        max_consecutive_failures: 1,
        degraded_turn_s: 0.001,
        unhealthy_turn_s: 0.002,
        ..HealthConfiguration::default()
    };
    let resilience = ResilienceConfiguration {
        recovery: RecoveryConfiguration {
            automatic: false,
            proof_timeout: Duration::from_secs(20),
            ..RecoveryConfiguration::default()
        },
        ..ResilienceConfiguration::default()
    };
    let monitored = Monitored::builder(engine).health(health).build().expect("valid");
    Resilient::builder(monitored)
        .configuration(resilience)
        .recoverable()
        .build()
        .expect("valid")
}

fn well(kind: Kind) -> EngineHealth {
    match kind {
        Kind::Mock => EngineHealth::Degraded,
        #[cfg(feature = "mlx")]
        Kind::Mlx => EngineHealth::Healthy,
    }
}

#[tokio::test]
async fn a_hang_is_found_reported_and_replaced() {
    for &kind in KINDS {
        let plan = Plan::until_reload(Point::Step(1), Fault::Hang);
        let engine = watched(kind, &plan).await;
        let expected = tokens(engine.engine().engine(), "Blue").await;
        let mut running = engine.stream(prompt(), victim()).await.unwrap();
        assert!(matches!(
            running.next().await,
            Some(Ok(GenerationEvent::Started { .. }))
        ));
        plan.hangs.notified().await;
        // The time of the turn grows until it is too long.
        while engine.engine().health().status != EngineHealth::Unhealthy {
            tokio::task::yield_now().await;
        }
        let report = engine.engine().health();
        assert!(
            report
                .reasons
                .iter()
                .any(|reason| reason.to_string().contains("a turn has taken")),
            "{report:?}"
        );
        assert!(!report.is_live());
        // Nobody waits for the proof that the engine hangs: the step is asked for.
        let recovered =
            mlx_engine_resilience::Recover::recover(engine.engine(), RecoveryStep::ReloadModel).await;
        assert!(recovered.is_ok(), "{recovered:?}");
        let error = loop {
            match running.next().await.expect("an end") {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(
            matches!(&error, EngineError::WorkerLost { .. }) && error.is_retryable(),
            "{error}"
        );
        plan.open();
        assert_eq!(tokens(&engine, "Blue").await, expected);
        assert_eq!(engine.engine().health().status, well(kind));
    }
}
