//! An engine in a process of its own, behind the same trait.
//!
//! Whatever ends that process, an abort in a driver, the kernel's killer of processes or `kill -9`, costs the requests
//! that run there, and they get an error that may be retried ([`WorkerLost`](mlx_engine_core::EngineError::WorkerLost)). The
//! process is started again under a policy with limits, and requests that had not started are sent to the new one.
//!
//! The two halves are [`Supervised`], which is the engine that a program holds, and [`serve`], which the process runs
//! around the real engine. They speak over one Unix socket, whose other end the process finds as its standard input: frames of
//! a length and JSON, events in the order of their requests. The process ends when its socket does, and so with the program
//! however that ends.
//!
//! ```no_run
//! use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};
//! use mlx_engine_resilience::{Program, Supervised, SupervisorConfiguration};
//!
//! async fn ask() -> Result<String, EngineError> {
//!     // A program that calls `serve` when it is started with this argument.
//!     let program = Program::new("my-program").arg("engine");
//!     let setup = serde_json::json!({"model": "tiny"});
//!     let engine = Supervised::start(program, setup, SupervisorConfiguration::default(), None).await?;
//!     let output = engine.generate(Prompt::user("Why is the sky blue?"), GenerateParams::default()).await?;
//!     Ok(output.text)
//! }
//! ```

mod child;
mod configuration;
mod frame;
mod launch;
mod parent;
mod requests;
mod run;
mod shared;
mod status;
mod watch;

pub use child::{Service, connection, serve};
pub use configuration::SupervisorConfiguration;
pub use launch::{Launch, Process, Program};
pub use parent::Supervised;
pub use status::{ChildState, SupervisedStatus};
