//! Guessing ahead on the real model: the answers are those without.
#![cfg(feature = "mlx")]

use std::ops::ControlFlow;

use futures::future::join_all;
use mlx_engine::prelude::*;
use mlx_engine::{
    ConvertOptions, DraftConfig, EngineConfig, KvConfig, LookupConfig, ModelRegistry, OutputConstraint,
    SpeculationConfig, SpeculationOff, WeightBits, convert,
};

const LETTER: &str = "Dear Ms. Miller,\n\nthank you for your order of 12 June. The three chairs were sent today and will be \
                      there on Friday. The table is sold out and will be sent next week.\n\nYours sincerely,\nJ. Smith";

fn model() -> String {
    let path = std::env::var("MLX_ENGINE_TEST_MODEL");
    path.expect("MLX_ENGINE_TEST_MODEL names the test model; run the tests by `cargo xtask test`")
}

async fn load(config: EngineConfig) -> InferenceEngine {
    let model = std::env::var("MLX_ENGINE_TEST_MODEL");
    let model =
        model.expect("MLX_ENGINE_TEST_MODEL names the test model; run the tests by `cargo xtask test`");
    let engine = InferenceEngine::new().with_config(config);
    engine.load_model(&model).await.expect("the model loads");
    engine
}

/// Guesses whatever it costs, so that how many there are does not depend on the time that steps take.
fn lookup() -> SpeculationConfig {
    SpeculationConfig::Lookup(LookupConfig {
        always: true,
        ..LookupConfig::default()
    })
}

fn greedy(max_tokens: u32) -> GenerateParams {
    GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(max_tokens)
}

/// Answers that repeat what they were given, and one that does not; greedy and sampled in each way.
fn requests() -> Vec<(String, GenerateParams)> {
    let copy = format!("Repeat this letter word by word:\n\n{LETTER}");
    let sampled = |seed| {
        GenerateParams::default()
            .with_max_tokens(40)
            .with_temperature(0.8)
            .with_seed(seed)
    };
    let penalised = GenerateParams {
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        ..greedy(40)
    };
    vec![
        (copy.clone(), greedy(90)),
        (
            "Count: 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2,".to_owned(),
            greedy(40),
        ),
        ("What is the capital of France?".to_owned(), greedy(30)),
        (copy.clone(), sampled(1)),
        (
            copy.clone(),
            sampled(2).with_top_p(0.9).with_top_k(40).with_min_p(0.02),
        ),
        (copy.clone(), penalised),
        (copy.clone(), greedy(40).with_top_logprobs(2)),
        (copy, greedy(200).with_stop(["Friday"])),
    ]
}

async fn answers(engine: &InferenceEngine) -> Vec<GenerateOutput> {
    let mut outputs = Vec::new();
    for (prompt, params) in requests() {
        outputs.push(engine.generate(prompt, params).await.expect("an answer"));
    }
    outputs
}

/// The same at once, which gives what each gives alone (`tests/real.rs`), and in a third of the time.
async fn answers_together(engine: &InferenceEngine) -> Vec<GenerateOutput> {
    let answers = requests()
        .into_iter()
        .map(|(prompt, params)| engine.generate(prompt, params));
    let answers = join_all(answers).await;
    answers
        .into_iter()
        .map(|answer| answer.expect("an answer"))
        .collect()
}

/// Compares answers, and says how many tokens were guessed, and how many of them right.
fn compare(plain: &[GenerateOutput], guessed: &[GenerateOutput]) -> (u32, u32) {
    for (plain, guessed) in plain.iter().zip(guessed) {
        assert_eq!(plain.tokens, guessed.tokens, "{}", plain.text);
        assert_eq!(
            (
                &plain.text,
                plain.finish_reason,
                &plain.logprobs,
                plain.usage.completion_tokens
            ),
            (
                &guessed.text,
                guessed.finish_reason,
                &guessed.logprobs,
                guessed.usage.completion_tokens
            ),
        );
        assert_eq!(plain.speculation, None);
    }
    let reports = guessed
        .iter()
        .map(|output| output.speculation.expect("it is said"));
    reports.fold((0, 0), |(drafted, accepted), report| {
        assert_eq!(report.off, None);
        (drafted + report.drafted_tokens, accepted + report.accepted_tokens)
    })
}

