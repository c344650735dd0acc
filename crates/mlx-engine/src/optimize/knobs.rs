//! What can be turned. A knob is a line here.

use mlx_engine_core::Device;
use mlx_engine_engine::{EngineConfig, LookupConfig, SpeculationConfig};
use serde_json::{Value, json};

use super::{OptimizeGoal, OptimizeOptions};

/// A field of the configuration whose value changes how fast the engine is, or how much memory it takes.
pub(super) struct Knob {
    /// The field, with a dot before that of a part.
    pub(super) name: &'static str,
    /// The goals that it bears on.
    pub(super) goals: &'static [OptimizeGoal],
    /// What is tried, as the configuration writes it.
    pub(super) values: fn(&Place, &OptimizeOptions) -> Vec<Value>,
}

/// Where the engine runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) device: Device,
    /// Threads that the system has room for.
    pub(crate) threads: usize,
}

use OptimizeGoal::{Latency, Memory, Throughput};

pub(super) const KNOBS: &[Knob] = &[
    Knob {
        name: "prefill_chunk",
        goals: &[Latency, Throughput, Memory],
        values: |_, _| [128, 256, 512, 1024, 2048].map(Value::from).to_vec(),
    },
    Knob {
        name: "max_batch",
        goals: &[Throughput],
        values: |_, _| [1, 2, 4, 8, 16, 32].map(Value::from).to_vec(),
    },
    Knob {
        name: "threads",
        goals: &[Latency, Throughput],
        values: threads,
    },
    Knob {
        name: "kv.bits",
        goals: &[Latency, Throughput, Memory],
        values: |_, options| {
            // Integers change answers: that is not for us to decide.
            let integers = if options.kv_integers { &[8, 4][..] } else { &[] };
            integers.iter().copied().map(Value::from).collect()
        },
    },
    Knob {
        name: "speculation",
        goals: &[Latency, Throughput],
        values: speculation,
    },
];

/// Some numbers of threads up to all that there is room for; a GPU does not ask.
fn threads(place: &Place, _: &OptimizeOptions) -> Vec<Value> {
    if place.device != Device::Cpu {
        return Vec::new();
    }
    let all = place.threads.max(1);
    let mut some = vec![1, all / 2, all * 3 / 4, all];
    some.retain(|&threads| threads > 0);
    some.dedup();
    some.into_iter().map(Value::from).collect()
}

/// With guesses and without. What they gain is in what is said, so that it takes a text of the user's own to know.
fn speculation(_: &Place, options: &OptimizeOptions) -> Vec<Value> {
    if options.sample.is_none() {
        return Vec::new();
    }
    let kinds = [
        SpeculationConfig::Off,
        SpeculationConfig::Lookup(LookupConfig::default()),
    ];
    kinds.iter().map(|kind| json!(kind)).collect()
}

impl Knob {
    /// The configuration with this value; `None` where it has it already, and where it cannot have it.
    pub(super) fn turned(&self, config: &EngineConfig, value: &Value) -> Option<EngineConfig> {
        let mut json = serde_json::to_value(config).ok()?;
        let mut field = &mut json;
        for part in self.name.split('.') {
            // A part that is as it is by default may not be written.
            if field.is_null() {
                *field = json!({});
            }
            field = field.as_object_mut()?.entry(part).or_insert(Value::Null);
        }
        field.clone_from(value);
        let turned: EngineConfig = serde_json::from_value(json).ok()?;
        (turned != *config).then_some(turned)
    }
}

/// Whether the model has to be loaded again to go from one configuration to another.
pub(super) fn needs_load(from: &EngineConfig, to: &EngineConfig) -> bool {
    (from.threads, &from.kv, &from.speculation, from.exact) != (to.threads, &to.kv, &to.speculation, to.exact)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_knob_turns_its_field_alone_and_stays_in_range() {
        let place = Place {
            device: Device::Cpu,
            threads: 6,
        };
        let options = OptimizeOptions {
            kv_integers: true,
            sample: Some("a text".to_owned()),
            ..OptimizeOptions::default()
        };
        let before = serde_json::to_value(EngineConfig::default()).unwrap();
        for knob in KNOBS {
            let values = (knob.values)(&place, &options);
            let mut turns = 0;
            for value in &values {
                // One of them may be what it has.
                let Some(turned) = knob.turned(&EngineConfig::default(), value) else {
                    continue;
                };
                turned.validate().unwrap();
                turns += 1;
                let mut json = serde_json::to_value(&turned).unwrap();
                let (part, field) = knob.name.split_once('.').unwrap_or((knob.name, ""));
                let found = if field.is_empty() {
                    &json[part]
                } else {
                    &json[part][field]
                };
                assert_eq!(found, value, "{}", knob.name);
                assert!(knob.turned(&turned, value).is_none(), "it has it already");
                match before.get(part) {
                    Some(value) => json[part] = value.clone(),
                    None => drop(json.as_object_mut().unwrap().remove(part)),
                }
                let back: EngineConfig = serde_json::from_value(json).unwrap();
                assert_eq!(back, EngineConfig::default(), "{}", knob.name);
            }
            assert!(turns + 1 >= values.len() && turns > 0, "{}", knob.name);
        }
    }

    #[test]
    fn what_changes_answers_or_needs_a_text_is_not_tried_unasked() {
        let place = Place {
            device: Device::Metal,
            threads: 8,
        };
        let options = OptimizeOptions::default();
        let tried = KNOBS
            .iter()
            .filter(|knob| !(knob.values)(&place, &options).is_empty());
        let names: Vec<_> = tried.map(|knob| knob.name).collect();
        assert_eq!(names, ["prefill_chunk", "max_batch"], "threads are a CPU's");
    }
}
