//! Tools on the command line: their definitions from a file, calls as lines of JSON.

use mlx_engine::{GenerateParams, GenerationEvent, ToolCall, ToolDefinition};
use serde_json::json;

use crate::args::Tools;
use crate::failure::Failure;
use crate::input;
use crate::output::{errln, outln};

/// The definitions of the file, if one was named.
pub(crate) fn read(args: &Tools) -> Result<Vec<ToolDefinition>, Failure> {
    let Some(path) = &args.tools else {
        return Ok(Vec::new());
    };
    let tools: Vec<ToolDefinition> = serde_json::from_str(&input::file(path)?)
        .map_err(|error| Failure::other(format!("`{}` is no JSON list of tools: {error}", path.display())))?;
    if tools.is_empty() {
        return Err(Failure::other(format!("`{}` has no tools", path.display())));
    }
    Ok(tools)
}

/// The parameters with what was asked for.
pub(crate) fn params(args: &Tools, mut params: GenerateParams) -> GenerateParams {
    params.tool_choice = args.tool_choice.clone();
    params.tool_format.clone_from(&args.tool_format);
    params.thinking_budget = args.thinking_budget;
    params
}

/// Prints a part of an answer that is no text: calls to stdout, a line each, thoughts and what is no call to stderr.
pub(crate) fn show(event: &GenerationEvent) -> Result<(), Failure> {
    match event {
        GenerationEvent::ToolCall { call, .. } => outln!("{}", line(call)),
        GenerationEvent::Reasoning { text, .. } => {
            use std::io::Write as _;
            // Where stderr cannot be written there is nobody to tell.
            let _ = write!(std::io::stderr().lock(), "{text}");
        }
        GenerationEvent::MalformedToolCall { text, .. } => errln!("\n[no call: {text}]"),
        _ => {}
    }
    Ok(())
}

fn line(call: &ToolCall) -> String {
    json!({"id": call.id, "name": call.name, "arguments": call.arguments}).to_string()
}
