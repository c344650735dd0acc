//! The facade on the real model.
#![cfg(feature = "mlx")]

use std::sync::{Arc, Mutex};

use futures::StreamExt;
use mlx_engine::prelude::*;
use mlx_engine::{Device, EngineConfig, KvConfig, LoadProgress, OutputConstraint};
use serde_json::Value;

fn model() -> String {
    let path = std::env::var("MLX_ENGINE_TEST_MODEL");
    path.expect("MLX_ENGINE_TEST_MODEL names the test model; run the tests by `cargo xtask test`")
}

async fn load() -> InferenceEngine {
    let engine = InferenceEngine::new();
    engine.load_model(&model()).await.expect("the model loads");
    engine
}

#[tokio::test]
async fn the_capital_of_france_is_paris() {
    let engine = InferenceEngine::new();
    let stages = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&stages);
    let progress = Box::new(move |stage| seen.lock().unwrap().push(stage));
    let configuration = engine.load_model_with_progress(&model(), progress).await.unwrap();
    assert_eq!(configuration.parameters, 134_515_008);
    assert_eq!(
        (configuration.context_length, configuration.family.as_str()),
        (8192, "llama")
    );
    let stages = stages.lock().unwrap().clone();
    assert!(matches!(stages[0], LoadProgress::Bytes { done: 0, .. }));
    assert!(stages.contains(&LoadProgress::Layers { done: 30, total: 30 }));
    assert_eq!(stages.last(), Some(&LoadProgress::Ready));

    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(32);
    let output = engine
        .generate("What is the capital of France?", params)
        .await
        .unwrap();
    assert_eq!(output.text, "The capital of France is Paris.");
    assert_eq!((output.backend, output.device), (Backend::Mlx, Device::Cpu));
    assert_eq!(output.usage.completion_tokens, 8);
    assert!(output.peak_memory_bytes > 98_362_432);
}

#[tokio::test]
async fn what_was_measured_to_be_best_is_in_use_and_loads_at_the_next_start() {
    use mlx_engine::{OptimizeGoal, OptimizeOptions};

    let engine = load().await;
    let params = GenerateParams::default().with_temperature(0.0).with_max_tokens(8);
    let question = "Name a color.";
    let before = engine.generate(question, params.clone()).await.unwrap().tokens;
    let options = OptimizeOptions {
        sample: Some(question.to_owned()),
        answer_tokens: 4,
        time_limit_s: 120.0,
        ..OptimizeOptions::new(OptimizeGoal::Latency)
    };
    let report = engine.optimize_performance(options).await.unwrap();
    for knob in ["prefill_chunk", "threads", "speculation"] {
        let mut trials = report.trials.iter().filter(|trial| trial.knob == knob);
        assert!(trials.any(|trial| trial.measured.is_some()), "{knob}: {report:?}");
    }
    assert!(
        report.trials.iter().all(|trial| trial.error.is_none()),
        "{report:?}"
    );
    // Nothing of it changes an answer.
    let after = engine.generate(question, params.clone()).await.unwrap().tokens;
    assert_eq!(after, before);
    assert_eq!(engine.engine().unwrap().config().threads, report.config.threads);
    engine.unload().await.unwrap();
    let json = serde_json::to_string(&report.config).unwrap();
    let next = InferenceEngine::new().with_config(serde_json::from_str(&json).unwrap());
    next.load_model(&model()).await.unwrap();
    assert_eq!(next.generate(question, params).await.unwrap().tokens, before);
}

