//! Attention over keys and values in pages.
//!
//! Scores are turned into weights page by page with a running maximum (the online softmax of Milakov and Gimelshein, 2018,
//! as FlashAttention uses it), so that nothing grows with the context.
//!
//! The unit of work is a head of keys and values with some rows of queries: all the heads that share it, of one token in
//! decoding and of several in prefill. Positions are split too, every 256 of them, and the parts are joined afterwards, so
//! that one long sequence has work for several threads. Where they are split does not depend on what else is computed:
//! a row gets the same bits alone and among others.

use std::cell::RefCell;
use std::ops::Range;

use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::kv::{Element, Head, KvLayer, KvLayout, PAGE, SLICES, Unpacked};
use crate::simd::{Kernel, LANES, Simd, dispatch, exp};
use crate::{KernelError, Pool};

/// Rows of queries that share a pass over the keys.
const ROWS: usize = 12;

/// Pages of a part.
const PART_PAGES: usize = 4;

/// Rows of queries of one sequence, and what they see.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// The sequence's pages of the layer, from position 0; `None` for those that no row sees.
    pub pages: &'a [Option<KvLayer<'a>>],
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
    /// A row sees the first of all positions too, this many, whatever the window is.
    pub keep: usize,
}

impl AttentionSpec {
    /// The pages that the rows at these positions, one after the other, see: the kept ones, and those of the window.
    pub fn pages(&self, positions: Range<usize>) -> [Range<usize>; 2] {
        let start = self
            .window
            .map_or(0, |window| (positions.start + 1).saturating_sub(window));
        let (start, end) = (start / PAGE, positions.end.div_ceil(PAGE));
        [0..self.keep.div_ceil(PAGE).min(start), start..end]
    }
}

