//! Thousands of requests with faults and cancels at random: nothing is lost, nothing is stuck, everything is counted.

use std::collections::BTreeMap;

use futures::StreamExt;
use mlx_engine::prelude::*;
use mlx_engine::{
    BulkheadConfiguration, EngineConfig, MockFault, MockScript, PrefixCacheConfig, RecoveryConfiguration,
    ResilienceConfiguration,
};

const REQUESTS: usize = 5000;

/// Requests at once: more than the engine takes, so that some are refused.
const AT_ONCE: usize = 40;

/// Numbers that look random: splitmix64.
struct Chance(u64);

impl Chance {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % below
    }
}

/// What the callers saw, counted by themselves.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    submitted: u64,
    started: u64,
    stop: u64,
    length: u64,
    cancelled: u64,
    errors: BTreeMap<String, u64>,
    prompt_tokens: u64,
    cached_tokens: u64,
    generated_tokens: u64,
}

/// Asks once and says what was seen. `gives_up` is after how many events the caller has had enough.
async fn ask(engine: InferenceEngine, prompt: String, max_tokens: u32, gives_up: Option<u64>) -> Seen {
    let mut seen = Seen {
        submitted: 1,
        ..Seen::default()
    };
    let params = GenerateParams::default().with_max_tokens(max_tokens);
    let failed = |error: &EngineError| {
        let json = serde_json::to_value(error).expect("errors can be written");
        BTreeMap::from([(json["kind"].as_str().unwrap_or_default().to_owned(), 1)])
    };
    let mut events = match engine.stream(Prompt::text(prompt.clone()), params).await {
        Ok(events) => events,
        Err(error) => {
            seen.errors = failed(&error);
            return seen;
        }
    };
    let mut text = String::new();
    let mut count = 0;
    loop {
        if gives_up == Some(count) {
            seen.cancelled = 1;
            return seen;
        }
        match events.next().await.expect("an end comes before the end") {
            Ok(GenerationEvent::Started {
                prompt_tokens,
                cached_tokens,
            }) => {
                seen.started = 1;
                seen.prompt_tokens = prompt_tokens.into();
                seen.cached_tokens = cached_tokens.into();
            }
            Ok(GenerationEvent::Text { text: piece, tokens }) => {
                text.push_str(&piece);
                seen.generated_tokens += tokens.len() as u64;
            }
            Ok(GenerationEvent::Finished(summary)) => {
                assert!(
                    prompt.ends_with(&text) || prompt.contains(&text),
                    "its own answer: {prompt:?} {text:?}"
                );
                match summary.finish_reason {
                    mlx_engine::FinishReason::Stop => seen.stop = 1,
                    _ => seen.length = 1,
                }
                break;
            }
            Ok(_) => {}
            Err(error) => {
                seen.errors = failed(&error);
                break;
            }
        }
        count += 1;
    }
    assert!(events.next().await.is_none(), "nothing comes after the end");
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_requests_with_faults_at_random_are_all_accounted_for() {
    let mut chance = Chance(7);
    let kinds = [MockFault::Device, MockFault::OutOfMemory, MockFault::Panic];
    let script = (0..600).fold(MockScript::default().with_bytes_per_token(64), |script, _| {
        script.with_fault(chance.next(12), kinds[chance.next(3) as usize])
    });
    let config = EngineConfig {
        max_batch: 8,
        max_queue: 16,
        prefill_chunk: Some(16),
        prefix_cache: PrefixCacheConfig {
            max_bytes: Some(64 << 10),
            ..PrefixCacheConfig::default()
        },
        ..EngineConfig::default()
    };
    // What the breaker refuses the engine does not see, and would not be counted there.
    let mut resilience = ResilienceConfiguration {
        bulkhead: BulkheadConfiguration {
            max_concurrent: 1000,
            ..BulkheadConfiguration::default()
        },
        recovery: RecoveryConfiguration {
            automatic: false,
            ..RecoveryConfiguration::default()
        },
        ..ResilienceConfiguration::default()
    };
    resilience.breaker.failure_rate = 1.0;
    resilience.breaker.min_requests = 1024;
    let engine = InferenceEngine::new()
        .with_backend(BackendChoice::Mock)
        .with_mock(script)
        .with_config(config)
        .with_resilience(resilience)
        .unwrap();
    engine.load_model("tiny").await.unwrap();

    let mut seen = Seen::default();
    let mut resident = Vec::new();
    let topics = ["the sea", "a small town", "the long road home", "rain"];
    for batch in 0..REQUESTS / AT_ONCE {
        let asked = (0..AT_ONCE).map(|index| {
            let topic = topics[chance.next(topics.len() as u64) as usize];
            let prompt = format!("Tell me about {topic}, number {}", chance.next(50) + index as u64);
            let gives_up = (chance.next(5) == 0).then(|| chance.next(8));
            tokio::spawn(ask(engine.clone(), prompt, 1 + chance.next(30) as u32, gives_up))
        });
        for one in futures::future::join_all(asked).await {
            let one = one.expect("no caller panics");
            let ends = one.stop + one.length + one.cancelled + one.errors.values().sum::<u64>();
            assert_eq!((one.submitted, ends), (1, 1), "each ends once");
            seen.submitted += one.submitted;
            seen.started += one.started;
            seen.stop += one.stop;
            seen.length += one.length;
            seen.cancelled += one.cancelled;
            seen.prompt_tokens += one.prompt_tokens;
            seen.cached_tokens += one.cached_tokens;
            seen.generated_tokens += one.generated_tokens;
            for (kind, count) in one.errors {
                *seen.errors.entry(kind).or_default() += count;
            }
        }
        if batch % 25 == 24 {
            resident.push(engine.performance_metrics().process_memory_bytes);
        }
    }

    let metrics = engine.performance_metrics();
    let total = &metrics.total;
    let counted = Seen {
        submitted: total.submitted,
        started: total.started,
        stop: total.finished.stop,
        length: total.finished.length,
        cancelled: total.cancelled,
        errors: total
            .errors
            .iter()
            .map(|(kind, &count)| (kind.to_string(), count))
            .collect(),
        prompt_tokens: total.prompt_tokens,
        cached_tokens: total.cached_tokens,
        generated_tokens: total.generated_tokens,
    };
    assert_eq!(counted, seen);
    assert_eq!(seen.submitted, REQUESTS as u64);
    for kind in ["device", "out_of_memory", "worker_panicked", "queue_full"] {
        assert!(seen.errors.contains_key(kind), "{seen:?}");
    }
    assert!(seen.cached_tokens > 0 && seen.cancelled > 0, "{seen:?}");

    // Nothing is stuck: one more request is the last that the worker hears of.
    let output = engine.generate("still there?", GenerateParams::default()).await;
    match output {
        Ok(output) => assert!(!output.text.is_empty(), "{output:?}"),
        // Its step may be one of those that fail.
        Err(error) => assert!(
            matches!(
                error,
                EngineError::Device { .. } | EngineError::OutOfMemory | EngineError::WorkerPanicked { .. }
            ),
            "{error}"
        ),
    }
    let inside = engine.statistics().expect("the engine tells");
    assert_eq!((metrics.queued, metrics.running), (0, 0));
    assert_eq!((inside.queued, inside.running, inside.worker_restarts), (0, 0, 0));
    assert!(inside.prefix_cache_bytes <= 64 << 10);
    // Memory is flat once the first part has warmed everything up.
    if let (Some(Some(warm)), Some(Some(last))) = (resident.get(1), resident.last()) {
        assert!(last.saturating_sub(*warm) < 16 << 20, "{resident:?}");
    }
}
