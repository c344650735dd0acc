//! What a request costs around the model, and with it.
//!
//! `prompt` and `generate` need the test model, which `cargo xtask bench` names in `MLX_ENGINE_TEST_MODEL`; without it, or
//! without the feature `mlx`, only `scheduler` runs and the others say that they do not.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mlx_engine::MockScript;
use mlx_engine::prelude::*;
use tokio::runtime::Runtime;

/// Tokens of an answer of the mock.
const MOCK_TOKENS: usize = 256;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .build()
        .expect("a runtime")
}

/// Channel, scheduler, detokenizer and stop strings: a token of the mock costs nothing itself.
fn scheduler(criterion: &mut Criterion) {
    let runtime = runtime();
    let script = MockScript::reply("x".repeat(MOCK_TOKENS - 1));
    let engine = InferenceEngine::new()
        .with_backend(BackendChoice::Mock)
        .with_mock(script);
    runtime
        .block_on(engine.load_model("mock"))
        .expect("the mock loads");
    let params = GenerateParams::default().with_stop(["never said"]);
    let mut group = criterion.benchmark_group("scheduler");
    group.throughput(Throughput::Elements(MOCK_TOKENS as u64));
    group.bench_function("tokens", |bencher| {
        bencher.iter(|| {
            runtime
                .block_on(engine.generate(Prompt::text("Hi"), params.clone()))
                .expect("an answer")
        });
    });
    group.finish();
}

#[cfg(feature = "mlx")]
fn model() -> Option<String> {
    let model = std::env::var("MLX_ENGINE_TEST_MODEL").ok();
    if model.is_none() {
        eprintln!(
            "MLX_ENGINE_TEST_MODEL is not set: `prompt` and `generate` do not run; use `cargo xtask bench`"
        );
    }
    model
}

/// Template and tokenizer, for a conversation of about 2,000 tokens.
#[cfg(feature = "mlx")]
fn prompt(criterion: &mut Criterion) {
    let Some(model) = model() else { return };
    let encoder = InferenceEngine::new()
        .load_encoder(&model)
        .expect("the tokenizer loads");
    let turn = "The quick brown fox jumps over the lazy dog, and the dog does not mind. ".repeat(6);
    let messages: Vec<ChatMessage> = (0..20)
        .map(|i| {
            if i % 2 == 0 {
                ChatMessage::user(&*turn)
            } else {
                ChatMessage::assistant(&*turn)
            }
        })
        .collect();
    let prompt = Prompt::chat(messages);
    let tokens = encoder.encode(&prompt).expect("the prompt encodes").len();
    let mut group = criterion.benchmark_group("prompt");
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function("template", |bencher| {
        bencher.iter(|| encoder.text(&prompt).expect("it renders"));
    });
    group.bench_function("template and tokenizer", |bencher| {
        bencher.iter(|| encoder.encode(&prompt).expect("it encodes"));
    });
    group.finish();
}

/// The real model: a short prompt and a few tokens.
#[cfg(feature = "mlx")]
fn generate(criterion: &mut Criterion) {
    let Some(model) = model() else { return };
    let runtime = runtime();
    let engine = InferenceEngine::new();
    runtime
        .block_on(engine.load_model(&model))
        .expect("the model loads");
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(16)
        .with_ignore_eos(true);
    let mut group = criterion.benchmark_group("generate");
    group.sample_size(10).throughput(Throughput::Elements(16));
    group.bench_function("16 tokens", |bencher| {
        bencher.iter(|| {
            runtime
                .block_on(engine.generate(Prompt::tokens([1, 2, 3]), params.clone()))
                .expect("an answer")
        });
    });
    group.finish();
}

#[cfg(feature = "mlx")]
criterion_group!(benches, scheduler, prompt, generate);
#[cfg(not(feature = "mlx"))]
criterion_group!(benches, scheduler);
criterion_main!(benches);
