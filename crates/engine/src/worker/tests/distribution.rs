//! What is drawn with guesses is distributed as the model says, for a tiny model and its softmax.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;
use crate::mlx::MlxModel;

/// Answers that are drawn, each with a seed of its own.
const ANSWERS: u64 = 3000;

/// Tokens of an answer. The first is chosen with the prompt, the others in steps that verify guesses.
const TOKENS: usize = 3;

/// Fewer answers than this say little of how likely one is.
const FEW: f64 = 8.0;

/// Answers, as far as they are likely, and how likely each is. One that ends in `None` stands for all other tokens.
type Paths = BTreeMap<Vec<Option<u32>>, f64>;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(format!(
        "{}/../models/tests/fixtures/tiny/{name}",
        env!("CARGO_MANIFEST_DIR")
    ))
}

/// A tiny model of 96 tokens.
fn tiny(name: &str) -> MlxModel {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture(name).join(file), folder.path().join(file)).unwrap();
    }
    // The worker has the mock's, whose first tokens these are.
    let tokenizer = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
    let exact = mlx_engine_models::Compute::Exact.into();
    let config = EngineConfig::default();
    let loaded = crate::mlx::load(
        folder.path(),
        None,
        exact,
        &config,
        &AtomicBool::new(false),
        &mut |_| {},
    );
    loaded.unwrap().model
}

/// A worker whose steps take no time, so that all is guessed that may be.
fn bench(speculation: SpeculationConfig) -> Bench<MlxModel> {
    let config = EngineConfig {
        max_batch: 32,
        // The draft model reads the prompts of all at once.
        prefill_chunk: Some(1 << 14),
        speculation,
        ..EngineConfig::default()
    };
    let draft = matches!(config.speculation, SpeculationConfig::Draft(_)).then(|| tiny("llama-3"));
    let mut bench = Bench::of((tiny("llama"), draft), &config);
    know_costs(&mut bench);
    bench
}

fn know_costs(bench: &mut Bench<MlxModel>) {
    (1..=200).for_each(|rows| bench.worker.speculation.costs.note(rows, 0.0));
}

/// The likeliest tokens behind others by their softmax, as the parameters have them chosen.
fn likeliest(bench: &mut Bench<MlxModel>, context: &[u32], params: &GenerateParams) -> Vec<(u32, f64)> {
    let ask = params
        .clone()
        .with_temperature(0.0)
        .with_max_tokens(1)
        .with_top_logprobs(20);
    let asked = bench.submit_tokens("", context.to_vec(), ask).unwrap();
    bench.finish();
    let top = &bench.requests[asked].tokens[0].logprob.as_ref().unwrap().top;
    let top = top.iter().map(|top| (top.token, f64::from(top.logprob)));
    if params.top_k == 0 {
        return top.map(|(token, logprob)| (token, logprob.exp())).collect();
    }
    let top = top.take(params.top_k as usize);
    let weights = top.map(|(token, logprob)| (token, (logprob / f64::from(params.temperature)).exp()));
    let weights: Vec<_> = weights.collect();
    let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
    weights
        .into_iter()
        .map(|(token, weight)| (token, weight / sum))
        .collect()
}

/// Every answer that is likely enough behind a prompt.
fn paths(bench: &mut Bench<MlxModel>, prompt: &[u32], params: &GenerateParams) -> Paths {
    let (mut open, mut paths) = (vec![(Vec::new(), 1.0)], Paths::new());
    while let Some((path, probability)) = open.pop() {
        if path.len() == TOKENS || probability * (ANSWERS as f64) < FEW {
            paths.insert(path.into_iter().map(Some).collect(), probability);
            continue;
        }
        let context = [prompt, &path].concat();
        let mut others = 1.0;
        for (token, likely) in likeliest(bench, &context, params) {
            others -= likely;
            open.push(([&path[..], &[token]].concat(), probability * likely));
        }
        let other = path.into_iter().map(Some).chain([None]).collect();
        paths.insert(other, probability * f64::max(others, 0.0));
    }
    paths
}

/// How many answers there are of each path.
fn count(answers: &[Vec<u32>], paths: &Paths) -> BTreeMap<Vec<Option<u32>>, f64> {
    let mut counts: BTreeMap<_, f64> = BTreeMap::new();
    for answer in answers {
        let known = (0..=TOKENS).find_map(|length| {
            let path: Vec<_> = answer[..length].iter().copied().map(Some).collect();
            let other: Vec<_> = path[..length.saturating_sub(1)]
                .iter()
                .copied()
                .chain([None])
                .collect();
            let leaf = |path: Vec<_>| paths.contains_key(&path).then_some(path);
            let inner = paths
                .range(path.clone()..)
                .next()
                .is_some_and(|(next, _)| next.starts_with(&path));
            leaf(path).or_else(|| if inner { None } else { leaf(other) })
        });
        *counts.entry(known.expect("all answers have a path")).or_default() += 1.0;
    }
    counts
}

