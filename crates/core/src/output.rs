//! The output that the events of a stream add up to.

use serde::{Deserialize, Serialize};

use crate::{
    Backend, ChatMessage, Device, FinishReason, GenerateSummary, GenerationEvent, SpeculationReport, Timings,
    TokenInfo, TokenLogprob, ToolCall, Usage,
};

/// A whole generation: what a stream adds up to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateOutput {
    /// The id of the model.
    pub model: String,
    /// What computed the tokens.
    pub backend: Backend,
    /// Where it ran.
    pub device: Device,
    /// The answer, without the stop string, what was thought and what was called.
    pub text: String,
    /// What the model thought before it answered, where
    /// [`separate_reasoning`](crate::GenerateParams::separate_reasoning) is on and it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// The tools that it called, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// What began as a call and is none, as it was written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub malformed_tool_calls: Vec<String>,
    /// The generated token ids.
    pub tokens: Vec<u32>,
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
    /// How likely each token was, where the request asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<TokenLogprob>>,
}

impl GenerateOutput {
    /// The answer as the next message of the conversation.
    pub fn message(&self) -> ChatMessage {
        ChatMessage {
            tool_calls: self.tool_calls.clone(),
            reasoning_content: self.reasoning.clone(),
            ..ChatMessage::assistant(self.text.clone())
        }
    }
}

/// What has come of an answer so far.
///
/// ```
/// use mlx_engine_core::{GenerationEvent, PartialOutput};
///
/// let mut answer = PartialOutput::default();
/// answer.take(GenerationEvent::Text { text: "Par".into(), tokens: vec![7.into()] });
/// answer.take(GenerationEvent::Text { text: "is".into(), tokens: vec![9.into()] });
/// assert_eq!(answer.message().content, "Paris");
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PartialOutput {
    /// The text.
    pub text: String,
    /// What was thought.
    pub reasoning: String,
    /// The calls.
    pub tool_calls: Vec<ToolCall>,
    /// What began as a call and is none.
    pub malformed_tool_calls: Vec<String>,
    /// The tokens.
    pub tokens: Vec<TokenInfo>,
}

impl PartialOutput {
    /// Adds what an event carries, and gives the summary back that ends a stream.
    pub fn take(&mut self, event: GenerationEvent) -> Option<GenerateSummary> {
        let resolved = match event {
            GenerationEvent::Started { .. } => return None,
            GenerationEvent::Text { text, tokens } => {
                self.text.push_str(&text);
                tokens
            }
            GenerationEvent::Reasoning { text, tokens } => {
                self.reasoning.push_str(&text);
                tokens
            }
            GenerationEvent::ToolCall { call, tokens } => {
                self.tool_calls.push(call);
                tokens
            }
            GenerationEvent::MalformedToolCall { text, tokens } => {
                self.malformed_tool_calls.push(text);
                tokens
            }
            GenerationEvent::Finished(summary) => return Some(summary),
        };
        self.tokens.extend(resolved);
        None
    }

