//! Loading with a progress bar.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mlx_engine::{EngineConfig, InferenceEngine, LoadProgress, ProgressFn, UnloadMode};

use crate::args::{Backend, Memory, Model};
use crate::failure::Failure;
use crate::input;
use crate::output::errln;
use crate::registry::registry;
use crate::table;

/// Loads a model. Ctrl-C gives the load up.
pub(crate) async fn load(model: &Model) -> Result<InferenceEngine, Failure> {
    load_with(model, configured(model)?).await
}

/// An engine whose process is this program again.
#[cfg(unix)]
#[cfg_attr(
    not(feature = "otlp"),
    expect(unused_variables, reason = "there are no spans to send")
)]
fn isolated(engine: InferenceEngine, model: &Model) -> Result<InferenceEngine, Failure> {
    let program = mlx_engine::Program::this()
        .map_err(|error| Failure::other(format!("the program does not know its own path: {error}")))?;
    let program = program.arg("serve-engine");
    #[cfg(feature = "otlp")]
    let program = match &model.otlp {
        // The steps are spans of that process.
        Some(collector) => program.env(crate::args::OTLP, collector),
        None => program,
    };
    Ok(engine.with_child_process(program, mlx_engine::SupervisorConfiguration::default()))
}

/// Whether a model that is not here is fetched: what cannot run here is not. The engine would fetch it too, without a word
/// on whom it waits for.
#[cfg(feature = "hub")]
pub(crate) fn fetches(backend: Backend) -> bool {
    #[cfg(feature = "mlx")]
    let opens = mlx_engine::platform().require_mlx().is_ok() && mlx_engine::mlx_device().is_ok();
    #[cfg(not(feature = "mlx"))]
    let opens = false;
    opens && !matches!(backend, Backend::Mock)
}

/// The configuration that the command line names.
fn configured(model: &Model) -> Result<EngineConfig, Failure> {
    let Some(path) = &model.config else {
        return Ok(EngineConfig::default());
    };
    let config: EngineConfig = serde_json::from_str(&input::file(path)?)
        .map_err(|error| Failure::other(format!("`{}` is no configuration: {error}", path.display())))?;
    config.validate().map_err(mlx_engine::EngineError::from)?;
    Ok(config)
}

/// Has the engine fit into the memory that there is, where it is to.
fn fitted(engine: InferenceEngine, model: &Model) -> Result<InferenceEngine, Failure> {
    let available = match model.fit {
        None => return Ok(engine),
        Some(Memory::All) => None,
        Some(Memory::Bytes(bytes)) => Some(bytes),
    };
    if matches!(model.backend, Backend::Mock) {
        return Err(Failure::usage("the mock takes no memory: leave --fit out"));
    }
    #[cfg(feature = "mlx")]
    match engine.clone().fitted(&model.model, available) {
        Ok((engine, fit)) => {
            errln!("fit: {fit}");
            return Ok(engine);
        }
        // The mock answers where it may, and the load says why.
        Err(mlx_engine::EngineError::MlxUnavailable { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    #[cfg(not(feature = "mlx"))]
    let _ = available;
    Ok(engine)
}

/// Ends an engine. Where it has a folder for what it computed, that is written down to the end. Ctrl-C leaves the rest.
pub(crate) async fn finish(engine: &InferenceEngine) -> Result<(), Failure> {
    tokio::select! {
        done = engine.unload_with(UnloadMode::Drain) => Ok(done?),
        _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted),
    }
}

/// As [`load`], with a configuration beside those of the command line.
pub(crate) async fn load_with(model: &Model, config: EngineConfig) -> Result<InferenceEngine, Failure> {
    let config = EngineConfig {
        exact: model.exact || config.exact,
        threads: model.threads.map(|threads| threads as usize).or(config.threads),
        kv: model.kv(&config.kv)?,
        speculation: model.speculation(&config.speculation),
        ..config
    };
    #[cfg(feature = "hub")]
    if fetches(model.backend) {
        crate::pull::bring(&model.model).await?;
    }
    let engine = InferenceEngine::new()
        .with_registry(registry()?.clone())
        .with_backend(model.backend.into())
        .with_config(config);
    let engine = fitted(engine, model)?;
    #[cfg(unix)]
    let engine = if model.isolate {
        isolated(engine, model)?
    } else {
        engine
    };
    // indicatif draws on a terminal alone.
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    // Until it is known of what there is a part.
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    bar.set_message("loading");
    bar.enable_steady_tick(Duration::from_millis(200));
    let seen = bar.clone();
    let styled = |template| ProgressStyle::with_template(template).unwrap_or_else(|_| bar.style());
    let fetching = styled("{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes}");
    let loading = styled("{msg} {bar:30} {pos}/{len}");
    let progress: ProgressFn = Box::new(move |stage| match stage {
        LoadProgress::Fetching {
            done,
            total,
            bytes_per_second,
            remaining_s,
        } => {
            seen.set_style(fetching.clone());
            let left = remaining_s.map_or_else(String::new, |left| format!(", {left} s left"));
            seen.set_message(format!("fetching at {}/s{left}", table::size(bytes_per_second)));
            seen.set_length(total);
            seen.set_position(done);
        }
        LoadProgress::Layers { done, total } => {
            seen.set_style(loading.clone());
            seen.set_message("loading layers");
            seen.set_length(total.into());
            seen.set_position(done.into());
        }
        LoadProgress::Bytes { total, .. } => seen.set_message(format!("loading {} MB", total / 1_000_000)),
        _ => {}
    });
    let loaded = tokio::select! {
        loaded = engine.load_model_with_progress(&model.model, progress) => loaded,
        _ = tokio::signal::ctrl_c() => {
            bar.finish_and_clear();
            return Err(Failure::Interrupted);
        }
    };
    bar.finish_and_clear();
    loaded?;
    if let Some(reason) = engine.fallback_reason() {
        errln!("warning: the mock answers in place of the model: {reason}");
    }
    Ok(engine)
}
