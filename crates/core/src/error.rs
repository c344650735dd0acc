//! What can go wrong, in terms that a program can act on.

use std::error::Error;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{ErrorSource, ParamError};

/// Why a request or a load failed.
///
/// Messages are lowercase fragments that leave the source to [`Error::source`]; what the user can do about it is
/// [`hint`](Self::hint). Errors are cheap to clone, so that one load can answer everyone who waits for it. They can be
/// written and read, so that they cross the border of a process: sources are then the messages that they had.
///
/// ```
/// use std::time::Duration;
/// use mlx_engine_core::EngineError;
///
/// let error = EngineError::QueueFull { retry_after: Duration::from_secs(2) };
/// assert!(error.is_retryable());
/// assert_eq!(error.retry_after(), Some(Duration::from_secs(2)));
/// ```
#[derive(Clone, Debug, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum EngineError {
    /// A parameter is out of its range.
    #[error("invalid parameter: {0}")]
    InvalidParameter(ParamError),

    /// The prompt has nothing to continue.
    #[error("prompt is empty")]
    EmptyPrompt,

    /// The prompt leaves no room in the context.
    #[error("prompt of {prompt_tokens} tokens does not fit the context of {context_length}")]
    PromptTooLong {
        /// Tokens of the prompt, after the template.
        prompt_tokens: u64,
        /// Tokens that the context holds.
        context_length: u64,
    },

    /// No model answers to the name.
    #[error("model `{reference}` not found")]
    ModelNotFound {
        /// The name, alias, repository or path that was asked for.
        reference: String,
        /// What was perhaps meant, or where to look.
        hint: Option<String>,
    },

    /// A model was found and could not be loaded.
    #[error("model `{model}` could not be loaded")]
    ModelLoad {
        /// The id of the model.
        model: String,
        /// What went wrong.
        source: ErrorSource,
    },

    /// A model is known and its files could not be fetched.
    #[error("model `{model}` could not be fetched")]
    ModelFetch {
        /// The id of the model.
        model: String,
        /// What the user can do about it.
        hint: Option<String>,
        /// Whether a later try may succeed; it takes up what has come.
        retryable: bool,
        /// How long the hub wants to be left alone.
        retry_after: Option<Duration>,
        /// What went wrong.
        source: ErrorSource,
    },

    /// No architecture here runs the model.
    #[error("model type `{model_type}` is not supported")]
    UnsupportedModel {
        /// The `model_type` of the checkpoint.
        model_type: String,
        /// The types that are supported.
        supported: Vec<String>,
    },

    /// The tokenizer could not be built or could not encode.
    #[error("tokenizer failed: {message}")]
    Tokenizer {
        /// What went wrong.
        message: String,
        /// Why.
        source: Option<ErrorSource>,
    },

    /// The chat template does not compile or refuses the conversation.
    #[error("chat template failed: {message}")]
    Template {
        /// What went wrong.
        message: String,
        /// Why.
        source: Option<ErrorSource>,
    },

    /// What the answer should keep to cannot be enforced.
    #[error("output constraint refused: {message}")]
    Constraint {
        /// Why.
        message: String,
    },

    /// The engine that is asked cannot do this, however well it is.
    #[error("unsupported: {message}")]
    Unsupported {
        /// What cannot be done, and why.
        message: String,
        /// What to do in its place.
        hint: Option<String>,
    },

    /// MLX cannot run here.
    #[error("mlx is unavailable: {reason}")]
    MlxUnavailable {
        /// Why.
        reason: String,
    },

    /// The estimate says that it will not fit; nothing was allocated.
    #[error("{required} bytes of memory required, {available} available")]
    InsufficientMemory {
        /// Bytes that it takes.
        required: u64,
        /// Bytes that are there.
        available: u64,
    },

    /// The device refused an allocation in the middle of the work.
    #[error("device is out of memory")]
    OutOfMemory,

    /// As many requests wait as may.
    #[error("request queue is full, retry after {retry_after:?}")]
    QueueFull {
        /// When a place is likely to be free.
        retry_after: Duration,
    },

    /// The engine takes no requests for a while, to protect itself or to recover.
    #[error("engine is unavailable: {reason}, retry after {retry_after:?}")]
    Unavailable {
        /// Why.
        reason: String,
        /// When it is likely to take requests again.
        retry_after: Duration,
    },

    /// The model was unloaded.
    #[error("model `{model}` is not loaded")]
    NotLoaded {
        /// The id of the model.
        model: String,
    },

    /// The model is being loaded.
    #[error("model `{model}` is still loading")]
    LoadInProgress {
        /// The id of the model.
        model: String,
    },

    /// The caller cancelled the request before it began to answer.
    #[error("request was cancelled")]
    Cancelled,

    /// The time that the caller allowed is over.
    #[error("deadline of {limit:?} exceeded")]
    DeadlineExceeded {
        /// The time that was allowed.
        limit: Duration,
    },

    /// The worker thread panicked while it held the request.
    #[error("engine worker panicked: {message}")]
    WorkerPanicked {
        /// What the panic said.
        message: String,
    },

    /// The worker, a thread or a process, ended while it held the request.
    #[error("engine worker was lost: {message}")]
    WorkerLost {
        /// How it ended.
        message: String,
    },

    /// The device or its driver failed.
    #[error("device failed: {message}")]
    Device {
        /// What failed.
        message: String,
        /// Why.
        source: Option<ErrorSource>,
    },

    /// A promise inside the engine was broken.
    #[error("internal error: {message}")]
    Internal {
        /// Which one.
        message: String,
    },
}

