//! How likely texts are.

use mlx_engine_core::{EngineError, Prompt};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::Engine;
use crate::worker::Command;

/// The log-probabilities of a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The tokens of the text.
    pub tokens: Vec<u32>,
    /// The log-probability of each token after those before it; the first has none.
    pub logprobs: Vec<Option<f32>>,
}

impl Score {
    /// The perplexity: e to the mean negative log-probability. 1 where no token has any.
    pub fn perplexity(&self) -> f64 {
        let known: Vec<f64> = self
            .logprobs
            .iter()
            .flatten()
            .map(|&logprob| f64::from(logprob))
            .collect();
        if known.is_empty() {
            return 1.0;
        }
        (-known.iter().sum::<f64>() / known.len() as f64).exp()
    }
}

impl Engine {
    /// The log-probability of each token of a text.
    ///
    /// # Errors
    ///
    /// [`EngineError::EmptyPrompt`], [`EngineError::PromptTooLong`], what the device says, and that the mock has no
    /// probabilities.
    pub async fn score(&self, text: &str) -> Result<Score, EngineError> {
        let tokens = self.encoder.encode(&Prompt::text(text))?;
        let context_length = u64::from(self.model.context_length);
        if tokens.len() as u64 > context_length {
            return Err(EngineError::PromptTooLong {
                prompt_tokens: tokens.len() as u64,
                context_length,
            });
        }
        let (reply, scored) = oneshot::channel();
        self.unless_lost(async {
            self.send(Command::Score { tokens, reply }).await?;
            scored.await.map_err(|_| self.dropped())?
        })
        .await
    }
}
