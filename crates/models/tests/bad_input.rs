//! What is said of checkpoints that cannot be loaded.

use std::path::Path;

use mlx_engine_models::{Compute, Decoder, ModelError, Source};
use serde_json::{Value, json};

/// A copy of a tiny checkpoint with its `config.json` changed, and its tensors, where `tensors` does so.
fn changed(
    name: &str,
    config: impl FnOnce(&mut Value),
    tensors: impl FnOnce(&mut Vec<u8>),
) -> Result<Decoder, ModelError> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/tiny")
        .join(name);
    let folder = tempfile::tempdir().expect("a folder");
    let text = std::fs::read(from.join("config.json")).expect("the fixture is there");
    let mut json: Value = serde_json::from_slice(&text).expect("the fixture is JSON");
    config(&mut json);
    std::fs::write(folder.path().join("config.json"), json.to_string()).expect("a file");
    let mut bytes = std::fs::read(from.join("model.safetensors")).expect("the fixture is there");
    tensors(&mut bytes);
    std::fs::write(folder.path().join("model.safetensors"), bytes).expect("a file");
    let source = Source::open(folder.path())?;
    Decoder::load(&source, Compute::Fastest, &mut |_| Ok(()))
}

fn config_error(name: &str, config: impl FnOnce(&mut Value)) -> String {
    changed(name, config, |_| {})
        .expect_err("it is refused")
        .to_string()
}

/// Writes a name over another of the same length in a safetensors header.
fn renamed(from: &'static str, to: &'static str) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| {
        assert_eq!(from.len(), to.len());
        let at = bytes
            .windows(from.len())
            .position(|window| window == from.as_bytes())
            .expect("the name is there");
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
}

#[test]
fn a_path_that_is_no_model() {
    let error = |path: &Path| Source::open(path).expect_err("it is refused").to_string();
    assert_eq!(
        error(Path::new("no/such/model")),
        "`no/such/model` does not exist"
    );
    let folder = tempfile::tempdir().expect("a folder");
    assert!(error(folder.path()).ends_with("has no `config.json`, which a model folder needs"));
    std::fs::write(folder.path().join("config.json"), "{").expect("a file");
    assert!(error(folder.path()).contains("configuration of the model is invalid: `config.json`: EOF"));
    let file = folder.path().join("model.gguf");
    std::fs::write(&file, "no GGUF").expect("a file");
    assert_eq!(
        error(&file),
        "`model.gguf` is not a valid GGUF file: it does not begin with `GGUF`"
    );
}

#[test]
fn a_model_type_that_is_not_supported_lists_those_that_are() {
    assert_eq!(
        config_error("llama", |config| config["model_type"] = json!("gpt5")),
        "model type `gpt5` is not supported, supported are: gemma2, gemma3, gemma3_text, granite, llama, \
         mistral, mixtral, olmo2, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe, seed_oss, smollm3"
    );
}

#[test]
fn a_configuration_that_lacks_or_contradicts_something() {
    let check = |change: fn(&mut Value), expect: &str| {
        let error = config_error("llama", change);
        assert!(error.contains(expect), "{error}");
    };
    check(
        |config| config["model_type"] = Value::Null,
        "`model_type` is missing",
    );
    check(
        |config| config["hidden_size"] = Value::Null,
        "`hidden_size` is missing",
    );
    check(
        |config| config["hidden_size"] = json!("wide"),
        "`hidden_size` is \"wide\", expected a number from 0",
    );
    check(
        |config| config["num_hidden_layers"] = json!(0),
        "the number of layers is 0",
    );
    check(
        |config| config["num_key_value_heads"] = json!(3),
        "4 heads cannot share 3 key and value heads",
    );
    check(
        |config| config["hidden_act"] = json!("gelu"),
        "`hidden_act` is `gelu`, supported: silu",
    );
    check(|config| config["head_dim"] = json!(7), "the head size 7 is odd");
    check(
        |config| config["rms_norm_eps"] = json!("small"),
        "`rms_norm_eps` is \"small\", expected a number",
    );
    check(
        |config| config["rope_scaling"] = json!({"type": "yarn", "factor": 4.0}),
        "`rope_scaling` is of type `yarn`, supported: default, linear, llama3",
    );
    check(
        |config| config["rope_scaling"] = json!({"type": "linear"}),
        "of type `linear` lacks `factor`",
    );
    check(
        |config| config["rope_scaling"] = json!({"type": "linear", "factor": 0.0}),
        "the factor of the rotary embedding is 0, expected a number above 0",
    );
    check(
        |config| config["rope_theta"] = json!(0),
        "the base of the rotary embedding is 0",
    );
    check(
        |config| config["rms_norm_eps"] = json!(-1),
        "the epsilon of the norms is -1",
    );
    check(
        |config| config["layer_types"] = json!(["full_attention", "sliding_attention"]),
        "`sliding_window` is missing",
    );
    check(
        |config| config["layer_types"] = json!(["full_attention", "linear_attention"]),
        "`layer_types` has \"linear_attention\", supported: \"full_attention\", \"sliding_attention\"",
    );
    check(
        |config| config["layer_types"] = json!(["full_attention"]),
        "`layer_types` has 1 entries",
    );
    check(
        |config| {
            config["layer_types"] = json!(["full_attention", "sliding_attention"]);
            config["sliding_window"] = json!(0);
        },
        "the sliding window is 0",
    );
    check(
        |config| config["num_hidden_layers"] = json!(4096),
        "the configuration has 4096 layers, and the checkpoint 21 tensors",
    );
    check(
        |config| config["num_hidden_layers"] = json!(100_000_000),
        "100000000 layers, supported: up to 4096",
    );
}