#[tokio::test]
async fn keys_and_values_are_kept_as_the_configuration_says() {
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(32);
    let integers = KvConfig {
        bits: Some(8),
        ..KvConfig::default()
    };
    let few = KvConfig {
        max_positions: Some(64),
        ..KvConfig::default()
    };
    let all = KvConfig::default();
    // The answer stands at the end of what is seen, the question far before.
    let long = format!(
        "My name is Ada. {}What is the capital of France?",
        "The river flows by the town. ".repeat(20)
    );
    for (kv, prompt) in [
        (integers, "What is the capital of France?"),
        (few.clone(), &long),
        (all, &long),
    ] {
        let engine = InferenceEngine::new().with_config(EngineConfig {
            kv: kv.clone(),
            ..EngineConfig::default()
        });
        engine.load_model(&model()).await.unwrap();
        let first = engine.generate(prompt, params.clone()).await.unwrap();
        assert!(first.text.contains("Paris"), "{kv:?}: {}", first.text);
        let again = engine.generate(prompt, params.clone()).await.unwrap();
        assert_eq!(again.tokens, first.tokens, "{kv:?}");
        // What a window has passed cannot be gone on from.
        let cached = if kv == few {
            0
        } else {
            first.usage.prompt_tokens - 1
        };
        assert!(
            again.usage.cached_tokens >= cached.min(64),
            "{kv:?}: {:?}",
            again.usage
        );
    }
    let engine = InferenceEngine::new().with_config(EngineConfig {
        kv: KvConfig {
            group_size: 128,
            ..KvConfig {
                bits: Some(4),
                ..KvConfig::default()
            }
        },
        ..EngineConfig::default()
    });
    let error = engine.load_model(&model()).await.unwrap_err();
    let source = std::error::Error::source(&error).expect("a source").to_string();
    assert!(
        source.contains("`kv.group_size` is 128, which does not make whole heads of 64"),
        "{source}"
    );
}

/// What a window gives up on the way cannot be written to disk, which is said before anything is loaded.
#[tokio::test]
async fn a_folder_beside_a_window_is_refused_before_the_weights_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let config = EngineConfig {
        kv: KvConfig {
            max_positions: Some(64),
            ..KvConfig::default()
        },
        prefix_cache: mlx_engine::PrefixCacheConfig {
            disk: Some(mlx_engine::DiskCacheConfig::new(folder.path())),
            ..Default::default()
        },
        ..EngineConfig::default()
    };
    let engine = InferenceEngine::new().with_config(config);
    let stages = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&stages);
    let progress = Box::new(move |stage| seen.lock().unwrap().push(stage));
    let error = engine
        .load_model_with_progress(&model(), progress)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, EngineError::InvalidParameter(error) if error.field() == "prefix_cache.disk"),
        "{error:?}"
    );
    assert_eq!(*stages.lock().unwrap(), []);
}

#[tokio::test]
async fn requests_at_the_same_time_are_answered_as_alone() {
    let engine = load().await;
    let request = |index: u64| {
        let params = GenerateParams::default().with_max_tokens(6 + index as u32);
        let held = |constraint| {
            GenerateParams::default()
                .with_max_tokens(60)
                .with_constraint(constraint)
        };
        let schema = serde_json::json!({"type": "object", "additionalProperties": false, "required": ["river", "towns"],
            "properties": {"river": {"type": "string", "maxLength": 20}, "towns": {"type": "integer", "maximum": 999}}});
        let params = match index % 7 {
            0 => params.with_temperature(0.0),
            1 => params.with_temperature(0.8).with_seed(index),
            2 => params.with_temperature(0.9).with_top_p(0.9).with_seed(index),
            3 => params.with_temperature(0.0).with_repetition_penalty(1.2),
            4 => params
                .with_temperature(0.8)
                .with_seed(index)
                .with_logprobs(true)
                .with_top_logprobs(3),
            5 => held(OutputConstraint::Regex(
                "[A-Z][a-z]{3,9}( [a-z]{2,9}){2,5}\\.".to_owned(),
            ))
            .with_temperature(0.9)
            .with_seed(index),
            _ => held(OutputConstraint::JsonSchema(schema))
                .with_temperature(0.0)
                .with_logprobs(true),
        };
        let words = "Tell me of the river that flows by the town. ".repeat(1 + index as usize % 5);
        (Prompt::user(format!("{words} Story {index}.")), params)
    };
    let together = futures::future::join_all((0..16).map(|index| {
        let (prompt, params) = request(index);
        engine.generate(prompt, params)
    }))
    .await;
    // Of what was computed together nothing is taken over.
    let fresh = InferenceEngine::new().with_config(EngineConfig {
        prefix_cache: mlx_engine::PrefixCacheConfig::OFF,
        ..EngineConfig::default()
    });
    fresh.load_model(&model()).await.unwrap();
    for (index, together) in (0..).zip(together) {
        let (prompt, params) = request(index);
        let alone = fresh.generate(prompt, params).await.unwrap();
        assert_eq!(alone.usage.cached_tokens, 0);
        let together = together.unwrap();
        assert_eq!(together.tokens, alone.tokens, "request {index}");
        assert_eq!(together.logprobs, alone.logprobs, "request {index}");
        assert_eq!(alone.logprobs.is_some(), index % 7 == 4 || index % 7 == 6);
        if index % 7 == 6 {
            let river: serde_json::Value = serde_json::from_str(&alone.text).unwrap();
            assert!(river["river"].is_string() && river["towns"].is_i64(), "{river}");
        }
        assert_eq!(
            (together.text, together.finish_reason),
            (alone.text, alone.finish_reason)
        );
    }
}

