//! The formats as data.

use std::fmt;
use std::str::FromStr;

use super::body::{self, Read};
use super::harmony;
use crate::TextError;

/// How a model writes tool calls and reasoning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ToolFormat {
    /// Reasoning alone, no tools.
    #[default]
    Plain,
    /// JSON between `<tool_call>` and `</tool_call>`: Hermes, Qwen, Granite 4.
    Hermes,
    /// A list in JSON between `<tool_calls>` and `</tool_calls>`: Apriel.
    JsonList,
    /// Lines of JSON between `<tool_calls>` and `</tool_calls>`: MiniMax M1.
    JsonLines,
    /// A list in JSON between `<TOOLCALL>` and `</TOOLCALL>`: Nemotron Nano 2.
    Nemotron,
    /// An answer that is JSON with `name` and `parameters`: Llama 3.
    Llama3Json,
    /// An answer that is a list of Python calls: Llama 4.
    Pythonic,
    /// A list of Python calls between `<|tool_call_start|>` and `<|tool_call_end|>`: LFM2.
    Lfm2,
    /// `[TOOL_CALLS]` and a list in JSON: Mistral until 2024.
    Mistral,
    /// `[TOOL_CALLS]name[ARGS]`: Mistral since 2025.
    MistralArgs,
    /// `<｜tool▁calls▁begin｜>` with the arguments as a block of code: DeepSeek V3 and R1.
    DeepSeek,
    /// `<｜tool▁calls▁begin｜>` with the arguments as they are: DeepSeek V3.1.
    DeepSeek31,
    /// `<｜DSML｜function_calls>` with parameters that say whether they are strings: DeepSeek V3.2.
    DeepSeek32,
    /// As DeepSeek V3.2, between `<｜DSML｜tool_calls>` and its end: DeepSeek V4.
    DeepSeek4,
    /// `<invoke name="…">` and `<parameter name="…">` between `<minimax:tool_call>` and its end: MiniMax M2.
    MiniMax,
    /// `<function name="…">` and `<param name="…">`: MiniCPM5.
    MiniCpm,
    /// A list in JSON between `<|START_ACTION|>` and `<|END_ACTION|>`: Cohere Command R7B and later.
    Cohere,
    /// A list of objects from name to arguments between `<|tools_prefix|>` and `<|tools_suffix|>`: Apertus.
    Apertus,
    /// `<|function_call|>` and an object: GigaChat 3.1.
    GigaChat,
    /// `<function=name>` and `<parameter=name>`: Qwen3-Coder, Qwen3.5, Nemotron 3.
    Qwen3Coder,
    /// As Qwen3-Coder, between `<seed:tool_call>` and `</seed:tool_call>`: Seed-OSS.
    Seed,
    /// `<function=name>` and an object: Functionary 3.1.
    FunctionJson,
    /// `<arg_key>` and `<arg_value>`: GLM 4.5 and later.
    Glm,
    /// `<start_function_call>call:name{…}`: FunctionGemma.
    Gemma,
    /// `<|tool_call>call:name{…}`: Gemma 4.
    Gemma4,
    /// `<|tool_call_begin|>functions.name:0`: Kimi K2.
    Kimi,
    /// Channels: gpt-oss.
    Harmony,
}

impl ToolFormat {
    /// Every format.
    pub const ALL: [Self; 27] = [
        Self::Plain,
        Self::Hermes,
        Self::JsonList,
        Self::JsonLines,
        Self::Nemotron,
        Self::Llama3Json,
        Self::Pythonic,
        Self::Lfm2,
        Self::Mistral,
        Self::MistralArgs,
        Self::DeepSeek,
        Self::DeepSeek31,
        Self::DeepSeek32,
        Self::DeepSeek4,
        Self::MiniMax,
        Self::MiniCpm,
        Self::Cohere,
        Self::Apertus,
        Self::GigaChat,
        Self::Qwen3Coder,
        Self::Seed,
        Self::FunctionJson,
        Self::Glm,
        Self::Gemma,
        Self::Gemma4,
        Self::Kimi,
        Self::Harmony,
    ];

