//! Search, recommendation and the user's own models keep their promises.

use mlx_engine_core::{ModelConfiguration, ModelType, Quantization};
use mlx_engine_registry::{
    Capability, Compatibility, DeviceDescription, ModelEntry, ModelRegistry, RegistryError, SearchCriteria,
    SortBy, UseCase, Weights,
};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

fn ids(criteria: &SearchCriteria) -> Vec<&'static str> {
    let found = ModelRegistry::builtin().search_models(criteria);
    found.into_iter().map(|model| &*model.model.id).collect()
}

fn search(query: &str) -> Vec<&'static str> {
    ids(&SearchCriteria {
        query: query.to_owned(),
        ..SearchCriteria::default()
    })
}

#[test]
fn a_search_forgives_case_order_separators_and_small_typing_errors() {
    for (query, expect) in [
        ("Llama 3.2 1B", "mlx-community/Llama-3.2-1B-Instruct-4bit"),
        ("1b LLAMA-3.2", "mlx-community/Llama-3.2-1B-Instruct-4bit"),
        ("lama3.2 1b", "mlx-community/Llama-3.2-1B-Instruct-4bit"),
        ("mixtrla", "mlx-community/Mixtral-8x7B-Instruct-v0.1-4bit"),
        ("reranker qewn3", "mlx-community/Qwen3-Reranker-0.6B-4bit"),
        ("gpt oss 120b", "mlx-community/gpt-oss-120b-MXFP4-Q8"),
        ("minimx", "mlx-community/MiniMax-M2-4bit"),
    ] {
        assert_eq!(search(query).first(), Some(&expect), "{query}");
    }
    assert!(
        search("7b").iter().all(|id| !id.contains("27")),
        "{:?}",
        search("7b")
    );
    assert!(search("zzzzzz").is_empty());
    assert_eq!(search("  ").len(), ModelRegistry::builtin().len());
}

#[test]
fn the_better_match_comes_first() {
    assert_eq!(search("qwen3")[0], "mlx-community/Qwen3-8B-4bit", "the alias");
    let coder = search("coder");
    let name = coder.iter().position(|id| id.contains("Coder")).unwrap();
    assert_eq!(name, 0, "a name before a description");
}

#[test]
fn each_criterion_decides_by_itself() {
    let all = ModelRegistry::builtin();
    let check = |criteria: SearchCriteria, holds: fn(&ModelEntry) -> bool| {
        let found = all.search_models(&criteria);
        assert!(!found.is_empty(), "{criteria:?}");
        assert_eq!(
            found.len(),
            all.entries().filter(|model| holds(model)).count(),
            "{criteria:?}"
        );
        assert!(found.into_iter().all(holds), "{criteria:?}");
    };
    let none = SearchCriteria::default;
    check(
        SearchCriteria {
            family: Some("QWEN3".into()),
            ..none()
        },
        |m| m.family == "qwen3",
    );
    check(
        SearchCriteria {
            licence: Some("mit".into()),
            ..none()
        },
        |m| m.licence == "mit",
    );
    check(
        SearchCriteria {
            model_type: Some(ModelType::Code),
            ..none()
        },
        |m| m.model_type == ModelType::Code,
    );
    check(
        SearchCriteria {
            capability: Some(Capability::Tools),
            ..none()
        },
        |m| m.can(Capability::Tools),
    );
    check(
        SearchCriteria {
            min_parameters: Some(7_000_000_000),
            ..none()
        },
        |m| m.parameters >= 7_000_000_000,
    );
    check(
        SearchCriteria {
            max_parameters: Some(7_000_000_000),
            ..none()
        },
        |m| m.parameters <= 7_000_000_000,
    );
    check(
        SearchCriteria {
            max_size_bytes: Some(GIB),
            ..none()
        },
        |m| m.size_bytes <= GIB,
    );
    check(
        SearchCriteria {
            min_context: Some(131_072),
            ..none()
        },
        |m| m.context_length >= 131_072,
    );
    check(
        SearchCriteria {
            quantization: Some(Weights::Bits(8)),
            ..none()
        },
        |m| m.quantization.map(Quantization::bits) == Some(8),
    );
    check(
        SearchCriteria {
            quantization: Some(Weights::FloatingPoint),
            ..none()
        },
        |m| m.quantization.is_none(),
    );
    check(
        SearchCriteria {
            fits_memory: Some(6 * GIB),
            ..none()
        },
        |m| {
            m.size_bytes + m.size_bytes / 32 + (128 << 20) + m.cache_bytes(m.context_length.min(8192).into())
                <= 6 * GIB
        },
    );
}

