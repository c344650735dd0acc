//! How an engine comes to be: a thread is started, and the model is loaded on it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as blocking;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use mlx_engine_core::{
    Backend, Device, EngineError, LoadProgress, ModelConfiguration, ModelType, ProgressFn, next_load,
};
use tokio::sync::{mpsc, oneshot, watch};

use super::Engine;
use super::lifetime::join;
use crate::clock::SystemClock;
use crate::config::EngineConfig;
use crate::constraint::Compiler;
use crate::gauges::Gauges;
use crate::mock::{MockModel, MockScript};
use crate::speculation::SpeculationConfig;
use crate::worker::{Identity, Worker, panicked};
use crate::{PromptEncoder, TokenModel};

/// Commands on their way to the worker. Who comes when there are as many waits until they were taken.
const HANDED_OVER: usize = 64;

/// What a model brings beside itself.
pub(crate) struct Loaded<M> {
    pub(crate) model: M,
    /// The one that guesses for it.
    pub(crate) draft: Option<M>,
    pub(crate) configuration: ModelConfiguration,
    pub(crate) encoder: PromptEncoder,
    pub(crate) backend: Backend,
    pub(crate) device: Device,
}

/// A load that runs. Dropping it gives the load up, wakes its thread where it sleeps, and waits for it, which is a layer's time at
/// most.
struct LoadGuard {
    cancelled: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
        join(self.thread.take());
    }
}

pub(crate) fn load_mock(
    id: String,
    script: MockScript,
    config: &EngineConfig,
    given_up: &AtomicBool,
) -> Result<Loaded<MockModel>, EngineError> {
    script.take_time(given_up)?;
    let drafts = matches!(config.speculation, SpeculationConfig::Draft(_));
    let tokenizer = script
        .tokenizer()
        .map_err(|error| EngineError::tokenizer("the mock has no tokenizer", error))?;
    let draft = drafts.then(|| script.draft().load()).transpose()?;
    let model = script.load()?;
    let mut configuration = ModelConfiguration::new(id, ModelType::Chat);
    configuration.context_length = model.context_length() as u32;
    let encoder = PromptEncoder::new(tokenizer, None)?;
    Ok(Loaded {
        model,
        draft,
        configuration,
        encoder,
        backend: Backend::Mock,
        device: Device::Cpu,
    })
}

impl Engine {
    /// Loads the mock under a name.
    ///
    /// # Errors
    ///
    /// What the script says.
    pub async fn mock(name: &str, script: MockScript, config: EngineConfig) -> Result<Self, EngineError> {
        let id = name.to_owned();
        let kept = config.clone();
        Self::load(config, None, move |given_up, _| {
            load_mock(id, script, &kept, given_up)
        })
        .await
    }

    /// Starts a thread, loads a model on it with `load`, and serves requests there. `load` hears whether it was given
    /// up through its first argument.
    pub(crate) async fn load<M, F>(
        config: EngineConfig,
        progress: Option<ProgressFn>,
        load: F,
    ) -> Result<Self, EngineError>
    where
        M: TokenModel + 'static,
        F: FnOnce(&AtomicBool, &mut dyn FnMut(LoadProgress)) -> Result<Loaded<M>, EngineError>
            + Send
            + 'static,
    {
        config.validate()?;
        let loaded_with = config.clone();
        let cancelled = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&cancelled);
        let abort = Arc::new(AtomicBool::new(false));
        let aborted = Arc::clone(&abort);
        let (commands, receiver) = mpsc::channel(HANDED_OVER);
        let (ready, loaded) = oneshot::channel();
        let began = Instant::now();
        let (end, ended) = watch::channel(());
        let gauges = Arc::new(Gauges::new(began));
        let written = Arc::clone(&gauges);
        let (alive, gone) = blocking::channel();
        let body = move || {
            // Dropped last, also where the worker panics.
            let (_end, _alive): (_, blocking::Sender<()>) = (end, alive);
            let mut progress = progress.unwrap_or_else(|| Box::new(|_| {}));
            let result = catch_unwind(AssertUnwindSafe(|| load(&cancelled, &mut progress)));
            let result = result.unwrap_or_else(|panic| Err(panicked(&*panic)));
            let Loaded {
                model,
                draft,
                mut configuration,
                encoder,
                backend,
                device,
            } = match result {
                Ok(loaded) => loaded,
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            if let Some(tokens) = config.context_length {
                let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
                configuration.context_length = configuration.context_length.min(tokens);
            }
            progress(LoadProgress::Ready);
            let load_s = began.elapsed().as_secs_f64();
            let identity = Identity {
                model: configuration.id.as_str().into(),
                backend,
                device,
                load_s,
                load: next_load(),
            };
            tracing::info!(model = %identity.model, backend = %backend, device = %device, load_s, "model loaded");
            let tokenizer = encoder.tokenizer().clone();
            let drafting = draft.as_ref().map_or(0, TokenModel::weight_bytes);
            written.loaded(model.weight_bytes() + drafting);
            let worker = match Worker::new(
                (model, draft),
                tokenizer,
                identity.clone(),
                &config,
                SystemClock,
                written,
            ) {
                Ok(worker) => worker,
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            if ready
                .send(Ok((identity, Arc::new(configuration), encoder)))
                .is_ok()
            {
                worker.run(receiver, &aborted);
            }
        };
        let thread = std::thread::Builder::new()
            .name("mlx-engine".to_owned())
            .spawn(body)
            .map_err(|error| EngineError::device("the worker thread could not be started", error))?;
        let mut guard = LoadGuard {
            cancelled: given_up,
            thread: Some(thread),
        };
        let died = || EngineError::internal("the worker thread ended while it loaded");
        let (identity, model, encoder) = loaded.await.map_err(|_| died())??;
        let thread = guard.thread.take();
        Ok(Self {
            model,
            identity,
            compiler: Compiler::new(encoder.tokenizer().clone()),
            encoder,
            commands: Mutex::new(Some(commands)),
            abort,
            thread: Mutex::new(thread),
            ended,
            gone: Mutex::new(gone),
            gauges,
            config: Arc::new(Mutex::new(loaded_with)),
            lost: watch::Sender::new(false),
        })
    }
}
