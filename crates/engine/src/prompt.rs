//! From a prompt to token ids.

use mlx_engine_core::{ChatMessage, EngineError, GenerateParams, Prompt, Role, ToolChoice, ToolDefinition};
use mlx_engine_text::{ChatTemplate, TemplateContext, TextError, Tokenizer, ToolFormat};
use serde_json::{Map, Value, json};

/// A model's tokenizer and template.
#[derive(Clone, Debug)]
pub struct PromptEncoder {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    default_system_prompt: Option<String>,
}

impl PromptEncoder {
    /// Compiles the template that came with a tokenizer, if one did.
    ///
    /// # Errors
    ///
    /// [`EngineError::Template`] where it does not compile.
    pub fn new(tokenizer: Tokenizer, default_system_prompt: Option<String>) -> Result<Self, EngineError> {
        let template = tokenizer
            .chat_template()
            .map(ChatTemplate::new)
            .transpose()
            .map_err(template_error)?;
        Ok(Self {
            tokenizer,
            template,
            default_system_prompt,
        })
    }

    /// How the model writes calls of tools, by its template.
    pub fn tool_format(&self) -> ToolFormat {
        self.tokenizer
            .chat_template()
            .map_or(ToolFormat::Plain, ToolFormat::detect)
    }

    /// Whether the template writes thoughts between the marks of this format.
    pub(crate) fn thinks(&self, format: ToolFormat) -> bool {
        let template = self.tokenizer.chat_template().unwrap_or_default();
        format.thought_marks().any(|mark| template.contains(mark))
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The text that a prompt becomes, or `None` for one that is tokens already.
    ///
    /// # Errors
    ///
    /// [`EngineError::EmptyPrompt`], and [`EngineError::Template`] where the template refuses the conversation or the
    /// model has none.
    pub fn text(&self, prompt: &Prompt) -> Result<Option<String>, EngineError> {
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        match prompt {
            Prompt::Text(text) => Ok(Some(text.clone())),
            Prompt::Tokens(_) => Ok(None),
            Prompt::Chat {
                messages,
                tools,
                template_args,
            } => {
                let messages = messages.iter().map(message_value).collect();
                self.chat_text(messages, tools, template_args).map(Some)
            }
            other => Err(EngineError::internal(format!(
                "a prompt of an unknown kind: {other:?}"
            ))),
        }
    }

    /// The text that messages become which are written as the template takes them: objects with `role` and `content`,
    /// OpenAI's in most. They are handed to it as they are, behind the model's default system prompt where none comes
    /// first. An answer of the model at the end is left to be continued.
    ///
    /// # Errors
    ///
    /// [`EngineError::EmptyPrompt`], and [`EngineError::Template`] where the template refuses the conversation, shows no
    /// tools where there are some, or the model has none.
    pub fn chat_text(
        &self,
        mut messages: Vec<Value>,
        tools: &[ToolDefinition],
        template_args: &Map<String, Value>,
    ) -> Result<String, EngineError> {
        if messages.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        let template = self.template.as_ref().ok_or_else(|| EngineError::Template {
            message: "the model has none; give the prompt as text".to_owned(),
            source: None,
        })?;
        if let Some(text) = &self.default_system_prompt
            && !matches!(messages[0]["role"].as_str(), Some("system" | "developer"))
        {
            messages.insert(0, json!({"role": "system", "content": text}));
        }
        let continues = messages.last().is_some_and(|last| last["role"] == "assistant");
        let context = TemplateContext::new(Value::Array(messages))
            .with_generation_prompt(!continues)
            .with_special_tokens(
                &self.tokenizer.bos_token().unwrap_or_default(),
                self.tokenizer.eos_token().unwrap_or_default(),
            )
            .with_arguments(template_args.clone());
        if !tools.is_empty() && !self.shows_tools() {
            return Err(EngineError::Template {
                message: "it shows no tools to the model; with the `tool_format` `hermes` they are described in the system \
                          prompt"
                    .to_owned(),
                source: None,
            });
        }
        let list: Vec<Value> = tools.iter().map(|tool| tool.as_value().clone()).collect();
        let context = context.with_tools((!list.is_empty()).then_some(Value::Array(list)));
        template.render(&context).map_err(template_error)
    }

    /// Whether the template shows tools to the model: one that knows none leaves them out without a word.
    pub(crate) fn shows_tools(&self) -> bool {
        let Some(template) = &self.template else {
            return false;
        };
        let function =
            json!({"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}});
        let context =
            TemplateContext::new(json!([{"role": "user", "content": "Hello"}])).with_generation_prompt(true);
        let tools = json!([{"type": "function", "function": function}]);
        match (
            template.render(&context.clone().with_tools(Some(tools))),
            template.render(&context),
        ) {
            (Ok(with), Ok(without)) => with != without,
            // What it refuses is said when it is asked to.
            _ => true,
        }
    }

    /// The prompt as the template takes it: without tools that must not be called, and with those described in the system
    /// prompt that the template does not show, where the caller named the format for it.
    pub(crate) fn shown(&self, prompt: &Prompt, params: &GenerateParams) -> Prompt {
        let Prompt::Chat {
            messages,
            tools,
            template_args,
        } = prompt
        else {
            return prompt.clone();
        };
        let none = params.tool_choice == ToolChoice::None;
        let tools = if none { &[] } else { tools.as_slice() };
        let called = messages
            .iter()
            .any(|message| message.role == Role::Tool || !message.tool_calls.is_empty());
        let described = params.tool_format.as_deref() == Some("hermes")
            && (called || !tools.is_empty())
            && !self.shows_tools();
        let (messages, tools) = if described {
            (crate::described::described(messages, tools), Vec::new())
        } else {
            (messages.clone(), tools.to_vec())
        };
        Prompt::Chat {
            messages,
            tools,
            template_args: template_args.clone(),
        }
    }

    /// The token ids that a prompt becomes. Text gets the tokens that begin a sequence; what a template renders has
    /// them in its text.
    ///
    /// # Errors
    ///
    /// Those of [`text`](Self::text), and [`EngineError::Tokenizer`].
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>, EngineError> {
        let text = self.text(prompt)?;
        self.encode_text(prompt, text.as_deref())
    }

    /// The token ids of a prompt and the text that it becomes.
    pub(crate) fn encode_text(&self, prompt: &Prompt, text: Option<&str>) -> Result<Vec<u32>, EngineError> {
        let ids = match (prompt, text) {
            (Prompt::Tokens(tokens), _) => tokens.clone(),
            (_, None) => Vec::new(),
            (prompt, Some(text)) => {
                let ids = self.tokenizer.encode(text, matches!(prompt, Prompt::Text(_)));
                ids.map_err(|error| EngineError::tokenizer("the prompt could not be encoded", error))?
            }
        };
        if ids.is_empty() {
            Err(EngineError::EmptyPrompt)
        } else {
            Ok(ids)
        }
    }
}

/// A message as templates know it: tool calls in OpenAI's shape.
fn message_value(message: &ChatMessage) -> Value {
    let mut value = json!({"role": message.role, "content": message.content});
    if let Some(name) = &message.name {
        value["name"] = json!(name);
    }
    if let Some(id) = &message.tool_call_id {
        value["tool_call_id"] = json!(id);
    }
    if let Some(reasoning) = &message.reasoning_content {
        value["reasoning_content"] = json!(reasoning);
    }
    if !message.tool_calls.is_empty() {
        let calls = message.tool_calls.iter().map(|call| {
            let function = json!({"name": call.name, "arguments": call.arguments});
            json!({"id": call.id, "type": "function", "function": function})
        });
        value["tool_calls"] = calls.collect();
    }
    value
}

fn template_error(error: TextError) -> EngineError {
    match error {
        TextError::Refused { message } => EngineError::Template {
            message: format!("it refuses the conversation: {message}"),
            source: None,
        },
        TextError::Template { message, line } => {
            let at = line.map(|line| format!(" at line {line}")).unwrap_or_default();
            EngineError::Template {
                message: format!("{message}{at}"),
                source: None,
            }
        }
        other => EngineError::template("it could not be used", other),
    }
}