#[test]
fn what_is_unknown_meets_no_bound() {
    let mut registry = ModelRegistry::new();
    registry
        .register(ModelConfiguration::new("owner/unknown", ModelType::Base))
        .unwrap();
    let all = SearchCriteria::default;
    for (criteria, found) in [
        (all(), 1),
        (
            SearchCriteria {
                min_parameters: Some(0),
                ..all()
            },
            0,
        ),
        (
            SearchCriteria {
                max_parameters: Some(u64::MAX),
                ..all()
            },
            0,
        ),
        (
            SearchCriteria {
                max_size_bytes: Some(u64::MAX),
                ..all()
            },
            0,
        ),
        (
            SearchCriteria {
                min_context: Some(0),
                ..all()
            },
            0,
        ),
        (
            SearchCriteria {
                quantization: Some(Weights::FloatingPoint),
                ..all()
            },
            1,
        ),
    ] {
        assert_eq!(registry.search_models(&criteria).len(), found, "{criteria:?}");
    }
}

#[test]
fn orders_compare_numbers() {
    let sorted = |sort| {
        let criteria = SearchCriteria {
            sort,
            ..SearchCriteria::default()
        };
        ModelRegistry::builtin().search_models(&criteria)
    };
    let is_sorted =
        |sort, key: fn(&ModelEntry) -> u64| sorted(sort).windows(2).all(|two| key(two[0]) <= key(two[1]));
    assert!(is_sorted(SortBy::Relevance, |model| model.parameters));
    assert!(is_sorted(SortBy::Parameters, |model| model.parameters));
    assert!(is_sorted(SortBy::ParametersDescending, |model| !model.parameters));
    assert!(is_sorted(SortBy::Size, |model| model.size_bytes));
    assert!(is_sorted(SortBy::Context, |model| u64::from(
        !model.context_length
    )));
    assert!(
        sorted(SortBy::Released)
            .windows(2)
            .all(|two| two[0].released >= two[1].released)
    );
    assert!(
        sorted(SortBy::Name)
            .windows(2)
            .all(|two| two[0].name.to_lowercase() <= two[1].name.to_lowercase())
    );
    let parameters = |id: &str| ModelRegistry::builtin().get(id).unwrap().parameters;
    assert!(parameters("qwen2.5-14b") > parameters("qwen2.5-7b"));
}

#[test]
fn a_device_decides_what_is_recommended() {
    let phone = DeviceDescription::new(8 * GIB, 60_000_000_000);
    let laptop = DeviceDescription::new(16 * GIB, 120_000_000_000);
    let studio = DeviceDescription::new(192 * GIB, 800_000_000_000);
    let registry = ModelRegistry::builtin();
    for use_case in UseCase::ALL {
        for device in [&laptop, &studio] {
            let picks = registry.recommended_models(use_case, device);
            assert!(!picks.is_empty(), "{use_case}");
            assert!(
                picks.iter().all(|pick| pick.reason.contains("GB with")),
                "{use_case}"
            );
        }
    }
    let first = |use_case, device| registry.recommended_models(use_case, device)[0].model;
    assert!(first(UseCase::OnPhone, &phone).size_bytes < 3 * GIB);
    assert!(
        first(UseCase::HighestQuality, &studio).parameters
            > first(UseCase::HighestQuality, &laptop).parameters
    );
    assert!(first(UseCase::LowestLatency, &studio).parameters < 2_000_000_000);
    assert_eq!(first(UseCase::Code, &laptop).model_type, ModelType::Code);
    assert_eq!(
        first(UseCase::Embeddings, &phone).model_type,
        ModelType::Embedding
    );
    assert!(first(UseCase::Vision, &laptop).can(Capability::Vision));
    assert!(registry.best_fit(&studio).unwrap().model.parameters > 20_000_000_000);
    assert!(registry.best_fit(&DeviceDescription::new(GIB / 8, 1)).is_none());
}