/// Short prompts are fed in one step: none is hurt by what another cannot be fed.
#[tokio::test]
async fn a_prompt_out_of_the_vocabulary_costs_the_others_nothing() {
    let engine = load().await;
    let params = || GenerateParams::default().with_temperature(0.0).with_max_tokens(6);
    let ask = |prompt: Prompt| {
        let engine = engine.clone();
        async move { engine.generate(prompt, params()).await }
    };
    let (wrong, one, two) = futures::join!(
        ask(Prompt::tokens([1, 2, 4_000_000])),
        ask(Prompt::text("The capital of France")),
        ask(Prompt::text("Once upon a time")),
    );
    let error = wrong.unwrap_err();
    let source = std::error::Error::source(&error).expect("a source").to_string();
    assert_eq!(source, "token 4000000 is not in the vocabulary of 49152");
    let fresh = load().await;
    for (output, prompt) in [(one, "The capital of France"), (two, "Once upon a time")] {
        let alone = fresh.generate(Prompt::text(prompt), params()).await.unwrap();
        assert_eq!(output.unwrap().tokens, alone.tokens, "{prompt}");
    }
}

#[tokio::test]
async fn text_is_tokenized_as_hugging_face_does() {
    let oracle = include_str!("../../models/tests/fixtures/smollm2.json");
    let oracle: Value = serde_json::from_str(oracle).unwrap();
    let encoder = InferenceEngine::new().load_encoder(&model()).unwrap();
    let texts = oracle["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .chain([&oracle["score"]]);
    for case in texts {
        let ids = encoder
            .encode(&Prompt::text(case["text"].as_str().unwrap()))
            .unwrap();
        let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(ids, expected, "{}", case["text"]);
        assert_eq!(
            encoder.tokenizer().decode(&ids, false),
            case["text"].as_str().unwrap()
        );
    }
}

#[tokio::test]
async fn a_text_is_scored_as_mlx_lm_scores_it() {
    let oracle = include_str!("../../models/tests/fixtures/smollm2.json");
    let oracle: Value = serde_json::from_str(oracle).unwrap();
    let config = EngineConfig {
        exact: true,
        ..EngineConfig::default()
    };
    let engine = InferenceEngine::new().with_config(config);
    engine.load_model(&model()).await.unwrap();
    // The first sentence: all 500 tokens are scored in the tests of the models.
    let text = oracle["score"]["text"]
        .as_str()
        .unwrap()
        .split('.')
        .next()
        .unwrap();
    let score = engine.score(text).await.unwrap();
    assert_eq!(score.logprobs[0], None);
    for (found, expected) in score.logprobs[1..]
        .iter()
        .zip(oracle["score"]["logprobs"].as_array().unwrap())
    {
        assert!((f64::from(found.unwrap()) - expected.as_f64().unwrap()).abs() < 1e-3);
    }
    let sum: f64 = score
        .logprobs
        .iter()
        .flatten()
        .map(|&logprob| f64::from(logprob))
        .sum();
    let perplexity = (-sum / (score.tokens.len() - 1) as f64).exp();
    assert!((score.perplexity() - perplexity).abs() < 1e-9);
}

#[tokio::test]
async fn the_same_seed_gives_the_same_answer_and_every_parameter_has_its_effect() {
    let engine = load().await;
    let run = |params: GenerateParams| {
        let run = engine.generate(Prompt::text("Once upon a time"), params.with_max_tokens(8));
        async move { run.await.unwrap() }
    };
    let base = || GenerateParams::default().with_temperature(1.0).with_seed(7);
    let first = run(base()).await;
    assert_eq!(run(base()).await.tokens, first.tokens);
    let filtered = run(base().with_top_p(0.9).with_min_p(0.01).with_top_k(50)).await;
    assert_eq!(
        run(base().with_top_p(0.9).with_min_p(0.01).with_top_k(50))
            .await
            .tokens,
        filtered.tokens
    );
    let greedy = run(base().with_temperature(0.0)).await;
    assert_eq!(run(base().with_top_k(1)).await.tokens, greedy.tokens);
    assert_eq!(
        run(base().with_temperature(0.0).with_seed(8)).await.tokens,
        greedy.tokens
    );
    let banned = greedy.tokens[0];
    assert!(
        !run(base().with_temperature(0.0).with_logit_bias([(banned, -100.0)]))
            .await
            .tokens
            .contains(&banned)
    );
    let logprobs = run(base().with_temperature(0.0).with_top_logprobs(2)).await;
    assert_eq!(logprobs.tokens, greedy.tokens);
    let logprobs = logprobs.logprobs.unwrap();
    assert_eq!(logprobs.len(), greedy.tokens.len());
    assert!(
        logprobs
            .iter()
            .all(|token| token.top.len() == 2 && token.top[0].token == token.token)
    );
}

#[tokio::test]
async fn a_conversation_reuses_its_keys_and_values_and_says_the_same() {
    let engine = load().await;
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(12);
    let mut chat = engine.chat().with_params(params.clone());
    chat.send("What is the capital of France?").await.unwrap();
    let reused = chat.send("And of Italy?").await.unwrap();
    assert!(reused.usage.cached_tokens > 40, "{:?}", reused.usage);
    let history = chat.history()[..3].to_vec();
    let fresh = load().await.generate(history, params).await.unwrap();
    assert_eq!(fresh.usage.cached_tokens, 0);
    assert_eq!(fresh.text, reused.text);
}

/// A folder with the smallest model that there is.
fn tiny() -> tempfile::TempDir {
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures/tiny/llama");
    let folder = tempfile::tempdir().expect("there is room");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(format!("{tiny}/{file}"), folder.path().join(file)).expect("the fixture is there");
    }
    std::fs::write(folder.path().join("tokenizer.json"), TOKENIZER).expect("there is room");
    folder
}

