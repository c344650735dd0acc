//! The families of architectures: from a configuration to a [`DecoderSpec`].

use mlx_engine_checkpoint::{GgufFile, Metadata};
use serde_json::Value;

use crate::{DecoderSpec, ModelError, RopeScaling, RopeSpec};

/// What sets a family apart, beside its numbers.
struct Family {
    /// `model_type` of `config.json`, and `general.architecture` of GGUF.
    model_type: &'static str,
    /// Biases of queries, keys and values, where the configuration does not say.
    qkv_bias: bool,
    /// Normalized heads.
    qk_norm: bool,
    /// The name in GGUF files, where it has one.
    gguf: Option<&'static str>,
}

const FAMILIES: [Family; 4] = [
    // SmolLM2 is a Llama; Mistral is one in GGUF.
    Family {
        model_type: "llama",
        qkv_bias: false,
        qk_norm: false,
        gguf: Some("llama"),
    },
    Family {
        model_type: "mistral",
        qkv_bias: false,
        qk_norm: false,
        gguf: None,
    },
    Family {
        model_type: "qwen2",
        qkv_bias: true,
        qk_norm: false,
        gguf: Some("qwen2"),
    },
    Family {
        model_type: "qwen3",
        qkv_bias: false,
        qk_norm: true,
        gguf: Some("qwen3"),
    },
];

/// The `model_type`s that can be loaded, sorted.
pub fn supported_model_types() -> Vec<&'static str> {
    let mut types = FAMILIES.map(|family| family.model_type).to_vec();
    types.sort_unstable();
    types
}

fn unsupported(model_type: &str) -> ModelError {
    ModelError::Unsupported {
        model_type: model_type.to_owned(),
        supported: supported_model_types(),
    }
}

/// The decoder that a `config.json` describes.
///
/// # Errors
///
/// Where the `model_type` is not supported, a number is missing, or an option is one that is not computed here.
pub fn spec_from_config(config: &Value) -> Result<DecoderSpec, ModelError> {
    let config = Config(config);
    let model_type = config.0["model_type"]
        .as_str()
        .ok_or_else(|| ModelError::config("`model_type` is missing"))?;
    let family = FAMILIES
        .iter()
        .find(|family| family.model_type == model_type)
        .ok_or_else(|| unsupported(model_type))?;
    check_layer_types(config.0)?;
    if let Some(activation) = config.0["hidden_act"]
        .as_str()
        .filter(|&activation| activation != "silu")
    {
        return Err(ModelError::config(format!(
            "`hidden_act` is `{activation}`, supported: silu"
        )));
    }
    let hidden_size = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let attention_bias = config.flag("attention_bias");
    DecoderSpec {
        model_type: model_type.to_owned(),
        vocab_size: config.size("vocab_size")?,
        hidden_size,
        layers: config.size("num_hidden_layers")?,
        heads,
        kv_heads: config.optional_size("num_key_value_heads")?.unwrap_or(heads),
        head_dim: config
            .optional_size("head_dim")?
            .unwrap_or(hidden_size.checked_div(heads).unwrap_or(0)),
        intermediate_size: config.size("intermediate_size")?,
        norm_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope: config.rope()?,
        qkv_bias: attention_bias.unwrap_or(family.qkv_bias),
        // Qwen2 has biases on its inputs alone.
        output_bias: attention_bias.unwrap_or(false) && !family.qkv_bias,
        mlp_bias: config.flag("mlp_bias").unwrap_or(false),
        qk_norm: family.qk_norm,
        // Hugging Face's default for the family of Llama is false, and configurations leave defaults out.
        tied_embeddings: config.flag("tie_word_embeddings").unwrap_or(false),
        context_length: config.optional_size("max_position_embeddings")?.unwrap_or(2048),
    }
    .validate()
}

/// Refuses layers that attend to a part of the context alone, as mlx-lm's Llama has them by `layer_types`; without that
/// list a `sliding_window` has no effect there, and so it has none here.
fn check_layer_types(config: &Value) -> Result<(), ModelError> {
    let types = config["layer_types"].as_array().into_iter().flatten();
    for layer_type in types {
        if layer_type.as_str() != Some("full_attention") {
            return Err(ModelError::config(format!(
                "`layer_types` has {layer_type}, supported: \"full_attention\""
            )));
        }
    }
    Ok(())
}

/// A `config.json`.
struct Config<'a>(&'a Value);