/// What a file says of itself is added up before it is compared with what is there.
#[test]
fn sizes_that_no_machine_has_are_still_counted() {
    let most = i64::from(i32::MAX);
    let config = json!({
        "model_type": "mixtral", "vocab_size": most, "hidden_size": most, "num_hidden_layers": 4096,
        "num_attention_heads": most, "num_key_value_heads": most, "head_dim": most - 1, "intermediate_size": most,
        "num_local_experts": 4096, "num_experts_per_tok": 1,
    });
    let spec = mlx_engine_models::spec_from_config(&config).expect("each size is in its range");
    assert_eq!(spec.parameters(), u64::MAX);
}

#[test]
fn tensors_that_are_missing_unused_or_misshapen_are_named() {
    let rename = |from, to| {
        changed("llama", |_| {}, renamed(from, to))
            .expect_err("it is refused")
            .to_string()
    };
    assert_eq!(
        rename(
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.1.mlp.xx_proj.weight"
        ),
        "the checkpoint lacks 1 tensors that a llama model needs: `model.layers.1.mlp.up_proj.weight`"
    );
    let error = config_error("llama", |config| config["num_hidden_layers"] = json!(1));
    assert!(
        error.contains("has 9 tensors that a llama model does not use: `model.layers.1."),
        "{error}"
    );
    assert!(error.ends_with(" and 1 more"), "{error}");
    // Scales beside a matrix of floats say that something else was meant.
    let stray = changed(
        "llama",
        |_| {},
        |bytes| {
            let mut tensors = safetensors::SafeTensors::deserialize(bytes)
                .expect("the fixture")
                .tensors();
            let norm = tensors
                .iter()
                .find(|(name, _)| name == "model.norm.weight")
                .expect("a norm")
                .1
                .clone();
            tensors.push(("model.layers.0.mlp.up_proj.scales".to_owned(), norm));
            *bytes = safetensors::serialize(tensors, None).expect("the file is written");
        },
    );
    assert_eq!(
        stray.expect_err("it is refused").to_string(),
        "the checkpoint has 1 tensors that a llama model does not use: `model.layers.0.mlp.up_proj.scales`"
    );
    assert_eq!(
        config_error("llama", |config| config["vocab_size"] = json!(100)),
        "tensor `model.embed_tokens.weight` has the shape [96, 32], the configuration asks for [100, 32]"
    );
}

#[test]
fn bits_and_groups_that_do_not_fit_are_refused_before_mlx_sees_them() {
    let check = |change: fn(&mut Value), expect: &str| {
        let error = config_error("llama-4bit", change);
        assert!(error.contains(expect), "{error}");
    };
    check(
        |config| config["quantization"]["bits"] = json!(7),
        "cannot be quantized to 7 bits in groups of 32: bits may be 2, 3, 4, 5, 6 or 8",
    );
    check(
        |config| config["quantization"]["bits"] = json!(8),
        "its shape is [96, 4] where these make [96, 8]",
    );
    check(
        |config| config["quantization"]["group_size"] = json!(48),
        "groups may be of 32, 64 or 128",
    );
    check(
        |config| config["quantization"]["group_size"] = json!(64),
        "32 columns are not whole groups",
    );
    check(
        |config| config["quantization"] = Value::Null,
        "gives no `bits` and `group_size`",
    );
    check(
        |config| config["quantization"]["mode"] = json!("mxfp4"),
        "the mode `mxfp4`, supported: affine",
    );
}

#[test]
fn a_file_that_is_cut_off() {
    let error =
        changed("llama", |_| {}, |bytes| bytes.truncate(bytes.len() - 100)).expect_err("it is refused");
    assert!(
        error
            .to_string()
            .contains("`model.safetensors` is truncated: the last tensor needs"),
        "{error}"
    );
}

#[test]
fn a_load_is_given_up_at_the_next_layer() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama");
    let source = Source::open(&folder).expect("the fixture opens");
    let mut calls = 0;
    let result = Decoder::load(&source, Compute::Fastest, &mut |_| {
        calls += 1;
        if calls == 2 {
            Err(ModelError::Cancelled)
        } else {
            Ok(())
        }
    });
    assert!(matches!(result, Err(ModelError::Cancelled)));
    assert_eq!(calls, 2);
}

#[test]
fn logits_that_are_no_numbers_are_an_error() {
    // A norm of NaN: the bytes of its weights lie where the header says.
    let damage = |bytes: &mut Vec<u8>| {
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let tensor = &json["model.norm.weight"];
        let at = 8 + header + tensor["data_offsets"][0].as_u64().unwrap() as usize;
        // All ones are NaN in every float.
        bytes[at..at + 4].fill(0xff);
    };
    let decoder = changed("llama", |_| {}, damage).expect("it loads");
    let mut sequence = decoder.sequence();
    let logits = decoder.forward(&[1, 2], &mut sequence).expect("it is built");
    logits.eval().expect("the sequence tells, not the array");
    let error = sequence.check(2).expect_err("it fails").to_string();
    assert!(error.contains("the logits are not finite"), "{error}");
}

#[test]
fn layers_without_positions_are_listed_for_all_or_refused() {
    let refused =
        |list: serde_json::Value| config_error("smollm3-list", |config| config["no_rope_layers"] = list);
    assert_eq!(
        refused(json!([1, 0])),
        "configuration of the model is invalid: `no_rope_layers` has 2 entries for 3 layers"
    );
}
