//! Tools that a model may call, and its calls.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::ParamError;

/// A function that the model may call, in OpenAI's form: `{"type": "function", "function": {"name", "description",
/// "parameters"}}`. Chat templates take it as it is, with whatever else it holds.
///
/// ```
/// use mlx_engine_core::ToolDefinition;
/// use serde_json::json;
///
/// let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
/// let tool = ToolDefinition::new("get_weather", "The weather of a city.", schema)?;
/// assert_eq!(tool.as_value()["function"]["name"], "get_weather");
/// # Ok::<(), mlx_engine_core::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct ToolDefinition(Value);

impl ToolDefinition {
    /// A function by its name (letters, digits, `_`, `-` and `.`, 64 at most), what it is for, and the JSON schema of its
    /// arguments, which is one of an object.
    ///
    /// # Errors
    ///
    /// What is wrong with the name or the schema.
    pub fn new(
        name: impl Into<String>,
        description: impl Into<String>,
        parameters: Value,
    ) -> Result<Self, ParamError> {
        let mut function = json!({"name": name.into(), "description": description.into()});
        function["parameters"] = parameters;
        Self::try_from(json!({"type": "function", "function": function}))
    }

    /// Holds the model to the schema, token by token, also where it calls the tool of its own accord.
    pub fn strict(mut self) -> Self {
        self.0["function"]["strict"] = Value::Bool(true);
        self
    }

    /// The name.
    pub fn name(&self) -> &str {
        self.0["function"]["name"].as_str().unwrap_or_default()
    }

    /// What it is for.
    pub fn description(&self) -> Option<&str> {
        self.0["function"]["description"].as_str()
    }

    /// The JSON schema of its arguments; one of any object where the definition has none.
    pub fn parameters(&self) -> Value {
        match &self.0["function"]["parameters"] {
            Value::Null => json!({"type": "object"}),
            schema => schema.clone(),
        }
    }

    /// Whether the model is held to the schema where it calls the tool of its own accord.
    pub fn is_strict(&self) -> bool {
        self.0["function"]["strict"] == true
    }

    /// The definition as a template takes it.
    pub fn as_value(&self) -> &Value {
        &self.0
    }
}

impl TryFrom<Value> for ToolDefinition {
    type Error = ParamError;

    fn try_from(value: Value) -> Result<Self, ParamError> {
        let function = &value["function"];
        if value["type"] != "function" || !function.is_object() {
            let allowed = "an object with `type`: \"function\" and `function`";
            return Err(ParamError::new("tools", &value, allowed));
        }
        let name = function["name"].as_str().unwrap_or_default();
        let known = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if name.is_empty() || name.len() > 64 || !name.chars().all(known) {
            let allowed = "1 to 64 letters, digits, `_`, `-` and `.`";
            return Err(ParamError::new(
                "tools[].function.name",
                &function["name"],
                allowed,
            ));
        }
        let parameters = &function["parameters"];
        let of_object = parameters["type"].is_null() || parameters["type"] == "object";
        if !(parameters.is_null() || parameters.is_object() && of_object) {
            let field = format_args!("tools[`{name}`].function.parameters");
            return Err(ParamError::new(field, parameters, "the JSON schema of an object"));
        }
        Ok(Self(value))
    }
}

impl From<ToolDefinition> for Value {
    fn from(tool: ToolDefinition) -> Self {
        tool.0
    }
}

/// Whether the model calls a tool.
///
/// ```
/// use mlx_engine_core::{GenerateParams, ToolChoice};
///
/// let weather: ToolChoice = "weather".parse()?;
/// assert_eq!(weather, ToolChoice::Function("weather".to_owned()));
/// let params = GenerateParams::default().with_tool_choice(ToolChoice::Required);
/// assert_eq!(params.tool_choice.to_string(), "required");
/// # Ok::<(), std::convert::Infallible>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ToolChoice {
    /// As it likes.
    #[default]
    Auto,
    /// It does not: the tools are not shown to it.
    None,
    /// It calls at least one, and is held to the schemas.
    Required,
    /// It calls this one, and is held to its schema.
    Function(String),
}

impl fmt::Display for ToolChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Required => "required",
            Self::Function(name) => name,
        })
    }
}

/// `auto`, `none`, `required`, or the name of a tool.
impl FromStr for ToolChoice {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Self::Auto,
            "none" => Self::None,
            "required" => Self::Required,
            name => Self::Function(name.to_owned()),
        })
    }
}

