//! Measuring on the engine that is loaded.

use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, try_join_all};
use mlx_engine_core::{Device, EngineError, GenerateParams, LlmEngine, Prompt};
use mlx_engine_engine::EngineConfig;

use super::knobs::{Place, needs_load};
use super::{Bench, Measured, OptimizeOptions};
use crate::served::Served;
use crate::slot::Slot;

/// The engine that is loaded, as what measures.
pub(crate) struct Live {
    slot: Arc<Slot>,
    engine: Served,
    /// What it was loaded with; none where that failed.
    loaded: Option<EngineConfig>,
    options: OptimizeOptions,
    origin: Instant,
    cancelled: Arc<AtomicBool>,
    /// Measurements so far: no two have the same prompts, as one that was seen before is not computed again.
    round: u32,
}

impl Live {
    pub(crate) fn new(
        slot: Arc<Slot>,
        engine: Served,
        config: EngineConfig,
        options: OptimizeOptions,
        cancelled: Arc<AtomicBool>,
    ) -> Self {
        Self {
            slot,
            engine,
            loaded: Some(config),
            options,
            origin: Instant::now(),
            cancelled,
            round: 0,
        }
    }

    /// Has the engine work by this configuration, and forget what it has computed. What cannot be changed otherwise is changed by
    /// loading the model again.
    pub(crate) async fn apply(&mut self, config: &EngineConfig) -> Result<(), EngineError> {
        let loaded = self.loaded.take();
        if loaded.is_none_or(|loaded| needs_load(&loaded, config)) {
            self.slot.reload(config).await?;
            self.engine = self.slot.engine()?;
            // The first steps of a model that was loaded are slower than those that follow.
            let params = GenerateParams::default().with_max_tokens(2).with_ignore_eos(true);
            self.engine.generate(Prompt::tokens(32..64), params).await?;
        }
        self.loaded = Some(config.clone());
        self.engine.prepare(config).await
    }

    /// What the request of this number asks. No two begin alike, as what was seen before is not computed again.
    fn prompt(&self, number: u32) -> Prompt {
        match &self.options.sample {
            Some(text) => Prompt::user(format!("{number}. {text}")),
            None => Prompt::tokens(
                (0..self.options.prompt_tokens.max(1)).map(|i| 32 + (i * 7 + number * 13) % 200),
            ),
        }
    }

    async fn run(&mut self, config: &EngineConfig) -> Result<Measured, EngineError> {
        self.apply(config).await?;
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
            let prompt = self.prompt(self.round * requests + request);
            self.engine.generate(prompt, params.clone())
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

    fn place(&self) -> Place {
        Place {
            device: self.engine.device().unwrap_or(Device::Cpu),
            threads: std::thread::available_parallelism().map_or(1, NonZero::get),
        }
    }
}
