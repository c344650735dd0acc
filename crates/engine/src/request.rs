//! One request on the worker: what it has been fed, what it has said, and how it ends.

use std::time::Instant;

use mlx_engine_core::{
    EngineError, FinishReason, GenerateParams, GenerationEvent, Timings, TokenInfo, TokenLogprob, ToolCall,
    TopLogprob, Usage,
};
use mlx_engine_text::{Detokenizer, OutputParser, ParsedCall, ParsedEvent, StopMatcher, Tokenizer};
use tokio::sync::mpsc;

use crate::Chosen;
use crate::call_id::call_id;
use crate::constraint::Walk;

/// The way back to the caller. It has no bound, so that the worker never waits and no event is lost; what it comes to hold is bounded
/// by the tokens that the request may have.
pub(crate) type Events = mpsc::UnboundedSender<Result<GenerationEvent, EngineError>>;

/// A request as the worker takes it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) tokens: Vec<u32>,
    pub(crate) params: GenerateParams,
    /// Where the answer is in its grammar.
    pub(crate) walk: Option<Box<Walk>>,
    /// Tells text, thoughts and calls of the answer apart; none where all is text.
    pub(crate) parser: Option<Box<OutputParser>>,
    pub(crate) events: Events,
    pub(crate) submitted: Instant,
}

