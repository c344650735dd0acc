//! A model that is loaded.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as blocking;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::{BoxFuture, Either, select};
use mlx_engine_core::{
    Backend, Device, EngineError, EngineStatistics, EventStream, GenerateParams, LlmEngine, LoadProgress,
    ModelConfiguration, ModelType, ParamError, Prompt,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use crate::clock::SystemClock;
use crate::config::{EngineConfig, PrefixCacheConfig};
use crate::constraint::Compiler;
use crate::gauges::Gauges;
use crate::lost::{Events, hung};
use crate::mock::{MockModel, MockScript};
use crate::request::Request;
use crate::speculation::SpeculationConfig;
use crate::worker::{Command, Identity, Maintenance, PrefixCommand, Worker, panicked};
use crate::{PrefixCacheReport, PromptEncoder, TokenModel, output};

/// Commands on their way to the worker. Who comes when there are as many waits until they were taken.
const HANDED_OVER: usize = 64;

/// Hears how far a load has come, on the worker thread.
pub type ProgressFn = Box<dyn FnMut(LoadProgress) + Send>;

/// The log-probabilities of a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The tokens of the text.
    pub tokens: Vec<u32>,
    /// The log-probability of each token after those before it; the first has none.
    pub logprobs: Vec<Option<f32>>,
}

impl Score {
    /// The perplexity: e to the mean negative log-probability. 1 where no token has any.
    pub fn perplexity(&self) -> f64 {
        let known: Vec<f64> = self
            .logprobs
            .iter()
            .flatten()
            .map(|&logprob| f64::from(logprob))
            .collect();
        if known.is_empty() {
            return 1.0;
        }
        (-known.iter().sum::<f64>() / known.len() as f64).exp()
    }
}

/// What becomes of the requests of an engine that is unloaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnloadMode {
    /// They end with [`EngineError::NotLoaded`] before their next step.
    #[default]
    Abort,
    /// They are answered first, those that wait too.
    Drain,
}

/// A model on its worker thread. Dropping it ends what runs and waits for the thread, which is a step's time; a thread that
/// takes longer than a minute over it is left behind.
pub struct Engine {
    model: Arc<ModelConfiguration>,
    identity: Identity,
    encoder: PromptEncoder,
    compiler: Compiler,
    commands: Mutex<Option<mpsc::Sender<Command>>>,
    /// Tells the worker to give up what runs.
    abort: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Closed when the thread has nothing left to do.
    ended: watch::Receiver<()>,
    /// The same for who waits without a runtime.
    gone: Mutex<blocking::Receiver<()>>,
    gauges: Arc<Gauges>,
    /// As the model was loaded.
    config: EngineConfig,
    /// Becomes true when the worker is given up.
    lost: watch::Sender<bool>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

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

/// A load that runs. Dropping it gives the load up and waits for its thread, which is a layer's time at most.
struct LoadGuard {
    cancelled: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
        join(self.thread.take());
    }
}

/// Waits for a thread. A panic of the worker was reported to whom it concerned.
fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread {
        let _ = thread.join();
    }
}

/// How long the drop of an engine waits for a step that hangs.
const DROP_LIMIT: Duration = Duration::from_mins(1);

/// MLX takes its own state apart when the process ends, and must not be at work on another thread then.
impl Drop for Engine {
    fn drop(&mut self) {
        self.close(UnloadMode::Abort);
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let gone = self.gone.get_mut().unwrap_or_else(PoisonError::into_inner);
        if thread.is_some() && gone.recv_timeout(DROP_LIMIT) == Err(blocking::RecvTimeoutError::Timeout) {
            tracing::error!(limit = ?DROP_LIMIT, "the worker does not end and is left behind");
            return;
        }
        join(thread);
    }
}

