//! `mlx-engine generate`.

use std::io::IsTerminal;
use std::time::Instant;

use futures::StreamExt;
use mlx_engine::{
    ChatMessage, FinishReason, GenerateParams, GenerateSummary, GenerationEvent, InferenceEngine, LlmEngine,
    OutputConstraint, PartialOutput, Prompt, SpeculationOff, SpeculationReport, Timings, Usage,
};

use crate::args::Generate;
use crate::failure::Failure;
use crate::output::{errln, outln, write};
use crate::{input, load, stats, tools};

pub(crate) async fn run(args: Generate) -> Result<(), Failure> {
    let text = match (&args.prompt, &args.prompt_file, &args.stdin) {
        (Some(text), _, _) => text.clone(),
        (_, Some(path), _) => input::file(path)?,
        (_, _, Some(_)) => input::stdin_or_interrupt().await?,
        _ if std::io::stdin().is_terminal() => {
            return Err(Failure::usage("a prompt is needed: --prompt, --prompt-file or -"));
        }
        _ => input::stdin_or_interrupt().await?,
    };
    let tools = tools::read(&args.tools)?;
    let prompt = if args.raw {
        if !tools.is_empty() {
            return Err(Failure::usage(
                "a raw prompt has no place for tools: leave --raw or --tools out",
            ));
        }
        Prompt::text(text)
    } else {
        let system = args
            .system
            .iter()
            .map(|system| ChatMessage::system(system.clone()));
        Prompt::chat(system.chain([ChatMessage::user(text)])).with_tools(tools)
    };
    let mut params = tools::params(&args.tools, args.sampling.params());
    if let Some(top) = args.logprobs {
        params = params.with_logprobs(true).with_top_logprobs(top);
    }
    if let Some(path) = &args.json_schema {
        let schema = serde_json::from_str(&input::file(path)?)
            .map_err(|error| Failure::other(format!("`{}` is no JSON: {error}", path.display())))?;
        params = params.with_constraint(OutputConstraint::JsonSchema(schema));
    } else if let Some(pattern) = &args.regex {
        params = params.with_constraint(OutputConstraint::Regex(pattern.clone()));
    }
    // What is wrong with the parameters is said before seconds are spent on the model.
    params.validate().map_err(mlx_engine::EngineError::from)?;
    let engine = load::load(&args.model).await?;
    let answered = answer(&engine, prompt, params, args.json).await;
    if args.verbose {
        // Where the answer failed they are wanted most.
        stats::report(&engine);
    }
    answered?;
    load::finish(&engine).await
}

/// Prints an answer.
async fn answer(
    engine: &InferenceEngine,
    prompt: Prompt,
    params: GenerateParams,
    json: bool,
) -> Result<(), Failure> {
    let mut answer = Answer::new();
    let mut stream = engine.stream(prompt, params).await?;
    let mut interrupted = false;
    loop {
        let event = tokio::select! {
            event = stream.next() => event,
            _ = tokio::signal::ctrl_c() => {
                interrupted = true;
                None
            }
        };
        let Some(event) = event else { break };
        answer.take(event?, !json)?;
    }
    drop(stream);
    let summary = answer.summary.take();
    if json {
        let summary = summary.map_or_else(|| answer.cancelled(engine), Ok)?;
        let output = answer.parts.finish(summary);
        let json = serde_json::to_string(&output).map_err(|error| Failure::other(error.to_string()))?;
        outln!("{json}");
    } else {
        outln!("");
        if let Some(summary) = &summary {
            report(summary);
        }
    }
    if interrupted {
        return Err(Failure::Interrupted);
    }
    Ok(())
}

/// What has come of an answer.
struct Answer {
    parts: PartialOutput,
    prompt_tokens: u32,
    cached_tokens: u32,
    submitted: Instant,
    /// When the first text came and when the last did.
    between: Option<(Instant, Instant)>,
    /// Tokens of the first text.
    first_tokens: usize,
    summary: Option<GenerateSummary>,
}

