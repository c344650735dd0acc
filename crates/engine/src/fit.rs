//! How much memory a model needs, and what fits into the memory that there is.

use std::fmt;

use mlx_engine_core::EngineError;
use serde::{Deserialize, Serialize};

use crate::EngineConfig;

/// Tokens of a request, prompt and answer, that a batch is laid out for. Longer ones run beside fewer others.
const TYPICAL: u64 = 2048;

/// The shortest context that is of use.
const LEAST_CONTEXT: u64 = 256;

/// Answers that a step of a real model takes further at once, and guesses that it is fed.
pub(crate) const BATCH_LIMIT: usize = 32;

/// The chunk of a prompt where memory is tight.
pub(crate) const TIGHT_CHUNK: usize = 512;

/// Memory is tight where the workspace would take more than this part of what the weights leave.
pub(crate) const TIGHT: u64 = 4;

/// Keys and values of layers that forget: those that see a window, and all where
/// [`max_positions`](mlx_engine_core::KvConfig::max_positions) says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvWindow {
    /// Bytes that a token takes in all these layers.
    pub bytes_per_token: u64,
    /// Tokens that they have the keys and values of at most.
    pub positions: u64,
}

/// What a model needs of memory, as it is known before it is loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryNeeds {
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Bytes of keys and values for each token of a sequence, in all layers.
    pub kv_bytes_per_token: u64,
    /// What of them is of layers that forget, so that a sequence takes no more from some length on.
    #[serde(default)]
    pub windows: Vec<KvWindow>,
    /// Bytes of workspace for each token that is fed at once.
    pub workspace_bytes_per_token: u64,
    /// Bytes of the logits of a sequence.
    pub logits_bytes: u64,
    /// The longest sequence that the model takes, in tokens.
    pub context_length: usize,
    /// Tokens of a prompt that it is best fed at once.
    pub prefill_chunk: usize,
}

/// What [`EngineConfig::fit`] chose, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFit {
    /// Bytes that there are.
    pub available: u64,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Bytes of workspace, for the chunk and the batch that were chosen.
    pub workspace_bytes: u64,
    /// Bytes that are left for keys and values.
    pub kv_bytes: u64,
    /// The longest sequence that was chosen, in tokens.
    pub context_length: usize,
    /// Requests that run at the same time.
    pub max_batch: usize,
    /// Tokens of a prompt that are fed at once.
    pub prefill_chunk: usize,
}

impl fmt::Display for MemoryFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |bytes: u64| bytes.div_ceil(1_000_000);
        write!(
            f,
            "context {}, batch {}, chunks of {}: {} MB of weights, {} MB of workspace and {} MB of keys and values in {} MB",
            self.context_length,
            self.max_batch,
            self.prefill_chunk,
            megabytes(self.weight_bytes),
            megabytes(self.workspace_bytes),
            megabytes(self.kv_bytes),
            megabytes(self.available),
        )
    }
}

impl MemoryNeeds {
    /// The same with a draft model, which has weights, keys and values and a workspace of its own. What it is fed at once and
    /// the longest sequence are those of the model.
    #[must_use]
    pub fn with_draft(self, draft: &Self) -> Self {
        let sum = u64::saturating_add;
        let windows = self.windows.iter().chain(&draft.windows).copied();
        Self {
            windows: windows.collect(),
            weight_bytes: sum(self.weight_bytes, draft.weight_bytes),
            kv_bytes_per_token: sum(self.kv_bytes_per_token, draft.kv_bytes_per_token),
            workspace_bytes_per_token: sum(self.workspace_bytes_per_token, draft.workspace_bytes_per_token),
            logits_bytes: sum(self.logits_bytes, draft.logits_bytes),
            ..self
        }
    }

    /// Bytes of the keys and values of a sequence of so many tokens.
    pub fn kv_bytes(&self, tokens: u64) -> u64 {
        let forgotten = self.windows.iter().fold(0, |sum: u64, window| {
            let gone = tokens.saturating_sub(window.positions);
            sum.saturating_add(window.bytes_per_token.saturating_mul(gone))
        });
        let all = self.kv_bytes_per_token.saturating_mul(tokens);
        all.saturating_sub(forgotten)
    }

    /// The longest context up to `asked` whose keys and values are no more than `bytes`; as it grows by blocks, a multiple of 256
    /// or `asked` itself.
    fn longest(&self, asked: u64, bytes: u64) -> u64 {
        if self.kv_bytes(asked) <= bytes {
            return asked;
        }
        let (mut fits, mut too_long) = (0, asked.div_ceil(LEAST_CONTEXT));
        while too_long - fits > 1 {
            let blocks = fits + (too_long - fits) / 2;
            if self.kv_bytes(blocks * LEAST_CONTEXT) <= bytes {
                fits = blocks;
            } else {
                too_long = blocks;
            }
        }
        fits * LEAST_CONTEXT
    }

    fn workspace(&self, chunk: usize, batch: u64) -> u64 {
        // A token of each answer beside the chunk.
        let rows = (chunk as u64).saturating_add(batch.saturating_sub(1));
        let logits = self.logits_bytes.saturating_mul(batch);
        self.workspace_bytes_per_token
            .saturating_mul(rows)
            .saturating_add(logits)
    }
}

