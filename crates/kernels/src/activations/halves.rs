//! Rows as bfloat16, for a unit that multiplies matrices.

use crate::Pool;
use crate::disjoint::Disjoint;
use crate::isa::Isa;
use crate::matrix::BLOCK;
use crate::simd::{Kernel, LANES, Simd, Square, dispatch};

/// Rows as bfloat16, sixteen to a strip, and a strip block by block: a line of a square has 32 columns of a row, the first sixteen
/// and the last by turns. Rows that fill up the last strip are zeros.
#[derive(Debug, Default)]
pub(crate) struct Halves {
    pub(crate) rows: usize,
    squares: Vec<Square>,
}

impl Halves {
    /// Rounds rows.
    pub(super) fn round(&mut self, isa: Isa, pool: &Pool, floats: &[f32], columns: usize) {
        let blocks = columns / BLOCK;
        self.rows = floats.len() / columns;
        let strips = self.rows.div_ceil(LANES);
        self.squares.clear();
        self.squares.resize(strips * blocks, Square::ZERO);
        let squares = Disjoint::new(&mut self.squares);
        pool.split(strips, |range| {
            for strip in range {
                #[expect(unsafe_code, reason = "each task writes its own strips")]
                // SAFETY: a strip is given to one task.
                let squares = unsafe { squares.part(strip * blocks, blocks) };
                let floats = floats[strip * LANES * columns..].chunks_exact(columns);
                for (row, floats) in floats.take(LANES).enumerate() {
                    dispatch(isa, Round { floats, row, squares });
                }
            }
        });
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        self.squares.capacity() * size_of::<Square>()
    }

    /// Strips of so many blocks.
    pub(crate) fn strips(&self, blocks: usize) -> impl Iterator<Item = &[Square]> {
        self.squares.chunks_exact(blocks)
    }
}

/// One row of a strip.
struct Round<'a> {
    floats: &'a [f32],
    row: usize,
    squares: &'a mut [Square],
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (vectors, _) = self.floats.as_chunks::<LANES>();
        let (blocks, _) = vectors.as_chunks::<2>();
        for ([a, b], square) in blocks.iter().zip(self.squares) {
            s.store_line(s.halves(s.load(a), s.load(b)), &mut square.0[self.row]);
        }
    }
}
