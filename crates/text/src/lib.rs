//! Everything between characters and token ids.
//!
//! [`Tokenizer`] turns text to ids and back, from a `tokenizer.json` or from the vocabulary of a GGUF file.
//! [`ChatTemplate`] turns a conversation to text, byte for byte as Python's jinja2 does. [`Detokenizer`] gives the text
//! of ids as they come and never half a character, and [`StopMatcher`] finds stop strings across pieces of text. [`OutputParser`] tells
//! text, reasoning and tool calls apart.
//!
//! ```
//! use mlx_engine_text::{ChatTemplate, StopMatcher, TemplateContext};
//! use serde_json::json;
//!
//! let template = ChatTemplate::new("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")?;
//! let messages = json!([{"role": "user", "content": "Hello"}]);
//! assert_eq!(template.render(&TemplateContext::new(messages))?, "<user>Hello\n");
//!
//! let mut stop = StopMatcher::new(["END".to_owned()]);
//! assert_eq!(stop.push("the E").text, "the ");
//! let outcome = stop.push("ND of it");
//! assert_eq!((outcome.text.as_str(), outcome.stopped), ("", true));
//! # Ok::<(), mlx_engine_text::TextError>(())
//! ```

mod detokenizer;
mod error;
mod export;
#[cfg(feature = "grammar")]
mod grammar;
mod parser;
mod pretokenizer;
mod python;
mod spm;
mod stop;
mod strftime;
mod template;
#[cfg(feature = "grammar")]
mod token_bytes;
mod tokenizer;
mod vocabulary;

pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use export::TokenizerFiles;
#[cfg(feature = "grammar")]
pub use grammar::{
    CallGrammar, CompiledGrammar, Constraint, Grammar, Thoughts, TokenMask, TokenTable, after_thoughts,
};
pub use parser::{OutputParser, ParsedCall, ParsedEvent, Tool, ToolFormat};
pub use stop::{StopMatcher, StopOutcome};
pub use template::{ChatTemplate, TemplateContext};
pub use tokenizer::Tokenizer;
pub use vocabulary::GgufVocabulary;
