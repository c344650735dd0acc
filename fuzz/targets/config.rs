//! `config.json`: estimates of models that no list has.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlx_engine_registry::ModelEstimate;

fuzz_target!(|text: &str| {
    if let Ok(estimate) = ModelEstimate::from_config_text(text) {
        let (short, long) = (estimate.memory(1).total(), estimate.memory(100_000).total());
        assert!(short <= long, "more tokens take no less memory");
    }
});
