//! `mlx-engine models`.

use mlx_engine::{
    DeviceDescription, EngineError, ModelConfiguration, ModelEntry, ModelRegistry, SearchCriteria, platform,
};
use serde_json::json;

use crate::args::{Models, ModelsCommand};
use crate::cached;
use crate::failure::Failure;
use crate::output::{outln, print_json};
#[cfg(feature = "hub")]
use crate::pull;

pub(crate) async fn run(args: &Models) -> Result<(), Failure> {
    let registry = ModelRegistry::builtin();
    match &args.command {
        ModelsCommand::List { cached: true, json } => cached::list(*json)?,
        ModelsCommand::List { json, .. } => {
            if *json {
                return print_json(&registry.entries().collect::<Vec<_>>());
            }
            registry.models().try_for_each(print_line)?;
        }
        #[cfg(feature = "hub")]
        ModelsCommand::Search {
            hub: true,
            words,
            author,
            tag,
            limit,
            json,
            ..
        } => {
            let query = mlx_engine::hub::HubQuery {
                text: (!words.is_empty()).then(|| words.join(" ")),
                author: author.clone(),
                tags: tag.clone(),
                sort: Some(mlx_engine::hub::HubSort::Downloads),
                limit: Some(limit.unwrap_or(20)),
            };
            pull::search(&query, *json).await?;
        }
        #[cfg(feature = "hub")]
        ModelsCommand::Pull {
            model,
            include,
            exclude,
            json,
        } => pull::pull(model, include, exclude, *json).await?,
        #[cfg(feature = "hub")]
        ModelsCommand::Verify {
            model,
            repair: true,
            json,
        } => pull::repair(model, *json).await?,
        ModelsCommand::Verify { model, json, .. } => cached::verify(model, *json).await?,
        ModelsCommand::Rm { model, json } => cached::remove(model, *json)?,
        ModelsCommand::Prune { dry_run, json } => cached::prune(*dry_run, *json)?,
        ModelsCommand::Du { json } => cached::usage(*json)?,
        ModelsCommand::Search {
            words,
            family,
            max_size,
            min_context,
            limit,
            json,
            ..
        } => {
            let criteria = SearchCriteria {
                query: words.join(" "),
                family: family.clone(),
                max_size_bytes: *max_size,
                min_context: *min_context,
                limit: *limit,
                ..SearchCriteria::default()
            };
            let found = registry.search_models(&criteria);
            if *json {
                return print_json(&found);
            }
            if found.is_empty() {
                return Err(Failure::other(
                    "no model is like that; ask for less, or see `models list`",
                ));
            }
            found.into_iter().try_for_each(|model| print_line(model))?;
        }
        ModelsCommand::Recommend {
            use_case,
            memory,
            bandwidth,
            limit,
            json,
        } => {
            let memory = memory.or(platform().memory_bytes).ok_or_else(|| {
                Failure::usage("how much memory there is could not be found out: give --memory")
            })?;
            let device = DeviceDescription::new(memory, *bandwidth);
            let mut picks = registry.recommended_models((*use_case).into(), &device);
            picks.truncate(*limit);
            if *json {
                let picks: Vec<_> = picks
                    .iter()
                    .map(|pick| json!({"model": pick.model, "reason": pick.reason}))
                    .collect();
                return print_json(&picks);
            }
            if picks.is_empty() {
                let memory = memory as f64 / 1e9;
                return Err(Failure::other(format!(
                    "no model of the registry suits this use on a device with {memory:.1} GB"
                )));
            }
            for pick in picks {
                outln!("{:55} {}", pick.model.id, pick.reason);
            }
        }
        ModelsCommand::Show { name, json } => {
            let model = registry.entry(name).map_err(EngineError::from)?;
            if *json {
                return print_json(model);
            }
            print_page(model)?;
        }
    }
    Ok(())
}

/// All that is known of a model.
fn print_page(entry: &ModelEntry) -> Result<(), Failure> {
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
    outln!("size          {} bytes", model.size_bytes);
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

/// One model in one line.
fn print_line(model: &ModelConfiguration) -> Result<(), Failure> {
    let size = model.size_bytes as f64 / 1e9;
    let parameters = model.parameters as f64 / 1e9;
    outln!(
        "{:55} {parameters:7.2} B {size:7.2} GB  {}",
        model.id,
        model.description
    );
    Ok(())
}