/// Causal attention of several sequences at once: `queries` and `out` are `[rows, heads, head_dim]`.
///
/// # Errors
///
/// Where a length does not fit, where heads cannot be shared, and where a sequence has too few pages.
pub fn attend(
    isa: Isa,
    pool: &Pool,
    spec: AttentionSpec,
    queries: &[f32],
    sequences: &[Queries<'_>],
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
        for page in spec
            .pages(sequence.position..sequence.position + sequence.rows)
            .into_iter()
            .flatten()
        {
            match sequence.pages.get(page) {
                Some(Some(layer)) if layer.layout() == spec.layout => {}
                Some(Some(layer)) => {
                    let width = |layout: KvLayout| layout.heads * layout.head_dim;
                    check_len("a page", width(layer.layout()), width(spec.layout))?;
                }
                Some(None) | None => {
                    return Err(KernelError::Index {
                        what: "page",
                        index: page,
                        len: sequence.pages.len(),
                    });
                }
            }
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

fn units(spec: AttentionSpec, sequences: &[Queries<'_>]) -> Vec<Unit> {
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
                let position = |row: usize| sequence.position + row / group;
                let pages = spec.pages(position(first)..position(first + rows - 1) + 1);
                let mut parts: Vec<Range<usize>> = Vec::new();
                for pages in pages.into_iter().flat_map(parts_of) {
                    match parts.last_mut() {
                        // Both ranges may have pages of a part. What lies between them is hidden or not there.
                        Some(last) if last.start / PART_PAGES == pages.start / PART_PAGES => {
                            last.end = pages.end;
                        }
                        _ => parts.push(pages),
                    }
                }
                let several = parts.len() > 1;
                for pages in parts {
                    units.push(Unit {
                        sequence: index,
                        kv_head,
                        first,
                        rows,
                        pages,
                        partial: several.then_some(partial_rows),
                    });
                    partial_rows += if several { rows } else { 0 };
                }
            }
        }
    }
    units
}

/// Splits pages where parts begin.
fn parts_of(pages: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let parts = pages.start / PART_PAGES..pages.end.div_ceil(PART_PAGES);
    parts
        .map(move |part| (part * PART_PAGES).max(pages.start)..((part + 1) * PART_PAGES).min(pages.end))
        .filter(|part| !part.is_empty())
}

/// Where the row of a unit lies in queries and output.
fn place(spec: AttentionSpec, sequence: &Queries<'_>, unit: &Unit, row: usize) -> (usize, usize) {
    let group = spec.heads / spec.layout.heads;
    let (token, head) = ((unit.first + row) / group, (unit.first + row) % group);
    let head = unit.kv_head * group + head;
    let at = ((sequence.first + token) * spec.heads + head) * spec.layout.head_dim;
    (at, sequence.position + token)
}

/// Adds up the parts of rows: each part has its largest score, its sum and its weighted values.
fn join(spec: AttentionSpec, sequences: &[Queries<'_>], units: &[Unit], partials: &[f32], out: &mut [f32]) {
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

/// Runs a body with a constant number of rows: 12, 8, 4, 3, 2 or 1 at a time, as far as their sums fit the registers of an
/// instruction set.
macro_rules! in_groups {
    ($simd:ident, $rows:expr, $first:ident, $count:ident => $body:expr) => {
        let mut $first = 0;
        in_groups!(@ $simd, $rows, $first, $count => $body; 12, 8, 4, 3, 2, 1);
    };
    (@ $simd:ident, $rows:expr, $first:ident, $count:ident => $body:expr; $($size:literal),*) => {
        $(
            while $size <= $simd::SUMS && $rows - $first >= $size {
                const $count: usize = $size;
                $body;
                $first += $size;
            }
        )*
    };
}

struct Attend<'a> {
    spec: AttentionSpec,
    queries: &'a [f32],
    sequence: &'a Queries<'a>,
    unit: &'a Unit,
    partials: &'a Disjoint<'a, f32>,
    out: &'a Disjoint<'a, f32>,
}

thread_local! {
    /// Scaled queries and sums of a unit, and a page that was unpacked for it.
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    sums: Vec<f32>,
    unpacked: Unpacked,
}

impl Kernel for Attend<'_> {
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
        in_groups!(S, unit.rows, first, R => {
            let rows: [usize; R] = std::array::from_fn(|row| place(spec, sequence, unit, first + row).0);
            for element in 0..head_dim {
                scratch.queries.extend(rows.map(|at| queries[at + element] * spec.scale));
            }
        });
        let mut largest = [f32::NEG_INFINITY; ROWS];
        let mut totals = [0.0; ROWS];
        let mut weights = [[0.0; PAGE]; ROWS];
        for page in unit.pages.clone() {
            // What is seen and not there was refused before.
            let Some(layer) = sequence.pages.get(page).and_then(Option::as_ref) else {
                continue;
            };
            let head = layer.head(unit.kv_head);
            match head {
                Head::F32(keys, _) => {
                    scores_of(s, keys, head_dim, &scratch.queries, unit.rows, &mut weights);
                }
                Head::F16(keys, _) => {
                    scores_of(s, keys, head_dim, &scratch.queries, unit.rows, &mut weights);
                }
                Head::Integers => {
                    layer.unpack(s, unit.kv_head, &mut scratch.unpacked);
                    let keys = &scratch.unpacked.keys;
                    scores_of(s, keys, head_dim, &scratch.queries, unit.rows, &mut weights);
                }
            }
            let mut seen = 0;
            for row in 0..unit.rows {
                let (_, position) = place(spec, sequence, unit, row);
                let within = |position: usize| position.saturating_sub(page * PAGE).min(PAGE);
                let start = spec
                    .window
                    .map_or(0, |window| (position + 1).saturating_sub(window));
                let (start, end) = (within(start), within(position + 1));
                let kept = within(spec.keep).min(end);
                seen = seen.max(end);
                let sums = &mut scratch.sums[row * width..][..width];
                if let Some(cap) = spec.softcap {
                    soft_cap(s, &mut weights[row], cap);
                }
                soften(
                    s,
                    &mut weights[row],
                    [0..kept, start.max(kept)..end],
                    &mut largest[row],
                    &mut totals[row],
                    sums,
                );
            }
            let sums = &mut scratch.sums;
            match head {
                Head::F32(_, values) => add_values(s, values, width, &weights, unit.rows, seen, sums),
                Head::F16(_, values) => add_values(s, values, width, &weights, unit.rows, seen, sums),
                Head::Integers => {
                    let values = &scratch.unpacked.values;
                    add_values(s, values, width, &weights, unit.rows, seen, sums);
                }
            }
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
fn scores_of<S: Simd, E: Element>(
    s: S,
    keys: &[E],
    head_dim: usize,
    queries: &[f32],
    rows: usize,
    out: &mut [[f32; PAGE]; ROWS],
) {
    in_groups!(S, rows, first, R => {
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

impl<E: Element, const R: usize> Kernel for Scores<'_, E, R> {
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

/// Turns the scores of a row into weights relative to the largest so far, and scales what was summed before to it. The row
/// sees two ranges, of which the second does not begin before the first ends.
#[inline(always)]
fn soften<S: Simd>(
    s: S,
    scores: &mut [f32; PAGE],
    [kept, seen]: [Range<usize>; 2],
    largest: &mut f32,
    total: &mut f32,
    sums: &mut [f32],
) {
    if kept.is_empty() && seen.is_empty() {
        scores.fill(0.0);
        return;
    }
    let end = kept.end.max(seen.end);
    let hidden = [kept.end..seen.start.min(end), end..PAGE];
    for range in hidden.clone() {
        scores[range].fill(f32::NEG_INFINITY);
    }
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
    for range in hidden {
        scores[range].fill(0.0);
    }
    // What lies outside was counted with the smallest weight there is, 1e-38.
    *total += s.sum(sum);
}

/// Adds the weighted values of a page to the sums of each row.
#[inline(always)]
fn add_values<S: Simd, E: Element>(
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
    in_groups!(S, rows, first, R => {
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

impl<E: Element, const R: usize> Kernel for AddValues<'_, E, R> {
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
