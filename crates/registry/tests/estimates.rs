//! Estimates agree with what mlx-lm counts, and no configuration makes them panic.

use std::collections::BTreeSet;

use mlx_engine_registry::{EstimateError, ModelEstimate};
use proptest::prelude::*;

use serde_json::{Map, Value, json};

/// What mlx-lm caches otherwise: its DeepSeek V2 expands the compressed keys, its chunks of Llama 4 are cut late, and its
/// indexers keep zeros of the size of their keys.
const CACHED_OTHERWISE: [&str; 5] = [
    "small-deepseek_v2",
    "small-llama4",
    "Llama-4-Scout-17B-16E-Instruct",
    "DeepSeek-V3.2",
    "GLM-5",
];

/// Models of which a vector is not counted, or counted where their family has none: sinks of attention and corrections of
/// routers.
const A_VECTOR_OFF: [&str; 6] = [
    "MiniMax-M2.5",
    "gpt-oss-20b",
    "gpt-oss-20b-MXFP4-Q8",
    "small-deepseek_v2",
    "small-lfm2_moe",
    "small-minimax",
];

/// Models whose files have a scale for each block of bytes, or for each matrix, which is not counted.
const SCALED: [&str; 6] = [
    "DeepSeek-V3",
    "DeepSeek-V3.2",
    "Kimi-K2-Instruct",
    "MiniMax-M2.5",
    "Qwen3-32B-FP8",
    "Qwen3-32B-FP8-Static-PerTensor",
];

/// How far an estimate may be from what mlx-lm counts: not at all, for most.
fn tolerance(name: &str, what: &str) -> f64 {
    if what == "cache" && CACHED_OTHERWISE.contains(&name) {
        1.0
    } else if what == "bytes as published" && SCALED.contains(&name) {
        2e-3
    } else if A_VECTOR_OFF.contains(&name) {
        1e-5
    } else {
        0.0
    }
}

/// What is asked of formulas that fit most towers.
const TOLERANCE: f64 = 0.02;

fn off(value: u64, of: u64) -> f64 {
    (value as f64 / of as f64 - 1.0).abs()
}

fn counts() -> Map<String, Value> {
    serde_json::from_str(include_str!("fixtures/counts.json")).expect("the fixture is an object")
}

/// Configurations word for word as their makers published them, with what mlx-lm counts for each.
fn published() -> Vec<(String, String, Value)> {
    let counts: Map<String, Value> =
        serde_json::from_str(include_str!("fixtures/published.json")).expect("the fixture is an object");
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/published");
    let files = std::fs::read_dir(folder)
        .expect("the folder is there")
        .map(|entry| entry.expect("it can be listed").path());
    let mut published: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .map(|path| {
            let name = path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .unwrap_or_default()
                .to_owned();
            let count = counts[&name].clone();
            (
                name,
                std::fs::read_to_string(path).expect("it can be read"),
                count,
            )
        })
        .collect();
    published.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(published.len(), counts.len());
    published
}

