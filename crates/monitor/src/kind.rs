//! Errors by kind: what can be counted and labelled.

use std::fmt;

use mlx_engine_core::EngineError;
use serde::{Deserialize, Serialize};

/// What went wrong with a request, taken from the type of its error and never from its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// [`EngineError::InvalidParameter`].
    InvalidParameter,
    /// [`EngineError::EmptyPrompt`].
    EmptyPrompt,
    /// [`EngineError::PromptTooLong`].
    PromptTooLong,
    /// [`EngineError::ModelNotFound`].
    ModelNotFound,
    /// [`EngineError::ModelFetch`].
    ModelFetch,
    /// [`EngineError::ModelLoad`].
    ModelLoad,
    /// [`EngineError::UnsupportedModel`].
    UnsupportedModel,
    /// [`EngineError::Tokenizer`].
    Tokenizer,
    /// [`EngineError::Template`].
    Template,
    /// [`EngineError::Constraint`].
    Constraint,
    /// [`EngineError::Unsupported`].
    Unsupported,
    /// [`EngineError::MlxUnavailable`].
    MlxUnavailable,
    /// [`EngineError::InsufficientMemory`].
    InsufficientMemory,
    /// [`EngineError::OutOfMemory`].
    OutOfMemory,
    /// [`EngineError::QueueFull`].
    QueueFull,
    /// [`EngineError::Unavailable`].
    Unavailable,
    /// [`EngineError::NotLoaded`].
    NotLoaded,
    /// [`EngineError::LoadInProgress`].
    LoadInProgress,
    /// [`EngineError::Cancelled`].
    Cancelled,
    /// [`EngineError::DeadlineExceeded`].
    DeadlineExceeded,
    /// [`EngineError::WorkerPanicked`].
    WorkerPanicked,
    /// [`EngineError::WorkerLost`].
    WorkerLost,
    /// [`EngineError::Device`].
    Device,
    /// [`EngineError::Internal`].
    Internal,
    /// The stream ended with neither `Finished` nor an error, which breaks the engine's promise.
    Incomplete,
    /// An error that this version does not know.
    Other,
}

/// Whose concern an error is, which decides what it says about the engine's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorClass {
    /// The caller's: the request cannot be served by any engine in this state, however well it is.
    Caller,
    /// The engine works and has no room or no time for the request.
    Capacity,
    /// The engine should have served the request and did not.
    Fault,
}

impl ErrorKind {
    /// The kind of an error.
    pub fn of(error: &EngineError) -> Self {
        match error {
            EngineError::InvalidParameter(_) => Self::InvalidParameter,
            EngineError::EmptyPrompt => Self::EmptyPrompt,
            EngineError::PromptTooLong { .. } => Self::PromptTooLong,
            EngineError::ModelNotFound { .. } => Self::ModelNotFound,
            EngineError::ModelFetch { .. } => Self::ModelFetch,
            EngineError::ModelLoad { .. } => Self::ModelLoad,
            EngineError::UnsupportedModel { .. } => Self::UnsupportedModel,
            EngineError::Tokenizer { .. } => Self::Tokenizer,
            EngineError::Template { .. } => Self::Template,
            EngineError::Constraint { .. } => Self::Constraint,
            EngineError::Unsupported { .. } => Self::Unsupported,
            EngineError::MlxUnavailable { .. } => Self::MlxUnavailable,
            EngineError::InsufficientMemory { .. } => Self::InsufficientMemory,
            EngineError::OutOfMemory => Self::OutOfMemory,
            EngineError::QueueFull { .. } => Self::QueueFull,
            EngineError::Unavailable { .. } => Self::Unavailable,
            EngineError::NotLoaded { .. } => Self::NotLoaded,
            EngineError::LoadInProgress { .. } => Self::LoadInProgress,
            EngineError::Cancelled => Self::Cancelled,
            EngineError::DeadlineExceeded { .. } => Self::DeadlineExceeded,
            EngineError::WorkerPanicked { .. } => Self::WorkerPanicked,
            EngineError::WorkerLost { .. } => Self::WorkerLost,
            EngineError::Device { .. } => Self::Device,
            EngineError::Internal { .. } => Self::Internal,
            _ => Self::Other,
        }
    }

    /// Whose concern it is.
    ///
    /// `NotLoaded` is a fault: an engine whose worker died answers so while it still names a model. A request that
    /// misses its deadline or does not fit the memory says that there was too little of either, not that the engine
    /// is broken.
    pub fn class(self) -> ErrorClass {
        match self {
            Self::InvalidParameter
            | Self::EmptyPrompt
            | Self::PromptTooLong
            | Self::ModelNotFound
            | Self::Template
            | Self::Constraint
            | Self::Unsupported
            | Self::Cancelled => ErrorClass::Caller,
            Self::InsufficientMemory
            | Self::QueueFull
            | Self::Unavailable
            | Self::LoadInProgress
            | Self::DeadlineExceeded => ErrorClass::Capacity,
            Self::ModelFetch
            | Self::ModelLoad
            | Self::UnsupportedModel
            | Self::Tokenizer
            | Self::MlxUnavailable
            | Self::OutOfMemory
            | Self::NotLoaded
            | Self::WorkerPanicked
            | Self::WorkerLost
            | Self::Device
            | Self::Internal
            | Self::Incomplete
            | Self::Other => ErrorClass::Fault,
        }
    }

