//! Attention over keys and values in pages.
//!
//! Scores are turned into weights page by page with a running maximum (the online softmax of Milakov and Gimelshein, 2018,
//! as FlashAttention uses it), so that nothing grows with the context.
//!
//! The unit of work is a head of keys and values with some rows of queries: all the heads that share it, of one token in
//! decoding and of several in prefill. A row is summed up in parts of 128 positions, and the parts are joined one after the
//! other. Where there are few rows each part is a unit of its own, so that one long sequence has work for several threads;
//! where there are many a unit sees to all parts of its rows. The sums are the same in both, and do not depend on what else is
//! computed: a row gets the same bits alone and among others.

use std::cell::RefCell;
use std::ops::Range;

use crate::disjoint::Disjoint;
use crate::error::check_len;
use crate::isa::Isa;
use crate::kv::{Element, Head, KvLayer, KvLayout, PAGE, SLICES, Unpacked};
use crate::simd::{Kernel, LANES, Line, Simd, dispatch, exp};
use crate::{KernelError, Pool};

/// Rows of queries that share a pass over the keys.
const ROWS: usize = 12;

/// Pages of a part.
const PART_PAGES: usize = 2;

/// Units for each thread below which parts are units of their own.
const UNITS_PER_THREAD: usize = 4;

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
    let units = units(spec, sequences, UNITS_PER_THREAD * pool.threads());
    let width = spec.layout.width();
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
    if partial_rows > 0 {
        let (units, partials) = (&units, &partials);
        dispatch(
            isa,
            Join {
                spec,
                sequences,
                units,
                partials,
                out,
            },
        );
    }
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
    /// The kept ones, and those of the window.
    pages: [Range<usize>; 2],
    /// Where the part of each row goes, in rows, if the unit sees one part of what its rows see.
    partial: Option<usize>,
}

/// All there is to do; where that is less than `few` units, parts are units of their own.
fn units(spec: AttentionSpec, sequences: &[Queries<'_>], few: usize) -> Vec<Unit> {
    let group = spec.heads / spec.layout.heads;
    // Whole tokens where these fit, so that the rows of a unit see about the same.
    let step = if group <= ROWS { ROWS / group * group } else { ROWS };
    let steps = sequences
        .iter()
        .map(|sequence| (sequence.rows * group).div_ceil(step));
    let apart = steps.sum::<usize>() * spec.layout.heads < few;
    let mut units = Vec::new();
    let mut partial_rows = 0;
    for (index, sequence) in sequences.iter().enumerate() {
        let all = sequence.rows * group;
        for kv_head in 0..spec.layout.heads {
            for first in (0..all).step_by(step) {
                let rows = step.min(all - first);
                let position = |row: usize| sequence.position + row / group;
                let pages = spec.pages(position(first)..position(first + rows - 1) + 1);
                let unit = |pages, partial| Unit {
                    sequence: index,
                    kv_head,
                    first,
                    rows,
                    pages,
                    partial,
                };
                let parts = parts_of(&pages);
                if !apart || parts.clone().nth(1).is_none() {
                    units.push(unit(pages, None));
                    continue;
                }
                for pages in parts {
                    units.push(unit(pages, Some(partial_rows)));
                    partial_rows += rows;
                }
            }
        }
    }
    units
}

/// Splits pages where parts begin; a part may have some of both ranges.
fn parts_of(pages: &[Range<usize>; 2]) -> impl Iterator<Item = [Range<usize>; 2]> + Clone + use<> {
    let [kept, seen] = pages.clone();
    (0..seen.end.div_ceil(PART_PAGES))
        .map(move |part| {
            let within = |pages: &Range<usize>| {
                let start = pages.start.max(part * PART_PAGES);
                start..pages.end.min((part + 1) * PART_PAGES).max(start)
            };
            [within(&kept), within(&seen)]
        })
        .filter(|[kept, seen]| !kept.is_empty() || !seen.is_empty())
}

/// Where the row of a unit lies in queries and output.
fn place(spec: AttentionSpec, sequence: &Queries<'_>, unit: &Unit, row: usize) -> (usize, usize) {
    let group = spec.heads / spec.layout.heads;
    let (token, head) = ((unit.first + row) / group, (unit.first + row) % group);
    let head = unit.kv_head * group + head;
    let at = ((sequence.first + token) * spec.heads + head) * spec.layout.head_dim;
    (at, sequence.position + token)
}

/// What a row has seen so far: its largest score, and relative to that the sum of its weights and its weighted values.
struct Seen<'a> {
    largest: &'a mut f32,
    total: &'a mut f32,
    sums: &'a mut [f32],
}

