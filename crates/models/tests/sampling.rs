//! Sampling: every parameter has its effect, and the same seed gives the same.

use mlx_engine_core::GenerateParams;
use mlx_engine_models::{History, Sampler, log_softmax};
use mlx_rs::Array;
use proptest::prelude::*;

fn params() -> GenerateParams {
    GenerateParams::default().with_temperature(0.0)
}

/// The greedy token and the log-probabilities after the parameters have changed the logits.
fn changed(params: &GenerateParams, logits: &[f32], tokens: &[u32], prompt_len: usize) -> Vec<f32> {
    let params = params.clone().with_top_logprobs(20);
    let sampled = Sampler::new(&params, 0).choose(logits, 0, tokens, prompt_len, &mut |_| {});
    let mut logprobs = vec![f32::NAN; logits.len()];
    for (token, logprob) in sampled.top {
        logprobs[token as usize] = logprob;
    }
    logprobs
}

fn assert_close(found: &[f32], expected: &[f32]) {
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
    }
}

const LOGITS: [f32; 4] = [2.0, 1.0, -1.0, 0.5];

#[test]
fn penalties_change_the_logits_of_what_they_look_at() {
    // The prompt is 0 and 2, the answer 1, 1 and 3.
    let tokens = [0, 2, 1, 1, 3];
    let check = |params: GenerateParams, expected: [f32; 4]| {
        assert_close(&changed(&params, &LOGITS, &tokens, 2), &log_softmax(&expected));
    };
    check(params(), LOGITS);
    check(
        params().with_logit_bias([(2, 5.0), (99, 1.0)]),
        [2.0, 1.0, 4.0, 0.5],
    );
    // Positive logits are divided, negative ones multiplied.
    check(params().with_repetition_penalty(2.0), [1.0, 0.5, -2.0, 0.25]);
    check(
        params().with_repetition_penalty(2.0).with_repetition_window(3),
        [2.0, 0.5, -1.0, 0.25],
    );
    check(params().with_presence_penalty(0.5), [2.0, 0.5, -1.0, 0.0]);
    check(params().with_frequency_penalty(0.5), [2.0, 0.0, -1.0, 0.0]);
}

/// How often each token is drawn in many steps.
fn shares(params: &GenerateParams, logits: &[f32]) -> Vec<f64> {
    const DRAWS: u64 = 20_000;
    let sampler = Sampler::new(params, 0);
    let mut counts = vec![0.0; logits.len()];
    for number in 0..DRAWS {
        counts[sampler.choose(logits, number, &[], 0, &mut |_| {}).token as usize] += 1.0 / DRAWS as f64;
    }
    counts
}

#[test]
fn tokens_are_drawn_as_often_as_they_are_likely() {
    let check = |params: GenerateParams, weights: [f64; 4]| {
        // `logprobs` keeps the choice on the host.
        let params = params.with_seed(3).with_logprobs(true);
        let total: f64 = weights.iter().sum();
        for (found, weight) in shares(&params, &LOGITS).iter().zip(weights) {
            assert!(
                (found - weight / total).abs() < 0.015,
                "{found} is not {}",
                weight / total
            );
        }
    };
    let e = LOGITS.map(|logit| f64::from(logit).exp());
    let params = || params().with_temperature(1.0);
    check(params(), e);
    check(params().with_temperature(0.5), e.map(|weight| weight * weight));
    check(params().with_top_k(2), [e[0], e[1], 0.0, 0.0]);
    // The likeliest has 0.61, the second 0.22: 0.7 takes both, 0.6 the first alone.
    check(params().with_top_p(0.7), [e[0], e[1], 0.0, 0.0]);
    check(params().with_top_p(0.6), [1.0, 0.0, 0.0, 0.0]);
    check(params().with_min_p(0.3), [e[0], e[1], 0.0, 0.0]);
}

#[test]
fn the_device_draws_from_the_same_distribution() {
    let sampler = Sampler::new(&params().with_temperature(0.5).with_seed(3), 0);
    assert!(sampler.on_device());
    let logits = Array::from_slice(&LOGITS, &[1, 4]);
    let weights = LOGITS.map(|logit| f64::from(2.0 * logit).exp());
    let mut counts = [0.0; 4];
    for number in 0..4000 {
        let step = sampler
            .start(&logits, number, &History::default())
            .expect("the step starts");
        counts[step
            .read(&sampler, &[], 0, &mut |_| {})
            .expect("the token is read")
            .token as usize] += 1.0 / 4000.0;
    }
    for (found, weight) in counts.iter().zip(weights) {
        let expected = weight / weights.iter().sum::<f64>();
        assert!((found - expected).abs() < 0.03, "{found} is not {expected}");
    }
}

#[test]
fn the_likeliest_are_reported_in_order() {
    let sampled = Sampler::new(&params().with_top_logprobs(2), 0).choose(&LOGITS, 0, &[], 0, &mut |_| {});
    let logprobs = log_softmax(&LOGITS);
    assert_eq!((sampled.token, sampled.logprob), (0, Some(logprobs[0])));
    assert_eq!(sampled.top, [(0, logprobs[0]), (1, logprobs[1])]);
}

proptest! {
    #[test]
    fn the_same_seed_gives_the_same_and_greedy_needs_none(
        logits in prop::collection::vec(-5.0f32..5.0, 2..40),
        seed in any::<u64>(),
        number in 0u64..1000,
    ) {
        let drawn = |params: &GenerateParams, default| Sampler::new(params, default).choose(&logits, number, &[], 0, &mut |_| {}).token;
        let params = params().with_temperature(0.8).with_top_p(0.9);
        prop_assert_eq!(drawn(&params, seed), drawn(&params.clone().with_seed(seed), 1));
        let greedy = params.with_temperature(0.0);
        let likeliest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        prop_assert_eq!(logits[drawn(&greedy, seed) as usize], likeliest);
    }
}
