//! Rows as integers.

use crate::Pool;
use crate::disjoint::Disjoint;
use crate::isa::Isa;
use crate::matrix::BLOCK;
use crate::simd::{Bytes, Kernel, LANES, Simd, dispatch};

/// Rows as integers of 8 bits, 32 to a block: `x = scale * q`.
///
/// Rows are in strips, and within a strip lie block by block: the rows of a strip are multiplied together. Rows that
/// fill up the last strip are zeros.
///
/// What a norm gives has a few channels that are many times as large as the others. In their blocks the steps between
/// integers are as much larger, and nearly all of a product's error is theirs. So a block that is [`OUTLIER`] times as large
/// as its row's blocks are has a rest too, of 8 further bits: `x = scale * q + rest.scale * rest.q`.
#[derive(Debug, Default)]
pub(crate) struct Integers {
    /// Rows of a strip.
    pub(crate) strip: usize,
    /// 32 integers of -127 to 127.
    pub(crate) bytes: Vec<Bytes>,
    /// Of each block.
    pub(crate) factors: Vec<Factors>,
    /// Of each block of a strip, the rows that have a rest, the first of the strip in the lowest bit.
    refined: Vec<u16>,
    /// Laid out as `bytes`; what is no rest of a row that has one is arbitrary.
    rests: Vec<Rest>,
}

/// What a block of activations is multiplied with.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Factors {
    pub(crate) scale: f32,
    /// The sum of the block as its integers have it, which the bias of the weights multiplies.
    pub(crate) sum: f32,
    /// The sum of `-q`: the products of weights without a bias start from it, times half the range of their numbers.
    pub(crate) negated: i32,
}

/// The rest of a block.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rest {
    /// 32 integers of -127 to 127.
    pub(crate) bytes: Bytes,
    pub(crate) scale: f32,
    /// The sum of `-q`.
    pub(crate) negated: i32,
}

/// A strip.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strip<'a> {
    /// Row by row within a block.
    pub(crate) bytes: &'a [Bytes],
    pub(crate) factors: &'a [Factors],
    /// One for each block.
    pub(crate) refined: &'a [u16],
    pub(crate) rests: &'a [Rest],
}

impl Integers {
    /// Makes integers of rows.
    pub(super) fn quantize(&mut self, isa: Isa, pool: &Pool, floats: &[f32], columns: usize) {
        let rows = floats.len() / columns;
        self.bytes.clear();
        if rows == 0 {
            return;
        }
        let blocks = columns / BLOCK;
        self.strip = match rows {
            0..FEW => rows,
            FEW..=HALF_STRIP => HALF_STRIP,
            _ => LANES,
        };
        let strip = self.strip;
        let strips = rows.div_ceil(strip);
        let count = strips * strip * blocks;
        self.bytes.resize(count, Bytes::default());
        self.factors.clear();
        self.factors.resize(count, Factors::default());
        self.refined.clear();
        self.refined.resize(strips * blocks, 0);
        if self.rests.len() < count {
            self.rests.resize(count, Rest::default());
        }
        let bytes = Disjoint::new(&mut self.bytes);
        let factors = Disjoint::new(&mut self.factors);
        let refined = Disjoint::new(&mut self.refined);
        let rests = Disjoint::new(&mut self.rests);
        let len = strip * blocks;
        let quantize = |index: usize| {
            let first = index * strip;
            #[expect(unsafe_code, reason = "each task writes its own strips")]
            // SAFETY: a strip has its own part of each, and is given to one task.
            let (bytes, factors, refined, rests) = unsafe {
                (
                    bytes.part(index * len, len),
                    factors.part(index * len, len),
                    refined.part(index * blocks, blocks),
                    rests.part(index * len, len),
                )
            };
            for (row, floats) in floats[first * columns..]
                .chunks_exact(columns)
                .take(strip)
                .enumerate()
            {
                dispatch(
                    isa,
                    Quantize {
                        floats,
                        row,
                        strip,
                        bytes,
                        factors,
                        refined,
                        rests,
                    },
                );
            }
        };
        pool.split(strips, |range| range.for_each(quantize));
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.capacity() * size_of::<Bytes>()
            + self.factors.capacity() * size_of::<Factors>()
            + self.refined.capacity() * size_of::<u16>()
            + self.rests.capacity() * size_of::<Rest>()
    }

