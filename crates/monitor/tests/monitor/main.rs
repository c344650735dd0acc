//! Metrics and health of an engine that does what it is told, on a clock that stands still until it is moved.

mod support;

mod counts;
mod health;
mod prometheus;
