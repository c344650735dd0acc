//! A model that is not here is fetched when it is loaded, from the hub that the engine was told.
#![cfg(all(feature = "hub", feature = "mlx"))]

#[expect(dead_code, reason = "most of its faults are for the tests of the hub's crate")]
#[path = "../../hub/tests/server/mod.rs"]
mod server;

use std::path::Path;
use std::sync::{Arc, Mutex};

use mlx_engine::hub::{Environment, Hub, HubOptions};
use mlx_engine::prelude::*;
use mlx_engine::{FetchPolicy, LoadProgress};
use server::{COMMIT, HubServer};

const REPO: &str = "owner/tiny";

const TOKENIZER: &str =
    r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;

/// A server that has the smallest model that there is, and its hub with an empty cache.
fn world(cache: &Path) -> (HubServer, Hub) {
    let server = HubServer::start();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/fixtures/tiny/llama");
    for file in ["config.json", "model.safetensors"] {
        let content = std::fs::read(tiny.join(file)).expect("the fixture is there");
        server.add(REPO, COMMIT, file, content);
    }
    server.add(REPO, COMMIT, "tokenizer.json", TOKENIZER);
    let mut environment = Environment::from_lookup(|_| None);
    environment.cache = Some(cache.to_owned());
    environment.endpoint = server.endpoint();
    let hub = Hub::with_options(HubOptions::new(environment)).expect("a hub");
    (server, hub)
}

#[tokio::test]
async fn a_model_that_is_not_here_is_fetched_once_and_told_of() {
    let cache = tempfile::tempdir().expect("a folder");
    let (server, hub) = world(cache.path());
    let engine = InferenceEngine::new().with_hub(hub);
    let told = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&told);
    let progress = move |stage| {
        if let LoadProgress::Fetching { done, total, .. } = stage {
            hears.lock().expect("not poisoned").push((done, total));
        }
    };
    engine
        .load_model_with_progress(REPO, Box::new(progress))
        .await
        .expect("it is fetched and loaded");
    assert_eq!(engine.backend(), Some(Backend::Mlx));
    let told = told.lock().expect("not poisoned").clone();
    assert!(
        matches!(told.last(), Some((done, total)) if *done > 0 && done == total),
        "{told:?}"
    );
    let params = GenerateParams::default().with_max_tokens(2);
    let output = engine.generate(Prompt::tokens([1, 2]), params).await;
    assert_eq!(output.expect("it answers").usage.completion_tokens, 2);

    server.forget();
    engine.load_model(REPO).await.expect("it is here");
    assert!(server.seen().is_empty(), "{:?}", server.seen());
}

#[tokio::test]
async fn an_engine_that_is_to_fetch_nothing_asks_nobody() {
    let cache = tempfile::tempdir().expect("a folder");
    let (server, hub) = world(cache.path());
    let engine = InferenceEngine::new()
        .with_hub(hub)
        .with_fetch(FetchPolicy::Never);
    let error = engine.load_model(REPO).await.expect_err("it is not here");
    assert!(
        matches!(&error, EngineError::ModelNotFound { reference, .. } if reference == REPO),
        "{error:?}"
    );
    assert!(server.seen().is_empty(), "{:?}", server.seen());
    assert_eq!(engine.backend(), None);
}

#[tokio::test]
async fn what_the_hub_does_not_have_is_not_found() {
    let cache = tempfile::tempdir().expect("a folder");
    let (_server, hub) = world(cache.path());
    let engine = InferenceEngine::new().with_hub(hub);
    let error = engine
        .load_model("owner/nothing")
        .await
        .expect_err("there is none");
    assert!(
        matches!(&error, EngineError::ModelNotFound { hint: Some(hint), .. } if hint.contains("owner/nothing")),
        "{error:?}"
    );
}