    /// Whether nothing was said, thought or called.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
            && self.reasoning.is_empty()
            && self.tool_calls.is_empty()
            && self.malformed_tool_calls.is_empty()
    }

    /// The answer so far as a message of the conversation. A call that is malformed is in its text, so that the model sees
    /// what it wrote.
    pub fn message(&self) -> ChatMessage {
        ChatMessage {
            tool_calls: self.tool_calls.clone(),
            reasoning_content: (!self.reasoning.is_empty()).then(|| self.reasoning.clone()),
            ..ChatMessage::assistant(self.text.clone() + &self.malformed_tool_calls.concat())
        }
    }

    /// The whole output. `logprobs` is `None` where no token has one.
    pub fn finish(self, summary: GenerateSummary) -> GenerateOutput {
        let ids = self.tokens.iter().map(|token| token.id).collect();
        let logprobs: Vec<_> = self
            .tokens
            .into_iter()
            .filter_map(|token| token.logprob)
            .collect();
        let GenerateSummary {
            model,
            backend,
            device,
            finish_reason,
            usage,
            timings,
            peak_memory_bytes,
            speculation,
        } = summary;
        GenerateOutput {
            model,
            backend,
            device,
            text: self.text,
            reasoning: (!self.reasoning.is_empty()).then_some(self.reasoning),
            tool_calls: self.tool_calls,
            malformed_tool_calls: self.malformed_tool_calls,
            tokens: ids,
            finish_reason,
            usage,
            timings,
            peak_memory_bytes,
            speculation,
            logprobs: (!logprobs.is_empty()).then_some(logprobs),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::TopLogprob;
    use crate::event::tests::summary;

    fn said(tokens: Vec<TokenInfo>) -> GenerateOutput {
        let mut answer = PartialOutput::default();
        let text = "hi".to_owned();
        assert_eq!(answer.take(GenerationEvent::Text { text, tokens }), None);
        answer.finish(summary())
    }

    #[test]
    fn an_output_is_written_with_these_names_and_in_this_order() {
        let output = said(vec![7.into(), 9.into()]);
        let json = serde_json::to_string(&output).unwrap();
        assert_eq!(
            json,
            r#"{"model":"tiny","backend":"mock","device":"cpu","text":"hi","tokens":[7,9],"finish_reason":"stop","#
                .to_owned()
                + r#""usage":{"prompt_tokens":3,"completion_tokens":2,"cached_tokens":1},"#
                + r#""timings":{"load_s":0.5,"ttft_s":0.25,"prompt_tps":8.0,"generation_tps":4.0},"#
                + r#""peak_memory_bytes":0}"#
        );
        assert_eq!(serde_json::from_str::<GenerateOutput>(&json).unwrap(), output);
    }

    #[test]
    fn logprobs_are_written_where_they_were_asked_for() {
        let top = vec![TopLogprob {
            token: 7,
            text: None,
            logprob: -0.5,
        }];
        let logprob = TokenLogprob {
            token: 7,
            text: Some("hi".to_owned()),
            logprob: -0.5,
            top,
        };
        let tokens = vec![TokenInfo {
            id: 7,
            logprob: Some(logprob),
        }];
        let output = said(tokens);
        let json = serde_json::to_value(&output).unwrap();
        assert_eq!(
            json["logprobs"],
            json!([{"token": 7, "text": "hi", "logprob": -0.5, "top": [{"token": 7, "logprob": -0.5}]}])
        );
        assert_eq!(serde_json::from_value::<GenerateOutput>(json).unwrap(), output);
    }

    #[test]
    fn any_part_of_an_answer_is_something() {
        let tokens = || vec![1.into()];
        let text = || "a".to_owned();
        let call = ToolCall::new("c1", "now", json!({}));
        for event in [
            GenerationEvent::Text {
                text: text(),
                tokens: tokens(),
            },
            GenerationEvent::Reasoning {
                text: text(),
                tokens: tokens(),
            },
            GenerationEvent::ToolCall {
                call,
                tokens: tokens(),
            },
            GenerationEvent::MalformedToolCall {
                text: text(),
                tokens: tokens(),
            },
        ] {
            assert_eq!(event.tokens(), tokens());
            let mut answer = PartialOutput::default();
            answer.take(event.clone());
            assert!(!answer.is_empty(), "{event:?}");
        }
        let mut answer = PartialOutput::default();
        let started = GenerationEvent::Started {
            prompt_tokens: 3,
            cached_tokens: 0,
        };
        assert!(started.tokens().is_empty());
        assert_eq!(answer.take(started), None);
        assert!(answer.is_empty());
    }

    #[test]
    fn an_answer_is_the_next_message_of_its_conversation() {
        let call = ToolCall::new("c1", "now", json!({}));
        let mut answer = PartialOutput::default();
        for event in [
            GenerationEvent::Reasoning {
                text: "hm".to_owned(),
                tokens: Vec::new(),
            },
            GenerationEvent::Text {
                text: "a".to_owned(),
                tokens: Vec::new(),
            },
            GenerationEvent::ToolCall {
                call: call.clone(),
                tokens: Vec::new(),
            },
        ] {
            answer.take(event);
        }
        let expect = ChatMessage {
            tool_calls: vec![call],
            ..ChatMessage::assistant("a").with_reasoning("hm")
        };
        assert_eq!(answer.message(), expect);
        assert_eq!(answer.clone().finish(summary()).message(), expect);
        answer.take(GenerationEvent::MalformedToolCall {
            text: "<call>{".to_owned(),
            tokens: Vec::new(),
        });
        assert_eq!(
            answer.message().content,
            "a<call>{",
            "the model sees what it wrote"
        );
        assert_eq!(answer.finish(summary()).malformed_tool_calls, ["<call>{"]);
        assert_eq!(PartialOutput::default().message(), ChatMessage::assistant(""));
    }

    #[test]
    fn the_parts_of_an_answer_are_kept_apart_and_go_into_the_next_message() {
        let mut answer = PartialOutput::default();
        assert!(answer.is_empty());
        let call = ToolCall::new("c1", "now", json!({}));
        for event in [
            GenerationEvent::Reasoning {
                text: "hm".to_owned(),
                tokens: vec![1.into()],
            },
            GenerationEvent::Text {
                text: "a".to_owned(),
                tokens: vec![2.into()],
            },
            GenerationEvent::ToolCall {
                call: call.clone(),
                tokens: vec![3.into(), 4.into()],
            },
        ] {
            assert_eq!(answer.take(event), None);
        }
        let summary = answer.take(GenerationEvent::Finished(summary())).unwrap();
        assert_eq!(answer.message().reasoning_content.as_deref(), Some("hm"));
        let output = answer.finish(summary);
        assert_eq!(
            (output.text.as_str(), output.tokens.as_slice()),
            ("a", &[1, 2, 3, 4][..])
        );
        assert_eq!(
            (output.reasoning.as_deref(), &output.tool_calls),
            (Some("hm"), &vec![call])
        );
        let json = serde_json::to_value(&output).unwrap();
        assert_eq!(
            json["tool_calls"],
            json!([{"id": "c1", "name": "now", "arguments": {}}])
        );
        assert_eq!(serde_json::from_value::<GenerateOutput>(json).unwrap(), output);
    }
}
