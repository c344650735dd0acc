//! A mixture of experts: each has rows of activations of its own, and all are computed as one piece of work.
//!
//! A token chooses a few of many MLPs. The rows that have chosen an expert are gathered, so that its weights are read once
//! for all of them, and the tiles of all experts are shared by the threads: one expert alone has too little work for
//! several.

use std::ops::Range;

use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::matmul::{SCRATCH, gate_function, padded, put, tile_rows};
use crate::simd::{Kernel, LANES, Simd, dispatch};
use crate::{Activations, Gate, KernelError, Matrix, Pool};

/// The first half of the MLP of an expert.
#[derive(Debug)]
pub struct Expert<'a> {
    /// The rows that have chosen it.
    pub x: &'a Activations,
    /// What goes through the gate's function.
    pub gate: &'a Matrix,
    /// What that is multiplied with.
    pub up: &'a Matrix,
    /// `[rows of x, rows of a matrix]`.
    pub out: &'a mut [f32],
}

/// Computes `gate(x * gate_matrix^T) * (x * up_matrix^T)` for each expert.
///
/// # Errors
///
/// Where a length does not fit the shapes; nothing is written then.
pub fn gated_each(isa: Isa, pool: &Pool, gate: Gate, experts: &mut [Expert<'_>]) -> Result<(), KernelError> {
    for expert in experts.iter() {
        expert.x.check(isa, expert.gate.columns)?;
        expert.x.check(isa, expert.up.columns)?;
        check_len("the rows of the gate's matrix", expert.gate.rows, expert.up.rows)?;
        check_len(
            "the product",
            expert.out.len(),
            expert.x.rows() * expert.gate.rows,
        )?;
    }
    let mut first = 0;
    let parts: Vec<_> = experts
        .iter_mut()
        .map(|expert| {
            let tiles = first..first + expert.gate.tiles();
            first = tiles.end;
            GatedPart {
                tiles,
                matrices: [expert.gate, expert.up],
                x: expert.x,
                out: Disjoint::new(expert.out),
            }
        })
        .collect();
    pool.split(first, |range| {
        for part in &parts {
            let (start, end) = (range.start.max(part.tiles.start), range.end.min(part.tiles.end));
            if start < end {
                let tiles = start - part.tiles.start..end - part.tiles.start;
                dispatch(isa, GatedTiles { part, gate, tiles });
            }
        }
    });
    Ok(())
}

struct GatedPart<'a> {
    /// Its tiles among those of all.
    tiles: Range<usize>,
    matrices: [&'a Matrix; 2],
    x: &'a Activations,
    out: Disjoint<'a, f32>,
}

struct GatedTiles<'a> {
    part: &'a GatedPart<'a>,
    gate: Gate,
    tiles: Range<usize>,
}

impl Kernel for GatedTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let GatedPart {
            matrices: [gate, up],
            x,
            out,
            ..
        } = self.part;
        let mut scratch = SCRATCH.take();
        for tile in self.tiles {
            tile_rows(s, [(gate, tile), (up, tile)], x, &mut scratch);
            let lanes = LANES.min(gate.rows - tile * LANES);
            let [gates, ups] = &scratch.sums;
            for (row, (gated, up)) in gates.iter().zip(ups).enumerate() {
                #[expect(unsafe_code, reason = "each task writes its own tiles of each row")]
                // SAFETY: tasks have different tiles, so that what they write of a row does not overlap.
                let out = unsafe { out.part(row * gate.rows + tile * LANES, lanes) };
                put(
                    s,
                    s.mul(s.load(up), gate_function(s, self.gate, s.load(gated))),
                    out,
                );
            }
        }
        SCRATCH.set(scratch);
    }
}

/// The second half of the MLP of an expert.
#[derive(Clone, Copy, Debug)]
pub struct ExpertSum<'a> {
    /// What the first half gave for the rows that have chosen the expert, times the weights that these give it.
    pub x: &'a Activations,
    /// The matrix, of the same shape for all experts.
    pub matrix: &'a Matrix,
    /// The rows of the output to which the rows are added.
    pub rows: &'a [usize],
}

/// Adds `x * matrix^T` of each expert to the rows that have chosen it, expert after expert, so that a row gets the same bits
/// whatever the others are. `out` is `[rows, rows of a matrix]`.
///
/// # Errors
///
/// Where a length does not fit the shapes, and for a row that is not there; nothing is written then.
pub fn sum_experts(
    isa: Isa,
    pool: &Pool,
    experts: &[ExpertSum<'_>],
    out: &mut [f32],
) -> Result<(), KernelError> {
    let Some(ExpertSum { matrix, .. }) = experts.first().copied() else {
        return Ok(());
    };
    for expert in experts {
        expert.x.check(isa, expert.matrix.columns)?;
        check_len("the rows of an expert's matrix", expert.matrix.rows, matrix.rows)?;
        check_len("the rows of an expert", expert.rows.len(), expert.x.rows())?;
        if let Some(&row) = expert
            .rows
            .iter()
            .find(|&&row| (row + 1) * matrix.rows > out.len())
        {
            return Err(KernelError::Index {
                what: "row",
                index: row,
                len: out.len() / matrix.rows.max(1),
            });
        }
    }
    let out = Disjoint::new(out);
    pool.split(matrix.tiles(), |tiles| {
        dispatch(
            isa,
            SumTiles {
                experts,
                out: &out,
                tiles,
            },
        );
    });
    Ok(())
}

struct SumTiles<'a> {
    experts: &'a [ExpertSum<'a>],
    out: &'a Disjoint<'a, f32>,
    tiles: Range<usize>,
}

impl Kernel for SumTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut scratch = SCRATCH.take();
        // Expert by expert, so that the weights of one are read one after the other.
        for expert in self.experts {
            let rows = expert.matrix.rows;
            for tile in self.tiles.clone() {
                let lanes = LANES.min(rows - tile * LANES);
                tile_rows(s, [(expert.matrix, tile)], expert.x, &mut scratch);
                for (sums, row) in scratch.sums[0].iter().zip(expert.rows) {
                    #[expect(unsafe_code, reason = "each task writes its own tiles of each row")]
                    // SAFETY: tasks have different tiles, so that what they write of a row does not overlap.
                    let out = unsafe { self.out.part(row * rows + tile * LANES, lanes) };
                    let before = s.load(&padded(out));
                    put(s, s.add(before, s.load(sums)), out);
                }
            }
        }
        SCRATCH.set(scratch);
    }
}
