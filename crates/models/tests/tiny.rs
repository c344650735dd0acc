//! Tiny checkpoints of each family, against mlx-lm in float32.

use std::path::{Path, PathBuf};

use mlx_engine_models::{Compute, Decoder, Source};
use serde_json::Value;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/tiny")
        .join(name)
}

fn load(name: &str, compute: Compute) -> Decoder {
    load_path(&folder(name), compute)
}

fn load_path(path: &Path, compute: Compute) -> Decoder {
    let source = Source::open(path).expect("the fixture opens");
    Decoder::load(&source, compute, &mut |_| Ok(())).expect("the fixture loads")
}

fn numbers(value: &Value) -> Vec<f32> {
    let numbers = value.as_array().expect("a list").iter();
    numbers
        .map(|number| number.as_f64().expect("a number") as f32)
        .collect()
}

fn tokens(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|number| number as u32).collect()
}

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= 1e-4,
            "{what}[{i}]: {found} is not {expected}"
        );
    }
}

fn check(name: &str) {
    for compute in [Compute::Exact, Compute::Mlx] {
        check_decoder(name, &load(name, compute));
    }
}

/// The same weights, each expert's by themselves.
fn check_apart(name: &str) {
    for compute in [Compute::Exact, Compute::Mlx] {
        check_decoder(name, &load(&format!("{name}-apart"), compute));
    }
}

/// A GGUF file of the same weights.
fn check_gguf(name: &str) {
    for compute in [Compute::Exact, Compute::Mlx] {
        check_decoder(name, &load_path(&folder(name).join("model.gguf"), compute));
    }
}

/// The logits of the prompt at once, in two chunks, and of single steps with the cache.
fn check_decoder(name: &str, decoder: &Decoder) {
    let oracle = std::fs::read(folder(name).join("oracle.json")).expect("the fixture is there");
    let oracle: Value = serde_json::from_slice(&oracle).expect("the fixture is JSON");
    let prompt = tokens(&oracle["prompt"]);
    let expected: Vec<Vec<f32>> = oracle["prompt_logits"]
        .as_array()
        .expect("rows")
        .iter()
        .map(numbers)
        .collect();

    let mut sequence = decoder.sequence();
    let all = decoder
        .forward_all(&prompt, &mut sequence)
        .expect("the prompt runs");
    assert_close(name, all.as_slice::<f32>(), &expected.concat());

    let mut chunked = decoder.sequence();
    decoder
        .prefill(&prompt[..4], &mut chunked)
        .expect("the first chunk runs");
    let last = decoder
        .forward(&prompt[4..], &mut chunked)
        .expect("the second chunk runs");
    assert_close(name, last.as_slice::<f32>(), expected.last().expect("rows"));

    for sequence in [&mut sequence, &mut chunked] {
        let steps = tokens(&oracle["steps"])
            .into_iter()
            .zip(oracle["step_logits"].as_array().expect("rows"));
        for (token, expected) in steps {
            let logits = decoder.forward(&[token], sequence).expect("a step runs");
            assert_close(name, logits.as_slice::<f32>(), &numbers(expected));
        }
    }
    // What was fed is forgotten and fed again.
    sequence.truncate(4);
    let last = decoder
        .forward(&prompt[4..], &mut sequence)
        .expect("the rest runs");
    assert_close(name, last.as_slice::<f32>(), expected.last().expect("rows"));
}

#[test]
fn llama() {
    check("llama");
}

#[test]
fn llama_3_with_its_rope_scaling_and_tied_embeddings() {
    check("llama-3");
}

#[test]
fn llama_with_linear_rope_scaling_and_biases() {
    check("llama-linear");
}

#[test]
fn mistral() {
    check("mistral");
}

#[test]
fn qwen2() {
    check("qwen2");
}

#[test]
fn qwen3() {
    check("qwen3");
}

#[test]
fn llama_with_layers_that_see_a_window() {
    check("llama-sliding");
}

#[test]
fn mixtral() {
    check("mixtral");
    check_apart("mixtral");
}

#[test]
fn olmoe() {
    check("olmoe");
}

#[test]
fn qwen2_moe_with_a_shared_expert() {
    check("qwen2-moe");
}

#[test]
fn qwen3_moe() {
    check("qwen3-moe");
    check_apart("qwen3-moe");
    check_gguf("qwen3-moe");
}

#[test]
fn qwen3_moe_in_4_bits_with_a_layer_without_experts() {
    check("qwen3-moe-4bit");
    check_apart("qwen3-moe-4bit");
}

/// More rows than make a strip, so that each expert has several, get what each gets alone, with integers too.
#[test]
fn rows_of_experts_get_the_same_together_and_alone() {
    let tokens: Vec<u32> = (0..70).map(|i| (i * i + 3 * i) % 96).collect();
    for compute in [Compute::Fastest, Compute::Exact] {
        for name in ["qwen3-moe-4bit", "qwen2-moe"] {
            let decoder = load(name, compute);
            let all = decoder
                .forward_all(&tokens, &mut decoder.sequence())
                .expect("the prompt runs");
            let mut sequence = decoder.sequence();
            for (&token, together) in tokens.iter().zip(all.as_slice::<f32>().chunks_exact(96)) {
                let alone = decoder.forward(&[token], &mut sequence).expect("a step runs");
                assert_eq!(alone.as_slice::<f32>(), together, "{name} {compute}");
            }
        }
    }
}