impl EngineConfig {
    /// Chooses the longest context and the largest batch, up to what this configuration asks for, with which a model fits
    /// into `available` bytes, and a smaller chunk where memory is tight. The context comes first: one request may have
    /// all of it, and a batch is laid out for requests of 2048 tokens. Where a draft model is to guess, `needs` are those
    /// [with it](MemoryNeeds::with_draft).
    ///
    /// ```
    /// use mlx_engine_engine::{EngineConfig, MemoryNeeds};
    ///
    /// let needs = MemoryNeeds {
    ///     weight_bytes: 4_000_000_000,
    ///     kv_bytes_per_token: 131_072,
    ///     windows: Vec::new(),
    ///     workspace_bytes_per_token: 200_000,
    ///     logits_bytes: 600_000,
    ///     context_length: 131_072,
    ///     prefill_chunk: 2048,
    /// };
    /// let (config, fit) = EngineConfig::default().fit(&needs, 8_000_000_000)?;
    /// assert_eq!((config.context_length, config.max_batch), (Some(27_136), 13));
    /// println!("{fit}");
    /// # Ok::<(), mlx_engine_core::EngineError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`EngineError::InvalidParameter`], and [`EngineError::InsufficientMemory`] where not even 256 tokens fit, with what
    /// these would need.
    pub fn fit(self, needs: &MemoryNeeds, available: u64) -> Result<(Self, MemoryFit), EngineError> {
        self.validate()?;
        let available = self.memory_limit.map_or(available, |limit| limit.min(available));
        let asked = self
            .context_length
            .unwrap_or(needs.context_length)
            .min(needs.context_length) as u64;
        let beside_weights = available.saturating_sub(needs.weight_bytes);
        // A step has logits for guesses too.
        let guesses = self.speculation.room(BATCH_LIMIT) as u64;
        let chunk = self.prefill_chunk.unwrap_or_else(|| {
            let tight = needs.workspace(needs.prefill_chunk, 1) > beside_weights / TIGHT;
            needs
                .prefill_chunk
                .min(if tight { TIGHT_CHUNK } else { usize::MAX })
        });
        let fixed = needs
            .weight_bytes
            .saturating_add(needs.workspace(chunk, 1 + guesses));
        let least = needs.kv_bytes(asked.min(LEAST_CONTEXT));
        let required = fixed.saturating_add(least);
        if required > available {
            return Err(EngineError::InsufficientMemory { required, available });
        }
        let left = available - fixed;
        let context = needs.longest(asked, left).max(asked.min(LEAST_CONTEXT));
        let row = needs.logits_bytes.saturating_add(needs.workspace_bytes_per_token);
        let each = needs.kv_bytes(context.min(TYPICAL)).saturating_add(row).max(1);
        // The workspace of a batch must not take what one request of the whole context needs.
        let beside_one = left.saturating_sub(needs.kv_bytes(context));
        let beside = beside_one.checked_div(row).unwrap_or(u64::MAX - 1);
        let batch = (left / each)
            .min(beside.saturating_add(1))
            .clamp(1, self.max_batch as u64);
        let workspace_bytes = needs.workspace(chunk, batch + guesses);
        let fit = MemoryFit {
            available,
            weight_bytes: needs.weight_bytes,
            workspace_bytes,
            kv_bytes: beside_weights.saturating_sub(workspace_bytes),
            context_length: context as usize,
            max_batch: batch as usize,
            prefill_chunk: chunk,
        };
        let config = Self {
            memory_limit: Some(available),
            context_length: Some(fit.context_length),
            max_batch: fit.max_batch,
            prefill_chunk: Some(chunk),
            ..self
        };
        Ok((config, fit))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_what_it_needs() {
        let needs = MemoryNeeds {
            weight_bytes: 1000,
            kv_bytes_per_token: 2,
            windows: Vec::new(),
            workspace_bytes_per_token: 1,
            logits_bytes: 8,
            context_length: 4096,
            prefill_chunk: 2048,
        };
        let refused = EngineConfig::default().fit(&needs, 2000).unwrap_err();
        // Chunks of 512, as memory is tight, and 256 tokens.
        let required = 1000 + 512 + 8 + 512;
        assert!(
            matches!(refused, EngineError::InsufficientMemory { required: found, available: 2000 } if found == required),
            "{refused}"
        );
        let (config, fit) = EngineConfig::default().fit(&needs, required).unwrap();
        assert_eq!(
            (fit.context_length, fit.max_batch, fit.prefill_chunk),
            (256, 1, 512)
        );
        assert_eq!(
            (config.memory_limit, config.context_length),
            (Some(required), Some(256))
        );
        let (_, fit) = EngineConfig::default().fit(&needs, 1 << 30).unwrap();
        assert_eq!(
            (fit.context_length, fit.max_batch, fit.prefill_chunk),
            (4096, 16, 2048)
        );
        assert!(
            fit.to_string()
                .starts_with("context 4096, batch 16, chunks of 2048: 1 MB of weights")
        );
    }

    #[test]
    fn a_draft_model_counts() {
        let needs = |weight_bytes, kv_bytes_per_token| MemoryNeeds {
            weight_bytes,
            kv_bytes_per_token,
            windows: Vec::new(),
            workspace_bytes_per_token: 1,
            logits_bytes: 8,
            context_length: 4096,
            prefill_chunk: 512,
        };
        let both = needs(1000, 4).with_draft(&needs(100, 1));
        // Weights, a chunk and a row of logits of each, and 256 tokens.
        let required = 1100 + 2 * 512 + 2 * 8 + 5 * 256;
        assert!(EngineConfig::default().fit(&both, required - 1).is_err());
        let (config, _) = EngineConfig::default().fit(&both, required).unwrap();
        assert_eq!((config.context_length, config.max_batch), (Some(256), 1));
    }

    #[test]
    fn guesses_count() {
        let needs = MemoryNeeds {
            weight_bytes: 1000,
            kv_bytes_per_token: 2,
            windows: Vec::new(),
            workspace_bytes_per_token: 1,
            logits_bytes: 8,
            context_length: 4096,
            prefill_chunk: 512,
        };
        let lookup = EngineConfig {
            speculation: crate::SpeculationConfig::Lookup(crate::LookupConfig::default()),
            ..EngineConfig::default()
        };
        // A chunk, a row and logits for each of 32 guesses and an answer, and 256 tokens.
        let required = 1000 + 512 + 32 + 33 * 8 + 512;
        assert!(lookup.clone().fit(&needs, required - 1).is_err());
        let (_, fit) = lookup.fit(&needs, required).unwrap();
        assert_eq!(
            (fit.context_length, fit.workspace_bytes),
            (256, 512 + 32 + 33 * 8)
        );
    }

    /// Layers that forget let a context be longer than what all of it would take, and take nothing more at last.
    #[test]
    fn windows_count() {
        let needs = MemoryNeeds {
            weight_bytes: 1000,
            kv_bytes_per_token: 10,
            windows: vec![KvWindow {
                bytes_per_token: 8,
                positions: 500,
            }],
            workspace_bytes_per_token: 1,
            logits_bytes: 8,
            context_length: 1 << 20,
            prefill_chunk: 512,
        };
        assert_eq!(
            [0, 500, 501, 1500].map(|tokens| needs.kv_bytes(tokens)),
            [0, 5000, 5002, 7000]
        );
        // A chunk, a row of logits, what the windows take, and 2 bytes for each of 4096 tokens.
        let required = 1000 + 512 + 8 + 4000 + 2 * 4096;
        let context = |available| {
            let (config, _) = EngineConfig::default().fit(&needs, available).unwrap();
            config.context_length
        };
        assert_eq!(
            (context(required), context(required - 1)),
            (Some(4096), Some(3840))
        );
        let all_forget = MemoryNeeds {
            kv_bytes_per_token: 8,
            ..needs.clone()
        };
        let (config, _) = EngineConfig::default().fit(&all_forget, required).unwrap();
        assert_eq!(config.context_length, Some(1 << 20));
        let both = needs.clone().with_draft(&all_forget);
        assert_eq!(both.kv_bytes(1500), 7000 + 4000);
    }

    proptest! {
        /// What is chosen fits, is no more than was asked for, and is not refused by its own limit.
        #[test]
        fn what_is_chosen_fits(
            weight_bytes in 0u64..1 << 40,
            kv_bytes_per_token in 1u64..1 << 22,
            workspace_bytes_per_token in 0u64..1 << 22,
            logits_bytes in 0u64..1 << 22,
            context_length in 1usize..1 << 20,
            available in 0u64..1 << 41,
            max_batch in 1usize..64,
            // A part of a thousand of the layers, and what they keep.
            windows in prop::collection::vec((0u64..500, 0u64..1 << 16), 0..3),
        ) {
            let windows = windows.into_iter().map(|(part, positions)| KvWindow {
                bytes_per_token: kv_bytes_per_token * part / 1000,
                positions,
            });
            let needs = MemoryNeeds {
                weight_bytes, kv_bytes_per_token, workspace_bytes_per_token, logits_bytes, context_length,
                windows: windows.collect(),
                prefill_chunk: 2048,
            };
            let asked = EngineConfig { max_batch, ..EngineConfig::default() };
            match asked.fit(&needs, available) {
                Ok((config, fit)) => {
                    prop_assert!(fit.max_batch <= max_batch && fit.context_length <= context_length);
                    let context = fit.context_length as u64;
                    let one = needs.kv_bytes(context)
                        + needs.workspace(fit.prefill_chunk, fit.max_batch as u64);
                    prop_assert!(weight_bytes + one <= available);
                    config.validate().unwrap();
                    let again = config.clone().fit(&needs, available).unwrap().0;
                    prop_assert_eq!(again, config);
                }
                Err(EngineError::InsufficientMemory { required, .. }) => prop_assert!(required > available),
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
    }
}
