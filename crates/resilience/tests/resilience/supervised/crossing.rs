//! What crosses between the two processes.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use mlx_engine_core::{
    Backend, EngineError, EventStream, GenerateParams, LlmEngine, LoadProgress, Prompt, collect_events,
};
use mlx_engine_resilience::{Supervised, SupervisorConfiguration};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Echo, World, ask, quick, running, start, start_as};

#[tokio::test]
async fn events_errors_and_calls_cross_as_they_are() {
    let world = World::default();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    let progress = Box::new(move |stage| hears.lock().unwrap().push(stage));
    let engine = Supervised::start(world.clone(), json!({}), quick(), Some(progress))
        .await
        .unwrap();
    assert_eq!(
        *heard.lock().unwrap(),
        [LoadProgress::Layers { done: 1, total: 2 }]
    );
    assert_eq!(
        (engine.backend(), engine.model().unwrap().id.as_str()),
        (Some(Backend::Mlx), "echo")
    );
    assert_eq!(engine.details(), Some(json!({"launch": 0})));

    let here = Echo::new(world, 0);
    for text in ["hello", "zwölf Boxkämpfer 🥊\n\"x\"", ""] {
        let collect = |events: EventStream| async { events.map(Result::unwrap).collect::<Vec<_>>().await };
        let params = GenerateParams::default().with_max_tokens(9);
        let there = engine.stream(Prompt::text(text), params.clone()).await.unwrap();
        let same = here.stream(Prompt::text(text), params).await.unwrap();
        assert_eq!(collect(there).await, collect(same).await);
    }
    let error = engine
        .generate(Prompt::user("x"), GenerateParams::default())
        .await
        .unwrap_err();
    assert!(
        matches!(&error, EngineError::Template { source: Some(source), .. } if source.to_string() == "a source")
    );
    let error = engine
        .stream(Prompt::text("full"), GenerateParams::default())
        .await
        .err()
        .unwrap();
    assert_eq!(error.retry_after(), Some(Duration::from_secs(2)));
    let nan = GenerateParams::default().with_temperature(f32::NAN);
    assert!(matches!(
        engine.generate(Prompt::text("x"), nan).await,
        Err(EngineError::InvalidParameter(_))
    ));
    assert!(matches!(
        ask(&engine, "fail").await,
        Err(EngineError::OutOfMemory)
    ));
    assert!(matches!(
        ask(&engine, "panic").await,
        Err(EngineError::WorkerPanicked { .. })
    ));
    assert_eq!(engine.call("twice", json!(2)).await.unwrap(), json!([2, 2]));
    assert!(matches!(
        engine.call("else", Value::Null).await,
        Err(EngineError::Cancelled)
    ));
    assert_eq!(ask(&engine, "still here").await.unwrap(), "still here");
    assert_eq!(engine.status().restarts, 0);
}

#[tokio::test]
async fn many_at_once_keep_their_own_and_dropping_cancels() {
    let world = World::default();
    let engine = start(&world).await;
    let kept = running(&engine, "forever").await;
    let texts: Vec<String> = (0..50).map(|number| format!("request {number}")).collect();
    let answers = futures::future::join_all(texts.iter().map(|text| ask(&engine, text))).await;
    assert_eq!(answers.into_iter().map(Result::unwrap).collect::<Vec<_>>(), texts);
    drop(kept);
    // It would wait for ever where cancelling did not cross.
    world.notify.notified().await;
    assert_eq!(world.cancelled.load(Ordering::SeqCst), 1);
    let dropped = engine.stream(Prompt::text("never"), GenerateParams::default());
    assert!(
        tokio::time::timeout(Duration::ZERO, dropped).await.is_err(),
        "before it is admitted, too"
    );
    assert_eq!(ask(&engine, "after").await.unwrap(), "after");
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Ask,
    Drop,
    Kill,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_request_ends_once_with_its_own_answer_or_a_loss(
        acts in prop::collection::vec(prop_oneof![6 => Just(Act::Ask), 1 => Just(Act::Drop), 1 => Just(Act::Kill)], 1..60),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let world = World::default();
            let configuration = SupervisorConfiguration { max_restarts: 100, ..quick() };
            let engine = Arc::new(start_as(&world, configuration).await);
            let mut asked = Vec::new();
            for (number, act) in acts.into_iter().enumerate() {
                let text = format!("request {number}");
                match act {
                    Act::Kill => world.kill(),
                    Act::Drop => drop(engine.stream(Prompt::text("forever"), GenerateParams::default()).await),
                    Act::Ask => {
                        let engine = Arc::clone(&engine);
                        asked.push((text.clone(), tokio::spawn(async move {
                            let events = engine.stream(Prompt::text(text), GenerateParams::default()).await?;
                            collect_events(events).await
                        })));
                    }
                }
            }
            for (text, answer) in asked {
                match answer.await.unwrap() {
                    Ok(output) => assert_eq!(output.text, text),
                    Err(error) => assert!(matches!(error, EngineError::WorkerLost { .. }), "{error}"),
                }
            }
            assert_eq!(ask(&*engine, "after").await.unwrap(), "after");
        });
    }
}
