//! How an answer is taken apart, and what it is held to.

use mlx_engine_core::{
    EngineError, GenerateParams, OutputConstraint, ParamError, Prompt, ToolChoice, ToolDefinition,
};
use mlx_engine_text::{OutputParser, Tool, ToolFormat};

use crate::PromptEncoder;
use crate::constraint::{Calls, after_thoughts, of_calls};

/// What is known of an answer before it begins.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Tells text, thoughts and calls apart; none where all is text.
    pub(crate) parser: Option<OutputParser>,
    /// What it has to keep to.
    pub(crate) constraint: Option<OutputConstraint>,
}

/// Plans the answer to a prompt, which has become this text.
pub(crate) fn plan(
    encoder: &PromptEncoder,
    prompt: &Prompt,
    text: Option<&str>,
    params: &GenerateParams,
) -> Result<Plan, EngineError> {
    let named = named_format(params)?;
    let format = named.unwrap_or_else(|| encoder.tool_format());
    let tools = offered(prompt, params, format)?;
    let parsed = matches!(prompt, Prompt::Chat { .. }) || named.is_some();
    if !parsed || tools.is_empty() && !params.separate_reasoning {
        if let Some(budget) = params.thinking_budget {
            let allowed =
                "none for text and tokens without a `tool_format`, where thoughts are not told from text";
            return Err(ParamError::new("thinking_budget", budget, allowed).into());
        }
        let constraint = params.constraint.clone();
        return Ok(Plan {
            parser: None,
            constraint,
        });
    }
    let mut parser = OutputParser::new(format, &tools);
    if !params.separate_reasoning {
        parser = parser.without_reasoning();
    }
    let parser = parser.after_prompt(text.unwrap_or_default());
    let constraint = constraint(encoder, prompt, params, &parser, &tools)?;
    Ok(Plan {
        parser: Some(parser),
        constraint,
    })
}

/// The format that the caller named.
pub(crate) fn named_format(params: &GenerateParams) -> Result<Option<ToolFormat>, EngineError> {
    let Some(name) = &params.tool_format else {
        return Ok(None);
    };
    let format = name.parse::<ToolFormat>();
    let refused = |error| ParamError::new("tool_format", format_args!("\"{name}\""), error);
    Ok(Some(format.map_err(refused)?))
}

/// The tools that the model may call.
fn offered(prompt: &Prompt, params: &GenerateParams, format: ToolFormat) -> Result<Vec<Tool>, EngineError> {
    let choice = &params.tool_choice;
    let tools: Vec<Tool> = prompt
        .tools()
        .iter()
        .filter(|_| *choice != ToolChoice::None)
        .map(|tool| Tool {
            name: tool.name().to_owned(),
            parameters: tool.parameters(),
        })
        .collect();
    match choice {
        ToolChoice::Required if tools.is_empty() => {
            let allowed = "`auto` or `none` where the prompt offers no tools";
            return Err(ParamError::new("tool_choice", choice, allowed).into());
        }
        ToolChoice::Function(name) if tools.iter().all(|tool| tool.name != *name) => {
            let names: Vec<&str> = tools.iter().map(|tool| tool.name.as_str()).collect();
            let allowed = format_args!("the name of a tool on offer ({})", names.join(", "));
            return Err(ParamError::new("tool_choice", choice, allowed).into());
        }
        _ => {}
    }
    if !tools.is_empty() && format == ToolFormat::Plain {
        let allowed = "the name of a format: the model's template writes calls in none that is known";
        return Err(ParamError::new("tool_format", "not given", allowed).into());
    }
    Ok(tools)
}

/// What the answer has to keep to: the caller's constraint, or the grammar of calls where they are required or a tool is
/// strict.
fn constraint(
    encoder: &PromptEncoder,
    prompt: &Prompt,
    params: &GenerateParams,
    parser: &OutputParser,
    tools: &[Tool],
) -> Result<Option<OutputConstraint>, EngineError> {
    let tokenizer = encoder.tokenizer();
    if let Some(constraint) = &params.constraint {
        if !tools.is_empty() {
            let allowed = "none while tools are on offer; `tool_choice` `none` leaves them out";
            return Err(ParamError::new("constraint", "set", allowed).into());
        }
        let constraint = if parser.is_reasoning() {
            after_thoughts(constraint, parser.format(), tokenizer)?
        } else {
            constraint.clone()
        };
        return Ok(Some(constraint));
    }
    let one: Vec<Tool>;
    let (tools, required) = match &params.tool_choice {
        ToolChoice::Function(name) => {
            one = tools.iter().filter(|tool| tool.name == *name).cloned().collect();
            (&one[..], true)
        }
        ToolChoice::Required => (tools, true),
        ToolChoice::Auto if !tools.is_empty() && prompt.tools().iter().any(ToolDefinition::is_strict) => {
            (tools, false)
        }
        _ => return Ok(None),
    };
    let calls = Calls {
        format: parser.format(),
        tools,
        required,
        parallel: params.parallel_tool_calls,
        opened: parser.is_reasoning(),
        thinks: params.separate_reasoning && encoder.thinks(parser.format()),
    };
    of_calls(&calls, tokenizer).map(Some)
}
