//! What holds for every model in `models.toml`.

use std::collections::BTreeSet;

use mlx_engine_core::{GenerateParams, ModelConfiguration, ModelType, Quantization};
use mlx_engine_registry::{Capability, ModelEntry, ModelEstimate, ModelRegistry, SearchCriteria};

/// Models whose makers round by more than 15 %, or leave out vision towers and embeddings of layers.
const ROUNDED_NAMES: [&str; 7] = [
    "mlx-community/granite-3.3-2b-instruct-4bit",
    "mlx-community/Qwen2.5-VL-7B-Instruct-4bit",
    "mlx-community/Ministral-3-3B-Instruct-2512-4bit",
    "mlx-community/Qwen2.5-VL-3B-Instruct-4bit",
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
    assert!(models().count() >= 80, "{}", models().count());
    for model_type in [
        ModelType::Chat,
        ModelType::Code,
        ModelType::Reasoning,
        ModelType::VisionLanguage,
        ModelType::Embedding,
        ModelType::Rerank,
    ] {
        let criteria = SearchCriteria {
            model_type: Some(model_type),
            ..SearchCriteria::default()
        };
        let found = ModelRegistry::builtin().search_models(&criteria);
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
        // A vision tower in 16 bits weighs the more the smaller the rest is.
        let most = if model.model_type == ModelType::VisionLanguage {
            1.7
        } else {
            1.6
        };
        assert!((0.95..=most).contains(&ratio), "{}: {ratio}", model.id);
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

#[test]
fn every_model_says_what_helps_to_choose_it() {
    let languages = |entry: &ModelEntry| entry.languages.iter().all(|code| code.len() == 2);
    for entry in ModelRegistry::builtin().entries() {
        let id = &entry.id;
        assert!(!entry.licence.is_empty(), "{id}");
        assert!(
            ("2020-01".."2027-01").contains(&&*entry.released) && entry.released.len() == 7,
            "{id}"
        );
        assert!(!entry.languages.is_empty() && languages(entry), "{id}");
        assert_eq!(entry.cache.is_none(), entry.family == "bert", "{id}");
        if entry.model_type == ModelType::Reasoning {
            assert!(entry.can(Capability::Reasoning), "{id}");
        }
        if entry.model_type == ModelType::VisionLanguage {
            assert!(entry.can(Capability::Vision), "{id}");
        }
        if let Some(sampling) = entry.sampling {
            assert!(entry.model_type.generates_text(), "{id}");
            sampling.apply(GenerateParams::default()).validate().unwrap();
        }
    }
}

/// Models that differ from a fixture in their name alone cache what the estimate of its configuration says.
#[test]
fn caches_agree_with_the_estimates() {
    let counts: serde_json::Value = serde_json::from_str(include_str!("fixtures/counts.json")).unwrap();
    for (alias, fixture) in [
        ("llama3.1-8b", "Llama-3.1-8B"),
        ("llama3.2-1b", "Llama-3.2-1B-4bit"),
        ("mistral-7b", "Mistral-7B-v0.3"),
        ("qwen2.5-7b", "Qwen2.5-7B"),
        ("qwen3-8b", "Qwen3-8B-4bit"),
        ("qwen3-30b-a3b", "Qwen3-30B-A3B-4bit"),
        ("gemma2-9b", "gemma-2-9b"),
        ("gemma3-1b", "gemma-3-1b-4bit"),
        ("gemma3-12b", "gemma-3-12b-text"),
        ("phi3.5", "Phi-3.5-mini"),
        ("phi4-mini", "Phi-4-mini-4bit"),
        ("mixtral", "Mixtral-8x7B-4bit"),
        ("glm4.7-flash", "GLM-4.7-Flash-4bit"),
        ("glm4.5-air", "GLM-4.5-Air-4bit"),
        ("gpt-oss-20b", "gpt-oss-20b-MXFP4-Q8"),
        ("nemotron3-nano", "Nemotron-3-Nano-30B-A3B-4bit"),
        ("qwen3-next", "Qwen3-Next-80B-A3B-4bit"),
        ("qwen3.5-9b", "Qwen3.5-9B-4bit"),
        ("qwen3.5-35b-a3b", "Qwen3.5-35B-A3B-4bit"),
        ("gemma4-26b", "gemma-4-26b-a4b-4bit"),
        ("gemma4-31b", "gemma-4-31b-4bit"),
        ("lfm2", "LFM2-1.2B"),
    ] {
        let estimate = ModelEstimate::from_config(&counts[fixture]["config"]).unwrap();
        let entry = ModelRegistry::builtin().entry(alias).unwrap();
        assert_eq!(entry.cache, Some(estimate.cache), "{alias}");
        // The fixtures of models that see are of their decoders alone.
        let share = estimate.parameters as f64 / entry.parameters as f64;
        let least = if entry.can(Capability::Vision) {
            0.93
        } else {
            0.999
        };
        assert!((least..1.001).contains(&share), "{alias}: {share}");
        if let Some(active) = entry.model.active_parameters {
            assert!(
                is_within(active as f64, estimate.active_parameters as f64, 0.3),
                "{alias}"
            );
        }
    }
}

/// The keys of a table and of the tables in it.
fn keys(path: &str, value: &toml::Value) -> BTreeSet<String> {
    let inner = |(key, value): (&String, &toml::Value)| keys(&format!("{path}.{key}"), value);
    match value.as_table() {
        Some(table) => table.iter().flat_map(inner).collect(),
        None => BTreeSet::from([path.to_owned()]),
    }
}

/// A misspelt key would otherwise be skipped in silence.
#[test]
fn every_key_of_the_file_is_a_field() {
    let file: toml::Table = toml::from_str(include_str!("../models.toml")).unwrap();
    let written = file["model"].as_array().unwrap();
    assert_eq!(file.len(), 1);
    assert_eq!(written.len(), models().count());
    for (written, model) in written.iter().zip(ModelRegistry::builtin().entries()) {
        let read = toml::Value::try_from(model).unwrap();
        assert_eq!(keys("", written), keys("", &read), "{}", model.id);
    }
}
