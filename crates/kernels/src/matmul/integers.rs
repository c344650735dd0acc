//! Products of integers, by vectors.

use super::unit::matrix_rows;
use crate::activations::{Activations, FEW, Factors, Rest, Strip};
use crate::matrix::{BLOCK, Quantized, STEPS, times_middle, unpack};
use crate::simd::{Bytes, Kernel, LANES, Line, Simd};

#[inline(always)]
pub(super) fn integer_rows<S: Simd, const BITS: usize>(
    s: S,
    weights: &Quantized,
    tile: usize,
    x: &Activations,
    sums: &mut [[f32; LANES]],
) {
    if sums.is_empty() {
        return;
    }
    let blocks = x.columns() / BLOCK;
    let lines = weights.tile(tile, blocks);
    let integers = &x.integers;
    // With eight rows the unit is a third slower than vectors are: half of it has nothing to do.
    if let Some(unit) = s.matrix_unit().filter(|_| integers.strip == LANES) {
        return matrix_rows::<S, BITS, LANES>(s, unit, weights, tile, x, sums);
    }
    for (strip, sums) in sums.chunks_mut(integers.strip).enumerate() {
        let strip = integers.strip(strip, blocks);
        let rows = integers.strip;
        if rows < FEW && S::KEEPS_BLOCK {
            in_groups!(rows, FEW, [6, 5, 4, 3, 2, 1], first, M => {
                let sums = &mut sums[first..][..M];
                s.call(IntegerBlock::<BITS, M, true> { weights, lines, tile, strip, rows, first, sums });
            });
            continue;
        }
        in_groups!(sums.len(), LANES, [16, 8, 7, 6, 5, 4, 3, 2, 1], first, M => {
            let sums = &mut sums[first..][..M];
            s.call(IntegerBlock::<BITS, M, false> { weights, lines, tile, strip, rows, first, sums });
        });
        s.call(Rests::<BITS> {
            weights,
            lines,
            tile,
            strip,
            sums,
        });
    }
}

/// Lines of weights between the one that is used and the one that is asked for: 2 KB.
pub(super) const PREFETCH_AHEAD: usize = 32;

/// One tile times `M` rows of a strip of integer activations, and where `RESTS` is set their rests too.
///
/// With `w = scale_w * q_w + bias` and `x = scale_x * q_x`, the product over a block is
/// `scale_w * scale_x * sum(q_w * q_x) + bias * scale_x * sum(q_x)`, or, where the bias is `-scale_w * middle`,
/// `scale_w * scale_x * (sum(q_w * q_x) - middle * sum(q_x))`.
struct IntegerBlock<'a, const BITS: usize, const M: usize, const RESTS: bool> {
    weights: &'a Quantized,
    /// Those of the tile.
    lines: &'a [Line],
    tile: usize,
    strip: Strip<'a>,
    /// Rows of the strip.
    rows: usize,
    /// The first row of it.
    first: usize,
    sums: &'a mut [[f32; LANES]],
}

impl<const BITS: usize, const M: usize, const RESTS: bool> Kernel for IntegerBlock<'_, BITS, M, RESTS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let blocks = self.lines.len() / BITS;
        let per_group = self.weights.group_size / BLOCK;
        let first_group = self.tile * (blocks / per_group);
        let (mut sums, mut of_rests) = ([s.splat(0.0); M], [s.splat(0.0); M]);
        let strip = self.strip;
        assert!(self.first + M <= self.rows, "rows of a strip");
        let len = strip.bytes.len().min(strip.factors.len()).min(strip.rests.len());
        assert!(
            len >= blocks * self.rows && strip.refined.len() >= blocks,
            "blocks of a strip"
        );
        for (index, block) in self.lines.chunks_exact(BITS).enumerate() {
            let at = index * self.rows + self.first;
            #[expect(unsafe_code, reason = "checks here cost a tenth of a token")]
            // SAFETY: `index` is below `blocks`, and the rows from `first` on are within a strip.
            let (bytes, factors, rests, refined) = unsafe {
                (
                    &*strip.bytes.as_ptr().add(at).cast::<[Bytes; M]>(),
                    &*strip.factors.as_ptr().add(at).cast::<[Factors; M]>(),
                    &*strip.rests.as_ptr().add(at).cast::<[Rest; M]>(),
                    *strip.refined.as_ptr().add(index) >> self.first,
                )
            };
            // Few rows wait for memory alone: the processor's own prefetching is a fifth slower.
            for line in 0..BITS {
                s.prefetch(block.as_ptr().wrapping_add(PREFETCH_AHEAD + line));
            }
            let numbers = unpack::<S, BITS>(s, block);
            let (scale, bias) = self.weights.scales.load(s, first_group + index / per_group);
            if let Some(bias) = bias {
                in_groups!(M, S::TOGETHER, [4, 3, 2, 1], first, R => {
                    if let Some((totals, bytes, factors)) = some_of::<_, M, R>(first, &mut sums, bytes, factors) {
                        let dots = s.dots::<BITS, R>([s.zero(); R], &numbers, bytes);
                        for ((total, dot), factors) in totals.iter_mut().zip(dots).zip(factors) {
                            *total = s.fma(s.to_float(dot), s.mul(scale, s.splat(factors.scale)), *total);
                            *total = s.fma(bias, s.splat(factors.sum), *total);
                        }
                    }
                });
            } else {
                in_groups!(M, S::TOGETHER, [4, 3, 2, 1], first, R => {
                    if let Some((totals, bytes, factors)) = some_of::<_, M, R>(first, &mut sums, bytes, factors) {
                        let starts = std::array::from_fn(|row| {
                            times_middle::<S, BITS>(s, s.splat_i(factors[row].negated))
                        });
                        let dots = s.dots::<BITS, R>(starts, &numbers, bytes);
                        for ((total, dot), factors) in totals.iter_mut().zip(dots).zip(factors) {
                            *total = s.fma(s.to_float(dot), s.mul(scale, s.splat(factors.scale)), *total);
                        }
                    }
                });
            }
            if RESTS && refined != 0 {
                for (row, (total, rest)) in of_rests.iter_mut().zip(rests).enumerate() {
                    if refined & (1 << row) != 0 {
                        *total = add_rest::<S, BITS>(s, &numbers, scale, bias.is_some(), rest, *total);
                    }
                }
            }
        }
        for (out, (total, rests)) in self.sums.iter_mut().zip(sums.into_iter().zip(of_rests)) {
            s.store(if RESTS { s.add(total, rests) } else { total }, out);
        }
    }
}

