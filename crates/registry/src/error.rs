//! What can go wrong with a reference or a registration.

use mlx_engine_core::{EngineError, ParamError};

/// Why a model was not found or not registered.
///
/// Messages are lowercase fragments; what the user can do about it is [`hint`](Self::hint).
///
/// ```
/// use mlx_engine_registry::ModelRegistry;
///
/// let error = ModelRegistry::builtin().get("lama3.2-1b").unwrap_err();
/// assert_eq!(error.to_string(), "model `lama3.2-1b` not found");
/// assert!(error.hint().is_some_and(|hint| hint.contains("mlx-community/Llama-3.2-1B-Instruct-4bit")));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// No model goes by the reference.
    #[error("model `{reference}` not found")]
    NotFound {
        /// What was asked for.
        reference: String,
        /// The ids of models with a similar id, alias or name, nearest first; at most three.
        suggestions: Vec<String>,
    },

    /// Several models go by the reference.
    #[error("model `{reference}` is ambiguous between {}", quoted(candidates, "and"))]
    Ambiguous {
        /// What was asked for.
        reference: String,
        /// The ids of the models, in the order of registration; at least two.
        candidates: Vec<String>,
    },

    /// The id or an alias belongs to another model.
    #[error("`{field}` of model `{model}` is `{value}`, which already names model `{owner}`")]
    Duplicate {
        /// `id` or, with its index, `aliases[0]`.
        field: String,
        /// The id or alias.
        value: String,
        /// The id of the model that was to be registered.
        model: String,
        /// The id of the model that is registered.
        owner: String,
    },

    /// The id or an alias is blank, so that nothing could refer to it.
    #[error("`{field}` of model `{model}` is blank")]
    Blank {
        /// `id` or, with its index, `aliases[0]`.
        field: String,
        /// The id of the model that was to be registered.
        model: String,
    },

    /// A file of the user's models cannot be read.
    #[error("`{path}` cannot be read: {reason}")]
    Unreadable {
        /// Where it is.
        path: String,
        /// What the system says.
        reason: String,
    },

    /// A file of the user's models is not TOML of the right shape.
    #[error("the list of models is malformed: {reason}")]
    Malformed {
        /// What the parser says, with line, field and value.
        reason: String,
    },

    /// A field of a user's model has a value that it cannot have.
    #[error("`{field}` of model `{model}` is {value}, allowed: {allowed}")]
    Invalid {
        /// The field.
        field: String,
        /// What it is.
        value: String,
        /// What it may be.
        allowed: String,
        /// The id of the model.
        model: String,
    },
}

impl RegistryError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { suggestions, .. } if suggestions.is_empty() => None,
            Self::NotFound { suggestions, .. } => {
                Some(format!("did you mean {}?", quoted(suggestions, "or")))
            }
            Self::Ambiguous { candidates, .. } => Some(format!("ask for {}", quoted(candidates, "or"))),
            Self::Duplicate { owner, .. } => Some(format!("choose another, `{owner}` keeps the ones it has")),
            Self::Unreadable { .. } => Some("check the path and who may read it".to_owned()),
            Self::Malformed { .. } => {
                Some("write each model as `[[model]]` with the keys of the built-in list".to_owned())
            }
            Self::Invalid { .. } => None,
            Self::Blank { .. } => Some("give it at least one character that is not a space".to_owned()),
        }
    }
}

/// A reference that names no model, or several, is a model not found; a registration that is refused is a parameter
/// out of its range.
impl From<RegistryError> for EngineError {
    fn from(error: RegistryError) -> Self {
        let hint = error.hint();
        match error {
            RegistryError::NotFound { reference, .. } | RegistryError::Ambiguous { reference, .. } => {
                Self::ModelNotFound { reference, hint }
            }
            RegistryError::Duplicate {
                field, value, owner, ..
            } => ParamError::new(
                field,
                value,
                format_args!("what does not already name model `{owner}`"),
            )
            .into(),
            RegistryError::Unreadable { path, reason } => {
                ParamError::new("models", path, format_args!("a file that can be read ({reason})")).into()
            }
            RegistryError::Malformed { reason } => {
                ParamError::new("models", reason, "a list of models in TOML").into()
            }
            RegistryError::Invalid {
                field,
                value,
                allowed,
                ..
            } => ParamError::new(field, value, allowed).into(),
            RegistryError::Blank { field, .. } => {
                ParamError::new(field, "\"\"", "a string that is not blank").into()
            }
        }
    }
}

