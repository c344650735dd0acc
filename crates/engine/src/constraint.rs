//! What an answer has to keep to, as the scheduler holds it.

use mlx_engine_core::{EngineError, OutputConstraint};
use mlx_engine_text::Tokenizer;

#[cfg(feature = "grammar")]
pub(crate) use with_grammars::{Compiler, Walk};
#[cfg(not(feature = "grammar"))]
pub(crate) use without::{Compiler, Walk};

#[cfg(feature = "grammar")]
mod with_grammars {
    use std::sync::OnceLock;

    use mlx_engine_text::{Constraint, Grammar, TextError, TokenTable};

    use super::{EngineError, OutputConstraint, Tokenizer};

    /// Compiles constraints for one vocabulary, whose table is built with the first.
    #[derive(Debug)]
    pub(crate) struct Compiler {
        tokenizer: Tokenizer,
        table: OnceLock<Result<TokenTable, EngineError>>,
    }

    impl Compiler {
        pub(crate) fn new(tokenizer: Tokenizer) -> Self {
            Self {
                tokenizer,
                table: OnceLock::new(),
            }
        }

        pub(crate) fn compile(&self, constraint: &OutputConstraint) -> Result<Walk, EngineError> {
            let grammar = match constraint {
                OutputConstraint::JsonSchema(schema) => Grammar::json_schema(schema),
                OutputConstraint::Regex(pattern) => Grammar::regex(pattern),
                OutputConstraint::Lark(grammar) => Grammar::lark(grammar),
                other => {
                    return Err(EngineError::Constraint {
                        message: format!("its kind is not known here: {other:?}"),
                    });
                }
            };
            let table = self
                .table
                .get_or_init(|| TokenTable::new(&self.tokenizer).map_err(refused));
            let table = table.as_ref().map_err(Clone::clone)?;
            let compiled = table.compile(&grammar).map_err(refused)?;
            Ok(Walk(compiled.constraint()))
        }
    }

    /// Where an answer is in its grammar.
    #[derive(Debug)]
    pub(crate) struct Walk(Constraint);

    impl Walk {
        /// Finds out which tokens may come, so that [`mask`](Self::mask) is free: while the device computes.
        pub(crate) fn prepare(&mut self) -> Result<(), EngineError> {
            self.0.mask().map(drop).map_err(refused)
        }

        /// Makes the logits of tokens that may not come minus infinity.
        pub(crate) fn mask(&mut self, logits: &mut [f32]) -> Result<(), EngineError> {
            self.0.mask().map_err(refused)?.apply(logits);
            Ok(())
        }

        /// Takes the token that was chosen, and says whether nothing can follow it.
        pub(crate) fn commit(&mut self, token: u32) -> Result<bool, EngineError> {
            self.0.commit(token).map_err(refused)?;
            Ok(self.0.is_stopped())
        }
    }

    #[expect(clippy::needless_pass_by_value, reason = "it stands in `map_err`")]
    fn refused(error: TextError) -> EngineError {
        EngineError::Constraint {
            message: error.to_string(),
        }
    }
}

#[cfg(not(feature = "grammar"))]
mod without {
    use super::{EngineError, OutputConstraint, Tokenizer};

    /// Refuses every constraint.
    #[derive(Debug)]
    pub(crate) struct Compiler;

    impl Compiler {
        pub(crate) fn new(_tokenizer: Tokenizer) -> Self {
            Self
        }

        pub(crate) fn compile(&self, _constraint: &OutputConstraint) -> Result<Walk, EngineError> {
            Err(EngineError::Constraint {
                message: "this build has no grammars; build it with the feature `grammar`".to_owned(),
            })
        }
    }

    /// There is none.
    #[derive(Debug)]
    pub(crate) enum Walk {}

    impl Walk {
        pub(crate) fn prepare(&mut self) -> Result<(), EngineError> {
            match *self {}
        }

        pub(crate) fn mask(&mut self, _logits: &mut [f32]) -> Result<(), EngineError> {
            match *self {}
        }

        pub(crate) fn commit(&mut self, _token: u32) -> Result<bool, EngineError> {
            match *self {}
        }
    }
}