impl Seen<'_> {
    /// Adds what the row has seen elsewhere.
    #[inline(always)]
    fn add<S: Simd>(self, s: S, largest: f32, total: f32, sums: &[f32]) {
        if largest == f32::NEG_INFINITY {
            return;
        }
        let (own, _) = self.sums.as_chunks_mut::<LANES>();
        let (sums, _) = sums.as_chunks::<LANES>();
        let lanes = own.iter_mut().zip(sums);
        if largest <= *self.largest {
            let factor = (largest - *self.largest).exp();
            *self.total += factor * total;
            for (own, sum) in lanes {
                s.store(s.fma(s.load(sum), s.splat(factor), s.load(own)), own);
            }
        } else {
            // 0 where nothing was seen before.
            let factor = (*self.largest - largest).exp();
            *self.largest = largest;
            *self.total = factor * *self.total + total;
            for (own, sum) in lanes {
                s.store(s.fma(s.load(own), s.splat(factor), s.load(sum)), own);
            }
        }
    }
}

/// Joins the parts of rows that are units of their own.
struct Join<'a> {
    spec: AttentionSpec,
    sequences: &'a [Queries<'a>],
    units: &'a [Unit],
    partials: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Join<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (head_dim, width) = (self.spec.layout.head_dim, self.spec.layout.width());
        let mut sums = vec![0.0; width];
        let same = |a: &Unit, b: &Unit| {
            a.partial.is_some()
                && b.partial.is_some()
                && (a.sequence, a.kv_head, a.first) == (b.sequence, b.kv_head, b.first)
        };
        for parts in self.units.chunk_by(same) {
            let Some(unit) = parts.first().filter(|unit| unit.partial.is_some()) else {
                continue;
            };
            for row in 0..unit.rows {
                let (mut largest, mut total) = (f32::NEG_INFINITY, 0.0);
                sums.fill(0.0);
                for at in parts.iter().filter_map(|unit| unit.partial) {
                    let part = &self.partials[(at + row) * (width + 2)..][..width + 2];
                    let seen = Seen {
                        largest: &mut largest,
                        total: &mut total,
                        sums: &mut sums,
                    };
                    seen.add(s, part[0], part[1], &part[2..]);
                }
                let (at, _) = place(self.spec, &self.sequences[unit.sequence], unit, row);
                for (out, sum) in self.out[at..][..head_dim].iter_mut().zip(&sums) {
                    *out = sum / total;
                }
            }
        }
    }
}