#[test]
fn compatibility_has_the_numbers() {
    let registry = ModelRegistry::builtin();
    let llama = registry.entry("llama3.1-8b").unwrap();
    let verdict = |usable| {
        let device = DeviceDescription::new(usable, 100_000_000_000).with_usable_bytes(usable);
        registry.compatibility(llama, &device)
    };
    let Compatibility::Fits(fit) = verdict(16 * GIB) else {
        panic!("{:?}", verdict(16 * GIB));
    };
    assert_eq!(
        (fit.tokens, fit.memory.cache, fit.memory.weights),
        (8192, GIB, 4_517_000_000)
    );
    // 60 GB/s over 4.517 + 1.074 GB.
    assert!(
        (fit.tokens_per_second - 10.73).abs() < 0.01,
        "{}",
        fit.tokens_per_second
    );
    let total = fit.memory.total();
    assert!(matches!(verdict(total), Compatibility::Tight(_)));
    assert!(matches!(verdict(total - 1), Compatibility::TooLarge(_)));
    let unknown = ModelEntry::from(ModelConfiguration::new("a/b", ModelType::Chat));
    let device = DeviceDescription::new(GIB, 1);
    assert_eq!(registry.compatibility(&unknown, &device), Compatibility::Unknown);
}

#[test]
fn a_layer_changes_what_it_gives_and_adds_what_is_new() {
    let mut registry = ModelRegistry::builtin().clone();
    let before = registry.entry("qwen3-8b").unwrap().clone();
    registry
        .layer(
            r#"
            [[model]]
            id = "mlx-community/qwen3-8b-4BIT"
            context_length = 131_072
            sampling = { temperature = 0.1 }

            [[model]]
            id = "models/own"
            model_type = "code"
            parameters = 1_000_000_000
            quantization = { bits = 6, group_size = 64 }
            aliases = ["qwen3", "own"]
            "#,
        )
        .unwrap();
    let changed = registry.entry("qwen3-8b").unwrap();
    assert_eq!(
        (changed.context_length, changed.parameters),
        (131_072, before.parameters)
    );
    assert_eq!(changed.sampling.unwrap().temperature, Some(0.1));
    let own = registry.entry("QWEN3").unwrap();
    assert_eq!(own.id, "models/own");
    assert_eq!(own.weight_bytes(), Some(812_500_000));
    assert_eq!(registry.len(), ModelRegistry::builtin().len() + 1);
}

#[test]
fn a_layer_that_is_refused_says_what_is_wrong_and_changes_nothing() {
    let mut registry = ModelRegistry::builtin().clone();
    for (text, expect) in [
        (
            "[[model]]\nid = 'a/b'",
            "`model_type` of model `a/b` is missing, allowed: what a new model is for",
        ),
        (
            "[[model]]\nid = 'a/b'\nmodel_type = 'chat'\nlicense = 'mit'",
            "unknown field `license`",
        ),
        ("[[models]]\nid = 'a/b'", "unknown field `models`"),
        (
            "[[model]]\nid = 'a/b'\nmodel_type = 'poem'",
            "unknown variant `poem`",
        ),
        (
            "[[model]]\nid = 'a/b'\nmodel_type = 'chat'\nquantization = { bits = 7, group_size = 64 }",
            "is 7",
        ),
        (
            "[[model]]\nid = 'a/b'\nmodel_type = 'chat'\nactive_parameters = 3",
            "`active_parameters` of model `a/b` is 3, allowed: 1 to `parameters`, 0",
        ),
        (
            "[[model]]\nid = 'a/b'\nmodel_type = 'chat'\nsampling = { top_p = 2.0 }",
            "`sampling.top_p` of model `a/b` is 2",
        ),
        (
            "[[model]]\nid = 'a/b'\nmodel_type = 'chat'\nreleased = 'May'",
            "`released` of model `a/b` is May",
        ),
        (
            "[[model]]\nid = 'phi4'\nmodel_type = 'chat'",
            "already names model `mlx-community/phi-4-4bit`",
        ),
        (
            "[[model]]\nid = 'phi-4-4bit'\n[[model]]\nid = 'PHI-4-4bit'",
            "already names model",
        ),
    ] {
        let message = registry.layer(text).unwrap_err().to_string();
        assert!(message.contains(expect), "{text}: {message}");
        assert!(registry.entries().eq(ModelRegistry::builtin().entries()));
    }
    let error = registry
        .layer_file(std::path::Path::new("/no/such/file.toml"))
        .unwrap_err();
    assert!(matches!(error, RegistryError::Unreadable { .. }), "{error}");
    registry
        .layer_file(std::path::Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/models.toml"
        )))
        .unwrap();
    assert!(
        registry.entries().eq(ModelRegistry::builtin().entries()),
        "the list over itself is the list"
    );
}

