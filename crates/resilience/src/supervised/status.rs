//! What the engine's process does, for those who ask and those who wait.

use mlx_engine_core::EngineError;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// What the engine's process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChildState {
    /// It loads the model.
    Starting,
    /// It serves.
    Ready,
    /// It has ended and will be started again in a while.
    Waiting,
    /// It has ended too often, and is not started again by itself.
    GivenUp,
    /// The engine was unloaded.
    Unloaded,
}

/// How the engine's process is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupervisedStatus {
    /// What it does.
    pub state: ChildState,
    /// The process that runs, where one does.
    pub process_id: Option<u32>,
    /// How often it was started again.
    pub restarts: u64,
    /// How the last one ended that was not meant to.
    pub last_end: Option<String>,
}

/// What those who wait for a start look at.
#[derive(Clone, Debug)]
pub(super) struct Stage {
    /// Which start it is about.
    pub(super) start: u64,
    pub(super) state: ChildState,
    /// Why it was given up.
    pub(super) error: Option<EngineError>,
}

/// Waits until a start, or one after it, has come to something.
pub(super) async fn outcome(stage: &mut watch::Receiver<Stage>, start: u64) -> Result<(), EngineError> {
    let settled = |stage: &Stage| {
        let given_up = matches!(stage.state, ChildState::GivenUp | ChildState::Unloaded);
        stage.start >= start && (given_up || stage.state == ChildState::Ready)
            || stage.state == ChildState::Unloaded
    };
    let stage = stage.wait_for(settled).await.map_err(|_| gone())?;
    match (&stage.error, stage.state) {
        (_, ChildState::Ready) => Ok(()),
        (Some(error), _) => Err(error.clone()),
        (None, _) => Err(gone()),
    }
}

pub(super) fn gone() -> EngineError {
    EngineError::internal("the supervisor has gone")
}

pub(super) fn lost(how: &str) -> EngineError {
    EngineError::WorkerLost {
        message: format!("its process ended: {how}"),
    }
}