/// Runs a body with a constant number of rows: 12, 8, 6, 4, 3, 2 or 1 at a time, as far as their sums fit the registers of an
/// instruction set.
macro_rules! in_groups {
    ($simd:ident, $rows:expr, $first:ident, $count:ident => $body:expr) => {
        let mut $first = 0;
        in_groups!(@ $simd, $rows, $first, $count => $body; 12, 8, 6, 4, 3, 2, 1);
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
    /// What a unit needs, and the next one uses again.
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

#[derive(Default)]
struct Scratch {
    /// Scaled; the rows that are multiplied together lie side by side, element by element.
    queries: Vec<f32>,
    /// Of the part at hand.
    part: RowSums,
    /// Of the parts before.
    whole: RowSums,
    /// A page that was unpacked.
    unpacked: Unpacked,
}

/// What the rows of a unit have seen.
#[derive(Default)]
struct RowSums {
    largest: [f32; ROWS],
    totals: [f32; ROWS],
    /// `[rows, width]`.
    sums: Vec<f32>,
}

impl RowSums {
    /// Nothing was seen.
    fn clear(&mut self, rows: usize, width: usize) {
        self.largest = [f32::NEG_INFINITY; ROWS];
        self.totals = [0.0; ROWS];
        self.sums.clear();
        self.sums.resize(rows * width, 0.0);
    }

    #[inline(always)]
    fn row(&mut self, row: usize, width: usize) -> Seen<'_> {
        Seen {
            largest: &mut self.largest[row],
            total: &mut self.totals[row],
            sums: &mut self.sums[row * width..][..width],
        }
    }

    /// Adds what the same rows have seen in another part.
    #[inline(always)]
    fn add<S: Simd>(&mut self, s: S, part: &Self, rows: usize, width: usize) {
        for row in 0..rows {
            let sums = &part.sums[row * width..][..width];
            self.row(row, width)
                .add(s, part.largest[row], part.totals[row], sums);
        }
    }
}

impl Attend<'_> {
    /// The keys and the values of a page, to be asked for. Integers are unpacked at once, and nothing is asked for ahead.
    fn ahead(&self, page: Option<usize>) -> [Ahead; 2] {
        let layer = page.and_then(|page| self.sequence.pages.get(page)?.as_ref());
        match layer.map(|layer| layer.head(self.unit.kv_head)) {
            Some(Head::F32(keys, values)) => [Ahead::of(keys), Ahead::of(values)],
            Some(Head::F16(keys, values)) => [Ahead::of(keys), Ahead::of(values)],
            Some(Head::Integers) | None => [Ahead::NOTHING; 2],
        }
    }
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { spec, unit, .. } = self;
        let (queries, sequence) = (self.queries, self.sequence);
        let (head_dim, width) = (spec.layout.head_dim, spec.layout.width());
        // Taken out and put back: in a closure for `with` the code would lose the features of the caller.
        let mut scratch = SCRATCH.take();
        // Units of many rows find in the second cache what others have read before.
        let few = unit.rows <= S::SUMS / 2;
        let [keys, _] = self.ahead(unit.pages.iter().cloned().flatten().next().filter(|_| few));
        keys.ask_all(s);
        scratch.part.clear(unit.rows, width);
        scratch.whole.clear(unit.rows, width);
        scratch.queries.resize(unit.rows * head_dim, 0.0);
        in_groups!(S, unit.rows, first, R => {
            let (group, _) = scratch.queries[first * head_dim..][..R * head_dim].as_chunks_mut::<R>();
            for row in 0..R {
                let (at, _) = place(spec, sequence, unit, first + row);
                for (to, query) in group.iter_mut().zip(&queries[at..][..head_dim]) {
                    to[row] = query * spec.scale;
                }
            }
        });
        let mut weights = [[0.0; PAGE]; ROWS];
        let mut pages = unit.pages.iter().cloned().flatten().peekable();
        while let Some(page) = pages.next() {
            let next = pages.peek().copied();
            // What is seen and not there was refused before.
            let Some(layer) = sequence.pages.get(page).and_then(Option::as_ref) else {
                continue;
            };
            let head = layer.head(unit.kv_head);
            let [_, values] = self.ahead(Some(page).filter(|_| few));
            let [ahead, _] = self.ahead(next.filter(|_| few));
            let queries = &scratch.queries;
            match head {
                Head::F32(keys, _) => scores_of(s, keys, queries, unit.rows, values, &mut weights),
                Head::F16(keys, _) => scores_of(s, keys, queries, unit.rows, values, &mut weights),
                Head::Integers => {
                    layer.unpack(s, unit.kv_head, &mut scratch.unpacked);
                    let keys = &scratch.unpacked.keys;
                    scores_of(s, keys, queries, unit.rows, values, &mut weights);
                }
            }
            let mut seen = 0;
            for (row, weights) in weights.iter_mut().enumerate().take(unit.rows) {
                let (_, position) = place(spec, sequence, unit, row);
                let within = |position: usize| position.saturating_sub(page * PAGE).min(PAGE);
                let start = spec
                    .window
                    .map_or(0, |window| (position + 1).saturating_sub(window));
                let (start, end) = (within(start), within(position + 1));
                let kept = within(spec.keep).min(end);
                seen = seen.max(end);
                if let Some(cap) = spec.softcap {
                    soft_cap(s, weights, cap);
                }
                let ranges = [0..kept, start.max(kept)..end];
                soften(s, weights, ranges, scratch.part.row(row, width));
            }
            let (rows, sums) = ((unit.rows, seen), &mut scratch.part.sums);
            match head {
                Head::F32(_, values) => add_values(s, values, width, &weights, rows, ahead, sums),
                Head::F16(_, values) => add_values(s, values, width, &weights, rows, ahead, sums),
                Head::Integers => {
                    let values = &scratch.unpacked.values;
                    add_values(s, values, width, &weights, rows, ahead, sums);
                }
            }
            if unit.partial.is_none() && next.is_none_or(|next| next / PART_PAGES != page / PART_PAGES) {
                scratch.whole.add(s, &scratch.part, unit.rows, width);
                scratch.part.clear(unit.rows, width);
            }
        }
        for row in 0..unit.rows {
            #[expect(unsafe_code, reason = "each task writes its own rows")]
            if let Some(first) = unit.partial {
                let Seen { largest, total, sums } = scratch.part.row(row, width);
                // SAFETY: units have different rows of the parts.
                let part = unsafe { self.partials.part((first + row) * (width + 2), width + 2) };
                part[0] = *largest;
                part[1] = *total;
                part[2..].copy_from_slice(sums);
            } else {
                let Seen { total, sums, .. } = scratch.whole.row(row, width);
                let (at, _) = place(spec, sequence, unit, row);
                // SAFETY: units that see all have different rows of the output.
                let out = unsafe { self.out.part(at, head_dim) };
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = *sum / *total;
                }
            }
        }
        SCRATCH.set(scratch);
    }
}