#[test]
fn published_configurations_are_counted_as_mlx_lm_counts_them() {
    let mut types = BTreeSet::new();
    let mut wrong = Vec::new();
    for (name, text, count) in published() {
        let expect = |key: &str| count[key].as_u64().unwrap();
        let estimate =
            ModelEstimate::from_config_text(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(estimate.is_exact, "{name}");
        // The same model in MLX's 4 bits and without what its maker did to it.
        let stripped = text.replace("Infinity", "null");
        let mut config: Value = serde_json::from_str(&stripped).unwrap();
        config.as_object_mut().unwrap().remove("quantization_config");
        let plain = ModelEstimate::from_config(&config).unwrap();
        config["quantization"] = json!({"bits": 4, "group_size": 64});
        let four_bit = ModelEstimate::from_config(&config).unwrap();
        // mlx-lm has no towers.
        let vision = estimate.vision_parameters;
        for (what, value, of) in [
            ("parameters", estimate.parameters - vision, expect("parameters")),
            (
                "bytes as published",
                estimate.weight_bytes - 2 * vision,
                expect("bytes"),
            ),
            (
                "bytes of 16 bits",
                plain.weight_bytes - 2 * vision,
                expect("plain_bytes"),
            ),
            (
                "bytes of 4 bits",
                four_bit.weight_bytes - 2 * vision,
                expect("four_bit_bytes"),
            ),
            (
                "cache",
                estimate.cache.bytes(expect("tokens")),
                expect("cache_bytes"),
            ),
        ] {
            if off(value, of) > tolerance(&name, what) {
                wrong.push(format!("{name}: {what} {value}, expected {of}"));
            }
        }
        types.insert(estimate.model_type);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(types.len() >= 10, "{types:?}");
}

/// The published sums of the tensors' elements, decoder and tower.
#[test]
fn a_tower_with_more_than_one_merger_is_counted() {
    let (_, text, _) = published()
        .into_iter()
        .find(|(name, ..)| name == "Qwen3-VL-8B-Instruct")
        .unwrap();
    let estimate = ModelEstimate::from_config_text(&text).unwrap();
    assert!(
        off(estimate.parameters, 8_767_123_696) < TOLERANCE / 4.0,
        "{}",
        estimate.parameters
    );
}

#[test]
fn what_python_writes_and_json_does_not_have_is_read() {
    let text = r#"{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128,
        "num_attention_heads": 4, "vocab_size": 100, "limits": [0.0, Infinity, -Infinity, NaN],
        "note": "\"Infinity\\", "NaN": NaN}"#;
    let estimate = ModelEstimate::from_config_text(text).unwrap();
    assert_eq!(
        estimate.parameters,
        100 * 64 + 4 * 64 * 64 + 3 * 64 * 128 + 3 * 64
    );
    let error =
        ModelEstimate::from_config_text(r#"{"model_type": "llama", "limits": [Infinity}"#).unwrap_err();
    assert!(error.to_string().contains("line 1 column 36"), "{error}");
}

#[test]
fn configurations_are_counted_as_mlx_lm_counts_them() {
    let counts = counts();
    let mut types = BTreeSet::new();
    let mut wrong = Vec::new();
    for (name, entry) in &counts {
        let expect = |key: &str| entry[key].as_u64().unwrap();
        let estimate = match ModelEstimate::from_config(&entry["config"]) {
            Ok(estimate) => estimate,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        assert!(estimate.is_exact, "{name}");
        let cached = estimate.cache.bytes(expect("tokens"));
        for (what, value, of) in [
            ("parameters", estimate.parameters, expect("parameters")),
            ("bytes", estimate.weight_bytes, expect("bytes")),
            ("cache", cached, expect("cache_bytes")),
        ] {
            if off(value, of) > tolerance(name, what) {
                wrong.push(format!("{name}: {what} {value}, expected {of}"));
            }
        }
        types.insert(estimate.model_type.clone());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(types.len() >= 40, "{types:?}");
}

/// The tiny checkpoints that the loader is tested with: their files are what is counted.
#[test]
fn checkpoints_are_as_large_as_estimated() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures/tiny");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let folder = entry.unwrap().path();
        let (Ok(config), Ok(weights)) = (
            std::fs::read_to_string(folder.join("config.json")),
            std::fs::read(folder.join("model.safetensors")),
        ) else {
            continue;
        };
        let mut config: Value = serde_json::from_str(&config).unwrap();
        // They are saved in float32.
        config["torch_dtype"] = json!("float32");
        let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) + 8;
        let bytes = weights.len() as u64 - header;
        let estimate = ModelEstimate::from_config(&config).unwrap();
        // Scales and biases of quantized weights are float32 there, and 16 bits in every checkpoint of real size.
        if config.get("quantization").is_none() {
            assert_eq!(estimate.weight_bytes, bytes, "{}", folder.display());
            seen += 1;
        }
    }
    assert!(seen >= 5, "{seen}");
}

fn llama() -> Value {
    counts()["Llama-3.2-1B-4bit"]["config"].clone()
}

#[test]
fn errors_name_the_field_and_the_value() {
    let with = |field: &str, value: Value| {
        let mut config = llama();
        config[field] = value;
        ModelEstimate::from_config(&config)
            .map_or_else(|error| error.to_string(), |estimate| format!("{estimate:?}"))
    };
    for (field, value, expect) in [
        (
            "hidden_size",
            json!(null),
            "the configuration has no `hidden_size`",
        ),
        (
            "hidden_size",
            json!(0),
            "`hidden_size` is 0, allowed: a whole number from 1 to 16777216",
        ),
        (
            "vocab_size",
            json!(2.5),
            "`vocab_size` is 2.5, allowed: a whole number from 1 to 16777216",
        ),
        (
            "num_hidden_layers",
            json!(1_000_000),
            "`num_hidden_layers` is 1000000, allowed: a whole number from 1 to 2048",
        ),
        (
            "num_key_value_heads",
            json!(64),
            "`num_key_value_heads` is 64, allowed: at most `num_attention_heads`",
        ),
        (
            "tie_word_embeddings",
            json!("yes"),
            "`tie_word_embeddings` is \"yes\", allowed: true or false",
        ),
        (
            "quantization",
            json!(4),
            "`quantization` is 4, allowed: an object",
        ),
        (
            "quantization",
            json!({"bits": 99, "group_size": 64}),
            "`quantization.bits` is 99, allowed: a whole number from 1 to 16",
        ),
        (
            "layer_types",
            json!(["full_attention"]),
            "`layer_types` is [\"full_attention\"], allowed: one entry for each of `num_hidden_layers`",
        ),
        ("model_type", json!(7), "`model_type` is 7, allowed: a string"),
    ] {
        assert_eq!(with(field, value), expect);
    }
    let text = |text| ModelEstimate::from_config_text(text).unwrap_err();
    assert!(matches!(text("{"), EstimateError::Syntax { .. }));
    assert_eq!(text("[]").to_string(), "`config.json` is [], allowed: an object");
    assert_eq!(text("{}").to_string(), "the configuration has no `model_type`");
    assert_eq!(
        text(r#"{"model_type": "rwkv7", "head_size": 64}"#).to_string(),
        "the layout of model type `rwkv7` is not known: `head_size` shows that it is no plain transformer"
    );
}

#[test]
fn a_family_that_is_not_known_is_taken_for_a_llama_and_said_to_be() {
    let mut config = llama();
    config["model_type"] = json!("llama-of-tomorrow");
    let guess = ModelEstimate::from_config(&config).unwrap();
    let llama = ModelEstimate::from_config(&llama()).unwrap();
    assert!(!guess.is_exact && llama.is_exact);
    assert_eq!((guess.parameters, guess.cache), (llama.parameters, llama.cache));
}

#[test]
fn what_decodes_reads_no_idle_expert_and_no_table() {
    let of = |name: &str| ModelEstimate::from_config(&counts()[name]["config"]).unwrap();
    let experts = of("Qwen3-30B-A3B-4bit");
    assert!(
        off(experts.active_parameters, 3_345_000_000) < 0.01,
        "{}",
        experts.active_parameters
    );
    assert!(experts.step_bytes * 8 < experts.weight_bytes);
    let dense = of("Llama-3.1-8B");
    assert_eq!(dense.step_bytes + 128_256 * 4096 * 2, dense.weight_bytes);
    assert_eq!(
        of("Llama-3.2-1B-4bit").step_bytes,
        of("Llama-3.2-1B-4bit").weight_bytes
    );
}

/// Published: 4 300 079 472 weights for Gemma 3 4B, whose configuration leaves out what its class sets.
#[test]
fn a_vision_tower_is_counted() {
    let gemma = ModelEstimate::from_config(&json!({
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                        "num_hidden_layers": 34, "sliding_window": 1024},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                          "num_hidden_layers": 27, "patch_size": 14, "image_size": 896, "num_attention_heads": 16},
    }))
    .unwrap();
    assert!(
        off(gemma.parameters, 4_300_079_472) < TOLERANCE,
        "{}",
        gemma.parameters
    );
    assert!(
        off(gemma.vision_parameters, 420_000_000) < TOLERANCE,
        "{}",
        gemma.vision_parameters
    );
    assert_eq!(gemma.cache.window, 1024);
}

