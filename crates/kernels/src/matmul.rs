//! Products of activations with matrices of weights.
//!
//! A task takes some tiles of sixteen rows of weights and all rows of activations, up to sixteen of them at a time, so
//! that a tile is unpacked once for sixteen rows and stays in the first cache meanwhile.

use std::cell::RefCell;

use crate::activations::{Activations, FEW, Factors, Rest, Strip};
use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::matrix::{BLOCK, Matrix, Quantized, STEPS, Weights, middle, times_middle, unpack};
use crate::simd::{Bytes, Kernel, LANES, Line, MatrixUnit, Simd, Sums, Tiles, dispatch, exp};
use crate::{KernelError, Pool};

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

/// The function between the two halves of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// `x * sigmoid(x)`, of SwiGLU.
    Silu,
    /// The Gaussian error linear unit in its approximation by `tanh`, of GeGLU.
    GeluTanh,
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

/// The function of a gate, of every element.
///
/// # Errors
///
/// Where the lengths differ.
pub fn apply_gate(isa: Isa, gate: Gate, x: &[f32], up: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
    check_len("the second half", up.len(), x.len())?;
    check_len("the output", out.len(), x.len())?;
    dispatch(isa, ApplyGate { gate, x, up, out });
    Ok(())
}

struct Part<'a> {
    matrix: &'a Matrix,
    bias: Option<&'a [f32]>,
    out: Disjoint<'a, f32>,
    mode: Mode,
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
        let rows = part.matrix.rows;
        let mut scratch = SCRATCH.take();
        for tile in tiles {
            let lanes = LANES.min(rows - tile * LANES);
            let bias = bias_of(part.bias, tile);
            tile_rows(s, part.matrix, tile, x, &mut scratch);
            for (row, sums) in scratch.sums.iter().enumerate() {
                let sums = s.add(s.load(sums), s.load(&bias));
                #[expect(unsafe_code, reason = "each task writes its own tiles of each row")]
                // SAFETY: tasks have different tiles, so that what they write of a row does not overlap.
                let out = unsafe { part.out.part(row * rows + tile * LANES, lanes) };
                let before = match part.mode {
                    Mode::Write => [0.0; LANES],
                    Mode::Add => padded(out),
                };
                put(s, s.add(s.load(&before), sums), out);
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
            let bias = bias_of(gate_bias, tile);
            tile_rows(s, gate_matrix, tile, self.x, &mut scratch);
            for sums in &mut scratch.sums {
                let gate = s.add(s.load(sums), s.load(&bias));
                s.store(gate_function(s, self.gate, gate), sums);
            }
            std::mem::swap(&mut scratch.sums, &mut scratch.gates);
            let bias = bias_of(up_bias, tile);
            let lanes = LANES.min(rows - tile * LANES);
            tile_rows(s, up_matrix, tile, self.x, &mut scratch);
            for (row, (sums, gate)) in scratch.sums.iter().zip(&scratch.gates).enumerate() {
                #[expect(unsafe_code, reason = "each task writes its own tiles of each row")]
                // SAFETY: tasks have different tiles, so that what they write of a row does not overlap.
                let out = unsafe { self.out.part(row * rows + tile * LANES, lanes) };
                put(s, s.mul(s.add(s.load(sums), s.load(&bias)), s.load(gate)), out);
            }
        }
        SCRATCH.set(scratch);
    }
}

struct ApplyGate<'a> {
    gate: Gate,
    x: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for ApplyGate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let parts = self.x.chunks(LANES).zip(self.up.chunks(LANES));
        for (out, (x, up)) in self.out.chunks_mut(LANES).zip(parts) {
            let (x, up) = (s.load(&padded(x)), s.load(&padded(up)));
            put(s, s.mul(gate_function(s, self.gate, x), up), out);
        }
    }
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
fn bias_of(bias: Option<&[f32]>, tile: usize) -> [f32; LANES] {
    bias.map_or([0.0; LANES], |bias| {
        padded(&bias[tile * LANES..(tile * LANES + LANES).min(bias.len())])
    })
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.mul(x, s.splat(-1.0)))))
}

#[inline(always)]
pub(crate) fn gate_function<S: Simd>(s: S, gate: Gate, x: S::F) -> S::F {
    match gate {
        Gate::Silu => s.mul(x, sigmoid(s, x)),
        // tanh(y) is 2 sigmoid(2 y) - 1, so that x (1 + tanh y) / 2 is x sigmoid(2 y).
        Gate::GeluTanh => {
            let cube = s.mul(s.mul(x, x), x);
            let inner = s.fma(cube, s.splat(0.044_715), x);
            s.mul(x, sigmoid(s, s.mul(inner, s.splat(1.595_769_2))))
        }
    }
}

