//! Models that are not here yet.

use mlx_engine_core::{EngineError, ErrorSource};
use mlx_engine_hub::{FetchEvent, Hub, HubError, HubReference, SnapshotRequest};
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

/// As [`fetch`], where the cache does not have the model, with the progress of a load.
#[cfg(feature = "mlx")]
pub(crate) async fn find_or_fetch(
    reference: &str,
    registry: &ModelRegistry,
    hub: Option<&Hub>,
    progress: &mut Option<mlx_engine_engine::ProgressFn>,
) -> Result<ModelLocation, EngineError> {
    use std::sync::{Mutex, PoisonError};

    use mlx_engine_core::LoadProgress;

    let (found, entry) = match ModelReference::parse(reference, registry)? {
        ModelReference::Path(_) => return crate::locate(reference, registry),
        ModelReference::Hub(found, entry) => (found, entry),
    };
    let of_environment;
    let hub = if let Some(hub) = hub {
        hub
    } else {
        of_environment = Hub::from_env().map_err(|error| failed(&found, error))?;
        &of_environment
    };
    if let Ok(path) = hub.cache().find(&found) {
        return Ok(ModelLocation {
            path,
            configuration: entry.map(|entry| *entry),
        });
    }
    let told = Mutex::new(progress.take());
    let tell = |event| {
        if let FetchEvent::Progress(step) = event
            && let Some(tell) = told.lock().unwrap_or_else(PoisonError::into_inner).as_mut()
        {
            tell(LoadProgress::Fetching {
                done: step.done,
                total: step.bytes,
                bytes_per_second: step.bytes_per_second,
                remaining_s: step.remaining.map(|left| left.as_secs()),
            });
        }
    };
    tracing::info!(model = %found, "fetching a model that is not in the cache");
    let location = fetch(reference, registry, hub, &tell).await;
    *progress = told.into_inner().unwrap_or_else(PoisonError::into_inner);
    location
}

/// The engine's error for the hub's.
fn failed(reference: &HubReference, error: HubError) -> EngineError {
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