    /// The name, as a caller gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Hermes => "hermes",
            Self::JsonList => "json-list",
            Self::JsonLines => "json-lines",
            Self::Nemotron => "nemotron",
            Self::Llama3Json => "llama3-json",
            Self::Pythonic => "pythonic",
            Self::Lfm2 => "lfm2",
            Self::Mistral => "mistral",
            Self::MistralArgs => "mistral-args",
            Self::DeepSeek => "deepseek",
            Self::DeepSeek31 => "deepseek-3.1",
            Self::DeepSeek32 => "deepseek-3.2",
            Self::DeepSeek4 => "deepseek-4",
            Self::MiniMax => "minimax",
            Self::MiniCpm => "minicpm",
            Self::Cohere => "cohere",
            Self::Apertus => "apertus",
            Self::GigaChat => "gigachat",
            Self::Qwen3Coder => "qwen3-coder",
            Self::Seed => "seed",
            Self::FunctionJson => "function-json",
            Self::Glm => "glm",
            Self::Gemma => "gemma",
            Self::Gemma4 => "gemma4",
            Self::Kimi => "kimi",
            Self::Harmony => "harmony",
        }
    }
}

impl fmt::Display for ToolFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ToolFormat {
    type Err = TextError;

    fn from_str(name: &str) -> Result<Self, TextError> {
        let found = Self::ALL.into_iter().find(|known| known.name() == name);
        found.ok_or_else(|| TextError::ToolFormat {
            name: name.to_owned(),
            known: Self::ALL.map(Self::name).join(", "),
        })
    }
}

/// What a mark does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    /// It is no part of the text.
    Drop,
    /// It stands around the text of an answer, also where thoughts are text.
    Frame,
    /// It opens reasoning.
    Reasoning,
    /// It opens calls, which this reads.
    Call(Read),
    /// It opens a message whose head says what it is.
    Head,
}

/// Where a mark counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Anywhere,
    /// At the beginning of an answer, before anything but white space.
    First,
}

/// A mark in the text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    pub(super) open: &'static str,
    /// What ends it; the end of the answer or the next such mark where there is none.
    pub(super) close: Option<&'static str>,
    pub(super) action: Action,
    pub(super) place: Place,
    /// Whether the mark belongs to the body, which is text where it is no call.
    pub(super) kept: bool,
    /// Whether it counts only where there are tools.
    pub(super) of_calls: bool,
}

const fn mark(open: &'static str, close: Option<&'static str>, action: Action) -> Mark {
    Mark {
        open,
        close,
        action,
        place: Place::Anywhere,
        kept: false,
        of_calls: true,
    }
}

const fn call(open: &'static str, close: &'static str, read: Read) -> Mark {
    mark(open, Some(close), Action::Call(read))
}

const fn drop(open: &'static str) -> Mark {
    mark(open, None, Action::Drop)
}

/// An answer that is a call as a whole.
const fn whole(open: &'static str, read: Read) -> Mark {
    Mark {
        place: Place::First,
        kept: true,
        ..mark(open, None, Action::Call(read))
    }
}

const fn think(open: &'static str, close: &'static str) -> Mark {
    Mark {
        place: Place::First,
        of_calls: false,
        ..mark(open, Some(close), Action::Reasoning)
    }
}

/// The end of an empty block of reasoning that the prompt has opened and the model closes again.
const fn unthought(close: &'static str) -> Mark {
    Mark {
        place: Place::First,
        of_calls: false,
        ..drop(close)
    }
}

/// A mark of thoughts that stands where it has no meaning.
const fn stray(open: &'static str) -> Mark {
    Mark {
        of_calls: false,
        ..drop(open)
    }
}

/// A mark around the text of an answer.
const fn frame(open: &'static str) -> Mark {
    Mark {
        of_calls: false,
        ..mark(open, None, Action::Frame)
    }
}

const THINK: Mark = think("<think>", "</think>");
const UNTHOUGHT: Mark = unthought("</think>");
const TOOL_CALL: (&str, &str) = ("<tool_call>", "</tool_call>");

