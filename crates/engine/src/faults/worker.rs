//! Faults that no step of a request is to blame for.

use std::sync::Arc;

use futures::StreamExt;
#[cfg(feature = "mlx")]
use mlx_engine_core::{Device, LoadProgress};
use mlx_engine_core::{EngineError, LlmEngine, Prompt, collect_events};

use super::plan::{Fault, Plan, Point};
use super::{KINDS, Kind, config, greedy, is, load, prompt, tokens, victim};
#[cfg(feature = "mlx")]
use crate::EngineConfig;
use crate::engine::{Engine, Loaded};

#[tokio::test]
async fn a_panic_outside_a_step_costs_what_runs_and_not_what_waits() {
    for &kind in KINDS {
        let sound = load(kind, &Arc::new(Plan::default()), config()).await.unwrap();
        let expected = tokens(&sound, "Blue, red and green").await;
        drop(sound);
        let plan = Arc::new(Plan::default());
        let engine = load(kind, &plan, config()).await.unwrap();
        assert_eq!(tokens(&engine, "Blue, red and green").await, expected);
        // An answer is there before it is cut for the cache: this is behind that.
        engine.prefix_cache().await.unwrap();
        // One runs, and is held until the second is with the worker: else it may have ended before.
        *plan.fault.lock().unwrap() = Some((Point::Step(1), Fault::Pause));
        let long = victim().with_max_tokens(400).with_ignore_eos(true);
        let running = engine.stream(prompt(), long).await.unwrap();
        plan.hangs.notified().await;
        let short = greedy().with_max_tokens(2);
        // The first answer that ends is cut for the cache, and the worker panics with the other running.
        *plan.fault.lock().unwrap() = Some((Point::Truncate, Fault::Panic));
        // The first poll hands the request over; its answer comes when the worker goes on.
        let (ends, ()) = futures::join!(engine.stream(Prompt::text("Red"), short), async { plan.open() });
        let (running, ends) = futures::join!(collect_events(running), collect_events(ends.unwrap()));
        let error = running.unwrap_err();
        assert!(is(&error, Fault::Panic) && error.is_retryable(), "{error}");
        assert_eq!(ends.unwrap().tokens.len(), 2, "it had ended before");
        let again = engine
            .generate(Prompt::text("Blue, red and green"), greedy())
            .await
            .unwrap();
        assert_eq!(again.tokens, expected);
        assert!(
            again.usage.cached_tokens > 0,
            "what was kept was no part of the panic"
        );
        let statistics = engine.statistics().unwrap();
        assert_eq!(
            (statistics.worker_restarts, statistics.running, statistics.queued),
            (1, 0, 0)
        );
        assert!(engine.backend().is_some());
    }
}

#[tokio::test]
async fn a_worker_that_panics_whatever_it_does_ends_and_says_so() {
    let plan = Plan::until_reload(Point::Bytes, Fault::Panic);
    let engine = load(Kind::Mock, &plan, config()).await.unwrap();
    let error = engine.generate(prompt(), greedy()).await.unwrap_err();
    assert!(matches!(error, EngineError::WorkerPanicked { .. }), "{error}");
    assert!(engine.backend().is_some(), "once is no reason to give up");
    assert!(engine.generate(prompt(), greedy()).await.is_err());
    while engine.backend().is_some() {
        tokio::task::yield_now().await;
    }
    assert!(matches!(
        engine.generate(prompt(), greedy()).await,
        Err(EngineError::NotLoaded { .. })
    ));
}

#[tokio::test]
async fn a_fault_at_load_leaves_nothing_behind() {
    type Load = fn() -> Result<Loaded<crate::MockModel>, EngineError>;
    let fails: [Load; 3] = [
        || Err(EngineError::model_load("tiny", "told to")),
        || Err(EngineError::OutOfMemory),
        || panic!("told to panic"),
    ];
    for (fail, expected) in fails.into_iter().zip([
        "model `tiny` could not be loaded",
        "device is out of memory",
        "engine worker panicked: told to panic",
    ]) {
        let loaded = Engine::load(config(), None, move |_, _| fail()).await;
        assert_eq!(loaded.err().unwrap().to_string(), expected);
    }
    #[cfg(feature = "mlx")]
    {
        let path = std::env::var("MLX_ENGINE_TEST_MODEL").expect("the tests are run by `cargo xtask test`");
        let loaded = Engine::load(config(), None, move |cancelled, _| {
            let mut progress = |stage| {
                if let LoadProgress::Layers { done: 7, .. } = stage {
                    panic!("told to panic");
                }
            };
            crate::mlx::load(
                path.as_ref(),
                None,
                mlx_engine_models::Compute::Fastest.into(),
                &EngineConfig::default(),
                cancelled,
                &mut progress,
            )
        })
        .await;
        assert!(matches!(
            loaded.err().unwrap(),
            EngineError::WorkerPanicked { .. }
        ));
        let engine = load(Kind::Mlx, &Arc::new(Plan::default()), config())
            .await
            .unwrap();
        assert_eq!(engine.device(), Device::Cpu);
        assert_eq!(tokens(&engine, "Blue").await.len(), 12);
    }
}

#[tokio::test]
async fn a_new_stream_ends_what_runs_and_the_next_is_right() {
    for &kind in KINDS {
        let engine = load(kind, &Arc::new(Plan::default()), config()).await.unwrap();
        let expected = tokens(&engine, "Blue").await;
        let mut running = engine
            .stream(prompt(), greedy().with_max_tokens(500).with_ignore_eos(true))
            .await
            .unwrap();
        assert!(running.next().await.unwrap().is_ok());
        engine.rebuild_stream().await.unwrap();
        if kind != Kind::Mock {
            let error = loop {
                match running.next().await.expect("an end") {
                    Ok(_) => {}
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, EngineError::WorkerLost { .. }), "{error}");
        }
        drop(running);
        assert_eq!(tokens(&engine, "Blue").await, expected);
    }
}
