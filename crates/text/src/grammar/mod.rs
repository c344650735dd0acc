//! Constrained decoding: which tokens may come next so that an answer keeps to a grammar.
//!
//! A [`TokenTable`] is made once for a tokenizer and shared. It compiles a [`Grammar`] when a request is admitted, and
//! what it refuses is refused then, with the reason. Each request walks with a [`Constraint`] of its own: a mask before
//! a token is chosen, a commit after it.

mod calls;
mod constraint;
mod lark;
mod layout;
mod table;

use serde_json::Value;

use crate::TextError;

pub use calls::{CallGrammar, Thoughts, after_thoughts};
pub use constraint::{CompiledGrammar, Constraint, TokenMask};
pub use table::TokenTable;

/// What an answer has to keep to, before it is compiled for a vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub struct Grammar {
    pub(crate) source: Source,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Source {
    JsonSchema(Value),
    Regex(String),
    Lark(String),
}

impl Grammar {
    /// JSON that is valid under a schema, without white space between its parts. A schema without `$schema` is one of
    /// draft 2020-12.
    pub fn json_schema(schema: &Value) -> Self {
        Self {
            source: Source::JsonSchema(schema.clone()),
        }
    }

    /// The schema as it stands behind `%json` in a Lark grammar: with the settings that [`json_schema`](Self::json_schema) has.
    ///
    /// # Errors
    ///
    /// [`TextError::Grammar`] where it is no schema.
    pub fn json_for_lark(schema: &Value) -> Result<Value, TextError> {
        table::compact(schema).map_err(|reason| TextError::Grammar {
            kind: "JSON schema",
            reason,
        })
    }

    /// A text that matches a regular expression as a whole. The syntax is that of the `regex` crate, without anchors,
    /// look-around and word boundaries.
    pub fn regex(pattern: &str) -> Self {
        Self {
            source: Source::Regex(pattern.to_owned()),
        }
    }

    /// A text of a grammar in llguidance's form of Lark, which begins with the rule `start`.
    pub fn lark(grammar: &str) -> Self {
        Self {
            source: Source::Lark(grammar.to_owned()),
        }
    }

    /// What it is called in errors.
    pub(crate) fn kind(&self) -> &'static str {
        match self.source {
            Source::JsonSchema(_) => "JSON schema",
            Source::Regex(_) => "regular expression",
            Source::Lark(_) => "Lark grammar",
        }
    }
}
