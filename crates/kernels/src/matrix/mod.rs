//! Matrices of weights, in the order in which the kernels read them.
//!
//! Sixteen rows are a tile, and the lanes of a vector are its rows, so that a product needs no sum across lanes. Within
//! a tile, 32 columns of quantized weights are a block of eight steps of four columns: in each step, lane `r` holds
//! four columns of row `r` as bytes. What has fewer bits than a byte is laid out in planes:
//!
//! | bits | planes, in cache lines of a block |
//! |---|---|
//! | 8 | one line a step |
//! | 4 | lines 0 to 3: step `j` in the low half of each byte, step `j + 4` in the high half |
//! | 2 | lines 0 and 1: steps `j`, `j + 2`, `j + 4`, `j + 6` from the lowest bits up |
//! | 1 | one line: step `t` in bit `t` |
//! | 3, 5, 6 | the planes of 2 and 1, of 4 and 1, and of 4 and 2 bits, the low bits first |
//!
//! So every width takes the memory that it has in the checkpoint. Floats keep their type, sixteen rows side by side.

mod pack;
mod scales;

use half::{bf16, f16};

pub(crate) use scales::{Scales, middle, times_middle};

use crate::simd::{LANES, Line, Simd};
use crate::{KernelError, Pool};

/// Columns of a block.
pub(crate) const BLOCK: usize = 32;
/// Steps of a block, of four columns each.
pub(crate) const STEPS: usize = 8;

/// A matrix `[rows, columns]` of weights, laid out for the kernels.
#[derive(Debug)]
pub struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) weights: Weights,
}

#[derive(Debug)]
pub(crate) enum Weights {
    Quantized(Quantized),
    F32(Vec<[f32; LANES]>),
    F16(Vec<[f16; LANES]>),
    Bf16(Vec<[bf16; LANES]>),
}

/// Affine quantization: `weight = scale * q + bias`.
#[derive(Debug)]
pub(crate) struct Quantized {
    pub(crate) bits: u32,
    /// `bits` lines a block, the blocks of a tile one after the other.
    pub(crate) lines: Vec<Line>,
    /// For each tile and group, sixteen rows.
    pub(crate) scales: Scales,
    pub(crate) group_size: usize,
}

/// A matrix in MLX's affine quantization.
///
/// The numbers of a row are one stream of bits, the first in the lowest bits of the first word.
#[derive(Clone, Copy, Debug)]
pub struct AffineSource<'a> {
    /// `rows * columns * bits / 32` words.
    pub packed: &'a [u32],
    /// `rows * columns / group_size` scales.
    pub scales: &'a [f32],
    /// As many biases.
    pub biases: &'a [f32],
    /// 2, 3, 4, 5, 6 or 8.
    pub bits: u32,
    /// 32, 64 or 128; divides `columns`.
    pub group_size: usize,
}

