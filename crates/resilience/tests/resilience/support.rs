//! An engine that does one thing for each request.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{StreamExt, stream};
use mlx_engine_core::{
    Backend, Device, EngineError, EngineStatistics, EventStream, FinishReason, GenerateParams,
    GenerateSummary, GenerationEvent, LlmEngine, ModelConfiguration, ModelType, Prompt, Timings, Usage,
};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

/// What becomes of one request.
#[derive(Clone, Debug)]
pub(crate) enum Fate {
    Answer,
    Refuse(EngineError),
    /// It starts, and fails before its first token.
    FailFirst(EngineError),
    /// It fails after its first token.
    FailLater(EngineError),
    /// It starts after so long, and answers after so long again.
    Slow(Duration, Duration),
    /// It starts, and the engine hangs.
    Hang,
    /// It is in the queue of an engine that hangs.
    Queued,
    /// An engine that hangs does not hear of it.
    Unadmitted,
    /// It starts, and fails after so long.
    SlowFailure(Duration, EngineError),
}

/// Answers once its fates are used up, unless it is broken: then every request fails.
#[derive(Debug, Default)]
pub(crate) struct Fated {
    pub(crate) fates: Mutex<VecDeque<Fate>>,
    pub(crate) broken: bool,
    pub(crate) asked: AtomicU32,
    /// What was asked for last.
    pub(crate) params: Mutex<GenerateParams>,
    /// Since when a turn has run, where one does: from the first request that hangs on.
    pub(crate) turn: Mutex<Option<Instant>>,
    /// Since when it takes a turn a second, where it does.
    pub(crate) busy: Option<Instant>,
    /// Tells those that hang that nobody waits for the engine any more.
    pub(crate) given_up: watch::Sender<bool>,
}

impl Fated {
    pub(crate) fn new(fates: impl IntoIterator<Item = Fate>) -> Self {
        Self {
            fates: Mutex::new(fates.into_iter().collect()),
            ..Self::default()
        }
    }

    pub(crate) fn broken() -> Self {
        Self {
            broken: true,
            ..Self::default()
        }
    }

    pub(crate) fn asked(&self) -> u32 {
        self.asked.load(Ordering::Relaxed)
    }
}

async fn given_up_for_good(mut given_up: watch::Receiver<bool>) {
    let _ = given_up.wait_for(|given_up| *given_up).await;
}

fn lost() -> EngineError {
    EngineError::WorkerLost {
        message: "given up".to_owned(),
    }
}

pub(crate) fn device() -> EngineError {
    EngineError::device("x", "y")
}

fn token() -> GenerationEvent {
    GenerationEvent::Text {
        text: "x".to_owned(),
        tokens: vec![1.into()],
    }
}

fn finished() -> GenerationEvent {
    GenerationEvent::Finished(GenerateSummary {
        model: "tiny".to_owned(),
        backend: Backend::Mlx,
        device: Device::Cpu,
        finish_reason: FinishReason::Stop,
        usage: Usage::default(),
        timings: Timings::default(),
        peak_memory_bytes: 0,
        speculation: None,
    })
}

impl LlmEngine for Fated {
    fn stream(&self, _: Prompt, params: GenerateParams) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        *self.params.lock().expect("not poisoned") = params;
        let fate = self.fates.lock().expect("not poisoned").pop_front();
        let otherwise = if self.broken {
            Fate::Refuse(device())
        } else {
            Fate::Answer
        };
        let fate = fate.unwrap_or(otherwise);
        Box::pin(async move {
            let started = Ok(GenerationEvent::Started {
                prompt_tokens: 1,
                cached_tokens: 0,
            });
            let events = match fate {
                Fate::Refuse(error) => return Err(error),
                Fate::Answer => vec![started, Ok(token()), Ok(finished())],
                Fate::FailFirst(error) => vec![started, Err(error)],
                Fate::FailLater(error) => vec![started, Ok(token()), Err(error)],
                Fate::Slow(first, then) => {
                    let first = stream::once(async move {
                        sleep(first).await;
                        Ok(token())
                    });
                    let then = stream::once(async move {
                        sleep(then).await;
                        Ok(finished())
                    });
                    return Ok(stream::iter([started]).chain(first).chain(then).boxed());
                }
                Fate::SlowFailure(after, error) => {
                    let failure = stream::once(async move {
                        sleep(after).await;
                        Err(error)
                    });
                    return Ok(stream::iter([started]).chain(failure).boxed());
                }
                Fate::Hang => {
                    self.turn
                        .lock()
                        .expect("not poisoned")
                        .get_or_insert_with(Instant::now);
                    let given_up = self.given_up.subscribe();
                    let end = stream::once(async move {
                        given_up_for_good(given_up).await;
                        Err(lost())
                    });
                    return Ok(stream::iter([started]).chain(end).boxed());
                }
                Fate::Queued => {
                    let given_up = self.given_up.subscribe();
                    let end = stream::once(async move {
                        given_up_for_good(given_up).await;
                        Err(lost())
                    });
                    return Ok(end.boxed());
                }
                Fate::Unadmitted => {
                    given_up_for_good(self.given_up.subscribe()).await;
                    return Err(lost());
                }
            };
            Ok(stream::iter(events).boxed())
        })
    }

    fn backend(&self) -> Option<Backend> {
        Some(Backend::Mlx)
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        Some(Arc::new(ModelConfiguration::new("tiny", ModelType::Base)))
    }

    fn statistics(&self) -> Option<EngineStatistics> {
        let turn = *self.turn.lock().expect("not poisoned");
        Some(EngineStatistics {
            turn_s: turn.map(|since| since.elapsed().as_secs_f64()),
            turns: self.busy.map_or(0, |since| since.elapsed().as_secs()),
            ..EngineStatistics::default()
        })
    }

    fn abandon(&self) {
        self.given_up.send_replace(true);
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        let hangs = self.turn.lock().expect("not poisoned").is_some();
        Box::pin(async move {
            if hangs {
                std::future::pending::<()>().await;
            }
            Ok(())
        })
    }
}