#[tokio::test]
async fn answers_with_look_up_are_those_without() {
    let kv = |bits, max_positions| KvConfig {
        bits,
        max_positions,
        ..KvConfig::default()
    };
    for kv in [kv(None, None), kv(Some(8), None), kv(None, Some(96))] {
        let config = EngineConfig {
            kv,
            ..EngineConfig::default()
        };
        let plain = answers_together(&load(config.clone()).await).await;
        let engine = load(EngineConfig {
            speculation: lookup(),
            ..config
        })
        .await;
        let guessed = answers(&engine).await;
        let (drafted, accepted) = compare(&plain, &guessed);
        assert!(drafted > 20 && accepted > 5, "{accepted} of {drafted}");
        let statistics = engine.statistics().unwrap();
        assert_eq!(
            (statistics.drafted_tokens, statistics.accepted_tokens),
            (drafted.into(), accepted.into())
        );
        // All at once, each gets what it gets alone.
        compare(&plain, &answers_together(&engine).await);
    }
}

#[tokio::test]
async fn what_is_held_to_a_grammar_is_not_guessed_and_says_so() {
    let params = || GenerateParams {
        constraint: Some(OutputConstraint::Regex(
            "(one|two|three) [0-9]{3} [0-9]{3}".to_owned(),
        )),
        ..greedy(30)
    };
    let plain = load(EngineConfig::default())
        .await
        .generate("Write a number.", params())
        .await
        .unwrap();
    let engine = load(EngineConfig {
        speculation: lookup(),
        ..EngineConfig::default()
    })
    .await;
    let held = engine.generate("Write a number.", params()).await.unwrap();
    assert_eq!(held.tokens, plain.tokens);
    let report = held.speculation.unwrap();
    assert_eq!(
        (report.off, report.drafted_tokens),
        (Some(SpeculationOff::Constraint), 0)
    );
}

/// The same of a draft model.
fn draft(model: impl Into<String>) -> SpeculationConfig {
    SpeculationConfig::Draft(DraftConfig {
        always: true,
        ..DraftConfig::new(model)
    })
}

/// The model as its own draft is right wherever the same logits choose; the answers are those without in any case.
#[tokio::test]
async fn answers_with_a_draft_model_are_those_without() {
    let plain = answers_together(&load(EngineConfig::default()).await).await;
    let engine = load(EngineConfig {
        speculation: draft(model()),
        ..EngineConfig::default()
    })
    .await;
    let guessed = answers(&engine).await;
    let (drafted, accepted) = compare(&plain, &guessed);
    assert!(
        drafted > 20 && accepted * 10 > drafted * 9,
        "{accepted} of {drafted}"
    );
    // Guessed for in the same steps, each gets what it gets alone.
    let (drafted, _) = compare(&plain, &answers_together(&engine).await);
    assert!(drafted > 20, "{drafted}");
}

/// The same model in 3 bits: another one with the same vocabulary, which is right at times.
#[tokio::test]
async fn a_draft_that_is_wrong_at_times_changes_nothing() {
    let place = tempfile::tempdir().expect("there is room");
    let folder = place.path().join("draft");
    let options = ConvertOptions {
        bits: WeightBits::Uniform {
            bits: 3,
            group_size: 64,
        },
        ..ConvertOptions::default()
    };
    convert(&model(), ModelRegistry::builtin(), &folder, &options, &mut |_| {
        ControlFlow::Continue(())
    })
    .expect("it is converted");
    let plain = load(EngineConfig::default()).await;
    let engine = load(EngineConfig {
        speculation: draft(folder.display().to_string()),
        ..EngineConfig::default()
    })
    .await;
    let (drafted, accepted) = compare(&answers_together(&plain).await, &answers(&engine).await);
    assert!(
        drafted > 20 && (1..drafted).contains(&accepted),
        "{accepted} of {drafted}"
    );
    // The same seeds draw the same tokens: the distribution is the same whatever it is.
    for seed in 0..12 {
        let params = GenerateParams::default()
            .with_max_tokens(10)
            .with_temperature(1.0)
            .with_seed(seed);
        let ask = |engine: &InferenceEngine| {
            let (engine, params) = (engine.clone(), params.clone());
            async move {
                engine
                    .generate(Prompt::text("The sea"), params)
                    .await
                    .expect("an answer")
                    .tokens
            }
        };
        assert_eq!(ask(&plain).await, ask(&engine).await, "seed {seed}");
    }
}

#[tokio::test]
async fn a_draft_of_another_vocabulary_is_refused_by_name() {
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures/tiny/llama");
    let folder = tempfile::tempdir().expect("there is room");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(format!("{tiny}/{file}"), folder.path().join(file)).expect("the fixture is there");
    }
    std::fs::write(
        folder.path().join("tokenizer.json"),
        r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#,
    )
    .expect("there is room");
    let engine = InferenceEngine::new().with_config(EngineConfig {
        speculation: draft(folder.path().display().to_string()),
        ..EngineConfig::default()
    });
    let error = engine.load_model(&model()).await.unwrap_err().to_string();
    assert!(
        error.contains("speculation.draft.model") && error.contains("49152"),
        "{error}"
    );
}