#[tokio::test]
async fn memory_does_not_grow_with_a_thousand_requests_that_are_dropped_anywhere() {
    let folder = tiny();
    let config = EngineConfig {
        max_batch: 4,
        prefill_chunk: Some(16),
        prefix_cache: mlx_engine::PrefixCacheConfig::of(64 << 10),
        ..EngineConfig::default()
    };
    let engine = InferenceEngine::new().with_config(config);
    engine.load_model(folder.path().to_str().unwrap()).await.unwrap();
    let run = async |number: u32| {
        let tokens = (0..60).map(|i| (i * 7 + number * 3) % 96);
        let params = GenerateParams::default()
            .with_max_tokens(12)
            .with_ignore_eos(true)
            .with_seed(1);
        let mut stream = engine.stream(Prompt::tokens(tokens), params).await.unwrap();
        // Every other one is dropped, in its prompt or after some tokens.
        let events = if number.is_multiple_of(2) {
            usize::MAX
        } else {
            (number as usize * 5) % 12
        };
        let mut peak = None;
        for _ in 0..events {
            match stream.next().await {
                Some(event) => {
                    if let GenerationEvent::Finished(summary) = event.unwrap() {
                        peak = Some(summary.peak_memory_bytes);
                    }
                }
                None => break,
            }
        }
        peak
    };
    let mut peak = 0;
    let mut resident = 0;
    for round in 0..125 {
        let peaks = futures::future::join_all((0..8).map(|index| run(round * 8 + index))).await;
        assert!(
            peaks.iter().flatten().count() >= 4,
            "those that are not dropped end"
        );
        let largest = peaks.into_iter().flatten().max().unwrap();
        if round < 25 {
            peak = peak.max(largest);
            resident = resident_bytes();
        }
        // What several requests take at once depends on when they meet.
        assert!(
            largest <= peak + peak / 10,
            "round {round}: {largest} after {peak}"
        );
    }
    let report = engine.prefix_cache().await.unwrap();
    assert!(report.bytes <= report.max_bytes && !report.entries.is_empty());
    // Ten kilobytes for each request, had it kept them.
    let grown = resident_bytes().saturating_sub(resident);
    assert!(grown < 8 << 20, "{grown}");
}