/// Criteria, each of them set with this probability: where most are, nothing is found that a property could be of.
fn any_criteria(likely: f64) -> impl Strategy<Value = SearchCriteria> {
    let query = prop_oneof![
        Just(String::new()),
        "[a-z0-9. -]{0,6}",
        prop::sample::select(vec![
            "qwen",
            "llama 4bit",
            "coder",
            "instruct",
            "thinking tools",
            "mit",
            "gema"
        ])
        .prop_map(str::to_owned),
    ];
    let first = (
        query,
        prop::option::weighted(
            likely,
            prop::sample::select(vec!["qwen3", "llama", "gemma3", "none"]).prop_map(str::to_owned),
        ),
        prop::option::weighted(
            likely,
            prop::sample::select(vec![ModelType::Chat, ModelType::Code, ModelType::Embedding]),
        ),
        prop::option::weighted(
            likely,
            prop::sample::select(vec![Capability::Tools, Capability::Vision]),
        ),
        prop::option::weighted(likely, 0..40_000_000_000u64),
        prop::option::weighted(likely, 0..80_000_000_000u64),
    );
    let second = (
        prop::option::weighted(likely, 0..40_000_000_000u64),
        prop::option::weighted(
            likely,
            prop::sample::select(vec![Weights::Bits(4), Weights::Bits(8), Weights::FloatingPoint]),
        ),
        prop::option::weighted(likely, 0..300_000u32),
        prop::option::weighted(
            likely,
            prop::sample::select(vec!["mit", "apache-2.0"]).prop_map(str::to_owned),
        ),
        prop::option::weighted(likely, 0..100 * GIB),
        prop::sample::select(vec![
            SortBy::Relevance,
            SortBy::Parameters,
            SortBy::ParametersDescending,
            SortBy::Size,
            SortBy::Context,
            SortBy::Released,
            SortBy::Name,
        ]),
    );
    (first, second).prop_map(|(first, second)| {
        let (query, family, model_type, capability, min_parameters, max_parameters) = first;
        let (max_size_bytes, quantization, min_context, licence, fits_memory, sort) = second;
        SearchCriteria {
            query,
            family,
            model_type,
            capability,
            min_parameters,
            max_parameters,
            max_size_bytes,
            quantization,
            min_context,
            licence,
            fits_memory,
            limit: None,
            sort,
        }
    })
}

