//! How calls are written in each format.

use crate::parser::ToolFormat;

/// How calls of a format are written around their names and arguments.
pub(super) struct Layout {
    /// Before the first call.
    pub(super) open: &'static str,
    /// Between two calls; none where there is one alone.
    pub(super) between: Option<&'static str>,
    /// After the last call.
    pub(super) close: &'static str,
    /// Before the name. [`NUMBER`] stands for the number of the call, here and before arguments.
    pub(super) begin: &'static str,
    pub(super) arguments: Arguments,
    /// After the arguments.
    pub(super) end: &'static str,
}

/// The place of a number, which is the model's to choose.
pub(super) const NUMBER: char = '\0';

pub(super) enum Arguments {
    /// JSON after this.
    Json(&'static str),
    /// Pairs: what stands before the first, before a name, before its value, after it, between two, and the quotes of strings.
    Pairs {
        head: &'static str,
        key: &'static str,
        value: &'static str,
        end: &'static str,
        between: &'static str,
        quote: Quote,
    },
}

#[derive(Clone, Copy)]
pub(super) enum Quote {
    /// Strings stand as they are, up to the end of the value.
    None,
    /// Strings stand between these marks.
    Marks(&'static str, &'static str),
    /// Strings stand as they are, and a mark before each value says whether it is one.
    Told,
    /// Strings are JSON.
    Json,
}

const fn json(begin: &'static str, middle: &'static str, end: &'static str) -> Layout {
    Layout {
        open: "",
        between: None,
        close: "",
        begin,
        arguments: Arguments::Json(middle),
        end,
    }
}

const XML: Arguments = Arguments::Pairs {
    head: ">\n",
    key: "<parameter=",
    value: ">\n",
    end: "\n</parameter>\n",
    between: "",
    quote: Quote::None,
};

/// Calls whose name and parameters are attributes, on lines of their own.
const fn invoke(begin: &'static str, arguments: Arguments, end: &'static str) -> Layout {
    Layout {
        between: Some("\n"),
        arguments,
        ..json(begin, "", end)
    }
}

const fn dsml(open: &'static str, close: &'static str) -> Layout {
    let arguments = Arguments::Pairs {
        head: "\">\n",
        key: "<｜DSML｜parameter name=\"",
        value: "\" string=\"",
        end: "</｜DSML｜parameter>\n",
        between: "",
        quote: Quote::Told,
    };
    Layout {
        open,
        close,
        ..invoke("<｜DSML｜invoke name=\"", arguments, "</｜DSML｜invoke>")
    }
}

const fn gemma(begin: &'static str, end: &'static str, quote: &'static str) -> Layout {
    Layout {
        open: "",
        between: Some(""),
        close: "",
        begin,
        arguments: Arguments::Pairs {
            head: "{",
            key: "",
            value: ":",
            end: "",
            between: ",",
            quote: Quote::Marks(quote, quote),
        },
        end,
    }
}

/// The layout of a format; none for those whose calls have no one form.
pub(super) fn layout(format: ToolFormat) -> Option<Layout> {
    let name_arguments = "\", \"arguments\": ";
    Some(match format {
        ToolFormat::Hermes => Layout {
            between: Some("\n"),
            ..json("<tool_call>\n{\"name\": \"", name_arguments, "}\n</tool_call>")
        },
        ToolFormat::Llama3Json => Layout {
            between: Some("; "),
            ..json("{\"name\": \"", "\", \"parameters\": ", "}")
        },
        ToolFormat::Mistral => Layout {
            open: "[TOOL_CALLS][",
            between: Some(", "),
            close: "]",
            ..json("{\"name\": \"", name_arguments, "}")
        },
        ToolFormat::MistralArgs => Layout {
            between: Some(""),
            ..json("[TOOL_CALLS]", "[ARGS]", "")
        },
        ToolFormat::DeepSeek => Layout {
            open: "<｜tool▁calls▁begin｜>",
            between: Some("\n"),
            close: "<｜tool▁calls▁end｜>",
            ..json(
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                "\n```json\n",
                "\n```<｜tool▁call▁end｜>",
            )
        },
        ToolFormat::DeepSeek31 => Layout {
            open: "<｜tool▁calls▁begin｜>",
            between: Some(""),
            close: "<｜tool▁calls▁end｜>",
            ..json("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
        },
        ToolFormat::DeepSeek32 => dsml("<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>"),
        ToolFormat::DeepSeek4 => dsml("<｜DSML｜tool_calls>\n", "\n</｜DSML｜tool_calls>"),
        ToolFormat::MiniMax => Layout {
            open: "<minimax:tool_call>\n",
            close: "\n</minimax:tool_call>",
            ..invoke(
                "<invoke name=\"",
                Arguments::Pairs {
                    head: "\">\n",
                    key: "<parameter name=\"",
                    value: "\">",
                    end: "</parameter>\n",
                    between: "",
                    quote: Quote::None,
                },
                "</invoke>",
            )
        },
        // Any string may stand in a section of character data, and none else may have the marks.
        ToolFormat::MiniCpm => invoke(
            "<function name=\"",
            Arguments::Pairs {
                head: "\">",
                key: "<param name=\"",
                value: "\">",
                end: "</param>",
                between: "",
                quote: Quote::Marks("<![CDATA[", "]]>"),
            },
            "</function>",
        ),
        ToolFormat::Cohere => Layout {
            open: "<|START_ACTION|>[\n    ",
            between: Some(",\n    "),
            close: "\n]<|END_ACTION|>",
            ..json(
                "{\"tool_call_id\": \"\0\", \"tool_name\": \"",
                "\", \"parameters\": ",
                "}",
            )
        },
        ToolFormat::Apertus => Layout {
            open: "<|tools_prefix|>[",
            between: Some(", "),
            close: "]<|tools_suffix|>",
            ..json("{\"", "\": ", "}")
        },
        // The template writes one.
        ToolFormat::GigaChat => json("<|function_call|>{\"name\": \"", name_arguments, "}"),
        ToolFormat::JsonList => Layout {
            open: "<tool_calls>[",
            between: Some(", "),
            close: "]</tool_calls>",
            ..json("{\"name\": \"", name_arguments, "}")
        },
        ToolFormat::JsonLines => Layout {
            open: "<tool_calls>\n",
            between: Some("\n"),
            close: "\n</tool_calls>",
            ..json("{\"name\": \"", name_arguments, "}")
        },
        ToolFormat::Nemotron => Layout {
            open: "<TOOLCALL>[",
            between: Some(", "),
            close: "]</TOOLCALL>",
            ..json("{\"name\": \"", name_arguments, "}")
        },
        ToolFormat::Kimi => Layout {
            open: "<|tool_calls_section_begin|>",
            between: Some(""),
            close: "<|tool_calls_section_end|>",
            ..json(
                "<|tool_call_begin|>functions.",
                ":\0<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
            )
        },
        // The mark that ends a call ends the answer, so that there is one.
        ToolFormat::Harmony => json(
            "<|channel|>commentary to=functions.",
            " <|constrain|>json<|message|>",
            "",
        ),
        ToolFormat::Qwen3Coder => Layout {
            between: Some("\n"),
            arguments: XML,
            ..json("<tool_call>\n<function=", "", "</function>\n</tool_call>")
        },
        ToolFormat::Seed => Layout {
            between: Some("\n"),
            arguments: XML,
            ..json(
                "<seed:tool_call>\n<function=",
                "",
                "</function>\n</seed:tool_call>",
            )
        },
        ToolFormat::FunctionJson => Layout {
            between: Some(""),
            ..json("<function=", ">", "</function>")
        },
        ToolFormat::Glm => Layout {
            between: Some("\n"),
            arguments: Arguments::Pairs {
                head: "\n",
                key: "<arg_key>",
                value: "</arg_key>\n<arg_value>",
                end: "</arg_value>\n",
                between: "",
                quote: Quote::None,
            },
            ..json("<tool_call>", "", "</tool_call>")
        },
        ToolFormat::Gemma => gemma("<start_function_call>call:", "}<end_function_call>", "<escape>"),
        ToolFormat::Gemma4 => gemma("<|tool_call>call:", "}<tool_call|>", "<|\"|>"),
        ToolFormat::Pythonic | ToolFormat::Lfm2 => {
            let (open, close) = if format == ToolFormat::Lfm2 {
                ("<|tool_call_start|>[", "]<|tool_call_end|>")
            } else {
                ("[", "]")
            };
            Layout {
                open,
                between: Some(", "),
                close,
                arguments: Arguments::Pairs {
                    head: "(",
                    key: "",
                    value: "=",
                    end: "",
                    between: ", ",
                    quote: Quote::Json,
                },
                ..json("", "", ")")
            }
        }
        ToolFormat::Plain => return None,
    })
}

/// What a call begins with in any case, and free text does not have.
pub(super) fn first_mark(format: ToolFormat) -> &'static str {
    match format {
        ToolFormat::Hermes | ToolFormat::Qwen3Coder | ToolFormat::Glm => "<tool_call>",
        ToolFormat::Seed => "<seed:tool_call>",
        ToolFormat::FunctionJson => "<function=",
        ToolFormat::Mistral | ToolFormat::MistralArgs => "[TOOL_CALLS]",
        ToolFormat::DeepSeek | ToolFormat::DeepSeek31 => "<｜tool▁calls▁begin｜>",
        ToolFormat::DeepSeek32 => "<｜DSML｜function_calls>",
        ToolFormat::DeepSeek4 => "<｜DSML｜tool_calls>",
        ToolFormat::MiniMax => "<minimax:tool_call>",
        ToolFormat::MiniCpm => "<function name=\"",
        ToolFormat::Cohere => "<|START_ACTION|>",
        ToolFormat::Apertus => "<|tools_prefix|>",
        ToolFormat::GigaChat => "<|function_call|>",
        ToolFormat::JsonList | ToolFormat::JsonLines => "<tool_calls>",
        ToolFormat::Nemotron => "<TOOLCALL>",
        ToolFormat::Kimi => "<|tool_calls_section_begin|>",
        ToolFormat::Gemma => "<start_function_call>",
        ToolFormat::Gemma4 => "<|tool_call>",
        ToolFormat::Lfm2 => "<|tool_call_start|>",
        ToolFormat::Harmony => "<|channel|>commentary to=",
        ToolFormat::Plain | ToolFormat::Llama3Json | ToolFormat::Pythonic => "",
    }
}