impl EngineError {
    /// A [`ModelLoad`](Self::ModelLoad) error. The source may be an error or a message.
    pub fn model_load(model: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::ModelLoad {
            model: model.into(),
            source: ErrorSource::new(source),
        }
    }

    /// A [`Tokenizer`](Self::Tokenizer) error with its source.
    pub fn tokenizer(message: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Tokenizer {
            message: message.into(),
            source: Some(ErrorSource::new(source)),
        }
    }

    /// A [`Template`](Self::Template) error with its source.
    pub fn template(message: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Template {
            message: message.into(),
            source: Some(ErrorSource::new(source)),
        }
    }

    /// A [`Device`](Self::Device) error with its source.
    pub fn device(message: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Device {
            message: message.into(),
            source: Some(ErrorSource::new(source)),
        }
    }

    /// An [`Unsupported`](Self::Unsupported) error with nothing to do in its place.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::Unsupported {
            message: message.into(),
            hint: None,
        }
    }

    /// An [`Internal`](Self::Internal) error.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::Internal {
            message: message.into(),
        }
    }

    /// Whether the same request may succeed later, with nothing changed by the caller.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::OutOfMemory
            | Self::QueueFull { .. }
            | Self::Unavailable { .. }
            | Self::LoadInProgress { .. }
            | Self::WorkerPanicked { .. }
            | Self::WorkerLost { .. }
            | Self::Device { .. } => true,
            Self::ModelFetch { retryable, .. } => *retryable,
            Self::InvalidParameter(_)
            | Self::EmptyPrompt
            | Self::PromptTooLong { .. }
            | Self::ModelNotFound { .. }
            | Self::ModelLoad { .. }
            | Self::UnsupportedModel { .. }
            | Self::Tokenizer { .. }
            | Self::Template { .. }
            | Self::Constraint { .. }
            | Self::Unsupported { .. }
            | Self::MlxUnavailable { .. }
            | Self::InsufficientMemory { .. }
            | Self::NotLoaded { .. }
            | Self::Cancelled
            | Self::DeadlineExceeded { .. }
            | Self::Internal { .. } => false,
        }
    }

    /// How long to wait before trying again, where the engine can tell.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { retry_after } | Self::Unavailable { retry_after, .. } => Some(*retry_after),
            Self::ModelFetch { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::ModelNotFound { hint, .. }
            | Self::ModelFetch { hint, .. }
            | Self::Unsupported { hint, .. } => return hint.clone(),
            Self::UnsupportedModel { supported, .. } if !supported.is_empty() => {
                return Some(format!("supported model types: {}", supported.join(", ")));
            }
            Self::EmptyPrompt => "give at least one message, some text or one token",
            Self::PromptTooLong { .. } => {
                "shorten the prompt, drop the oldest messages, or choose a longer context"
            }
            Self::MlxUnavailable { .. } => {
                "run on Apple silicon or Linux with the feature `mlx`, or choose the mock"
            }
            Self::InsufficientMemory { .. } => {
                "choose a smaller model, fewer bits or a shorter context, or free memory"
            }
            Self::OutOfMemory => "lower the batch size, the context or the memory limit of the prefix cache",
            Self::NotLoaded { .. } => "load the model again",
            Self::WorkerPanicked { .. } | Self::WorkerLost { .. } => {
                "ask again; where it goes on failing, load the model again"
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

// The message of a `ParamError` is part of ours, so it is no source: a printed chain would say it twice.
impl From<ParamError> for EngineError {
    fn from(error: ParamError) -> Self {
        Self::InvalidParameter(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GenerateParams;

    /// One of each variant, with its message, whether it is retryable, and its hint.
    fn every_error() -> Vec<(EngineError, &'static str, bool, Option<&'static str>)> {
        let model = || "tiny".to_owned();
        let message = || "bad merge".to_owned();
        vec![
            (
                ParamError::new("top_p", 7, "0 to 1").into(),
                "invalid parameter: `top_p` is 7, allowed: 0 to 1",
                false,
                None,
            ),
            (
                EngineError::EmptyPrompt,
                "prompt is empty",
                false,
                Some("at least one message"),
            ),
            (
                EngineError::PromptTooLong {
                    prompt_tokens: 9000,
                    context_length: 8192,
                },
                "prompt of 9000 tokens does not fit the context of 8192",
                false,
                Some("shorten the prompt"),
            ),
            (
                EngineError::ModelNotFound {
                    reference: "qwen9".to_owned(),
                    hint: Some("did you mean qwen3?".into()),
                },
                "model `qwen9` not found",
                false,
                Some("did you mean qwen3?"),
            ),
            (
                EngineError::model_load("tiny", "no weights"),
                "model `tiny` could not be loaded",
                false,
                None,
            ),
            (
                EngineError::ModelFetch {
                    model: model(),
                    hint: Some("set HF_TOKEN".to_owned()),
                    retryable: false,
                    retry_after: None,
                    source: ErrorSource::new("status 403"),
                },
                "model `tiny` could not be fetched",
                false,
                Some("set HF_TOKEN"),
            ),
            (
                EngineError::UnsupportedModel {
                    model_type: "mamba9".to_owned(),
                    supported: vec!["llama".to_owned(), "qwen2".to_owned()],
                },
                "model type `mamba9` is not supported",
                false,
                Some("supported model types: llama, qwen2"),
            ),
            (
                EngineError::Tokenizer {
                    message: message(),
                    source: None,
                },
                "tokenizer failed: bad merge",
                false,
                None,
            ),
            (
                EngineError::template("line 3", "syntax"),
                "chat template failed: line 3",
                false,
                None,
            ),
            (
                EngineError::Unsupported {
                    message: "no handle".to_owned(),
                    hint: Some("ask the facade".to_owned()),
                },
                "unsupported: no handle",
                false,
                Some("ask the facade"),
            ),
            (
                EngineError::unsupported("no logits"),
                "unsupported: no logits",
                false,
                None,
            ),
            (
                EngineError::Constraint {
                    message: "`allOf` is unknown".to_owned(),
                },
                "output constraint refused: `allOf` is unknown",
                false,
                None,
            ),
            (
                EngineError::MlxUnavailable {
                    reason: "simulator".to_owned(),
                },
                "mlx is unavailable: simulator",
                false,
                Some("choose the mock"),
            ),
            (
                EngineError::InsufficientMemory {
                    required: 9,
                    available: 4,
                },
                "9 bytes of memory required, 4 available",
                false,
                Some("smaller model"),
            ),
            (
                EngineError::OutOfMemory,
                "device is out of memory",
                true,
                Some("batch size"),
            ),
            (
                EngineError::QueueFull {
                    retry_after: Duration::from_millis(1500),
                },
                "request queue is full, retry after 1.5s",
                true,
                None,
            ),
            (
                EngineError::Unavailable {
                    reason: "too many faults".to_owned(),
                    retry_after: Duration::from_secs(3),
                },
                "engine is unavailable: too many faults, retry after 3s",
                true,
                None,
            ),
            (
                EngineError::NotLoaded { model: model() },
                "model `tiny` is not loaded",
                false,
                Some("load the model again"),
            ),
            (
                EngineError::LoadInProgress { model: model() },
                "model `tiny` is still loading",
                true,
                None,
            ),
            (EngineError::Cancelled, "request was cancelled", false, None),
            (
                EngineError::DeadlineExceeded {
                    limit: Duration::from_secs(30),
                },
                "deadline of 30s exceeded",
                false,
                None,
            ),
            (
                EngineError::WorkerPanicked {
                    message: "index 3".to_owned(),
                },
                "engine worker panicked: index 3",
                true,
                Some("ask again"),
            ),
            (
                EngineError::WorkerLost {
                    message: "signal 9".to_owned(),
                },
                "engine worker was lost: signal 9",
                true,
                Some("ask again"),
            ),
            (
                EngineError::device("metal", "hang"),
                "device failed: metal",
                true,
                None,
            ),
            (
                EngineError::internal("no event"),
                "internal error: no event",
                false,
                None,
            ),
        ]
    }

    #[test]
    fn messages_retries_and_hints_read_as_written() {
        for (error, message, retryable, hint) in every_error() {
            assert_eq!(error.to_string(), message);
            assert_eq!(error.is_retryable(), retryable, "{error:?}");
            let given = error.hint();
            assert_eq!(given.is_some(), hint.is_some(), "{error:?}");
            assert!(
                given.unwrap_or_default().contains(hint.unwrap_or_default()),
                "{error:?}"
            );
        }
    }

    #[test]
    fn messages_are_lowercase_fragments() {
        for (error, ..) in every_error() {
            let message = error.to_string();
            assert!(
                !message.starts_with(char::is_uppercase) && !message.ends_with('.'),
                "{message}"
            );
        }
    }

    #[test]
    fn only_an_engine_that_takes_nothing_now_says_when() {
        for (error, ..) in every_error() {
            let full = matches!(
                error,
                EngineError::QueueFull { .. } | EngineError::Unavailable { .. }
            );
            assert_eq!(error.retry_after().is_some(), full, "{error:?}");
        }
    }

    #[test]
    fn the_source_survives_a_clone_and_can_be_downcast() {
        let io = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "truncated");
        let error = EngineError::model_load("tiny", io).clone();
        let source = error.source().unwrap();
        assert_eq!(source.to_string(), "truncated");
        let io = source.downcast_ref::<std::io::Error>().unwrap();
        assert_eq!(io.kind(), std::io::ErrorKind::UnexpectedEof);

        let error = EngineError::device("command buffer", "hang");
        assert_eq!(error.source().unwrap().to_string(), "hang");
        assert!(
            EngineError::Device {
                message: String::new(),
                source: None
            }
            .source()
            .is_none()
        );
    }

    #[test]
    fn every_error_is_read_as_it_was_written() {
        let chain = |error: &EngineError| {
            let first: &(dyn Error + 'static) = error;
            let all = std::iter::successors(Some(first), |error| (*error).source());
            all.map(ToString::to_string).collect::<Vec<_>>()
        };
        for (error, ..) in every_error() {
            let json = serde_json::to_string(&error).unwrap();
            let read: EngineError = serde_json::from_str(&json).unwrap();
            assert_eq!(chain(&read), chain(&error), "{json}");
            assert_eq!(
                std::mem::discriminant(&read),
                std::mem::discriminant(&error),
                "{json}"
            );
            assert_eq!(read.retry_after(), error.retry_after());
            assert_eq!(read.hint(), error.hint());
        }
        let deep = EngineError::model_load("tiny", EngineError::device("command buffer", "hang"));
        let read: EngineError = serde_json::from_value(serde_json::to_value(&deep).unwrap()).unwrap();
        assert_eq!(
            chain(&read),
            [
                "model `tiny` could not be loaded",
                "device failed: command buffer",
                "hang"
            ]
        );
    }

    #[test]
    fn a_refused_parameter_becomes_an_engine_error() {
        fn submit(params: &GenerateParams) -> Result<(), EngineError> {
            params.validate()?;
            Ok(())
        }
        let error = submit(&GenerateParams::default().with_temperature(9.0)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "invalid parameter: `temperature` is 9, allowed: 0 to 2"
        );
        assert!(error.source().is_none(), "the message already says it");
    }

    #[test]
    fn a_fetch_that_may_pass_says_when() {
        let after = Some(Duration::from_secs(7));
        let fetch = |retryable, retry_after| EngineError::ModelFetch {
            model: "tiny".to_owned(),
            hint: None,
            retryable,
            retry_after,
            source: ErrorSource::new("status 429"),
        };
        assert!(fetch(true, after).is_retryable() && !fetch(false, after).is_retryable());
        assert_eq!(
            (fetch(true, after).retry_after(), fetch(true, None).retry_after()),
            (after, None)
        );
        assert_eq!(fetch(true, None).hint(), None);
    }

    #[test]
    fn no_types_are_no_hint() {
        let error = EngineError::UnsupportedModel {
            model_type: "mamba9".to_owned(),
            supported: Vec::new(),
        };
        assert_eq!(error.hint(), None);
    }

    #[test]
    fn errors_cross_threads() {
        fn check<T: Clone + Send + Sync + 'static>() {}
        check::<EngineError>();
    }
}