proptest! {
    #[test]
    fn a_constraint_never_adds_results(base in any_criteria(0.1), more in any_criteria(0.9), which in 0..11usize) {
        let mut narrower = base.clone();
        match which {
            0 => narrower.query = format!("{} {}", base.query, more.query),
            1 => narrower.family = base.family.clone().or(more.family),
            2 => narrower.model_type = base.model_type.or(more.model_type),
            3 => narrower.capability = base.capability.or(more.capability),
            4 => narrower.min_parameters = base.min_parameters.max(more.min_parameters),
            5 => narrower.max_parameters = base.max_parameters.into_iter().chain(more.max_parameters).min(),
            6 => narrower.max_size_bytes = base.max_size_bytes.into_iter().chain(more.max_size_bytes).min(),
            7 => narrower.quantization = base.quantization.or(more.quantization),
            8 => narrower.min_context = base.min_context.max(more.min_context),
            9 => narrower.licence = base.licence.clone().or(more.licence),
            _ => narrower.fits_memory = base.fits_memory.into_iter().chain(more.fits_memory).min(),
        }
        let wide = ids(&base);
        for id in ids(&narrower) {
            prop_assert!(wide.contains(&id), "{} by {:?}", id, narrower);
        }
    }

    #[test]
    fn one_typing_error_hides_no_model(
        model in any::<prop::sample::Index>(),
        word in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        edit in 0..4,
        letter in prop::char::range('a', 'z'),
    ) {
        let is_word = |word: &&str| word.len() >= 5 && word.chars().all(|c| c.is_ascii_alphabetic());
        let named: Vec<(&ModelEntry, Vec<&str>)> = ModelRegistry::builtin()
            .entries()
            .map(|model| (model, model.name.split(' ').filter(is_word).collect::<Vec<_>>()))
            .filter(|(_, words)| !words.is_empty())
            .collect();
        let (model, words) = model.get(&named);
        let mut typed: Vec<char> = word.get(words).chars().collect();
        let at = at.index(typed.len() - 1);
        match edit {
            0 => typed.swap(at, at + 1),
            1 => typed[at] = letter,
            2 => typed.insert(at, letter),
            _ => drop(typed.remove(at)),
        }
        let query = typed.into_iter().collect::<String>();
        prop_assert!(search(&query).contains(&&*model.model.id), "{} by {}", model.name, query);
    }

    #[test]
    fn an_order_is_total_and_independent_of_registration(criteria in any_criteria(0.2), seed in any::<u64>(), limit in 0..30usize) {
        let mut models: Vec<ModelEntry> = ModelRegistry::builtin().entries().cloned().collect();
        let count = models.len();
        // A permutation without a generator: a step that is prime to the length, which 104 and 97 are.
        for index in 0..count {
            models.swap(index, (index.wrapping_mul(97).wrapping_add(seed as usize % count)) % count);
        }
        let mut shuffled = ModelRegistry::new();
        for model in models {
            shuffled.register_entry(model).unwrap();
        }
        let found: Vec<&str> = shuffled.search_models(&criteria).iter().map(|model| &*model.model.id).collect();
        let expect = ids(&criteria);
        prop_assert_eq!(&found, &expect);
        let limited = ids(&SearchCriteria { limit: Some(limit), ..criteria });
        prop_assert_eq!(&limited[..], &expect[..limit.min(expect.len())]);
    }

    #[test]
    fn nothing_is_recommended_that_does_not_fit(
        memory in 0..600 * GIB,
        usable in prop::option::of(any::<u64>()),
        bandwidth in prop_oneof![Just(0), 0..4_000_000_000_000u64, any::<u64>()],
    ) {
        let mut device = DeviceDescription::new(memory, bandwidth);
        if let Some(usable) = usable {
            device = device.with_usable_bytes(usable);
        }
        let registry = ModelRegistry::builtin();
        let best = registry.best_fit(&device);
        let all = UseCase::ALL.into_iter().flat_map(|use_case| registry.recommended_models(use_case, &device));
        for pick in all.chain(best) {
            let fit = pick.compatibility.fit().unwrap();
            prop_assert!(pick.compatibility.is_possible());
            prop_assert!(fit.memory.total() <= device.usable_bytes, "{}", pick.model.id);
            prop_assert!(pick.model.size_bytes <= fit.memory.weights);
        }
    }

    #[test]
    fn no_layer_and_no_query_panics(text in ".{0,60}", query in ".{0,20}") {
        let mut registry = ModelRegistry::new();
        let _ = registry.layer(&text);
        let _ = search(&query);
    }
}
