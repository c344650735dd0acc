//! Products of activations with matrices of weights.
//!
//! A task takes some tiles of sixteen rows of weights and all rows of activations, up to sixteen of them at a time, so
//! that a tile is unpacked once for sixteen rows and stays in the first cache meanwhile.

/// Runs a body with a constant number of rows, the first of the sizes as long as there are as many, then the next; sizes
/// beyond a limit are left out.
macro_rules! in_groups {
    ($rows:expr, $limit:expr, [$($size:literal),*], $first:ident, $count:ident => $body:expr) => {
        let mut $first = 0;
        $(
            while $size <= $limit && $rows - $first >= $size {
                const $count: usize = $size;
                $body;
                $first += $size;
            }
        )*
    };
}

mod floats;
mod gate;
mod integers;
mod tile;
mod unit;

use crate::activations::Activations;
use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::matrix::Matrix;
use crate::simd::{Kernel, LANES, Simd, dispatch};
use crate::{KernelError, Pool};

pub(crate) use gate::gate_function;
pub use gate::{Gate, apply_gate};
use tile::bias_of;
pub(crate) use tile::{SCRATCH, padded, put, tile_rows};

/// Where a product goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Write,
    Add,
}

/// A projection of some activations: `x * matrix^T + bias`.
#[derive(Debug)]
pub struct Product<'a> {
    matrix: &'a Matrix,
    bias: Option<&'a [f32]>,
    out: &'a mut [f32],
    mode: Mode,
}

impl<'a> Product<'a> {
    /// Writes to `out`, `[rows of activations, rows of the matrix]`.
    pub fn write(matrix: &'a Matrix, bias: Option<&'a [f32]>, out: &'a mut [f32]) -> Self {
        Self {
            matrix,
            bias,
            out,
            mode: Mode::Write,
        }
    }

    /// Adds to what `out` holds: the residual stream.
    pub fn add(matrix: &'a Matrix, bias: Option<&'a [f32]>, out: &'a mut [f32]) -> Self {
        Self {
            mode: Mode::Add,
            ..Self::write(matrix, bias, out)
        }
    }

    fn check(&self, isa: Isa, x: &Activations) -> Result<(), KernelError> {
        x.check(isa, self.matrix.columns)?;
        if let Some(bias) = self.bias {
            check_len("the bias", bias.len(), self.matrix.rows)?;
        }
        check_len("the product", self.out.len(), x.rows() * self.matrix.rows)
    }
}

/// Computes several projections of the same activations.
///
/// # Errors
///
/// Where a length does not fit the shapes; nothing is written then.
pub fn project(
    isa: Isa,
    pool: &Pool,
    x: &Activations,
    products: &mut [Product<'_>],
) -> Result<(), KernelError> {
    for product in products.iter() {
        product.check(isa, x)?;
    }
    let tiles: Vec<usize> = products.iter().map(|product| product.matrix.tiles()).collect();
    let parts: Vec<_> = products
        .iter_mut()
        .map(|product| Part {
            matrix: product.matrix,
            bias: product.bias,
            out: Disjoint::new(product.out),
            mode: product.mode,
        })
        .collect();
    pool.split(tiles.iter().sum(), |range| {
        let mut first = 0;
        for (part, &tiles) in parts.iter().zip(&tiles) {
            let (start, end) = (range.start.max(first), range.end.min(first + tiles));
            if start < end {
                let tiles = start - first..end - first;
                dispatch(isa, Project { part, x, tiles });
            }
            first += tiles;
        }
    });
    Ok(())
}

/// Computes `gate(x * gate_matrix^T) * (x * up_matrix^T)`, the first half of a gated MLP, into `out`,
/// `[rows of activations, rows of a matrix]`.
///
/// # Errors
///
/// Where a length does not fit the shapes; nothing is written then.
pub fn gated(
    isa: Isa,
    pool: &Pool,
    x: &Activations,
    gate: Gate,
    [gate_matrix, up_matrix]: [&Matrix; 2],
    [gate_bias, up_bias]: [Option<&[f32]>; 2],
    out: &mut [f32],
) -> Result<(), KernelError> {
    let mut nothing: [f32; 0] = [];
    check_len("the rows of the gate's matrix", gate_matrix.rows, up_matrix.rows)?;
    Product::write(gate_matrix, gate_bias, out).check(isa, x)?;
    let up_fits = Product::write(up_matrix, up_bias, &mut nothing);
    x.check(isa, up_fits.matrix.columns)?;
    if let Some(bias) = up_bias {
        check_len("the bias", bias.len(), up_matrix.rows)?;
    }
    let out = Disjoint::new(out);
    let matrices = [(gate_matrix, gate_bias), (up_matrix, up_bias)];
    pool.split(gate_matrix.tiles(), |tiles| {
        dispatch(
            isa,
            Gated {
                matrices,
                x,
                gate,
                out: &out,
                tiles,
            },
        );
    });
    Ok(())
}

struct Part<'a> {
    matrix: &'a Matrix,
    bias: Option<&'a [f32]>,
    out: Disjoint<'a, f32>,
    mode: Mode,
}

