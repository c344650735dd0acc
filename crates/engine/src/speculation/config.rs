//! What is guessed, and how.

use mlx_engine_core::ParamError;
use serde::{Deserialize, Serialize};

/// The most tokens that a step verifies.
const MOST: usize = 32;

/// How tokens are guessed that one step of the model then verifies. The answer is the same either way; what does not pay, by the
/// acceptance and the times that are measured, is paused.
///
/// ```
/// use mlx_engine_engine::{EngineConfig, LookupConfig, SpeculationConfig};
///
/// let config: EngineConfig = serde_json::from_str(r#"{"speculation": {"lookup": {"max_tokens": 4}}}"#)?;
/// let lookup = LookupConfig { max_tokens: 4, ..LookupConfig::default() };
/// assert_eq!(config.speculation, SpeculationConfig::Lookup(lookup));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SpeculationConfig {
    /// Nothing is guessed.
    #[default]
    Off,
    /// What followed when the prompt or the answer last went as it goes now: for answers that repeat what they were given, as
    /// summaries, edits and code do.
    Lookup(LookupConfig),
    /// What a smaller model of the same vocabulary says, which has weights, keys and values of its own.
    Draft(DraftConfig),
}

/// Guesses from the prompt and the answer so far (Saxena, prompt lookup decoding, 2023).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LookupConfig {
    /// The most tokens that are guessed at once, 1 to 32.
    pub max_tokens: usize,
    /// At least so many last tokens have to have been there before, 1 to 32.
    pub min_ngram: usize,
    /// Where the last tokens were there more than once, what followed more of them is preferred, up to so many;
    /// `min_ngram` to 32.
    pub max_ngram: usize,
    /// Whether as many tokens are guessed as may be even where that does not pay by what was measured: for who measures, and
    /// wants each run to take the same steps.
    pub always: bool,
}

/// Guesses of a smaller model (Leviathan, Kalman and Matias, 2023).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DraftConfig {
    /// A model folder or a `.gguf` file; for `InferenceEngine` anything that it loads a model by.
    pub model: String,
    /// The most tokens that are guessed at once, 1 to 32; 4 unless told.
    #[serde(default = "DraftConfig::default_max_tokens")]
    pub max_tokens: usize,
    /// Whether it guesses as many as it may even where that does not pay by what was measured: for who measures a draft
    /// model, and wants each run to take the same steps.
    #[serde(default)]
    pub always: bool,
}

impl DraftConfig {
    /// A draft model, guessing as many tokens as is usual.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            max_tokens: Self::default_max_tokens(),
            always: false,
        }
    }

    const fn default_max_tokens() -> usize {
        4
    }
}

impl Default for LookupConfig {
    fn default() -> Self {
        Self {
            max_tokens: 8,
            min_ngram: 2,
            max_ngram: 4,
            always: false,
        }
    }
}

impl SpeculationConfig {
    /// Whether it is guessed even where that does not pay.
    pub(crate) fn always(&self) -> bool {
        matches!(
            self,
            Self::Draft(DraftConfig { always: true, .. }) | Self::Lookup(LookupConfig { always: true, .. })
        )
    }

    /// Whether nothing is guessed.
    pub fn is_off(&self) -> bool {
        *self == Self::Off
    }

    /// Checks every range.
    ///
    /// # Errors
    ///
    /// The first field that is out of its range.
    pub(crate) fn validate(&self) -> Result<(), ParamError> {
        match self {
            Self::Off => Ok(()),
            Self::Draft(draft) => {
                ParamError::between("speculation.draft.max_tokens", draft.max_tokens, 1..=MOST)
            }
            Self::Lookup(lookup) => {
                ParamError::between("speculation.lookup.max_tokens", lookup.max_tokens, 1..=MOST)?;
                ParamError::between("speculation.lookup.min_ngram", lookup.min_ngram, 1..=MOST)?;
                ParamError::between(
                    "speculation.lookup.max_ngram",
                    lookup.max_ngram,
                    lookup.min_ngram..=MOST,
                )
            }
        }
    }

    /// The most tokens that a step is fed as guesses for all of a batch; 0 where nothing is guessed.
    pub(crate) fn room(&self, batch_limit: usize) -> usize {
        if self.is_off() {
            0
        } else {
            batch_limit.max(self.max_tokens())
        }
    }

    /// The most tokens that are guessed at once; 0 where nothing is.
    pub(crate) fn max_tokens(&self) -> usize {
        match self {
            Self::Off => 0,
            Self::Lookup(lookup) => lookup.max_tokens,
            Self::Draft(draft) => draft.max_tokens,
        }
    }
}
