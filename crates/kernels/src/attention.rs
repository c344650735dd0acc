//! Attention over keys and values in pages.
//!
//! A page holds 64 positions of one layer. Its keys lie sixteen positions side by side, so that a score needs no sum
//! across lanes; its values lie row by row. Scores are turned into weights page by page with a running maximum (the
//! online softmax of Milakov and Gimelshein, 2018, as FlashAttention uses it), so that nothing grows with the context.
//!
//! The unit of work is a head of keys and values with some rows of queries: all the heads that share it, of one token in
//! decoding and of several in prefill. Positions are split too, every 256 of them, and the parts are joined afterwards, so
//! that one long sequence has work for several threads. Where they are split does not depend on what else is computed:
//! a row gets the same bits alone and among others.

use std::cell::RefCell;

use half::f16;

use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::simd::{Kernel, LANES, Simd, dispatch, exp};
use crate::{KernelError, Pool};

/// Positions of a page.
pub const PAGE: usize = 64;

/// Vectors of sixteen positions in a page.
const SLICES: usize = PAGE / LANES;

/// Rows of queries that share a pass over the keys.
const ROWS: usize = 12;

/// Pages of a part.
const PART_PAGES: usize = 4;

/// An element of the keys and values in memory.
pub trait KvElement: Copy + Default + Send + Sync + sealed::Load {}

impl KvElement for f32 {}
impl KvElement for f16 {}

mod sealed {
    use half::f16;

    use crate::simd::{LANES, Simd};

    #[expect(private_interfaces, reason = "sealed: nobody else can name or implement it")]
    #[expect(private_bounds, reason = "sealed: nobody else can name or implement it")]
    pub trait Load: Sized {
        fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F;
        fn of(value: f32) -> Self;
    }

    #[expect(private_interfaces, reason = "sealed: nobody else can name or implement it")]
    #[expect(private_bounds, reason = "sealed: nobody else can name or implement it")]
    impl Load for f32 {
        #[inline(always)]
        fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
            s.load(from)
        }
        #[inline(always)]
        fn of(value: f32) -> Self {
            value
        }
    }

    #[expect(private_interfaces, reason = "sealed: nobody else can name or implement it")]
    #[expect(private_bounds, reason = "sealed: nobody else can name or implement it")]
    impl Load for f16 {
        #[inline(always)]
        fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
            s.load_f16(from)
        }
        #[inline(always)]
        fn of(value: f32) -> Self {
            f16::from_f32(value)
        }
    }
}

/// The shape of the keys and values of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Heads of keys and values.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl KvLayout {
    /// Elements that a layer takes in a page.
    pub fn page_len(self) -> usize {
        self.heads * (self.keys() + self.values())
    }

    /// Keys of a head in a page: `[slices, head_dim, 16]`.
    fn keys(self) -> usize {
        PAGE * self.head_dim
    }

    /// Values of a head in a page: `[64, width]`.
    fn values(self) -> usize {
        PAGE * self.width()
    }

    /// The width of a head in whole vectors.
    fn width(self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// The keys and the values of a head.
    fn head<E>(self, page: &[E], head: usize) -> (&[E], &[E]) {
        let (keys, values) = page.split_at(self.heads * self.keys());
        (
            &keys[head * self.keys()..][..self.keys()],
            &values[head * self.values()..][..self.values()],
        )
    }

    /// Writes the keys and values of one position, `[heads, head_dim]` each.
    ///
    /// # Errors
    ///
    /// Where a length does not fit, and for a position beyond the page.
    pub fn write<E: KvElement>(
        self,
        page: &mut [E],
        position: usize,
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), KernelError> {
        check_len("a page", page.len(), self.page_len())?;
        check_len("the keys", keys.len(), self.heads * self.head_dim)?;
        check_len("the values", values.len(), self.heads * self.head_dim)?;
        if position >= PAGE {
            return Err(KernelError::Index {
                what: "position",
                index: position,
                len: PAGE,
            });
        }
        let (slice, lane) = (position / LANES, position % LANES);
        let (key_page, value_page) = page.split_at_mut(self.heads * self.keys());
        let heads = key_page.chunks_exact_mut(self.keys());
        for (head, keys) in heads.zip(keys.chunks_exact(self.head_dim)) {
            let slice = &mut head[slice * self.head_dim * LANES..][..self.head_dim * LANES];
            for (lanes, key) in slice.chunks_exact_mut(LANES).zip(keys) {
                lanes[lane] = E::of(*key);
            }
        }
        let heads = value_page.chunks_exact_mut(self.values());
        for (head, values) in heads.zip(values.chunks_exact(self.head_dim)) {
            for (to, value) in head[position * self.width()..].iter_mut().zip(values) {
                *to = E::of(*value);
            }
        }
        Ok(())
    }
}

