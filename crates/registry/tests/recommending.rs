//! What is recommended, by lists of a few models whose numbers say what has to come out.

use mlx_engine_core::{ModelConfiguration, ModelType, Quantization};
use mlx_engine_registry::{
    CacheShape, Capability, Compatibility, DeviceDescription, ModelEntry, ModelRegistry, UseCase,
};

const MILLION: u64 = 1_000_000;
const BILLION: u64 = 1_000_000_000;

/// A model of a billion weights in four bits that keeps nothing of what it has seen, so that it takes the same at any length.
fn model(id: &str) -> ModelEntry {
    ModelEntry {
        released: "2024-01".to_owned(),
        cache: Some(CacheShape::default()),
        ..ModelEntry::from(ModelConfiguration {
            parameters: BILLION,
            size_bytes: 500 * MILLION,
            quantization: Quantization::new(4, 64).ok(),
            context_length: 131_072,
            ..ModelConfiguration::new(id, ModelType::Chat)
        })
    }
}

fn registry(models: impl IntoIterator<Item = ModelEntry>) -> ModelRegistry {
    let mut registry = ModelRegistry::new();
    for model in models {
        registry
            .register_entry(model)
            .expect("it is the only one of its name");
    }
    registry
}

/// A device that nothing is too large or too slow for.
fn large() -> DeviceDescription {
    DeviceDescription::new(1 << 50, 1 << 50)
}

fn picked(models: &[ModelEntry], use_case: UseCase, device: &DeviceDescription) -> Vec<String> {
    let registry = registry(models.iter().cloned());
    let picks = registry.recommended_models(use_case, device);
    picks.iter().map(|pick| pick.model.id.clone()).collect()
}

/// What a model of so many bytes takes that keeps nothing: a thirty-second more, and 128 MiB.
fn taken(bytes: u64) -> u64 {
    bytes + bytes / 32 + (128 << 20)
}

#[test]
fn each_use_reckons_with_its_tokens() {
    for (use_case, tokens) in [
        (UseCase::OnPhone, 4096),
        (UseCase::LaptopChat, 8192),
        (UseCase::Code, 16_384),
        (UseCase::Reasoning, 16_384),
        (UseCase::LongDocuments, 65_536),
        (UseCase::ToolUse, 16_384),
        (UseCase::Vision, 8192),
        (UseCase::Embeddings, 8192),
        (UseCase::LowestLatency, 4096),
        (UseCase::HighestQuality, 8192),
    ] {
        let mut able = model("able");
        able.capabilities = vec![Capability::Tools, Capability::Reasoning, Capability::Vision];
        able.model.model_type = match use_case {
            UseCase::Code => ModelType::Code,
            UseCase::Embeddings => ModelType::Embedding,
            _ => ModelType::Chat,
        };
        assert_eq!(use_case.tokens(), tokens, "{use_case}");
        let registry = registry([able]);
        let picks = registry.recommended_models(use_case, &large());
        assert_eq!(picks[0].compatibility.fit().unwrap().tokens, tokens, "{use_case}");
    }
}

#[test]
fn each_use_asks_for_its_kind_of_model() {
    let typed = |id: &str, model_type| {
        let mut model = model(id);
        model.model.model_type = model_type;
        model
    };
    let can = |id: &str, capability| ModelEntry {
        capabilities: vec![capability],
        ..model(id)
    };
    let mut small = model("small");
    small.model.parameters = 499_999_999;
    let mut least = model("least");
    least.model.parameters = 500 * MILLION;
    let mut short = can("short", Capability::Vision);
    short.model.context_length = 65_535;
    let mut enough = model("enough");
    enough.model.context_length = 65_536;
    let mut continues = can("base", Capability::Reasoning);
    continues.model.model_type = ModelType::Base;
    continues.capabilities.push(Capability::Tools);
    let models = [
        continues,
        typed("code", ModelType::Code),
        typed("embed", ModelType::Embedding),
        enough,
        least,
        typed("rerank", ModelType::Rerank),
        short,
        small,
        can("thinks", Capability::Reasoning),
        can("tools", Capability::Tools),
    ];
    let talk = ["code", "enough", "least", "short", "small", "thinks", "tools"];
    let but = |left_out: &str| talk.into_iter().filter(|id| *id != left_out).collect::<Vec<_>>();
    for (use_case, expect) in [
        (UseCase::OnPhone, talk.to_vec()),
        (UseCase::LaptopChat, talk.to_vec()),
        (UseCase::HighestQuality, talk.to_vec()),
        (UseCase::LongDocuments, but("short")),
        (UseCase::LowestLatency, but("small")),
        (UseCase::Code, vec!["code"]),
        (UseCase::Reasoning, vec!["thinks"]),
        (UseCase::ToolUse, vec!["tools"]),
        (UseCase::Vision, vec!["short"]),
        (UseCase::Embeddings, vec!["embed"]),
    ] {
        let mut found = picked(&models, use_case, &large());
        found.sort();
        assert_eq!(found, expect, "{use_case}");
    }
}

