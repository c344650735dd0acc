//! Faults on purpose, under a model of either kind: what the caller is told, what the neighbours get, and what comes after.

#[cfg(feature = "mlx")]
mod memory;
mod model;
mod neighbours;
mod plan;
mod recovery;
mod suite;
mod worker;

use std::sync::Arc;

use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};

use self::model::faulty;
use self::plan::{Fault, Plan, VICTIM};
use crate::engine::Engine;
use crate::{EngineConfig, MockScript};

/// Which model is under the faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mock,
    #[cfg(feature = "mlx")]
    Mlx,
}

const KINDS: &[Kind] = &[
    Kind::Mock,
    #[cfg(feature = "mlx")]
    Kind::Mlx,
];

async fn load(kind: Kind, plan: &Arc<Plan>, config: EngineConfig) -> Result<Engine, EngineError> {
    let plan = Arc::clone(plan);
    match kind {
        Kind::Mock => {
            let kept = config.clone();
            Engine::load(config, None, move |given_up, _| {
                Ok(faulty(
                    crate::engine::load_mock(
                        "faulty".to_owned(),
                        MockScript::default().with_batch_limit(8),
                        &kept,
                        given_up,
                    )?,
                    plan,
                ))
            })
            .await
        }
        #[cfg(feature = "mlx")]
        Kind::Mlx => {
            let path =
                std::env::var("MLX_ENGINE_TEST_MODEL").expect("the tests are run by `cargo xtask test`");
            Engine::load(config, None, move |cancelled, progress| {
                let compute = mlx_engine_models::Compute::Fastest;
                let config = EngineConfig::default();
                let loaded =
                    crate::mlx::load(path.as_ref(), None, compute.into(), &config, cancelled, progress)?;
                Ok(faulty(loaded, plan))
            })
            .await
        }
    }
}

fn greedy() -> GenerateParams {
    GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(12)
}

fn victim() -> GenerateParams {
    greedy().with_seed(VICTIM)
}

fn prompt() -> Prompt {
    // Two chunks of a prompt, so that one of them is not the last.
    Prompt::text("Once upon a time there was a small town by the sea, and in that town there lived ")
}

fn config() -> EngineConfig {
    EngineConfig {
        prefill_chunk: Some(8),
        ..EngineConfig::default()
    }
}

async fn tokens(engine: &impl LlmEngine, text: &str) -> Vec<u32> {
    engine
        .generate(Prompt::text(text), greedy())
        .await
        .expect("an answer")
        .tokens
}

fn is(error: &EngineError, fault: Fault) -> bool {
    match fault {
        Fault::Device | Fault::Hang => matches!(error, EngineError::Device { .. }),
        Fault::OutOfMemory => matches!(error, EngineError::OutOfMemory),
        Fault::Pause => false,
        Fault::Panic => {
            matches!(error, EngineError::WorkerPanicked { message } if message == "told to panic")
        }
        #[cfg(feature = "mlx")]
        Fault::HostOp | Fault::HostOpPanic | Fault::HostOpHang => {
            matches!(error, EngineError::Device { source: Some(source), .. } if source.to_string().contains("told to"))
        }
    }
}

fn faults(kind: Kind) -> Vec<Fault> {
    let common = [Fault::Device, Fault::OutOfMemory, Fault::Panic];
    match kind {
        Kind::Mock => common.to_vec(),
        #[cfg(feature = "mlx")]
        Kind::Mlx => [&common[..], &[Fault::HostOp, Fault::HostOpPanic]].concat(),
    }
}
