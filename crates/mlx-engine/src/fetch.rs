//! Models that are not here yet.

use mlx_engine_core::{EngineError, ErrorSource};
use mlx_engine_hub::{FetchEvent, FileSelection, Hub, HubError, HubReference, SnapshotRequest};
use mlx_engine_registry::ModelRegistry;

use crate::{ModelLocation, ModelReference};

/// Whether loading a model may fetch it.
#[cfg(feature = "mlx")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FetchPolicy {
    /// A model that is not in the local cache is fetched. One that is there is taken as it is, and nobody is asked
    /// whether it has changed. `HF_HUB_OFFLINE=1` keeps from it too.
    #[default]
    WhenMissing,
    /// A model that is not in the local cache is an error.
    Never,
}

/// Fetches what is missing of a model from the hub, or finds that nothing is, and returns where it is. A path is returned
/// as it is. Needs a tokio runtime; dropping the future ends the work, and what has come is kept.
///
/// # Errors
///
/// [`EngineError::ModelNotFound`] and [`EngineError::ModelFetch`].
pub async fn fetch(
    reference: &str,
    registry: &ModelRegistry,
    hub: &Hub,
    tell: &(dyn Fn(FetchEvent) + Send + Sync),
) -> Result<ModelLocation, EngineError> {
    let (found, entry) = match ModelReference::parse(reference, registry)? {
        ModelReference::Path(path) => {
            return Ok(ModelLocation {
                path,
                configuration: None,
            });
        }
        ModelReference::Hub(found, entry) => (found, entry),
    };
    let request = SnapshotRequest::new(found.clone());
    let snapshot = hub
        .fetch(&request, tell)
        .await
        .map_err(|error| failed(&found, error))?;
    Ok(ModelLocation {
        path: snapshot.path,
        configuration: entry.map(|entry| *entry),
    })
}

/// As [`fetch`], but a model that the cache has whole is taken as it is, and nobody is asked for it.
///
/// # Errors
///
/// As [`fetch`].
pub async fn find_or_fetch(
    reference: &str,
    registry: &ModelRegistry,
    hub: &Hub,
    tell: &(dyn Fn(FetchEvent) + Send + Sync),
) -> Result<ModelLocation, EngineError> {
    match found(reference, registry, hub)? {
        Ok(location) => Ok(location),
        Err(model) => {
            tracing::info!(%model, "fetching a model that is not in the cache");
            fetch(reference, registry, hub, tell).await
        }
    }
}

/// As [`find_or_fetch`], but of a repository no more than what encodes prompts: no weights come.
///
/// # Errors
///
/// As [`fetch`].
pub async fn find_or_fetch_tokenizer(
    reference: &str,
    registry: &ModelRegistry,
    hub: &Hub,
    tell: &(dyn Fn(FetchEvent) + Send + Sync),
) -> Result<ModelLocation, EngineError> {
    let model = match found(reference, registry, hub)? {
        Ok(location) => return Ok(location),
        Err(model) => model,
    };
    let mut request = SnapshotRequest::new(model.clone());
    if model.file.is_none() {
        request = request.with_files(FileSelection::Patterns {
            allow: vec!["*.json".to_owned(), "*.jinja".to_owned()],
            ignore: vec!["*/*".to_owned(), "*.safetensors.index.json".to_owned()],
        });
    }
    let path = match hub.fetch(&request, tell).await {
        Ok(snapshot) => snapshot.path,
        // What a pattern would match is known to the hub alone. The tokenizer of an earlier time is as good.
        Err(error) => {
            let known = hub.cache().find(&HubReference {
                file: Some("tokenizer.json".parse().map_err(|error| failed(&model, error))?),
                ..model.clone()
            });
            let folder = known
                .ok()
                .filter(|_| model.file.is_none() && error.is_about_the_way());
            match folder.as_deref().and_then(std::path::Path::parent) {
                Some(folder) => folder.to_owned(),
                None => return Err(failed(&model, error)),
            }
        }
    };
    Ok(ModelLocation {
        path,
        configuration: registry
            .get(model.repo.as_str())
            .ok()
            .filter(|_| model.file.is_none())
            .cloned(),
    })
}

/// What a name means on this machine, or on the hub where the cache does not have it.
fn found(
    reference: &str,
    registry: &ModelRegistry,
    hub: &Hub,
) -> Result<Result<ModelLocation, HubReference>, EngineError> {
    let (model, entry) = match ModelReference::parse(reference, registry)? {
        ModelReference::Path(path) => {
            return Ok(Ok(ModelLocation {
                path,
                configuration: None,
            }));
        }
        ModelReference::Hub(model, entry) => (model, entry),
    };
    Ok(match hub.cache().find(&model) {
        Ok(path) => Ok(ModelLocation {
            path,
            configuration: entry.map(|entry| *entry),
        }),
        Err(_) => Err(model),
    })
}

/// As [`find_or_fetch`], with the progress of a load.
#[cfg(feature = "mlx")]
pub(crate) async fn find_or_fetch_with_progress(
    reference: &str,
    registry: &ModelRegistry,
    hub: Option<&Hub>,
    progress: &mut Option<mlx_engine_core::ProgressFn>,
) -> Result<ModelLocation, EngineError> {
    use std::sync::{Mutex, PoisonError};

    use mlx_engine_core::LoadProgress;

    let model = match ModelReference::parse(reference, registry)? {
        ModelReference::Path(_) => return crate::locate(reference, registry),
        ModelReference::Hub(model, _) => model,
    };
    let of_environment;
    let hub = if let Some(hub) = hub {
        hub
    } else {
        of_environment = Hub::from_env().map_err(|error| failed(&model, error))?;
        &of_environment
    };
    let told = Mutex::new(progress.take());
    let tell = |event| match event {
        FetchEvent::Progress(step) => {
            if let Some(tell) = told.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                tell(LoadProgress::Fetching {
                    done: step.done,
                    total: step.bytes,
                    bytes_per_second: step.bytes_per_second,
                    remaining_s: step.remaining.map(|left| left.as_secs()),
                });
            }
        }
        // A load's progress has no words for them.
        FetchEvent::Waiting { file, holder } => {
            tracing::warn!(file, holder, "waiting for who is at the same file");
        }
        FetchEvent::Retrying { file, reason, after } => tracing::warn!(file, reason, ?after, "trying again"),
        FetchEvent::FromCache { reason } => tracing::warn!(reason, "the hub could not be asked"),
        _ => {}
    };
    let location = find_or_fetch(reference, registry, hub, &tell).await;
    *progress = told.into_inner().unwrap_or_else(PoisonError::into_inner);
    location
}

/// The engine's error for the hub's.
pub(crate) fn failed(reference: &HubReference, error: HubError) -> EngineError {
    let hint = error.hint();
    match error {
        HubError::NotFound { .. } | HubError::Offline { .. } | HubError::NothingToFetch { .. } => {
            let hint = match hint {
                Some(hint) => format!("{error}; {hint}"),
                None => error.to_string(),
            };
            EngineError::ModelNotFound {
                reference: reference.to_string(),
                hint: Some(hint),
            }
        }
        error => EngineError::ModelFetch {
            model: reference.to_string(),
            hint,
            retryable: error.is_retryable(),
            retry_after: error.retry_after(),
            source: ErrorSource::new(error),
        },
    }
}
