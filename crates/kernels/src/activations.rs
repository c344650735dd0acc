//! Rows of activations, as float32 and, for products with quantized weights, as integers.

use bytemuck::{Pod, Zeroable};

use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::matrix::BLOCK;
use crate::simd::{Halves, Kernel, LANES, Simd, dispatch};
use crate::{KernelError, Pool};

/// How products with quantized weights are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Weights become float32 and everything is summed in float32.
    Exact,
    /// Activations become integers of 16 bits with a scale for each 32 of a row, and integers are summed within these.
    /// The error of an activation is at most 1/65024 of the largest of its 32: less than that of float16.
    Integer,
}

/// 32 activations as integers of 16 bits, `x = scale * q`, in the halves that the instruction set multiplies bytes of
/// weights with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Block {
    pub(crate) halves: Halves,
    pub(crate) scale: f32,
    /// `scale` times the sum of `q`, which the bias of the weights multiplies.
    pub(crate) sum: f32,
}

/// The largest integer: its upper byte, rounded, is at most 127.
const LARGEST: f32 = 32512.0;

/// Rows of activations `[rows, columns]` that go into projections.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    columns: usize,
    /// For which the integers are laid out.
    isa: Option<Isa>,
    pub(crate) floats: Vec<f32>,
    pub(crate) blocks: Vec<Block>,
}

impl Activations {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes the shape and gives the floats to write; what they hold before is arbitrary. Memory is kept.
    pub fn resize(&mut self, rows: usize, columns: usize) -> &mut [f32] {
        (self.rows, self.columns) = (rows, columns);
        self.blocks.clear();
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
        self.blocks.clear();
        &mut self.floats
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.floats.capacity() * size_of::<f32>() + self.blocks.capacity() * size_of::<Block>()
    }

    /// Makes the rows ready for products of this precision. Columns that are not whole blocks of 32 are left to the
    /// exact products: no quantized matrix has such columns.
    pub fn prepare(&mut self, isa: Isa, pool: &Pool, precision: Precision) {
        self.blocks.clear();
        self.isa = Some(isa);
        if precision == Precision::Exact || !self.columns.is_multiple_of(BLOCK) {
            return;
        }
        let count = self.floats.len() / BLOCK;
        self.blocks.resize(count, Block::default());
        let floats = &self.floats;
        if self.rows <= 2 {
            dispatch(
                isa,
                Quantize {
                    floats,
                    blocks: &mut self.blocks,
                },
            );
            return;
        }
        let parts = Disjoint::new(&mut self.blocks);
        pool.split(count, 16, |range| {
            let floats = &floats[range.start * BLOCK..range.end * BLOCK];
            #[expect(unsafe_code, reason = "each task writes its own blocks")]
            // SAFETY: the ranges that tasks get do not overlap.
            let blocks = unsafe { parts.part(range.start, range.len()) };
            dispatch(isa, Quantize { floats, blocks });
        });
    }

    /// Whether integers are there.
    pub(crate) fn is_integer(&self) -> bool {
        !self.blocks.is_empty()
    }

    pub(crate) fn check(&self, isa: Isa, columns: usize) -> Result<(), KernelError> {
        if self.is_integer() && self.isa != Some(isa) {
            return Err(KernelError::OtherIsa);
        }
        check_len("the activations", self.columns, columns)
    }
}

struct Quantize<'a> {
    floats: &'a [f32],
    blocks: &'a mut [Block],
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (halves, _) = self.floats.as_chunks::<LANES>();
        for (block, pair) in self.blocks.iter_mut().zip(halves.chunks_exact(2)) {
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
            let sum = s.sum(s.to_float(s.add_i(a, b)));
            block.halves = s.halves(a, b);
            block.scale = scale;
            block.sum = scale * sum;
        }
    }
}
