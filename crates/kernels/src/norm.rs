//! Norms over the rows of a matrix.

use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::simd::{Kernel, LANES, Simd, dispatch};
use crate::{KernelError, Pool};

/// Rows below which one thread does them all.
const FEW: usize = 8;

/// RMS norm (Zhang and Sennrich, 2019) of each row of `x`, `[rows, weight.len()]`: the row over the root of its mean
/// square and `eps`, times `weight`.
///
/// # Errors
///
/// Where `x` is not whole rows or `out` has another length.
pub fn rms_norm(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    each_row(pool, x, weight, out, |x, out| {
        dispatch(isa, RmsNorm { x, weight, eps, out });
    })
}

/// Layer norm (Ba, Kiros and Hinton, 2016) of each row of `x`, `[rows, weight.len()]`: the row less its mean, over the
/// root of its variance and `eps`, times `weight`, plus `bias` where there is one.
///
/// # Errors
///
/// Where `x` is not whole rows or another length does not fit.
pub fn layer_norm(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    if let Some(bias) = bias {
        check_len("the bias", bias.len(), weight.len())?;
    }
    each_row(pool, x, weight, out, |x, out| {
        dispatch(
            isa,
            LayerNorm {
                x,
                weight,
                bias,
                eps,
                out,
            },
        );
    })
}

fn each_row(
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    out: &mut [f32],
    norm: impl Fn(&[f32], &mut [f32]) + Sync,
) -> Result<(), KernelError> {
    let width = weight.len().max(1);
    check_len("the rows to normalize", x.len(), x.len() / width * weight.len())?;
    check_len("the output", out.len(), x.len())?;
    let rows = x.len() / width;
    if rows < FEW {
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            norm(x, out);
        }
        return Ok(());
    }
    let out = Disjoint::new(out);
    pool.split(rows, |range| {
        for row in range {
            #[expect(unsafe_code, reason = "each task writes its own rows")]
            // SAFETY: the ranges that tasks get do not overlap.
            let out = unsafe { out.part(row * width, width) };
            norm(&x[row * width..][..width], out);
        }
    });
    Ok(())
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let square = sum_of(s, self.x, 0.0, |x| s.mul(x, x));
        let factor = 1.0 / (square / self.x.len() as f32 + self.eps).sqrt();
        scale(s, self.x, [0.0, factor], self.weight, None, self.out);
    }
}

struct LayerNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.x.len() as f32;
        let mean = sum_of(s, self.x, 0.0, |x| x) / len;
        let centre = s.splat(mean);
        let square = sum_of(s, self.x, mean, |x| {
            let x = s.sub(x, centre);
            s.mul(x, x)
        });
        let factor = 1.0 / (square / len + self.eps).sqrt();
        scale(s, self.x, [mean, factor], self.weight, self.bias, self.out);
    }
}

/// The sum of a function of the elements, which is 0 of `padding`.
#[inline(always)]
fn sum_of<S: Simd>(s: S, x: &[f32], padding: f32, f: impl Fn(S::F) -> S::F) -> f32 {
    let mut sums = [s.splat(0.0); 2];
    let (whole, rest) = x.as_chunks::<LANES>();
    for (index, lanes) in whole.iter().enumerate() {
        sums[index % 2] = s.add(sums[index % 2], f(s.load(lanes)));
    }
    if !rest.is_empty() {
        sums[0] = s.add(sums[0], f(s.load(&padded(rest, padding))));
    }
    s.sum(s.add(sums[0], sums[1]))
}

/// `(x - mean) * factor * weight + bias`.
#[inline(always)]
fn scale<S: Simd>(
    s: S,
    x: &[f32],
    [mean, factor]: [f32; 2],
    weight: &[f32],
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let (mean, factor) = (s.splat(mean), s.splat(factor));
    for (index, out) in out.chunks_mut(LANES).enumerate() {
        let part = |values: &[f32]| s.load(&padded(&values[index * LANES..][..out.len()], 0.0));
        let value = s.mul(s.mul(s.sub(part(x), mean), factor), part(weight));
        let value = match bias {
            Some(bias) => s.add(value, part(bias)),
            None => value,
        };
        if let Some(out) = out.as_mut_array::<LANES>() {
            s.store(value, out);
        } else {
            let mut all = [0.0; LANES];
            s.store(value, &mut all);
            out.copy_from_slice(&all[..out.len()]);
        }
    }
}

#[inline(always)]
fn padded(values: &[f32], padding: f32) -> [f32; LANES] {
    if let Some(all) = values.as_array::<LANES>() {
        return *all;
    }
    let mut lanes = [padding; LANES];
    for (lane, value) in lanes.iter_mut().zip(values) {
        *lane = *value;
    }
    lanes
}
