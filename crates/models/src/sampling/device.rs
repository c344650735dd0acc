//! Choosing where the logits are.

use mlx_engine_core::Device;
use mlx_rs::ops::indexing::{TryIndexOp, argmax_axis, take_along_axis};
use mlx_rs::{Array, Dtype, ops, random};
use mlx_sys::{HostOp, HostOutput, mlx_dtype__MLX_UINT32};

use super::filter::Filter;
use crate::ModelError;
use crate::device::detect;

/// The token of each row of logits, `[rows, vocab_size]` float32: `[rows]`, not evaluated yet.
pub(super) fn choose(logits: &Array, filter: Filter, seed: u64) -> Result<Array, ModelError> {
    if detect()?.device == Device::Cpu && logits.dtype() == Dtype::Float32 {
        on_host(logits, filter, seed)
    } else if filter.is_greedy() {
        Ok(argmax_axis(logits, -1, false)?)
    } else {
        drawn(logits, filter, seed)
    }
}

/// By our kernels, as a node of MLX's graph: on a CPU MLX's own operations take forty microseconds for the likeliest and
/// a millisecond to draw, where a step of a small model takes two.
fn on_host(logits: &Array, filter: Filter, seed: u64) -> Result<Array, ModelError> {
    let op = HostOp::new(c"choose", move |inputs, outputs| {
        let (Some(logits), Some(tokens)) = (inputs.first(), outputs.first_mut()) else {
            return Err("choosing takes logits and gives tokens".to_owned());
        };
        let (logits, tokens) = (logits.as_slice::<f32>()?, tokens.as_mut_slice::<u32>()?);
        let width = logits.len() / tokens.len().max(1);
        for (row, token) in logits.chunks_exact(width.max(1)).zip(tokens) {
            *token = filter.choose(row, seed);
        }
        Ok(())
    });
    let rows = [logits.shape().first().copied().unwrap_or(1)];
    let outputs = [HostOutput::new(&rows, mlx_dtype__MLX_UINT32)];
    let stream = mlx_rs::Stream::cpu();
    #[expect(unsafe_code, reason = "the graph is built through MLX's C interface")]
    // SAFETY: the handles of the array and of the stream are alive; the result is owned and taken once.
    let results = unsafe {
        op.call(&[logits.as_ptr()], &outputs, stream.as_ptr())
            .map_err(ModelError::Mlx)?
            .into_iter()
            .map(|array| Array::from_ptr(array))
    };
    let token = results.into_iter().next();
    token.ok_or_else(|| ModelError::Mlx("choosing gave no array".to_owned()))
}

/// By MLX's operations: sorted where something is filtered, so that the filters are prefixes.
fn drawn(logits: &Array, filter: Filter, seed: u64) -> Result<Array, ModelError> {
    let key = random::key(seed)?;
    let factor = Array::from_f32(filter.temperature.recip());
    if filter.keeps_all() {
        return Ok(random::categorical(
            ops::multiply(logits, factor)?,
            -1,
            None,
            &key,
        )?);
    }
    let (order, kept) = filtered(logits, filter)?;
    let place = random::categorical(ops::multiply(kept, factor)?, -1, None, &key)?;
    let place = place.reshape(&[-1, 1])?;
    Ok(take_along_axis(order, place, -1)?.reshape(&[-1])?)
}

/// Tokens, likeliest first, and their logits, which are minus infinity where a filter leaves them out.
fn filtered(logits: &Array, filter: Filter) -> Result<(Array, Array), ModelError> {
    let mut order = ops::argsort_axis(ops::negative(logits)?, -1)?;
    if filter.top_k > 0 {
        let count = i32::try_from(filter.top_k).unwrap_or(i32::MAX);
        let width = logits.shape().last().copied().unwrap_or(0);
        order = order.try_index((.., ..count.min(width)))?;
    }
    let sorted = take_along_axis(logits, &order, -1)?;
    let logprobs = ops::subtract(&sorted, ops::logsumexp_axis(logits, -1, true)?)?;
    let mut kept = ops::ones_like(&logprobs)?.as_dtype(Dtype::Bool)?;
    if filter.top_p < 1.0 {
        // What is likelier than a token has less than top-p.
        let before = ops::cumsum(ops::exp(&logprobs)?, -1, false, false)?;
        let within = ops::lt(before, Array::from_f32(filter.top_p))?;
        kept = ops::logical_and(kept, within)?;
    }
    if filter.min_p > 0.0 {
        let likeliest = logprobs.try_index((.., ..1))?;
        let least = ops::add(likeliest, Array::from_f32(filter.min_p.ln()))?;
        kept = ops::logical_and(kept, ops::ge(&logprobs, least)?)?;
    }
    let never = Array::from_f32(f32::NEG_INFINITY);
    Ok((order, ops::select(kept, sorted, never)?))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::filter::tests::of_mlx_lm;
    use super::*;

    #[test]
    fn operations_of_mlx_keep_what_mlx_lm_keeps() {
        for (logits, filter, expected) in of_mlx_lm() {
            let logits = Array::from_slice(&logits, &[1, logits.len() as i32]);
            let (order, kept) = filtered(&logits, filter).expect("MLX filters");
            kept.eval().expect("MLX evaluates");
            let order = order.as_dtype(Dtype::Uint32).expect("a type");
            order.eval().expect("MLX evaluates");
            let order = order.try_as_slice::<u32>().expect("numbers");
            let kept = order.iter().zip(kept.try_as_slice::<f32>().expect("numbers"));
            let kept: BTreeSet<usize> = kept
                .filter(|(_, logit)| logit.is_finite())
                .map(|(&token, _)| token as usize)
                .collect();
            assert_eq!(kept, expected.iter().copied().collect(), "{filter:?}");
            for seed in 0..20 {
                let token = drawn(&logits, filter, seed).expect("MLX draws");
                let token = token.as_dtype(Dtype::Uint32).expect("a type");
                let token = token.try_item_exact::<u32>().expect("a number");
                assert!(kept.contains(&(token as usize)), "{filter:?}");
            }
        }
    }
}