/// Rows of queries of one sequence, and what they see.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a, E> {
    /// The sequence's pages of the layer, from position 0; each [`KvLayout::page_len`] long.
    pub pages: &'a [&'a [E]],
    /// The position of the first row. The row sees positions up to its own; the keys and values of all rows are
    /// written before.
    pub position: usize,
    /// The number of the first row in `queries` and `out`.
    pub first: usize,
    /// Rows, each one position after the other.
    pub rows: usize,
}

/// What is the same for all heads of a layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpec {
    /// Keys and values.
    pub layout: KvLayout,
    /// Heads of queries, a multiple of those of keys and values.
    pub heads: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Scores `s` become `cap * tanh(s / cap)`.
    pub softcap: Option<f32>,
    /// A row sees this many positions, its own included; all where `None`.
    pub window: Option<usize>,
}

/// Causal attention of several sequences at once: `queries` and `out` are `[rows, heads, head_dim]`.
///
/// # Errors
///
/// Where a length does not fit, where heads cannot be shared, and where a sequence has too few pages.
pub fn attend<E: KvElement>(
    isa: Isa,
    pool: &Pool,
    spec: AttentionSpec,
    queries: &[f32],
    sequences: &[Queries<'_, E>],
    out: &mut [f32],
) -> Result<(), KernelError> {
    let row = spec.heads * spec.layout.head_dim;
    check_len("the output of attention", out.len(), queries.len())?;
    if spec.layout.heads == 0 || !spec.heads.is_multiple_of(spec.layout.heads) {
        return Err(KernelError::Length {
            what: "the heads",
            found: spec.heads,
            expected: spec.layout.heads,
        });
    }
    for sequence in sequences {
        let end = sequence.first + sequence.rows;
        if end * row > queries.len() {
            return Err(KernelError::Length {
                what: "the queries",
                found: queries.len(),
                expected: end * row,
            });
        }
        let needed = (sequence.position + sequence.rows).div_ceil(PAGE);
        if sequence.pages.len() < needed {
            return Err(KernelError::Length {
                what: "the pages of a sequence",
                found: sequence.pages.len(),
                expected: needed,
            });
        }
        for page in sequence.pages {
            check_len("a page", page.len(), spec.layout.page_len())?;
        }
    }
    let units = units(spec, sequences);
    let width = spec.layout.width();
    // Parts of a row are joined once all are there; whole rows are written at once.
    let partial_rows: usize = units
        .iter()
        .filter(|unit| unit.partial.is_some())
        .map(|unit| unit.rows)
        .sum();
    let mut partials = vec![0.0; partial_rows * (width + 2)];
    {
        let (partials, out) = (Disjoint::new(&mut partials), Disjoint::new(&mut *out));
        pool.run(units.len(), |index| {
            // The last rows see the most and come first, so that the threads end together.
            let index = units.len() - 1 - index;
            dispatch(
                isa,
                Attend {
                    spec,
                    queries,
                    sequence: &sequences[units[index].sequence],
                    unit: &units[index],
                    partials: &partials,
                    out: &out,
                },
            );
        });
    }
    join(spec, sequences, &units, &partials, out);
    Ok(())
}

/// A piece of work: some rows of queries that share a head of keys and values, over some pages.
#[derive(Clone, Debug)]
struct Unit {
    sequence: usize,
    kv_head: usize,
    /// Rows count token by token and within a token head by head, among those that share the head of keys.
    first: usize,
    rows: usize,
    pages: std::ops::Range<usize>,
    /// Where the parts go, in rows, if the unit sees not all that its rows see.
    partial: Option<usize>,
}

fn units<E>(spec: AttentionSpec, sequences: &[Queries<'_, E>]) -> Vec<Unit> {
    let group = spec.heads / spec.layout.heads;
    // Whole tokens where these fit, so that the rows of a unit see about the same.
    let step = if group <= ROWS { ROWS / group * group } else { ROWS };
    let mut units = Vec::new();
    let mut partial_rows = 0;
    for (index, sequence) in sequences.iter().enumerate() {
        let all = sequence.rows * group;
        for kv_head in 0..spec.layout.heads {
            for first in (0..all).step_by(step) {
                let rows = step.min(all - first);
                let start = spec.window.map_or(0, |window| {
                    (sequence.position + first / group + 1).saturating_sub(window)
                });
                let end = sequence.position + (first + rows - 1) / group + 1;
                let (start, end) = (start / PAGE, end.div_ceil(PAGE));
                let parts = start / PART_PAGES..end.div_ceil(PART_PAGES);
                for part in parts.clone() {
                    let pages = (part * PART_PAGES).max(start)..((part + 1) * PART_PAGES).min(end);
                    units.push(Unit {
                        sequence: index,
                        kv_head,
                        first,
                        rows,
                        pages,
                        partial: (parts.len() > 1).then_some(partial_rows),
                    });
                    partial_rows += if parts.len() > 1 { rows } else { 0 };
                }
            }
        }
    }
    units
}

/// Where the row of a unit lies in queries and output.
fn place<E>(spec: AttentionSpec, sequence: &Queries<'_, E>, unit: &Unit, row: usize) -> (usize, usize) {
    let group = spec.heads / spec.layout.heads;
    let (token, head) = ((unit.first + row) / group, (unit.first + row) % group);
    let head = unit.kv_head * group + head;
    let at = ((sequence.first + token) * spec.heads + head) * spec.layout.head_dim;
    (at, sequence.position + token)
}

/// Adds up the parts of rows: each part has its largest score, its sum and its weighted values.
fn join<E>(
    spec: AttentionSpec,
    sequences: &[Queries<'_, E>],
    units: &[Unit],
    partials: &[f32],
    out: &mut [f32],
) {
    let (width, head_dim) = (spec.layout.width(), spec.layout.head_dim);
    let part = |index: usize| &partials[index * (width + 2)..][..width + 2];
    let same = |a: &Unit, b: &Unit| {
        a.partial.is_some()
            && b.partial.is_some()
            && (a.sequence, a.kv_head, a.first) == (b.sequence, b.kv_head, b.first)
    };
    for parts in units.chunk_by(same) {
        let Some(unit) = parts.first().filter(|unit| unit.partial.is_some()) else {
            continue;
        };
        for row in 0..unit.rows {
            let rows = || {
                parts
                    .iter()
                    .filter_map(|unit| unit.partial)
                    .map(|at| part(at + row))
            };
            let largest = rows().map(|part| part[0]).fold(f32::NEG_INFINITY, f32::max);
            let (at, _) = place(spec, &sequences[unit.sequence], unit, row);
            let out = &mut out[at..][..head_dim];
            out.fill(0.0);
            let mut sum = 0.0;
            for part in rows() {
                let factor = (part[0] - largest).exp();
                sum += factor * part[1];
                for (out, value) in out.iter_mut().zip(&part[2..]) {
                    *out += factor * value;
                }
            }
            for out in out {
                *out /= sum;
            }
        }
    }
}

/// Runs a body with a constant number of rows: 12, 8, 4, 3, 2 or 1 at a time.
macro_rules! in_groups {
    ($rows:expr, $first:ident, $count:ident => $body:expr) => {
        let mut $first = 0;
        in_groups!(@ $rows, $first, $count => $body; 12, 8, 4, 3, 2, 1);
    };
    (@ $rows:expr, $first:ident, $count:ident => $body:expr; $($size:literal),*) => {
        $(
            while $rows - $first >= $size {
                const $count: usize = $size;
                $body;
                $first += $size;
            }
        )*
    };
}

struct Attend<'a, E> {
    spec: AttentionSpec,
    queries: &'a [f32],
    sequence: &'a Queries<'a, E>,
    unit: &'a Unit,
    partials: &'a Disjoint<'a, f32>,
    out: &'a Disjoint<'a, f32>,
}

thread_local! {
    /// Scaled queries and sums of a unit.
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    sums: Vec<f32>,
}

impl<E: KvElement> Kernel for Attend<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self {
            spec,
            queries,
            sequence,
            unit,
            partials,
            out,
        } = self;
        let (head_dim, width) = (spec.layout.head_dim, spec.layout.width());
        // Taken out and put back: in a closure for `with` the code would lose the features of the caller.
        let mut scratch = SCRATCH.take();
        scratch.sums.clear();
        scratch.sums.resize(ROWS * width, 0.0);
        // The rows that are multiplied together lie side by side, element by element.
        scratch.queries.clear();
        in_groups!(unit.rows, first, R => {
            let rows: [usize; R] = std::array::from_fn(|row| place(spec, sequence, unit, first + row).0);
            for element in 0..head_dim {
                scratch.queries.extend(rows.map(|at| queries[at + element] * spec.scale));
            }
        });
        let mut largest = [f32::NEG_INFINITY; ROWS];
        let mut totals = [0.0; ROWS];
        let mut weights = [[0.0; PAGE]; ROWS];
        for page in unit.pages.clone() {
            let (keys, values) = spec.layout.head(sequence.pages[page], unit.kv_head);
            scores_of(s, keys, head_dim, &scratch.queries, unit.rows, &mut weights);
            let mut seen = 0;
            for row in 0..unit.rows {
                let (_, position) = place(spec, sequence, unit, row);
                let start = spec
                    .window
                    .map_or(0, |window| (position + 1).saturating_sub(window));
                let start = start.saturating_sub(page * PAGE).min(PAGE);
                let end = (position + 1).saturating_sub(page * PAGE).min(PAGE);
                seen = seen.max(end);
                let sums = &mut scratch.sums[row * width..][..width];
                if let Some(cap) = spec.softcap {
                    soft_cap(s, &mut weights[row], cap);
                }
                soften(
                    s,
                    &mut weights[row],
                    start..end,
                    &mut largest[row],
                    &mut totals[row],
                    sums,
                );
            }
            add_values(s, values, width, &weights, unit.rows, seen, &mut scratch.sums);
        }
        for row in 0..unit.rows {
            let sums = &scratch.sums[row * width..][..width];
            #[expect(unsafe_code, reason = "each task writes its own rows")]
            if let Some(first) = unit.partial {
                // SAFETY: units have different rows of the parts.
                let part = unsafe { partials.part((first + row) * (width + 2), width + 2) };
                part[0] = largest[row];
                part[1] = totals[row];
                part[2..].copy_from_slice(sums);
            } else {
                let (at, _) = place(spec, sequence, unit, row);
                // SAFETY: units that see all have different rows of the output.
                let out = unsafe { out.part(at, head_dim) };
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = sum / totals[row];
                }
            }
        }
        SCRATCH.set(scratch);
    }
}

