//! What an entry says of its model, and what a user's list says of an entry.

use mlx_engine_core::{GenerateParams, ModelConfiguration, ModelType, Quantization};
use mlx_engine_registry::{CacheShape, Capability, ModelEntry, ModelRegistry, Sampling};

fn entry(parameters: u64, size_bytes: u64, quantization: Option<Quantization>) -> ModelEntry {
    ModelEntry::from(ModelConfiguration {
        parameters,
        size_bytes,
        quantization,
        ..ModelConfiguration::new("owner/model", ModelType::Chat)
    })
}

fn packed(bits: u8, group_size: u32) -> Option<Quantization> {
    Quantization::new(bits, group_size).ok()
}

#[test]
fn weights_take_what_the_files_do_or_what_their_bits_do() {
    assert_eq!(entry(64_000, 7, packed(4, 64)).weight_bytes(), Some(7));
    assert_eq!(entry(64_000, 0, None).weight_bytes(), Some(128_000));
    // Half a byte each, and 32 bits for each group.
    assert_eq!(
        entry(64_000, 0, packed(4, 64)).weight_bytes(),
        Some(32_000 + 4_000)
    );
    assert_eq!(
        entry(64_000, 0, packed(3, 32)).weight_bytes(),
        Some(24_000 + 8_000)
    );
    assert_eq!(entry(0, 0, packed(4, 64)).weight_bytes(), None);
    assert_eq!(entry(1, 0, None).weight_bytes(), Some(2));
    assert_eq!(entry(u64::MAX, 0, None).weight_bytes(), Some(u64::MAX));
}

#[test]
fn weights_at_work_are_all_where_nobody_says_less() {
    let mut model = entry(8, 0, None);
    assert_eq!(model.active_parameters(), 8);
    model.model.active_parameters = Some(3);
    assert_eq!(model.active_parameters(), 3);
}

#[test]
fn a_cache_of_no_known_shape_is_that_of_a_llama_as_large() {
    let mut model = entry(8_000_000_000, 0, None);
    // 128 KiB a token, within a part in a thousand.
    let bytes = model.cache_bytes(8192);
    assert!(bytes.abs_diff(1 << 30) < 1 << 20, "{bytes}");
    assert_eq!(model.cache_bytes(8192), 8_000_000_000 / 61_035 * 8192);
    model.cache = Some(CacheShape {
        token_bytes: 10,
        ..CacheShape::default()
    });
    assert_eq!(model.cache_bytes(8192), 81_920);
    model.cache = None;
    model.model.model_type = ModelType::Embedding;
    assert_eq!(model.cache_bytes(8192), 0);
}

#[test]
fn what_is_recommended_is_put_into_place_and_nothing_else() {
    let asked = GenerateParams::default().with_max_tokens(9).with_seed(3);
    assert_eq!(Sampling::default().apply(asked.clone()), asked);
    let all = Sampling {
        temperature: Some(0.25),
        top_p: Some(0.5),
        top_k: Some(7),
        min_p: Some(0.125),
        repetition_penalty: Some(1.5),
    };
    let expect = asked
        .clone()
        .with_temperature(0.25)
        .with_top_p(0.5)
        .with_top_k(7)
        .with_min_p(0.125)
        .with_repetition_penalty(1.5);
    assert_eq!(all.apply(asked), expect);
}

#[test]
fn the_type_of_a_model_says_what_it_can_do() {
    for (model_type, expect) in [
        (ModelType::Reasoning, &[Capability::Reasoning][..]),
        (ModelType::VisionLanguage, &[Capability::Vision]),
        (ModelType::Chat, &[]),
    ] {
        let model = ModelEntry::from(ModelConfiguration::new("m", model_type));
        assert_eq!(model.capabilities, expect);
    }
    let words = [Capability::Tools, Capability::Reasoning, Capability::Vision];
    assert_eq!(
        words.map(|word| word.to_string()),
        ["tools", "reasoning", "vision"]
    );
}

