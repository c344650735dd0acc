//! An engine in a process of its own, behind the same trait.

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
