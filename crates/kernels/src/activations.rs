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
    /// The error of an activation is at most 1/254 of the largest of its 32.
    Integer,
}

/// Rows as integers of 8 bits, 32 to a block: `x = scale * q`.
///
/// Rows are in strips, and within a strip lie block by block: the rows of a strip are multiplied together. Rows that
/// fill up the last strip are zeros.
#[derive(Debug, Default)]
pub(crate) struct Integers {
    /// Rows of a strip.
    pub(crate) strip: usize,
    /// 32 integers of -127 to 127.
    pub(crate) bytes: Vec<Bytes>,
    /// Of each block.
    pub(crate) factors: Vec<Factors>,
}

/// What a block of activations is multiplied with.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Factors {
    pub(crate) scale: f32,
    /// The scale times the sum of `q`, which the bias of the weights multiplies.
    pub(crate) sum: f32,
    /// The sum of `-q`: the products of weights without a bias start from it, times half the range of their numbers.
    pub(crate) negated: i32,
}

impl Integers {
    /// The blocks of a strip, row by row within a block.
    #[inline(always)]
    pub(crate) fn strip(&self, strip: usize, blocks: usize) -> (&[Bytes], &[Factors]) {
        let len = self.strip * blocks;
        (
            &self.bytes[strip * len..][..len],
            &self.factors[strip * len..][..len],
        )
    }
}

/// Rows below which a strip has only these, and no matrix unit is used.
pub(crate) const FEW: usize = 7;

/// Rows of a strip where they are all there are.
pub(crate) const HALF_STRIP: usize = 8;

/// The largest integer.
const LARGEST: f32 = 127.0;

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
        self.floats.capacity() * size_of::<f32>()
            + self.integers.bytes.capacity() * (size_of::<Bytes>() + size_of::<Factors>())
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
        let count = rows.next_multiple_of(integers.strip) * blocks;
        integers.bytes.resize(count, Bytes::default());
        integers.factors.clear();
        integers.factors.resize(count, Factors::default());
        let strip = integers.strip;
        let (bytes, factors) = (
            Disjoint::new(&mut integers.bytes),
            Disjoint::new(&mut integers.factors),
        );
        let floats = &self.floats;
        let quantize = |row: usize| {
            dispatch(
                isa,
                Quantize {
                    floats: &floats[row * columns..][..columns],
                    bytes: &bytes,
                    factors: &factors,
                    first: row / strip * strip * blocks + row % strip,
                    step: strip,
                },
            );
        };
        if rows < FEW {
            (0..rows).for_each(quantize);
        } else {
            pool.split(rows, |range| range.for_each(quantize));
        }
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

/// One row.
struct Quantize<'a> {
    floats: &'a [f32],
    bytes: &'a Disjoint<'a, Bytes>,
    factors: &'a Disjoint<'a, Factors>,
    /// Where the row's first block goes.
    first: usize,
    /// How far its next one is.
    step: usize,
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (vectors, _) = self.floats.as_chunks::<LANES>();
        for (index, pair) in vectors.chunks_exact(2).enumerate() {
            let (a, b) = (s.load(&pair[0]), s.load(&pair[1]));
            let largest = s.largest(s.max(s.abs(a), s.abs(b)));
            let scale = largest / LARGEST;
            // Zeros, and numbers so small that the inverse is not finite, are zeros.
            let inverse = if scale > f32::MIN_POSITIVE {
                1.0 / scale
            } else {
                0.0
            };
            let inverse = s.splat(inverse);
            let (a, b) = (s.round(s.mul(a, inverse)), s.round(s.mul(b, inverse)));
            // A sum of 32 small integers is exact.
            let sum = s.sum(s.to_float(s.add_i(a, b)));
            let at = self.first + index * self.step;
            #[expect(unsafe_code, reason = "each task writes its own rows")]
            // SAFETY: a row has its own place in each block of its strip, and is given to one task.
            let (bytes, factors) = unsafe { (self.bytes.part(at, 1), self.factors.part(at, 1)) };
            if let ([bytes], [factors]) = (bytes, factors) {
                *bytes = s.narrow(a, b);
                *factors = Factors {
                    scale,
                    sum: scale * sum,
                    negated: -sum as i32,
                };
            }
        }
    }
}
