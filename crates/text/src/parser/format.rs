//! The formats as data.

use super::body::{self, Read};

/// How a model writes tool calls and reasoning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToolFormat {
    /// Reasoning alone, no tools.
    #[default]
    Plain,
    /// JSON between `<tool_call>` and `</tool_call>`: Hermes, Qwen.
    Hermes,
    /// An answer that is JSON with `name` and `parameters`: Llama 3.
    Llama3Json,
    /// An answer that is a list of Python calls: Llama 4 and others.
    Pythonic,
    /// `[TOOL_CALLS]`: Mistral.
    Mistral,
    /// `<｜tool▁calls▁begin｜>`: DeepSeek V3 and R1.
    DeepSeek,
    /// `<function=name>` and `<parameter=name>`: Qwen3-Coder.
    Qwen3Coder,
    /// `<arg_key>` and `<arg_value>`: GLM 4.5.
    Glm,
    /// `<start_function_call>`: FunctionGemma.
    Gemma,
    /// Channels: gpt-oss.
    Harmony,
}

/// What a mark does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    /// It is no part of the text.
    Drop,
    /// It opens reasoning.
    Reasoning,
    /// It opens calls, which this reads.
    Call(Read),
}

/// A mark in the text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    pub(super) open: &'static str,
    /// What ends it; the end of the answer where there is none.
    pub(super) close: Option<&'static str>,
    pub(super) action: Action,
    /// Whether it counts at the beginning of an answer alone, and belongs to the body.
    pub(super) only_first: bool,
}

impl Mark {
    /// What is shown of the mark where its call is none.
    pub(super) fn shown(&self) -> &'static str {
        self.open
    }
}

const fn mark(open: &'static str, close: Option<&'static str>, action: Action) -> Mark {
    Mark {
        open,
        close,
        action,
        only_first: false,
    }
}

const fn call(open: &'static str, close: &'static str, read: Read) -> Mark {
    mark(open, Some(close), Action::Call(read))
}

const fn first(open: &'static str, read: Read) -> Mark {
    Mark {
        open,
        close: None,
        action: Action::Call(read),
        only_first: true,
    }
}

const THINK: Mark = mark("<think>", Some("</think>"), Action::Reasoning);
const TOOL_CALL: (&str, &str) = ("<tool_call>", "</tool_call>");

impl ToolFormat {
    /// The format that a chat template writes calls in.
    pub fn detect(template: &str) -> Self {
        const SIGNS: &[(&str, ToolFormat)] = &[
            ("<|channel|>", ToolFormat::Harmony),
            ("<function=", ToolFormat::Qwen3Coder),
            ("<arg_key>", ToolFormat::Glm),
            ("<start_function_call>", ToolFormat::Gemma),
            ("<｜tool▁calls▁begin｜>", ToolFormat::DeepSeek),
            ("[TOOL_CALLS]", ToolFormat::Mistral),
            ("<tool_call>", ToolFormat::Hermes),
            ("<|python_start|>", ToolFormat::Pythonic),
            ("[func_name1(", ToolFormat::Pythonic),
            ("<|python_tag|>", ToolFormat::Llama3Json),
            ("\"parameters\": dictionary", ToolFormat::Llama3Json),
        ];
        let found = SIGNS.iter().find(|(sign, _)| template.contains(sign));
        found.map_or(Self::Plain, |(_, format)| *format)
    }

    pub(super) fn marks(self) -> &'static [Mark] {
        match self {
            Self::Plain => const { &[THINK] },
            Self::Hermes => const { &[THINK, call(TOOL_CALL.0, TOOL_CALL.1, body::json)] },
            Self::Qwen3Coder => const { &[THINK, call(TOOL_CALL.0, TOOL_CALL.1, body::qwen3_coder)] },
            Self::Glm => const { &[THINK, call(TOOL_CALL.0, TOOL_CALL.1, body::glm)] },
            Self::Llama3Json => {
                const {
                    &[
                        THINK,
                        first("{", body::json),
                        mark("<|python_tag|>", None, Action::Call(body::json)),
                    ]
                }
            }
            Self::Pythonic => {
                const {
                    &[
                        THINK,
                        first("[", body::python),
                        call("<|python_start|>", "<|python_end|>", body::python),
                    ]
                }
            }
            Self::Mistral => {
                const {
                    &[
                        THINK,
                        mark("[THINK]", Some("[/THINK]"), Action::Reasoning),
                        mark("[TOOL_CALLS]", None, Action::Call(body::mistral)),
                    ]
                }
            }
            Self::DeepSeek => {
                const {
                    &[
                        THINK,
                        call("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", body::deepseek),
                    ]
                }
            }
            Self::Gemma => {
                const {
                    &[
                        THINK,
                        call("<start_function_call>", "<end_function_call>", body::gemma),
                    ]
                }
            }
            Self::Harmony => {
                const {
                    &[
                        mark(
                            "<|channel|>analysis<|message|>",
                            Some("<|end|>"),
                            Action::Reasoning,
                        ),
                        mark("<|channel|>final<|message|>", None, Action::Drop),
                        mark("<|channel|>commentary<|message|>", None, Action::Drop),
                        call("<|channel|>commentary to=functions.", "<|call|>", body::harmony),
                        mark("<|start|>assistant", None, Action::Drop),
                        mark("<|end|>", None, Action::Drop),
                        mark("<|return|>", None, Action::Drop),
                    ]
                }
            }
        }
    }
}
