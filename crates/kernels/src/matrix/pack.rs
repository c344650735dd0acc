//! From checkpoints' order to the kernels'.

use super::{AffineSource, BLOCK, Quantized, STEPS, Scales};
use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::simd::{LANES, Line};
use crate::{KernelError, Pool};

/// Lays out MLX's affine quantization.
pub(super) fn quantized(
    pool: &Pool,
    rows: usize,
    columns: usize,
    source: AffineSource<'_>,
) -> Result<Quantized, KernelError> {
    let AffineSource {
        packed,
        scales,
        biases,
        bits,
        group_size,
    } = source;
    let known = [2, 3, 4, 5, 6, 8].contains(&bits) && [32, 64, 128].contains(&group_size);
    if !known || !columns.is_multiple_of(group_size) || columns == 0 {
        return Err(KernelError::Layout {
            bits,
            group_size,
            columns,
        });
    }
    let width = bits as usize;
    let (words, groups) = (columns * width / 32, columns / group_size);
    check_len("the packed matrix", packed.len(), rows * words)?;
    check_len("the scales", scales.len(), rows * groups)?;
    check_len("the biases", biases.len(), rows * groups)?;
    let tiles = rows.div_ceil(LANES);
    let per_tile = columns / BLOCK * width;
    let mut lines = vec![Line::ZERO; tiles * per_tile];
    let parts = Disjoint::new(&mut lines);
    pool.split(tiles, |range| {
        for tile in range {
            #[expect(unsafe_code, reason = "each task writes its own tiles")]
            // SAFETY: the ranges that tasks get do not overlap, and so do not the tiles.
            let out = unsafe { parts.part(tile * per_tile, per_tile) };
            let last = rows.min((tile + 1) * LANES);
            for (lane, row) in (tile * LANES..last).enumerate() {
                let row = &packed[row * words..][..words];
                match bits {
                    2 => pack_row::<2>(row, lane, out),
                    3 => pack_row::<3>(row, lane, out),
                    4 => pack_row::<4>(row, lane, out),
                    5 => pack_row::<5>(row, lane, out),
                    6 => pack_row::<6>(row, lane, out),
                    _ => pack_row::<8>(row, lane, out),
                }
            }
        }
    });
    let in_tiles = |values: &[f32]| {
        let mut out = vec![[0.0; LANES]; tiles * groups];
        for (row, values) in values.chunks_exact(groups).enumerate() {
            for (group, value) in values.iter().enumerate() {
                out[row / LANES * groups + group][row % LANES] = *value;
            }
        }
        out
    };
    Ok(Quantized {
        bits,
        lines,
        scales: Scales::new(bits, in_tiles(scales), in_tiles(biases)),
        group_size,
    })
}

/// Writes a row of numbers into its lane of a tile.
fn pack_row<const BITS: usize>(words: &[u32], lane: usize, tile: &mut [Line]) {
    for (words, block) in words.chunks_exact(BITS).zip(tile.chunks_exact_mut(BITS)) {
        let mut numbers = [0_u8; BLOCK];
        let mut held = 0_u64;
        let mut bits = 0;
        let mut words = words.iter();
        for number in &mut numbers {
            if bits < BITS {
                held |= u64::from(*words.next().unwrap_or(&0)) << bits;
                bits += 32;
            }
            *number = (held & ((1 << BITS) - 1)) as u8;
            held >>= BITS;
            bits -= BITS;
        }
        let mut planes = Planes { block, lane };
        match BITS {
            8 => {
                for (step, four) in numbers.chunks_exact(4).enumerate() {
                    planes.four(step).copy_from_slice(four);
                }
            }
            4 => planes.put(0, 4, 2, &numbers, 0),
            2 => planes.put(0, 2, 4, &numbers, 0),
            3 => {
                planes.put(0, 2, 4, &numbers, 0);
                planes.put(2, 1, 8, &numbers, 2);
            }
            5 => {
                planes.put(0, 4, 2, &numbers, 0);
                planes.put(4, 1, 8, &numbers, 4);
            }
            _ => {
                planes.put(0, 4, 2, &numbers, 0);
                planes.put(4, 2, 4, &numbers, 4);
            }
        }
    }
}

/// The four bytes that a lane has in each line of a block.
struct Planes<'a> {
    block: &'a mut [Line],
    lane: usize,
}

impl Planes<'_> {
    fn four(&mut self, line: usize) -> &mut [u8] {
        &mut self.block[line].0[self.lane * 4..][..4]
    }

    /// Writes a plane of `lines` lines from `first`, each of `share` steps, with the bits of the numbers from `shift`.
    fn put(&mut self, first: usize, lines: usize, share: usize, numbers: &[u8; BLOCK], shift: u32) {
        let width = 8 / share;
        let mask = ((1_u16 << width) - 1) as u8;
        for line in 0..lines {
            for column in 0..4 {
                let mut byte = 0;
                for i in 0..share {
                    let step = line + lines * i;
                    byte |= ((numbers[step * 4 + column] >> shift) & mask) << (width * i);
                }
                self.four(first + line)[column] = byte;
            }
        }
    }
}

/// One number of a block.
pub(super) fn number(block: &[Line], bits: u32, lane: usize, column: usize) -> u8 {
    let (step, byte) = (column / 4, lane * 4 + column % 4);
    let plane = |first: usize, lines: usize| {
        let width = lines;
        let shift = step / lines * width;
        let mask = ((1_u16 << width) - 1) as u8;
        (block[first + step % lines].0[byte] >> shift) & mask
    };
    debug_assert!(step < STEPS);
    match bits {
        2 => plane(0, 2),
        3 => plane(0, 2) | plane(2, 1) << 2,
        4 => plane(0, 4),
        5 => plane(0, 4) | plane(4, 1) << 4,
        6 => plane(0, 4) | plane(4, 2) << 4,
        _ => block[step].0[byte],
    }
}

/// Lays out floats: for each tile and column, sixteen rows.
pub(super) fn dense<T: Copy + Default>(
    rows: usize,
    columns: usize,
    values: &[T],
) -> Result<Vec<[T; LANES]>, KernelError> {
    check_len("the matrix", values.len(), rows * columns)?;
    let mut out = vec![[T::default(); LANES]; rows.div_ceil(LANES) * columns];
    if columns == 0 {
        return Ok(out);
    }
    for (row, values) in values.chunks_exact(columns).enumerate() {
        let tile = &mut out[row / LANES * columns..][..columns];
        for (lanes, value) in tile.iter_mut().zip(values) {
            lanes[row % LANES] = *value;
        }
    }
    Ok(out)
}