/// The scores of a page's positions, for each row.
#[inline(always)]
fn scores_of<S: Simd, E: KvElement>(
    s: S,
    keys: &[E],
    head_dim: usize,
    queries: &[f32],
    rows: usize,
    out: &mut [[f32; PAGE]; ROWS],
) {
    in_groups!(rows, first, R => {
        let (queries, _) = queries[first * head_dim..][..R * head_dim].as_chunks::<R>();
        if let Some(out) = out[first..].first_chunk_mut::<R>() {
            s.call(Scores::<E, R> { keys, queries, out });
        }
    });
}

struct Scores<'a, E, const R: usize> {
    keys: &'a [E],
    /// For each element of a head, that of each row.
    queries: &'a [[f32; R]],
    out: &'a mut [[f32; PAGE]; R],
}

impl<E: KvElement, const R: usize> Kernel for Scores<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { keys, queries, out } = self;
        let head_dim = keys.len() / PAGE;
        for slice in 0..SLICES {
            let (keys, _) = keys[slice * head_dim * LANES..][..head_dim * LANES].as_chunks::<LANES>();
            let mut scores = [s.splat(0.0); R];
            for (keys, queries) in keys.iter().zip(queries) {
                let keys = E::load(s, keys);
                for (score, query) in scores.iter_mut().zip(queries) {
                    *score = s.fma(keys, s.splat(*query), *score);
                }
            }
            for (out, score) in out.iter_mut().zip(scores) {
                let (slices, _) = out.as_chunks_mut::<LANES>();
                s.store(score, &mut slices[slice]);
            }
        }
    }
}