/// How many standard deviations Pearson's statistic of answers is above its mean.
fn deviation(answers: &[Vec<u32>], paths: &Paths) -> f64 {
    let counts = count(answers, paths);
    let (mut statistic, mut cells) = (0.0, 0);
    let (mut rest, mut rest_expected) = (0.0, 0.0);
    let mut add = |found: f64, expected: f64| {
        statistic += (found - expected).powi(2) / expected;
        cells += 1;
    };
    for (path, probability) in paths {
        let (found, expected) = (
            counts.get(path).copied().unwrap_or_default(),
            probability * answers.len() as f64,
        );
        if expected < FEW {
            rest += found;
            rest_expected += expected;
        } else {
            add(found, expected);
        }
    }
    if rest_expected >= 1.0 {
        add(rest, rest_expected);
    }
    let freedom = f64::from(cells - 1);
    (statistic - freedom) / (2.0 * freedom).sqrt()
}

/// Tokens of answers with other seeds, and how many were guessed for them and right.
fn draw(bench: &mut Bench<MlxModel>, prompt: &[u32], params: &GenerateParams) -> (Vec<Vec<u32>>, f64, f64) {
    let (mut answers, mut drafted, mut accepted) = (Vec::new(), 0.0, 0.0);
    for seed in 0..ANSWERS {
        let params = params.clone().with_seed(seed).with_max_tokens(TOKENS as u32);
        bench.submit_tokens("", prompt.to_vec(), params).unwrap();
        if bench.requests.len() == 32 || seed + 1 == ANSWERS {
            know_costs(bench);
            bench.finish();
            for sent in bench.requests.drain(..) {
                let report = sent.speculation.unwrap_or_default();
                drafted += f64::from(report.drafted_tokens);
                accepted += f64::from(report.accepted_tokens);
                answers.push(sent.tokens.iter().map(|token| token.id).collect());
            }
        }
    }
    (answers, drafted, accepted)
}

#[test]
fn what_is_drawn_with_guesses_has_the_distribution_of_the_model() {
    // Every token is there, so that there is always something to look up, and what the model says itself, so that it is
    // right at times.
    let all: Vec<u32> = (0..96).map(|at| at * 35 % 96).collect();
    let mut plain = bench(SpeculationConfig::Off);
    let lookup = LookupConfig {
        min_ngram: 1,
        ..LookupConfig::default()
    };
    let guesses = [
        SpeculationConfig::Lookup(lookup),
        SpeculationConfig::Draft(DraftConfig::new("draft")),
    ];
    let drawn = GenerateParams::default().with_temperature(1.0);
    let filtered = drawn.clone().with_temperature(0.7).with_top_k(5);
    for params in [drawn, filtered] {
        let said = params.clone().with_seed(1).with_max_tokens(150);
        let said = plain.submit_tokens("", all.clone(), said).unwrap();
        plain.finish();
        let said = plain.requests[said].tokens.iter().map(|token| token.id);
        let prompt: Vec<u32> = all.iter().copied().chain(said).collect();
        let expected = paths(&mut plain, &prompt, &params);
        // A distribution that is a little flatter is another one.
        let flatter: Paths = expected
            .iter()
            .map(|(path, likely)| (path.clone(), likely.powf(0.8)))
            .collect();
        let sum: f64 = flatter.values().sum();
        let flatter = flatter
            .into_iter()
            .map(|(path, likely)| (path, likely / sum))
            .collect();
        let sum: f64 = expected.values().sum();
        assert!((sum - 1.0).abs() < 1e-4, "{sum}");
        for guesses in &guesses {
            let (answers, drafted, accepted) = draw(&mut bench(guesses.clone()), &prompt, &params);
            let found = deviation(&answers, &expected);
            // Once in ten thousand times, if seeds were others.
            assert!(found < 4.0, "{guesses:?} {found}");
            let other = deviation(&answers, &flatter);
            assert!(other > 10.0, "{guesses:?} {other}");
            assert!(
                drafted > 0.9 * ANSWERS as f64 && accepted > 25.0 && accepted < 0.9 * drafted,
                "{guesses:?} {accepted} of {drafted}"
            );
        }
    }
}

/// The softmax is that of mlx-lm.
#[test]
fn the_likeliest_tokens_are_those_of_another_implementation() {
    let oracle = std::fs::read(fixture("llama").join("oracle.json")).unwrap();
    let oracle: serde_json::Value = serde_json::from_slice(&oracle).unwrap();
    let prompt: Vec<u32> = serde_json::from_value(oracle["prompt"].clone()).unwrap();
    let logits: Vec<Vec<f64>> = serde_json::from_value(oracle["prompt_logits"].clone()).unwrap();
    let mut plain = bench(SpeculationConfig::Off);
    for (length, logits) in (1..=prompt.len()).zip(logits) {
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        let found = likeliest(&mut plain, &prompt[..length], &GenerateParams::default());
        for (token, likely) in found {
            let expected = logits[token as usize].exp() / sum;
            assert!(
                (likely - expected).abs() < 1e-4,
                "{length} {token} {likely} {expected}"
            );
        }
    }
}