/// `R` of `M` rows, from the first: their sums, and of a block their bytes and factors.
#[inline(always)]
fn some_of<'a, F, const M: usize, const R: usize>(
    first: usize,
    sums: &'a mut [F; M],
    bytes: &'a [Bytes; M],
    factors: &'a [Factors; M],
) -> Option<(&'a mut [F; R], &'a [Bytes; R], &'a [Factors; R])> {
    Some((
        sums.get_mut(first..)?.first_chunk_mut()?,
        bytes.get(first..)?.first_chunk()?,
        factors.get(first..)?.first_chunk()?,
    ))
}

/// Adds the product of a block of weights with the rest of a block of activations.
#[inline(always)]
fn add_rest<S: Simd, const BITS: usize>(
    s: S,
    numbers: &[S::I; STEPS],
    scale: S::F,
    has_bias: bool,
    rest: &Rest,
    total: S::F,
) -> S::F {
    // A bias was multiplied with the rest already, which is in the block's sum.
    let start = if has_bias {
        s.zero()
    } else {
        times_middle::<S, BITS>(s, s.splat_i(rest.negated))
    };
    let dot = s.to_float(s.dot::<BITS>(start, numbers, &rest.bytes));
    s.fma(dot, s.mul(scale, s.splat(rest.scale)), total)
}

/// Adds the products of a tile with the rests of a strip, which few blocks of few rows have: the numbers and the order
/// of the sums are those of [`IntegerBlock`].
pub(super) struct Rests<'a, const BITS: usize> {
    pub(super) weights: &'a Quantized,
    /// Those of the tile, which are in the first cache by now.
    pub(super) lines: &'a [Line],
    pub(super) tile: usize,
    pub(super) strip: Strip<'a>,
    pub(super) sums: &'a mut [[f32; LANES]],
}

impl<const BITS: usize> Kernel for Rests<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let blocks = self.lines.len() / BITS;
        let per_group = self.weights.group_size / BLOCK;
        let first_group = self.tile * (blocks / per_group);
        let mut totals = [[0.0; LANES]; LANES];
        let rests = self.strip.rests.chunks_exact(self.strip.rests.len() / blocks);
        let refined = self.strip.refined.iter().zip(rests);
        for (index, (block, (&refined, rests))) in self.lines.chunks_exact(BITS).zip(refined).enumerate() {
            if refined == 0 {
                continue;
            }
            let numbers = unpack::<S, BITS>(s, block);
            let (scale, bias) = self.weights.scales.load(s, first_group + index / per_group);
            let mut rows = refined;
            while rows != 0 {
                let row = rows.trailing_zeros() as usize;
                rows &= rows - 1;
                if let (Some(rest), Some(total)) = (rests.get(row), totals.get_mut(row)) {
                    let with = add_rest::<S, BITS>(s, &numbers, scale, bias.is_some(), rest, s.load(total));
                    s.store(with, total);
                }
            }
        }
        for (sum, total) in self.sums.iter_mut().zip(&totals) {
            s.store(s.add(s.load(sum), s.load(total)), sum);
        }
    }
}
