//! The trait that an engine implements, and that wrappers, servers and tests hold.

use std::pin::pin;
use std::sync::Arc;

use futures::future::BoxFuture;
use futures::stream::{BoxStream, Stream, StreamExt};

use crate::{
    Backend, EngineError, EngineStatistics, GenerateOutput, GenerateParams, GenerationEvent,
    ModelConfiguration, PartialOutput, Prompt,
};

/// The events of one request. Dropping it cancels the request.
pub type EventStream = BoxStream<'static, Result<GenerationEvent, EngineError>>;

/// An engine with one model loaded.
///
/// Metrics, retries and the like are wrappers over any `LlmEngine`; the trait is object safe, so that an
/// `Arc<dyn LlmEngine>` is one too.
/// [`generate`](Self::generate) is [`stream`](Self::stream) collected: an implementation writes the one way and has
/// both.
///
/// ```
/// use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};
///
/// async fn ask(engine: &dyn LlmEngine, question: &str) -> Result<String, EngineError> {
///     let output = engine.generate(Prompt::user(question), GenerateParams::default()).await?;
///     Ok(output.text)
/// }
/// ```
pub trait LlmEngine: Send + Sync {
    /// Submits a request. The future resolves when it is admitted; the stream then gives
    /// [`Started`](GenerationEvent::Started), the text as it comes, and [`Finished`](GenerationEvent::Finished), or
    /// an error as its last item. Dropping either cancels the request.
    ///
    /// # Errors
    ///
    /// What is wrong with the request itself, or why it cannot be taken now.
    fn stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>>;

    /// Runs a request to its end.
    ///
    /// # Errors
    ///
    /// Those of [`stream`](Self::stream), and the error that ended the stream.
    fn generate(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<GenerateOutput, EngineError>> {
        let events = self.stream(prompt, params);
        Box::pin(async move { collect_events(events.await?).await })
    }

    /// What computes the tokens, or `None` where no model is loaded.
    fn backend(&self) -> Option<Backend>;

    /// The model that is loaded, if one is.
    fn model(&self) -> Option<Arc<ModelConfiguration>>;

    /// Why this is not what was asked for, where a fallback is in use.
    fn fallback_reason(&self) -> Option<String> {
        None
    }

    /// Gives up what hangs and cannot be unloaded: whoever waits for it hears
    /// [`WorkerLost`](EngineError::WorkerLost), and its memory stays taken. An engine that does not know how leaves them
    /// waiting.
    fn abandon(&self) {}

    /// Whether it is in a process of its own, whose memory is not that of this one.
    fn is_apart(&self) -> bool {
        false
    }

    /// What it says of its inside; `None` where it says nothing. It is asked often and answers at once.
    fn statistics(&self) -> Option<EngineStatistics> {
        None
    }

    /// Ends what is running and gives the memory back. Requests after it are [`EngineError::NotLoaded`]; unloading
    /// twice is no error.
    ///
    /// # Errors
    ///
    /// Why the memory could not be given back.
    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>>;
}

impl<E: LlmEngine + ?Sized> LlmEngine for Arc<E> {
    fn stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        (**self).stream(prompt, params)
    }

    fn generate(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<GenerateOutput, EngineError>> {
        (**self).generate(prompt, params)
    }

    fn backend(&self) -> Option<Backend> {
        (**self).backend()
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        (**self).model()
    }

    fn fallback_reason(&self) -> Option<String> {
        (**self).fallback_reason()
    }

    fn abandon(&self) {
        (**self).abandon();
    }

    fn is_apart(&self) -> bool {
        (**self).is_apart()
    }

    fn statistics(&self) -> Option<EngineStatistics> {
        (**self).statistics()
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        (**self).unload()
    }
}

/// An engine around another one. What it does not do itself the inner one does, so that a wrapper says what it changes and nothing
/// else; it is an [`LlmEngine`] by that.
///
/// ```
/// use std::sync::atomic::{AtomicU64, Ordering};
/// use futures::future::BoxFuture;
/// use mlx_engine_core::{EngineError, EngineWrapper, EventStream, GenerateParams, LlmEngine, Prompt};
///
/// /// Counts what is asked.
/// struct Counted<E> {
///     engine: E,
///     asked: AtomicU64,
/// }
///
/// impl<E: LlmEngine> EngineWrapper for Counted<E> {
///     type Inner = E;
///
///     fn inner(&self) -> &E {
///         &self.engine
///     }
///
///     fn wrapped_stream(
///         &self,
///         prompt: Prompt,
///         params: GenerateParams,
///     ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
///         self.asked.fetch_add(1, Ordering::Relaxed);
///         self.engine.stream(prompt, params)
///     }
/// }
///
/// fn watched<E: LlmEngine + 'static>(engine: E) -> Box<dyn LlmEngine> {
///     Box::new(Counted { engine, asked: AtomicU64::new(0) })
/// }
/// ```
pub trait EngineWrapper: Send + Sync {
    /// What is in it.
    type Inner: LlmEngine + ?Sized;

