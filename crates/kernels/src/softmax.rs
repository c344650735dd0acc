//! Exponentials over a whole vocabulary, or over a few experts.

use crate::isa::Isa;
use crate::simd::{Kernel, LANES, Simd, dispatch, exp};

/// Numbers whose exponentials are added up as float32; beyond that sums are float64.
const PIECE: usize = 1024;

/// The logarithm of the sum of the exponentials of all numbers, minus infinity where there is none that is larger.
pub fn log_sum_exp(isa: Isa, values: &[f32]) -> f64 {
    let largest = largest(isa, values);
    if largest == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let sum: f64 = sums(isa, values, largest, 1.0).map(f64::from).sum();
    f64::from(largest) + sum.ln()
}

/// Replaces numbers by their softmax.
pub fn softmax(isa: Isa, values: &mut [f32]) {
    let largest = largest(isa, values);
    if largest == f32::NEG_INFINITY {
        return;
    }
    let mut sum = 0.0;
    for piece in values.chunks_mut(PIECE) {
        sum += f64::from(dispatch(
            isa,
            Exponentials {
                values: piece,
                largest,
                factor: 1.0,
            },
        ));
    }
    let factor = sum.recip() as f32;
    for value in values {
        *value *= factor;
    }
}

/// Draws an index from the softmax of `values / temperature`. Minus infinity is never drawn where there is anything else.
///
/// Each index draws a waiting time from the exponential distribution of its probability, and the first one wins, which
/// is the Gumbel-max trick in other words (Maddison, Tarlow and Minka, 2014). The times are made of numbers that `seed`
/// gives to each index, so that two distributions that are nearly the same mostly give the same index.
pub fn draw(isa: Isa, values: &[f32], temperature: f32, seed: u64) -> usize {
    let largest = largest(isa, values);
    let factor = temperature.recip();
    if largest == f32::NEG_INFINITY || !factor.is_finite() {
        return crate::argmax(isa, values);
    }
    let mut race = Race::new(seed);
    let mut weights = [0.0; PIECE];
    for (index, values) in values.chunks(PIECE).enumerate() {
        let weights = &mut weights[..values.len()];
        weights.copy_from_slice(values);
        dispatch(
            isa,
            Exponentials {
                values: weights,
                largest,
                factor,
            },
        );
        for (within, (&weight, &value)) in weights.iter().zip(values).enumerate() {
            if value > f32::NEG_INFINITY {
                race.enter(index * PIECE + within, f64::from(weight));
            }
        }
    }
    race.winner.unwrap_or(0)
}

/// As [`draw`] of values of which all but these are minus infinity: indices, and the values there.
pub fn draw_among(some: &[(usize, f32)], temperature: f32, seed: u64) -> Option<usize> {
    let first = some.first()?.0;
    let largest = some
        .iter()
        .map(|(_, value)| *value)
        .fold(f32::NEG_INFINITY, f32::max);
    let mut race = Race::new(seed);
    for &(index, value) in some {
        race.enter(index, (f64::from(value - largest) / f64::from(temperature)).exp());
    }
    Some(race.winner.unwrap_or(first))
}

/// Who has the shortest waiting time so far.
struct Race {
    seed: u64,
    shortest: f64,
    winner: Option<usize>,
}

impl Race {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            shortest: f64::INFINITY,
            winner: None,
        }
    }

    #[inline(always)]
    fn enter(&mut self, index: usize, weight: f64) {
        // From 0 to 1, both left out; a waiting time is `-ln(1 - gap) / weight`, which is at least `gap / weight`.
        let gap = ((split_mix(self.seed, index as u64) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        if gap < self.shortest * weight {
            let time = -(-gap).ln_1p() / weight;
            if time < self.shortest {
                (self.shortest, self.winner) = (time, Some(index));
            }
        }
    }
}

/// The number of this index that SplitMix64 gives from a seed (Steele, Lea and Flood, 2014).
#[inline(always)]
fn split_mix(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn largest(isa: Isa, values: &[f32]) -> f32 {
    let at = crate::argmax(isa, values);
    values.get(at).copied().unwrap_or(f32::NEG_INFINITY)
}

/// For each piece the sum of `exp((value - largest) * factor)`.
fn sums(isa: Isa, values: &[f32], largest: f32, factor: f32) -> impl Iterator<Item = f32> {
    let pieces = values.chunks(PIECE);
    pieces.map(move |values| {
        dispatch(
            isa,
            SumOfExponentials {
                values,
                largest,
                factor,
            },
        )
    })
}

struct SumOfExponentials<'a> {
    values: &'a [f32],
    largest: f32,
    factor: f32,
}

impl Kernel for SumOfExponentials<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (shift, factor) = (s.splat(self.largest), s.splat(self.factor));
        let (whole, rest) = self.values.as_chunks::<LANES>();
        let mut sum = s.splat(0.0);
        for lanes in whole {
            sum = s.add(sum, exponentials(s, s.load(lanes), shift, factor));
        }
        s.sum(sum) + of_rest(s, rest, shift, factor).iter().sum::<f32>()
    }
}

/// Replaces numbers by `exp((value - largest) * factor)` and gives the sum.
struct Exponentials<'a> {
    values: &'a mut [f32],
    largest: f32,
    factor: f32,
}

impl Kernel for Exponentials<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (shift, factor) = (s.splat(self.largest), s.splat(self.factor));
        let (whole, rest) = self.values.as_chunks_mut::<LANES>();
        let mut sum = s.splat(0.0);
        for lanes in whole {
            let weights = exponentials(s, s.load(lanes), shift, factor);
            s.store(weights, lanes);
            sum = s.add(sum, weights);
        }
        let weights = of_rest(s, rest, shift, factor);
        rest.copy_from_slice(&weights[..rest.len()]);
        s.sum(sum) + weights.iter().sum::<f32>()
    }
}

/// `exp((x - shift) * factor)`.
#[inline(always)]
fn exponentials<S: Simd>(s: S, x: S::F, shift: S::F, factor: S::F) -> S::F {
    exp(s, s.mul(s.sub(x, shift), factor))
}

/// As [`exponentials`], of fewer than sixteen numbers, with zeros behind.
#[inline(always)]
fn of_rest<S: Simd>(s: S, rest: &[f32], shift: S::F, factor: S::F) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = *value;
    }
    let weights = exponentials(s, s.load(&lanes), shift, factor);
    s.store(weights, &mut lanes);
    for lane in lanes.iter_mut().skip(rest.len()) {
        *lane = 0.0;
    }
    lanes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_split_mix() {
        // From Vigna's implementation with the state 1234567, as published with many others.
        let expected = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        for (index, expected) in expected.into_iter().enumerate() {
            assert_eq!(split_mix(1_234_567, index as u64), expected);
        }
    }
}