/// `cap * tanh(score / cap)` of each.
#[inline(always)]
fn soft_cap<S: Simd>(s: S, scores: &mut [f32; PAGE], cap: f32) {
    let (slices, _) = scores.as_chunks_mut::<LANES>();
    for slice in slices {
        // tanh(x) = 1 - 2 / (exp(2 x) + 1)
        let power = exp(s, s.mul(s.load(slice), s.splat(2.0 / cap)));
        let rest = s.div(s.splat(2.0 * cap), s.add(power, s.splat(1.0)));
        s.store(s.sub(s.splat(cap), rest), slice);
    }
}

/// Turns the scores of a row into weights relative to the largest so far, and scales what was summed before to it.
#[inline(always)]
fn soften<S: Simd>(
    s: S,
    scores: &mut [f32; PAGE],
    seen: std::ops::Range<usize>,
    largest: &mut f32,
    total: &mut f32,
    sums: &mut [f32],
) {
    if seen.is_empty() {
        scores.fill(0.0);
        return;
    }
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
    let (slices, _) = scores.as_chunks_mut::<LANES>();
    let mut highest = s.load(&slices[0]);
    for slice in &slices[1..] {
        highest = s.max(highest, s.load(slice));
    }
    let highest = s.largest(highest).max(*largest);
    if highest > *largest {
        let factor = (*largest - highest).exp();
        *largest = highest;
        *total *= factor;
        let (sums, _) = sums.as_chunks_mut::<LANES>();
        for sums in sums {
            s.store(s.mul(s.load(sums), s.splat(factor)), sums);
        }
    }
    let shift = s.splat(highest);
    let mut sum = s.splat(0.0);
    for slice in slices {
        let weight = exp(s, s.sub(s.load(slice), shift));
        sum = s.add(sum, weight);
        s.store(weight, slice);
    }
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    // What lies outside was counted with the smallest weight there is, 1e-38.
    *total += s.sum(sum);
}

