//! Gemma 3 270M from its GGUF file, against mlx-lm in float32 on the dequantized weights: a window of 512 and a text of
//! 700 tokens. Set-up brings the file where it is asked to (`cargo xtask setup --gemma`), and then these tests are run.

use mlx_engine_models::{Compute, Decoder, Source};
use serde_json::Value;

fn load(compute: Compute) -> Decoder {
    let path = std::env::var_os("MLX_ENGINE_TEST_GEMMA");
    let path = path.expect("MLX_ENGINE_TEST_GEMMA names Gemma's file; run the tests by `cargo xtask test`");
    let source = Source::open(path.as_ref()).expect("the model opens");
    Decoder::load(&source, compute, &mut |_| Ok(())).expect("the model loads")
}

fn oracle() -> Value {
    serde_json::from_str(include_str!("fixtures/gemma3.json")).expect("the fixture is JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().expect("a list").iter();
    ids.map(|id| u32::try_from(id.as_u64().expect("a number")).expect("an id"))
        .collect()
}

fn logprobs(decoder: &Decoder, oracle: &Value) -> Vec<(f64, f64)> {
    let ids = ids(&oracle["score"]["ids"]);
    let mut sequence = decoder.sequence();
    let mut found = Vec::new();
    for (chunk, at) in ids.chunks(100).zip((0..).step_by(100)) {
        let next = &ids[at + 1..(at + 101).min(ids.len())];
        found.extend(
            decoder
                .score(chunk, next, &mut sequence)
                .expect("the text is scored"),
        );
    }
    let expected = oracle["score"]["logprobs"].as_array().expect("a list").iter();
    let expected = expected.map(|value| value.as_f64().expect("a number"));
    found.into_iter().map(f64::from).zip(expected).collect()
}

#[test]
fn log_probabilities_beyond_the_window_are_those_of_mlx_lm() {
    let all = logprobs(&load(Compute::Exact), &oracle());
    assert_eq!(all.len(), 699);
    for (token, (found, expected)) in all.into_iter().enumerate() {
        assert!(
            (found - expected).abs() < 5e-3,
            "token {token}: {found} is not {expected}"
        );
    }
}

#[test]
fn greedy_tokens_are_those_of_mlx_lm() {
    let decoder = load(Compute::Exact);
    for prompt in oracle()["prompts"].as_array().expect("prompts") {
        let (tokens, expected) = (ids(&prompt["ids"]), ids(&prompt["greedy"]));
        // Each token behind those that mlx-lm has chosen, in one go.
        let fed = [&tokens[..], &expected[..expected.len() - 1]].concat();
        let logits = decoder.forward_all(&fed, &mut decoder.sequence());
        let logits = logits.expect("the tokens run");
        let rows = logits.as_slice::<f32>().chunks_exact(decoder.spec().vocab_size);
        for (row, expected) in rows.skip(tokens.len() - 1).zip(expected) {
            let chosen = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            assert_eq!(chosen, Some(expected as usize), "{}", prompt["text"]);
        }
    }
}

#[test]
fn integers_change_the_perplexity_by_less_than_a_hundredth() {
    let all = logprobs(&load(Compute::Fastest), &oracle());
    let count = all.len() as f64;
    let found = (-all.iter().map(|(found, _)| found).sum::<f64>() / count).exp();
    let expected = (-all.iter().map(|(_, expected)| expected).sum::<f64>() / count).exp();
    assert!((found / expected - 1.0).abs() < 0.01, "{found} {expected}");
}
