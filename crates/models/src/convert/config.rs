//! The `config.json` of what is written.

use std::collections::BTreeMap;

use mlx_engine_checkpoint::FloatType;
use serde_json::{Map, Value, json};

use crate::source::{Source, Weights};
use crate::{DecoderSpec, LayerAttention, ModelError, RopeScaling, RopeSpec, spec_from_config};

/// A configuration, and the decoder that it describes.
pub(super) struct TargetConfig {
    pub(super) config: Map<String, Value>,
    pub(super) spec: DecoderSpec,
}

impl TargetConfig {
    /// That of a folder without its quantization, or one made for a GGUF file, which is read again and compared with what the file
    /// says of itself.
    pub(super) fn new(source: &Source) -> Result<Self, ModelError> {
        match &source.weights {
            Weights::Folder(_, config) => {
                let mut config = config.as_object().cloned().unwrap_or_default();
                // What mlx-lm leaves out too: where the model was, and what is not among the weights.
                for key in [
                    "quantization",
                    "quantization_config",
                    "_name_or_path",
                    "vision_config",
                ] {
                    config.remove(key);
                }
                Ok(Self {
                    config,
                    spec: source.spec.clone(),
                })
            }
            Weights::Gguf(_) => {
                let config = made(&source.spec)?;
                let spec = spec_from_config(&Value::Object(config.clone()))?;
                let mut expected = source.spec.clone();
                // What the weights of one layout say and the configuration of the other.
                expected.norms_from_one = spec.norms_from_one;
                for (expected, found) in expected.attention.iter_mut().zip(&spec.attention) {
                    if let (Some(expected), Some(found)) = (&mut expected.rope, &found.rope) {
                        expected.interleaved = found.interleaved;
                        if let RopeScaling::Factors(_) = expected.scaling {
                            expected.scaling = found.scaling.clone();
                        }
                    }
                }
                if spec != expected {
                    return Err(ModelError::config(format!(
                        "no `config.json` of a {} model says what this file is: {expected:?} becomes {spec:?}",
                        expected.model_type
                    )));
                }
                Ok(Self { config, spec })
            }
        }
    }

    /// The type that the configuration gives its weights, which mlx-lm converts them to.
    pub(super) fn stated_type(&self) -> Option<FloatType> {
        self.config
            .get("torch_dtype")?
            .as_str()
            .and_then(FloatType::from_name)
    }

    /// States the type of the weights.
    pub(super) fn set_type(&mut self, float_type: Option<FloatType>) {
        let Some(float_type) = float_type else { return };
        if self.config.contains_key("dtype") {
            self.config.insert("dtype".to_owned(), json!(float_type.name()));
        }
        self.config
            .insert("torch_dtype".to_owned(), json!(float_type.name()));
    }

    /// States bits and groups of the matrices that are quantized: those of most for all, and others by name.
    pub(super) fn set_quantization<'a>(
        &mut self,
        matrices: impl Iterator<Item = (&'a str, u32, u32)> + Clone,
    ) {
        let mut counts: BTreeMap<(u32, u32), usize> = BTreeMap::new();
        for (_, bits, group_size) in matrices.clone() {
            *counts.entry((bits, group_size)).or_default() += 1;
        }
        let Some((&most, _)) = counts.iter().max_by_key(|(_, count)| **count) else {
            return;
        };
        let entry = |(bits, group_size): (u32, u32)| json!({"group_size": group_size, "bits": bits, "mode": "affine"});
        let mut quantization = entry(most);
        for (name, bits, group_size) in matrices.filter(|&(_, bits, group_size)| (bits, group_size) != most) {
            quantization[name] = entry((bits, group_size));
        }
        // The second is where the hub looks.
        for key in ["quantization", "quantization_config"] {
            self.config.insert(key.to_owned(), quantization.clone());
        }
    }
}

