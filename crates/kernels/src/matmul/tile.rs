//! Tiles of weights times all rows of activations.

use std::cell::RefCell;

use super::floats::{Dequantize, float_rows};
use super::integers::integer_rows;
use super::unit::half_rows;
use crate::activations::Activations;
use crate::matrix::{Matrix, Weights};
use crate::simd::{LANES, Simd};

/// Multiplies `N` tiles of weights with all rows of activations, into as many rows of sums for each.
#[inline(always)]
pub(crate) fn tile_rows<S: Simd, const N: usize>(
    s: S,
    tiles: [(&Matrix, usize); N],
    x: &Activations,
    scratch: &mut Scratch,
) {
    const { assert!(N <= 2, "scratch memory for two tiles") };
    for ((matrix, tile), sums) in tiles.into_iter().zip(&mut scratch.sums) {
        sums.resize(x.rows(), [0.0; LANES]);
        one_tile(s, matrix, tile, x, &mut scratch.panel, sums);
    }
    let Some(unit) = s.matrix_unit().filter(|_| x.halves() > 0) else {
        return;
    };
    let first = x.rows() - x.halves();
    let [a, b] = &mut scratch.sums;
    let quantized = tiles.map(|(matrix, tile)| match &matrix.weights {
        Weights::Quantized(weights) => Some((weights, tile)),
        _ => None,
    });
    match quantized[..] {
        [Some(one), Some(other)] => {
            half_rows(s, unit, [one, other], x, [&mut a[first..], &mut b[first..]]);
        }
        [Some(one), ..] => half_rows(s, unit, [one], x, [&mut a[first..]]),
        [None, Some(other)] => half_rows(s, unit, [other], x, [&mut b[first..]]),
        _ => {}
    }
}

/// Multiplies a tile of weights with all rows of activations but those that a matrix unit takes.
#[inline(always)]
fn one_tile<S: Simd>(
    s: S,
    matrix: &Matrix,
    tile: usize,
    x: &Activations,
    panel: &mut Vec<[f32; LANES]>,
    sums: &mut [[f32; LANES]],
) {
    let columns = matrix.columns;
    let panel = match &matrix.weights {
        Weights::Quantized(q) if x.is_rounded() => {
            let sums = &mut sums[..x.rows() - x.halves()];
            match q.bits {
                2 => integer_rows::<S, 2>(s, q, tile, x, sums),
                3 => integer_rows::<S, 3>(s, q, tile, x, sums),
                4 => integer_rows::<S, 4>(s, q, tile, x, sums),
                5 => integer_rows::<S, 5>(s, q, tile, x, sums),
                6 => integer_rows::<S, 6>(s, q, tile, x, sums),
                _ => integer_rows::<S, 8>(s, q, tile, x, sums),
            }
            return;
        }
        Weights::F32(values) => &values[tile * columns..][..columns],
        weights => {
            panel.resize(columns, [0.0; LANES]);
            match weights {
                Weights::F16(values) => {
                    for (to, from) in panel.iter_mut().zip(&values[tile * columns..]) {
                        s.store(s.load_f16(from), to);
                    }
                }
                Weights::Bf16(values) => {
                    for (to, from) in panel.iter_mut().zip(&values[tile * columns..]) {
                        s.store(s.load_bf16(bytemuck::cast_ref(from)), to);
                    }
                }
                Weights::F32(_) => {}
                Weights::Quantized(weights) => match weights.bits {
                    2 => s.call(Dequantize::<2> { weights, tile, panel }),
                    3 => s.call(Dequantize::<3> { weights, tile, panel }),
                    4 => s.call(Dequantize::<4> { weights, tile, panel }),
                    5 => s.call(Dequantize::<5> { weights, tile, panel }),
                    6 => s.call(Dequantize::<6> { weights, tile, panel }),
                    _ => s.call(Dequantize::<8> { weights, tile, panel }),
                },
            }
            &**panel
        }
    };
    float_rows(s, panel, x, sums);
}

/// What a thread keeps between tasks.
#[derive(Default)]
pub(crate) struct Scratch {
    /// A tile of weights as float32.
    panel: Vec<[f32; LANES]>,
    /// The products of up to two tiles with each row of activations.
    pub(crate) sums: [Vec<[f32; LANES]>; 2],
}

thread_local! {
    /// Taken out while it is used: code in a closure for `with` would lose the instruction set of the caller.
    pub(crate) static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

/// Up to sixteen numbers, with zeros behind.
#[inline(always)]
pub(crate) fn padded(values: &[f32]) -> [f32; LANES] {
    if let Some(all) = values.as_array::<LANES>() {
        return *all;
    }
    let mut lanes = [0.0; LANES];
    for (lane, value) in lanes.iter_mut().zip(values) {
        *lane = *value;
    }
    lanes
}

/// Stores as many lanes as there is room for.
#[inline(always)]
pub(crate) fn put<S: Simd>(s: S, x: S::F, out: &mut [f32]) {
    if let Some(out) = out.as_mut_array::<LANES>() {
        s.store(x, out);
    } else {
        let mut all = [0.0; LANES];
        s.store(x, &mut all);
        for (out, lane) in out.iter_mut().zip(all) {
            *out = lane;
        }
    }
}

/// The bias of a tile's rows, 0 where there is none.
#[inline(always)]
pub(super) fn bias_of(bias: Option<&[f32]>, tile: usize) -> [f32; LANES] {
    bias.map_or([0.0; LANES], |bias| {
        padded(&bias[tile * LANES..(tile * LANES + LANES).min(bias.len())])
    })
}