/// In MLX's graph many rows are put in the order of their experts, and few are not.
#[test]
fn many_rows_of_experts_are_sorted_and_put_back() {
    let tokens: Vec<u32> = (0..70).map(|i| (i * i + 3 * i) % 96).collect();
    for name in ["qwen3-moe-4bit", "olmoe"] {
        let logits = [Compute::Exact, Compute::Mlx].map(|compute| {
            let decoder = load(name, compute);
            let logits = decoder.forward_all(&tokens, &mut decoder.sequence());
            logits.expect("the prompt runs")
        });
        assert_close(name, logits[1].as_slice::<f32>(), logits[0].as_slice::<f32>());
    }
}

#[test]
fn granite_with_its_factors() {
    check("granite");
}

#[test]
fn olmo2_with_its_norms_behind() {
    check("olmo2");
}

#[test]
fn seed_oss_with_both_biases() {
    check("seed-oss");
}

#[test]
fn smollm3_with_layers_that_know_no_positions() {
    check("smollm3");
    check("smollm3-list");
}

#[test]
fn gemma2_with_its_soft_caps() {
    check("gemma2");
}

#[test]
fn gemma3_beyond_its_window() {
    check("gemma3-text");
}

#[test]
fn gemma3_as_a_part_of_a_model_that_sees() {
    check("gemma3");
}

#[test]
fn four_bits() {
    check("llama-4bit");
}

#[test]
fn layers_with_bits_and_groups_of_their_own() {
    check("qwen3-mixed");
}

#[test]
fn gguf_files_of_each_architecture() {
    for name in ["llama", "qwen2", "qwen3", "gemma3-text"] {
        check_gguf(name);
    }
}

#[test]
fn a_gguf_file_whose_matrices_have_each_another_type() {
    check_gguf("gguf-mixed");
}

#[test]
fn every_supported_type_has_a_fixture() {
    let fixtures = std::fs::read_dir(folder("")).expect("the fixtures are there");
    let mut types: Vec<String> = fixtures
        .map(|entry| entry.expect("an entry").path().join("config.json"))
        .filter(|config| config.is_file())
        .map(|config| {
            let config: Value =
                serde_json::from_slice(&std::fs::read(config).expect("a file")).expect("JSON");
            config["model_type"].as_str().expect("a string").to_owned()
        })
        .collect();
    types.sort();
    types.dedup();
    assert_eq!(types, mlx_engine_models::supported_model_types());
}

#[test]
fn a_cache_grows_by_blocks_and_stays_right() {
    // 512 tokens of context are two blocks of MLX's cache and eight pages of ours: the next one is reached in steps, and
    // in one chunk. MLX keeps 2 layers of keys and values, 2 heads of 8, 512 rows of float32; our pages keep 320 rows,
    // whose values are 16 wide.
    for (compute, per_token, bytes) in [
        (Compute::Mlx, 2 * 2 * 2 * 8 * 4, 2 * 2 * 2 * 8 * 512 * 4),
        (Compute::Exact, 2 * 2 * (8 + 16) * 4, 2 * 2 * (8 + 16) * 320 * 4),
    ] {
        let decoder = load("llama", compute);
        let ids: Vec<u32> = (0..300).map(|i| i * 7 % 96).collect();
        let mut at_once = decoder.sequence();
        let whole = decoder.forward(&ids, &mut at_once).expect("the prompt runs");
        let mut in_steps = decoder.sequence();
        decoder.prefill(&ids[..250], &mut in_steps).expect("a chunk runs");
        let mut last = None;
        for &id in &ids[250..] {
            last = Some(decoder.forward(&[id], &mut in_steps).expect("a step runs"));
        }
        let last = last.expect("steps");
        assert_close("growth", last.as_slice::<f32>(), whole.as_slice::<f32>());
        assert_eq!((in_steps.len(), at_once.len()), (300, 300));
        assert_eq!(in_steps.bytes(), bytes, "{compute}");
        assert_eq!(decoder.kv_bytes_per_token(), per_token, "{compute}");
    }
}

#[test]
fn what_cannot_be_fed_is_said() {
    let decoder = load("llama", Compute::Fastest);
    let mut sequence = decoder.sequence();
    let mut error = |tokens: &[u32]| {
        decoder
            .forward(tokens, &mut sequence)
            .expect_err("it is refused")
            .to_string()
    };
    assert_eq!(error(&[]), "no tokens were given");
    assert_eq!(error(&[1, 96]), "token 96 is not in the vocabulary of 96");
    assert_eq!(error(&[1; 513]), "513 tokens do not fit the context of 512");
    assert!(sequence.is_empty());
}
