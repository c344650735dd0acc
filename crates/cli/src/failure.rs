//! How a command fails.

use std::error::Error;
use std::process::ExitCode;

use mlx_engine::EngineError;
use mlx_engine::hub::HubError;

use crate::output::errln;

/// Why a command failed, and the exit code that says so.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The engine's error, with its sources and its hint.
    Engine(EngineError),
    /// The hub's or its cache's error, with its sources and its hint.
    Hub(HubError),
    /// Something else that went wrong.
    Other(String),
    /// The command was called in a way that makes no sense.
    Usage(String),
    /// Ctrl-C.
    Interrupted,
    /// What went wrong has been told.
    Told,
    /// Nobody reads stdout any more, which is no failure.
    ReaderGone,
}

impl Failure {
    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self::Other(message.into())
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    /// Prints the failure to stderr and returns its exit code.
    pub(crate) fn report(self) -> ExitCode {
        match self {
            Self::Engine(error) => told(&error, error.hint()),
            Self::Interrupted | Self::Hub(HubError::Cancelled) => ExitCode::from(130),
            Self::Hub(error) => told(&error, error.hint()),
            Self::Other(message) => {
                errln!("error: {message}");
                ExitCode::from(1)
            }
            Self::Usage(message) => {
                errln!("error: {message}\n\nFor more information, try '--help'.");
                ExitCode::from(2)
            }
            Self::Told => ExitCode::from(1),
            Self::ReaderGone => ExitCode::SUCCESS,
        }
    }
}

/// Prints an error with its sources and its hint.
fn told(error: &dyn Error, hint: Option<String>) -> ExitCode {
    errln!("error: {error}");
    let mut source = error.source();
    while let Some(inner) = source {
        errln!("  caused by: {inner}");
        source = inner.source();
    }
    if let Some(hint) = hint {
        errln!("hint: {hint}");
    }
    ExitCode::from(1)
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Hub(error)
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}
