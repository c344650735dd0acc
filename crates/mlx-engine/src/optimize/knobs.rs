//! What can be turned. A knob is a line here.

use mlx_engine_engine::EngineConfig;
use serde_json::{Value, json};

use super::OptimizeGoal;

/// A field of the configuration whose value changes how fast the engine is, or how much memory it takes, and nothing
/// else.
pub(super) struct Knob {
    /// The field.
    pub(super) name: &'static str,
    /// The goals that it bears on.
    pub(super) goals: &'static [OptimizeGoal],
    /// What is tried.
    pub(super) values: &'static [u64],
    pub(super) get: fn(&EngineConfig) -> Option<u64>,
    pub(super) set: fn(&mut EngineConfig, u64),
}

use OptimizeGoal::{Latency, Memory, Throughput};

pub(super) const KNOBS: &[Knob] = &[
    Knob {
        name: "prefill_chunk",
        goals: &[Latency, Throughput, Memory],
        values: &[128, 256, 512, 1024, 2048],
        get: |config| config.prefill_chunk.map(|chunk| chunk as u64),
        set: |config, value| config.prefill_chunk = Some(value as usize),
    },
    Knob {
        name: "max_batch",
        goals: &[Throughput],
        values: &[1, 2, 4, 8, 16, 32],
        get: |config| Some(config.max_batch as u64),
        set: |config, value| config.max_batch = value as usize,
    },
];

impl Knob {
    /// The configuration with this value; `None` where it has it already.
    pub(super) fn turned(&self, config: &EngineConfig, value: u64) -> Option<EngineConfig> {
        if (self.get)(config) == Some(value) {
            return None;
        }
        let mut turned = config.clone();
        (self.set)(&mut turned, value);
        Some(turned)
    }

    pub(super) fn shown(value: u64) -> Value {
        json!(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_knob_turns_its_field_and_stays_in_range() {
        for knob in KNOBS {
            for &value in knob.values {
                let turned = knob.turned(&EngineConfig::default(), value).unwrap_or_default();
                assert_eq!((knob.get)(&turned).unwrap_or(value), value, "{}", knob.name);
                turned.validate().unwrap();
                let json = serde_json::to_value(&turned).unwrap();
                assert!(
                    (knob.get)(&turned).is_none() || json[knob.name] == Knob::shown(value),
                    "{}: {json}",
                    knob.name
                );
            }
        }
    }
}