/// What of this process is in memory; 0 where the system does not say it so.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes.unwrap_or_default() << 10
}

#[tokio::test]
async fn a_long_prompt_stops_no_answer_for_longer_than_a_chunk() {
    let config = EngineConfig {
        prefill_chunk: Some(32),
        ..EngineConfig::default()
    };
    let engine = InferenceEngine::new().with_config(config);
    engine.load_model(&model()).await.unwrap();
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_ignore_eos(true);
    let running = engine.stream(
        Prompt::text("Once upon a time"),
        params.clone().with_max_tokens(400),
    );
    let mut running = running.await.unwrap();
    let mut tokens = 0;
    while tokens < 2 {
        if let GenerationEvent::Text { tokens: some, .. } = running.next().await.unwrap().unwrap() {
            tokens += some.len();
        }
    }
    let long = Prompt::text("The river flows by the town. ".repeat(60));
    let mut long = engine.stream(long, params.with_max_tokens(1)).await.unwrap();
    let mut chunks = 0;
    loop {
        match long.next().await.unwrap().unwrap() {
            GenerationEvent::Started { prompt_tokens, .. } => chunks = prompt_tokens.div_ceil(32) as usize,
            GenerationEvent::Text { .. } => break,
            _ => {}
        }
    }
    assert!(chunks > 10, "{chunks}");
    // What has come meanwhile: a token for each chunk but the one that may have run before the first.
    let mut meanwhile = 0;
    while let Some(Some(event)) = futures::FutureExt::now_or_never(running.next()) {
        if let GenerationEvent::Text { tokens, .. } = event.unwrap() {
            meanwhile += tokens.len();
        }
    }
    assert!(meanwhile + 1 >= chunks, "{meanwhile} tokens in {chunks} chunks");
}

#[tokio::test]
async fn a_conversation_of_ten_turns_computes_what_is_new() {
    let engine = load().await;
    let params = GenerateParams::default().with_temperature(0.0).with_max_tokens(6);
    let mut chat = engine
        .chat()
        .with_system("Answer in one word.")
        .with_params(params);
    let mut before = 0;
    for turn in 0..10 {
        let usage = chat.send(format!("Is {turn} a number?")).await.unwrap().usage;
        assert!(usage.cached_tokens >= before, "turn {turn}: {usage:?}");
        assert!(
            usage.prompt_tokens - usage.cached_tokens < 60,
            "turn {turn}: {usage:?}"
        );
        before = usage.prompt_tokens;
    }
}

