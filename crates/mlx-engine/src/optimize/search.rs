//! The search: one knob after the other, and a comparison in turn at the end. It knows neither engine nor clock.

use std::time::Duration;

use futures::future::BoxFuture;
use mlx_engine_core::EngineError;
use mlx_engine_engine::EngineConfig;

use super::knobs::{KNOBS, Place};
use super::{Measured, OptimizeGoal, OptimizeOptions, OptimizeOutcome, OptimizeReport, Trial};

/// What measures a configuration.
pub(crate) trait Bench: Send {
    /// Measures one.
    ///
    /// # Errors
    ///
    /// Why it cannot be measured.
    fn measure<'a>(&'a mut self, config: &'a EngineConfig) -> BoxFuture<'a, Result<Measured, EngineError>>;

    /// The time, from any origin.
    fn now(&self) -> Duration;

    /// Whether nobody waits for the result any more.
    fn cancelled(&self) -> bool;

    /// Where it is measured.
    fn place(&self) -> Place;
}

/// What is better by less than this part is noise.
const MARGIN: f64 = 0.02;

/// Rounds in which the old and the new configuration are measured in turn.
const ROUNDS: u32 = 3;

/// How much longer a request may take for the sake of memory.
const SLOWER: f64 = 0.1;

/// Finds the configuration to keep. The engine is left with whichever was measured last: the caller applies the one of the
/// report.
///
/// # Errors
///
/// [`EngineError::Cancelled`], and why the configuration that the engine has cannot be measured.
pub(crate) async fn search(
    bench: &mut dyn Bench,
    config: &EngineConfig,
    options: &OptimizeOptions,
) -> Result<OptimizeReport, EngineError> {
    let began = bench.now();
    let ends = began.saturating_add(options.time_limit());
    let mut timer = Timer {
        ends,
        longest: Duration::ZERO,
    };
    // The first one warms up.
    timer.measure(bench, config).await?;
    let first = timer.measure(bench, config).await?;
    let mut best = (config.clone(), first);
    let mut trials = Vec::new();
    let mut skipped = 0;
    for knob in KNOBS.iter().filter(|knob| knob.goals.contains(&options.goal)) {
        let from = best.0.clone();
        for value in (knob.values)(&bench.place(), options) {
            let Some(candidate) = knob.turned(&from, &value) else {
                continue;
            };
            // The comparison at the end is worth more than another try.
            if !timer.has(bench, 1 + 2 * ROUNDS) {
                skipped += 1;
                continue;
            }
            let mut trial = Trial {
                knob: knob.name.to_owned(),
                value,
                measured: None,
                error: None,
                gain: 0.0,
                kept: false,
            };
            match timer.measure(bench, &candidate).await {
                Ok(measured) => {
                    trial.measured = Some(measured);
                    trial.gain = gain(options.goal, &best.1, &measured);
                    trial.kept = trial.gain > MARGIN && bearable(options.goal, &first, &measured);
                    if trial.kept {
                        best = (candidate, measured);
                    }
                }
                Err(EngineError::Cancelled) => return Err(EngineError::Cancelled),
                Err(error) => trial.error = Some(error.to_string()),
            }
            trials.push(trial);
        }
    }
    let mut report = OptimizeReport {
        goal: options.goal,
        outcome: OptimizeOutcome::NoGain,
        config: config.clone(),
        before: first,
        after: first,
        gain: 0.0,
        trials,
        skipped,
        took_s: 0.0,
    };
    if best.0 != *config {
        compare(bench, &mut timer, (config, &best.0), options.goal, &mut report).await?;
    } else if skipped > 0 && report.trials.is_empty() {
        report.outcome = OptimizeOutcome::OutOfTime;
    }
    report.took_s = bench.now().saturating_sub(began).as_secs_f64();
    Ok(report)
}

/// Measures both in turn, and takes the new one where it is better.
async fn compare(
    bench: &mut dyn Bench,
    timer: &mut Timer,
    (old, new): (&EngineConfig, &EngineConfig),
    goal: OptimizeGoal,
    report: &mut OptimizeReport,
) -> Result<(), EngineError> {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        if !timer.has(bench, 2) {
            report.outcome = OptimizeOutcome::OutOfTime;
            return Ok(());
        }
        before.push(timer.measure(bench, old).await?);
        match timer.measure(bench, new).await {
            Ok(measured) => after.push(measured),
            Err(EngineError::Cancelled) => return Err(EngineError::Cancelled),
            Err(_) => {
                report.outcome = OptimizeOutcome::NotConfirmed;
                return Ok(());
            }
        }
    }
    report.before = median(&before);
    let measured = median(&after);
    let gain = gain(goal, &report.before, &measured);
    if gain > MARGIN / 2.0 && bearable(goal, &report.before, &measured) {
        report.outcome = OptimizeOutcome::Improved;
        report.config = new.clone();
        report.after = measured;
        report.gain = gain;
    } else {
        report.outcome = OptimizeOutcome::NotConfirmed;
        report.after = report.before;
    }
    Ok(())
}