    /// Its name, as it is serialised and as labels of metrics spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidParameter => "invalid_parameter",
            Self::EmptyPrompt => "empty_prompt",
            Self::PromptTooLong => "prompt_too_long",
            Self::ModelNotFound => "model_not_found",
            Self::ModelFetch => "model_fetch",
            Self::ModelLoad => "model_load",
            Self::UnsupportedModel => "unsupported_model",
            Self::Tokenizer => "tokenizer",
            Self::Template => "template",
            Self::Constraint => "constraint",
            Self::Unsupported => "unsupported",
            Self::MlxUnavailable => "mlx_unavailable",
            Self::InsufficientMemory => "insufficient_memory",
            Self::OutOfMemory => "out_of_memory",
            Self::QueueFull => "queue_full",
            Self::Unavailable => "unavailable",
            Self::NotLoaded => "not_loaded",
            Self::LoadInProgress => "load_in_progress",
            Self::Cancelled => "cancelled",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::WorkerPanicked => "worker_panicked",
            Self::WorkerLost => "worker_lost",
            Self::Device => "device",
            Self::Internal => "internal",
            Self::Incomplete => "incomplete",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mlx_engine_core::ParamError;

    use super::*;

    #[test]
    fn a_kind_is_written_as_it_is_displayed() {
        let check = |error: EngineError, name: &str, class: ErrorClass| {
            let kind = ErrorKind::of(&error);
            assert_eq!((kind.as_str(), kind.class()), (name, class));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.to_string());
            assert_eq!(serde_json::from_value::<ErrorKind>(name.into()).unwrap(), kind);
        };
        let text = || "x".to_owned();
        let limit = Duration::from_secs(1);
        let (caller, capacity, fault) = (ErrorClass::Caller, ErrorClass::Capacity, ErrorClass::Fault);
        check(
            ParamError::new("top_p", 7, "0 to 1").into(),
            "invalid_parameter",
            caller,
        );
        check(EngineError::EmptyPrompt, "empty_prompt", caller);
        let long = EngineError::PromptTooLong {
            prompt_tokens: 9,
            context_length: 8,
        };
        check(long, "prompt_too_long", caller);
        let unknown = EngineError::ModelNotFound {
            reference: text(),
            hint: None,
        };
        check(unknown, "model_not_found", caller);
        check(EngineError::model_load("x", "x"), "model_load", fault);
        let unsupported = EngineError::UnsupportedModel {
            model_type: text(),
            supported: Vec::new(),
        };
        check(unsupported, "unsupported_model", fault);
        check(EngineError::tokenizer("x", "x"), "tokenizer", fault);
        check(EngineError::template("x", "x"), "template", caller);
        check(EngineError::Constraint { message: text() }, "constraint", caller);
        let fetch = EngineError::ModelFetch {
            model: text(),
            hint: None,
            retryable: true,
            retry_after: None,
            source: mlx_engine_core::ErrorSource::new("x"),
        };
        check(fetch, "model_fetch", fault);
        check(EngineError::unsupported("x"), "unsupported", caller);
        check(
            EngineError::MlxUnavailable { reason: text() },
            "mlx_unavailable",
            fault,
        );
        let short = EngineError::InsufficientMemory {
            required: 2,
            available: 1,
        };
        check(short, "insufficient_memory", capacity);
        check(EngineError::OutOfMemory, "out_of_memory", fault);
        check(
            EngineError::QueueFull { retry_after: limit },
            "queue_full",
            capacity,
        );
        let closed = EngineError::Unavailable {
            reason: text(),
            retry_after: limit,
        };
        check(closed, "unavailable", capacity);
        check(EngineError::NotLoaded { model: text() }, "not_loaded", fault);
        check(
            EngineError::LoadInProgress { model: text() },
            "load_in_progress",
            capacity,
        );
        check(EngineError::Cancelled, "cancelled", caller);
        check(
            EngineError::DeadlineExceeded { limit },
            "deadline_exceeded",
            capacity,
        );
        check(
            EngineError::WorkerPanicked { message: text() },
            "worker_panicked",
            fault,
        );
        check(EngineError::WorkerLost { message: text() }, "worker_lost", fault);
        check(EngineError::device("x", "x"), "device", fault);
        check(EngineError::internal("x"), "internal", fault);
        for kind in [ErrorKind::Incomplete, ErrorKind::Other] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
            assert_eq!(kind.class(), fault);
        }
    }
}
