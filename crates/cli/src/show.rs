//! `mlx-engine models show`.

use mlx_engine::{
    Compatibility, DeviceDescription, ModelDescription, ModelEntry, ModelEstimate, RegistryError, platform,
};
use serde_json::json;

use crate::failure::Failure;
use crate::output::{outln, print_json};
use crate::registry::registry;
use crate::table;

/// Tokens of the sequence that memory is reckoned with.
const TOKENS: u64 = 8192;

pub(crate) async fn run(name: &str, as_json: bool) -> Result<(), Failure> {
    let is_path = std::path::Path::new(name).exists();
    match registry()?.entry(name) {
        Ok(entry) if !is_path => {
            if as_json {
                return print_json(entry);
            }
            return print_entry(entry);
        }
        Err(error @ RegistryError::Ambiguous { .. }) if !is_path => {
            return Err(mlx_engine::EngineError::from(error).into());
        }
        _ => {}
    }
    let model = described(name).await?;
    let device = platform()
        .memory_bytes
        .map(|bytes| DeviceDescription::new(bytes, 0));
    let compatibility = device.map(|device| model.compatibility(&device));
    if as_json {
        let mut value = serde_json::to_value(&model).map_err(|error| Failure::other(error.to_string()))?;
        value["bytes"] = json!(model.bytes());
        value["compatibility"] = json!(compatibility);
        return print_json(&value);
    }
    print_description(&model, compatibility)
}

#[cfg(feature = "hub")]
async fn described(name: &str) -> Result<ModelDescription, Failure> {
    let hub = mlx_engine::hub::Hub::from_env()?;
    let registry = registry()?;
    tokio::select! {
        model = mlx_engine::describe(name, registry, &hub) => Ok(model?),
        _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted),
    }
}

#[cfg(not(feature = "hub"))]
#[expect(clippy::unused_async, reason = "it stands for the one that asks the hub")]
async fn described(name: &str) -> Result<ModelDescription, Failure> {
    Ok(mlx_engine::describe_local(name, registry()?)?)
}

/// What is known of a model that the registry does not have by this name.
fn print_description(model: &ModelDescription, compatibility: Option<Compatibility>) -> Result<(), Failure> {
    outln!("{}", model.reference);
    #[cfg(feature = "hub")]
    if let Some(info) = &model.hub {
        outln!("repository    {} at {}", info.id, info.commit);
        let licence = info.tags.iter().find_map(|tag| tag.strip_prefix("license:"));
        let number = |number: Option<u64>| number.map(|number| number.to_string());
        for (name, value) in [
            ("task", info.pipeline_tag.clone()),
            ("library", info.library.clone()),
            ("licence", licence.map(str::to_owned)),
            ("downloads", number(info.downloads)),
            ("likes", number(info.likes)),
            ("changed", info.last_modified.clone()),
            (
                "access",
                info.gated
                    .then(|| "its terms have to be accepted on the hub first".to_owned()),
            ),
        ] {
            if let Some(value) = value {
                outln!("{name:13} {value}");
            }
        }
    }
    match &model.path {
        Some(path) => outln!("here          {}", path.display()),
        None => outln!(
            "here          no; `mlx-engine models pull {}` fetches it",
            model.reference
        ),
    }
    if let Some(estimate) = &model.estimate {
        print_estimate(estimate)?;
    }
    if let Some(reason) = &model.not_estimated {
        outln!("estimate      none: {reason}");
    }
    let verdict = match &compatibility {
        Some(Compatibility::Fits(_)) => "yes",
        Some(Compatibility::Tight(_)) => "tightly",
        _ => "no",
    };
    if let Some(fit) = compatibility.as_ref().and_then(Compatibility::fit) {
        outln!(
            "fits          {verdict}, {} are usable",
            table::size(fit.usable_bytes)
        );
    }
    let mut rows: Vec<_> = model
        .files
        .iter()
        .map(|file| vec![file.path.clone(), table::size(file.bytes)])
        .collect();
    rows.push(vec!["total".to_owned(), table::size(model.bytes())]);
    outln!("");
    table::print(&["FILE", "SIZE"], &[1], rows)
}

fn print_estimate(estimate: &ModelEstimate) -> Result<(), Failure> {
    let about = if estimate.is_exact { "" } else { "about " };
    outln!("type          {}", estimate.model_type);
    outln!("parameters    {about}{}", estimate.parameters);
    if estimate.active_parameters != estimate.parameters {
        outln!("active        {about}{} for a token", estimate.active_parameters);
    }
    let bits = estimate
        .bits
        .map_or_else(String::new, |bits| format!(", most of them in {bits} bits"));
    outln!(
        "weights       {about}{}{bits}",
        table::size(estimate.weight_bytes)
    );
    if let Some(context) = estimate.context_length {
        outln!("context       {context} tokens");
    }
    let tokens = estimate
        .context_length
        .map_or(TOKENS, |context| context.min(TOKENS));
    let memory = estimate.memory(tokens);
    outln!(
        "memory        {about}{} with {tokens} tokens: weights, {} for the cache and {} to work in",
        table::size(memory.total()),
        table::size(memory.cache),
        table::size(memory.working)
    );
    Ok(())
}

/// All that the registry knows of a model.
fn print_entry(entry: &ModelEntry) -> Result<(), Failure> {
    let model = &entry.model;
    outln!("{} ({})", model.name, model.id);
    outln!("{}", model.description);
    outln!("family        {}", model.family);
    outln!("type          {}", model.model_type);
    outln!("parameters    {}", model.parameters);
    if let Some(active) = model.active_parameters {
        outln!("active        {active} for a token");
    }
    match &model.quantization {
        Some(quantization) => {
            let (bits, group_size) = (quantization.bits(), quantization.group_size());
            outln!("weights       {bits} bits, groups of {group_size}");
        }
        None => outln!("weights       floating point"),
    }
    outln!("context       {} tokens", model.context_length);
    outln!("size          {}", table::size(model.size_bytes));
    let capabilities: Vec<String> = entry.capabilities.iter().map(ToString::to_string).collect();
    let sampling = match &entry.sampling {
        Some(sampling) => {
            serde_json::to_string(sampling).map_err(|error| Failure::other(error.to_string()))?
        }
        None => String::new(),
    };
    for (name, value) in [
        ("licence", &entry.licence),
        ("released", &entry.released),
        ("capabilities", &capabilities.join(", ")),
        ("languages", &entry.languages.join(", ")),
        ("sampling", &sampling),
        ("aliases", &model.aliases.join(", ")),
    ] {
        if !value.is_empty() {
            outln!("{name:13} {value}");
        }
    }
    Ok(())
}
