//! Many requests at once.

use std::time::Instant;

use futures::future::try_join_all;
use futures::stream::StreamExt;
use indicatif::{ProgressBar, ProgressDrawTarget};
use mlx_engine::{
    EngineConfig, GenerateParams, GenerationEvent, InferenceEngine, LlmEngine, PrefixCacheConfig, Prompt,
};
use serde_json::json;

use super::{fits, median, prompt};
use crate::args::Bench;
use crate::failure::Failure;
use crate::load;
use crate::output::outln;

/// The figures of a round.
struct Round {
    prompt_tps: f64,
    generation_tps: f64,
}

pub(super) async fn run(args: Bench) -> Result<(), Failure> {
    if args.model.config.is_some() {
        return Err(Failure::usage(
            "--batch measures with a configuration of its own: leave --config away",
        ));
    }
    let most = args.batch.iter().copied().max().unwrap_or(1) as usize;
    let config = EngineConfig {
        max_batch: most,
        max_queue: most,
        // What was computed for one round must not serve the next.
        prefix_cache: PrefixCacheConfig::OFF,
        ..EngineConfig::default()
    };
    let engine = load::load_with(&args.model, config).await?;
    fits(&engine, args.prompt_tokens, args.generate_tokens)?;
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(args.generate_tokens)
        .with_ignore_eos(true);
    let steps = (u64::from(args.rounds) + 1) * args.batch.len() as u64;
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
    let mut rows = Vec::new();
    for &batch in &args.batch {
        let mut rounds = Vec::new();
        // The first round warms up and does not count.
        for round in 0..=args.rounds {
            let prompts = (0..batch).map(|index| prompt(args.prompt_tokens, round * batch + index));
            let measured = tokio::select! {
                measured = measure(&engine, prompts.collect(), &params) => measured?,
                _ = tokio::signal::ctrl_c() => return Err(Failure::Interrupted),
            };
            bar.inc(1);
            if round > 0 {
                rounds.push(measured);
            }
        }
        let prompt_tps = median(rounds.iter().map(|round| round.prompt_tps).collect());
        let generation_tps = median(rounds.iter().map(|round| round.generation_tps).collect());
        rows.push((batch, prompt_tps, generation_tps));
    }
    bar.finish_and_clear();
    let backend = engine.backend().map(|backend| backend.to_string());
    if args.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(batch, prompt_tps, generation_tps)| {
                json!({"batch": batch, "prompt_tps": prompt_tps, "generation_tps": generation_tps})
            })
            .collect();
        outln!("{}", json!({"backend": backend, "batches": rows}));
    } else {
        outln!("backend {}", backend.unwrap_or_default());
        outln!("{:>6} {:>14} {:>18}", "batch", "prompt tok/s", "generation tok/s");
        for (batch, prompt_tps, generation_tps) in rows {
            outln!("{batch:>6} {prompt_tps:>14.1} {generation_tps:>18.1}");
        }
    }
    Ok(())
}

/// Answers all prompts at once. Generation is what comes between the moment at which the last answer has begun and that
/// at which the first has ended, when all of them are being decoded; the prompts take the time before.
async fn measure(
    engine: &InferenceEngine,
    prompts: Vec<Prompt>,
    params: &GenerateParams,
) -> Result<Round, Failure> {
    let started = Instant::now();
    let answers = try_join_all(prompts.into_iter().map(|prompt| async move {
        let mut events = engine.stream(prompt, params.clone()).await?;
        let mut tokens = Vec::new();
        let mut fed = 0;
        while let Some(event) = events.next().await {
            let event = event?;
            if let GenerationEvent::Started { prompt_tokens, .. } = event {
                fed = prompt_tokens;
            }
            tokens.extend(event.tokens().iter().map(|_| started.elapsed().as_secs_f64()));
        }
        Ok::<_, Failure>((fed, tokens))
    }))
    .await?;
    let times = || answers.iter().map(|(_, times)| times);
    let begun = times()
        .filter_map(|times| times.first().copied())
        .fold(0.0, f64::max);
    let ended = times()
        .filter_map(|times| times.last().copied())
        .fold(f64::INFINITY, f64::min);
    let between = times()
        .flatten()
        .filter(|&&time| time > begun && time <= ended)
        .count();
    let fed: u32 = answers.iter().map(|(fed, _)| fed).sum();
    Ok(Round {
        prompt_tps: f64::from(fed) / begun,
        generation_tps: if ended > begun {
            between as f64 / (ended - begun)
        } else {
            0.0
        },
    })
}