impl Config<'_> {
    fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match &self.0[key] {
            Value::Null => Ok(None),
            value => value
                .as_u64()
                .and_then(|size| usize::try_from(size).ok())
                .map(Some)
                .ok_or_else(|| ModelError::config(format!("`{key}` is {value}, expected a number from 0"))),
        }
    }

    fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_size(key)?
            .ok_or_else(|| ModelError::config(format!("`{key}` is missing")))
    }

    fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        number_in(self.0, key)
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.0[key].as_bool()
    }

    /// The rotary embedding: `rope_parameters` in configurations of transformers 5, `rope_theta` and `rope_scaling`
    /// before.
    fn rope(&self) -> Result<RopeSpec, ModelError> {
        let parameters = &self.0["rope_parameters"];
        let scaling = if parameters.is_object() {
            parameters
        } else {
            &self.0["rope_scaling"]
        };
        let theta = match number_in(parameters, "rope_theta")? {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        let kind = scaling["rope_type"]
            .as_str()
            .or_else(|| scaling["type"].as_str())
            .unwrap_or("default");
        let needed = |key: &str| {
            number_in(scaling, key)?
                .ok_or_else(|| ModelError::config(format!("`rope_scaling` of type `{kind}` lacks `{key}`")))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear(needed("factor")?),
            "llama3" => RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_frequency_factor: needed("low_freq_factor")?,
                high_frequency_factor: needed("high_freq_factor")?,
                original_context: needed("original_max_position_embeddings")?,
            },
            other => {
                let message =
                    format!("`rope_scaling` is of type `{other}`, supported: default, linear, llama3");
                return Err(ModelError::config(message));
            }
        };
        let interleaved = self.flag("rope_traditional").unwrap_or(false);
        Ok(RopeSpec {
            theta,
            interleaved,
            scaling,
        })
    }
}

fn number_in(object: &Value, key: &str) -> Result<Option<f32>, ModelError> {
    match &object[key] {
        Value::Null => Ok(None),
        value => value
            .as_f64()
            .map(|number| Some(number as f32))
            .ok_or_else(|| ModelError::config(format!("`{key}` is {value}, expected a number"))),
    }
}

/// The decoder that a GGUF file describes.
///
/// # Errors
///
/// As [`spec_from_config`].
pub fn spec_from_gguf(file: &GgufFile) -> Result<DecoderSpec, ModelError> {
    let metadata = file.metadata();
    let architecture = metadata.string("general.architecture")?;
    let family = FAMILIES
        .iter()
        .find(|family| family.gguf == Some(architecture))
        .ok_or_else(|| unsupported(architecture))?;
    let keys = Keys {
        metadata,
        architecture,
    };
    let hidden_size = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let embedding = file.tensor("token_embd.weight");
    let factors = file
        .tensor("rope_freqs.weight")
        .map(|tensor| tensor.dequantize())
        .transpose()?;
    DecoderSpec {
        model_type: family.model_type.to_owned(),
        // The tensor decides: the metadata of some files leaves padding out.
        vocab_size: embedding
            .and_then(|tensor| tensor.shape.first().copied())
            .unwrap_or(0),
        hidden_size,
        layers: keys.size("block_count")?,
        heads,
        kv_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim: keys
            .optional_size("attention.key_length")?
            .unwrap_or(hidden_size.checked_div(heads).unwrap_or(0)),
        intermediate_size: keys.size("feed_forward_length")?,
        norm_eps: keys.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
        rope: RopeSpec {
            theta: keys.number("rope.freq_base")?.unwrap_or(10_000.0),
            // The converter permutes the rows of the Llama family's queries and keys.
            interleaved: architecture == "llama",
            scaling: keys.rope_scaling(factors)?,
        },
        qkv_bias: file.tensor("blk.0.attn_q.bias").is_some(),
        output_bias: file.tensor("blk.0.attn_output.bias").is_some(),
        mlp_bias: file.tensor("blk.0.ffn_gate.bias").is_some(),
        qk_norm: family.qk_norm,
        tied_embeddings: file.tensor("output.weight").is_none(),
        context_length: keys.size("context_length")?,
    }
    .validate()
}

/// The keys of an architecture.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl Keys<'_> {
    fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let value = self
            .metadata
            .optional_u64(&format!("{}.{key}", self.architecture))?;
        Ok(value.and_then(|size| usize::try_from(size).ok()))
    }

    fn size(&self, key: &str) -> Result<usize, ModelError> {
        let value = self.metadata.u64(&format!("{}.{key}", self.architecture))?;
        usize::try_from(value).map_err(|_| ModelError::config(format!("`{key}` is {value}")))
    }

    fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let value = self
            .metadata
            .optional_f64(&format!("{}.{key}", self.architecture))?;
        Ok(value.map(|number| number as f32))
    }

    fn rope_scaling(&self, factors: Option<Vec<f32>>) -> Result<RopeScaling, ModelError> {
        if let Some(factors) = factors {
            return Ok(RopeScaling::Factors(factors));
        }
        let kind = self
            .metadata
            .optional_string(&format!("{}.rope.scaling.type", self.architecture))?;
        match kind {
            None | Some("none") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear(
                self.number("rope.scaling.factor")?.unwrap_or(1.0),
            )),
            Some(other) => {
                let message = format!("`rope.scaling.type` is `{other}`, supported: none, linear");
                Err(ModelError::config(message))
            }
        }
    }
}