/// What is read next, asked for while something else is computed.
#[derive(Clone, Copy)]
struct Ahead {
    next: *const Line,
    lines: usize,
}

impl Ahead {
    const NOTHING: Self = Self {
        next: std::ptr::null(),
        lines: 0,
    };

    fn of<E>(memory: &[E]) -> Self {
        Self {
            next: memory.as_ptr().cast(),
            lines: size_of_val(memory).div_ceil(size_of::<Line>()),
        }
    }

    /// As many lines as have to be asked for at each of some times.
    #[inline(always)]
    fn each(&self, times: usize) -> usize {
        self.lines.div_ceil(times.max(1))
    }

    /// Asks for all lines.
    #[inline(always)]
    fn ask_all<S: Simd>(mut self, s: S) {
        self.ask(s, self.lines);
    }

    /// Asks for so many lines, as long as there are some.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S, lines: usize) {
        let lines = lines.min(self.lines);
        for line in 0..lines {
            s.prefetch(self.next.wrapping_add(line));
        }
        self.next = self.next.wrapping_add(lines);
        self.lines -= lines;
    }
}

/// Runs a body with how many vectors of sums each of `R` rows has at once, as many as fit the registers: a sum alone would wait for
/// itself at each step.
macro_rules! side_by_side {
    ($simd:ident, $rows:ident, $together:ident => $body:expr) => {
        if 4 * $rows <= $simd::SUMS {
            const $together: usize = 4;
            $body
        } else if 2 * $rows <= $simd::SUMS {
            const $together: usize = 2;
            $body
        } else {
            const $together: usize = 1;
            $body
        }
    };
}

/// The scores of a page's positions, for each row.
#[inline(always)]
fn scores_of<S: Simd, E: Element>(
    s: S,
    keys: &[E],
    queries: &[f32],
    rows: usize,
    mut ahead: Ahead,
    out: &mut [[f32; PAGE]; ROWS],
) {
    let head_dim = keys.len() / PAGE;
    in_groups!(S, rows, first, R => {
        let (queries, _) = queries[first * head_dim..][..R * head_dim].as_chunks::<R>();
        if let Some(out) = out[first..].first_chunk_mut::<R>() {
            s.call(Scores::<E, R> { keys, queries, ahead, out });
            ahead = Ahead::NOTHING;
        }
    });
}

