//! The references of the book say what the code says: errors, configuration, environment and models. `cargo xtask docs`
//! writes them.
#![cfg(feature = "mlx")]

#[path = "reference/page.rs"]
mod page;
#[path = "reference/source.rs"]
mod source;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mlx_engine::environment::{Reader, VARIABLES};
use mlx_engine::{
    DiskCacheConfig, DraftConfig, EngineConfig, EngineError, ErrorSource, GenerateParams,
    HealthConfiguration, LookupConfig, ModelRegistry, OptimizeOptions, ParamError, ResilienceConfiguration,
    SupervisorConfiguration,
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::page::{Page, cell};
use crate::source::Source;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// One error of each variant.
fn every_error() -> Vec<EngineError> {
    let text = |what: &str| what.to_owned();
    let wait = Duration::from_secs(2);
    vec![
        ParamError::new("top_p", 7, "above 0 and at most 1").into(),
        EngineError::EmptyPrompt,
        EngineError::PromptTooLong {
            prompt_tokens: 9000,
            context_length: 8192,
        },
        EngineError::ModelNotFound {
            reference: text("qwen9"),
            hint: Some(text("the hint of the error names what was perhaps meant")),
        },
        EngineError::model_load("tiny", "a tensor is missing"),
        EngineError::ModelFetch {
            model: text("tiny"),
            hint: Some(text("the hint of the error says what the hub asks for")),
            retryable: true,
            retry_after: Some(wait),
            source: ErrorSource::new("status 503"),
        },
        EngineError::UnsupportedModel {
            model_type: text("mamba9"),
            supported: vec![text("…")],
        },
        EngineError::tokenizer("a merge is malformed", "line 7"),
        EngineError::template("the template does not compile", "line 7"),
        EngineError::Constraint {
            message: text("the schema is no object"),
        },
        EngineError::Unsupported {
            message: text("the engine is in a process of its own and cannot be handed out"),
            hint: Some(text("the hint of the error, where there is another way")),
        },
        EngineError::MlxUnavailable {
            reason: text("this build has no MLX"),
        },
        EngineError::InsufficientMemory {
            required: 8_000_000_000,
            available: 4_000_000_000,
        },
        EngineError::OutOfMemory,
        EngineError::QueueFull { retry_after: wait },
        EngineError::Unavailable {
            reason: text("the circuit is open"),
            retry_after: wait,
        },
        EngineError::NotLoaded { model: text("tiny") },
        EngineError::LoadInProgress { model: text("tiny") },
        EngineError::Cancelled,
        EngineError::DeadlineExceeded { limit: wait },
        EngineError::WorkerPanicked {
            message: text("index out of bounds"),
        },
        EngineError::WorkerLost {
            message: text("signal 9"),
        },
        EngineError::device("an operation failed", "the driver's words"),
        EngineError::internal("a promise was broken"),
    ]
}

/// The name of a variant, as the code writes it.
fn variant(error: &EngineError) -> String {
    let shown = format!("{error:?}");
    let end = shown.find(|c: char| !c.is_alphanumeric());
    shown[..end.unwrap_or(shown.len())].to_owned()
}

#[test]
fn reference_of_errors() {
    let source = Source::read("crates/core/src/error.rs");
    let variants = source.variants("EngineError");
    let mut page = Page::new("Errors");
    page.text(
        "Every failure of a request or a load is an `EngineError`. `is_retryable()` says whether the same request may succeed later, \
         `retry_after()` when, where the engine knows it, and `hint()` what a user can do. The enum grows: match with a wildcard.",
    );
    page.table(
        &["variant", "when", "message, by example", "again?", "what to do"],
        variants.iter().map(|(name, doc)| {
            let errors = every_error();
            let error = errors.iter().find(|error| variant(error) == *name);
            let error = error.unwrap_or_else(|| panic!("`every_error` has no `{name}`"));
            let again = match (error.is_retryable(), error.retry_after()) {
                (true, Some(_)) => "yes, after `retry_after()`",
                (true, None) => "yes",
                (false, _) => "no",
            };
            let todo = error.hint().unwrap_or_else(|| {
                let told = "what the message and its sources say";
                if error.is_retryable() { "try again" } else { told }.to_owned()
            });
            [
                format!("`{name}`"),
                doc.clone(),
                cell(&error.to_string()),
                again.to_owned(),
                todo,
            ]
        }),
    );
    assert_eq!(variants.len(), every_error().len());
    page.check("errors.md");
}

#[test]
fn reference_of_configuration() {
    let mut page = Page::new("Configuration");
    page.text(
        "Each of these can be read from a file and written to one with serde. What is not written there is the default; a field that does \
         not exist is refused, and so is a value out of its range, with what is allowed. Durations are numbers of seconds.",
    );
    let core = Source::read("crates/core/src/params.rs");
    section(&mut page, &core, "GenerateParams", "", &GenerateParams::default());
    let engine = Source::read("crates/engine/src/config.rs");
    let defaults = EngineConfig::default();
    section(&mut page, &engine, "EngineConfig", "", &defaults);
    section(
        &mut page,
        &engine,
        "PrefixCacheConfig",
        "prefix_cache.",
        &defaults.prefix_cache,
    );
    let disk = DiskCacheConfig::new("FOLDER");
    section(&mut page, &engine, "DiskCacheConfig", "prefix_cache.disk.", &disk);
    let speculation = Source::read("crates/engine/src/speculation/config.rs");
    section(
        &mut page,
        &speculation,
        "LookupConfig",
        "speculation.lookup.",
        &LookupConfig::default(),
    );
    section(
        &mut page,
        &speculation,
        "DraftConfig",
        "speculation.draft.",
        &DraftConfig::new("MODEL"),
    );
    let kv = Source::read("crates/core/src/kv.rs");
    section(&mut page, &kv, "KvConfig", "kv.", &defaults.kv);
    let resilience = Source::read("crates/resilience/src/configuration.rs");
    let defaults = ResilienceConfiguration::default();
    section(&mut page, &resilience, "ResilienceConfiguration", "", &defaults);
    section(
        &mut page,
        &resilience,
        "RetryConfiguration",
        "retry.",
        &defaults.retry,
    );
    section(
        &mut page,
        &resilience,
        "BudgetConfiguration",
        "retry.budget.",
        &defaults.retry.budget,
    );
    section(
        &mut page,
        &resilience,
        "BreakerConfiguration",
        "breaker.",
        &defaults.breaker,
    );
    section(
        &mut page,
        &resilience,
        "BulkheadConfiguration",
        "bulkhead.",
        &defaults.bulkhead,
    );
    section(
        &mut page,
        &resilience,
        "TimeoutConfiguration",
        "timeouts.",
        &defaults.timeouts,
    );
    section(
        &mut page,
        &resilience,
        "RecoveryConfiguration",
        "recovery.",
        &defaults.recovery,
    );
    let health = Source::read("crates/monitor/src/configuration.rs");
    section(
        &mut page,
        &health,
        "HealthConfiguration",
        "",
        &HealthConfiguration::default(),
    );
    let supervised = Source::read("crates/resilience/src/supervised/configuration.rs");
    section(
        &mut page,
        &supervised,
        "SupervisorConfiguration",
        "",
        &SupervisorConfiguration::default(),
    );
    let optimize = Source::read("crates/mlx-engine/src/optimize/mod.rs");
    section(
        &mut page,
        &optimize,
        "OptimizeOptions",
        "",
        &OptimizeOptions::default(),
    );
    page.check("configuration.md");
}

/// The fields of a type with their defaults. A field that holds fields of its own has its own section.
fn section(page: &mut Page, source: &Source, name: &str, prefix: &str, default: &impl Serialize) {
    let (doc, fields) = source.fields(name);
    // By way of text, in which a float32 has no more digits than it needs.
    let text = serde_json::to_string(default).expect("a configuration can be written");
    let default: Value = serde_json::from_str(&text).expect("and read");
    let known: BTreeSet<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
    let written = default.as_object().expect("an object");
    assert!(
        written.keys().all(|key| known.contains(key.as_str())),
        "{name}: {written:?}"
    );
    page.heading(name);
    page.text(&doc);
    page.table(
        &["field", "default", "what it says"],
        fields.iter().map(|(field, doc)| {
            let default = match &default[field.as_str()] {
                Value::Null => "none".to_owned(),
                Value::Object(object) if !object.is_empty() => "see below".to_owned(),
                value => cell(&value.to_string()),
            };
            [format!("`{prefix}{field}`"), default, doc.clone()]
        }),
    );
}

#[test]
fn reference_of_the_environment() {
    let mut page = Page::new("Environment");
    page.text("Every environment variable that is read. One that is set to nothing counts as not set.");
    for (reader, heading) in [
        (Reader::Program, "Programs"),
        (Reader::Build, "The build"),
        (Reader::Tests, "Tests"),
    ] {
        page.heading(heading);
        page.table(
            &["variable", "what it says"],
            VARIABLES
                .iter()
                .filter(|variable| variable.reader == reader)
                .map(|variable| [format!("`{}`", variable.name), format!("{}.", variable.meaning)]),
        );
    }
    page.check("environment.md");
}

/// What tests set for Python's `huggingface_hub` and nothing here reads.
const NO_VARIABLES: [&str; 2] = ["HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"];

#[test]
fn no_variable_is_read_that_the_reference_does_not_name() {
    let named: BTreeSet<&str> = VARIABLES.iter().map(|variable| variable.name).collect();
    assert_eq!(named.len(), VARIABLES.len(), "one is named twice");
    let mut found = BTreeSet::new();
    for file in source::files(&root()) {
        let text = std::fs::read_to_string(&file).expect("a source");
        found.extend(source::variables(&text));
    }
    found.retain(|name| !NO_VARIABLES.contains(&name.as_str()));
    let unnamed: Vec<_> = found
        .iter()
        .filter(|name| !named.contains(name.as_str()))
        .collect();
    assert!(unnamed.is_empty(), "name them in environment.rs: {unnamed:?}");
    let unread: Vec<_> = named.iter().filter(|name| !found.contains(**name)).collect();
    assert!(unread.is_empty(), "nothing reads {unread:?}");
}

#[test]
fn reference_of_models() {
    let mut page = Page::new("Models");
    page.heading("Architectures");
    page.text(
        "The `model_type`s of `config.json` that can be loaded. The README says from which kinds of files.",
    );
    let supported = supported();
    let readme = std::fs::read_to_string(root().join("README.md")).expect("the README");
    for name in &supported {
        assert!(readme.contains(&format!("`{name}`")), "the README lacks `{name}`");
    }
    let registry = ModelRegistry::builtin();
    page.table(
        &["`model_type`", "models of the registry"],
        supported.iter().map(|name| {
            let count = registry.models().filter(|model| model.family == *name).count();
            [format!("`{name}`"), count.to_string()]
        }),
    );
    page.heading("The registry");
    page.text(
        "The models that have a name, by family. Sizes are those of the weights. A model whose family is not among the architectures above \
         is known, so that it can be searched and estimated, and refused when it is loaded.",
    );
    let mut entries: Vec<_> = registry.entries().collect();
    entries.sort_by_key(|entry| {
        (
            entry.model.family.clone(),
            entry.model.parameters,
            entry.model.id.clone(),
        )
    });
    page.table(
        &[
            "id",
            "names",
            "family",
            "runs",
            "parameters",
            "bytes",
            "context",
            "can",
            "licence",
        ],
        entries.iter().map(|entry| {
            let model = &entry.model;
            let runs = supported.contains(&model.family);
            let can: Vec<String> = entry.capabilities.iter().map(ToString::to_string).collect();
            let names: Vec<String> = model.aliases.iter().map(|alias| format!("`{alias}`")).collect();
            [
                format!("`{}`", model.id),
                names.join(", "),
                format!("`{}`", model.family),
                if runs { "yes" } else { "no" }.to_owned(),
                billions(model.parameters),
                billions(model.size_bytes),
                model.context_length.to_string(),
                can.join(", "),
                entry.licence.clone(),
            ]
        }),
    );
    page.check("models.md");
}

/// A number in billions or millions.
fn billions(number: u64) -> String {
    if number >= 1_000_000_000 {
        format!("{:.1} G", number as f64 / 1e9)
    } else {
        format!("{} M", number / 1_000_000)
    }
}

/// What the engine says that it supports, when it is given something else.
fn supported() -> Vec<String> {
    let folder = tempfile::tempdir().expect("a folder");
    let config = json!({"model_type": "none"}).to_string();
    std::fs::write(folder.path().join("config.json"), config).expect("a file");
    let path = folder.path().display().to_string();
    let engine = mlx_engine::InferenceEngine::new();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    match runtime.block_on(engine.load_model(&path)) {
        Err(EngineError::UnsupportedModel { supported, .. }) => supported,
        other => panic!("{other:?}"),
    }
}