/// Floats, row-major.
#[derive(Clone, Copy, Debug)]
pub enum DenseSource<'a> {
    /// Of 32 bits.
    F32(&'a [f32]),
    /// Of 16 bits, IEEE.
    F16(&'a [f16]),
    /// Of 16 bits with the exponent of 32.
    Bf16(&'a [bf16]),
}

impl Matrix {
    /// Lays out a quantized matrix. Every weight keeps its number of bits; scales and biases are kept in float16 or
    /// bfloat16 where that loses nothing.
    ///
    /// # Errors
    ///
    /// For bits and group sizes that MLX does not have, columns that are not whole groups, and slices of other lengths.
    pub fn quantized(
        pool: &Pool,
        rows: usize,
        columns: usize,
        source: AffineSource<'_>,
    ) -> Result<Self, KernelError> {
        let weights = pack::quantized(pool, rows, columns, source)?;
        Ok(Self {
            rows,
            columns,
            weights: Weights::Quantized(weights),
        })
    }

    /// Lays out a matrix of floats.
    ///
    /// # Errors
    ///
    /// For a slice of another length than `rows * columns`.
    pub fn dense(rows: usize, columns: usize, source: DenseSource<'_>) -> Result<Self, KernelError> {
        let weights = match source {
            DenseSource::F32(values) => Weights::F32(pack::dense(rows, columns, values)?),
            DenseSource::F16(values) => Weights::F16(pack::dense(rows, columns, values)?),
            DenseSource::Bf16(values) => Weights::Bf16(pack::dense(rows, columns, values)?),
        };
        Ok(Self {
            rows,
            columns,
            weights,
        })
    }

    /// Rows, which are the outputs of a projection.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns, which are its inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The weights as they lie in memory, tile by tile, less scales and biases.
    pub fn memory(&self) -> &[u8] {
        match &self.weights {
            Weights::Quantized(q) => bytemuck::cast_slice(&q.lines),
            Weights::F32(values) => bytemuck::cast_slice(values),
            Weights::F16(values) => bytemuck::cast_slice(values),
            Weights::Bf16(values) => bytemuck::cast_slice(values),
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Quantized(q) => size_of_val(&*q.lines) + q.scales.bytes(),
            Weights::F32(values) => size_of_val(&**values),
            Weights::F16(values) => size_of_val(&**values),
            Weights::Bf16(values) => size_of_val(&**values),
        }
    }

    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Writes one row as float32: what an embedding looks up.
    ///
    /// # Errors
    ///
    /// For a row beyond the last, and an output of another length than a row.
    pub fn row(&self, row: usize, out: &mut [f32]) -> Result<(), KernelError> {
        crate::error::check_len("the row", out.len(), self.columns)?;
        if row >= self.rows {
            return Err(KernelError::Index {
                what: "row",
                index: row,
                len: self.rows,
            });
        }
        let (tile, lane) = (row / LANES, row % LANES);
        let start = tile * self.columns;
        match &self.weights {
            Weights::Quantized(q) => q.row(tile, lane, out),
            Weights::F32(values) => {
                for (out, lanes) in out.iter_mut().zip(&values[start..]) {
                    *out = lanes[lane];
                }
            }
            Weights::F16(values) => {
                for (out, lanes) in out.iter_mut().zip(&values[start..]) {
                    *out = lanes[lane].to_f32();
                }
            }
            Weights::Bf16(values) => {
                for (out, lanes) in out.iter_mut().zip(&values[start..]) {
                    *out = lanes[lane].to_f32();
                }
            }
        }
        Ok(())
    }
}

impl Quantized {
    /// The lines of a tile, `bits` for each block.
    #[inline(always)]
    pub(crate) fn tile(&self, tile: usize, blocks: usize) -> &[Line] {
        let len = blocks * self.bits as usize;
        &self.lines[tile * len..][..len]
    }

    fn row(&self, tile: usize, lane: usize, out: &mut [f32]) {
        let blocks = out.len() / BLOCK;
        let groups = out.len() / self.group_size;
        let bits = self.bits as usize;
        let lines = self.tile(tile, blocks).chunks_exact(bits);
        for (index, (block, out)) in lines.zip(out.chunks_exact_mut(BLOCK)).enumerate() {
            let group = tile * groups + index * BLOCK / self.group_size;
            let (scale, bias) = self.scales.lane(self.bits, group, lane);
            for (column, out) in out.iter_mut().enumerate() {
                let number = pack::number(block, self.bits, lane, column);
                *out = scale.mul_add(f32::from(number), bias);
            }
        }
    }
}

/// The weights of a block: in each step four columns of sixteen rows as unsigned bytes.
#[inline(always)]
pub(crate) fn unpack<S: Simd, const BITS: usize>(s: S, block: &[Line]) -> [S::I; STEPS] {
    let mut out = [s.zero(); STEPS];
    let Some(block) = block.first_chunk::<BITS>() else {
        return out;
    };
    let mut line = 0;
    let mut shift = 0;
    if BITS == 8 {
        for (out, line) in out.iter_mut().zip(block) {
            *out = s.line(line);
        }
        return out;
    }
    if BITS >= 4 {
        let low = s.splat_i(0x0f0f_0f0f);
        for j in 0..4 {
            let both = s.line(&block[j]);
            out[j] = s.and(both, low);
            out[j + 4] = s.shr_bytes::<4>(both);
        }
        line = 4;
        shift = 4;
    }
    if BITS == 2 || BITS == 3 || BITS == 6 {
        let low = s.splat_i(0x0303_0303);
        for j in 0..2 {
            let four = s.line(&block[line + j]);
            let parts = [
                s.and(four, low),
                s.and(s.shr::<2>(four), low),
                s.and(s.shr::<4>(four), low),
                s.shr_bytes::<6>(four),
            ];
            for (i, part) in parts.into_iter().enumerate() {
                let part = if shift == 4 { s.shl::<4>(part) } else { part };
                out[j + 2 * i] = s.or(out[j + 2 * i], part);
            }
        }
        line += 2;
        shift += 2;
    }
    if BITS == 3 || BITS == 5 {
        let bits = s.line(&block[line]);
        let one = s.splat_i(0x0101_0101);
        let parts = [
            s.and(bits, one),
            s.and(s.shr::<1>(bits), one),
            s.and(s.shr::<2>(bits), one),
            s.and(s.shr::<3>(bits), one),
            s.and(s.shr::<4>(bits), one),
            s.and(s.shr::<5>(bits), one),
            s.and(s.shr::<6>(bits), one),
            s.shr_bytes::<7>(bits),
        ];
        for (out, part) in out.iter_mut().zip(parts) {
            let part = if shift == 4 {
                s.shl::<4>(part)
            } else {
                s.shl::<2>(part)
            };
            *out = s.or(*out, part);
        }
    }
    out
}
