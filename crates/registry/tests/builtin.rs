//! What holds for every model in `models.toml`.

use std::collections::BTreeSet;

use mlx_engine_core::{ModelConfiguration, ModelType, Quantization};
use mlx_engine_registry::{ModelQuery, ModelRegistry};

/// Models whose makers round by more than 15 %: 1.24B, 2.61B and 1.78B in fact.
const ROUNDED_NAMES: [&str; 3] = [
    "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "mlx-community/gemma-2-2b-it-4bit",
    "mlx-community/DeepSeek-R1-Distill-Qwen-1.5B-4bit",
];

fn models() -> impl Iterator<Item = &'static ModelConfiguration> {
    ModelRegistry::builtin().models()
}

/// The count in a part of an id such as `1.7B`, `270m` or, with `mark`, `A3B`.
fn count_in_id(id: &str, mark: &str) -> Option<f64> {
    id.split(['-', '/']).find_map(|part| {
        let part = part.to_ascii_lowercase();
        let part = part.strip_prefix(mark)?;
        let (digits, scale) = if let Some(digits) = part.strip_suffix('b') {
            (digits, 1e9)
        } else {
            (part.strip_suffix('m')?, 1e6)
        };
        digits.parse::<f64>().ok().map(|count| count * scale)
    })
}

fn is_within(value: f64, of: f64, tolerance: f64) -> bool {
    (value / of - 1.0).abs() <= tolerance
}

#[test]
fn the_counts_of_ids_are_read_as_people_read_them() {
    for (id, mark, expect) in [
        ("mlx-community/Qwen2.5-0.5B-Instruct-4bit", "", Some(0.5e9)),
        ("mlx-community/gemma-3-270m-it-4bit", "", Some(270e6)),
        ("mlx-community/Qwen3-30B-A3B-4bit", "", Some(30e9)),
        ("mlx-community/Qwen3-30B-A3B-4bit", "a", Some(3e9)),
        ("mlx-community/Mistral-7B-Instruct-v0.3-4bit", "", Some(7e9)),
        ("mlx-community/phi-4-4bit", "", None),
    ] {
        assert_eq!(count_in_id(id, mark), expect, "{id}");
    }
}

#[test]
fn there_are_models_of_every_kind_but_base() {
    assert!(models().count() >= 50, "{}", models().count());
    for model_type in [
        ModelType::Chat,
        ModelType::Code,
        ModelType::Reasoning,
        ModelType::VisionLanguage,
        ModelType::Embedding,
        ModelType::Rerank,
    ] {
        let found = ModelRegistry::builtin().find(&ModelQuery::new().with_type(model_type));
        assert!(!found.is_empty(), "{model_type}");
    }
}

#[test]
fn no_two_models_share_what_they_go_by() {
    let mut taken = BTreeSet::new();
    for model in models() {
        let short = model.id.strip_prefix("mlx-community/").unwrap_or(&model.id);
        // One model may have an alias that differs from its name or id by case alone.
        let own: BTreeSet<String> = [short, &model.name]
            .into_iter()
            .chain(model.aliases.iter().map(|alias| &**alias))
            .map(str::to_lowercase)
            .collect();
        for key in own {
            assert!(taken.insert(key.clone()), "`{key}` of {} is taken", model.id);
        }
    }
}

#[test]
fn every_model_answers_to_its_id_its_aliases_and_its_name() {
    for model in models() {
        for reference in model.aliases.iter().chain([&model.id, &model.name]) {
            assert_eq!(
                ModelRegistry::builtin().get(reference).unwrap(),
                model,
                "{reference}"
            );
        }
    }
}

#[test]
fn texts_are_as_the_fields_ask() {
    let is_key = |text: &str| {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.');
        !text.is_empty() && text.chars().all(allowed)
    };
    for model in models() {
        let id = &model.id;
        let repository = id.strip_prefix("mlx-community/");
        assert!(
            repository.is_some_and(|name| !name.is_empty() && !name.contains(['/', ' '])),
            "{id}"
        );
        assert!(is_key(&model.family), "{id}: {}", model.family);
        assert!(!model.aliases.is_empty(), "{id}");
        for alias in &model.aliases {
            assert!(is_key(alias), "{id}: {alias}");
        }
        assert!(
            model.description.ends_with('.') && model.description.len() > 20,
            "{id}"
        );
        assert!(model.name.len() >= 3 && model.name == model.name.trim(), "{id}");
        let prompt = model.default_system_prompt.as_deref();
        assert!(prompt.is_none_or(|prompt| prompt.len() > 20), "{id}");
    }
}

#[test]
fn parameters_agree_with_the_id() {
    for model in models() {
        let id = &model.id;
        if let Some(count) = count_in_id(id, "") {
            let agrees = is_within(model.parameters as f64, count, 0.15);
            assert_eq!(
                agrees,
                !ROUNDED_NAMES.contains(&&**id),
                "{id}: {}",
                model.parameters
            );
        }
        if let Some(count) = count_in_id(id, "a") {
            let active = model.active_parameters.unwrap_or_default();
            assert!(is_within(active as f64, count, 0.15), "{id}: {active}");
        }
        if let Some(active) = model.active_parameters {
            assert!(active > 0 && active < model.parameters, "{id}: {active}");
        }
        assert!((1_000_000..1_000_000_000_000).contains(&model.parameters), "{id}");
    }
}

#[test]
fn sizes_agree_with_parameters_and_bits() {
    for model in models() {
        let bits = model.quantization.map_or(16, Quantization::bits);
        let packed = model.parameters as f64 * f64::from(bits) / 8.0;
        let ratio = model.size_bytes as f64 / packed;
        assert!((0.8..=1.6).contains(&ratio), "{}: {ratio}", model.id);
    }
}

#[test]
fn bits_agree_with_the_id() {
    for model in models() {
        let id = model.id.to_ascii_lowercase();
        let bits = model.quantization.map(Quantization::bits);
        let expect = [("4bit", 4), ("8bit", 8), ("mxfp4", 4)]
            .into_iter()
            .find_map(|(mark, bits)| id.contains(mark).then_some(bits));
        assert_eq!(bits, expect, "{id}");
    }
}

#[test]
fn contexts_are_in_range() {
    for model in models() {
        assert!((256..=262_144).contains(&model.context_length), "{}", model.id);
        assert_eq!(model.context_length % 256, 0, "{}", model.id);
        if model.model_type.generates_text() {
            assert!(model.context_length >= 8192, "{}", model.id);
        }
    }
}

/// A misspelt key would otherwise be skipped in silence.
#[test]
fn every_key_of_the_file_is_a_field() {
    let file: toml::Table = toml::from_str(include_str!("../models.toml")).unwrap();
    let written = file["model"].as_array().unwrap();
    assert_eq!(file.len(), 1);
    assert_eq!(written.len(), models().count());
    for (written, model) in written.iter().zip(models()) {
        assert_eq!(*written, toml::Value::try_from(model).unwrap(), "{}", model.id);
    }
}
