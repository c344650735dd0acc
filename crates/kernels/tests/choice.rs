//! Choosing from a vocabulary, against float64 and a sort of everything.

use mlx_engine_kernels::{Isa, argmax, at_least, draw, draw_among, log_sum_exp, softmax, top_k};
use proptest::prelude::*;

/// Everything, largest first and the first of equals first.
fn sorted(values: &[f32]) -> Vec<(usize, f32)> {
    let mut all: Vec<_> = values.iter().copied().enumerate().collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all
}

fn probabilities(values: &[f32], temperature: f32) -> Vec<f64> {
    let scaled: Vec<f64> = values
        .iter()
        .map(|&x| f64::from(x) / f64::from(temperature))
        .collect();
    let largest = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scaled.iter().map(|x| (x - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

/// Vocabularies of several pieces, with equal numbers and some that may not come.
fn vocabulary() -> impl Strategy<Value = Vec<f32>> {
    let number = prop_oneof![
        8 => -20.0_f32..20.0,
        4 => (-8_i8..8).prop_map(f32::from),
        1 => Just(f32::NEG_INFINITY),
    ];
    prop::collection::vec(number, 1..3000)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_largest_are_those_of_a_sort(values in vocabulary(), count in 0..200_usize, least in -20.0_f32..20.0) {
        let all = sorted(&values);
        let of_all: Vec<_> = all.iter().copied().filter(|(_, value)| *value >= least).collect();
        for isa in Isa::available() {
            prop_assert_eq!(&top_k(isa, &values, count), &all[..count.min(all.len())], "{}", isa);
            prop_assert_eq!(&at_least(isa, &values, least), &of_all, "{}", isa);
            prop_assert_eq!(argmax(isa, &values), all[0].0, "{}", isa);
        }
    }

    #[test]
    fn sums_and_softmax_are_those_of_float64(values in vocabulary()) {
        let largest = sorted(&values)[0].1;
        for isa in Isa::available() {
            let found = log_sum_exp(isa, &values);
            if largest == f32::NEG_INFINITY {
                prop_assert_eq!(found, f64::NEG_INFINITY);
                continue;
            }
            let sum: f64 = values.iter().map(|&x| (f64::from(x) - f64::from(largest)).exp()).sum();
            let expected = f64::from(largest) + sum.ln();
            prop_assert!((found - expected).abs() < 1e-5, "{}: {} is not {}", isa, found, expected);
            let mut out = values.clone();
            softmax(isa, &mut out);
            for (found, expected) in out.iter().zip(probabilities(&values, 1.0)) {
                prop_assert!((f64::from(*found) - expected).abs() < 1e-6 * expected.max(1e-3), "{}: {} is not {}", isa, found, expected);
            }
        }
    }

    #[test]
    fn what_is_drawn_is_the_same_everywhere_and_may_come(values in vocabulary(), temperature in 0.05_f32..3.0, seed in any::<u64>()) {
        let drawn = draw(Isa::fastest(), &values, temperature, seed);
        let possible: Vec<_> = sorted(&values).into_iter().filter(|(_, value)| *value > f32::NEG_INFINITY).collect();
        if !possible.is_empty() {
            prop_assert!(values[drawn] > f32::NEG_INFINITY, "{} may not come", drawn);
            // The same race in float64 and among those alone that take part.
            prop_assert_eq!(draw_among(&possible, temperature, seed), Some(drawn));
        }
        for isa in Isa::available() {
            prop_assert_eq!(draw(isa, &values, temperature, seed), drawn, "{}", isa);
        }
    }
}

/// Pearson's statistic of draws against probabilities; indices that come less than five times together.
fn chi_square(counts: &[u32], probabilities: &[f64]) -> (f64, f64) {
    let draws: u32 = counts.iter().sum();
    let (mut statistic, mut cells, mut rare) = (0.0, 0.0, (0.0, 0.0));
    for (&count, probability) in counts.iter().zip(probabilities) {
        let expected = f64::from(draws) * probability;
        if expected < 5.0 {
            rare = (rare.0 + f64::from(count), rare.1 + expected);
        } else {
            statistic += (f64::from(count) - expected).powi(2) / expected;
            cells += 1.0;
        }
    }
    if rare.1 > 0.0 {
        statistic += (rare.0 - rare.1).powi(2) / rare.1.max(1.0);
        cells += 1.0;
    }
    (statistic, cells - 1.0)
}

#[test]
fn indices_are_drawn_as_often_as_they_are_likely() {
    // Twelve that differ, at the edges of pieces too, and one that may not come.
    let mut values = vec![-30.0; 1100];
    for (number, index) in [0, 1, 15, 16, 17, 500, 1022, 1023, 1024, 1025, 1098, 1099]
        .into_iter()
        .enumerate()
    {
        values[index] = number as f32 / 3.0;
    }
    values[1024] = f32::NEG_INFINITY;
    for temperature in [0.5, 1.0, 2.0] {
        let mut counts = vec![0; values.len()];
        for seed in 0..50_000_u64 {
            counts[draw(
                Isa::fastest(),
                &values,
                temperature,
                seed.wrapping_mul(0x9e6c_63d0_876a_68ee),
            )] += 1;
        }
        assert_eq!(counts[1024], 0);
        let (statistic, freedom) = chi_square(&counts, &probabilities(&values, temperature));
        // The mean and five standard deviations.
        assert!(
            statistic < freedom + 5.0 * (2.0 * freedom).sqrt(),
            "{statistic} of {freedom}"
        );
    }
}

#[test]
fn distributions_that_are_nearly_the_same_give_the_same() {
    let values: Vec<f32> = (0..2000_u32)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as f32 / 32.0)
        .collect();
    let other: Vec<f32> = values
        .iter()
        .enumerate()
        .map(|(index, value)| value + 0.02 * ((index % 7) as f32 - 3.0))
        .collect();
    let same = (0..1000)
        .filter(|&seed| draw(Isa::fastest(), &values, 1.0, seed) == draw(Isa::fastest(), &other, 1.0, seed));
    // The distributions share 98% of their probability; at least `(1 - d) / (1 + d)` are the same, 96%.
    assert!(same.count() > 930);
}

#[test]
fn nothing_and_nonsense_are_answered() {
    for isa in Isa::available() {
        assert_eq!(top_k(isa, &[], 3), []);
        assert_eq!(top_k(isa, &[f32::NAN, 1.0], 2), [(1, 1.0)]);
        assert_eq!(at_least(isa, &[f32::NAN, 1.0], 0.0), [(1, 1.0)]);
        assert_eq!(log_sum_exp(isa, &[]), f64::NEG_INFINITY);
        assert_eq!(draw(isa, &[], 1.0, 7), 0);
        assert_eq!(draw(isa, &[f32::NEG_INFINITY; 3], 1.0, 7), 0);
        assert_eq!(draw(isa, &[0.0, 3.0, 1.0], 0.0, 7), 1);
        assert_eq!(draw_among(&[], 1.0, 7), None);
        assert_eq!(draw_among(&[(5, f32::NEG_INFINITY)], 1.0, 7), Some(5));
    }
}
