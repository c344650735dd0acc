//! What a request says: messages of a conversation, raw text or tokens.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{ToolCall, ToolDefinition};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool that the model called.
    Tool,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        })
    }
}

/// One turn of a conversation.
///
/// ```
/// use mlx_engine_core::{ChatMessage, Role};
///
/// let message = ChatMessage::user("Hello");
/// assert_eq!(message.role, Role::User);
/// assert_eq!(serde_json::to_string(&message)?, r#"{"role":"user","content":"Hello"}"#);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// What is said. Empty where an assistant only calls tools.
    #[serde(default)]
    pub content: String,
    /// The name of the speaker or of the tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The tools that the assistant called in this turn.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The call that a message of [`Role::Tool`] answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// What the assistant thought before it answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

impl ChatMessage {
    /// A message with only a role and content.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            name: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            reasoning_content: None,
        }
    }

    /// Instructions for the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new(Role::System, content)
    }

    /// What the person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    /// What the model answered.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(Role::Assistant, content)
    }

    /// The tools that the model called.
    pub fn assistant_tool_calls(tool_calls: impl IntoIterator<Item = ToolCall>) -> Self {
        Self {
            tool_calls: tool_calls.into_iter().collect(),
            ..Self::assistant("")
        }
    }

    /// The result of the tool call with this id.
    pub fn tool(tool_call_id: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            tool_call_id: Some(tool_call_id.into()),
            ..Self::new(Role::Tool, content)
        }
    }

    /// Sets [`name`](Self::name).
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets [`reasoning_content`](Self::reasoning_content).
    pub fn with_reasoning(mut self, reasoning: impl Into<String>) -> Self {
        self.reasoning_content = Some(reasoning.into());
        self
    }
}

/// What the model is given to continue.
///
/// There is no conversion from a plain string: whether it is to pass through the chat template is the caller's
/// choice, [`Prompt::user`] or [`Prompt::text`].
///
/// ```
/// use mlx_engine_core::{ChatMessage, Prompt};
///
/// let question = Prompt::user("What is a monad?");
/// assert_eq!(question, Prompt::chat([ChatMessage::user("What is a monad?")]));
/// assert_ne!(question, Prompt::text("What is a monad?"));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Prompt {
    /// Raw text to continue, without a template.
    Text(String),
    /// A conversation, put through the model's chat template.
    Chat {
        /// The turns so far, oldest first.
        messages: Vec<ChatMessage>,
        /// The tools on offer. A model whose template knows no tools refuses them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tools: Vec<ToolDefinition>,
        /// Further variables for the template, such as `enable_thinking`.
        #[serde(default, skip_serializing_if = "Map::is_empty")]
        template_args: Map<String, Value>,
    },
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
}

impl Prompt {
    /// Raw text, without a template.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// A conversation without tools.
    pub fn chat(messages: impl IntoIterator<Item = ChatMessage>) -> Self {
        Self::Chat {
            messages: messages.into_iter().collect(),
            tools: Vec::new(),
            template_args: Map::new(),
        }
    }

    /// A conversation of one turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::chat([ChatMessage::user(content)])
    }

    /// Offers tools to the model. Text and tokens are left as they are: what they offer is in them.
    pub fn with_tools(mut self, on_offer: impl IntoIterator<Item = ToolDefinition>) -> Self {
        if let Self::Chat { tools, .. } = &mut self {
            *tools = on_offer.into_iter().collect();
        }
        self
    }

    /// Sets a variable of the template, such as `enable_thinking`. Text and tokens have no template.
    pub fn with_template_argument(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        if let Self::Chat { template_args, .. } = &mut self {
            template_args.insert(name.into(), value.into());
        }
        self
    }

    /// The tools on offer.
    pub fn tools(&self) -> &[ToolDefinition] {
        match self {
            Self::Chat { tools, .. } => tools,
            _ => &[],
        }
    }

    /// Token ids, taken as they are.
    pub fn tokens(tokens: impl IntoIterator<Item = u32>) -> Self {
        Self::Tokens(tokens.into_iter().collect())
    }

    /// Whether there is nothing to continue: no text, no token, no message, or a question of the user that says nothing.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Chat { messages, .. } => messages
                .last()
                .is_none_or(|last| last.role == Role::User && last.content.is_empty()),
            Self::Tokens(tokens) => tokens.is_empty(),
        }
    }
}

/// A question to a chat model, as [`Prompt::user`].
impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::user(text)
    }
}

/// A question to a chat model, as [`Prompt::user`].
impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::user(text)
    }
}

impl From<ChatMessage> for Prompt {
    fn from(message: ChatMessage) -> Self {
        Self::chat([message])
    }
}