/// Keeps to the time.
struct Timer {
    ends: Duration,
    /// What a measurement took at most.
    longest: Duration,
}

impl Timer {
    /// Whether there is time for so many more.
    fn has(&self, bench: &dyn Bench, measurements: u32) -> bool {
        bench
            .now()
            .saturating_add(self.longest.saturating_mul(measurements))
            <= self.ends
    }

    async fn measure(
        &mut self,
        bench: &mut dyn Bench,
        config: &EngineConfig,
    ) -> Result<Measured, EngineError> {
        if bench.cancelled() {
            return Err(EngineError::Cancelled);
        }
        let began = bench.now();
        let measured = bench.measure(config).await;
        self.longest = self.longest.max(bench.now().saturating_sub(began));
        measured
    }
}

/// What a goal wants little of.
fn cost(goal: OptimizeGoal, measured: &Measured) -> f64 {
    match goal {
        OptimizeGoal::Latency | OptimizeGoal::Throughput => measured.seconds,
        OptimizeGoal::Memory => measured.peak_memory_bytes as f64,
    }
}

/// How much less the second costs, as a part of the first.
fn gain(goal: OptimizeGoal, before: &Measured, after: &Measured) -> f64 {
    let (before, after) = (cost(goal, before), cost(goal, after));
    if before > 0.0 {
        (before - after) / before
    } else {
        0.0
    }
}

/// Whether what it costs beside the goal can be borne.
fn bearable(goal: OptimizeGoal, before: &Measured, after: &Measured) -> bool {
    goal != OptimizeGoal::Memory || after.seconds <= before.seconds * (1.0 + SLOWER)
}