#[test]
fn a_users_list_can_say_all_that_there_is() {
    let mut registry = ModelRegistry::new();
    registry
        .layer(
            r#"
            [[model]]
            id = "models/own"
            name = "Own"
            description = "Mine."
            family = "llama"
            parameters = 30
            active_parameters = 30
            quantization = { bits = 4, group_size = 32 }
            context_length = 4096
            size_bytes = 17
            model_type = "code"
            default_system_prompt = "Be brief."
            aliases = ["own", "mine"]
            licence = "mit"
            released = "2025-12"
            capabilities = ["tools", "vision"]
            languages = ["de", "en"]
            sampling = { top_k = 20 }
            cache = { token_bytes = 1, window = 2, window_token_bytes = 3, state_bytes = 4 }
            "#,
        )
        .unwrap();
    let expect = ModelEntry {
        model: ModelConfiguration {
            id: "models/own".to_owned(),
            name: "Own".to_owned(),
            description: "Mine.".to_owned(),
            family: "llama".to_owned(),
            parameters: 30,
            active_parameters: Some(30),
            quantization: packed(4, 32),
            context_length: 4096,
            size_bytes: 17,
            model_type: ModelType::Code,
            default_system_prompt: Some("Be brief.".to_owned()),
            aliases: vec!["own".to_owned(), "mine".to_owned()],
        },
        licence: "mit".to_owned(),
        released: "2025-12".to_owned(),
        capabilities: vec![Capability::Tools, Capability::Vision],
        languages: vec!["de".to_owned(), "en".to_owned()],
        sampling: Some(Sampling {
            top_k: Some(20),
            ..Sampling::default()
        }),
        cache: Some(CacheShape {
            token_bytes: 1,
            window: 2,
            window_token_bytes: 3,
            state_bytes: 4,
        }),
    };
    assert_eq!(registry.entry("own").unwrap(), &expect);
    // What a second list does not say stays.
    registry
        .layer("[[model]]\nid = 'MODELS/Own'\nmodel_type = 'chat'")
        .unwrap();
    let mut changed = expect;
    changed.model.model_type = ModelType::Chat;
    assert_eq!(registry.entry("mine").unwrap(), &changed);
}

#[test]
fn the_ends_of_what_a_user_may_say_are_taken_and_what_lies_beyond_is_not() {
    let layer = |line: &str| {
        let text = format!("[[model]]\nid = 'a/b'\nmodel_type = 'chat'\nparameters = 8\n{line}");
        ModelRegistry::new().layer(&text).is_ok()
    };
    for (line, taken) in [
        ("active_parameters = 8", true),
        ("active_parameters = 1", true),
        ("active_parameters = 9", false),
        ("active_parameters = 0", false),
        ("released = '2025-01'", true),
        ("released = '2025-12'", true),
        ("released = '2025-13'", false),
        ("released = '2025-00'", false),
        ("released = '25-01'", false),
        ("released = '2025-1'", false),
        ("released = '2o25-01'", false),
        ("released = '2025-0x'", false),
        ("released = '202501'", false),
        ("released = ''", true),
        ("sampling = { temperature = 2.0 }", true),
        ("sampling = { temperature = 2.1 }", false),
        ("sampling = { heat = 1.0 }", false),
    ] {
        assert_eq!(layer(line), taken, "{line}");
    }
}

#[test]
fn an_alias_goes_to_who_wrote_it_last() {
    let mut registry = ModelRegistry::new();
    let layer = |registry: &mut ModelRegistry, id: &str, aliases: &str| {
        registry
            .layer(&format!("[[model]]\nid = '{id}'\nmodel_type = 'chat'\n{aliases}"))
            .map_err(|error| error.to_string())
    };
    layer(&mut registry, "one", "aliases = ['first', 'shared']").unwrap();
    layer(&mut registry, "two", "aliases = ['SHARED']").unwrap();
    assert_eq!(registry.get("shared").unwrap().id, "two");
    assert_eq!(registry.get("one").unwrap().aliases, ["first"]);
    // Who says nothing of aliases claims none.
    layer(&mut registry, "one", "").unwrap();
    assert_eq!(registry.get("shared").unwrap().id, "two");
    // Two of one list cannot both have it.
    let both = "[[model]]\nid = 'one'\naliases = ['x']\n[[model]]\nid = 'two'\naliases = ['X']";
    let error = registry.layer(both).unwrap_err().to_string();
    assert!(error.contains("which already names model `one`"), "{error}");
}

#[test]
fn a_list_is_read_up_to_four_mebibytes() {
    let file = std::env::temp_dir().join(format!("mlx-engine-registry-{}.toml", std::process::id()));
    let read = |bytes: usize| {
        std::fs::write(&file, "#".repeat(bytes)).unwrap();
        ModelRegistry::new()
            .layer_file(&file)
            .map_err(|error| error.to_string())
    };
    assert_eq!(read(4 << 20), Ok(()));
    let error = read((4 << 20) + 1).unwrap_err();
    assert!(
        error.contains("it has 4194305 bytes, at most 4194304 are read"),
        "{error}"
    );
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn a_registry_says_how_many_it_has() {
    let mut registry = ModelRegistry::new();
    assert!(registry.is_empty());
    assert_eq!(registry.len(), 0);
    registry
        .register(ModelConfiguration::new("a", ModelType::Chat))
        .unwrap();
    assert!(!registry.is_empty() && registry.len() == 1);
    assert_eq!((registry.models().len(), registry.entries().len()), (1, 1));
}
