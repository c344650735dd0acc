//! A long beginning that is computed once: `cargo run --example caching -- MODEL FOLDER`.

use mlx_engine::prelude::*;
use mlx_engine::{DiskCacheConfig, EngineConfig, PrefixCacheConfig, UnloadMode};

#[tokio::main]
async fn main() -> Result<(), EngineError> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(folder)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: caching MODEL FOLDER");
        std::process::exit(2);
    };
    // At most 256 MiB of memory, and a folder that outlives the process.
    let prefix_cache = PrefixCacheConfig::of(256 << 20).with_disk(DiskCacheConfig::new(folder));
    let engine = InferenceEngine::new().with_config(EngineConfig {
        prefix_cache,
        ..EngineConfig::default()
    });
    engine.load_model(&model).await?;

    let rules = ChatMessage::system("You are the guide of a museum. Answer in one sentence. ".repeat(24));
    // It stays until it is unpinned, whatever else comes.
    engine.pin_prefix(Prompt::chat([rules.clone()])).await?;

    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(24);
    for question in ["Where are the paintings?", "When do you close?"] {
        let prompt = Prompt::chat([rules.clone(), ChatMessage::user(question)]);
        let usage = engine.generate(prompt, params.clone()).await?.usage;
        println!(
            "{question} {} of {} tokens were there",
            usage.cached_tokens, usage.prompt_tokens
        );
    }
    let kept = engine.prefix_cache().await?;
    println!(
        "{} of {} look-ups found a beginning, {} bytes are kept",
        kept.hits, kept.lookups, kept.bytes
    );
    // Without waiting for the disk, what is not written yet would be lost.
    engine.unload_with(UnloadMode::Drain).await
}
