//! Rows of activations, as float32 and, for products with quantized weights, as int8.

use bytemuck::{Pod, Zeroable};

use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::matrix::{BLOCK, STEPS};
use crate::simd::{Kernel, LANES, Line, Simd, dispatch};
use crate::{KernelError, Pool};

/// How products with quantized weights are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Weights become float32 and everything is summed in float32.
    Exact,
    /// Activations become int8, with a scale for each 32 of a row, and integers are summed within these. The error of
    /// an activation is at most 1/254 of the largest of its 32.
    Int8,
}

/// 32 activations as int8: `x = scale * q`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Block {
    pub(crate) q: [[i8; 4]; STEPS],
    pub(crate) scale: f32,
    /// `scale` times the sum of `q`, which the bias of the weights multiplies.
    pub(crate) sum: f32,
}

/// Rows of activations `[rows, columns]` that go into projections.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    columns: usize,
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

    /// Whether int8 blocks are there.
    pub(crate) fn is_int8(&self) -> bool {
        !self.blocks.is_empty()
    }

    pub(crate) fn check(&self, columns: usize) -> Result<(), KernelError> {
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
            let scale = largest / 127.0;
            // A row of zeros, or of numbers so small that the inverse is not finite, is zeros.
            let inverse = if scale > f32::MIN_POSITIVE {
                1.0 / scale
            } else {
                0.0
            };
            let inverse = s.splat(inverse);
            let (a, b) = (s.round(s.mul(a, inverse)), s.round(s.mul(b, inverse)));
            let sum = s.sum(s.to_float(s.add_i(a, b)));
            let mut lines = [Line::ZERO; 2];
            s.store_line(a, &mut lines[0]);
            s.store_line(b, &mut lines[1]);
            let wide: &[i32; BLOCK] = bytemuck::cast_ref(&lines);
            let q: &mut [i8; BLOCK] = bytemuck::cast_mut(&mut block.q);
            for (q, wide) in q.iter_mut().zip(wide) {
                *q = *wide as i8;
            }
            block.scale = scale;
            block.sum = scale * sum;
        }
    }
}
