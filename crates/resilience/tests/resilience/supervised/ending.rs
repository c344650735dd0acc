//! How an engine apart is ended, by either side.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::StreamExt;
use mlx_engine_core::{EngineError, GenerateParams, GenerationEvent, LlmEngine, Prompt};
use mlx_engine_resilience::{ChildState, serve};

use super::{Echo, World, ask, running, start};

#[tokio::test]
async fn draining_takes_nothing_more_and_ends_with_the_last_answer() {
    let world = World::default();
    let engine = Arc::new(start(&world).await);
    let events = engine.stream(Prompt::text("when told"), GenerateParams::default());
    let mut running = events.await.unwrap();
    assert!(running.next().await.unwrap().is_ok());
    let drains = tokio::spawn({
        let engine = Arc::clone(&engine);
        async move { engine.drain().await }
    });
    // It is taken back as soon as the other thread has begun.
    while ask(&*engine, "late").await.is_ok() {
        tokio::task::yield_now().await;
    }
    world.go.notify_one();
    let last = running.next().await.unwrap();
    assert!(matches!(last, Ok(GenerationEvent::Finished(_))), "{last:?}");
    drains.await.unwrap().unwrap();
    assert_eq!(engine.status().state, ChildState::Unloaded);

    // Who unloads waits for no answer.
    let engine = Arc::new(start(&world).await);
    let events = engine.stream(Prompt::text("forever"), GenerateParams::default());
    let mut running = events.await.unwrap();
    let drains = tokio::spawn({
        let engine = Arc::clone(&engine);
        async move { engine.drain().await }
    });
    while ask(&*engine, "late").await.is_ok() {
        tokio::task::yield_now().await;
    }
    engine.unload().await.unwrap();
    drains.await.unwrap().unwrap();
    let error = loop {
        match running.next().await.expect("an end") {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, EngineError::NotLoaded { .. }), "{error}");
}

#[tokio::test]
async fn what_was_unloaded_stays_so() {
    let world = World::default();
    let engine = start(&world).await;
    let mut runs = running(&engine, "forever").await;
    engine.unload().await.unwrap();
    engine.unload().await.unwrap();
    assert!(matches!(
        runs.next().await,
        Some(Err(EngineError::NotLoaded { .. }))
    ));
    assert!(matches!(ask(&engine, "x").await, Err(EngineError::NotLoaded { model }) if model == "echo"));
    assert!(matches!(
        engine.restart().await,
        Err(EngineError::NotLoaded { .. })
    ));
    assert_eq!(
        (engine.backend(), engine.status().state),
        (None, ChildState::Unloaded)
    );
    assert_eq!(
        world.cancelled.load(Ordering::SeqCst),
        1,
        "what ran there was ended there"
    );
    assert_eq!(world.launches.load(Ordering::SeqCst), 1);
    assert_eq!(
        world.finished.load(Ordering::SeqCst),
        1,
        "who unloads waits for the last that it does"
    );
}

#[tokio::test]
async fn a_program_that_speaks_another_language_is_left() {
    let serves = |bytes: &[u8]| {
        let (mut program, connection) = UnixStream::pair().unwrap();
        program.write_all(bytes).unwrap();
        program.shutdown(Shutdown::Write).unwrap();
        async move {
            let served = serve(connection, |_, _| async {
                Err::<Echo, _>(EngineError::EmptyPrompt)
            })
            .await;
            drop(program);
            served
        }
    };
    assert!(serves(b"").await.is_ok());
    assert!(serves(b"GET / HTTP/1.1\r\n\r\n").await.is_ok());
    let load = br#"{"load":{"version":"0.0.0-other","setup":null}}"#;
    let frame = [&(load.len() as u32).to_le_bytes()[..], load].concat();
    let error = serves(&frame).await.unwrap_err();
    assert!(error.to_string().contains("version 0.0.0-other"), "{error}");
}