/// A call that the model made to a tool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Ties the result to the call: see [`ChatMessage::tool_call_id`](crate::ChatMessage::tool_call_id).
    pub id: String,
    /// The name of the tool.
    pub name: String,
    /// The arguments, parsed. Chat templates take them as an object.
    pub arguments: Value,
    /// The arguments as the text that the model wrote, where it wrote JSON, so that `1.0` and large numbers are not lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_arguments: Option<String>,
}

impl ToolCall {
    /// A call with these arguments.
    pub fn new(id: impl Into<String>, name: impl Into<String>, arguments: Value) -> Self {
        Self {
            id: id.into(),
            name: name.into(),
            arguments,
            raw_arguments: None,
        }
    }

    /// The arguments as JSON text, as the model wrote them where it wrote any.
    pub fn arguments_text(&self) -> String {
        self.raw_arguments
            .clone()
            .unwrap_or_else(|| self.arguments.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_keeps_what_it_is_given() {
        let value = json!({"type": "function", "function": {"name": "f", "strict": true, "parameters": {"type": "object"},
                                                            "return": {"type": "string"}}});
        let tool: ToolDefinition = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(
            (tool.name(), tool.description(), tool.is_strict()),
            ("f", None, true)
        );
        assert_eq!(serde_json::to_string(&tool).unwrap(), value.to_string());
    }

    #[test]
    fn what_is_no_function_is_refused() {
        let check = |value: Value, expect: &str| {
            let error = ToolDefinition::try_from(value).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        };
        check(json!({"name": "f"}), "`type`: \"function\"");
        check(
            json!({"type": "function", "function": {"name": "a b"}}),
            "`tools[].function.name` is \"a b\"",
        );
        check(
            json!({"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}),
            "schema of an object",
        );
        assert!(ToolDefinition::new("", "", json!({})).is_err());
    }

    #[test]
    fn a_definition_is_read_in_its_parts() {
        let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}});
        let tool = ToolDefinition::new("weather", "The weather.", schema.clone()).unwrap();
        assert_eq!(
            (tool.name(), tool.description()),
            ("weather", Some("The weather."))
        );
        assert_eq!((tool.parameters(), tool.is_strict()), (schema, false));
        assert!(tool.clone().strict().is_strict());
        let value = Value::from(tool.clone());
        assert_eq!((&value, &value["type"]), (tool.as_value(), &json!("function")));
        let bare = ToolDefinition::try_from(json!({"type": "function", "function": {"name": "f"}})).unwrap();
        assert_eq!(bare.parameters(), json!({"type": "object"}));
    }

    #[test]
    fn names_and_schemas_that_may_be_are_taken() {
        let taken = |name: &str, parameters: Value| ToolDefinition::new(name, "", parameters).is_ok();
        assert!(taken("Get_the-weather.2", json!({})));
        assert!(taken(&"n".repeat(64), json!({})) && !taken(&"n".repeat(65), json!({})));
        assert!(!taken("caf\u{e9}", json!({})), "letters are those of ASCII");
        assert!(taken("f", json!({"properties": {}})), "the type may be left out");
        assert!(taken("f", Value::Null));
        for schema in [
            json!(true),
            json!([]),
            json!("object"),
            json!({"type": ["object"]}),
        ] {
            assert!(!taken("f", schema.clone()), "{schema}");
        }
        assert!(ToolDefinition::try_from(json!({"type": "function", "function": "f"})).is_err());
        assert!(ToolDefinition::try_from(json!({"type": "f", "function": {"name": "f"}})).is_err());
    }

    #[test]
    fn arguments_are_told_as_the_model_wrote_them() {
        let call = ToolCall::new("c1", "add", json!({"a": 1}));
        assert_eq!(call.arguments_text(), r#"{"a":1}"#);
        let raw_arguments = Some("{ \"a\": 1.0 }".to_owned());
        let call = ToolCall {
            raw_arguments,
            ..call
        };
        assert_eq!(call.arguments_text(), "{ \"a\": 1.0 }");
    }

    #[test]
    fn choices_are_written_as_they_are_read() {
        for (choice, text) in [
            (ToolChoice::Auto, "\"auto\""),
            (ToolChoice::None, "\"none\""),
            (ToolChoice::Required, "\"required\""),
            (ToolChoice::Function("f".to_owned()), "{\"function\":\"f\"}"),
        ] {
            assert_eq!(serde_json::to_string(&choice).unwrap(), text);
            assert_eq!(choice.to_string().parse::<ToolChoice>().unwrap(), choice);
        }
    }
}