#[tokio::test]
async fn a_conversation_goes_on_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let open = async |disk: bool, exact| {
        let disk = disk.then(|| mlx_engine::DiskCacheConfig {
            min_free_bytes: 0,
            ..mlx_engine::DiskCacheConfig::new(folder.path())
        });
        let config = EngineConfig {
            prefix_cache: mlx_engine::PrefixCacheConfig {
                disk,
                ..Default::default()
            },
            exact,
            ..EngineConfig::default()
        };
        let engine = InferenceEngine::new().with_config(config);
        engine.load_model(&model()).await.unwrap();
        engine
    };
    let params = || GenerateParams::default().with_temperature(0.0).with_max_tokens(8);
    let engine = open(true, false).await;
    let mut chat = engine.chat().with_params(params());
    chat.send("The river flows by the town. ".repeat(45))
        .await
        .unwrap();
    let history = chat.history().to_vec();
    engine.unload_with(mlx_engine::UnloadMode::Drain).await.unwrap();

    let go_on = async |engine: &InferenceEngine| {
        let mut chat = engine.chat().with_params(params()).with_history(history.clone());
        let output = chat.send("Where does it flow?").await.unwrap();
        (output.tokens, output.usage.cached_tokens)
    };
    let (fresh, cached) = go_on(&open(false, false).await).await;
    assert_eq!(cached, 0);
    assert_eq!(go_on(&open(true, false).await).await, (fresh.clone(), 256));
    // Ten more turns: the first has what is on disk, and each of the others all that was before it.
    let engine = open(true, false).await;
    let mut chat = engine.chat().with_params(params()).with_history(history.clone());
    let mut before = 256;
    for turn in 0..10 {
        let usage = chat.send(format!("Where is it at {turn}?")).await.unwrap().usage;
        assert!(usage.cached_tokens >= before, "turn {turn}: {usage:?}");
        before = usage.prompt_tokens;
    }
    engine.unload().await.unwrap();
    // Another type of keys and values is another model.
    let (_, cached) = go_on(&open(true, true).await).await;
    assert_eq!(cached, 0);
    for file in std::fs::read_dir(folder.path()).unwrap() {
        let path = file.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    assert_eq!(go_on(&open(true, false).await).await, (fresh, 0));
}

#[tokio::test]
async fn requests_that_begin_alike_and_come_together_compute_it_once() {
    let engine = load().await;
    let alike = "The river flows by the town. ".repeat(20);
    let params = || GenerateParams::default().with_temperature(0.0).with_max_tokens(8);
    let prompts: Vec<String> = (1..5)
        .map(|index| format!("{alike}Story {index} begins"))
        .collect();
    let runs = prompts
        .iter()
        .map(|prompt| engine.generate(Prompt::text(prompt.clone()), params()));
    let together = futures::future::join_all(runs).await;
    let fresh = load().await;
    for (index, (output, prompt)) in together.into_iter().zip(&prompts).enumerate() {
        let output = output.unwrap();
        assert_eq!(output.usage.cached_tokens > 100, index > 0, "{:?}", output.usage);
        fresh.clear_prefix_cache().await.unwrap();
        let alone = fresh
            .generate(Prompt::text(prompt.clone()), params())
            .await
            .unwrap();
        assert_eq!((alone.usage.cached_tokens, alone.tokens), (0, output.tokens));
    }
}

/// The smallest tokenizer that there is.
const TOKENIZER: &str =
    r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;