/// The middle of each figure.
fn median(measured: &[Measured]) -> Measured {
    let middle = |figure: fn(&Measured) -> f64| {
        let mut figures: Vec<f64> = measured.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied().unwrap_or_default()
    };
    Measured {
        seconds: middle(|it| it.seconds),
        tokens_per_second: middle(|it| it.tokens_per_second),
        first_token_s: middle(|it| it.first_token_s),
        peak_memory_bytes: middle(|it| it.peak_memory_bytes as f64) as u64,
    }
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use proptest::prelude::*;

    use super::*;

    /// What a configuration takes, and a clock that moves by it.
    struct Fake<F> {
        takes: F,
        now: Duration,
        asked: u32,
        gives_up_after: u32,
    }

    impl<F: FnMut(&EngineConfig, u32) -> Result<Measured, EngineError> + Send> Bench for Fake<F> {
        fn measure<'a>(
            &'a mut self,
            config: &'a EngineConfig,
        ) -> BoxFuture<'a, Result<Measured, EngineError>> {
            let measured = (self.takes)(config, self.asked);
            self.asked += 1;
            let seconds = measured.as_ref().map_or(1.0, |measured| measured.seconds);
            self.now += Duration::from_secs_f64(seconds);
            Box::pin(async move { measured })
        }

        fn now(&self) -> Duration {
            self.now
        }

        fn cancelled(&self) -> bool {
            self.asked >= self.gives_up_after
        }

        fn place(&self) -> Place {
            Place {
                device: mlx_engine_core::Device::Cpu,
                threads: 4,
            }
        }
    }

    fn fake<F: FnMut(&EngineConfig, u32) -> Result<Measured, EngineError> + Send>(takes: F) -> Fake<F> {
        Fake {
            takes,
            now: Duration::from_secs(7),
            asked: 0,
            gives_up_after: u32::MAX,
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "it stands where a measurement may fail")]
    fn seconds(seconds: f64) -> Result<Measured, EngineError> {
        Ok(Measured {
            seconds,
            peak_memory_bytes: 1000,
            ..Measured::default()
        })
    }

    fn options(goal: OptimizeGoal) -> OptimizeOptions {
        OptimizeOptions {
            time_limit_s: 1000.0,
            ..OptimizeOptions::new(goal)
        }
    }

    #[test]
    fn the_best_of_each_knob_is_kept() {
        let mut bench = fake(|config, _| {
            let chunk = if config.prefill_chunk == Some(256) {
                1.0
            } else {
                2.0
            };
            let batch = if config.max_batch == 8 { 1.0 } else { 2.0 };
            seconds(chunk + batch)
        });
        let report = block_on(search(
            &mut bench,
            &EngineConfig::default(),
            &options(OptimizeGoal::Throughput),
        ))
        .unwrap();
        assert_eq!(report.outcome, OptimizeOutcome::Improved);
        assert_eq!(
            (report.config.prefill_chunk, report.config.max_batch),
            (Some(256), 8)
        );
        assert_eq!(
            (report.before.seconds, report.after.seconds, report.gain),
            (4.0, 2.0, 0.5)
        );
        assert_eq!(report.trials.iter().filter(|trial| trial.kept).count(), 2);
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<OptimizeReport>(&json).unwrap(), report);
    }

    #[test]
    fn threads_keys_and_values_and_guesses_are_kept_where_they_gain() {
        use mlx_engine_engine::SpeculationConfig;

        let mut bench = fake(|config, _| {
            let threads = if config.threads == Some(2) { 1.0 } else { 2.0 };
            let kv = if config.kv.bits == Some(8) { 1.0 } else { 2.0 };
            let guesses = if config.speculation == SpeculationConfig::Off {
                2.0
            } else {
                1.0
            };
            seconds(threads + kv + guesses)
        });
        let asked = OptimizeOptions {
            kv_integers: true,
            sample: Some("a text".to_owned()),
            ..options(OptimizeGoal::Latency)
        };
        let report = block_on(search(&mut bench, &EngineConfig::default(), &asked)).unwrap();
        assert_eq!((report.before.seconds, report.after.seconds), (6.0, 3.0));
        let config = &report.config;
        assert_eq!((config.threads, config.kv.bits), (Some(2), Some(8)));
        assert!(matches!(config.speculation, SpeculationConfig::Lookup(_)));
        // It can be loaded at the next start.
        let json = serde_json::to_string(config).unwrap();
        assert_eq!(&serde_json::from_str::<EngineConfig>(&json).unwrap(), config);
    }

    #[test]
    fn what_was_lucky_once_is_not_kept() {
        // The third measurement is the first try.
        let mut bench = fake(|_, asked| seconds(if asked == 2 { 1.0 } else { 2.0 }));
        let config = EngineConfig::default();
        let report = block_on(search(&mut bench, &config, &options(OptimizeGoal::Latency))).unwrap();
        assert_eq!(
            (report.outcome, &report.config, report.gain),
            (OptimizeOutcome::NotConfirmed, &config, 0.0)
        );
    }

    #[test]
    fn memory_is_not_bought_with_time() {
        let mut bench = fake(|config, _| {
            let (seconds, peak_memory_bytes) = match config.prefill_chunk {
                Some(128) => (9.0, 100),
                Some(256) => (2.1, 500),
                _ => (2.0, 1000),
            };
            Ok(Measured {
                seconds,
                peak_memory_bytes,
                ..Measured::default()
            })
        });
        let report = block_on(search(
            &mut bench,
            &EngineConfig::default(),
            &options(OptimizeGoal::Memory),
        ))
        .unwrap();
        assert_eq!((report.config.prefill_chunk, report.gain), (Some(256), 0.5));
    }

    #[test]
    fn a_value_that_fails_is_told_and_left() {
        let mut bench = fake(|config, _| match config.prefill_chunk {
            Some(2048) => Err(EngineError::OutOfMemory),
            _ => seconds(1.0),
        });
        let config = EngineConfig::default();
        let report = block_on(search(&mut bench, &config, &options(OptimizeGoal::Latency))).unwrap();
        assert_eq!(
            (report.outcome, &report.config),
            (OptimizeOutcome::NoGain, &config)
        );
        assert_eq!(
            report.trials.iter().filter(|trial| trial.error.is_some()).count(),
            1
        );
        let mut bench = fake(|_, _| Err(EngineError::OutOfMemory));
        assert!(block_on(search(&mut bench, &config, &options(OptimizeGoal::Latency))).is_err());
    }

    #[test]
    fn giving_up_is_between_two_measurements() {
        let mut bench = fake(|_, _| seconds(1.0));
        bench.gives_up_after = 3;
        let found = block_on(search(
            &mut bench,
            &EngineConfig::default(),
            &options(OptimizeGoal::Latency),
        ));
        assert!(matches!(found, Err(EngineError::Cancelled)));
        assert_eq!(bench.asked, 3);
    }

    proptest! {
        #[test]
        fn it_is_never_slower_than_it_was_and_keeps_to_the_time(
            takes in prop::collection::vec(0.1..10.0_f64, 64), noise in prop::collection::vec(0.0..0.004_f64, 64),
            limit in 0.0..300.0_f64,
        ) {
            let truth = |config: &EngineConfig| {
                let chunk = config.prefill_chunk.unwrap_or(100);
                takes[(chunk * 31 + config.max_batch * 7) % takes.len()]
            };
            let mut bench = fake(|config: &EngineConfig, asked| {
                seconds(truth(config) * (1.0 + noise[asked as usize % noise.len()]))
            });
            let config = EngineConfig::default();
            let options = OptimizeOptions { time_limit_s: limit, ..options(OptimizeGoal::Throughput) };
            let report = block_on(search(&mut bench, &config, &options)).unwrap();
            prop_assert!(truth(&report.config) <= truth(&config));
            // The first two are made whatever the limit, and one may take longer than all before it.
            let spent = bench.now.as_secs_f64() - 7.0;
            prop_assert!(spent <= limit.max(2.0 * 10.04) + 10.04, "{spent} of {limit}");
            if report.outcome != OptimizeOutcome::Improved {
                prop_assert_eq!(&report.config, &config);
            }
        }
    }
}
