//! An engine that fails as it is told, on a clock that is moved and never waited for.

#[cfg(unix)]
mod supervised;
mod support;

mod hang;
mod recovery;
mod retry;
