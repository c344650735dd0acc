//! Files of the prefix cache: whatever is in one, the answer is the same.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mlx_engine_core::{GenerateParams, LlmEngine, Prompt};
use mlx_engine_engine::{DiskCacheConfig, Engine, EngineConfig, MockScript, PrefixCacheConfig, UnloadMode};
use tokio::runtime::{Builder, Runtime};

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime")
});

/// The one file of a prompt, as it was written, and the answer to that.
struct Written {
    path: PathBuf,
    bytes: Vec<u8>,
    answer: String,
}

static WRITTEN: LazyLock<Written> = LazyLock::new(|| {
    let folder = folder();
    let _ = fs::remove_dir_all(&folder);
    let (answer, cached) = RUNTIME.block_on(ask());
    assert_eq!(cached, 0);
    let mut files = fs::read_dir(&folder).expect("the folder");
    let path = files.next().expect("a file").expect("its name").path();
    assert!(files.next().is_none(), "the prompt is one chunk and a bit");
    let bytes = fs::read(&path).expect("it can be read");
    Written { path, bytes, answer }
});

fn folder() -> PathBuf {
    PathBuf::from(format!("target/prefixes-{}", std::process::id()))
}

/// Asks an engine that has just begun. Returns the answer, and how many tokens of the prompt were on disk.
async fn ask() -> (String, u32) {
    let disk = DiskCacheConfig {
        min_free_bytes: 0,
        ..DiskCacheConfig::new(folder())
    };
    let config = EngineConfig {
        prefix_cache: PrefixCacheConfig::default().with_disk(disk),
        ..EngineConfig::default()
    };
    let engine = Engine::mock("tiny", MockScript::default(), config)
        .await
        .expect("an engine");
    let prompt = Prompt::text("many words ".repeat(25));
    let output = engine
        .generate(prompt, GenerateParams::default())
        .await
        .expect("an answer");
    engine.unload_with(UnloadMode::Drain).await.expect("it ends");
    (output.text, output.usage.cached_tokens)
}

fuzz_target!(|bytes: &[u8]| {
    let written = &*WRITTEN;
    fs::write(&written.path, bytes).expect("it can be written");
    let (answer, cached) = RUNTIME.block_on(ask());
    assert_eq!(answer, written.answer);
    assert!(cached > 0 || bytes != written.bytes, "what was written is found");
});