/// The text and the numbers of a running request.
#[derive(Debug)]
pub(crate) struct Answer {
    tokenizer: Tokenizer,
    detokenizer: Detokenizer,
    parser: Option<Box<OutputParser>>,
    /// Looks at the text alone: thoughts and arguments may hold what ends an answer.
    stop: StopMatcher,
    /// Whether the mark that ends the thoughts was fed to the model.
    budget_spent: bool,
    calls: usize,
    /// Tokens whose text is not certain yet.
    pending: Vec<TokenInfo>,
    generated: u32,
    submitted: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Answer {
    pub(crate) fn new(tokenizer: &Tokenizer, request: &Request) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            detokenizer: Detokenizer::new(tokenizer.clone(), true),
            parser: request.parser.clone(),
            stop: StopMatcher::new(request.params.stop.iter().cloned()),
            budget_spent: false,
            calls: 0,
            pending: Vec::new(),
            generated: 0,
            submitted: request.submitted,
            first_token: None,
            last_token: None,
        }
    }

    /// Takes a token and returns the events that it makes certain, and the reason to end here. `complete` says that
    /// nothing can follow it.
    pub(crate) fn take(
        &mut self,
        chosen: Chosen,
        params: &GenerateParams,
        complete: bool,
        now: Instant,
    ) -> (Vec<GenerationEvent>, Option<FinishReason>) {
        let token = chosen.token;
        self.generated += 1;
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        self.pending.push(self.info(chosen));
        let ends = params.stop_tokens.contains(&token)
            || (!params.ignore_eos && self.tokenizer.eos_ids().contains(&token));
        let mut parts = if ends { Vec::new() } else { self.parts(token) };
        let mut reason = if ends || complete {
            Some(FinishReason::Stop)
        } else {
            (self.generated >= params.max_tokens).then_some(FinishReason::Length)
        };
        if let Some(reason) = reason {
            parts.extend(self.rest(reason));
        }
        let mut events = Vec::new();
        let mut ended = false;
        for part in parts {
            if !ended {
                ended = self.give(part, params, &mut events);
            }
        }
        if ended {
            reason = Some(FinishReason::Stop);
        } else if reason.is_some() {
            let held = self.stop.finish();
            add_text(&mut events, held);
        }
        if reason == Some(FinishReason::Stop) && self.calls > 0 {
            reason = Some(FinishReason::ToolCalls);
        }
        self.resolve(&mut events, reason.is_some());
        (events, reason)
    }

    /// What a token adds to the answer.
    fn parts(&mut self, token: u32) -> Vec<ParsedEvent> {
        let Some(parser) = &mut self.parser else {
            return vec![ParsedEvent::Text(self.detokenizer.push(token))];
        };
        let mut text = String::new();
        // Special tokens have no text of their own but where they are marks.
        if self.tokenizer.is_special(token) {
            let mark = self.tokenizer.decode(&[token], false);
            if parser.format().has_special(&mark) {
                text = self.detokenizer.finish() + &mark;
            }
        } else {
            text = self.detokenizer.push(token);
        }
        parser.push(&text)
    }

    /// What was held back, at the end. After a stop string there is none.
    fn rest(&mut self, reason: FinishReason) -> Vec<ParsedEvent> {
        let tail = self.detokenizer.finish();
        let Some(parser) = &mut self.parser else {
            return vec![ParsedEvent::Text(tail)];
        };
        let mut parts = if tail.is_empty() {
            Vec::new()
        } else {
            parser.push(&tail)
        };
        parts.extend(if reason == FinishReason::Stop {
            parser.finish_at_stop()
        } else {
            parser.finish()
        });
        parts
    }

    /// Makes events of a part, and says whether the answer ends with it.
    fn give(
        &mut self,
        part: ParsedEvent,
        params: &GenerateParams,
        events: &mut Vec<GenerationEvent>,
    ) -> bool {
        let tokens = Vec::new();
        match part {
            ParsedEvent::Text(text) => {
                let outcome = self.stop.push(&text);
                add_text(events, outcome.text);
                return outcome.stopped;
            }
            ParsedEvent::Reasoning(text) => events.push(GenerationEvent::Reasoning { text, tokens }),
            ParsedEvent::ToolCall(call) => {
                // The text before it is over.
                let held = self.stop.finish();
                add_text(events, held);
                self.calls += 1;
                let call = tool_call(call);
                events.push(GenerationEvent::ToolCall { call, tokens });
                return !params.parallel_tool_calls;
            }
            ParsedEvent::Malformed(text) => {
                let held = self.stop.finish();
                add_text(events, held);
                events.push(GenerationEvent::MalformedToolCall { text, tokens });
            }
        }
        false
    }

    /// Puts the tokens that are certain now on the last event.
    fn resolve(&mut self, events: &mut Vec<GenerationEvent>, ended: bool) {
        if events.is_empty() && ended {
            let text = String::new();
            events.push(GenerationEvent::Text {
                text,
                tokens: Vec::new(),
            });
        }
        if let Some(
            GenerationEvent::Text { tokens, .. }
            | GenerationEvent::Reasoning { tokens, .. }
            | GenerationEvent::ToolCall { tokens, .. }
            | GenerationEvent::MalformedToolCall { tokens, .. },
        ) = events.last_mut()
        {
            *tokens = std::mem::take(&mut self.pending);
        }
    }

    /// The tokens that end the thoughts that the model is in, once it has had as many as it may.
    pub(crate) fn end_of_thoughts(&mut self, params: &GenerateParams) -> Vec<u32> {
        let Some(text) = self.over_budget(params, 0) else {
            return Vec::new();
        };
        self.budget_spent = true;
        self.tokenizer.encode(text, false).unwrap_or_default()
    }

    /// Whether tokens may be forced behind one of the next `more` tokens, so that nothing can be fed behind it before it is
    /// read.
    pub(crate) fn may_force(&self, params: &GenerateParams, more: usize) -> bool {
        self.over_budget(params, more).is_some()
    }

    /// The mark that ends the thoughts, where the model has had as many as it may with `more` of them.
    fn over_budget(&self, params: &GenerateParams, more: usize) -> Option<&'static str> {
        let parser = self.parser.as_ref().filter(|_| !self.budget_spent)?;
        let budget = params.thinking_budget? as usize;
        let text = parser.end_of_reasoning()?;
        (parser.reasoning_tokens() + more >= budget).then_some(text)
    }

    fn info(&self, chosen: Chosen) -> TokenInfo {
        let text = |token| Some(self.tokenizer.decode(&[token], false));
        let logprob = chosen.logprob.map(|logprob| TokenLogprob {
            token: chosen.token,
            text: text(chosen.token),
            logprob,
            top: chosen
                .top
                .into_iter()
                .map(|(token, logprob)| TopLogprob {
                    token,
                    text: text(token),
                    logprob,
                })
                .collect(),
        });
        TokenInfo {
            id: chosen.token,
            logprob,
        }
    }

    /// Tokens so far.
    pub(crate) fn generated(&self) -> u32 {
        self.generated
    }

    pub(crate) fn usage(&self, prompt_tokens: usize, cached_tokens: usize) -> Usage {
        Usage {
            prompt_tokens: prompt_tokens as u32,
            completion_tokens: self.generated,
            cached_tokens: cached_tokens as u32,
        }
    }

    /// The measured times. Prompt tokens that were not computed do not count as speed.
    pub(crate) fn timings(&self, load_s: f64, started: Instant, usage: Usage) -> Timings {
        let (Some(first), Some(last)) = (self.first_token, self.last_token) else {
            return Timings {
                load_s,
                ..Timings::default()
            };
        };
        let rate = |tokens: u32, seconds: f64| {
            if seconds > 0.0 {
                f64::from(tokens) / seconds
            } else {
                0.0
            }
        };
        let prefill = first.duration_since(started).as_secs_f64();
        Timings {
            load_s,
            ttft_s: first.duration_since(self.submitted).as_secs_f64(),
            prompt_tps: rate(usage.prompt_tokens - usage.cached_tokens, prefill),
            generation_tps: rate(
                self.generated.saturating_sub(1),
                last.duration_since(first).as_secs_f64(),
            ),
        }
    }
}

/// Adds text to the event before it, where that is text.
fn add_text(events: &mut Vec<GenerationEvent>, more: String) {
    if more.is_empty() {
        return;
    }
    if let Some(GenerationEvent::Text { text, .. }) = events.last_mut() {
        text.push_str(&more);
    } else {
        let tokens = Vec::new();
        events.push(GenerationEvent::Text { text: more, tokens });
    }
}

/// A call with an id, which not every format has.
fn tool_call(call: ParsedCall) -> ToolCall {
    ToolCall {
        id: call.id.unwrap_or_else(call_id),
        name: call.name,
        // The parser gives nothing but objects.
        arguments: serde_json::from_str(&call.arguments).unwrap_or_default(),
        raw_arguments: Some(call.arguments),
    }
}
