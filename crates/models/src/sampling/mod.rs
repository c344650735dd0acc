//! From logits to tokens.
//!
//! The token is chosen on the device, where the logits are, and need not be read before the next step is built. Where
//! log-probabilities or a grammar are asked for the logits of the step are read, and the token is chosen here; and where a bias or
//! penalties are and the device is a CPU, whose logits are here already.
//!
//! The order is mlx-lm's: logit bias and penalties change the logits; log-probabilities are those of the changed
//! logits; top-p, min-p and top-k filter by these probabilities; the temperature flattens what is left.

mod device;
mod filter;
mod penalties;

use std::sync::OnceLock;

use filter::Filter;
use mlx_engine_core::{Device, GenerateParams};
use mlx_engine_kernels::{Isa, log_sum_exp, top_k};
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, transforms};

pub use self::penalties::History;
use self::penalties::Penalties;
use crate::ModelError;
use crate::device::detect;

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
        let read = p.constraint.is_some() || p.logprobs || p.top_logprobs > 0;
        !read && (!self.looks_back() || detect().is_ok_and(|found| found.device != Device::Cpu))
    }

    /// Whether logits are changed by what a token is chosen behind, or by a bias.
    pub fn looks_back(&self) -> bool {
        Penalties(&self.params).change_something()
    }

    /// Begins the step of this number from its logits, `[1, vocab_size]`. What the token is chosen behind is asked for where the sampler
    /// [looks back](Self::looks_back), and the device chooses.
    ///
    /// # Errors
    ///
    /// Where MLX fails.
    pub fn start(&self, logits: &Array, number: u64, history: &History<'_>) -> Result<Step, ModelError> {
        let kind = if self.on_device() {
            StepKind::Chosen(self.choose_on_device(logits, number, history)?)
        } else {
            StepKind::Logits(logits.clone())
        };
        let (StepKind::Chosen(array) | StepKind::Logits(array)) = &kind;
        transforms::async_eval([array])?;
        Ok(Step { kind, number })
    }

    fn choose_on_device(
        &self,
        logits: &Array,
        number: u64,
        history: &History<'_>,
    ) -> Result<Array, ModelError> {
        let changed = if self.looks_back() {
            Penalties(&self.params).apply_on_device(logits, history)?
        } else {
            logits.clone()
        };
        device::choose(&changed, Filter::new(&self.params), mix(self.seed, number))
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
        Penalties(&self.params).apply(&mut logits, tokens, prompt_len);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer whose tokens are chosen one behind the other without any being read, and one that reads each.
    #[test]
    fn an_answer_is_the_same_where_none_of_its_tokens_is_read() {
        let logits: Vec<f32> = (0..50u16).map(|id| f32::from(id * 37 % 50) / 9.0).collect();
        let on_device = Array::from_slice(&logits, &[1, 50]);
        for (temperature, seed) in [(0.0, 0), (0.9, 1), (0.9, 2)] {
            let mut params = GenerateParams::default()
                .with_temperature(temperature)
                .with_seed(seed)
                .with_repetition_penalty(1.4)
                .with_repetition_window(6)
                .with_presence_penalty(0.3)
                .with_frequency_penalty(0.2);
            params.logit_bias.insert(7, 1.5);
            let sampler = Sampler::new(&params, 0);
            let mut tokens = vec![3, 9, 31];
            let mut unread = Vec::new();
            for number in 0..20 {
                let history = History {
                    tokens: &[3, 9, 31],
                    unread: unread.clone(),
                    prompt_len: 3,
                };
                let chosen = sampler.choose_on_device(&on_device, number, &history);
                unread.push(chosen.expect("MLX chooses"));
                let here = sampler.choose(&logits, number, &tokens, 3, &mut |_| {});
                tokens.push(here.token);
            }
            for (token, expected) in unread.iter().zip(&tokens[3..]) {
                token.eval().expect("MLX evaluates");
                assert_eq!(token.try_as_slice::<u32>().expect("a number"), [*expected]);
            }
            // They have their effect.
            let mut said = tokens[3..].to_vec();
            said.sort_unstable();
            said.dedup();
            assert!(said.len() > 8, "{tokens:?}");
        }
    }
}
