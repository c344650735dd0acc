//! Measuring on the engine that is loaded.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, try_join_all};
use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};
use mlx_engine_engine::EngineConfig;

use super::{Bench, Measured, OptimizeOptions};
use crate::served::Served;

/// The engine that is loaded, as what measures.
pub(crate) struct Live {
    engine: Served,
    options: OptimizeOptions,
    origin: Instant,
    cancelled: Arc<AtomicBool>,
    /// Measurements so far: no two have the same prompts, as one that was seen before is not computed again.
    round: u32,
}

impl Live {
    pub(crate) fn new(engine: Served, options: OptimizeOptions, cancelled: Arc<AtomicBool>) -> Self {
        Self {
            engine,
            options,
            origin: Instant::now(),
            cancelled,
            round: 0,
        }
    }

    async fn run(&mut self, config: &EngineConfig) -> Result<Measured, EngineError> {
        self.engine.prepare(config).await?;
        let requests = match self.options.goal {
            super::OptimizeGoal::Throughput => self.options.concurrency.max(1),
            _ => 1,
        };
        self.round += 1;
        let params = GenerateParams::default()
            .with_temperature(0.0)
            .with_max_tokens(self.options.answer_tokens.max(2))
            .with_ignore_eos(true);
        let began = Instant::now();
        let asked = (0..requests).map(|request| {
            let first = self.round * requests + request;
            let tokens = (0..self.options.prompt_tokens.max(1)).map(|i| 32 + (i * 7 + first * 13) % 200);
            self.engine.generate(Prompt::tokens(tokens), params.clone())
        });
        let outputs = try_join_all(asked).await?;
        let seconds = began.elapsed().as_secs_f64();
        let tokens: u64 = outputs.iter().map(|output| output.usage.total_tokens()).sum();
        let first_token: f64 = outputs.iter().map(|output| output.timings.ttft_s).sum();
        Ok(Measured {
            seconds,
            tokens_per_second: tokens as f64 / seconds.max(f64::MIN_POSITIVE),
            first_token_s: first_token / f64::from(requests),
            peak_memory_bytes: outputs
                .iter()
                .map(|output| output.peak_memory_bytes)
                .max()
                .unwrap_or_default(),
        })
    }
}

impl Bench for Live {
    fn measure<'a>(&'a mut self, config: &'a EngineConfig) -> BoxFuture<'a, Result<Measured, EngineError>> {
        Box::pin(self.run(config))
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
