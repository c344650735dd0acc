//! Products by a matrix unit.

use std::cell::RefCell;

use super::floats::{columns, scale_and_bias};
use super::integers::{PREFETCH_AHEAD, Rests};
use crate::activations::{Activations, Factors};
use crate::matrix::{BLOCK, Quantized, STEPS, times_middle, unpack};
use crate::simd::{Bytes, Kernel, LANES, Line, MatrixUnit, Simd, Square, Sums, Tiles};

thread_local! {
    /// A tile of weights as bytes.
    static NUMBERS: RefCell<Vec<[Line; STEPS]>> = const { RefCell::new(Vec::new()) };
    /// Up to two tiles of weights as bfloat16.
    static SQUARES: RefCell<[Vec<Square>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// One tile times strips of `ROWS` rows, by a matrix unit.
#[inline(always)]
pub(super) fn matrix_rows<S: Simd, const BITS: usize, const ROWS: usize>(
    s: S,
    unit: MatrixUnit,
    weights: &Quantized,
    tile: usize,
    x: &Activations,
    sums: &mut [[f32; LANES]],
) {
    let blocks = x.columns() / BLOCK;
    let lines = weights.tile(tile, blocks);
    let mut numbers = NUMBERS.take();
    s.call(Unpack::<BITS> {
        lines,
        numbers: &mut numbers,
    });
    let (tiles, mut dots) = (unit.configure::<ROWS>(), [[Line::ZERO; ROWS]; 2]);
    for (strip, sums) in sums.chunks_mut(ROWS).enumerate() {
        let strip = x.integers.strip(strip, blocks);
        s.call(MatrixBlock::<BITS, ROWS> {
            tiles: &tiles,
            dots: &mut dots,
            weights,
            numbers: &numbers,
            tile,
            bytes: strip.bytes,
            factors: strip.factors,
            sums,
        });
        s.call(Rests::<BITS> {
            weights,
            lines,
            tile,
            strip,
            sums,
        });
    }
    NUMBERS.set(numbers);
}

/// A tile of weights as bytes.
struct Unpack<'a, const BITS: usize> {
    lines: &'a [Line],
    numbers: &'a mut Vec<[Line; STEPS]>,
}

impl<const BITS: usize> Kernel for Unpack<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let blocks = self.lines.chunks_exact(BITS);
        self.numbers.resize(blocks.len(), [Line::ZERO; STEPS]);
        for (block, lines) in blocks.zip(self.numbers) {
            for line in 0..BITS {
                s.prefetch(block.as_ptr().wrapping_add(PREFETCH_AHEAD + line));
            }
            for (line, numbers) in lines.iter_mut().zip(unpack::<S, BITS>(s, block)) {
                s.store_line(numbers, line);
            }
        }
    }
}

/// One tile times a strip of integer activations, by a matrix unit: the numbers and the order of the sums
/// are those of [`IntegerBlock`], so that each row gets the same bits.
struct MatrixBlock<'a, const BITS: usize, const ROWS: usize> {
    tiles: &'a Tiles<ROWS>,
    /// Of this block and of the next.
    dots: &'a mut [Sums<ROWS>; 2],
    weights: &'a Quantized,
    /// The weights of the tile.
    numbers: &'a [[Line; STEPS]],
    tile: usize,
    bytes: &'a [Bytes],
    factors: &'a [Factors],
    sums: &'a mut [[f32; LANES]],
}

/// Repeats a statement for each of up to sixteen rows, so that what it sums stays in registers.
macro_rules! for_rows {
    ($rows:ident, $row:ident => $body:expr) => {
        for_rows!(@ $rows, $row => $body; 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    };
    (@ $rows:ident, $row:ident => $body:expr; $($number:literal),*) => {
        $(if $number < $rows {
            let $row = $number;
            $body
        })*
    };
}

impl<const BITS: usize, const ROWS: usize> Kernel for MatrixBlock<'_, BITS, ROWS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let blocks = self.numbers.len();
        let per_group = self.weights.group_size / BLOCK;
        let first_group = self.tile * (blocks / per_group);
        let (bytes, _) = self.bytes.as_chunks::<ROWS>();
        let (factors, _) = self.factors.as_chunks::<ROWS>();
        let Self { tiles, dots, .. } = self;
        let mut totals = [s.splat(0.0); ROWS];
        if let (Some(numbers), Some(bytes)) = (self.numbers.first(), bytes.first()) {
            tiles.dot(numbers, bytes, &mut dots[0]);
        }
        for (index, factors) in factors.iter().enumerate() {
            // The next products are on their way while these are summed.
            if let (Some(numbers), Some(bytes)) = (self.numbers.get(index + 1), bytes.get(index + 1)) {
                tiles.dot(numbers, bytes, &mut dots[(index + 1) % 2]);
            }
            let (scale, bias) = self.weights.scales.load(s, first_group + index / per_group);
            let dots = &dots[index % 2];
            if let Some(bias) = bias {
                for_rows!(ROWS, row => {
                    let Factors { scale: x_scale, sum, .. } = factors[row];
                    let dot = s.to_float(s.line(&dots[row]));
                    let total = s.fma(dot, s.mul(scale, s.splat(x_scale)), totals[row]);
                    totals[row] = s.fma(bias, s.splat(sum), total);
                });
            } else {
                for_rows!(ROWS, row => {
                    let Factors { scale: x_scale, negated, .. } = factors[row];
                    let start = times_middle::<S, BITS>(s, s.splat_i(negated));
                    let dot = s.to_float(s.add_i(start, s.line(&dots[row])));
                    totals[row] = s.fma(dot, s.mul(scale, s.splat(x_scale)), totals[row]);
                });
            }
        }
        for (sum, total) in self.sums.iter_mut().zip(totals) {
            s.store(total, sum);
        }
    }
}

