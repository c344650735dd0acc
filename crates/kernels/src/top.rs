//! The likeliest of the vocabulary.

use std::cmp::Ordering;

use crate::isa::Isa;
use crate::simd::{Kernel, LANES, Simd, dispatch};

/// Numbers of which the largest is found before the next are looked at.
const PIECE: usize = 1024;

/// As [`PIECE`], where several are looked for.
const SMALL_PIECE: usize = 128;

/// The index of the largest, the first of equals; 0 where there is none.
pub fn argmax(isa: Isa, values: &[f32]) -> usize {
    let mut best = (f32::NEG_INFINITY, 0);
    for (index, values) in values.chunks(PIECE).enumerate() {
        let largest = dispatch(isa, Largest { values });
        if largest > best.0 {
            best = (largest, index * PIECE);
        }
    }
    let piece = &values[best.1..];
    best.1 + piece.iter().position(|&value| value == best.0).unwrap_or(0)
}

/// The largest `count` numbers with their indices, largest first and the first of equals first. NaN is not among them.
///
/// A number is looked at by itself only where one of those beside it is among the largest so far, so that it takes little
/// longer than [`argmax`] for a few of many.
pub fn top_k(isa: Isa, values: &[f32], count: usize) -> Vec<(usize, f32)> {
    let count = count.min(values.len());
    if count == 0 {
        return Vec::new();
    }
    // So many more are gathered before those beyond the count are dropped.
    let room = count + count.max(SMALL_PIECE);
    let mut found = Vec::with_capacity(room + SMALL_PIECE);
    let mut least = f32::NEG_INFINITY;
    for (index, piece) in values.chunks(SMALL_PIECE).enumerate() {
        // What equals the least so far comes behind it.
        if found.len() >= count && dispatch(isa, Largest { values: piece }) <= least {
            continue;
        }
        let numbered = (index * SMALL_PIECE..).zip(piece.iter().copied());
        found.extend(numbered.filter(|(_, value)| !value.is_nan()));
        if found.len() >= room {
            found.select_nth_unstable_by(count - 1, largest_first);
            found.truncate(count);
            least = found[count - 1].1;
        }
    }
    if found.len() > count {
        found.select_nth_unstable_by(count - 1, largest_first);
        found.truncate(count);
    }
    found.sort_unstable_by(largest_first);
    found
}

/// The numbers that are at least `least`, with their indices, largest first and the first of equals first.
pub fn at_least(isa: Isa, values: &[f32], least: f32) -> Vec<(usize, f32)> {
    let mut found = Vec::new();
    for (index, piece) in values.chunks(SMALL_PIECE).enumerate() {
        if dispatch(isa, Largest { values: piece }) >= least {
            let numbered = (index * SMALL_PIECE..).zip(piece.iter().copied());
            found.extend(numbered.filter(|(_, value)| *value >= least));
        }
    }
    found.sort_unstable_by(largest_first);
    found
}

fn largest_first(a: &(usize, f32), b: &(usize, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Whether no number is infinite or NaN.
pub fn all_finite(isa: Isa, values: &[f32]) -> bool {
    dispatch(isa, Nothing { values }) == 0.0
}

struct Largest<'a> {
    values: &'a [f32],
}

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (whole, rest) = self.values.as_chunks::<LANES>();
        let lowest = s.splat(f32::NEG_INFINITY);
        let largest = whole
            .iter()
            .fold(lowest, |largest, lanes| s.max(s.load(lanes), largest));
        rest.iter().copied().fold(s.largest(largest), f32::max)
    }
}

/// The sum of all numbers times 0: NaN where one of them is infinite or NaN.
struct Nothing<'a> {
    values: &'a [f32],
}

impl Kernel for Nothing<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (whole, rest) = self.values.as_chunks::<LANES>();
        let zero = s.splat(0.0);
        let sums = whole
            .iter()
            .fold(zero, |sums, lanes| s.fma(s.load(lanes), zero, sums));
        rest.iter().fold(s.sum(sums), |sum, value| sum + value * 0.0)
    }
}