impl Answer {
    fn new() -> Self {
        Self {
            parts: PartialOutput::default(),
            prompt_tokens: 0,
            cached_tokens: 0,
            submitted: Instant::now(),
            between: None,
            first_tokens: 0,
            summary: None,
        }
    }

    fn take(&mut self, event: GenerationEvent, print: bool) -> Result<(), Failure> {
        if let GenerationEvent::Started {
            prompt_tokens,
            cached_tokens,
        } = event
        {
            self.prompt_tokens = prompt_tokens;
            self.cached_tokens = cached_tokens;
        }
        if print {
            match &event {
                GenerationEvent::Text { text, .. } => write(format_args!("{text}"))?,
                other => tools::show(other)?,
            }
        }
        let resolved = event.tokens().len();
        if let Some(summary) = self.parts.take(event) {
            self.summary = Some(summary);
        } else if resolved > 0 {
            let now = Instant::now();
            if self.between.is_none() {
                self.first_tokens = self.parts.tokens.len();
            }
            let first = self.between.map_or(now, |(first, _)| first);
            self.between = Some((first, now));
        }
        Ok(())
    }

    /// The times as they were seen from here; none without text.
    fn timings(&self, load_s: f64) -> Timings {
        let mut timings = Timings {
            load_s,
            ..Timings::default()
        };
        if let Some((first, last)) = self.between {
            let rate = |tokens: usize, seconds: f64| {
                if seconds > 0.0 {
                    tokens as f64 / seconds
                } else {
                    0.0
                }
            };
            timings.ttft_s = first.duration_since(self.submitted).as_secs_f64();
            let computed = self.prompt_tokens.saturating_sub(self.cached_tokens);
            timings.prompt_tps = rate(computed as usize, timings.ttft_s);
            let later = self.parts.tokens.len() - self.first_tokens;
            timings.generation_tps = rate(later, last.duration_since(first).as_secs_f64());
        }
        timings
    }

    /// The summary of an answer that was interrupted: the engine does not give one to nobody.
    fn cancelled(&self, engine: &InferenceEngine) -> Result<GenerateSummary, Failure> {
        let (Some(model), Some(backend), Some(device)) = (engine.model(), engine.backend(), engine.device())
        else {
            return Err(Failure::other("the model was unloaded while it answered"));
        };
        Ok(GenerateSummary {
            model: model.id.clone(),
            backend,
            device,
            finish_reason: FinishReason::Cancelled,
            usage: Usage {
                prompt_tokens: self.prompt_tokens,
                completion_tokens: self.parts.tokens.len() as u32,
                cached_tokens: self.cached_tokens,
            },
            timings: self.timings(engine.load_seconds().unwrap_or_default()),
            peak_memory_bytes: engine.peak_memory_bytes().unwrap_or_default(),
            speculation: None,
        })
    }
}

/// One line on who answered and how fast.
pub(crate) fn report(summary: &GenerateSummary) {
    let GenerateSummary {
        model,
        backend,
        device,
        usage,
        timings,
        speculation,
        ..
    } = summary;
    let guessed = speculation.as_ref().map_or_else(String::new, guessed);
    errln!(
        "[{model} | backend {backend} on {device} | prompt {} tokens ({} cached), {:.1} tok/s | answer {} tokens, {:.1} \
         tok/s | first token after {:.2} s{guessed}]",
        usage.prompt_tokens,
        usage.cached_tokens,
        timings.prompt_tps,
        usage.completion_tokens,
        timings.generation_tps,
        timings.ttft_s,
    );
}