/// `N` tiles of weights times the rows of activations that are bfloat16.
#[inline(always)]
pub(super) fn half_rows<S: Simd, const N: usize>(
    s: S,
    unit: MatrixUnit,
    weights: [(&Quantized, usize); N],
    x: &Activations,
    mut sums: [&mut [[f32; LANES]]; N],
) {
    let blocks = x.columns() / BLOCK;
    let mut panels = SQUARES.take();
    for (panel, (weights, tile)) in panels.iter_mut().zip(weights) {
        panel.resize(blocks, Square::ZERO);
        match weights.bits {
            2 => s.call(Round::<2> { weights, tile, panel }),
            3 => s.call(Round::<3> { weights, tile, panel }),
            4 => s.call(Round::<4> { weights, tile, panel }),
            5 => s.call(Round::<5> { weights, tile, panel }),
            6 => s.call(Round::<6> { weights, tile, panel }),
            _ => s.call(Round::<8> { weights, tile, panel }),
        }
    }
    let weights = std::array::from_fn(|tile| &*panels[tile]);
    let tiles = unit.halves();
    let mut strips = x.halves.strips(blocks);
    let mut first = 0;
    while let Some(strip) = strips.next() {
        let mut keep = |products: &[[Square; 2]; N], strips: usize| {
            for (sums, products) in sums.iter_mut().zip(products) {
                let products = products[..strips].iter().flat_map(Square::sums);
                for (sums, products) in sums[first..].iter_mut().zip(products) {
                    *sums = *products;
                }
            }
            first += strips * LANES;
        };
        let mut products = [[Square::ZERO; 2]; N];
        if let Some(next) = strips.next() {
            tiles.multiply(weights, [strip, next], &mut products);
            keep(&products, 2);
        } else {
            let mut one = [[Square::ZERO; 1]; N];
            tiles.multiply(weights, [strip], &mut one);
            for (products, [one]) in products.iter_mut().zip(one) {
                products[0] = one;
            }
            keep(&products, 1);
        }
    }
    drop(tiles);
    SQUARES.set(panels);
}

/// A tile of weights as bfloat16, a square for each block: a line has pairs of columns that are sixteen apart, as
/// [`Halves`](crate::activations::Halves) have.
struct Round<'a, const BITS: usize> {
    weights: &'a Quantized,
    tile: usize,
    panel: &'a mut [Square],
}

impl<const BITS: usize> Kernel for Round<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, tile, panel } = self;
        let blocks = panel.len();
        let lines = weights.tile(tile, blocks);
        let per_group = weights.group_size / BLOCK;
        let first_group = tile * (blocks / per_group);
        for (index, (block, square)) in lines.chunks_exact(BITS).zip(panel).enumerate() {
            for line in 0..BITS {
                s.prefetch(block.as_ptr().wrapping_add(PREFETCH_AHEAD + line));
            }
            let numbers = unpack::<S, BITS>(s, block);
            let (scale, bias) = scale_and_bias::<S, BITS>(s, weights, first_group + index / per_group);
            let (first, second) = numbers.split_at(STEPS / 2);
            for (lines, (first, second)) in square.0.chunks_exact_mut(4).zip(first.iter().zip(second)) {
                let first = columns(s, *first, scale, bias);
                let second = columns(s, *second, scale, bias);
                for (line, (first, second)) in lines.iter_mut().zip(first.into_iter().zip(second)) {
                    s.store_line(s.halves(first, second), line);
                }
            }
        }
    }
}
