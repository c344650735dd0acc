//! What a request asks to be changed of the logits before a token is chosen: its bias, and penalties for what was said.

use mlx_engine_core::GenerateParams;
use mlx_rs::ops::indexing::{TryIndexOp, scatter_add_single, scatter_single};
use mlx_rs::{Array, Dtype, ops};

use crate::ModelError;

/// The tokens that another one is chosen behind.
#[derive(Clone, Debug, Default)]
pub struct History<'a> {
    /// The prompt and what is known of the answer.
    pub tokens: &'a [u32],
    /// The tokens behind these that were chosen and not read: arrays of one `u32`.
    pub unread: Vec<Array>,
    /// Where the answer begins.
    pub prompt_len: usize,
}

/// Bias and penalties of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Penalties<'a>(pub(super) &'a GenerateParams);

impl Penalties<'_> {
    /// Whether logits are changed at all.
    pub(super) fn change_something(self) -> bool {
        self.counts() || self.repeats() || !self.0.logit_bias.is_empty()
    }

    fn repeats(self) -> bool {
        self.0.repetition_penalty != 1.0
    }

    fn counts(self) -> bool {
        self.0.presence_penalty != 0.0 || self.0.frequency_penalty != 0.0
    }

    /// Adds the bias and applies the penalties.
    pub(super) fn apply(self, logits: &mut [f32], tokens: &[u32], prompt_len: usize) {
        let p = self.0;
        for (&token, &bias) in &p.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if self.repeats() {
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
        if self.counts() {
            let mut generated = tokens[prompt_len.min(tokens.len())..].to_vec();
            generated.sort_unstable();
            for run in generated.chunk_by(|a, b| a == b) {
                if let Some(logit) = logits.get_mut(run[0] as usize) {
                    *logit -= p.presence_penalty + p.frequency_penalty * run.len() as f32;
                }
            }
        }
    }

    /// The same where the logits are, `[1, vocab_size]` float32, behind tokens of which some may be unread.
    pub(super) fn apply_on_device(self, logits: &Array, history: &History<'_>) -> Result<Array, ModelError> {
        let p = self.0;
        let width = logits.shape().last().copied().unwrap_or(0);
        let mut changed = logits.reshape(&[-1])?;
        let (ids, biases): (Vec<u32>, Vec<f32>) =
            p.logit_bias.iter().filter(|(id, _)| **id < width as u32).unzip();
        if !ids.is_empty() {
            let rows = ids.len() as i32;
            let biases = Array::from_slice(&biases, &[rows, 1]);
            changed = scatter_add_single(changed, Array::from_slice(&ids, &[rows]), biases, 0)?;
        }
        if self.repeats()
            && let Some(seen) = last(history, 0, p.repetition_window as usize, width)?
        {
            let taken = changed.try_index(&seen)?;
            let penalty = Array::from_f32(p.repetition_penalty);
            // A token that is there twice is changed once: both write the same.
            let less = ops::select(
                ops::gt(&taken, Array::from_f32(0.0))?,
                ops::divide(&taken, &penalty)?,
                ops::multiply(&taken, &penalty)?,
            )?;
            changed = scatter_single(changed, seen, less.reshape(&[-1, 1])?, 0)?;
        }
        if self.counts()
            && let Some(generated) = last(history, history.prompt_len, usize::MAX, width)?
        {
            let ones = Array::from_slice(&vec![1.0_f32; generated.size()], &[generated.size() as i32, 1]);
            let counts = scatter_add_single(ops::zeros::<f32>(&[width])?, generated, ones, 0)?;
            let each = ops::multiply(Array::from_f32(p.frequency_penalty), &counts)?;
            let penalties = ops::add(Array::from_f32(p.presence_penalty), each)?;
            let some = ops::gt(&counts, Array::from_f32(0.0))?;
            let penalties = ops::select(some, penalties, Array::from_f32(0.0))?;
            changed = ops::subtract(changed, penalties)?;
        }
        Ok(changed.reshape(&[1, width])?)
    }
}

/// The last tokens from a position on, `most` at most, as an array of `u32`; none where there are none. Ids that the vocabulary does
/// not have are left out, as nothing is to be changed for them.
fn last(history: &History<'_>, from: usize, most: usize, width: i32) -> Result<Option<Array>, ModelError> {
    let unread = &history.unread[history.unread.len().saturating_sub(most)..];
    let tokens = &history.tokens[from.min(history.tokens.len())..];
    let read = &tokens[tokens.len().saturating_sub(most - unread.len())..];
    let read: Vec<u32> = read.iter().copied().filter(|&id| id < width as u32).collect();
    let mut parts = Vec::new();
    if !read.is_empty() {
        parts.push(Array::from_slice(&read, &[read.len() as i32]));
    }
    for token in unread {
        parts.push(token.as_dtype(Dtype::Uint32)?.reshape(&[-1])?);
    }
    Ok(match &parts[..] {
        [] => None,
        [one] => Some(one.clone()),
        several => Some(ops::concatenate(&several.iter().collect::<Vec<_>>(), 0)?),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(logits: &Array) -> Vec<f32> {
        logits.eval().expect("MLX evaluates");
        logits.try_as_slice::<f32>().expect("numbers").to_vec()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// What the device does is to the bit what is done here, however many tokens are unread.
        #[test]
        fn logits_are_changed_alike_on_the_device_and_here(
            logits in prop::collection::vec(-9.0f32..9.0, 24),
            // Ids that there are not change nothing.
            tokens in prop::collection::vec(0u32..28, 0..40),
            generated in prop::collection::vec(0u32..24, 0..20),
            unread in 0usize..3,
            bias in prop::collection::btree_map(0u32..28, -4.0f32..4.0, 0..5),
            repetition in prop::sample::select(vec![1.0f32, 0.8, 1.3]),
            window in 0u32..50,
            presence in prop::sample::select(vec![0.0f32, 0.7, -0.3]),
            frequency in prop::sample::select(vec![0.0f32, 0.1, -1.3]),
        ) {
            let mut params = GenerateParams::default()
                .with_repetition_penalty(repetition)
                .with_repetition_window(window)
                .with_presence_penalty(presence)
                .with_frequency_penalty(frequency);
            params.logit_bias = bias;
            let prompt_len = tokens.len();
            let all = [tokens, generated.clone()].concat();
            // Only what was generated can be unread.
            let known = all.len() - unread.min(generated.len());
            let mut expected = logits.clone();
            Penalties(&params).apply(&mut expected, &all, prompt_len);
            let history = History {
                tokens: &all[..known],
                unread: all[known..].iter().map(|&id| Array::from_slice(&[id], &[1])).collect(),
                prompt_len,
            };
            let logits = Array::from_slice(&logits, &[1, 24]);
            let changed = Penalties(&params).apply_on_device(&logits, &history).expect("MLX changes them");
            prop_assert_eq!(changed.shape(), &[1, 24]);
            prop_assert_eq!(read(&changed), expected);
        }
    }
}