/// The published count of BGE small English v1.5.
#[test]
fn an_encoder_is_counted_and_caches_nothing() {
    let bert = ModelEstimate::from_config(&json!({
        "model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12,
        "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
    }))
    .unwrap();
    assert_eq!(bert.parameters, 33_360_000);
    assert_eq!(bert.memory(512).cache, 0);
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (1u64..1 << 24).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        prop::collection::vec(any::<u32>(), 0..4).prop_map(Value::from),
        Just(json!({"bits": 3, "group_size": 32, "mode": "mxfp4", "lm_head": false})),
    ]
}

/// Sums and products stay in range where every dimension is the largest that is allowed.
#[test]
fn the_largest_dimensions_overflow_nothing() {
    fn enlarge(value: &mut Value) {
        match value {
            Value::Object(map) => map
                .iter_mut()
                .filter(|(key, _)| {
                    !["num_hidden_layers", "bits", "group_size", "layer_types"].contains(&&***key)
                })
                .for_each(|(_, value)| enlarge(value)),
            Value::Number(number) if number.is_u64() => *value = json!(1 << 24),
            _ => {}
        }
    }
    for (name, entry) in &counts() {
        let mut config = entry["config"].clone();
        enlarge(&mut config);
        config["vision_config"] = json!({
            "depth": 2048, "embed_dim": 1 << 24, "intermediate_size": 1 << 24, "image_size": 1 << 16, "patch_size": 1,
            "spatial_merge_size": 64, "out_hidden_size": 1 << 24,
        });
        if let Ok(estimate) = ModelEstimate::from_config(&config) {
            assert_eq!(estimate.parameters, u64::MAX, "{name}");
            assert!(estimate.memory(u64::MAX).total() > 0);
        }
    }
}

proptest! {
    #[test]
    fn no_configuration_panics_and_more_tokens_never_take_less(
        which in any::<prop::sample::Index>(),
        field in any::<prop::sample::Index>(),
        other in any::<prop::sample::Index>(),
        value in any_value(),
        second in any_value(),
        tokens in any::<u64>(),
        more in any::<u64>(),
    ) {
        let counts = counts();
        let (_, entry) = counts.iter().nth(which.index(counts.len())).unwrap();
        let mut config = entry["config"].clone();
        let map = config.as_object_mut().unwrap();
        for (at, value) in [(field, value), (other, second)] {
            let key = map.keys().nth(at.index(map.len())).unwrap().clone();
            map.insert(key, value);
        }
        if let Ok(estimate) = ModelEstimate::from_config(&config) {
            prop_assert!(estimate.active_parameters <= estimate.parameters);
            prop_assert!(estimate.step_bytes <= estimate.weight_bytes);
            let (less, more) = (tokens.min(more), tokens.max(more));
            prop_assert!(estimate.memory(less).total() <= estimate.memory(more).total());
        }
    }
}