/// Multiplies a tile of weights with all rows of activations, into as many rows of sums.
#[inline(always)]
pub(crate) fn tile_rows<S: Simd>(s: S, matrix: &Matrix, tile: usize, x: &Activations, scratch: &mut Scratch) {
    scratch.sums.resize(x.rows(), [0.0; LANES]);
    let sums = &mut *scratch.sums;
    let columns = matrix.columns;
    let panel = match &matrix.weights {
        Weights::Quantized(q) if x.is_integer() => {
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
            scratch.panel.resize(columns, [0.0; LANES]);
            let panel = &mut *scratch.panel;
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
            &*scratch.panel
        }
    };
    float_rows(s, panel, x, sums);
}

/// What a thread keeps between tasks.
#[derive(Default)]
pub(crate) struct Scratch {
    /// A tile of weights as float32.
    panel: Vec<[f32; LANES]>,
    /// The products of a tile with each row of activations.
    pub(crate) sums: Vec<[f32; LANES]>,
    /// Those with the gate's matrix, until the other half is there.
    pub(crate) gates: Vec<[f32; LANES]>,
}

thread_local! {
    /// A tile of weights as bytes.
    static NUMBERS: RefCell<Vec<[Line; STEPS]>> = const { RefCell::new(Vec::new()) };
    /// Taken out while it is used: code in a closure for `with` would lose the instruction set of the caller.
    pub(crate) static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

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

#[inline(always)]
fn integer_rows<S: Simd, const BITS: usize>(
    s: S,
    weights: &Quantized,
    tile: usize,
    x: &Activations,
    sums: &mut [[f32; LANES]],
) {
    let blocks = x.columns() / BLOCK;
    let lines = weights.tile(tile, blocks);
    let integers = &x.integers;
    // With eight rows the unit is a third slower than vectors are: half of it has nothing to do.
    if let Some(unit) = s.matrix_unit().filter(|_| integers.strip == LANES) {
        return matrix_rows::<S, BITS, LANES>(s, unit, weights, tile, x, sums);
    }
    for (strip, sums) in sums.chunks_mut(integers.strip).enumerate() {
        let strip = integers.strip(strip, blocks);
        let rows = integers.strip;
        if rows < FEW && S::KEEPS_BLOCK {
            in_groups!(rows, FEW, [6, 5, 4, 3, 2, 1], first, M => {
                let sums = &mut sums[first..][..M];
                s.call(IntegerBlock::<BITS, M, true> { weights, lines, tile, strip, rows, first, sums });
            });
            continue;
        }
        in_groups!(sums.len(), LANES, [16, 8, 7, 6, 5, 4, 3, 2, 1], first, M => {
            let sums = &mut sums[first..][..M];
            s.call(IntegerBlock::<BITS, M, false> { weights, lines, tile, strip, rows, first, sums });
        });
        s.call(Rests::<BITS> {
            weights,
            lines,
            tile,
            strip,
            sums,
        });
    }
}

/// One tile times strips of `ROWS` rows, by a matrix unit.
#[inline(always)]
fn matrix_rows<S: Simd, const BITS: usize, const ROWS: usize>(
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

/// Lines of weights between the one that is used and the one that is asked for: 2 KB.
const PREFETCH_AHEAD: usize = 32;

/// One tile times `M` rows of a strip of integer activations, and where `RESTS` is set their rests too.
///
/// With `w = scale_w * q_w + bias` and `x = scale_x * q_x`, the product over a block is
/// `scale_w * scale_x * sum(q_w * q_x) + bias * scale_x * sum(q_x)`, or, where the bias is `-scale_w * middle`,
/// `scale_w * scale_x * (sum(q_w * q_x) - middle * sum(q_x))`.
struct IntegerBlock<'a, const BITS: usize, const M: usize, const RESTS: bool> {
    weights: &'a Quantized,
    /// Those of the tile.
    lines: &'a [Line],
    tile: usize,
    strip: Strip<'a>,
    /// Rows of the strip.
    rows: usize,
    /// The first row of it.
    first: usize,
    sums: &'a mut [[f32; LANES]],
}

impl<const BITS: usize, const M: usize, const RESTS: bool> Kernel for IntegerBlock<'_, BITS, M, RESTS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let blocks = self.lines.len() / BITS;
        let per_group = self.weights.group_size / BLOCK;
        let first_group = self.tile * (blocks / per_group);
        let (mut sums, mut of_rests) = ([s.splat(0.0); M], [s.splat(0.0); M]);
        let strip = self.strip;
        assert!(self.first + M <= self.rows, "rows of a strip");
        let len = strip.bytes.len().min(strip.factors.len()).min(strip.rests.len());
        assert!(
            len >= blocks * self.rows && strip.refined.len() >= blocks,
            "blocks of a strip"
        );
        for (index, block) in self.lines.chunks_exact(BITS).enumerate() {
            let at = index * self.rows + self.first;
            #[expect(unsafe_code, reason = "checks here cost a tenth of a token")]
            // SAFETY: `index` is below `blocks`, and the rows from `first` on are within a strip.
            let (bytes, factors, rests, refined) = unsafe {
                (
                    &*strip.bytes.as_ptr().add(at).cast::<[Bytes; M]>(),
                    &*strip.factors.as_ptr().add(at).cast::<[Factors; M]>(),
                    &*strip.rests.as_ptr().add(at).cast::<[Rest; M]>(),
                    *strip.refined.as_ptr().add(index) >> self.first,
                )
            };
            // Few rows wait for memory alone: the processor's own prefetching is a fifth slower.
            for line in 0..BITS {
                s.prefetch(block.as_ptr().wrapping_add(PREFETCH_AHEAD + line));
            }
            let numbers = unpack::<S, BITS>(s, block);
            let (scale, bias) = self.weights.scales.load(s, first_group + index / per_group);
            if let Some(bias) = bias {
                in_groups!(M, S::TOGETHER, [4, 3, 2, 1], first, R => {
                    if let Some((totals, bytes, factors)) = some_of::<_, M, R>(first, &mut sums, bytes, factors) {
                        let dots = s.dots::<BITS, R>([s.zero(); R], &numbers, bytes);
                        for ((total, dot), factors) in totals.iter_mut().zip(dots).zip(factors) {
                            *total = s.fma(s.to_float(dot), s.mul(scale, s.splat(factors.scale)), *total);
                            *total = s.fma(bias, s.splat(factors.sum), *total);
                        }
                    }
                });
            } else {
                in_groups!(M, S::TOGETHER, [4, 3, 2, 1], first, R => {
                    if let Some((totals, bytes, factors)) = some_of::<_, M, R>(first, &mut sums, bytes, factors) {
                        let starts = std::array::from_fn(|row| {
                            times_middle::<S, BITS>(s, s.splat_i(factors[row].negated))
                        });
                        let dots = s.dots::<BITS, R>(starts, &numbers, bytes);
                        for ((total, dot), factors) in totals.iter_mut().zip(dots).zip(factors) {
                            *total = s.fma(s.to_float(dot), s.mul(scale, s.splat(factors.scale)), *total);
                        }
                    }
                });
            }
            if RESTS && refined != 0 {
                for (row, (total, rest)) in of_rests.iter_mut().zip(rests).enumerate() {
                    if refined & (1 << row) != 0 {
                        *total = add_rest::<S, BITS>(s, &numbers, scale, bias.is_some(), rest, *total);
                    }
                }
            }
        }
        for (out, (total, rests)) in self.sums.iter_mut().zip(sums.into_iter().zip(of_rests)) {
            s.store(if RESTS { s.add(total, rests) } else { total }, out);
        }
    }
}

