//! `mlx-engine models`.

use mlx_engine::{DeviceDescription, ModelConfiguration, Recommendation, SearchCriteria, Weights, platform};
use serde_json::json;

use crate::args::{Models, ModelsCommand};
use crate::cached;
use crate::criteria::Order;
use crate::failure::Failure;
use crate::output::print_json;
#[cfg(feature = "hub")]
use crate::pull;
use crate::registry::registry;
use crate::{show, table};

pub(crate) async fn run(args: &Models) -> Result<(), Failure> {
    let registry = registry()?;
    match &args.command {
        ModelsCommand::List { cached: true, json } => cached::list(*json)?,
        ModelsCommand::List { json, .. } => {
            if *json {
                return print_json(&registry.entries().collect::<Vec<_>>());
            }
            print_table(registry.models())?;
        }
        #[cfg(feature = "hub")]
        ModelsCommand::Search {
            hub: true,
            words,
            author,
            tag,
            sort,
            limit,
            json,
            ..
        } => {
            let sort = sort.map_or(Ok(mlx_engine::hub::HubSort::Downloads), Order::of_hub)?;
            let query = mlx_engine::hub::HubQuery {
                text: (!words.is_empty()).then(|| words.join(" ")),
                author: author.clone(),
                tags: tag.clone(),
                sort: Some(sort),
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
            model_type,
            capability,
            min_parameters,
            max_parameters,
            max_size,
            bits,
            min_context,
            licence,
            fits,
            sort,
            limit,
            json,
            ..
        } => {
            let criteria = SearchCriteria {
                query: words.join(" "),
                family: family.clone(),
                model_type: *model_type,
                capability: *capability,
                min_parameters: *min_parameters,
                max_parameters: *max_parameters,
                max_size_bytes: *max_size,
                quantization: bits.map(|bits| match bits {
                    0 => Weights::FloatingPoint,
                    bits => Weights::Bits(bits),
                }),
                min_context: *min_context,
                licence: licence.clone(),
                fits_memory: *fits,
                limit: *limit,
                sort: sort.map(Order::of_registry).transpose()?.unwrap_or_default(),
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
            print_table(found.into_iter().map(|entry| &entry.model))?;
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
            let mut picks = registry.recommended_models(*use_case, &device);
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
            let row = |pick: &Recommendation<'_>| vec![pick.model.id.clone(), pick.reason.clone()];
            table::print(&["MODEL", "REASON"], &[], picks.iter().map(row).collect())?;
        }
        ModelsCommand::Show { name, json } => show::run(name, *json).await?,
    }
    Ok(())
}

/// Models in a table.
fn print_table<'a>(models: impl Iterator<Item = &'a ModelConfiguration>) -> Result<(), Failure> {
    let row = |model: &ModelConfiguration| {
        vec![
            model.id.clone(),
            format!("{:.2} B", model.parameters as f64 / 1e9),
            format!("{:.2} GB", model.size_bytes as f64 / 1e9),
            model.description.clone(),
        ]
    };
    table::print(
        &["MODEL", "PARAMETERS", "SIZE", "DESCRIPTION"],
        &[1, 2],
        models.map(row).collect(),
    )
}