impl Part<'_> {
    /// Takes a tile's sums of all rows.
    #[inline(always)]
    fn take<S: Simd>(&self, s: S, tile: usize, sums: &[[f32; LANES]]) {
        let rows = self.matrix.rows;
        let lanes = LANES.min(rows - tile * LANES);
        let bias = bias_of(self.bias, tile);
        for (row, sums) in sums.iter().enumerate() {
            let sums = s.add(s.load(sums), s.load(&bias));
            #[expect(unsafe_code, reason = "each task writes its own tiles of each row")]
            // SAFETY: tasks have different tiles, so that what they write of a row does not overlap.
            let out = unsafe { self.out.part(row * rows + tile * LANES, lanes) };
            let before = match self.mode {
                Mode::Write => [0.0; LANES],
                Mode::Add => padded(out),
            };
            put(s, s.add(s.load(&before), sums), out);
        }
    }
}

struct Project<'a> {
    part: &'a Part<'a>,
    x: &'a Activations,
    tiles: std::ops::Range<usize>,
}

impl Kernel for Project<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { part, x, tiles } = self;
        let mut scratch = SCRATCH.take();
        let mut next = tiles.start;
        while next < tiles.end {
            // Two at once, so that a matrix unit reads activations once for both.
            let both = next + 1 < tiles.end;
            if both {
                tile_rows(s, [(part.matrix, next), (part.matrix, next + 1)], x, &mut scratch);
            } else {
                tile_rows(s, [(part.matrix, next)], x, &mut scratch);
            }
            for sums in &scratch.sums[..=usize::from(both)] {
                part.take(s, next, sums);
                next += 1;
            }
        }
        SCRATCH.set(scratch);
    }
}

struct Gated<'a> {
    matrices: [(&'a Matrix, Option<&'a [f32]>); 2],
    x: &'a Activations,
    gate: Gate,
    out: &'a Disjoint<'a, f32>,
    tiles: std::ops::Range<usize>,
}

impl Kernel for Gated<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [(gate_matrix, gate_bias), (up_matrix, up_bias)] = self.matrices;
        let rows = gate_matrix.rows;
        let mut scratch = SCRATCH.take();
        for tile in self.tiles {
            let biases = [gate_bias, up_bias].map(|bias| bias_of(bias, tile));
            let lanes = LANES.min(rows - tile * LANES);
            tile_rows(s, [(gate_matrix, tile), (up_matrix, tile)], self.x, &mut scratch);
            let [gates, ups] = &scratch.sums;
            for (row, (gate, up)) in gates.iter().zip(ups).enumerate() {
                let gate = s.add(s.load(gate), s.load(&biases[0]));
                let up = s.add(s.load(up), s.load(&biases[1]));
                #[expect(unsafe_code, reason = "each task writes its own tiles of each row")]
                // SAFETY: tasks have different tiles, so that what they write of a row does not overlap.
                let out = unsafe { self.out.part(row * rows + tile * LANES, lanes) };
                put(s, s.mul(up, gate_function(s, self.gate, gate)), out);
            }
        }
        SCRATCH.set(scratch);
    }
}

#[cfg(test)]
mod tests;
