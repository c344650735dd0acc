//! The families of architectures: from a configuration to a [`DecoderSpec`].
//!
//! A family is two functions, one for `config.json` and one for the metadata of GGUF. Each takes the decoder of Llama
//! with the numbers that are there, and changes what the family has otherwise.

mod config;
mod gguf;

use mlx_engine_checkpoint::GgufFile;
use serde_json::Value;

use crate::spec::{Activation, NormPlacement, QkNorm};
use crate::{DecoderSpec, ExpertsSpec, LayerAttention, ModelError, RopeScaling, RopeSpec};
use config::Config;
use gguf::Keys;

/// A family.
struct Family {
    /// `model_type` of `config.json`.
    model_type: &'static str,
    from_config: fn(&Config<'_>) -> Result<DecoderSpec, ModelError>,
    /// `general.architecture` of GGUF files, where it has some, and what they say.
    gguf: Option<(&'static str, FromGguf)>,
}

type FromGguf = fn(&Keys<'_>) -> Result<DecoderSpec, ModelError>;

const FAMILIES: [Family; 15] = [
    Family {
        model_type: "gemma2",
        from_config: gemma2,
        gguf: Some(("gemma2", gemma2_gguf)),
    },
    Family {
        model_type: "gemma3",
        from_config: gemma3,
        gguf: None,
    },
    Family {
        model_type: "gemma3_text",
        from_config: gemma3_text,
        gguf: Some(("gemma3", gemma3_gguf)),
    },
    Family {
        model_type: "granite",
        from_config: granite,
        gguf: None,
    },
    // SmolLM2 is a Llama; Mistral is one in GGUF.
    Family {
        model_type: "llama",
        from_config: llama,
        gguf: Some(("llama", llama_gguf)),
    },
    Family {
        model_type: "mistral",
        from_config: llama,
        gguf: None,
    },
    Family {
        model_type: "mixtral",
        from_config: mixtral,
        gguf: None,
    },
    Family {
        model_type: "olmo2",
        from_config: olmo2,
        gguf: None,
    },
    Family {
        model_type: "olmoe",
        from_config: olmoe,
        gguf: None,
    },
    Family {
        model_type: "qwen2",
        from_config: qwen2,
        gguf: Some(("qwen2", llama_gguf)),
    },
    Family {
        model_type: "qwen2_moe",
        from_config: qwen2_moe,
        gguf: None,
    },
    Family {
        model_type: "qwen3",
        from_config: qwen3,
        gguf: Some(("qwen3", qwen3_gguf)),
    },
    Family {
        model_type: "qwen3_moe",
        from_config: qwen3_moe,
        gguf: Some(("qwen3moe", qwen3_moe_gguf)),
    },
    Family {
        model_type: "seed_oss",
        from_config: seed_oss,
        gguf: None,
    },
    Family {
        model_type: "smollm3",
        from_config: smollm3,
        gguf: None,
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
    let model_type = config.model_type()?;
    let family = FAMILIES.iter().find(|family| family.model_type == model_type);
    let family = family.ok_or_else(|| unsupported(model_type))?;
    (family.from_config)(&config)?.validate()
}

/// The decoder that a GGUF file describes.
///
/// # Errors
///
/// As [`spec_from_config`].
pub fn spec_from_gguf(file: &GgufFile) -> Result<DecoderSpec, ModelError> {
    let keys = Keys::new(file)?;
    for family in &FAMILIES {
        if let Some((architecture, from_gguf)) = family.gguf
            && architecture == keys.architecture()
        {
            let spec = DecoderSpec {
                model_type: family.model_type.to_owned(),
                ..from_gguf(&keys)?
            };
            return spec.validate();
        }
    }
    Err(unsupported(keys.architecture()))
}

fn llama(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    config.check_activation("hidden_act", &["silu"])?;
    config.llama()
}

fn llama_gguf(keys: &Keys<'_>) -> Result<DecoderSpec, ModelError> {
    keys.llama()
}

fn qwen2(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    Ok(DecoderSpec {
        qkv_bias: config.flag("attention_bias").unwrap_or(true),
        output_bias: false,
        ..llama(config)?
    })
}

fn qwen3(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    Ok(DecoderSpec {
        qk_norm: QkNorm::PerHead,
        ..llama(config)?
    })
}

fn qwen3_gguf(keys: &Keys<'_>) -> Result<DecoderSpec, ModelError> {
    Ok(DecoderSpec {
        qk_norm: QkNorm::PerHead,
        ..keys.llama()?
    })
}

/// Mixtral: experts in every layer, whose weights always add up to 1.
fn mixtral(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    let spec = llama(config)?;
    let experts = ExpertsSpec {
        count: config.size("num_local_experts")?,
        active: config.optional_size("num_experts_per_tok")?.unwrap_or(2),
        intermediate_size: spec.intermediate_size,
        normalized: true,
        shared: None,
        layers: vec![true; spec.layers.min(DecoderSpec::MOST_LAYERS)],
    };
    Ok(DecoderSpec {
        experts: Some(experts),
        ..spec
    })
}

fn olmoe(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    let spec = llama(config)?;
    let experts = ExpertsSpec {
        count: config.size("num_experts")?,
        active: config.size("num_experts_per_tok")?,
        intermediate_size: spec.intermediate_size,
        normalized: config.flag("norm_topk_prob").unwrap_or(false),
        shared: None,
        layers: vec![true; spec.layers.min(DecoderSpec::MOST_LAYERS)],
    };
    Ok(DecoderSpec {
        qk_norm: QkNorm::AllHeads,
        experts: Some(experts),
        ..spec
    })
}

/// Qwen 1.5 and 2 with experts, and one that every token passes.
fn qwen2_moe(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    let spec = config.qwen_moe(qwen2)?;
    let shared = config.size("shared_expert_intermediate_size")?;
    let experts = spec.experts.map(|experts| ExpertsSpec {
        shared: Some(shared),
        ..experts
    });
    Ok(DecoderSpec { experts, ..spec })
}

fn qwen3_moe(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    config.qwen_moe(qwen3)
}

fn qwen3_moe_gguf(keys: &Keys<'_>) -> Result<DecoderSpec, ModelError> {
    let spec = qwen3_gguf(keys)?;
    let experts = ExpertsSpec {
        count: keys.size("expert_count")?,
        active: keys.size("expert_used_count")?,
        intermediate_size: keys.size("expert_feed_forward_length")?,
        // As llama.cpp: the files do not say, and all published models do.
        normalized: true,
        shared: None,
        layers: (0..spec.layers.min(DecoderSpec::MOST_LAYERS))
            .map(|layer| keys.has(&format!("blk.{layer}.ffn_gate_inp.weight")))
            .collect(),
    };
    Ok(DecoderSpec {
        experts: Some(experts),
        ..spec
    })
}

/// IBM's Granite 3: a Llama with four factors of its own.
fn granite(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    let factor = |key: &str| {
        let number = config.number(key)?;
        number.ok_or_else(|| ModelError::config(format!("`{key}` is missing")))
    };
    Ok(DecoderSpec {
        attention_scale: factor("attention_multiplier")?,
        embedding_scale: factor("embedding_multiplier")?,
        residual_scale: factor("residual_multiplier")?,
        logit_scale: factor("logits_scaling")?.recip(),
        tied_embeddings: config.flag("tie_word_embeddings").unwrap_or(true),
        ..llama(config)?
    })
}

fn olmo2(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    Ok(DecoderSpec {
        norms: NormPlacement::After,
        qk_norm: QkNorm::AllHeads,
        // transformers' default is false, mlx-lm's is true; the published configurations say it.
        ..llama(config)?
    })
}

fn seed_oss(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    Ok(DecoderSpec {
        output_bias: config.flag("attention_out_bias").unwrap_or(false),
        ..llama(config)?
    })
}

/// Every fourth layer knows no positions, unless a list says which.
fn smollm3(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    let spec = llama(config)?;
    let rotated = spec.attention[0].clone();
    if rotated.window.is_some() || spec.attention.len() > 1 {
        return Err(ModelError::config(
            "`layer_types` has sliding windows, which no published SmolLM3 has",
        ));
    }
    let pattern = if let Some(layers) = config.0["no_rope_layers"].as_array() {
        if layers.len() != spec.layers {
            let (entries, layers) = (layers.len(), spec.layers);
            let message = format!("`no_rope_layers` has {entries} entries for {layers} layers");
            return Err(ModelError::config(message));
        }
        // 1 says that a layer rotates.
        let plain = |layer: &Value| usize::from(layer.as_u64() == Some(0) || layer.as_bool() == Some(false));
        layers.iter().map(plain).collect()
    } else {
        let interval = config.optional_size("no_rope_layer_interval")?.unwrap_or(4);
        // Of fewer layers none is reached.
        let layers = 1..=interval.min(spec.layers);
        layers.map(|layer| usize::from(layer == interval)).collect()
    };
    let plain = LayerAttention {
        window: None,
        rope: None,
    };
    Ok(DecoderSpec {
        attention: vec![rotated, plain],
        attention_pattern: pattern,
        // transformers' default, which the published configuration leaves out.
        tied_embeddings: config.flag("tie_word_embeddings").unwrap_or(true),
        ..spec
    })
}

/// What all of Gemma have.
fn gemma(spec: DecoderSpec) -> DecoderSpec {
    DecoderSpec {
        norms: NormPlacement::Around,
        activation: Activation::GeluTanh,
        embedding_scale: (spec.hidden_size as f32).sqrt(),
        ..spec
    }
}

/// The scale of the scores by `query_pre_attn_scalar`.
fn scaled_queries(config: &Config<'_>, default: f32) -> Result<f32, ModelError> {
    let scalar = config.number("query_pre_attn_scalar")?.unwrap_or(default);
    Ok(scalar.sqrt().recip())
}

/// Every second layer of Gemma 2, from the first on, sees a window. mlx-lm lets all see everything, which is the same
/// up to the window's length.
fn gemma2(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    let spec = gemma(config.llama()?);
    let full = spec.attention[0].clone();
    let sliding = LayerAttention {
        window: Some(config.optional_size("sliding_window")?.unwrap_or(4096)),
        ..full.clone()
    };
    Ok(DecoderSpec {
        norms_from_one: true,
        attention: vec![full, sliding],
        attention_pattern: vec![1, 0],
        attention_scale: scaled_queries(config, 144.0)?,
        attention_softcap: Some(config.number("attn_logit_softcapping")?.unwrap_or(50.0)),
        logit_softcap: Some(config.number("final_logit_softcapping")?.unwrap_or(30.0)),
        tied_embeddings: config.flag("tie_word_embeddings").unwrap_or(true),
        ..spec
    })
}

fn gemma2_gguf(keys: &Keys<'_>) -> Result<DecoderSpec, ModelError> {
    let spec = gemma(keys.llama()?);
    let full = spec.attention[0].clone();
    let sliding = LayerAttention {
        window: Some(keys.optional_size("attention.sliding_window")?.unwrap_or(4096)),
        ..full.clone()
    };
    // The files do not say; of the published models the one with 46 layers scales by width over heads.
    let width = if spec.layers == 46 {
        spec.hidden_size / spec.heads.max(1)
    } else {
        spec.head_dim
    };
    Ok(DecoderSpec {
        attention: vec![full, sliding],
        attention_pattern: vec![1, 0],
        attention_scale: (width as f32).sqrt().recip(),
        attention_softcap: Some(keys.number("attn_logit_softcapping")?.unwrap_or(50.0)),
        logit_softcap: Some(keys.number("final_logit_softcapping")?.unwrap_or(30.0)),
        ..spec
    })
}

/// Gemma 3 with eyes: its text model, whose configuration lies within.
fn gemma3(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    let mut text = config.0["text_config"].clone();
    let Some(fields) = text.as_object_mut() else {
        return Err(ModelError::config("`text_config` is missing"));
    };
    // What transformers takes for granted of this family.
    for (key, default) in [
        ("vocab_size", 262_208),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
    ] {
        let outer = config.0.get(key).cloned();
        let value = outer.unwrap_or_else(|| Value::from(default));
        fields.entry(key).or_insert(value);
    }
    fields.insert("model_type".to_owned(), Value::from("gemma3"));
    gemma3_text(&Config(&text))
}

fn gemma3_text(config: &Config<'_>) -> Result<DecoderSpec, ModelError> {
    let mut defaults = config.0.clone();
    if let Some(fields) = defaults.as_object_mut() {
        for (key, default) in [
            ("head_dim", 256),
            ("rope_theta", 1_000_000),
            ("sliding_window", 512),
            ("max_position_embeddings", 32_768),
        ] {
            fields.entry(key).or_insert_with(|| Value::from(default));
        }
    }
    let config = Config(&defaults);
    config.check_activation("hidden_activation", &["gelu_pytorch_tanh"])?;
    let spec = gemma(config.llama()?);
    let full = config.rope()?;
    let local = RopeSpec {
        theta: config.local_rope_theta()?.unwrap_or(10_000.0),
        interleaved: false,
        scaling: RopeScaling::None,
    };
    let (attention, attention_pattern) = if config.0["layer_types"].is_array() {
        config.attention(full, local)?
    } else {
        let pattern = config.optional_size("sliding_window_pattern")?.unwrap_or(6);
        alternating(full, local, config.size("sliding_window")?, pattern)?
    };
    Ok(DecoderSpec {
        norms_from_one: true,
        qk_norm: QkNorm::PerHead,
        attention,
        attention_pattern,
        attention_scale: scaled_queries(&config, 256.0)?,
        embedding_scale: rounded(spec.embedding_scale),
        tied_embeddings: config.flag("tie_word_embeddings").unwrap_or(true),
        ..spec
    })
}

fn gemma3_gguf(keys: &Keys<'_>) -> Result<DecoderSpec, ModelError> {
    let spec = gemma(keys.llama()?);
    let local = RopeSpec {
        theta: keys.number("rope.freq_base_swa")?.unwrap_or(10_000.0),
        interleaved: false,
        scaling: RopeScaling::None,
    };
    let window = keys.optional_size("attention.sliding_window")?.unwrap_or(512);
    let pattern = keys
        .optional_size("attention.sliding_window_pattern")?
        .unwrap_or(6);
    let (attention, attention_pattern) = alternating(keys.rope()?, local, window, pattern)?;
    // The files do not say; of the published models the one with 62 layers scales by width over heads.
    let width = if spec.layers == 62 {
        spec.hidden_size / spec.heads.max(1)
    } else {
        spec.head_dim
    };
    Ok(DecoderSpec {
        qk_norm: QkNorm::PerHead,
        attention,
        attention_pattern,
        attention_scale: (width as f32).sqrt().recip(),
        embedding_scale: rounded(spec.embedding_scale),
        ..spec
    })
}

/// Layers that see a window, and after `pattern - 1` of them one that sees everything.
fn alternating(
    full: RopeSpec,
    local: RopeSpec,
    window: usize,
    pattern: usize,
) -> Result<(Vec<LayerAttention>, Vec<usize>), ModelError> {
    const LONGEST: usize = 1024;
    if pattern == 0 || pattern > LONGEST {
        let message = format!("the pattern of sliding windows has {pattern} layers");
        return Err(ModelError::config(message));
    }
    let kind = |window, rope| LayerAttention {
        window,
        rope: Some(rope),
    };
    let kinds = vec![kind(None, full), kind(Some(window), local)];
    Ok((
        kinds,
        (1..=pattern).map(|layer| usize::from(layer < pattern)).collect(),
    ))
}

/// To bfloat16, the type that the models were trained in: mlx-lm and transformers do so.
fn rounded(scale: f32) -> f32 {
    half::bf16::from_f32(scale).to_f32()
}