pub(crate) fn load_mock(
    id: String,
    script: MockScript,
    config: &EngineConfig,
) -> Result<Loaded<MockModel>, EngineError> {
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
        Self::load(config, None, move |_, _| load_mock(id, script, &kept)).await
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
            let result =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| load(&cancelled, &mut progress)));
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
            config: loaded_with,
            lost: watch::Sender::new(false),
        })
    }

    /// The model's tokenizer and template.
    pub fn encoder(&self) -> &PromptEncoder {
        &self.encoder
    }

    /// How the model was loaded.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// What the model runs on.
    pub fn device(&self) -> Device {
        self.identity.device
    }

    /// The most bytes that models had allocated at once in this process, loading included; 0 on the mock.
    pub fn peak_memory_bytes(&self) -> u64 {
        match self.identity.backend {
            #[cfg(feature = "mlx")]
            Backend::Mlx => mlx_engine_models::peak_memory().unwrap_or_default(),
            _ => 0,
        }
    }

    /// Lets [`peak_memory_bytes`](Self::peak_memory_bytes) start again, for the whole process.
    pub fn reset_peak_memory(&self) {
        #[cfg(feature = "mlx")]
        if self.identity.backend == Backend::Mlx
            && let Err(error) = mlx_engine_models::reset_peak_memory()
        {
            tracing::warn!(%error, "the peak of memory could not be reset");
        }
    }

    /// Seconds that loading took.
    pub fn load_seconds(&self) -> f64 {
        self.identity.load_s
    }

    /// The log-probability of each token of a text.
    ///
    /// # Errors
    ///
    /// [`EngineError::EmptyPrompt`], [`EngineError::PromptTooLong`], what the device says, and that the mock has no
    /// probabilities.
    pub async fn score(&self, text: &str) -> Result<Score, EngineError> {
        let tokens = self.encoder.encode(&Prompt::text(text))?;
        let context_length = u64::from(self.model.context_length);
        if tokens.len() as u64 > context_length {
            return Err(EngineError::PromptTooLong {
                prompt_tokens: tokens.len() as u64,
                context_length,
            });
        }
        let (reply, scored) = oneshot::channel();
        self.unless_lost(async {
            self.send(Command::Score { tokens, reply }).await?;
            scored.await.map_err(|_| self.dropped())?
        })
        .await
    }

    /// Whether the worker takes requests: it was not unloaded, and its thread lives.
    fn is_serving(&self) -> bool {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        commands.as_ref().is_some_and(|commands| !commands.is_closed())
    }

    /// What those hear whose command the worker took and did not answer.
    fn dropped(&self) -> EngineError {
        if self.is_serving() {
            EngineError::WorkerPanicked {
                message: "it was at the request".to_owned(),
            }
        } else {
            self.not_loaded()
        }
    }

    fn not_loaded(&self) -> EngineError {
        EngineError::NotLoaded {
            model: self.model.id.clone(),
        }
    }

    /// Ends the engine and gives the memory back: at once, or after the requests that it has taken. Requests after it are
    /// [`EngineError::NotLoaded`]. Unloading twice is no error: both wait for the end, which [`UnloadMode::Abort`] brings
    /// near for an engine that drains.
    ///
    /// # Errors
    ///
    /// Where the worker panicked.
    pub async fn unload_with(&self, mode: UnloadMode) -> Result<(), EngineError> {
        self.close(mode);
        // The thread ends after the step that runs; only its last moment is waited for here.
        let mut ended = self.ended.clone();
        while ended.changed().await.is_ok() {}
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        thread.map_or(Ok(()), |thread| thread.join().map_err(|panic| panicked(&*panic)))
    }

    /// Lets no more requests in.
    fn close(&self, mode: UnloadMode) {
        if mode == UnloadMode::Abort {
            self.abort.store(true, Ordering::Release);
        }
        drop(
            self.commands
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
    }

    /// The sequences that are kept for requests that begin alike.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotLoaded`].
    pub async fn prefix_cache(&self) -> Result<PrefixCacheReport, EngineError> {
        self.manage(PrefixCommand::Report).await
    }

    /// Gives the sequences up that are kept and not pinned, and says how many bytes that were.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotLoaded`].
    pub async fn clear_prefix_cache(&self) -> Result<u64, EngineError> {
        self.manage(PrefixCommand::Clear).await
    }

    /// Keeps the keys and values of a prompt until [`unpin_prefix`](Self::unpin_prefix), computing them where they are not
    /// known: of a long system prompt, say. They count to the budget, and to what requests may not take.
    ///
    /// # Errors
    ///
    /// Those of a request, and [`EngineError::InsufficientMemory`] where the budget of the cache is too small.
    pub async fn pin_prefix(&self, prompt: Prompt) -> Result<(), EngineError> {
        let tokens = self.encoder.encode(&prompt)?;
        let pin = || {
            let tokens = tokens.clone();
            self.manage(|pinned| PrefixCommand::Pin { tokens, pinned })
        };
        if pin().await??.is_none() {
            return Ok(());
        }
        // A request leaves what it was fed.
        let params = GenerateParams::default().with_max_tokens(1).with_temperature(0.0);
        self.generate(Prompt::Tokens(tokens.clone()), params).await?;
        match pin().await?? {
            None => Ok(()),
            Some(lack) => Err(lack),
        }
    }

    /// Lets a prompt go that was pinned, when its time comes; `false` where it is not pinned.
    ///
    /// # Errors
    ///
    /// Those of the prompt, and [`EngineError::NotLoaded`].
    pub async fn unpin_prefix(&self, prompt: Prompt) -> Result<bool, EngineError> {
        let tokens = self.encoder.encode(&prompt)?;
        self.manage(|unpinned| PrefixCommand::Unpin { tokens, unpinned })
            .await
    }

    async fn manage<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> PrefixCommand,
    ) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.unless_lost(async {
            self.send(Command::Prefixes(command(reply))).await?;
            answer.await.map_err(|_| self.dropped())
        })
        .await
    }

    /// Gives memory back that is held for speed alone: sequences that are kept for requests that begin alike and not pinned,
    /// and what MLX keeps for its next arrays. What runs goes on.
    ///
    /// # Errors
    ///
    /// What the device says, and that the engine is not loaded.
    pub async fn clear_caches(&self) -> Result<(), EngineError> {
        self.maintain(Maintenance::ClearCaches).await
    }

    /// Makes a new stream on the device, after an error of it. What runs ends with
    /// [`WorkerLost`](EngineError::WorkerLost), what waits goes on, and what was kept of requests is given up, pinned or not:
    /// arrays of the old stream cannot be trusted.
    ///
    /// # Errors
    ///
    /// What the device says, and that the engine is not loaded.
    pub async fn rebuild_stream(&self) -> Result<(), EngineError> {
        self.maintain(Maintenance::RebuildStream).await
    }

    /// Schedules by another configuration from the next turn on; what runs goes on, and what waits stays.
    ///
    /// # Errors
    ///
    /// A value that is out of its range, and a field that only a load can change.
    pub async fn reconfigure(&self, config: EngineConfig) -> Result<(), EngineError> {
        config.validate()?;
        let loaded = EngineConfig {
            max_batch: config.max_batch,
            max_queue: config.max_queue,
            prefill_chunk: config.prefill_chunk,
            memory_limit: config.memory_limit,
            prefix_cache: PrefixCacheConfig {
                max_bytes: config.prefix_cache.max_bytes,
                ..self.config.prefix_cache.clone()
            },
            ..self.config.clone()
        };
        if config != loaded {
            let message =
                "only `max_batch`, `max_queue`, `prefill_chunk`, `memory_limit` and `prefix_cache.max_bytes`";
            return Err(ParamError::new(
                "config",
                "changed elsewhere",
                format_args!("a change of {message}"),
            )
            .into());
        }
        self.maintain(Maintenance::Reconfigure(Box::new(config))).await
    }

    async fn maintain(&self, what: Maintenance) -> Result<(), EngineError> {
        let (reply, done) = oneshot::channel();
        self.unless_lost(async {
            self.send(Command::Maintain { what, reply }).await?;
            done.await.map_err(|_| self.dropped())?
        })
        .await
    }

    /// Waits for the worker until it is given up.
    async fn unless_lost<T>(
        &self,
        work: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        let mut lost = self.lost.subscribe();
        let lost = async move {
            // It fails where the sender is gone, which is here.
            let _ = lost.wait_for(|lost| *lost).await;
        };
        match select(std::pin::pin!(work), std::pin::pin!(lost)).await {
            Either::Left((done, _)) => done,
            Either::Right(_) => Err(hung()),
        }
    }

    /// Hands a command over to the worker, which takes all that there are between two of its turns.
    async fn send(&self, command: Command) -> Result<(), EngineError> {
        let sender = {
            let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
            commands.as_ref().ok_or_else(|| self.not_loaded())?.clone()
        };
        sender.send(command).await.map_err(|_| self.not_loaded())
    }
}