/// "`a`", "`a` or `b`", "`a`, `b` or `c`".
fn quoted(names: &[String], conjunction: &str) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} {conjunction} {last}", rest.join(", ")),
        _ => names.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    /// One of each variant, with its message, its hint and the message of the engine error that it becomes.
    fn every_error() -> Vec<(RegistryError, &'static str, Option<&'static str>, &'static str)> {
        let not_found = |suggestions: &[&str]| RegistryError::NotFound {
            reference: "qwen9".to_owned(),
            suggestions: names(suggestions),
        };
        vec![
            (
                not_found(&[]),
                "model `qwen9` not found",
                None,
                "model `qwen9` not found",
            ),
            (
                not_found(&["a/qwen3", "b/qwen2", "c/qwen1"]),
                "model `qwen9` not found",
                Some("did you mean `a/qwen3`, `b/qwen2` or `c/qwen1`?"),
                "model `qwen9` not found",
            ),
            (
                RegistryError::Ambiguous {
                    reference: "qwen".to_owned(),
                    candidates: names(&["a/qwen", "b/qwen"]),
                },
                "model `qwen` is ambiguous between `a/qwen` and `b/qwen`",
                Some("ask for `a/qwen` or `b/qwen`"),
                "model `qwen` not found",
            ),
            (
                RegistryError::Duplicate {
                    field: "aliases[1]".to_owned(),
                    value: "qwen".to_owned(),
                    model: "a/new".to_owned(),
                    owner: "b/old".to_owned(),
                },
                "`aliases[1]` of model `a/new` is `qwen`, which already names model `b/old`",
                Some("choose another, `b/old` keeps the ones it has"),
                "invalid parameter: `aliases[1]` is qwen, allowed: what does not already name model `b/old`",
            ),
            (
                RegistryError::Blank {
                    field: "id".to_owned(),
                    model: " ".to_owned(),
                },
                "`id` of model ` ` is blank",
                Some("give it at least one character that is not a space"),
                "invalid parameter: `id` is \"\", allowed: a string that is not blank",
            ),
            (
                RegistryError::Unreadable {
                    path: "models.toml".to_owned(),
                    reason: "it is a folder".to_owned(),
                },
                "`models.toml` cannot be read: it is a folder",
                Some("check the path and who may read it"),
                "invalid parameter: `models` is models.toml, allowed: a file that can be read (it is a folder)",
            ),
            (
                RegistryError::Malformed {
                    reason: "no `id`".to_owned(),
                },
                "the list of models is malformed: no `id`",
                Some("write each model as `[[model]]` with the keys of the built-in list"),
                "invalid parameter: `models` is no `id`, allowed: a list of models in TOML",
            ),
            (
                RegistryError::Invalid {
                    field: "sampling.top_p".to_owned(),
                    value: "2".to_owned(),
                    allowed: "0 to 1".to_owned(),
                    model: "a/new".to_owned(),
                },
                "`sampling.top_p` of model `a/new` is 2, allowed: 0 to 1",
                None,
                "invalid parameter: `sampling.top_p` is 2, allowed: 0 to 1",
            ),
        ]
    }

    #[test]
    fn messages_and_hints_read_as_written() {
        for (error, message, hint, _) in every_error() {
            assert_eq!(error.to_string(), message);
            assert_eq!(error.hint().as_deref(), hint);
        }
    }

    #[test]
    fn an_engine_error_keeps_the_words_and_the_hint() {
        for (error, _, hint, message) in every_error() {
            let engine = EngineError::from(error);
            assert_eq!(engine.to_string(), message);
            if let EngineError::ModelNotFound { .. } = engine {
                assert_eq!(engine.hint().as_deref(), hint);
            }
        }
    }
}
