//! One request on the worker: what it has been fed, what it has said, and how it ends.

use std::time::Instant;

use mlx_engine_core::{
    EngineError, FinishReason, GenerateParams, GenerationEvent, Timings, TokenInfo, TokenLogprob, TopLogprob,
    Usage,
};
use mlx_engine_text::{Detokenizer, StopMatcher, Tokenizer};
use tokio::sync::mpsc;

use crate::Chosen;
use crate::constraint::Walk;

/// The way back to the caller. It holds as many events as the request can have, so that the worker never waits.
pub(crate) type Events = mpsc::Sender<Result<GenerationEvent, EngineError>>;

/// A request as the worker takes it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) tokens: Vec<u32>,
    pub(crate) params: GenerateParams,
    /// Where the answer is in its grammar.
    pub(crate) walk: Option<Box<Walk>>,
    pub(crate) events: Events,
    pub(crate) submitted: Instant,
}

/// The text and the numbers of a running request.
#[derive(Debug)]
pub(crate) struct Answer {
    tokenizer: Tokenizer,
    detokenizer: Detokenizer,
    stop: StopMatcher,
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
            stop: StopMatcher::new(request.params.stop.iter().cloned()),
            pending: Vec::new(),
            generated: 0,
            submitted: request.submitted,
            first_token: None,
            last_token: None,
        }
    }

    /// Takes a token and returns the event that it makes certain, and the reason to end here. `complete` says that
    /// nothing can follow it.
    pub(crate) fn take(
        &mut self,
        chosen: Chosen,
        params: &GenerateParams,
        complete: bool,
        now: Instant,
    ) -> (Option<GenerationEvent>, Option<FinishReason>) {
        let token = chosen.token;
        self.generated += 1;
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        self.pending.push(self.info(chosen));
        let ends = params.stop_tokens.contains(&token)
            || (!params.ignore_eos && self.tokenizer.eos_ids().contains(&token));
        let mut text = String::new();
        let mut reason = None;
        if ends {
            reason = Some(FinishReason::Stop);
        } else {
            let piece = self.detokenizer.push(token);
            let outcome = self.stop.push(&piece);
            text = outcome.text;
            if outcome.stopped || complete {
                reason = Some(FinishReason::Stop);
            } else if self.generated >= params.max_tokens {
                reason = Some(FinishReason::Length);
            }
        }
        if reason.is_some() {
            text.push_str(&self.rest());
        }
        let event = (!text.is_empty() || reason.is_some()).then(|| GenerationEvent::Text {
            text,
            tokens: std::mem::take(&mut self.pending),
        });
        (event, reason)
    }

    /// Text that was held back. After a stop string there is none.
    fn rest(&mut self) -> String {
        let tail = self.detokenizer.finish();
        let outcome = self.stop.push(&tail);
        outcome.text + &self.stop.finish()
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
