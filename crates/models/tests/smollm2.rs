//! SmolLM2-135M-Instruct, against mlx-lm in float32, from the GGUF file and from the same weights as an MLX folder.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mlx_engine_checkpoint::{AffineTensor, GgufFile};
use mlx_engine_core::{GenerateParams, KvConfig};
use mlx_engine_models::{Compute, Decoder, History, NextToken, Sampler, Source};
use safetensors::tensor::{Dtype, View};
use serde_json::{Value, json};

fn gguf_path() -> PathBuf {
    let path = std::env::var_os("MLX_ENGINE_TEST_MODEL");
    path.expect("MLX_ENGINE_TEST_MODEL names the test model; run the tests by `cargo xtask test`")
        .into()
}

fn load(path: &Path, compute: Compute) -> Decoder {
    let source = Source::open(path).expect("the model opens");
    Decoder::load(&source, compute, &mut |_| Ok(())).expect("the model loads")
}

fn oracle() -> Value {
    serde_json::from_str(include_str!("fixtures/smollm2.json")).expect("the fixture is JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().expect("a list").iter();
    ids.map(|id| u32::try_from(id.as_u64().expect("a number")).expect("an id"))
        .collect()
}

/// Greedy tokens with the look-ahead loop: step n+1 is built before token n is read.
fn greedy(decoder: &Decoder, prompt: &[u32], count: usize) -> Vec<u32> {
    let sampler = Sampler::new(&GenerateParams::default().with_temperature(0.0), 0);
    let mut sequence = decoder.sequence();
    let logits = decoder.forward(prompt, &mut sequence).expect("the prompt runs");
    let mut step = sampler
        .start(&logits, 0, &History::default())
        .expect("the step starts");
    let mut tokens = prompt.to_vec();
    for number in 1..=count as u64 {
        let unread = step.unread().expect("greedy tokens are chosen on the device");
        let logits = decoder
            .forward_unread(unread, &mut sequence)
            .expect("the step runs");
        let next = sampler
            .start(&logits, number, &History::default())
            .expect("the step starts");
        tokens.push(
            step.read(&sampler, &tokens, prompt.len(), &mut |_| {})
                .expect("the token is read")
                .token,
        );
        step = next;
    }
    tokens.split_off(prompt.len())
}

fn check_greedy(decoder: &Decoder, prompts: &[Value]) {
    for prompt in prompts {
        let found = greedy(decoder, &ids(&prompt["ids"]), 32);
        assert_eq!(found, ids(&prompt["greedy"]), "{}", prompt["text"]);
    }
}

fn logprobs(decoder: &Decoder, ids: &[u32]) -> Vec<f32> {
    let mut sequence = decoder.sequence();
    let mut found = Vec::new();
    for (chunk, at) in ids.chunks(100).zip((0..).step_by(100)) {
        let next = &ids[at + 1..(at + 101).min(ids.len())];
        let scored = decoder.score(chunk, next, &mut sequence);
        found.extend(scored.expect("the text is scored"));
    }
    assert_eq!(found.len(), ids.len() - 1);
    found
}

fn expected_logprobs(oracle: &Value) -> Vec<f64> {
    let expected = oracle["score"]["logprobs"].as_array().expect("a list").iter();
    expected.map(|value| value.as_f64().expect("a number")).collect()
}

fn check_score(decoder: &Decoder, tokens: usize) {
    let oracle = oracle();
    let found = logprobs(decoder, &ids(&oracle["score"]["ids"])[..tokens]);
    for (i, (found, expected)) in found.iter().zip(expected_logprobs(&oracle)).enumerate() {
        assert!(
            (f64::from(*found) - expected).abs() < 1e-3,
            "token {}: {found} is not {expected}",
            i + 1
        );
    }
}

#[test]
fn greedy_tokens_are_those_of_mlx_lm() {
    check_greedy(
        &load(&gguf_path(), Compute::Exact),
        oracle()["prompts"].as_array().expect("prompts"),
    );
}

#[test]
fn log_probabilities_of_500_tokens_are_those_of_mlx_lm() {
    check_score(&load(&gguf_path(), Compute::Exact), 500);
}

#[test]
fn eight_bits_change_the_perplexity_by_less_than_half_a_percent() {
    let oracle = oracle();
    let found = logprobs(
        &load(&gguf_path(), Compute::Fastest),
        &ids(&oracle["score"]["ids"]),
    );
    let expected = expected_logprobs(&oracle);
    let perplexity = |logprobs: &[f64]| (-logprobs.iter().sum::<f64>() / logprobs.len() as f64).exp();
    let found: Vec<f64> = found.into_iter().map(f64::from).collect();
    let ratio = perplexity(&found) / perplexity(&expected);
    assert!((ratio - 1.0).abs() < 0.005, "{ratio}");
}

#[test]
fn the_perplexity_with_integers_for_keys_and_values_is_that_of_mlx_lm() {
    let oracle = oracle();
    for bits in [8, 4] {
        let config = KvConfig {
            bits: Some(bits),
            ..KvConfig::default()
        };
        let decoder = load(&gguf_path(), Compute::Exact);
        let decoder = decoder.with_kv(&config).expect("whole groups");
        let found = logprobs(&decoder, &ids(&oracle["score"]["ids"]));
        let mean = found.iter().map(|&logprob| f64::from(logprob)).sum::<f64>() / found.len() as f64;
        let found = (-mean).exp();
        let expected = oracle["kv_perplexity"][bits.to_string()]
            .as_f64()
            .expect("a number");
        // Where a float is a little other, an integer may be the next one, which is far away in 4 bits.
        let slack = if bits == 8 { 0.001 } else { 0.05 };
        assert!(
            (found / expected - 1.0).abs() < slack,
            "{bits} bits: {found}, {expected}"
        );
    }
}

#[test]
fn eight_bits_choose_nearly_always_the_token_of_mlx_lm() {
    let decoder = load(&gguf_path(), Compute::Fastest);
    let oracle = oracle();
    let (mut same, mut all) = (0, 0);
    for prompt in oracle["prompts"].as_array().expect("prompts") {
        // Each token behind those that mlx-lm has chosen: one that differs does not change the next.
        let (prompt, expected) = (ids(&prompt["ids"]), ids(&prompt["greedy"]));
        let tokens = [&prompt[..], &expected[..expected.len() - 1]].concat();
        let logits = decoder.forward_all(&tokens, &mut decoder.sequence());
        let logits = logits.expect("the tokens run");
        let rows = logits.as_slice::<f32>().chunks_exact(decoder.spec().vocab_size);
        for (row, expected) in rows.skip(prompt.len() - 1).zip(expected) {
            let chosen = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            same += usize::from(chosen == Some(expected as usize));
            all += 1;
        }
    }
    assert!(same * 100 >= all * 98, "{same} of {all}");
}

#[test]
fn sequences_that_are_fed_together_get_the_bits_that_they_get_alone() {
    let oracle = oracle();
    let mut prompts: Vec<Vec<u32>> = oracle["prompts"]
        .as_array()
        .expect("prompts")
        .iter()
        .map(|p| ids(&p["ids"]))
        .collect();
    // One is long, so that its positions are split.
    prompts.insert(1, ids(&oracle["score"]["ids"]));
    for compute in [Compute::Fastest, Compute::Exact] {
        let decoder = load(&gguf_path(), compute);
        for count in [2, 5, prompts.len()] {
            let mut sequences = Vec::new();
            let mut expected = Vec::new();
            for prompt in &prompts[..count] {
                let (last, before) = prompt.split_last().expect("a prompt");
                let mut alone = decoder.sequence();
                let logits = decoder.forward(prompt, &mut alone).expect("the prompt runs");
                expected.push(logits.as_slice::<f32>().to_vec());
                let mut sequence = decoder.sequence();
                if !before.is_empty() {
                    decoder.forward(before, &mut sequence).expect("the prompt runs");
                }
                sequences.push((sequence, NextToken::Read(*last)));
            }
            let tokens: Vec<NextToken> = sequences.iter().map(|(_, token)| token.clone()).collect();
            let mut fed: Vec<_> = sequences.iter_mut().map(|(sequence, _)| sequence).collect();
            let found = decoder.forward_batch(&tokens, &mut fed).expect("a step runs");
            for (row, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let found = found.contiguous().expect("a row");
                assert_eq!(
                    found.as_slice::<f32>(),
                    expected,
                    "{compute}, row {row} of {count}"
                );
            }
            let lengths: Vec<usize> = sequences.iter().map(|(sequence, _)| sequence.len()).collect();
            let prompts: Vec<usize> = prompts[..count].iter().map(Vec::len).collect();
            assert_eq!(lengths, prompts);
        }
    }
}

#[test]
fn the_graph_of_mlx_gives_the_same() {
    let decoder = load(&gguf_path(), Compute::Mlx);
    check_score(&decoder, 60);
    check_greedy(&decoder, &oracle()["prompts"].as_array().expect("prompts")[..1]);
}

#[test]
fn a_folder_of_the_same_weights_gives_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    write_folder(&gguf_path(), folder.path());
    let decoder = load(folder.path(), Compute::Exact);
    check_score(&decoder, 500);
    check_greedy(&decoder, &oracle()["prompts"].as_array().expect("prompts")[4..6]);
}

