//! What the cache asks of the model whose sequences it keeps.

use mlx_engine_core::EngineError;

use crate::TokenModel;

/// Something whose states can be kept and taken up again.
pub(crate) trait Forking {
    /// What is known of some tokens.
    type Sequence;

    /// As [`TokenModel::len`].
    fn len(&self, sequence: &Self::Sequence) -> usize;

    /// As [`TokenModel::fork`].
    fn fork(
        &mut self,
        sequence: &mut Self::Sequence,
        len: usize,
    ) -> Result<Option<Self::Sequence>, EngineError>;

    /// As [`TokenModel::forks_anywhere`].
    fn forks_anywhere(&self) -> bool;

    /// As [`TokenModel::sequence_bytes`].
    fn sequence_bytes(&self, tokens: usize) -> u64;

    /// As [`TokenModel::shared_bytes`].
    fn shared_bytes(&self, len: usize) -> u64;
}

impl<M: TokenModel> Forking for M {
    type Sequence = M::Sequence;

    fn len(&self, sequence: &M::Sequence) -> usize {
        TokenModel::len(self, sequence)
    }

    fn fork(&mut self, sequence: &mut M::Sequence, len: usize) -> Result<Option<M::Sequence>, EngineError> {
        TokenModel::fork(self, sequence, len)
    }

    fn forks_anywhere(&self) -> bool {
        TokenModel::forks_anywhere(self)
    }

    fn sequence_bytes(&self, tokens: usize) -> u64 {
        TokenModel::sequence_bytes(self, tokens)
    }

    fn shared_bytes(&self, len: usize) -> u64 {
        TokenModel::shared_bytes(self, len)
    }
}

/// A model and the one that guesses for it, where there is one.
pub(crate) struct Pair<'a, M> {
    pub(crate) model: &'a mut M,
    pub(crate) draft: Option<&'a mut M>,
}

/// What both know of some tokens.
#[derive(Debug)]
pub(crate) struct Known<S> {
    pub(crate) sequence: S,
    /// What the draft model has seen of them, perhaps fewer.
    pub(crate) draft: Option<S>,
}

impl<M: TokenModel> Forking for Pair<'_, M> {
    type Sequence = Known<M::Sequence>;

    fn len(&self, known: &Self::Sequence) -> usize {
        self.model.len(&known.sequence)
    }

    fn fork(
        &mut self,
        known: &mut Self::Sequence,
        len: usize,
    ) -> Result<Option<Self::Sequence>, EngineError> {
        let Some(sequence) = self.model.fork(&mut known.sequence, len)? else {
            return Ok(None);
        };
        let draft = fork_draft(self.draft.as_deref_mut(), known.draft.as_mut(), len);
        Ok(Some(Known { sequence, draft }))
    }

    fn forks_anywhere(&self) -> bool {
        self.model.forks_anywhere()
    }

    fn sequence_bytes(&self, tokens: usize) -> u64 {
        let draft = self
            .draft
            .as_ref()
            .map_or(0, |draft| draft.sequence_bytes(tokens));
        self.model.sequence_bytes(tokens).saturating_add(draft)
    }

    fn shared_bytes(&self, len: usize) -> u64 {
        let draft = self.draft.as_ref().map_or(0, |draft| draft.shared_bytes(len));
        self.model.shared_bytes(len).saturating_add(draft)
    }
}

/// What a draft model knows of the first `len` tokens, or of fewer. What cannot be taken over is computed again.
pub(crate) fn fork_draft<M: TokenModel>(
    model: Option<&mut M>,
    draft: Option<&mut M::Sequence>,
    len: usize,
) -> Option<M::Sequence> {
    let (model, draft) = model.zip(draft)?;
    let len = len.min(model.len(draft));
    model.fork(draft, len).unwrap_or_else(|error| {
        tracing::warn!(%error, "what the draft model knows could not be taken over");
        None
    })
}
