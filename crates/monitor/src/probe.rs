//! The proof that an engine works: one token.

use std::fmt;

use futures::StreamExt;
use mlx_engine_core::{EngineError, GenerateParams, GenerationEvent, LlmEngine, Prompt};
use serde::{Deserialize, Serialize};

use crate::{ErrorClass, ErrorKind};

/// Why a probe did not pass.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "failure", rename_all = "snake_case")]
pub enum ProbeFailure {
    /// It ended in an error.
    Error {
        /// Of this kind.
        kind: ErrorKind,
    },
    /// It finished without a token.
    NoToken,
    /// The caller gave up waiting for it.
    Abandoned {
        /// After as many seconds.
        after_s: f64,
    },
}

impl ProbeFailure {
    /// Whether it shows that the engine is broken, rather than busy or waited for too briefly.
    pub fn is_fault(self) -> bool {
        match self {
            Self::Error { kind } => kind.class() == ErrorClass::Fault,
            Self::NoToken => true,
            Self::Abandoned { .. } => false,
        }
    }

    fn of(error: &EngineError) -> Self {
        Self::Error {
            kind: ErrorKind::of(error),
        }
    }
}

impl fmt::Display for ProbeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error { kind } => write!(f, "it ended in the error {kind}"),
            Self::NoToken => f.write_str("it finished without a token"),
            Self::Abandoned { after_s } => write!(f, "it was given up after {after_s:.1} s"),
        }
    }
}

/// Asks an engine for one token, as any other request would. It waits as long as the engine takes.
///
/// # Errors
///
/// Why no token came; never [`ProbeFailure::Abandoned`], which is for who stops waiting.
pub async fn probe(engine: &(impl LlmEngine + ?Sized)) -> Result<(), ProbeFailure> {
    let params = GenerateParams {
        max_tokens: 1,
        temperature: 0.0,
        ignore_eos: true,
        ..GenerateParams::default()
    };
    // Raw text: a template may refuse, and says nothing about the engine.
    let admitted = engine.stream(Prompt::text("Hello"), params).await;
    let mut events = admitted.map_err(|error| ProbeFailure::of(&error))?;
    let mut tokens = 0;
    while let Some(event) = events.next().await {
        match event.map_err(|error| ProbeFailure::of(&error))? {
            GenerationEvent::Finished(summary) if tokens > 0 || summary.usage.completion_tokens > 0 => {
                return Ok(());
            }
            GenerationEvent::Finished(_) => return Err(ProbeFailure::NoToken),
            event => tokens += event.tokens().len(),
        }
    }
    Err(ProbeFailure::Error {
        kind: ErrorKind::Incomplete,
    })
}
