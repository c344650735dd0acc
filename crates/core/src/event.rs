//! What comes back: the events of a stream.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Backend, Device, SpeculationReport, ToolCall};

/// One event of a stream: [`Started`](Self::Started), the parts of the answer in the order in which the model wrote them,
/// and [`Finished`](Self::Finished), which is the last.
///
/// The marks that models set between the parts are in none of them.
///
/// A stream that fails ends with an error in place of `Finished`.
///
/// ```
/// use mlx_engine_core::{EngineError, EventStream, GenerationEvent};
/// use futures::StreamExt;
///
/// async fn show(mut events: EventStream) -> Result<(), EngineError> {
///     while let Some(event) = events.next().await {
///         match event? {
///             GenerationEvent::Started { prompt_tokens, .. } => eprintln!("{prompt_tokens} tokens"),
///             GenerationEvent::Text { text, .. } => print!("{text}"),
///             GenerationEvent::ToolCall { call, .. } => println!("calls {}", call.name),
///             GenerationEvent::Finished(summary) => eprintln!("{:?}", summary.finish_reason),
///             // What the model thinks, and what later versions add.
///             _ => {}
///         }
///     }
///     Ok(())
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum GenerationEvent {
    /// The prompt is tokenized and admitted.
    Started {
        /// Tokens of the prompt, after the template.
        prompt_tokens: u32,
        /// Those of them that the prefix cache already held.
        cached_tokens: u32,
    },
    /// More of the answer.
    Text {
        /// Whole characters, never half of a stop string. Empty where the tokens add no text.
        text: String,
        /// The tokens that this text resolves, in order: more than one where a character spans tokens or text was
        /// held back, none where one token's text is delivered in pieces. Each token comes exactly once.
        tokens: Vec<TokenInfo>,
    },
    /// More of what the model thinks before it answers, where
    /// [`separate_reasoning`](crate::GenerateParams::separate_reasoning) is on.
    Reasoning {
        /// Whole characters.
        text: String,
        /// The tokens that this text resolves.
        tokens: Vec<TokenInfo>,
    },
    /// A call of a tool, whole.
    ToolCall {
        /// The call.
        call: ToolCall,
        /// The tokens that it resolves.
        tokens: Vec<TokenInfo>,
    },
    /// What began as a call and is none: it was cut off, or it is not what the format asks for.
    MalformedToolCall {
        /// As the model wrote it, with its marks.
        text: String,
        /// The tokens that it resolves.
        tokens: Vec<TokenInfo>,
    },
    /// The end, with everything that was measured.
    Finished(GenerateSummary),
}

impl GenerationEvent {
    /// The tokens that this event resolves. Over all events of a stream each token comes exactly once.
    pub fn tokens(&self) -> &[TokenInfo] {
        match self {
            Self::Text { tokens, .. }
            | Self::Reasoning { tokens, .. }
            | Self::ToolCall { tokens, .. }
            | Self::MalformedToolCall { tokens, .. } => tokens,
            Self::Started { .. } | Self::Finished(_) => &[],
        }
    }
}

/// A generated token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenInfo {
    /// The token id.
    pub id: u32,
    /// How likely it was, where [`GenerateParams::logprobs`](crate::GenerateParams::logprobs) asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<TokenLogprob>,
}

impl From<u32> for TokenInfo {
    fn from(id: u32) -> Self {
        Self { id, logprob: None }
    }
}

/// How likely a generated token was, and what else could have been.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token id.
    pub token: u32,
    /// Its text, where it is text by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The natural logarithm of its probability, finite and at most 0.
    pub logprob: f32,
    /// The likeliest tokens of this step, likeliest first.
    #[serde(default)]
    pub top: Vec<TopLogprob>,
}