/// `R` of `M` rows, from the first: their sums, and of a block their bytes and factors.
#[inline(always)]
fn some_of<'a, F, const M: usize, const R: usize>(
    first: usize,
    sums: &'a mut [F; M],
    bytes: &'a [Bytes; M],
    factors: &'a [Factors; M],
) -> Option<(&'a mut [F; R], &'a [Bytes; R], &'a [Factors; R])> {
    Some((
        sums.get_mut(first..)?.first_chunk_mut()?,
        bytes.get(first..)?.first_chunk()?,
        factors.get(first..)?.first_chunk()?,
    ))
}

/// Adds the product of a block of weights with the rest of a block of activations.
#[inline(always)]
fn add_rest<S: Simd, const BITS: usize>(
    s: S,
    numbers: &[S::I; STEPS],
    scale: S::F,
    has_bias: bool,
    rest: &Rest,
    total: S::F,
) -> S::F {
    // A bias was multiplied with the rest already, which is in the block's sum.
    let start = if has_bias {
        s.zero()
    } else {
        times_middle::<S, BITS>(s, s.splat_i(rest.negated))
    };
    let dot = s.to_float(s.dot::<BITS>(start, numbers, &rest.bytes));
    s.fma(dot, s.mul(scale, s.splat(rest.scale)), total)
}

/// Adds the products of a tile with the rests of a strip, which few blocks of few rows have: the numbers and the order
/// of the sums are those of [`IntegerBlock`].
struct Rests<'a, const BITS: usize> {
    weights: &'a Quantized,
    /// Those of the tile, which are in the first cache by now.
    lines: &'a [Line],
    tile: usize,
    strip: Strip<'a>,
    sums: &'a mut [[f32; LANES]],
}

