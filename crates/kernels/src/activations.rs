//! Rows of activations, as float32 and, for products with quantized weights, as integers.

use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::matrix::BLOCK;
use crate::simd::{Bytes, Kernel, LANES, Simd, dispatch};
use crate::{KernelError, Pool};

/// How products with quantized weights are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Weights become float32 and everything is summed in float32.
    Exact,
    /// Activations become integers of 8 bits with a scale for each 32 of a row, and integers are summed within these.
    /// The error of an activation is at most 1/254 of the largest of its 32, and where that is large for its row, at most
    /// 1/64,000 of it: such 32 have 8 bits more.
    Integer,
}

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

/// Rows of activations `[rows, columns]` that go into projections.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    columns: usize,
    /// For which the integers are laid out.
    isa: Option<Isa>,
    pub(crate) floats: Vec<f32>,
    pub(crate) integers: Integers,
}

impl Activations {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes the shape and gives the floats to write; what they hold before is arbitrary. Memory is kept.
    pub fn resize(&mut self, rows: usize, columns: usize) -> &mut [f32] {
        (self.rows, self.columns) = (rows, columns);
        self.integers.bytes.clear();
        self.floats.resize(rows * columns, 0.0);
        &mut self.floats
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The floats, row-major.
    pub fn floats(&self) -> &[f32] {
        &self.floats
    }

    /// The floats to write. An earlier [`prepare`](Self::prepare) does not hold for what is written.
    pub fn floats_mut(&mut self) -> &mut [f32] {
        self.integers.bytes.clear();
        &mut self.floats
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        let integers = &self.integers;
        self.floats.capacity() * size_of::<f32>()
            + integers.bytes.capacity() * size_of::<Bytes>()
            + integers.factors.capacity() * size_of::<Factors>()
            + integers.refined.capacity() * size_of::<u16>()
            + integers.rests.capacity() * size_of::<Rest>()
    }

    /// Makes the rows ready for products of this precision. Columns that are not whole blocks of 32 are left to the
    /// exact products: no quantized matrix has such columns.
    pub fn prepare(&mut self, isa: Isa, pool: &Pool, precision: Precision) {
        let (rows, columns) = (self.rows, self.columns);
        let integers = &mut self.integers;
        integers.bytes.clear();
        self.isa = Some(isa);
        if precision == Precision::Exact || !columns.is_multiple_of(BLOCK) || rows * columns == 0 {
            return;
        }
        let blocks = columns / BLOCK;
        integers.strip = match rows {
            0..FEW => rows,
            FEW..=HALF_STRIP => HALF_STRIP,
            _ => LANES,
        };
        let strip = integers.strip;
        let strips = rows.div_ceil(strip);
        let count = strips * strip * blocks;
        integers.bytes.resize(count, Bytes::default());
        integers.factors.clear();
        integers.factors.resize(count, Factors::default());
        integers.refined.clear();
        integers.refined.resize(strips * blocks, 0);
        if integers.rests.len() < count {
            integers.rests.resize(count, Rest::default());
        }
        let bytes = Disjoint::new(&mut integers.bytes);
        let factors = Disjoint::new(&mut integers.factors);
        let refined = Disjoint::new(&mut integers.refined);
        let rests = Disjoint::new(&mut integers.rests);
        let floats = &self.floats;
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

    /// Whether integers are there.
    pub(crate) fn is_integer(&self) -> bool {
        !self.integers.bytes.is_empty()
    }

    pub(crate) fn check(&self, isa: Isa, columns: usize) -> Result<(), KernelError> {
        if self.is_integer() && self.isa != Some(isa) {
            return Err(KernelError::OtherIsa);
        }
        check_len("the activations", self.columns, columns)
    }
}

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