impl LlmEngine for Engine {
    fn stream(
        &self,
        prompt: Prompt,
        mut params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        Box::pin(async move {
            params.validate()?;
            output::named_format(&params)?;
            let shown = self.encoder.shown(&prompt, &params);
            let text = self.encoder.text(&shown)?;
            let plan = output::plan(&self.encoder, &prompt, text.as_deref(), &params)?;
            let tokens = self.encoder.encode_text(&shown, text.as_deref())?;
            params.constraint = plan.constraint;
            let context_length = u64::from(self.model.context_length);
            if tokens.len() as u64 >= context_length {
                return Err(EngineError::PromptTooLong {
                    prompt_tokens: tokens.len() as u64,
                    context_length,
                });
            }
            let walk = params
                .constraint
                .as_ref()
                .map(|constraint| self.compiler.compile(constraint).map(Box::new))
                .transpose()?;
            let (events, receiver) = mpsc::unbounded_channel();
            let (taken, queued) = oneshot::channel();
            let request = Box::new(Request {
                tokens,
                params,
                walk,
                parser: plan.parser.map(Box::new),
                events,
                submitted: Instant::now(),
            });
            self.unless_lost(async {
                self.send(Command::Generate { request, taken }).await?;
                queued.await.map_err(|_| self.dropped())?
            })
            .await?;
            Ok(Events::new(receiver, self.lost.subscribe()).boxed())
        })
    }

    fn backend(&self) -> Option<Backend> {
        self.is_serving().then_some(self.identity.backend)
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        self.is_serving().then(|| Arc::clone(&self.model))
    }

    fn abandon(&self) {
        self.close(UnloadMode::Abort);
        drop(self.thread.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.lost.send_replace(true);
    }

    fn statistics(&self) -> Option<EngineStatistics> {
        let statistics = self.gauges.read(Instant::now());
        #[cfg(feature = "mlx")]
        let statistics = match self.identity.backend {
            Backend::Mlx => EngineStatistics {
                memory: crate::mlx::device_memory(),
                ..statistics
            },
            _ => statistics,
        };
        Some(statistics)
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(self.unload_with(UnloadMode::Abort))
    }
}