impl From<Vec<ChatMessage>> for Prompt {
    fn from(messages: Vec<ChatMessage>) -> Self {
        Self::chat(messages)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn roles_are_written_as_they_are_displayed() {
        for role in [Role::System, Role::User, Role::Assistant, Role::Tool] {
            assert_eq!(serde_json::to_value(role).unwrap(), role.to_string());
        }
    }

    #[test]
    fn a_tool_turn_is_written_with_its_call() {
        let call = ToolCall::new("c1", "add", json!({"a": 1, "b": 2}));
        assert_eq!(
            serde_json::to_value([
                ChatMessage::assistant_tool_calls([call]),
                ChatMessage::tool("c1", "3")
            ])
            .unwrap(),
            json!([
                {"role": "assistant", "content": "",
                 "tool_calls": [{"id": "c1", "name": "add", "arguments": {"a": 1, "b": 2}}]},
                {"role": "tool", "content": "3", "tool_call_id": "c1"},
            ])
        );
    }

    #[test]
    fn prompts_are_tagged_by_their_kind() {
        let check = |prompt: Prompt, expect: Value| {
            assert_eq!(serde_json::to_value(&prompt).unwrap(), expect);
            assert_eq!(serde_json::from_value::<Prompt>(expect).unwrap(), prompt);
        };
        check(Prompt::text("once"), json!({"text": "once"}));
        check(Prompt::tokens([1, 2]), json!({"tokens": [1, 2]}));
        check(
            Prompt::user("hi"),
            json!({"chat": {"messages": [{"role": "user", "content": "hi"}]}}),
        );
    }

    #[test]
    fn an_empty_prompt_is_seen() {
        assert!(Prompt::text("").is_empty());
        assert!(Prompt::chat([]).is_empty());
        assert!(Prompt::tokens([]).is_empty());
        assert!(Prompt::user("").is_empty());
    }

    #[test]
    fn a_prompt_that_says_something_is_not_empty() {
        assert!(!Prompt::text(" ").is_empty() && !Prompt::tokens([0]).is_empty());
        assert!(!Prompt::user("hi").is_empty());
        // An answer that was only begun is continued.
        let begun = [ChatMessage::user("hi"), ChatMessage::assistant("")];
        assert!(!Prompt::chat(begun).is_empty());
        let silent = [ChatMessage::user("hi"), ChatMessage::user("")];
        assert!(Prompt::chat(silent).is_empty());
    }

    #[test]
    fn names_and_thoughts_are_added_to_a_message() {
        let message = ChatMessage::assistant("4")
            .with_name("ann")
            .with_reasoning("2 + 2");
        assert_eq!(
            serde_json::to_value(&message).unwrap(),
            json!({"role": "assistant", "content": "4", "name": "ann", "reasoning_content": "2 + 2"})
        );
    }

    #[test]
    fn only_a_conversation_has_tools_and_a_template() {
        let tool = || ToolDefinition::new("now", "The time.", json!({})).unwrap();
        let dressed = |prompt: Prompt| {
            prompt
                .with_tools([tool()])
                .with_template_argument("enable_thinking", false)
        };
        let prompt = dressed(Prompt::user("hi"));
        assert_eq!(prompt.tools(), [tool()]);
        let Prompt::Chat { template_args, .. } = &prompt else {
            panic!("{prompt:?}")
        };
        assert_eq!(
            Value::Object(template_args.clone()),
            json!({"enable_thinking": false})
        );
        for prompt in [Prompt::text("hi"), Prompt::tokens([1])] {
            assert_eq!(dressed(prompt.clone()), prompt);
            assert!(prompt.tools().is_empty());
        }
    }

    #[test]
    fn a_string_is_a_question_and_messages_are_a_conversation() {
        assert_eq!(Prompt::from("hi"), Prompt::user("hi"));
        assert_eq!(Prompt::from("hi".to_owned()), Prompt::user("hi"));
        let system = || ChatMessage::system("be brief");
        assert_eq!(Prompt::from(system()), Prompt::chat([system()]));
        let both = vec![system(), ChatMessage::user("hi")];
        assert_eq!(Prompt::from(both.clone()), Prompt::chat(both));
    }

    proptest! {
        #[test]
        fn messages_round_trip(
            role in prop::sample::select(vec![Role::System, Role::User, Role::Assistant, Role::Tool]),
            content in any::<String>(),
            name in any::<Option<String>>(),
            tool_call_id in any::<Option<String>>(),
            reasoning_content in any::<Option<String>>(),
        ) {
            let message = ChatMessage { role, content, name, tool_calls: Vec::new(), tool_call_id, reasoning_content };
            let json = serde_json::to_string(&message).unwrap();
            prop_assert_eq!(serde_json::from_str::<ChatMessage>(&json).unwrap(), message);
        }
    }
}
