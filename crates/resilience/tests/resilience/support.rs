//! An engine that does one thing for each request.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{StreamExt, stream};
use mlx_engine_core::{
    Backend, Device, EngineError, EventStream, FinishReason, GenerateParams, GenerateSummary,
    GenerationEvent, LlmEngine, ModelConfiguration, ModelType, Prompt, Timings, Usage,
};
use tokio::time::sleep;

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
    Hang,
    /// It starts, and fails after so long.
    SlowFailure(Duration, EngineError),
}

/// Answers once its fates are used up, unless it is broken: then every request fails.
#[derive(Debug, Default)]
pub(crate) struct Fated {
    pub(crate) fates: Mutex<VecDeque<Fate>>,
    pub(crate) broken: bool,
    pub(crate) asked: AtomicU32,
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
    fn stream(&self, _: Prompt, _: GenerateParams) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
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
                Fate::Hang => return Ok(stream::iter([started]).chain(stream::pending()).boxed()),
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

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async { Ok(()) })
    }
}
