//! The likeliest of the vocabulary.

use crate::isa::Isa;
use crate::simd::{Kernel, LANES, Simd, dispatch};

/// Numbers of which the largest is found before the next are looked at.
const PIECE: usize = 1024;

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