impl<const BITS: usize> Kernel for Rests<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let blocks = self.lines.len() / BITS;
        let per_group = self.weights.group_size / BLOCK;
        let first_group = self.tile * (blocks / per_group);
        let mut totals = [[0.0; LANES]; LANES];
        let rests = self.strip.rests.chunks_exact(self.strip.rests.len() / blocks);
        let refined = self.strip.refined.iter().zip(rests);
        for (index, (block, (&refined, rests))) in self.lines.chunks_exact(BITS).zip(refined).enumerate() {
            if refined == 0 {
                continue;
            }
            let numbers = unpack::<S, BITS>(s, block);
            let (scale, bias) = self.weights.scales.load(s, first_group + index / per_group);
            let mut rows = refined;
            while rows != 0 {
                let row = rows.trailing_zeros() as usize;
                rows &= rows - 1;
                if let (Some(rest), Some(total)) = (rests.get(row), totals.get_mut(row)) {
                    let with = add_rest::<S, BITS>(s, &numbers, scale, bias.is_some(), rest, s.load(total));
                    s.store(with, total);
                }
            }
        }
        for (sum, total) in self.sums.iter_mut().zip(&totals) {
            s.store(s.add(s.load(sum), s.load(total)), sum);
        }
    }
}

#[inline(always)]
fn stored<S: Simd, const M: usize>(s: S, sums: [S::F; M]) -> [[f32; LANES]; M] {
    let mut out = [[0.0; LANES]; M];
    for (out, sum) in out.iter_mut().zip(sums) {
        s.store(sum, out);
    }
    out
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

/// A tile of weights as float32.
struct Dequantize<'a, const BITS: usize> {
    weights: &'a Quantized,
    tile: usize,
    panel: &'a mut [[f32; LANES]],
}

impl<const BITS: usize> Kernel for Dequantize<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weights, tile, panel } = self;
        let blocks = panel.len() / BLOCK;
        let per_group = weights.group_size / BLOCK;
        let byte = s.splat_i(0xff);
        let lines = weights.tile(tile, blocks);
        for (index, (block, out)) in lines
            .chunks_exact(BITS)
            .zip(panel.chunks_exact_mut(BLOCK))
            .enumerate()
        {
            let numbers = unpack::<S, BITS>(s, block);
            let (scale, bias) = weights
                .scales
                .load(s, tile * (blocks / per_group) + index / per_group);
            let bias = match bias {
                Some(bias) => bias,
                None => s.mul(scale, s.splat(-middle(BITS as u32))),
            };
            for (four, out) in numbers.into_iter().zip(out.chunks_exact_mut(4)) {
                let columns = [
                    s.and(four, byte),
                    s.and(s.shr::<8>(four), byte),
                    s.and(s.shr::<16>(four), byte),
                    s.shr::<24>(four),
                ];
                for (column, out) in columns.into_iter().zip(out) {
                    s.store(s.fma(scale, s.to_float(column), bias), out);
                }
            }
        }
    }
}

#[inline(always)]
fn float_rows<S: Simd>(s: S, panel: &[[f32; LANES]], x: &Activations, sums: &mut [[f32; LANES]]) {
    let columns = panel.len();
    // Each row has two vectors of sums.
    in_groups!(x.rows(), S::SUMS / 2, [8, 4, 3, 2, 1], first, M => {
        let rows: [&[f32]; M] = std::array::from_fn(|row| &x.floats[(first + row) * columns..][..columns]);
        sums[first..][..M].copy_from_slice(&s.call(FloatBlock::<M> { panel, rows }));
    });
}

/// One tile times `M` rows of float32.
struct FloatBlock<'a, const M: usize> {
    panel: &'a [[f32; LANES]],
    rows: [&'a [f32]; M],
}

impl<const M: usize> Kernel for FloatBlock<'_, M> {
    type Output = [[f32; LANES]; M];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let Self { panel, rows } = self;
        // Even and odd columns apart, so that few rows do not wait for each sum; the same for any number of rows, so that
        // each gets the same bits.
        let mut sums = [[s.splat(0.0); 2]; M];
        let pairs = panel.len() / 2;
        for pair in 0..pairs {
            let (even, odd) = (s.load(&panel[2 * pair]), s.load(&panel[2 * pair + 1]));
            for (sums, row) in sums.iter_mut().zip(&rows) {
                let Some(&[x, y]) = row[2 * pair..].first_chunk::<2>() else {
                    continue;
                };
                sums[0] = s.fma(even, s.splat(x), sums[0]);
                sums[1] = s.fma(odd, s.splat(y), sums[1]);
            }
        }
        if panel.len() % 2 == 1 {
            let last = s.load(&panel[panel.len() - 1]);
            for (sums, row) in sums.iter_mut().zip(&rows) {
                sums[0] = s.fma(last, s.splat(row[panel.len() - 1]), sums[0]);
            }
        }
        stored(s, sums.map(|[a, b]| s.add(a, b)))
    }
}

#[cfg(test)]
mod tests;
