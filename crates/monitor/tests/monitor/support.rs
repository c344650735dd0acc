//! An engine that does what it is told, one poll at a time.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream;
use mlx_engine_core::{
    Backend, Device, EngineError, EngineStatistics, EventStream, FinishReason, GenerateParams,
    GenerateSummary, GenerationEvent, LlmEngine, ModelConfiguration, ModelType, Prompt, Timings, Usage,
};

/// What a poll of a stream gives.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Pending,
    Event(GenerationEvent),
    Fail(EngineError),
    /// The stream ends here, whatever it owes.
    Break,
    /// Nothing comes any more.
    Hang,
}

/// What becomes of one request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Script {
    /// Polls that the admission takes.
    pub(crate) admission: u32,
    pub(crate) refuse: Option<EngineError>,
    pub(crate) steps: Vec<Step>,
}

impl Script {
    pub(crate) fn refuse(error: EngineError) -> Self {
        Self {
            refuse: Some(error),
            ..Self::default()
        }
    }

    pub(crate) fn steps(steps: impl IntoIterator<Item = Step>) -> Self {
        Self {
            steps: steps.into_iter().collect(),
            ..Self::default()
        }
    }

    /// An answer of as many tokens at this rate.
    pub(crate) fn answer(tokens: u32, tokens_per_second: f64) -> Self {
        let mut summary = summary(FinishReason::Stop, tokens);
        summary.timings.generation_tps = tokens_per_second;
        Self::steps([
            Step::Event(started(4, 1)),
            Step::Event(text(tokens)),
            Step::Event(GenerationEvent::Finished(summary)),
        ])
    }
}

pub(crate) fn started(prompt_tokens: u32, cached_tokens: u32) -> GenerationEvent {
    GenerationEvent::Started {
        prompt_tokens,
        cached_tokens,
    }
}

pub(crate) fn text(tokens: u32) -> GenerationEvent {
    GenerationEvent::Text {
        text: "x".repeat(tokens as usize),
        tokens: (0..tokens).map(Into::into).collect(),
    }
}

pub(crate) fn summary(finish_reason: FinishReason, completion_tokens: u32) -> GenerateSummary {
    GenerateSummary {
        model: "tiny".to_owned(),
        backend: Backend::Mlx,
        device: Device::Cpu,
        finish_reason,
        usage: Usage {
            prompt_tokens: 4,
            completion_tokens,
            cached_tokens: 1,
        },
        timings: Timings::default(),
        peak_memory_bytes: 0,
        speculation: None,
    }
}

/// Follows one script a request, in the order of submission, and answers with a token once there is none left.
#[derive(Debug, Default)]
pub(crate) struct Scripted {
    scripts: Mutex<VecDeque<Script>>,
    loaded: Mutex<Option<(Backend, Arc<ModelConfiguration>)>>,
    pub(crate) statistics: Mutex<Option<EngineStatistics>>,
}

impl Scripted {
    pub(crate) fn new(backend: Backend) -> Self {
        let engine = Self::default();
        engine.load(backend);
        engine
    }

    pub(crate) fn load(&self, backend: Backend) {
        let model = Arc::new(ModelConfiguration::new("tiny", ModelType::Base));
        *self.loaded.lock().expect("not poisoned") = Some((backend, model));
    }

    pub(crate) fn next(&self, script: Script) {
        self.scripts.lock().expect("not poisoned").push_back(script);
    }
}

impl LlmEngine for Scripted {
    fn stream(&self, _: Prompt, _: GenerateParams) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        let script = self.scripts.lock().expect("not poisoned").pop_front();
        let mut script = script.unwrap_or_else(|| Script::answer(1, 0.0));
        Box::pin(async move {
            poll_fn(|cx: &mut Context<'_>| {
                if script.admission == 0 {
                    return Poll::Ready(());
                }
                script.admission -= 1;
                cx.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
            if let Some(error) = script.refuse {
                return Err(error);
            }
            let mut steps = VecDeque::from(script.steps);
            Ok(stream::poll_fn(move |cx| match steps.pop_front() {
                Some(Step::Pending) => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                Some(Step::Event(event)) => Poll::Ready(Some(Ok(event))),
                Some(Step::Fail(error)) => Poll::Ready(Some(Err(error))),
                Some(Step::Break) | None => Poll::Ready(None),
                Some(Step::Hang) => {
                    steps.push_front(Step::Hang);
                    Poll::Pending
                }
            })
            .boxed())
        })
    }

    fn statistics(&self) -> Option<EngineStatistics> {
        *self.statistics.lock().expect("not poisoned")
    }

    fn backend(&self) -> Option<Backend> {
        self.loaded
            .lock()
            .expect("not poisoned")
            .as_ref()
            .map(|(backend, _)| *backend)
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        let loaded = self.loaded.lock().expect("not poisoned");
        loaded.as_ref().map(|(_, model)| Arc::clone(model))
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        *self.loaded.lock().expect("not poisoned") = None;
        Box::pin(async { Ok(()) })
    }
}

/// A context whose waker does nothing.
pub(crate) fn idle() -> Context<'static> {
    Context::from_waker(Waker::noop())
}
