//! Models on the Hugging Face hub, and in its cache on this machine.
//!
//! [`HubCache`] is what is here: it finds, lists, verifies and removes, and never asks a network. `Hub` (feature
//! `fetch`, on by default) searches the hub and fetches models into the cache. Both keep to the layout of Python's
//! `huggingface_hub`: what one of them fetched, the other finds.
//!
//! What comes from the hub is not trusted: names that would lead out of a folder are refused, counts and sizes are
//! bounded, and a file gets its name when its length and its hash are those that the hub promised.

pub mod env;
mod token;

mod hash;
mod names;

mod layout;
mod lock;

mod cache;

#[cfg(feature = "fetch")]
mod fetch;

mod error;

pub use cache::{
    CachedFile, CachedRepository, CachedRevision, FileState, Freed, HubCache, PruneReport, Verification,
    engine_reads,
};
pub use env::Environment;
pub use error::HubError;
#[cfg(feature = "fetch")]
pub use fetch::*;
pub use hash::BlobHash;
pub use names::{HubReference, RepoId, RepoPath, Revision};
pub use token::Token;