/// The configuration of a decoder that a GGUF file describes, in Hugging Face's words.
fn made(spec: &DecoderSpec) -> Result<Map<String, Value>, ModelError> {
    let architecture = match spec.model_type.as_str() {
        "llama" => "LlamaForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        "gemma2" => "Gemma2ForCausalLM",
        "gemma3_text" => "Gemma3ForCausalLM",
        other => {
            return Err(ModelError::config(format!(
                "a GGUF file of type {other} cannot be converted, only llama, qwen2, qwen3, gemma2 and gemma3; convert the \
                 Hugging Face folder"
            )));
        }
    };
    let Some(LayerAttention { rope: Some(rope), .. }) = spec.attention.first() else {
        return Err(ModelError::config("the model has no rotary embedding"));
    };
    let mut config = json!({
        "architectures": [architecture],
        "model_type": spec.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": decimal(spec.norm_eps),
        "rope_theta": decimal(rope.theta),
        "max_position_embeddings": spec.context_length,
        "tie_word_embeddings": spec.tied_embeddings,
    });
    match spec.model_type.as_str() {
        "gemma2" | "gemma3_text" => gemma(spec, &mut config),
        model_type => {
            config["hidden_act"] = json!("silu");
            if model_type != "qwen2" {
                config["attention_bias"] = json!(spec.qkv_bias);
            }
            if model_type == "llama" {
                config["mlp_bias"] = json!(spec.mlp_bias);
            }
        }
    }
    match &rope.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear(factor) => {
            config["rope_scaling"] =
                json!({"type": "linear", "rope_type": "linear", "factor": decimal(*factor)});
        }
        RopeScaling::Factors(factors) => config["rope_scaling"] = llama3(rope, spec.head_dim, factors)?,
        RopeScaling::Llama3 { .. } => {
            return Err(ModelError::config(
                "a GGUF file has factors of its own for Llama 3",
            ));
        }
    }
    let Value::Object(config) = config else {
        return Err(ModelError::config("the configuration is no object"));
    };
    Ok(config)
}

/// What Gemma has of its own.
fn gemma(spec: &DecoderSpec, config: &mut Value) {
    config["hidden_activation"] = json!("gelu_pytorch_tanh");
    let scalar = (spec.attention_scale * spec.attention_scale).recip().round();
    config["query_pre_attn_scalar"] = json!(scalar as u32);
    if let Some(sliding) = spec.attention.get(1) {
        config["sliding_window"] = json!(sliding.window);
        if spec.model_type == "gemma3_text" {
            config["sliding_window_pattern"] = json!(spec.attention_pattern.len());
            if let Some(local) = &sliding.rope {
                config["rope_local_base_freq"] = decimal(local.theta);
            }
        }
    }
    for (key, cap) in [
        ("attn_logit_softcapping", spec.attention_softcap),
        ("final_logit_softcapping", spec.logit_softcap),
    ] {
        if let Some(cap) = cap {
            config[key] = decimal(cap);
        }
    }
}

/// A float32 as the shortest decimal that is read as it: 1e-5 and not 9.999999747378752e-6.
fn decimal(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// The numbers of Llama 3's scaling that make these factors, which llama.cpp's converter computed from them. The largest factor is
/// that of the lowest frequencies; the context before is the one of its kind that gives the others.
fn llama3(rope: &RopeSpec, head_dim: usize, factors: &[f32]) -> Result<Value, ModelError> {
    let factor = factors.iter().copied().fold(1.0, f32::max);
    let wavelengths = rope.plain_wavelengths(head_dim);
    for original_context in (8..=20).map(|power| (1_u32 << power) as f32) {
        let mut rope = rope.clone();
        rope.scaling = RopeScaling::Llama3 {
            factor,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_context,
        };
        let made = rope.wavelengths(head_dim).unwrap_or_default();
        let same = made.iter().zip(&wavelengths).zip(factors);
        if made.len() == factors.len()
            && same
                .into_iter()
                .all(|((made, plain), factor)| (made / plain / factor - 1.0).abs() < 1e-4)
        {
            return Ok(json!({
                "rope_type": "llama3",
                "factor": decimal(factor),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original_context as u32,
            }));
        }
    }
    Err(ModelError::config(
        "`rope_freqs.weight` has factors that Llama 3's scaling does not make, and `config.json` has no other",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_short() {
        // The shortest decimal number that is this float, and not the digits of its double.
        assert_eq!(decimal(1e-5).as_f64(), Some(1e-5));
        assert_eq!(decimal(500_000.0).as_f64(), Some(500_000.0));
        for value in [0.1_f32, 1e-6, 1_000_000.0, 3.4e38] {
            assert_eq!(decimal(value).as_f64().unwrap() as f32, value);
        }
    }
}
