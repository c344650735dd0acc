//! The engine in a process of its own: what the two processes agree on.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use futures::future::BoxFuture;
use mlx_engine_core::{Device, EngineError, EngineWrapper, ModelConfiguration, ProgressFn, Prompt};
use mlx_engine_engine::{Engine, EngineConfig, MockScript, PrefixCacheReport, Score};
use mlx_engine_resilience::{Program, Service, Supervised, SupervisorConfiguration, connection, serve};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// What the process is to load.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Setup {
    Mlx {
        path: PathBuf,
        configuration: Option<Box<ModelConfiguration>>,
        config: EngineConfig,
    },
    Mock {
        name: String,
        script: Box<MockScript>,
        config: EngineConfig,
    },
}

/// Which program is the process, and how it is watched.
#[derive(Clone, Debug)]
pub(crate) struct Apart {
    pub(crate) program: Program,
    pub(crate) supervisor: SupervisorConfiguration,
}

/// What the engine says of itself, when it is loaded, whenever a request has ended, and a few times a second while that changes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Details {
    pub(crate) device: Device,
    pub(crate) load_s: f64,
    pub(crate) peak_memory_bytes: u64,
}

impl Apart {
    pub(crate) async fn start(
        &self,
        setup: &Setup,
        progress: Option<ProgressFn>,
    ) -> Result<Supervised, EngineError> {
        let (program, supervisor) = (self.program.clone(), self.supervisor.clone());
        Supervised::start(program, written(setup)?, supervisor, progress).await
    }
}

/// What the engine said last.
pub(crate) fn details(engine: &Supervised) -> Option<Details> {
    serde_json::from_value(engine.details()?).ok()
}

pub(crate) async fn score(engine: &Supervised, text: &str) -> Result<Score, EngineError> {
    read(engine.call(SCORE, Value::from(text)).await?)
}

pub(crate) async fn prepare(engine: &Supervised, config: &EngineConfig) -> Result<(), EngineError> {
    engine.call(PREPARE, written(config)?).await.map(drop)
}

pub(crate) async fn prefix_cache(engine: &Supervised) -> Result<PrefixCacheReport, EngineError> {
    read(engine.call(PREFIX_CACHE, Value::Null).await?)
}

pub(crate) async fn clear_prefix_cache(engine: &Supervised) -> Result<u64, EngineError> {
    read(engine.call(CLEAR_PREFIX_CACHE, Value::Null).await?)
}

pub(crate) async fn pin_prefix(engine: &Supervised, prompt: &Prompt) -> Result<(), EngineError> {
    engine.call(PIN_PREFIX, written(prompt)?).await.map(drop)
}

pub(crate) async fn unpin_prefix(engine: &Supervised, prompt: &Prompt) -> Result<bool, EngineError> {
    read(engine.call(UNPIN_PREFIX, written(prompt)?).await?)
}

/// The methods.
const SCORE: &str = "score";
const PREPARE: &str = "prepare";
const PREFIX_CACHE: &str = "prefix_cache";
const CLEAR_PREFIX_CACHE: &str = "clear_prefix_cache";
const PIN_PREFIX: &str = "pin_prefix";
const UNPIN_PREFIX: &str = "unpin_prefix";

/// The engine that the process serves, and the last that the process does for it.
struct Child<F> {
    engine: Engine,
    finish: Mutex<Option<F>>,
}

impl<F: Send> EngineWrapper for Child<F> {
    type Inner = Engine;

    fn inner(&self) -> &Engine {
        &self.engine
    }
}

impl<F: FnOnce() + Send> Service for Child<F> {
    fn details(&self) -> Value {
        let details = Details {
            device: self.engine.device(),
            load_s: self.engine.load_seconds(),
            peak_memory_bytes: self.engine.peak_memory_bytes(),
        };
        // Numbers and a name: they can be written.
        serde_json::to_value(details).unwrap_or_default()
    }

