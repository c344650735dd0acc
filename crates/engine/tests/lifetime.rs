//! How engines end, and what is left of them.
#![cfg(target_os = "linux")]

use std::time::Duration;

use futures::StreamExt;
use mlx_engine_core::{
    EngineError, EventStream, FinishReason, GenerateParams, GenerationEvent, LlmEngine, Prompt,
};
use mlx_engine_engine::{Engine, EngineConfig, MockScript, UnloadMode};
use tokio::runtime::Runtime;

/// The threads of engines in this process.
fn threads(name: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux lists threads");
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|found| found.trim().starts_with(name)).count()
}

/// A thread that was joined is listed for a moment yet.
fn no_thread_is_left() {
    let left = (0..10_000).find(|_| threads("mlx-engine") == 0);
    assert!(left.is_some(), "a thread is left behind");
}

fn endless() -> GenerateParams {
    GenerateParams::default()
        .with_ignore_eos(true)
        .with_max_tokens(4000)
}

async fn slow() -> Engine {
    let script = MockScript::default().with_step_delay(Duration::from_millis(2));
    Engine::mock("tiny", script, EngineConfig::default())
        .await
        .expect("the mock loads")
}

async fn last(mut stream: EventStream) -> Result<FinishReason, EngineError> {
    loop {
        match stream.next().await {
            Some(Ok(GenerationEvent::Finished(summary))) => return Ok(summary.finish_reason),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error),
            None => panic!("a stream ended without an end"),
        }
    }
}

/// One after the other, as they count the threads of the process.
#[test]
fn engines_end_and_leave_no_thread_behind() {
    let runtime = || Runtime::new().unwrap();
    no_thread_is_left();

    // Drained: what was taken is answered, and nothing is taken any more.
    runtime().block_on(async {
        let engine = slow().await;
        assert_eq!(threads("mlx-engine"), 1);
        let mut streams = Vec::new();
        for index in 0..20 {
            let params = GenerateParams::default()
                .with_max_tokens(10)
                .with_ignore_eos(true);
            streams.push(
                engine
                    .stream(Prompt::text(format!("request {index}")), params)
                    .await
                    .unwrap(),
            );
        }
        engine.unload_with(UnloadMode::Drain).await.unwrap();
        no_thread_is_left();
        for stream in streams {
            assert_eq!(last(stream).await.unwrap(), FinishReason::Length);
        }
        let refused = engine
            .generate(Prompt::text("late"), endless())
            .await
            .unwrap_err();
        assert!(matches!(refused, EngineError::NotLoaded { .. }));
    });

    // A drain that takes too long is cut short, and both who wait hear of the end.
    runtime().block_on(async {
        let engine = slow().await;
        let stream = engine.stream(Prompt::text("endless"), endless()).await.unwrap();
        let drain = engine.unload_with(UnloadMode::Drain);
        let abort = async {
            tokio::task::yield_now().await;
            engine.unload_with(UnloadMode::Abort).await
        };
        let (drained, aborted) = tokio::join!(drain, abort);
        drained.unwrap();
        aborted.unwrap();
        assert!(matches!(last(stream).await, Err(EngineError::NotLoaded { .. })));
        no_thread_is_left();
    });

    // Dropped while it is busy, when the runtime of its requests is gone.
    let first = runtime();
    let (engine, stream) = first.block_on(async {
        let engine = slow().await;
        let stream = engine.stream(Prompt::text("endless"), endless()).await.unwrap();
        (engine, stream)
    });
    drop(first);
    drop(engine);
    no_thread_is_left();
    let end = futures::executor::block_on(last(stream));
    assert!(matches!(end, Err(EngineError::NotLoaded { .. })));

    // A load that is given up.
    runtime().block_on(async {
        let script = MockScript::default().with_load_delay(Duration::from_millis(50));
        let load = Engine::mock("tiny", script, EngineConfig::default());
        drop(futures::poll!(Box::pin(load)));
        no_thread_is_left();
    });
}