#[test]
fn each_use_sets_a_share_of_the_memory_and_a_least_speed() {
    for (use_case, percent, speed) in [
        (UseCase::OnPhone, 50, 10.0),
        (UseCase::LaptopChat, 70, 15.0),
        (UseCase::Code, 100, 8.0),
        (UseCase::Reasoning, 100, 10.0),
        (UseCase::LongDocuments, 100, 3.0),
        (UseCase::ToolUse, 100, 8.0),
        (UseCase::Vision, 100, 8.0),
        (UseCase::Embeddings, 70, 0.0),
        (UseCase::LowestLatency, 100, 0.0),
        (UseCase::HighestQuality, 100, 3.0),
    ] {
        let mut able = model("able");
        able.capabilities = vec![Capability::Tools, Capability::Reasoning, Capability::Vision];
        match use_case {
            UseCase::Code => able.model.model_type = ModelType::Code,
            UseCase::Embeddings => able.model.model_type = ModelType::Embedding,
            _ => {}
        }
        let suits = |usable: u64, bandwidth: u64| {
            let device = DeviceDescription::new(usable, bandwidth).with_usable_bytes(usable);
            picked(std::slice::from_ref(&able), use_case, &device) == ["able"]
        };
        let enough = (taken(able.size_bytes) * 100).div_ceil(percent);
        assert!(
            suits(enough, 1 << 50) && !suits(enough - 1, 1 << 50),
            "{use_case}"
        );
        // 0.6 of the bandwidth over the bytes of the weights.
        let quick = (speed * able.size_bytes as f64 / 0.6).ceil() as u64;
        assert!(suits(1 << 50, quick.max(1)), "{use_case}");
        assert_eq!(
            suits(1 << 50, (quick - quick / 1000).max(1)),
            speed == 0.0,
            "{use_case}"
        );
        // Nobody said how fast it is.
        assert!(suits(1 << 50, 0), "{use_case}");
    }
}

#[test]
fn a_phone_gives_no_model_more_than_four_gigabytes() {
    let sized = |id: &str, size_bytes| {
        let mut model = model(id);
        model.model.size_bytes = size_bytes;
        model
    };
    let bytes = 3_748_637_355;
    assert_eq!(taken(bytes), 4 * BILLION);
    let models = [sized("fits", bytes), sized("larger", bytes + 1)];
    assert_eq!(picked(&models, UseCase::OnPhone, &large()), ["fits"]);
    assert_eq!(
        picked(&models, UseCase::LaptopChat, &large()),
        ["larger", "fits"],
        "of two alike, the one with more in it"
    );
}

#[test]
fn better_is_larger_newer_and_in_more_bits() {
    let dense = |id: &str, parameters: u64, released: &str| {
        let mut model = model(id);
        model.model.parameters = parameters;
        model.released = released.to_owned();
        model
    };
    let packed = |id: &str, parameters: u64, bits: Option<u8>| {
        let mut model = dense(id, parameters, "2024-01");
        model.model.quantization = bits.map(|bits| Quantization::new(bits, 64).unwrap());
        model
    };
    let experts = |parameters, active| {
        let mut model = dense("experts", parameters, "2024-01");
        model.model.active_parameters = Some(active);
        model
    };
    let million = |id: &str, millions: u64| dense(id, millions * MILLION, "2024-01");
    for (better, worse) in [
        (million("a", 1001), million("b", 1000)),
        // Twice the weights are nine months.
        (dense("a", BILLION, "2024-11"), dense("b", 2 * BILLION, "2024-01")),
        (dense("a", 2 * BILLION, "2024-01"), dense("b", BILLION, "2024-09")),
        (dense("a", BILLION, "2025-02"), dense("b", BILLION, "2025-01")),
        (dense("a", BILLION, "2025-01"), dense("b", BILLION, "2024-12")),
        // A month that nobody said is January 2023.
        (dense("a", BILLION, "2023-02"), dense("b", BILLION, "")),
        (dense("a", BILLION, ""), dense("b", BILLION, "2022-12")),
        // What experts know is the geometric mean of all and of those at work.
        (experts(8 * BILLION, 2 * BILLION), million("dense", 3990)),
        (million("dense", 4010), experts(8 * BILLION, 2 * BILLION)),
        // Fewer than four bits cost half a doubling, eight and more gain a twentieth.
        (
            packed("a", 2800 * MILLION, Some(4)),
            packed("b", 3900 * MILLION, Some(3)),
        ),
        (
            packed("a", 4000 * MILLION, Some(3)),
            packed("b", 2800 * MILLION, Some(4)),
        ),
        (
            packed("a", 4000 * MILLION, Some(8)),
            packed("b", 4100 * MILLION, Some(4)),
        ),
        (
            packed("a", 4200 * MILLION, Some(4)),
            packed("b", 4000 * MILLION, Some(8)),
        ),
        (
            packed("a", 4000 * MILLION, None),
            packed("b", 4100 * MILLION, Some(6)),
        ),
        (
            packed("a", 4200 * MILLION, Some(5)),
            packed("b", 4000 * MILLION, None),
        ),
    ] {
        let expect = [better.id.clone(), worse.id.clone()];
        assert_eq!(
            picked(&[worse, better], UseCase::HighestQuality, &large()),
            expect
        );
    }
    // Alike: the larger file, then the id.
    let alike = [dense("b", BILLION, ""), dense("a", BILLION, "2023-01")];
    assert_eq!(picked(&alike, UseCase::HighestQuality, &large()), ["a", "b"]);
    let alike = [packed("b", BILLION, Some(4)), packed("a", BILLION, Some(6))];
    assert_eq!(picked(&alike, UseCase::HighestQuality, &large()), ["a", "b"]);
}