    /// The engine in it.
    fn inner(&self) -> &Self::Inner;

    /// Its [`LlmEngine::stream`]; [`generate`](LlmEngine::generate) is this one collected.
    ///
    /// # Errors
    ///
    /// Those of [`LlmEngine::stream`].
    fn wrapped_stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        self.inner().stream(prompt, params)
    }

    /// Its [`LlmEngine::unload`].
    ///
    /// # Errors
    ///
    /// Those of [`LlmEngine::unload`].
    fn wrapped_unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        self.inner().unload()
    }
}

impl<W: EngineWrapper> LlmEngine for W {
    fn stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        self.wrapped_stream(prompt, params)
    }

    fn backend(&self) -> Option<Backend> {
        self.inner().backend()
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        self.inner().model()
    }

    fn fallback_reason(&self) -> Option<String> {
        self.inner().fallback_reason()
    }

    fn abandon(&self) {
        self.inner().abandon();
    }

    fn is_apart(&self) -> bool {
        self.inner().is_apart()
    }

    fn statistics(&self) -> Option<EngineStatistics> {
        self.inner().statistics()
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        self.wrapped_unload()
    }
}

/// Reads a stream to its [`Finished`](GenerationEvent::Finished) event and adds it up.
///
/// # Errors
///
/// The first error in the stream, or [`EngineError::Internal`] where it ends without one and without `Finished`.
///
/// ```
/// use mlx_engine_core::{EngineError, GenerationEvent, collect_events};
/// use futures::{executor::block_on, stream};
///
/// let started = GenerationEvent::Started { prompt_tokens: 3, cached_tokens: 0 };
/// let cut_off = stream::iter([Ok(started), Err(EngineError::internal("the cable was pulled"))]);
/// let error = block_on(collect_events(cut_off)).unwrap_err();
/// assert!(error.to_string().contains("the cable was pulled"));
/// ```
pub async fn collect_events<S>(events: S) -> Result<GenerateOutput, EngineError>
where
    S: Stream<Item = Result<GenerationEvent, EngineError>>,
{
    let mut events = pin!(events);
    let mut answer = PartialOutput::default();
    while let Some(event) = events.next().await {
        if let Some(summary) = answer.take(event?) {
            return Ok(answer.finish(summary));
        }
    }
    Err(EngineError::internal(
        "event stream ended without a finished event",
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use futures::executor::block_on;
    use futures::{FutureExt, stream};
    use proptest::prelude::*;

    use super::*;
    use crate::{Device, FinishReason, GenerateSummary, ModelType, Timings, Usage};

    fn started() -> GenerationEvent {
        GenerationEvent::Started {
            prompt_tokens: 1,
            cached_tokens: 0,
        }
    }

    fn text(text: &str, tokens: &[u32]) -> GenerationEvent {
        GenerationEvent::Text {
            text: text.to_owned(),
            tokens: tokens.iter().map(|&id| id.into()).collect(),
        }
    }

    fn finished(completion_tokens: u32) -> GenerationEvent {
        GenerationEvent::Finished(GenerateSummary {
            model: "tiny".to_owned(),
            backend: Backend::Mock,
            device: Device::Cpu,
            finish_reason: FinishReason::Length,
            usage: Usage {
                prompt_tokens: 1,
                completion_tokens,
                cached_tokens: 0,
            },
            timings: Timings::default(),
            peak_memory_bytes: 0,
            speculation: None,
        })
    }

    /// Says the prompt back, once, until it is unloaded.
    struct Echo {
        model: Arc<ModelConfiguration>,
        loaded: AtomicBool,
        abandoned: AtomicBool,
    }

    impl Echo {
        fn new() -> Self {
            Self {
                model: Arc::new(ModelConfiguration::new("tiny", ModelType::Base)),
                loaded: AtomicBool::new(true),
                abandoned: AtomicBool::new(false),
            }
        }
    }

    impl LlmEngine for Echo {
        fn stream(
            &self,
            prompt: Prompt,
            params: GenerateParams,
        ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
            Box::pin(async move {
                if !self.loaded.load(Ordering::Relaxed) {
                    return Err(EngineError::NotLoaded {
                        model: self.model.id.clone(),
                    });
                }
                params.validate()?;
                let Prompt::Text(said) = prompt else {
                    return Err(EngineError::EmptyPrompt);
                };
                Ok(stream::iter([started(), text(&said, &[1]), finished(1)].map(Ok)).boxed())
            })
        }

        fn backend(&self) -> Option<Backend> {
            Some(Backend::Mock)
        }

        fn model(&self) -> Option<Arc<ModelConfiguration>> {
            Some(Arc::clone(&self.model))
        }

        fn fallback_reason(&self) -> Option<String> {
            Some("told to".to_owned())
        }

        fn abandon(&self) {
            self.abandoned.store(true, Ordering::Relaxed);
        }

        fn statistics(&self) -> Option<EngineStatistics> {
            Some(EngineStatistics {
                turns: 7,
                ..EngineStatistics::default()
            })
        }

        fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
            self.loaded.store(false, Ordering::Relaxed);
            Box::pin(async { Ok(()) })
        }
    }

    #[test]
    fn generate_is_stream_collected_through_a_trait_object() {
        let engine: Arc<dyn LlmEngine> = Arc::new(Echo::new());
        let output = block_on(engine.generate(Prompt::text("hello"), GenerateParams::default())).unwrap();
        assert_eq!(
            (output.text.as_str(), output.tokens.as_slice()),
            ("hello", &[1][..])
        );
        assert_eq!(
            (output.backend, engine.backend()),
            (Backend::Mock, Some(Backend::Mock))
        );
        assert_eq!(engine.model().unwrap().id, "tiny");
    }

    #[test]
    fn a_shared_engine_says_what_the_engine_says() {
        /// Says something wherever an engine may stay silent.
        #[derive(Default)]
        struct Talkative(AtomicBool);

        impl LlmEngine for Talkative {
            fn stream(
                &self,
                _: Prompt,
                _: GenerateParams,
            ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
                Box::pin(async { Err(EngineError::EmptyPrompt) })
            }

            fn generate(
                &self,
                _: Prompt,
                _: GenerateParams,
            ) -> BoxFuture<'_, Result<GenerateOutput, EngineError>> {
                Box::pin(async { Err(EngineError::Cancelled) })
            }

            fn backend(&self) -> Option<Backend> {
                None
            }

            fn model(&self) -> Option<Arc<ModelConfiguration>> {
                None
            }

            fn fallback_reason(&self) -> Option<String> {
                Some("no MLX".to_owned())
            }

            fn abandon(&self) {
                self.0.store(true, Ordering::Relaxed);
            }

            fn is_apart(&self) -> bool {
                true
            }

            fn statistics(&self) -> Option<EngineStatistics> {
                Some(EngineStatistics {
                    turns: 7,
                    ..EngineStatistics::default()
                })
            }

            fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
                Box::pin(async { Err(EngineError::OutOfMemory) })
            }
        }

        let inner = Arc::new(Talkative::default());
        let engine: &dyn LlmEngine = &Arc::clone(&inner);
        assert_eq!(engine.fallback_reason().as_deref(), Some("no MLX"));
        assert_eq!(engine.statistics().map(|told| told.turns), Some(7));
        assert_eq!((engine.backend(), engine.model()), (None, None));
        assert!(engine.is_apart());
        engine.abandon();
        assert!(inner.0.load(Ordering::Relaxed));
        let prompt = || Prompt::text("hello");
        // Its own way of collecting is taken, not that of the trait.
        let generated = block_on(engine.generate(prompt(), GenerateParams::default()));
        assert!(matches!(generated, Err(EngineError::Cancelled)), "{generated:?}");
        let streamed = block_on(engine.stream(prompt(), GenerateParams::default()));
        assert!(matches!(streamed.err(), Some(EngineError::EmptyPrompt)));
        assert!(matches!(block_on(engine.unload()), Err(EngineError::OutOfMemory)));
        // Where an engine has nothing to say, it says nothing.
        let silent = Silent;
        silent.abandon();
        assert_eq!((silent.fallback_reason(), silent.statistics()), (None, None));
        assert!(!silent.is_apart());
    }

    /// Does what an engine has to, and nothing else.
    struct Silent;

    impl LlmEngine for Silent {
        fn stream(&self, _: Prompt, _: GenerateParams) -> BoxFuture<'_, Result<EventStream, EngineError>> {
            Box::pin(async { Err(EngineError::EmptyPrompt) })
        }

        fn backend(&self) -> Option<Backend> {
            None
        }

        fn model(&self) -> Option<Arc<ModelConfiguration>> {
            None
        }

        fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
            Box::pin(async { Ok(()) })
        }
    }

    #[test]
    fn a_refusal_reaches_the_caller_of_generate() {
        let engine = Echo::new();
        let ask = |params| block_on(engine.generate(Prompt::text("hello"), params)).map(|output| output.text);
        let error = ask(GenerateParams::default().with_top_p(2.0)).unwrap_err();
        assert!(matches!(error, EngineError::InvalidParameter(_)), "{error:?}");
        block_on(engine.unload()).unwrap();
        let error = ask(GenerateParams::default()).unwrap_err();
        assert!(matches!(error, EngineError::NotLoaded { .. }), "{error:?}");
    }

    struct Around(Echo);

    impl EngineWrapper for Around {
        type Inner = Echo;

        fn inner(&self) -> &Echo {
            &self.0
        }
    }

    #[test]
    fn a_wrapper_is_the_engine_in_it_where_it_says_nothing_else() {
        let engine = Arc::new(Around(Echo::new()));
        let ask = || block_on(engine.generate(Prompt::text("hello"), GenerateParams::default()));
        assert_eq!(ask().unwrap().text, "hello");
        assert_eq!(
            (engine.backend(), engine.model()),
            (engine.0.backend(), engine.0.model())
        );
        assert_eq!(engine.fallback_reason().as_deref(), Some("told to"));
        assert_eq!(engine.statistics().map(|inside| inside.turns), Some(7));
        engine.abandon();
        assert!(engine.0.abandoned.load(Ordering::Relaxed));
        block_on(engine.unload()).unwrap();
        assert!(matches!(ask(), Err(EngineError::NotLoaded { .. })));
    }

    #[test]
    fn an_error_in_the_stream_ends_it() {
        let events = stream::iter([Ok(started()), Err(EngineError::OutOfMemory), Ok(finished(0))]);
        assert!(matches!(
            block_on(collect_events(events)),
            Err(EngineError::OutOfMemory)
        ));
    }

    #[test]
    fn a_stream_cut_short_is_no_success() {
        let error = block_on(collect_events(stream::iter([
            Ok(started()),
            Ok(text("half", &[1])),
        ])))
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "internal error: event stream ended without a finished event"
        );
    }

    #[test]
    fn nothing_is_read_past_the_end() {
        let events = stream::iter([Ok(finished(0))]).chain(stream::pending());
        // Without a wait: what comes after would never come.
        let output = collect_events(events).now_or_never().expect("it is over");
        assert_eq!(output.unwrap().text, "");
    }

    proptest! {
        #[test]
        fn the_output_is_the_pieces_joined(
            pieces in prop::collection::vec((any::<String>(), prop::collection::vec(any::<u32>(), 0..4)), 0..8),
        ) {
            let ids: Vec<u32> = pieces.iter().flat_map(|(_, ids)| ids.clone()).collect();
            let whole: String = pieces.iter().map(|(piece, _)| piece.as_str()).collect();
            let middle = pieces.iter().map(|(piece, ids)| text(piece, ids));
            let events = std::iter::once(started()).chain(middle).chain([finished(ids.len() as u32)]).map(Ok);
            let output = block_on(collect_events(stream::iter(events))).unwrap();
            prop_assert_eq!(output.text, whole);
            prop_assert_eq!(output.tokens, ids);
        }
    }
}
