//! From logits to tokens.
//!
//! Without penalties and log-probabilities the token is chosen on the device and need not be read before the next step is
//! built. With them the logits of the step are read, and the token is chosen here.
//!
//! The order is mlx-lm's: logit bias and penalties change the logits; log-probabilities are those of the changed
//! logits; top-p, min-p and top-k filter by these probabilities; the temperature flattens what is left.

mod device;
mod filter;

use std::sync::OnceLock;

use filter::Filter;
use mlx_engine_core::GenerateParams;
use mlx_engine_kernels::{Isa, log_sum_exp, top_k};
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, transforms};

use crate::ModelError;

/// Logits on the device, `[rows, vocab_size]` float32.
pub type Logits = Array;

/// Chooses the tokens of one request.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: GenerateParams,
    seed: u64,
}

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its log-probability, where the request asked for it.
    pub logprob: Option<f32>,
    /// The likeliest tokens and their log-probabilities, likeliest first, as many as the request asked for.
    pub top: Vec<(u32, f32)>,
}

/// A step that the device has begun.
#[derive(Debug)]
pub struct Step {
    kind: StepKind,
    number: u64,
}

#[derive(Debug)]
enum StepKind {
    /// The token, `[1]` `u32`.
    Chosen(Array),
    /// The logits, `[1, vocab_size]`.
    Logits(Array),
}

impl Sampler {
    /// A sampler for one request. `seed` stands in where the parameters have none.
    pub fn new(params: &GenerateParams, seed: u64) -> Self {
        Self {
            params: params.clone(),
            seed: params.seed.unwrap_or(seed),
        }
    }

    /// Whether the device can choose, so that the next step can be built before this one is read.
    pub fn on_device(&self) -> bool {
        let p = &self.params;
        !(p.constraint.is_some()
            || p.logprobs
            || p.top_logprobs > 0
            || p.repetition_penalty != 1.0
            || p.presence_penalty != 0.0
            || p.frequency_penalty != 0.0
            || !p.logit_bias.is_empty())
    }

    /// Begins the step of this number from its logits, `[1, vocab_size]`.
    ///
    /// # Errors
    ///
    /// Where MLX fails.
    pub fn start(&self, logits: &Array, number: u64) -> Result<Step, ModelError> {
        let kind = if self.on_device() {
            let seed = mix(self.seed, number);
            StepKind::Chosen(device::choose(logits, Filter::new(&self.params), seed)?)
        } else {
            StepKind::Logits(logits.clone())
        };
        let (StepKind::Chosen(array) | StepKind::Logits(array)) = &kind;
        transforms::async_eval([array])?;
        Ok(Step { kind, number })
    }

    /// Chooses from logits that have been read. `tokens` are those of the prompt and of the answer so far, which
    /// begins at `prompt_len`. `mask` makes those of tokens that may not come minus infinity, after bias and penalties.
    pub fn choose(
        &self,
        logits: &[f32],
        number: u64,
        tokens: &[u32],
        prompt_len: usize,
        mask: &mut dyn FnMut(&mut [f32]),
    ) -> Sampled {
        let mut logits = logits.to_vec();
        self.change(&mut logits, tokens, prompt_len);
        mask(&mut logits);
        let token = Filter::new(&self.params).choose(&logits, mix(self.seed, number));
        let top = usize::from(self.params.top_logprobs);
        let wanted = self.params.logprobs || top > 0;
        let shift = wanted.then(|| log_sum_exp(isa(), &logits));
        let logprob = |logit: f32| (f64::from(logit) - shift.unwrap_or(0.0)) as f32;
        Sampled {
            token,
            logprob: self.params.logprobs.then(|| logprob(logits[token as usize])),
            // What may not come is no alternative.
            top: top_k(isa(), &logits, top)
                .into_iter()
                .filter(|(_, logit)| *logit > f32::NEG_INFINITY)
                .map(|(token, logit)| (token as u32, logprob(logit)))
                .collect(),
        }
    }

    /// Adds the bias and applies the penalties.
    fn change(&self, logits: &mut [f32], tokens: &[u32], prompt_len: usize) {
        let p = &self.params;
        for (&token, &bias) in &p.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if p.repetition_penalty != 1.0 {
            let window = tokens.len().saturating_sub(p.repetition_window as usize);
            let mut seen = tokens[window..].to_vec();
            seen.sort_unstable();
            seen.dedup();
            for token in seen {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / p.repetition_penalty
                    } else {
                        *logit * p.repetition_penalty
                    };
                }
            }
        }
        if p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 {
            let mut generated = tokens[prompt_len.min(tokens.len())..].to_vec();
            generated.sort_unstable();
            for run in generated.chunk_by(|a, b| a == b) {
                if let Some(logit) = logits.get_mut(run[0] as usize) {
                    *logit -= p.presence_penalty + p.frequency_penalty * run.len() as f32;
                }
            }
        }
    }
}

impl Step {
    /// The token that was chosen on the device, not read yet: an array of one `u32`.
    pub fn unread(&self) -> Option<&Array> {
        match &self.kind {
            StepKind::Chosen(token) => Some(token),
            StepKind::Logits(_) => None,
        }
    }

    /// Waits for the step and returns its token. The arguments are those of [`Sampler::choose`].
    ///
    /// # Errors
    ///
    /// Where MLX fails.
    pub fn read(
        self,
        sampler: &Sampler,
        tokens: &[u32],
        prompt_len: usize,
        mask: &mut dyn FnMut(&mut [f32]),
    ) -> Result<Sampled, ModelError> {
        match self.kind {
            StepKind::Chosen(token) => {
                token.eval()?;
                let token = token
                    .try_item_exact::<u32>()
                    .map_err(|error| ModelError::Mlx(error.to_string()))?;
                Ok(Sampled {
                    token,
                    logprob: None,
                    top: Vec::new(),
                })
            }
            StepKind::Logits(logits) => {
                logits.eval()?;
                let logits = logits.contiguous()?;
                logits.eval()?;
                Ok(sampler.choose(
                    logits.try_as_slice::<f32>()?,
                    self.number,
                    tokens,
                    prompt_len,
                    mask,
                ))
            }
        }
    }
}

/// The logits of one row, `[1, vocab_size]`, of `[rows, vocab_size]`.
///
/// # Errors
///
/// Where MLX fails, and for a row that is not there.
pub fn row(logits: &Logits, row: usize) -> Result<Logits, ModelError> {
    if row == 0 && logits.shape().first() == Some(&1) {
        return Ok(logits.clone());
    }
    let row = row as i32;
    Ok(logits.try_index((row..row + 1, ..))?)
}

/// The instruction set of the kernels that choose.
fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| Isa::from_environment().unwrap_or_else(|_| Isa::fastest()))
}

/// The logarithm of the softmax.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let shift = log_sum_exp(isa(), logits);
    logits
        .iter()
        .map(|logit| (f64::from(*logit) - shift) as f32)
        .collect()
}

/// A number for each step of each seed, by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