impl ToolFormat {
    /// The format that a chat template writes calls in; [`Plain`](Self::Plain) where it writes none that is known here.
    pub fn detect(template: &str) -> Self {
        // Some formats are others with more to them, so the order counts.
        const SIGNS: &[(&[&str], ToolFormat)] = &[
            (&["<|channel|>"], ToolFormat::Harmony),
            (&["]<]minimax[>["], ToolFormat::Plain),
            (&["<minimax:tool_call>"], ToolFormat::MiniMax),
            (&["｜DSML｜", "function_calls>"], ToolFormat::DeepSeek32),
            (&["｜DSML｜", "tool_calls>"], ToolFormat::DeepSeek4),
            (&["<function name="], ToolFormat::MiniCpm),
            (&["<|START_ACTION|>"], ToolFormat::Cohere),
            (&["<|tools_prefix|>"], ToolFormat::Apertus),
            (&["<|function_call|>"], ToolFormat::GigaChat),
            (
                &["<function=", "{start_tag}={function_name}"],
                ToolFormat::FunctionJson,
            ),
            (&["seed:tool_call"], ToolFormat::Seed),
            (&["<function="], ToolFormat::Qwen3Coder),
            (&["<arg_key>"], ToolFormat::Glm),
            (&["<start_function_call>"], ToolFormat::Gemma),
            (&["<|tool_call>"], ToolFormat::Gemma4),
            (&["<|tool_call_argument_begin|>"], ToolFormat::Kimi),
            (&["<｜tool▁calls▁begin｜>", "```json"], ToolFormat::DeepSeek),
            (&["<｜tool▁calls▁begin｜>"], ToolFormat::DeepSeek31),
            (&["[TOOL_CALLS]", "[ARGS]"], ToolFormat::MistralArgs),
            (&["[TOOL_CALLS]"], ToolFormat::Mistral),
            (&["<tool_calls>["], ToolFormat::JsonList),
            (&["<tool_call>"], ToolFormat::Hermes),
            (&["<|python_start|>"], ToolFormat::Pythonic),
            (&["<|tool_call_start|>"], ToolFormat::Lfm2),
            (&["[func_name1("], ToolFormat::Pythonic),
            (&["<|python_tag|>"], ToolFormat::Llama3Json),
            (&["\"parameters\": dictionary"], ToolFormat::Llama3Json),
            (&["<tool_calls>"], ToolFormat::JsonLines),
            (&["<TOOLCALL>"], ToolFormat::Nemotron),
        ];
        let has = |signs: &[&str]| signs.iter().all(|sign| template.contains(sign));
        let found = SIGNS.iter().find(|(signs, _)| has(signs));
        found.map_or(Self::Plain, |(_, format)| *format)
    }

    /// Whether a special token is a part of this format, and has to be written out for the parser.
    pub fn has_special(self, text: &str) -> bool {
        const HARMONY: [&str; 7] = [
            "<|start|>",
            "<|channel|>",
            "<|message|>",
            "<|constrain|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
        ];
        const INSIDE: [&str; 14] = [
            "<param",
            "</param>",
            "<![CDATA[",
            "]]>",
            "<escape>",
            "<|\"|>",
            "[ARGS]",
            "[CALL_ID]",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ];
        if text.is_empty() {
            return false;
        }
        if self == Self::Harmony {
            return HARMONY.contains(&text);
        }
        let of_mark =
            |mark: &Mark| mark.open.contains(text) || mark.close.is_some_and(|close| close.contains(text));
        INSIDE.contains(&text) || self.marks().iter().any(of_mark)
    }