    fn call(&self, method: String, argument: Value) -> BoxFuture<'_, Result<Value, EngineError>> {
        Box::pin(async move {
            match method.as_str() {
                SCORE => written(&self.engine.score(&read::<String>(argument)?).await?),
                PREPARE => {
                    crate::served::prepare(&self.engine, read(argument)?).await?;
                    Ok(Value::Null)
                }
                PREFIX_CACHE => written(&self.engine.prefix_cache().await?),
                CLEAR_PREFIX_CACHE => written(&self.engine.clear_prefix_cache().await?),
                PIN_PREFIX => written(&self.engine.pin_prefix(read(argument)?).await?),
                UNPIN_PREFIX => written(&self.engine.unpin_prefix(read(argument)?).await?),
                _ => Err(EngineError::unsupported(format!(
                    "the engine has no method `{method}`"
                ))),
            }
        })
    }

    fn finish(&self) {
        let finish = self.finish.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(finish) = finish {
            finish();
        }
    }
}

fn written<T: Serialize>(value: &T) -> Result<Value, EngineError> {
    serde_json::to_value(value).map_err(|error| {
        EngineError::internal(format!(
            "what goes to the other process cannot be written: {error}"
        ))
    })
}

fn read<T: DeserializeOwned>(value: Value) -> Result<T, EngineError> {
    serde_json::from_value(value).map_err(|error| {
        EngineError::internal(format!(
            "what came from the other process cannot be read: {error}"
        ))
    })
}

/// Is the engine's process: serves the engine of the program that started this one, and returns when that is over. It is
/// for the program that
/// [`InferenceEngine::with_child_process`](crate::InferenceEngine::with_child_process) names, which calls it in place of
/// all else:
///
/// ```no_run
/// fn main() -> Result<(), mlx_engine::EngineError> {
///     if std::env::args().nth(1).as_deref() == Some("engine") {
///         return mlx_engine::serve_child();
///     }
///     // What the program is for.
///     Ok(())
/// }
/// ```
///
/// A worker that hangs when the program has gone does not keep the process: it is aborted then.
///
/// # Errors
///
/// [`EngineError::Device`] where no program started this process, or the system gives it nothing to work with. What goes
/// wrong with the model is told to the program.
pub fn serve_child() -> Result<(), EngineError> {
    serve_child_then(|| {})
}

/// As [`serve_child`], and calls `finish` once the engine has ended, while the program still waits: up to
/// [`exit_limit`](crate::SupervisorConfiguration::exit_limit). It is for what a process does at its end, such as sending its last
/// spans: when `serve_child` returns, the program ends the process. Where the process is killed, or nothing was loaded, it is not
/// called.
///
/// ```no_run
/// use mlx_engine::EngineError;
///
/// fn engine() -> Result<(), EngineError> {
///     mlx_engine::serve_child_then(|| eprintln!("the engine has ended"))
/// }
/// ```
///
/// # Errors
///
/// As [`serve_child`].
pub fn serve_child_then(finish: impl FnOnce() + Send + 'static) -> Result<(), EngineError> {
    let connection = connection().map_err(|error| {
        EngineError::device(
            "standard input is no connection to the program of this engine",
            error,
        )
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(|error| EngineError::device("the runtime could not be started", error))?;
    let load = async move |setup, progress| {
        Ok(Child {
            engine: load(setup, progress).await?,
            finish: Mutex::new(Some(finish)),
        })
    };
    match runtime.block_on(serve(connection, load)) {
        Ok(()) => {}
        // An ordinary exit would wait for the thread that hangs.
        Err(EngineError::DeadlineExceeded { .. }) => std::process::abort(),
        Err(error) => tracing::error!(%error, "the engine's process ends"),
    }
    Ok(())
}

async fn load(setup: Value, progress: ProgressFn) -> Result<Engine, EngineError> {
    match read(setup)? {
        Setup::Mock { name, script, config } => Engine::mock(&name, *script, config).await,
        #[cfg(feature = "mlx")]
        Setup::Mlx {
            path,
            configuration,
            config,
        } => {
            crate::settings::load_here(path, configuration.map(|known| *known), config, Some(progress)).await
        }
        #[cfg(not(feature = "mlx"))]
        Setup::Mlx { .. } => {
            drop(progress);
            Err(EngineError::MlxUnavailable {
                reason: "the engine's process was built without it".to_owned(),
            })
        }
    }
}