#[tokio::test]
async fn what_is_wrong_with_a_model_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap().to_owned();
    let load = || async {
        let error = InferenceEngine::new().load_model(&path).await.unwrap_err();
        let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
        format!("{error}{}", source.unwrap_or_default())
    };
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    assert!(
        load()
            .await
            .ends_with("has no `config.json`, which a model folder needs")
    );
    write("config.json", r#"{"model_type": "gpt5"}"#);
    assert_eq!(load().await, "model type `gpt5` is not supported");
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures/tiny/llama");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(format!("{tiny}/{file}"), folder.path().join(file)).unwrap();
    }
    let found = load().await;
    assert!(found.contains("has no `tokenizer.json`"), "{found}");
    write("tokenizer.json", "{");
    let found = load().await;
    assert!(
        found.contains("tokenizer failed") && found.contains("tokenizer.json` could not be read"),
        "{found}"
    );
    write("tokenizer.json", TOKENIZER);
    write("tokenizer_config.json", r#"{"chat_template": "{% for x in"}"#);
    let found = load().await;
    assert!(
        found.contains("chat template failed") && found.contains("line 1"),
        "{found}"
    );
    write(
        "tokenizer_config.json",
        r#"{"chat_template": "{{ raise_exception('no chat, please') }}"}"#,
    );
    let engine = InferenceEngine::new();
    engine.load_model(&path).await.unwrap();
    let error = engine
        .generate("Hi", GenerateParams::default())
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "chat template failed: it refuses the conversation: no chat, please"
    );
    let error = engine
        .generate(Prompt::tokens([96]), GenerateParams::default())
        .await
        .unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "token 96 is not in the vocabulary of 96");
    let error = engine
        .generate(Prompt::tokens(vec![1; 512]), GenerateParams::default())
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "prompt of 512 tokens does not fit the context of 512"
    );
}

#[tokio::test]
async fn a_model_that_does_not_fit_the_memory_is_refused_with_the_numbers() {
    let path = std::env::var("MLX_ENGINE_TEST_MODEL").expect("the tests are run by `cargo xtask test`");
    let bytes = std::fs::metadata(&path).unwrap().len();
    let load = async |limit| {
        let config = mlx_engine::EngineConfig {
            memory_limit: Some(limit),
            ..mlx_engine::EngineConfig::default()
        };
        let engine = InferenceEngine::new().with_config(config);
        engine.load_model(&path).await.map(|_| engine)
    };
    let error = load(bytes - 1).await.unwrap_err();
    let refused = matches!(error, EngineError::InsufficientMemory { required, available }
        if required == bytes && available == bytes - 1);
    assert!(refused, "{error}");
    // 30 layers of 3 heads of 64, keys and values in float16; this many for 256 positions.
    let block = 30 * 3 * 64 * 2 * 2 * 256;
    let needs = mlx_engine::memory_needs(std::path::Path::new(&path), &EngineConfig::default()).unwrap();
    assert_eq!(
        (needs.weight_bytes, needs.kv_bytes_per_token),
        (bytes, block / 256)
    );
    let limit = bytes + 2 * block + (64 << 20);
    let engine = load(limit).await.unwrap();
    let params = GenerateParams::default().with_max_tokens(4);
    engine
        .generate(Prompt::text("Hello"), params.clone())
        .await
        .unwrap();
    let error = engine
        .generate(Prompt::text("Hello"), params.with_max_tokens(8000))
        .await
        .unwrap_err();
    let EngineError::InsufficientMemory { required, available } = error else {
        panic!("{error}")
    };
    // 8001 tokens are 126 pages of 64.
    assert_eq!(required, 126 * block / 4);
    assert!(
        available > 2 * block && available < limit - bytes * 9 / 10,
        "{available} of {limit}"
    );

    // What is chosen for the memory that there is runs in it.
    let (config, fit) = EngineConfig::default().fit(&needs, limit).unwrap();
    assert!(fit.context_length < 8192 && fit.max_batch >= 1, "{fit}");
    let engine = InferenceEngine::new().with_config(config);
    engine.load_model(&path).await.unwrap();
    let context = engine.engine().unwrap().model().unwrap().context_length;
    assert_eq!(context as usize, fit.context_length);
    let most = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(context - 64)
        .with_stop([" "]);
    let output = engine
        .generate("What is the capital of France?", most)
        .await
        .unwrap();
    assert_eq!(output.finish_reason, mlx_engine::FinishReason::Stop);
}

