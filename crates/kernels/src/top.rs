//! The likeliest of the vocabulary.

use crate::isa::Isa;
use crate::simd::{Kernel, LANES, Simd, dispatch};

/// The index of the largest, the first of equals; 0 where there is none.
pub fn argmax(isa: Isa, values: &[f32]) -> usize {
    let largest = dispatch(isa, Largest { values });
    values.iter().position(|&value| value == largest).unwrap_or(0)
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