struct Scores<'a, E, const R: usize> {
    keys: &'a [E],
    /// For each element of a head, that of each row.
    queries: &'a [[f32; R]],
    ahead: Ahead,
    out: &'a mut [[f32; PAGE]; R],
}

impl<E: Element, const R: usize> Kernel for Scores<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        side_by_side!(S, R, T => self.slices::<S, T>(s));
    }
}

impl<E: Element, const R: usize> Scores<'_, E, R> {
    /// `T` slices of sixteen positions at once.
    #[inline(always)]
    fn slices<S: Simd, const T: usize>(&mut self, s: S) {
        let head_dim = self.queries.len();
        let (keys, _) = self.keys.as_chunks::<LANES>();
        let each = self.ahead.each(SLICES / T * head_dim);
        for first in (0..SLICES).step_by(T) {
            let slices: [_; T] = std::array::from_fn(|slice| &keys[(first + slice) * head_dim..][..head_dim]);
            let mut scores = [[s.splat(0.0); R]; T];
            for (element, queries) in self.queries.iter().enumerate() {
                self.ahead.ask(s, each);
                for (scores, keys) in scores.iter_mut().zip(&slices) {
                    let keys = E::load(s, &keys[element]);
                    for (score, query) in scores.iter_mut().zip(queries) {
                        *score = s.fma(keys, s.splat(*query), *score);
                    }
                }
            }
            for (slice, scores) in (first..).zip(scores) {
                for (out, score) in self.out.iter_mut().zip(scores) {
                    let (slices, _) = out.as_chunks_mut::<LANES>();
                    s.store(score, &mut slices[slice]);
                }
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
    Seen { largest, total, sums }: Seen<'_>,
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
    (rows, seen): (usize, usize),
    mut ahead: Ahead,
    sums: &mut [f32],
) {
    let (values, _) = values.as_chunks::<LANES>();
    let (sums, _) = sums.as_chunks_mut::<LANES>();
    let vectors = width / LANES;
    in_groups!(S, rows, first, R => {
        let sums = &mut sums[first * vectors..][..R * vectors];
        if let Some(weights) = weights[first..].first_chunk::<R>() {
            s.call(AddValues::<E, R> { values, vectors, weights, seen, ahead, sums });
            ahead = Ahead::NOTHING;
        }
    });
}

struct AddValues<'a, E, const R: usize> {
    values: &'a [[E; LANES]],
    /// Vectors of a row of values.
    vectors: usize,
    weights: &'a [[f32; PAGE]; R],
    seen: usize,
    ahead: Ahead,
    sums: &'a mut [[f32; LANES]],
}

impl<E: Element, const R: usize> Kernel for AddValues<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        side_by_side!(S, R, T => {
            let mut first = 0;
            while first < self.vectors {
                if self.vectors - first >= T {
                    self.some::<S, T>(s, first);
                    first += T;
                } else {
                    self.some::<S, 1>(s, first);
                    first += 1;
                }
            }
        });
    }
}

impl<E: Element, const R: usize> AddValues<'_, E, R> {
    /// `T` vectors of each row of values at once.
    #[inline(always)]
    fn some<S: Simd, const T: usize>(&mut self, s: S, first: usize) {
        let vectors = self.vectors;
        let mut own: [[S::F; T]; R] = std::array::from_fn(|row| {
            std::array::from_fn(|vector| s.load(&self.sums[row * vectors + first + vector]))
        });
        let each = self.ahead.each(self.seen);
        let rows = self.values.chunks_exact(vectors).take(self.seen.min(PAGE));
        for (position, values) in rows.enumerate() {
            self.ahead.ask(s, each);
            let Some(values) = values[first..].first_chunk::<T>() else {
                continue;
            };
            for (vector, values) in values.iter().enumerate() {
                let values = E::load(s, values);
                for (own, weights) in own.iter_mut().zip(self.weights) {
                    own[vector] = s.fma(values, s.splat(weights[position]), own[vector]);
                }
            }
        }
        for (row, own) in own.into_iter().enumerate() {
            for (vector, own) in (first..).zip(own) {
                s.store(own, &mut self.sums[row * vectors + vector]);
            }
        }
    }
}
