//! What is kept of requests, through the handle of an engine.

use mlx_engine_core::{ChatMessage, EngineError, GenerateParams, LlmEngine, Prompt};
use mlx_engine_engine::{DiskCacheConfig, Engine, EngineConfig, MockScript, PrefixCacheConfig, UnloadMode};

async fn engine(max_bytes: u64) -> Engine {
    let config = EngineConfig {
        prefix_cache: PrefixCacheConfig::of(max_bytes),
        ..EngineConfig::default()
    };
    let script = MockScript::reply("ok").with_bytes_per_token(10);
    Engine::mock("tiny", script, config)
        .await
        .expect("the mock loads")
}

#[tokio::test]
async fn a_conversation_computes_what_is_new() {
    let engine = engine(100_000).await;
    let mut messages = vec![ChatMessage::system("be brief")];
    let mut before = 0;
    for turn in 0..10 {
        messages.push(ChatMessage::user(format!("question {turn}")));
        let output = engine
            .generate(Prompt::chat(messages.clone()), GenerateParams::default())
            .await
            .unwrap();
        assert!(
            output.usage.cached_tokens >= before,
            "turn {turn}: {:?}",
            output.usage
        );
        assert_eq!(output.usage.cached_tokens > 0, turn > 0);
        before = output.usage.prompt_tokens;
        messages.push(ChatMessage::assistant(output.text));
    }
    let report = engine.prefix_cache().await.unwrap();
    assert_eq!((report.lookups, report.hits), (10, 9));
    // What they have in common counts once.
    let each: u64 = report.entries.iter().map(|entry| entry.bytes).sum();
    assert!(report.entries[0].bytes <= report.bytes && report.bytes < each / 2);
    assert_eq!(engine.clear_prefix_cache().await.unwrap(), report.bytes);
    assert_eq!(engine.prefix_cache().await.unwrap().bytes, 0);
}

#[tokio::test]
async fn a_prompt_that_is_pinned_stays() {
    let engine = engine(1000).await;
    let system = || Prompt::text("the system prompt");
    engine.pin_prefix(system()).await.unwrap();
    engine.pin_prefix(system()).await.unwrap();
    for index in 0..20 {
        let other = Prompt::text(format!("{index} is something else altogether"));
        engine.generate(other, GenerateParams::default()).await.unwrap();
    }
    engine.clear_prefix_cache().await.unwrap();
    let report = engine.prefix_cache().await.unwrap();
    assert_eq!(
        (report.entries.len(), report.entries[0].pinned, report.bytes),
        (1, true, 170)
    );
    let prompt = Prompt::text("the system prompt and a question");
    let output = engine.generate(prompt, GenerateParams::default()).await.unwrap();
    assert_eq!(output.usage.cached_tokens, 17);
    assert!(engine.unpin_prefix(system()).await.unwrap());
    assert!(!engine.unpin_prefix(system()).await.unwrap());
    let too_long = Prompt::text("x".repeat(101));
    let error = engine.pin_prefix(too_long).await.unwrap_err();
    assert!(
        matches!(
            error,
            EngineError::InsufficientMemory {
                required: 1010,
                available: 1000
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn what_was_computed_outlives_the_engine() {
    let folder = tempfile::tempdir().unwrap();
    let open = async |script: MockScript| {
        let disk = DiskCacheConfig {
            min_free_bytes: 0,
            ..DiskCacheConfig::new(folder.path())
        };
        let config = EngineConfig {
            prefix_cache: PrefixCacheConfig::default().with_disk(disk),
            ..EngineConfig::default()
        };
        Engine::mock("tiny", script, config).await
    };
    let prompt = || Prompt::text("many words ".repeat(80));
    let run = async |engine: &Engine| {
        let output = engine
            .generate(prompt(), GenerateParams::default())
            .await
            .unwrap();
        (output.text, output.usage.cached_tokens)
    };
    let first = open(MockScript::default()).await.unwrap();
    let (text, cached) = run(&first).await;
    assert_eq!(cached, 0);
    first.unload_with(UnloadMode::Drain).await.unwrap();

    let second = open(MockScript::default()).await.unwrap();
    assert_eq!(run(&second).await, (text.clone(), 768));
    assert_eq!(
        run(&second).await,
        (text.clone(), 879),
        "memory has more than the disk"
    );
    second.unload_with(UnloadMode::Drain).await.unwrap();

    // Every file is damaged in another way.
    for (index, file) in std::fs::read_dir(folder.path()).unwrap().enumerate() {
        let path = file.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        match index {
            0 => bytes.truncate(100),
            1 => bytes.clear(),
            _ => *bytes.last_mut().unwrap() ^= 1,
        }
        std::fs::write(&path, bytes).unwrap();
    }
    let third = open(MockScript::default()).await.unwrap();
    assert_eq!(run(&third).await, (text.clone(), 0));
    third.unload_with(UnloadMode::Drain).await.unwrap();
    // The one at which reading ended was written again.
    let fourth = open(MockScript::default()).await.unwrap();
    let (again, cached) = run(&fourth).await;
    assert!(again == text && cached >= 256, "{cached}");

    let refused = open(MockScript::default().with_whole_sequences())
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("prefix_cache.disk"), "{refused}");
}