/// One of the likeliest tokens of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    /// The token id.
    pub token: u32,
    /// Its text, where it is text by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The natural logarithm of its probability, finite and at most 0.
    pub logprob: f32,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum FinishReason {
    /// An end-of-sequence token, a stop token or a stop string.
    Stop,
    /// The model ended its turn with calls of tools, and waits for their results.
    #[serde(rename = "tool_calls")]
    ToolCalls,
    /// `max_tokens`, or the end of the context.
    Length,
    /// The caller's wish.
    Cancelled,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Stop => "stop",
            Self::ToolCalls => "tool_calls",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        })
    }
}

/// Tokens, counted as tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt, cached ones included.
    pub prompt_tokens: u32,
    /// Tokens generated, the one that ended the generation included.
    pub completion_tokens: u32,
    /// Tokens of the prompt that the prefix cache already held.
    pub cached_tokens: u32,
}

impl Usage {
    /// Tokens of prompt and answer together.
    pub fn total_tokens(self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.completion_tokens)
    }
}

/// Times measured on a monotonic clock. What did not happen is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// Seconds that loading the model took, once for the engine.
    pub load_s: f64,
    /// Seconds from the submission of the request to its first token, waiting included.
    pub ttft_s: f64,
    /// Tokens of the prompt a second in prefill, cached ones not counted.
    pub prompt_tps: f64,
    /// Tokens generated a second, after the first.
    pub generation_tps: f64,
}

/// The end of a stream: everything about a generation but what the events before it carried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateSummary {
    /// The id of the model.
    pub model: String,
    /// What computed the tokens.
    pub backend: Backend,
    /// Where it ran.
    pub device: Device,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens in and out.
    pub usage: Usage,
    /// What was measured.
    pub timings: Timings,
    /// The most bytes that models had allocated at once in this process so far, loading included; 0 for a backend that
    /// allocates none.
    pub peak_memory_bytes: u64,
    /// What guessing ahead did, where the engine does it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speculation: Option<SpeculationReport>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn summary() -> GenerateSummary {
        GenerateSummary {
            model: "tiny".to_owned(),
            backend: Backend::Mock,
            device: Device::Cpu,
            finish_reason: FinishReason::Stop,
            usage: Usage {
                prompt_tokens: 3,
                completion_tokens: 2,
                cached_tokens: 1,
            },
            timings: Timings {
                load_s: 0.5,
                ttft_s: 0.25,
                prompt_tps: 8.0,
                generation_tps: 4.0,
            },
            peak_memory_bytes: 0,
            speculation: None,
        }
    }

    #[test]
    fn events_are_tagged_by_their_type() {
        let check = |event: GenerationEvent, tag: &str| {
            let json = serde_json::to_value(&event).unwrap();
            assert_eq!(json["type"], tag);
            assert_eq!(serde_json::from_value::<GenerationEvent>(json).unwrap(), event);
        };
        check(
            GenerationEvent::Started {
                prompt_tokens: 3,
                cached_tokens: 1,
            },
            "started",
        );
        check(
            GenerationEvent::Text {
                text: "hi".to_owned(),
                tokens: vec![7.into()],
            },
            "text",
        );
        let (text, tokens) = ("hi".to_owned(), vec![7.into()]);
        check(GenerationEvent::Reasoning { text, tokens }, "reasoning");
        let (call, tokens) = (ToolCall::new("c1", "now", serde_json::json!({})), vec![7.into()]);
        check(GenerationEvent::ToolCall { call, tokens }, "tool_call");
        let (text, tokens) = ("<tool_call>{".to_owned(), vec![7.into()]);
        check(
            GenerationEvent::MalformedToolCall { text, tokens },
            "malformed_tool_call",
        );
        check(GenerationEvent::Finished(summary()), "finished");
    }

    #[test]
    fn finish_reasons_are_written_as_they_are_displayed() {
        for reason in [
            FinishReason::Stop,
            FinishReason::ToolCalls,
            FinishReason::Length,
            FinishReason::Cancelled,
        ] {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.to_string());
        }
    }

    #[test]
    fn the_total_does_not_overflow() {
        let usage = Usage {
            prompt_tokens: u32::MAX,
            completion_tokens: 1,
            cached_tokens: 0,
        };
        assert_eq!(usage.total_tokens(), 1 << 32);
    }
}