/// A tensor to write.
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl View for &Tensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

fn floats(values: &[f32], shape: &[usize]) -> Tensor {
    let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor {
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        data,
    }
}

/// The row of a Hugging Face matrix that each row of a GGUF matrix is: the converter interleaves each head's halves.
fn hugging_face_row(row: usize, rows: usize, heads: usize) -> usize {
    let width = rows / heads;
    let (head, within) = (row / width, row % width);
    head * width + within / 2 + within % 2 * (width / 2)
}

/// Puts the rows of a row-major tensor into another order.
fn permute<T: Copy + Default>(values: &[T], rows: usize, heads: usize) -> Vec<T> {
    let columns = values.len() / rows;
    let mut out = vec![T::default(); values.len()];
    for (row, source) in values.chunks_exact(columns).enumerate() {
        let to = hugging_face_row(row, rows, heads);
        out[to * columns..(to + 1) * columns].copy_from_slice(source);
    }
    out
}

/// Writes the GGUF file's model in MLX's layout: quantized tensors stay quantized, with bits of their own.
fn write_folder(gguf: &Path, folder: &Path) {
    let file = GgufFile::open(gguf).expect("the file opens");
    let metadata = file.metadata();
    let size = |key: &str| metadata.u64(&format!("llama.{key}")).expect("the key is there");
    let number = |key: &str| {
        metadata
            .optional_f64(&format!("llama.{key}"))
            .expect("a number")
            .expect("the key")
    };
    let (heads, kv_heads) = (size("attention.head_count"), size("attention.head_count_kv"));
    let names = BTreeMap::from([
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ]);
    let mut tensors = BTreeMap::new();
    let mut quantization = json!({"group_size": 32, "bits": 4});
    for tensor in file.tensors() {
        let stem = tensor
            .name
            .strip_suffix(".weight")
            .expect("every tensor is a weight");
        let part = stem.rsplit('.').next().expect("a part");
        let mut name = names[part].to_owned();
        if let Some(rest) = stem.strip_prefix("blk.") {
            let layer = rest.split('.').next().expect("a layer");
            name = format!("model.layers.{layer}.{name}");
        }
        let permuted = match part {
            "attn_q" => Some(heads as usize),
            "attn_k" => Some(kv_heads as usize),
            _ => None,
        };
        let (rows, columns) = (tensor.shape[0], tensor.shape.get(1).copied().unwrap_or(1));
        let affine =
            AffineTensor::from_ggml(tensor.ggml_type, tensor.data, rows, columns).expect("whole blocks");
        let Some(mut affine) = affine else {
            let values = tensor.dequantize().expect("whole blocks");
            tensors.insert(format!("{name}.weight"), floats(&values, tensor.shape));
            continue;
        };
        if let Some(heads) = permuted {
            affine.packed = permute(&affine.packed, rows, heads);
            affine.scales = permute(&affine.scales, rows, heads);
            affine.biases = permute(&affine.biases, rows, heads);
        }
        let words = affine.packed.iter().flat_map(|word| word.to_le_bytes()).collect();
        let shape = vec![rows, columns * affine.bits as usize / 32];
        tensors.insert(
            format!("{name}.weight"),
            Tensor {
                dtype: Dtype::U32,
                shape,
                data: words,
            },
        );
        tensors.insert(
            format!("{name}.scales"),
            floats(&affine.scales, &[rows, columns / 32]),
        );
        tensors.insert(
            format!("{name}.biases"),
            floats(&affine.biases, &[rows, columns / 32]),
        );
        quantization[&name] = json!({"group_size": 32, "bits": affine.bits});
    }
    let config = json!({
        "model_type": "llama",
        "hidden_size": size("embedding_length"),
        "num_hidden_layers": size("block_count"),
        "intermediate_size": size("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 49152,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base"),
        "max_position_embeddings": size("context_length"),
        "tie_word_embeddings": true,
        "quantization": quantization,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).expect("the folder is written");
    let path = folder.join("model.safetensors");
    safetensors::serialize_to_file(&tensors, None, &path).expect("the folder is written");
}