#[test]
fn what_fits_with_room_comes_before_what_is_better_and_tight() {
    let mut better = model("better");
    better.model.parameters = 2 * BILLION;
    better.model.size_bytes = BILLION;
    let models = [model("roomy"), better];
    let with = |usable: u64| DeviceDescription::new(usable, 1 << 50).with_usable_bytes(usable);
    // Tight is what leaves less than fifteen percent.
    let enough = (taken(BILLION) * 100).div_ceil(85);
    assert_eq!(
        picked(&models, UseCase::HighestQuality, &with(enough)),
        ["better", "roomy"]
    );
    assert_eq!(
        picked(&models, UseCase::HighestQuality, &with(enough - 1)),
        ["roomy", "better"]
    );
}

#[test]
fn the_fastest_come_first_where_speed_is_asked_for() {
    let sized = |id: &str, parameters, active, size_bytes| {
        let mut model = model(id);
        model.model.parameters = parameters;
        model.model.active_parameters = active;
        model.model.size_bytes = size_bytes;
        model
    };
    // A tenth of the experts is read, so that it is faster than a dense model of a fifth of its size.
    let models = [
        sized("dense", 2 * BILLION, None, BILLION),
        sized("experts", 10 * BILLION, Some(BILLION), 5 * BILLION),
    ];
    let device = |bandwidth| DeviceDescription::new(1 << 50, bandwidth);
    assert_eq!(
        picked(&models, UseCase::LowestLatency, &device(100 * BILLION)),
        ["experts", "dense"]
    );
    assert_eq!(
        picked(&models, UseCase::HighestQuality, &device(100 * BILLION)),
        ["experts", "dense"]
    );
    // Where no speed is known, by the weights at work: of two as fast, the one with fewer.
    let models = [
        sized("fewer", BILLION, None, 2 * BILLION),
        sized("more", 2 * BILLION, None, BILLION),
    ];
    assert_eq!(
        picked(&models, UseCase::LowestLatency, &device(0)),
        ["fewer", "more"]
    );
    assert_eq!(
        picked(&models, UseCase::LowestLatency, &device(100 * BILLION)),
        ["more", "fewer"]
    );
}

#[test]
fn the_best_fit_for_a_slow_machine_is_what_it_can_do() {
    let talker = registry([model("talker")]);
    let best = |bandwidth| {
        let device = DeviceDescription::new(1 << 50, bandwidth);
        let best = talker.best_fit(&device);
        best.map(|pick| pick.compatibility.fit().unwrap().tokens)
    };
    // Fifteen tokens a second: chat. Five: the best quality. One: whatever runs, in half the length.
    assert_eq!(best(13 * BILLION), Some(8192));
    assert_eq!(best(4 * BILLION), Some(8192));
    assert_eq!(best(BILLION), Some(4096));
    let mut vector = model("vector");
    vector.model.model_type = ModelType::Embedding;
    assert!(registry([vector]).best_fit(&large()).is_none());
}