/// What guessing ahead did.
fn guessed(report: &SpeculationReport) -> String {
    let SpeculationReport {
        drafted_tokens,
        accepted_tokens,
        paused_steps,
        ..
    } = report;
    match report.off {
        Some(SpeculationOff::Constraint) => " | nothing guessed: the answer is held to a grammar".to_owned(),
        Some(SpeculationOff::Uncuttable) => {
            " | nothing guessed: the model's sequences cannot be cut".to_owned()
        }
        Some(SpeculationOff::DraftFailed) => format!(
            " | guessed {accepted_tokens} of {drafted_tokens} tokens right, then the draft model failed"
        ),
        _ => format!(
            " | guessed {accepted_tokens} of {drafted_tokens} tokens right, {paused_steps} steps paused"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mlx_engine::{Backend, BackendChoice, TokenInfo};

    use super::*;

    fn text(tokens: &[u32]) -> GenerationEvent {
        GenerationEvent::Text {
            text: "word ".to_owned(),
            tokens: tokens.iter().copied().map(TokenInfo::from).collect(),
        }
    }

    /// An answer of which the first text came after a second with one token, and four more within two seconds.
    fn begun() -> Answer {
        let mut answer = Answer::new();
        let started = GenerationEvent::Started {
            prompt_tokens: 10,
            cached_tokens: 4,
        };
        for event in [started, text(&[1]), text(&[2, 3]), text(&[]), text(&[4, 5])] {
            answer
                .take(event, false)
                .unwrap_or_else(|_| panic!("nothing is printed"));
        }
        assert!(answer.between.is_some_and(|(first, last)| first <= last));
        let second = Duration::from_secs(1);
        let submitted = answer.submitted;
        answer.between = Some((submitted + second, submitted + 3 * second));
        answer
    }

    #[test]
    fn times_are_those_that_were_seen() {
        let Timings {
            load_s,
            ttft_s,
            prompt_tps,
            generation_tps,
        } = begun().timings(0.5);
        assert_eq!((load_s, ttft_s, prompt_tps, generation_tps), (0.5, 1.0, 6.0, 2.0));
        // Nothing has come, or all at once.
        assert_eq!(
            Answer::new().timings(0.5),
            Timings {
                load_s: 0.5,
                ..Timings::default()
            }
        );
        let mut at_once = begun();
        at_once.between = Some((at_once.submitted, at_once.submitted));
        let timings = at_once.timings(0.0);
        assert_eq!((timings.prompt_tps, timings.generation_tps), (0.0, 0.0));
    }

    #[test]
    fn an_answer_that_was_interrupted_has_a_summary() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let engine = InferenceEngine::new().with_backend(BackendChoice::Mock);
        runtime.unwrap().block_on(async {
            assert!(begun().cancelled(&engine).is_err(), "no model is loaded");
            engine.load_model("tiny").await.unwrap();
            let Ok(summary) = begun().cancelled(&engine) else {
                panic!("the model is loaded")
            };
            assert_eq!(
                (summary.model.as_str(), summary.backend, summary.finish_reason),
                ("tiny", Backend::Mock, FinishReason::Cancelled)
            );
            assert_eq!(
                summary.usage,
                Usage {
                    prompt_tokens: 10,
                    completion_tokens: 5,
                    cached_tokens: 4
                }
            );
            engine.unload().await.unwrap();
        });
    }

    #[test]
    fn it_is_said_what_guessing_did() {
        let report = |off| SpeculationReport {
            steps: 4,
            drafted_tokens: 8,
            accepted_tokens: 6,
            paused_steps: 2,
            off,
        };
        for (off, expect) in [
            (None, " | guessed 6 of 8 tokens right, 2 steps paused"),
            (
                Some(SpeculationOff::Constraint),
                " | nothing guessed: the answer is held to a grammar",
            ),
            (
                Some(SpeculationOff::Uncuttable),
                " | nothing guessed: the model's sequences cannot be cut",
            ),
            (
                Some(SpeculationOff::DraftFailed),
                " | guessed 6 of 8 tokens right, then the draft model failed",
            ),
        ] {
            assert_eq!(guessed(&report(off)), expect);
        }
    }
}
