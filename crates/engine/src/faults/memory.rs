//! Memory that MLX does not have. Each test needs the process for itself, as the limit is the process's.

use std::sync::Arc;

use futures::StreamExt;
use mlx_engine_core::{EngineError, LlmEngine, Prompt, collect_events};

use super::plan::{Fault, Plan, Point};
use super::{Kind, config, greedy, load, prompt, tokens, victim};

#[tokio::test]
async fn memory_that_one_of_several_lacks_is_its_own_lack() {
    let plan = Arc::new(Plan::default());
    let engine = load(Kind::Mlx, &plan, config()).await.unwrap();
    let short = greedy().with_max_tokens(40).with_ignore_eos(true);
    let expected = engine
        .generate(Prompt::text("Red"), short.clone())
        .await
        .unwrap()
        .tokens;
    engine.clear_prefix_cache().await.unwrap();
    // It runs, and is within the first of its pages to the end.
    let mut running = engine.stream(Prompt::text("Red"), short).await.unwrap();
    assert!(running.next().await.unwrap().is_ok());
    // The other gets to the end of its first page, and is held where it has begun.
    *plan.fault.lock().unwrap() = Some((Point::Step(1), Fault::Pause));
    let long = victim().with_max_tokens(100).with_ignore_eos(true);
    let words = Prompt::text("one two three four five six seven eight nine ten ".repeat(5));
    let other = engine.stream(words, long);
    let limit = async {
        plan.hangs.notified().await;
        mlx_engine_models::set_memory_limit(Some(1));
        plan.open();
    };
    let (other, ()) = futures::join!(other, limit);
    let (other, running) = futures::join!(collect_events(other.unwrap()), collect_events(running));
    let error = other.unwrap_err();
    assert!(matches!(error, EngineError::OutOfMemory), "{error:?}");
    assert_eq!(running.unwrap().tokens, expected);
    assert!(engine.statistics().unwrap().redone_steps > 0, "they ran together");
    mlx_engine_models::set_memory_limit(None);
    assert_eq!(tokens(&engine, "Blue").await.len(), 12);
}

#[tokio::test]
async fn exhausted_memory_is_an_error_and_the_engine_works_again() {
    let engine = load(Kind::Mlx, &Arc::new(Plan::default()), config())
        .await
        .unwrap();
    let expected = tokens(&engine, "Blue").await;
    // Not another page of keys and values.
    mlx_engine_models::set_memory_limit(Some(1));
    let error = engine
        .generate(prompt(), victim().with_max_tokens(300).with_ignore_eos(true))
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::OutOfMemory), "{error:?}");
    mlx_engine_models::set_memory_limit(None);
    assert_eq!(tokens(&engine, "Blue").await, expected);
    engine.clear_caches().await.unwrap();
    let statistics = engine.statistics().unwrap();
    assert_eq!(
        (statistics.prefix_cache_bytes, statistics.prefix_cache_sequences),
        (0, 0)
    );
    assert!(statistics.memory.unwrap().active_bytes > 0);
    assert_eq!(tokens(&engine, "Blue").await, expected);
}