fn weather() -> mlx_engine::ToolDefinition {
    let schema = serde_json::json!({"type": "object", "additionalProperties": false, "required": ["city", "unit"],
        "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["celsius", "fahrenheit"]}}});
    mlx_engine::ToolDefinition::new("get_weather", "The weather in a city.", schema).expect("a definition")
}

#[tokio::test]
async fn a_required_call_has_arguments_that_are_valid_for_another_validator() {
    let engine = load().await;
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(120);
    let required = params
        .clone()
        .with_tool_choice(mlx_engine::ToolChoice::Required)
        .with_parallel_tool_calls(false);
    // The template of this model knows no tools.
    let prompt = Prompt::user("What is the weather in Paris?").with_tools([weather()]);
    let error = engine
        .generate(prompt.clone(), required.clone().with_tool_format("glm"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("shows no tools"), "{error}");
    let output = engine
        .generate(prompt, required.with_tool_format("hermes"))
        .await
        .unwrap();
    assert_eq!(
        output.finish_reason,
        mlx_engine::FinishReason::ToolCalls,
        "{output:?}"
    );
    assert_eq!((output.text.as_str(), output.tool_calls.len()), ("", 1));
    let call = &output.tool_calls[0];
    assert!(
        jsonschema::is_valid(&weather().parameters(), &call.arguments),
        "{call:?}"
    );

    // The conversation goes on with the result.
    let chosen = params
        .with_tool_format("hermes")
        .with_tool_choice(mlx_engine::ToolChoice::Required);
    let mut chat = engine
        .chat()
        .with_params(chosen.with_parallel_tool_calls(false))
        .with_tools([weather()]);
    chat.send("What is the weather in Paris?").await.unwrap();
    let id = chat.pending_calls()[0].id.clone();
    let error = chat.send_results([("other", "{}")]).await.unwrap_err();
    assert!(error.to_string().contains(&id), "{error}");
    let output = chat.send_results([(id, "{\"celsius\": 21}")]).await.unwrap();
    assert!(!output.tokens.is_empty());
    assert_eq!(chat.history().len(), 4);
}

#[cfg(feature = "schemars")]
#[tokio::test]
async fn an_answer_is_a_value_of_its_type_or_an_error_with_its_text() {
    #[derive(Debug, serde::Deserialize, schemars::JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct City {
        #[schemars(length(max = 20))]
        name: String,
        people: u32,
        kind: Kind,
        rivers: Option<bool>,
    }
    #[derive(Debug, PartialEq, serde::Deserialize, schemars::JsonSchema)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        Capital,
        Town { region: Region },
    }
    #[derive(Debug, PartialEq, serde::Deserialize, schemars::JsonSchema)]
    enum Region {
        North,
        South,
    }
    let engine = load().await;
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(200);
    let city: City = engine
        .generate_as("Describe Paris as JSON.", params.clone())
        .await
        .unwrap();
    assert!(
        !city.name.is_empty() && city.name.chars().count() <= 20,
        "{city:?}"
    );
    let error = engine
        .generate_as::<City>("Describe Paris as JSON.", params.with_max_tokens(3))
        .await
        .unwrap_err();
    let mlx_engine::TypedError::Unreadable {
        text, finish_reason, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert!(text.starts_with('{'), "{text}");
    assert_eq!(*finish_reason, mlx_engine::FinishReason::Length);
    let _ = (city.people, city.rivers, city.kind);
}
