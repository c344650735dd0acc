//! Products in float32.

use crate::activations::Activations;
use crate::matrix::{BLOCK, Quantized, middle, unpack};
use crate::simd::{Kernel, LANES, Simd};

/// A tile of weights as float32.
pub(super) struct Dequantize<'a, const BITS: usize> {
    pub(super) weights: &'a Quantized,
    pub(super) tile: usize,
    pub(super) panel: &'a mut [[f32; LANES]],
}

impl<const BITS: usize> Kernel for Dequantize<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, tile, panel } = self;
        let blocks = panel.len() / BLOCK;
        let per_group = weights.group_size / BLOCK;
        let lines = weights.tile(tile, blocks);
        for (index, (block, out)) in lines
            .chunks_exact(BITS)
            .zip(panel.chunks_exact_mut(BLOCK))
            .enumerate()
        {
            let numbers = unpack::<S, BITS>(s, block);
            let group = tile * (blocks / per_group) + index / per_group;
            let (scale, bias) = scale_and_bias::<S, BITS>(s, weights, group);
            for (four, out) in numbers.into_iter().zip(out.chunks_exact_mut(4)) {
                for (column, out) in columns(s, four, scale, bias).into_iter().zip(out) {
                    s.store(column, out);
                }
            }
        }
    }
}

/// The scales and biases of sixteen rows.
#[inline(always)]
pub(super) fn scale_and_bias<S: Simd, const BITS: usize>(
    s: S,
    weights: &Quantized,
    group: usize,
) -> (S::F, S::F) {
    let (scale, bias) = weights.scales.load(s, group);
    let bias = match bias {
        Some(bias) => bias,
        None => s.mul(scale, s.splat(-middle(BITS as u32))),
    };
    (scale, bias)
}

/// Four columns of sixteen rows, from their bytes.
#[inline(always)]
pub(super) fn columns<S: Simd>(s: S, four: S::I, scale: S::F, bias: S::F) -> [S::F; 4] {
    let byte = s.splat_i(0xff);
    let mut out = [bias; 4];
    let numbers = [
        s.and(four, byte),
        s.and(s.shr::<8>(four), byte),
        s.and(s.shr::<16>(four), byte),
        s.shr::<24>(four),
    ];
    for (out, number) in out.iter_mut().zip(numbers) {
        *out = s.fma(scale, s.to_float(number), bias);
    }
    out
}

#[inline(always)]
pub(super) fn float_rows<S: Simd>(s: S, panel: &[[f32; LANES]], x: &Activations, sums: &mut [[f32; LANES]]) {
    let columns = panel.len();
    // Each row has two vectors of sums.
    in_groups!(x.rows(), S::SUMS / 2, [8, 4, 3, 2, 1], first, M => {
        let rows: [&[f32]; M] = std::array::from_fn(|row| &x.floats[(first + row) * columns..][..columns]);
        sums[first..][..M].copy_from_slice(&s.call(FloatBlock::<M> { panel, rows }));
    });
}

/// One tile times `M` rows of float32.
struct FloatBlock<'a, const M: usize> {
    panel: &'a [[f32; LANES]],
    rows: [&'a [f32]; M],
}

impl<const M: usize> Kernel for FloatBlock<'_, M> {
    type Output = [[f32; LANES]; M];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let Self { panel, rows } = self;
        // Even and odd columns apart, so that few rows do not wait for each sum; the same for any number of rows, so that
        // each gets the same bits.
        let mut sums = [[s.splat(0.0); 2]; M];
        let pairs = panel.len() / 2;
        for pair in 0..pairs {
            let (even, odd) = (s.load(&panel[2 * pair]), s.load(&panel[2 * pair + 1]));
            for (sums, row) in sums.iter_mut().zip(&rows) {
                let Some(&[x, y]) = row[2 * pair..].first_chunk::<2>() else {
                    continue;
                };
                sums[0] = s.fma(even, s.splat(x), sums[0]);
                sums[1] = s.fma(odd, s.splat(y), sums[1]);
            }
        }
        if panel.len() % 2 == 1 {
            let last = s.load(&panel[panel.len() - 1]);
            for (sums, row) in sums.iter_mut().zip(&rows) {
                sums[0] = s.fma(last, s.splat(row[panel.len() - 1]), sums[0]);
            }
        }
        stored(s, sums.map(|[a, b]| s.add(a, b)))
    }
}

#[inline(always)]
fn stored<S: Simd, const M: usize>(s: S, sums: [S::F; M]) -> [[f32; LANES]; M] {
    let mut out = [[0.0; LANES]; M];
    for (out, sum) in out.iter_mut().zip(sums) {
        s.store(sum, out);
    }
    out
}
