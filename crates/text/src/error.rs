//! What can go wrong with text.

use std::path::PathBuf;

/// A cause of another library.
pub(crate) type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why text could not be turned into tokens, or a conversation into text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The folder has no tokenizer.
    #[error("`{}` has no `tokenizer.json`; fetch the model again with its tokenizer", folder.display())]
    TokenizerMissing {
        /// The folder.
        folder: PathBuf,
    },
    /// The tokenizer's file could not be read or is damaged.
    #[error("tokenizer `{}` could not be read", path.display())]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Source,
    },
    /// The vocabulary contradicts itself or is of a kind that is not known.
    #[error("vocabulary is invalid: {message}")]
    Vocabulary {
        /// What is wrong.
        message: String,
    },
    /// The text could not be encoded.
    #[error("text could not be encoded")]
    Encode {
        /// Why.
        source: Source,
    },
    /// The template does not compile or fails for this conversation.
    #[error("chat template is invalid{}: {message}", line.map(|line| format!(" at line {line}")).unwrap_or_default())]
    Template {
        /// What is wrong.
        message: String,
        /// The line of the template, from 1.
        line: Option<usize>,
    },
    /// The template refuses this conversation, in its own words.
    #[error("chat template refuses the conversation: {message}")]
    Refused {
        /// What it says.
        message: String,
    },
    /// There is no format of tool calls with this name.
    #[error("`{name}` is no format of tool calls; there are {known}")]
    ToolFormat {
        /// What was asked for.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// The grammar cannot be enforced.
    #[error("the {kind} is refused: {reason}")]
    Grammar {
        /// What was given: a JSON schema, a regular expression or a Lark grammar.
        kind: &'static str,
        /// Why.
        reason: String,
    },
    /// An answer cannot go on under its grammar.
    #[error("the answer cannot go on under its grammar: {reason}")]
    Constraint {
        /// Why.
        reason: String,
    },
}