    /// The marks that open thoughts.
    pub fn thought_marks(self) -> impl Iterator<Item = &'static str> {
        let thoughts = self
            .marks()
            .iter()
            .filter(|mark| matches!(mark.action, Action::Reasoning));
        thoughts
            .map(|mark| mark.open)
            .chain((self == Self::Harmony).then_some("<|channel|>analysis"))
    }

    pub(super) fn marks(self) -> &'static [Mark] {
        match self {
            Self::Plain => const { &[THINK, UNTHOUGHT] },
            Self::Hermes => const { &[THINK, UNTHOUGHT, call(TOOL_CALL.0, TOOL_CALL.1, body::json)] },
            Self::JsonList | Self::JsonLines | Self::Nemotron => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        call("<tool_calls>", "</tool_calls>", body::json),
                        call("<TOOLCALL>", "</TOOLCALL>", body::json),
                    ]
                }
            }
            Self::Qwen3Coder => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        // Some models leave the outer marks out.
                        drop(TOOL_CALL.0),
                        drop(TOOL_CALL.1),
                        call("<function=", "</function>", body::qwen3_coder),
                    ]
                }
            }
            Self::Seed => {
                const {
                    &[
                        think("<seed:think>", "</seed:think>"),
                        unthought("</seed:think>"),
                        drop("<seed:tool_call>"),
                        drop("</seed:tool_call>"),
                        call("<function=", "</function>", body::qwen3_coder),
                    ]
                }
            }
            Self::FunctionJson => const { &[call("<function=", "</function>", body::function_json)] },
            Self::Glm => const { &[THINK, UNTHOUGHT, call(TOOL_CALL.0, TOOL_CALL.1, body::glm)] },
            Self::Llama3Json => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        whole("{", body::json),
                        mark("<|python_tag|>", None, Action::Call(body::json)),
                    ]
                }
            }
            Self::Pythonic => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        whole("[", body::python),
                        call("<|python_start|>", "<|python_end|>", body::python),
                    ]
                }
            }
            Self::Lfm2 => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        call("<|tool_call_start|>", "<|tool_call_end|>", body::python),
                    ]
                }
            }
            Self::Mistral | Self::MistralArgs => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        think("[THINK]", "[/THINK]"),
                        mark("[TOOL_CALLS]", None, Action::Call(body::mistral)),
                    ]
                }
            }
            Self::DeepSeek | Self::DeepSeek31 => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        call("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", body::deepseek),
                    ]
                }
            }
            Self::DeepSeek32 | Self::DeepSeek4 => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        call(
                            "<｜DSML｜function_calls>",
                            "</｜DSML｜function_calls>",
                            body::dsml,
                        ),
                        call("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", body::dsml),
                    ]
                }
            }
            Self::MiniMax => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        call("<minimax:tool_call>", "</minimax:tool_call>", body::minimax),
                    ]
                }
            }
            Self::MiniCpm => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        call("<function name=\"", "</function>", body::minicpm),
                    ]
                }
            }
            Self::Cohere => {
                const {
                    &[
                        think("<|START_THINKING|>", "<|END_THINKING|>"),
                        unthought("<|END_THINKING|>"),
                        // Command R7B's, and Command A's.
                        frame("<|START_RESPONSE|>"),
                        frame("<|END_RESPONSE|>"),
                        frame("<|START_TEXT|>"),
                        frame("<|END_TEXT|>"),
                        call("<|START_ACTION|>", "<|END_ACTION|>", body::json),
                    ]
                }
            }
            Self::Apertus => {
                const {
                    &[
                        think("<|inner_prefix|>", "<|inner_suffix|>"),
                        unthought("<|inner_suffix|>"),
                        call("<|tools_prefix|>", "<|tools_suffix|>", body::named),
                    ]
                }
            }
            Self::GigaChat => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        mark("<|function_call|>", None, Action::Call(body::json)),
                    ]
                }
            }
            Self::Gemma => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        call("<start_function_call>", "<end_function_call>", body::gemma),
                    ]
                }
            }
            Self::Gemma4 => {
                const {
                    &[
                        Mark {
                            place: Place::Anywhere,
                            ..think("<|channel>thought", "<channel|>")
                        },
                        stray("<|channel>"),
                        stray("<channel|>"),
                        call("<|tool_call>", "<tool_call|>", body::gemma),
                    ]
                }
            }
            Self::Kimi => {
                const {
                    &[
                        THINK,
                        UNTHOUGHT,
                        drop("<|tool_calls_section_begin|>"),
                        drop("<|tool_calls_section_end|>"),
                        call("<|tool_call_begin|>", "<|tool_call_end|>", body::kimi),
                    ]
                }
            }
            Self::Harmony => harmony::MARKS,
        }
    }
}
