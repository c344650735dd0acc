//! `mlx-engine bench`.

mod batch;

use indicatif::{ProgressBar, ProgressDrawTarget};
use mlx_engine::{GenerateOutput, GenerateParams, InferenceEngine, LlmEngine, Prompt, SpeculationReport};
use serde_json::json;

use crate::args::Bench;
use crate::failure::Failure;
use crate::load;
use crate::output::outln;

pub(crate) async fn run(args: Bench) -> Result<(), Failure> {
    if !args.batch.is_empty() {
        return batch::run(args).await;
    }
    let engine = load::load(&args.model).await?;
    fits(&engine, args.prompt_tokens, args.generate_tokens)?;
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(args.generate_tokens)
        .with_ignore_eos(true);
    let bar = ProgressBar::with_draw_target(Some(u64::from(args.rounds) + 1), ProgressDrawTarget::stderr());
    let mut outputs = Vec::new();
    // The first round warms up and does not count.
    for round in 0..=args.rounds {
        // Each round has a prompt of its own, as one that was seen before is not computed again.
        let tokens = prompt(args.prompt_tokens, round);
        let output = tokio::select! {
            output = engine.generate(tokens, params.clone()) => output?,
            _ = tokio::signal::ctrl_c() => return Err(Failure::Interrupted),
        };
        bar.inc(1);
        if round > 0 {
            outputs.push(output);
        }
    }
    bar.finish_and_clear();
    let median = |figure: fn(&GenerateOutput) -> f64| median(outputs.iter().map(figure).collect());
    let prompt_tps = median(|output| output.timings.prompt_tps);
    let generation_tps = median(|output| output.timings.generation_tps);
    let ttft_s = median(|output| output.timings.ttft_s);
    let load_s = median(|output| output.timings.load_s);
    let peak = outputs
        .iter()
        .map(|output| output.peak_memory_bytes)
        .max()
        .unwrap_or_default();
    // Those of all rounds: a guess of one round is right or wrong by chance.
    let guessed = outputs
        .iter()
        .filter_map(|output| output.speculation)
        .reduce(|sum, report| SpeculationReport {
            steps: sum.steps + report.steps,
            drafted_tokens: sum.drafted_tokens + report.drafted_tokens,
            accepted_tokens: sum.accepted_tokens + report.accepted_tokens,
            paused_steps: sum.paused_steps + report.paused_steps,
            ..sum
        });
    let backend = outputs
        .first()
        .map(|output| output.backend.to_string())
        .unwrap_or_default();
    if args.json {
        let mut figures = json!({"backend": backend, "prompt_tps": prompt_tps, "generation_tps": generation_tps, "ttft_s": ttft_s,
                                 "load_s": load_s, "peak_memory_bytes": peak});
        if let Some(guessed) = guessed {
            figures["speculation"] = json!(guessed);
        }
        outln!("{figures}");
    } else {
        outln!("backend       {backend}");
        outln!(
            "prompt        {prompt_tps:.1} tok/s ({} tokens)",
            args.prompt_tokens
        );
        outln!(
            "generation    {generation_tps:.1} tok/s ({} tokens)",
            args.generate_tokens
        );
        if let Some(report) = guessed {
            outln!(
                "guesses       {} of {} right, {} steps paused",
                report.accepted_tokens,
                report.drafted_tokens,
                report.paused_steps
            );
        }
        outln!("first token   {ttft_s:.3} s");
        outln!("load          {load_s:.2} s");
        outln!("peak memory   {:.1} MB", peak as f64 / 1e6);
    }
    Ok(())
}

/// Refuses what the context has no room for: it would end sooner and be measured as if it had not.
fn fits(engine: &InferenceEngine, prompt: u32, generate: u32) -> Result<(), Failure> {
    let context = engine.model().map_or(0, |model| model.context_length);
    if u64::from(prompt) + u64::from(generate) <= u64::from(context) {
        return Ok(());
    }
    Err(Failure::other(format!(
        "{prompt} tokens of a prompt and {generate} of an answer do not fit the context of {context}; lower -p or -n"
    )))
}

/// A prompt that begins as no other round's does: what prompts have in common is computed once.
fn prompt(tokens: u32, round: u32) -> Prompt {
    let number = [round % 200, round / 200 % 200].into_iter();
    let rest = (2..).map(|i| (i * 7 + round * 13) % 200);
    Prompt::tokens(number.chain(rest).take(tokens as usize).map(|token| 32 + token))
}

/// The middle value, or the mean of the two; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        len if len % 2 == 1 => values[len / 2],
        len => f64::midpoint(values[len / 2 - 1], values[len / 2]),
    }
}
