//! Tools for a model whose template knows none: described in the system prompt, in the format of Hermes.

use mlx_engine_core::{ChatMessage, Role, ToolDefinition};
use serde_json::json;

/// The conversation with the tools, the calls and their results as text.
pub(crate) fn described(messages: &[ChatMessage], tools: &[ToolDefinition]) -> Vec<ChatMessage> {
    let mut told: Vec<ChatMessage> = messages.iter().map(written).collect();
    if tools.is_empty() {
        return told;
    }
    let list: Vec<String> = tools.iter().map(|tool| tool.as_value().to_string()).collect();
    let text = format!(
        "# Tools\n\nThese functions can be called; each line is the JSON schema of one:\n<tools>\n{}\n</tools>\n\n\
         To call one, write its name and arguments as JSON between these marks:\n\
         <tool_call>\n{{\"name\": \"the function\", \"arguments\": {{}}}}\n</tool_call>\n\
         Its result follows between <tool_response> and </tool_response>.",
        list.join("\n")
    );
    match told.first_mut().filter(|first| first.role == Role::System) {
        Some(system) => system.content = format!("{}\n\n{text}", system.content),
        None => told.insert(0, ChatMessage::system(text)),
    }
    told
}

/// A message with its calls, or as the result of one, as text.
fn written(message: &ChatMessage) -> ChatMessage {
    if message.role == Role::Tool {
        return ChatMessage::user(format!("<tool_response>\n{}\n</tool_response>", message.content));
    }
    let mut content = message.content.clone();
    for call in &message.tool_calls {
        let call = json!({"name": call.name, "arguments": call.arguments});
        let separator = if content.is_empty() { "" } else { "\n" };
        content = format!("{content}{separator}<tool_call>\n{call}\n</tool_call>");
    }
    ChatMessage {
        content,
        tool_calls: Vec::new(),
        ..message.clone()
    }
}

#[cfg(test)]
mod tests {
    use mlx_engine_core::ToolCall;

    use super::*;

    #[test]
    fn tools_calls_and_results_become_text() {
        let tool = ToolDefinition::new("now", "The time.", json!({"type": "object"})).unwrap();
        let messages = [
            ChatMessage::system("Be brief."),
            ChatMessage::user("Time?"),
            ChatMessage::assistant_tool_calls([ToolCall::new("c1", "now", json!({}))]),
            ChatMessage::tool("c1", "12:00"),
        ];
        let told = described(&messages, &[tool]);
        assert!(told[0].content.starts_with("Be brief.\n\n# Tools"));
        assert_eq!(
            told[2].content,
            "<tool_call>\n{\"name\":\"now\",\"arguments\":{}}\n</tool_call>"
        );
        assert_eq!(
            (told[3].role, told[3].content.as_str()),
            (Role::User, "<tool_response>\n12:00\n</tool_response>")
        );
        assert_eq!(told[2].tool_calls, []);
        assert_eq!(described(&messages[1..2], &[])[0], messages[1]);
    }
}
