//! What an answer has to keep to, as the scheduler holds it.

use mlx_engine_core::{EngineError, OutputConstraint};
use mlx_engine_text::{Tokenizer, Tool, ToolFormat};

#[cfg(feature = "grammar")]
pub(crate) use with_grammars::{Compiler, Walk, after_thoughts, of_calls};
#[cfg(not(feature = "grammar"))]
pub(crate) use without::{Compiler, Walk, after_thoughts, of_calls};

/// The calls that an answer may have.
#[cfg_attr(
    not(feature = "grammar"),
    expect(dead_code, reason = "without grammars they are refused unread")
)]
pub(crate) struct Calls<'a> {
    pub(crate) format: ToolFormat,
    pub(crate) tools: &'a [Tool],
    /// Whether it is calls and nothing else.
    pub(crate) required: bool,
    pub(crate) parallel: bool,
    /// Whether the prompt has opened thoughts.
    pub(crate) opened: bool,
    /// Whether the model may open them.
    pub(crate) thinks: bool,
}

#[cfg(feature = "grammar")]
mod with_grammars {
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

    use mlx_engine_text::{
        CallGrammar, CompiledGrammar, Constraint, Grammar, TextError, Thoughts, TokenTable, ToolFormat,
    };
    use tokio::sync::oneshot;

    use super::{Calls, EngineError, OutputConstraint, Tokenizer};

    /// Constraints that are kept compiled: an application asks by the same few again and again.
    const RECENT: usize = 16;

    /// Compiles constraints for one vocabulary, whose table is built with the first.
    #[derive(Debug)]
    pub(crate) struct Compiler(Arc<Shared>);

    #[derive(Debug)]
    struct Shared {
        tokenizer: Tokenizer,
        table: OnceLock<Result<TokenTable, EngineError>>,
        /// Those used last, the latest at the end.
        recent: Mutex<VecDeque<(OutputConstraint, CompiledGrammar)>>,
    }

    impl Compiler {
        pub(crate) fn new(tokenizer: Tokenizer) -> Self {
            Self(Arc::new(Shared {
                tokenizer,
                table: OnceLock::new(),
                recent: Mutex::default(),
            }))
        }

        /// Compiles a constraint, on a thread of its own: the table of a large vocabulary takes a good part of a second, and the
        /// caller's thread may have others to serve.
        pub(crate) async fn compile(&self, constraint: &OutputConstraint) -> Result<Walk, EngineError> {
            if let Some(walk) = self.0.known(constraint) {
                return Ok(walk);
            }
            let (shared, constraint) = (Arc::clone(&self.0), constraint.clone());
            let (reply, compiled) = oneshot::channel();
            std::thread::Builder::new()
                .name("mlx-engine-grammar".to_owned())
                .spawn(move || {
                    // The caller may have gone; the next finds it then.
                    let _ = reply.send(shared.compile(constraint));
                })
                .map_err(|error| EngineError::internal(format!("no thread to compile on: {error}")))?;
            compiled
                .await
                .unwrap_or_else(|_| Err(EngineError::internal("the compilation was not finished")))
        }
    }

    impl Shared {
        fn recent(&self) -> MutexGuard<'_, VecDeque<(OutputConstraint, CompiledGrammar)>> {
            self.recent.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// A walk by a constraint that was compiled lately.
        fn known(&self, constraint: &OutputConstraint) -> Option<Walk> {
            let mut recent = self.recent();
            let at = recent.iter().position(|(known, _)| known == constraint)?;
            let found = recent.remove(at)?;
            let walk = Walk(found.1.constraint());
            recent.push_back(found);
            Some(walk)
        }

        fn compile(&self, constraint: OutputConstraint) -> Result<Walk, EngineError> {
            let grammar = match &constraint {
                OutputConstraint::JsonSchema(schema) => Grammar::json_schema(schema),
                OutputConstraint::Regex(pattern) => Grammar::regex(pattern),
                OutputConstraint::Lark(grammar) => Grammar::lark(grammar),
                other => return Err(unknown(other)),
            };
            let table = self
                .table
                .get_or_init(|| TokenTable::new(&self.tokenizer).map_err(refused));
            let table = table.as_ref().map_err(Clone::clone)?;
            let compiled = table.compile(&grammar).map_err(refused)?;
            let walk = Walk(compiled.constraint());
            let mut recent = self.recent();
            if recent.len() >= RECENT {
                recent.pop_front();
            }
            recent.push_back((constraint, compiled));
            Ok(walk)
        }
    }