#[test]
fn a_reason_has_the_numbers() {
    let reason = |model: ModelEntry, use_case, device: &DeviceDescription| {
        let registry = registry([model]);
        let picks = registry.recommended_models(use_case, device);
        picks[0].reason.clone()
    };
    let device = DeviceDescription::new(0, 10 * BILLION).with_usable_bytes(4 * BILLION);
    // 500 MB, a thirty-second of it and 134 MB.
    assert_eq!(
        reason(model("m"), UseCase::HighestQuality, &device),
        "0.6 of 4.0 GB with 8192 tokens; about 12 tokens a second; 1.0B parameters"
    );
    let mut small = model("small");
    small.model.parameters = 999_999_999;
    assert_eq!(
        reason(small.clone(), UseCase::LongDocuments, &device),
        "0.6 of 4.0 GB with 65536 tokens; about 12 tokens a second; 1000M parameters; a context of 131072 tokens"
    );
    small.model.parameters = 494 * MILLION;
    let tight = DeviceDescription::new(0, 0).with_usable_bytes(700 * MILLION);
    assert_eq!(
        reason(small.clone(), UseCase::HighestQuality, &tight),
        "0.6 of 0.7 GB with 8192 tokens; 494M parameters; tight"
    );
    let mut experts = model("experts");
    experts.model.parameters = 30_500 * MILLION;
    experts.model.active_parameters = Some(3300 * MILLION);
    experts.model.size_bytes = 2 * BILLION;
    experts.capabilities = vec![Capability::Tools];
    assert_eq!(
        reason(experts, UseCase::ToolUse, &device),
        "2.2 of 4.0 GB with 16384 tokens; about 28 tokens a second; 30.5B parameters, 3.3B at work"
    );
    // A vector is not decoded.
    small.model.model_type = ModelType::Embedding;
    assert_eq!(
        reason(small, UseCase::Embeddings, &device),
        "0.6 of 4.0 GB with 8192 tokens; 494M parameters"
    );
}

#[test]
fn a_use_is_said_in_words_and_written_as_a_name() {
    let words = UseCase::ALL.map(|use_case| use_case.to_string());
    assert_eq!(
        words,
        [
            "on a phone",
            "chat on a laptop",
            "code",
            "reasoning",
            "long documents",
            "tool use",
            "vision",
            "embeddings",
            "lowest latency",
            "highest quality"
        ]
    );
    assert_eq!(serde_json::to_value(UseCase::OnPhone).unwrap(), "on_phone");
}

#[test]
fn a_device_keeps_a_part_of_its_memory_for_itself() {
    let usable = |gigabytes: u64| DeviceDescription::new(gigabytes << 30, 7).usable_bytes;
    assert_eq!((usable(9), usable(36)), (6 << 30, 24 << 30));
    assert_eq!((usable(40), usable(64)), (30 << 30, 48 << 30));
    let device = DeviceDescription::new(9 << 30, 7).with_usable_bytes(5);
    assert_eq!(
        (device.memory_bytes, device.usable_bytes, device.bandwidth),
        (9 << 30, 5, 7)
    );
}

#[test]
fn a_fit_is_of_the_sequence_that_the_model_can_take() {
    let registry = ModelRegistry::new();
    let device = DeviceDescription::new(0, 50 * BILLION).with_usable_bytes(10 * BILLION);
    let cache = CacheShape {
        token_bytes: 1000,
        ..CacheShape::default()
    };
    let fit = |context_length, active_parameters: Option<u64>| {
        let mut model = ModelEntry {
            cache: Some(cache),
            ..model("m")
        };
        model.model.context_length = context_length;
        model.model.active_parameters = active_parameters;
        let fit = registry.compatibility(&model, &device);
        let fit = *fit.fit().unwrap();
        (fit.tokens, fit.memory.cache, fit.tokens_per_second)
    };
    let per_second = |bytes: f64| 30e9 / bytes;
    assert_eq!(fit(131_072, None), (8192, 8_192_000, per_second(508_192_000.0)));
    assert_eq!(fit(512, None), (512, 512_000, per_second(500_512_000.0)));
    // A context that nobody stated limits nothing.
    assert_eq!(fit(0, None).0, 8192);
    // A quarter of the experts is read, and the whole cache. More than all is all.
    assert_eq!(fit(512, Some(250 * MILLION)).2, per_second(125_512_000.0));
    assert_eq!(fit(512, Some(9 * BILLION)).2, per_second(500_512_000.0));
    // Without a count of parameters all is read.
    let mut uncounted = model("m");
    uncounted.model.parameters = 0;
    let found = registry.compatibility(&uncounted, &device);
    assert_eq!(found.fit().unwrap().tokens_per_second, per_second(500e6));
    assert!(found.is_possible());
    let none = DeviceDescription::new(0, 0);
    let found = registry.compatibility(&uncounted, &none);
    assert!(matches!(found, Compatibility::TooLarge(fit) if fit.tokens_per_second == 0.0));
    assert!(!found.is_possible() && found.fit().is_some());
    uncounted.model.size_bytes = 0;
    let found = registry.compatibility(&uncounted, &device);
    assert!(found == Compatibility::Unknown && !found.is_possible() && found.fit().is_none());
}
