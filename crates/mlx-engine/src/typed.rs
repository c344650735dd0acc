//! Answers as values of a type.

use mlx_engine_core::{EngineError, FinishReason, GenerateParams, LlmEngine, OutputConstraint, Prompt};
use schemars::{JsonSchema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Why an answer is no value of its type.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TypedError {
    /// The request failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The answer cannot be read: most often `max_tokens` cut it off.
    #[error("the answer is no `{expected}` (it ended by {finish_reason}): {source}")]
    Unreadable {
        /// The name of the type.
        expected: &'static str,
        /// The answer.
        text: String,
        /// Why it ended.
        finish_reason: FinishReason,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// The JSON schema that answers of a type are held to.
///
/// What serde decides by itself is left to it: widths of numbers are no formats, and of alternatives that exclude each
/// other one is enough.
///
/// ```
/// use mlx_engine::schema_of;
/// use schemars::JsonSchema;
///
/// #[derive(JsonSchema)]
/// #[expect(dead_code, reason = "only its schema is looked at")]
/// struct City {
///     name: String,
///     people: u32,
/// }
///
/// let schema = schema_of::<City>();
/// assert_eq!(schema["properties"]["name"]["type"], "string");
/// assert_eq!(schema["required"], serde_json::json!(["name", "people"]));
/// ```
pub fn schema_of<T: JsonSchema>() -> Value {
    let mut schema = SchemaGenerator::default().into_root_schema_for::<T>().to_value();
    plain(&mut schema);
    schema
}

fn plain(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(plain),
        Value::Object(object) => {
            if object
                .get("type")
                .is_some_and(|kind| !kind.to_string().contains("string"))
            {
                object.remove("format");
            }
            if let Some(alternatives) = object.remove("oneOf") {
                object.insert("anyOf".to_owned(), alternatives);
            }
            for (key, value) in object {
                if !matches!(key.as_str(), "const" | "enum" | "default" | "examples") {
                    plain(value);
                }
            }
        }
        _ => {}
    }
}

/// Asks an engine for a value of a type.
pub(crate) async fn generate_as<T: JsonSchema + DeserializeOwned>(
    engine: &impl LlmEngine,
    prompt: Prompt,
    params: GenerateParams,
) -> Result<T, TypedError> {
    let params = params.with_constraint(OutputConstraint::JsonSchema(schema_of::<T>()));
    let output = engine.generate(prompt, params).await?;
    serde_json::from_str(&output.text).map_err(|source| TypedError::Unreadable {
        expected: std::any::type_name::<T>(),
        text: output.text,
        finish_reason: output.finish_reason,
        source,
    })
}