    /// What an answer has to keep to that calls tools.
    pub(crate) fn of_calls(
        calls: &Calls<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<OutputConstraint, EngineError> {
        let grammar = CallGrammar {
            format: calls.format,
            tools: calls.tools,
            required: calls.required,
            parallel: calls.parallel,
            thoughts: match (calls.opened, calls.thinks) {
                (true, _) => Thoughts::Opened,
                (false, true) => Thoughts::Possible,
                (false, false) => Thoughts::None,
            },
        };
        grammar
            .lark(tokenizer)
            .map(OutputConstraint::Lark)
            .map_err(refused)
    }

    /// The same constraint for what follows thoughts that the prompt has opened.
    pub(crate) fn after_thoughts(
        constraint: &OutputConstraint,
        format: ToolFormat,
        tokenizer: &Tokenizer,
    ) -> Result<OutputConstraint, EngineError> {
        let body = match constraint {
            OutputConstraint::JsonSchema(schema) => {
                format!("%json {}", Grammar::json_for_lark(schema).map_err(refused)?)
            }
            OutputConstraint::Regex(pattern) => {
                format!("%lark {{\nstart: /{}/\n}}", between_slashes(pattern))
            }
            OutputConstraint::Lark(grammar) => format!("%lark {{\n{grammar}\n}}"),
            other => return Err(unknown(other)),
        };
        Ok(OutputConstraint::Lark(mlx_engine_text::after_thoughts(
            format, &body, tokenizer,
        )))
    }

    /// An expression as Lark's grammars have it, where a slash ends it that is not escaped.
    fn between_slashes(pattern: &str) -> String {
        let mut escaped = String::with_capacity(pattern.len());
        let mut chars = pattern.chars();
        while let Some(char) = chars.next() {
            match char {
                // What is escaped stays so, a slash too.
                '\\' => {
                    escaped.push(char);
                    escaped.extend(chars.next());
                }
                '/' => escaped.push_str("\\/"),
                _ => escaped.push(char),
            }
        }
        escaped
    }

    fn unknown(constraint: &OutputConstraint) -> EngineError {
        EngineError::Constraint {
            message: format!("its kind is not known here: {constraint:?}"),
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

        /// Whether it is known which tokens may come.
        pub(crate) fn is_prepared(&self) -> bool {
            self.0.is_masked()
        }

        /// Makes the logits of tokens that may not come minus infinity.
        pub(crate) fn mask(&mut self, logits: &mut [f32]) -> Result<(), EngineError> {
            self.0.mask().map_err(refused)?.apply(logits);
            Ok(())
        }

        /// Tokens that the grammar leaves no choice about. They are not taken.
        pub(crate) fn forced(&mut self) -> Vec<u32> {
            self.0.fast_forward()
        }

        /// How many of these tokens, from the first on, the grammar allows.
        pub(crate) fn allowed_of(&mut self, tokens: &[u32]) -> Result<usize, EngineError> {
            self.0.allowed_of(tokens).map_err(refused)
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

    #[cfg(test)]
    mod tests {
        use futures::FutureExt;

        use super::*;
        use crate::MockScript;

        #[tokio::test]
        async fn a_constraint_that_was_compiled_is_at_hand() {
            let compiler = Compiler::new(MockScript::default().tokenizer().unwrap());
            let regex = |number: usize| OutputConstraint::Regex(format!("a{{{number}}}"));
            for number in 1..=RECENT + 1 {
                compiler.compile(&regex(number)).await.unwrap();
            }
            for number in 2..=RECENT + 1 {
                // Without waiting, and from its beginning each time.
                for _ in 0..2 {
                    let mut walk = compiler.compile(&regex(number)).now_or_never().unwrap().unwrap();
                    let tokens = vec![u32::from(b'a'); number];
                    assert_eq!(walk.allowed_of(&tokens).unwrap(), number);
                    assert_eq!(walk.allowed_of(&[tokens, vec![97]].concat()).unwrap(), number);
                }
            }
            let known = compiler.0.recent().iter().any(|(known, _)| *known == regex(1));
            assert!(!known && compiler.0.recent().len() == RECENT);
            let refused = compiler.compile(&OutputConstraint::Regex("(".to_owned())).await;
            assert!(
                matches!(refused, Err(EngineError::Constraint { .. })),
                "{refused:?}"
            );
        }
    }
}

#[cfg(not(feature = "grammar"))]
mod without {
    use super::{Calls, EngineError, OutputConstraint, Tokenizer, ToolFormat};

    fn none<T>() -> Result<T, EngineError> {
        Err(EngineError::Constraint {
            message: "this build has no grammars; build it with the feature `grammar`".to_owned(),
        })
    }

    pub(crate) fn of_calls(
        _calls: &Calls<'_>,
        _tokenizer: &Tokenizer,
    ) -> Result<OutputConstraint, EngineError> {
        none()
    }

    pub(crate) fn after_thoughts(
        _constraint: &OutputConstraint,
        _format: ToolFormat,
        _tokenizer: &Tokenizer,
    ) -> Result<OutputConstraint, EngineError> {
        none()
    }

    /// Refuses every constraint.
    #[derive(Debug)]
    pub(crate) struct Compiler;

    impl Compiler {
        pub(crate) fn new(_tokenizer: Tokenizer) -> Self {
            Self
        }

        #[expect(
            clippy::unused_self,
            clippy::unused_async,
            reason = "as where there are grammars"
        )]
        pub(crate) async fn compile(&self, _constraint: &OutputConstraint) -> Result<Walk, EngineError> {
            none()
        }
    }

    /// There is none.
    #[derive(Debug)]
    pub(crate) enum Walk {}

    impl Walk {
        pub(crate) fn prepare(&mut self) -> Result<(), EngineError> {
            match *self {}
        }

        pub(crate) fn is_prepared(&self) -> bool {
            match *self {}
        }

        pub(crate) fn mask(&mut self, _logits: &mut [f32]) -> Result<(), EngineError> {
            match *self {}
        }

        pub(crate) fn forced(&mut self) -> Vec<u32> {
            match *self {}
        }

        pub(crate) fn allowed_of(&mut self, _tokens: &[u32]) -> Result<usize, EngineError> {
            match *self {}
        }

        pub(crate) fn commit(&mut self, _token: u32) -> Result<bool, EngineError> {
            match *self {}
        }
    }
}