    #[inline(always)]
    pub(crate) fn strip(&self, strip: usize, blocks: usize) -> Strip<'_> {
        let len = self.strip * blocks;
        Strip {
            bytes: &self.bytes[strip * len..][..len],
            factors: &self.factors[strip * len..][..len],
            refined: &self.refined[strip * blocks..][..blocks],
            rests: &self.rests[strip * len..][..len],
        }
    }
}

/// Rows below which a strip has only these.
pub(crate) const FEW: usize = 7;

/// Rows of a strip where they are all there are.
const HALF_STRIP: usize = 8;

/// The largest integer.
const LARGEST: f32 = 127.0;

/// A block has a rest where it is so many times as large as the harmonic mean of its row's blocks, which a few large ones
/// hardly move.
const OUTLIER: f32 = 2.0;

/// The part of a step that the step of a rest is.
const FINER: f32 = 1.0 / 256.0;

/// One row of a strip.
struct Quantize<'a> {
    floats: &'a [f32],
    row: usize,
    /// Rows of the strip.
    strip: usize,
    bytes: &'a mut [Bytes],
    factors: &'a mut [Factors],
    refined: &'a mut [u16],
    rests: &'a mut [Rest],
}

/// The inverse of a scale; 0 of zeros, and of numbers so small that it would not be finite: they become zeros.
#[inline(always)]
fn inverse_of(scale: f32) -> f32 {
    if scale > f32::MIN_POSITIVE {
        1.0 / scale
    } else {
        0.0
    }
}

/// What `near` steps leave of `x`, in finer steps. Half a step is 128 of these, of which 127 are kept.
#[inline(always)]
fn rest_of<S: Simd>(s: S, x: S::F, near: S::I, step: S::F, finer: S::F) -> S::I {
    let left = s.sub(x, s.mul(s.to_float(near), step));
    let steps = s.mul(left, finer);
    s.round(s.min(s.max(steps, s.splat(-LARGEST)), s.splat(LARGEST)))
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (vectors, _) = self.floats.as_chunks::<LANES>();
        let (blocks, _) = vectors.as_chunks::<2>();
        let (mut inverses, mut counted) = (0.0, 0.0);
        for ([a, b], factors) in blocks.iter().zip(self.factors.chunks_exact_mut(self.strip)) {
            let largest = s.largest(s.max(s.abs(s.load(a)), s.abs(s.load(b))));
            factors[self.row].scale = largest / LARGEST;
            let inverse = inverse_of(factors[self.row].scale);
            inverses += inverse;
            counted += f32::from(u8::from(inverse > 0.0));
        }
        let limit = OUTLIER * counted;
        let outputs = self
            .bytes
            .chunks_exact_mut(self.strip)
            .zip(self.factors.chunks_exact_mut(self.strip))
            .zip(self.refined)
            .zip(self.rests.chunks_exact_mut(self.strip));
        for ([a, b], (((bytes, factors), refined), rests)) in blocks.iter().zip(outputs) {
            let (bytes, factors) = (&mut bytes[self.row], &mut factors[self.row]);
            let scale = factors.scale;
            let (a, b) = (s.load(a), s.load(b));
            let inverse = s.splat(inverse_of(scale));
            let (near_a, near_b) = (s.round(s.mul(a, inverse)), s.round(s.mul(b, inverse)));
            // A sum of 32 small integers is exact.
            let sum = s.sum(s.to_float(s.add_i(near_a, near_b)));
            *bytes = s.narrow(near_a, near_b);
            *factors = Factors {
                scale,
                sum: scale * sum,
                negated: -sum as i32,
            };
            if scale * inverses > limit {
                let rest = &mut rests[self.row];
                rest.scale = scale * FINER;
                let finer = s.splat(inverse_of(rest.scale));
                let step = s.splat(scale);
                let (a, b) = (
                    rest_of(s, a, near_a, step, finer),
                    rest_of(s, b, near_b, step, finer),
                );
                let sum = s.sum(s.to_float(s.add_i(a, b)));
                rest.bytes = s.narrow(a, b);
                rest.negated = -sum as i32;
                factors.sum += rest.scale * sum;
                *refined |= 1 << self.row;
            }
        }
    }
}