/// Adds the weighted values of a page to the sums of each row.
#[inline(always)]
fn add_values<S: Simd, E: KvElement>(
    s: S,
    values: &[E],
    width: usize,
    weights: &[[f32; PAGE]; ROWS],
    rows: usize,
    seen: usize,
    sums: &mut [f32],
) {
    let (values, _) = values.as_chunks::<LANES>();
    let (sums, _) = sums.as_chunks_mut::<LANES>();
    let vectors = width / LANES;
    in_groups!(rows, first, R => {
        let sums = &mut sums[first * vectors..][..R * vectors];
        if let Some(weights) = weights[first..].first_chunk::<R>() {
            s.call(AddValues::<E, R> { values, vectors, weights, seen, sums });
        }
    });
}

struct AddValues<'a, E, const R: usize> {
    values: &'a [[E; LANES]],
    vectors: usize,
    weights: &'a [[f32; PAGE]; R],
    seen: usize,
    sums: &'a mut [[f32; LANES]],
}

impl<E: KvElement, const R: usize> Kernel for AddValues<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self {
            values,
            vectors,
            weights,
            seen,
            sums,
        } = self;
        for vector in 0..vectors {
            let mut own: [S::F; R] = std::array::from_fn(|row| s.load(&sums[row * vectors + vector]));
            for (position, values) in (0..seen.min(PAGE)).zip(values[vector..].iter().step_by(vectors)) {
                let values = E::load(s, values);
                for (own, weights) in own.iter_mut().zip(weights) {
                    *own = s.fma(values, s.splat(weights[position]), *own);
                }
            }
            for (row, own) in own.into_iter().enumerate() {
                s.store(own, &mut sums[row * vectors + vector]);
            }
        }
    }
}
