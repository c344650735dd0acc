//! A user's own list of models.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlx_engine_registry::ModelRegistry;

fuzz_target!(|text: &str| {
    let mut registry = ModelRegistry::builtin().clone();
    let before = registry.len();
    match registry.layer(text) {
        Ok(()) => assert!(registry.len() >= before),
        // A list that is refused changes nothing.
        Err(_) => assert_eq!(registry.len(), before),
    }
});
