//! A model that is loaded.

mod lifetime;
mod loading;
mod maintenance;
mod scoring;

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc as blocking;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use futures::StreamExt;
use futures::future::{BoxFuture, Either, select};
use mlx_engine_core::{
    Backend, Device, EngineError, EngineStatistics, EventStream, GenerateParams, LlmEngine,
    ModelConfiguration, ParamError, Prompt,
};
use tokio::sync::{mpsc, oneshot, watch};

pub use self::lifetime::UnloadMode;
#[cfg(any(test, feature = "mlx"))]
pub(crate) use self::loading::Loaded;
#[cfg(test)]
pub(crate) use self::loading::load_mock;
pub use self::scoring::Score;
use crate::config::EngineConfig;
use crate::constraint::Compiler;
use crate::gauges::Gauges;
use crate::lost::{Events, hung};
use crate::request::Request;
use crate::worker::{Command, Identity};
use crate::{PromptEncoder, output};

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
    /// What it works by.
    config: Arc<Mutex<EngineConfig>>,
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

impl Engine {
    /// The model's tokenizer and template.
    pub fn encoder(&self) -> &PromptEncoder {
        &self.encoder
    }

    /// What the engine works by: what the model was loaded with, and what of it was changed since.
    pub fn config(&self) -> EngineConfig {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

    /// Refuses a bias for a token that there is not: it would do nothing.
    fn knows_biased(&self, params: &GenerateParams) -> Result<(), ParamError> {
        let tokenizer = self.encoder.tokenizer();
        let mut biased = params.logit_bias.keys();
        match biased.find(|&&token| tokenizer.id_to_token(token).is_none()) {
            None => Ok(()),
            Some(token) => Err(ParamError::new(
                "logit_bias",
                token,
                "tokens of the model's vocabulary",
            )),
        }
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
            self.knows_biased(&params)?;
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
            let walk = match &params.constraint {
                Some(constraint) => Some(Box::new(self.compiler.compile(constraint).await?)),
                None => None,
            };
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
        let statistics = EngineStatistics {
            load: self.identity.load,
            load_s: Some(self.identity.load_s),
            ..self.gauges.read(Instant::now())
        };
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
