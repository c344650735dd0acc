//! A `config.json` as families read it.

use serde_json::Value;

use crate::spec::{Activation, NormPlacement, QkNorm};
use crate::{DecoderSpec, ExpertsSpec, LayerAttention, ModelError, RopeScaling, RopeSpec};

/// A `config.json`.
pub(super) struct Config<'a>(pub(super) &'a Value);

impl Config<'_> {
    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match &self.0[key] {
            Value::Null => Ok(None),
            value => value
                .as_u64()
                .and_then(|size| usize::try_from(size).ok())
                .map(Some)
                .ok_or_else(|| ModelError::config(format!("`{key}` is {value}, expected a number from 0"))),
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_size(key)?
            .ok_or_else(|| ModelError::config(format!("`{key}` is missing")))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        number_in(self.0, key)
    }

    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        self.0[key].as_bool()
    }

    /// The decoder of the family of Llama with these numbers, from which other families differ in some points.
    pub(super) fn llama(&self) -> Result<DecoderSpec, ModelError> {
        let hidden_size = self.size("hidden_size")?;
        let heads = self.size("num_attention_heads")?;
        let head_dim = self
            .optional_size("head_dim")?
            .unwrap_or(hidden_size.checked_div(heads).unwrap_or(0));
        let attention_bias = self.flag("attention_bias").unwrap_or(false);
        let rope = self.rope()?;
        let (attention, attention_pattern) = self.attention(rope.clone(), rope)?;
        Ok(DecoderSpec {
            model_type: self.model_type()?.to_owned(),
            vocab_size: self.size("vocab_size")?,
            hidden_size,
            layers: self.size("num_hidden_layers")?,
            heads,
            kv_heads: self.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            intermediate_size: self.size("intermediate_size")?,
            experts: None,
            norm_eps: self.number("rms_norm_eps")?.unwrap_or(1e-6),
            norms: NormPlacement::Before,
            norms_from_one: false,
            attention,
            attention_pattern,
            attention_scale: (head_dim as f32).sqrt().recip(),
            attention_softcap: None,
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            mlp_bias: self.flag("mlp_bias").unwrap_or(false),
            qk_norm: QkNorm::None,
            activation: Activation::Silu,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_softcap: None,
            // Hugging Face's default for the family of Llama is false, and configurations leave defaults out.
            tied_embeddings: self.flag("tie_word_embeddings").unwrap_or(false),
            context_length: self.optional_size("max_position_embeddings")?.unwrap_or(2048),
        })
    }

    /// The decoder of a family of Qwen with experts, in every layer or in each so many-th, and in none of a list.
    pub(super) fn qwen_moe(
        &self,
        dense: fn(&Self) -> Result<DecoderSpec, ModelError>,
    ) -> Result<DecoderSpec, ModelError> {
        let spec = dense(self)?;
        let step = self.optional_size("decoder_sparse_step")?.unwrap_or(1);
        if step == 0 {
            return Err(ModelError::config("`decoder_sparse_step` is 0"));
        }
        let without: Vec<u64> = self.0["mlp_only_layers"]
            .as_array()
            .map(|layers| layers.iter().filter_map(Value::as_u64).collect())
            .unwrap_or_default();
        // Not to be trusted before it was compared with the checkpoint.
        let layers = spec.layers.min(DecoderSpec::MOST_LAYERS);
        let experts = ExpertsSpec {
            count: self.size("num_experts")?,
            active: self.size("num_experts_per_tok")?,
            intermediate_size: self.size("moe_intermediate_size")?,
            normalized: self.flag("norm_topk_prob").unwrap_or(false),
            shared: None,
            layers: (0..layers)
                .map(|layer| (layer + 1).is_multiple_of(step) && !without.contains(&(layer as u64)))
                .collect(),
        };
        Ok(DecoderSpec {
            experts: Some(experts),
            ..spec
        })
    }

    pub(super) fn model_type(&self) -> Result<&str, ModelError> {
        self.0["model_type"]
            .as_str()
            .ok_or_else(|| ModelError::config("`model_type` is missing"))
    }

    /// Refuses a function of the MLP that is not among these names of the family's own.
    pub(super) fn check_activation(&self, key: &str, supported: &[&str]) -> Result<(), ModelError> {
        match self.0[key].as_str() {
            Some(name) if !supported.contains(&name) => {
                let message = format!("`{key}` is `{name}`, supported: {}", supported.join(", "));
                Err(ModelError::config(message))
            }
            _ => Ok(()),
        }
    }

    /// The kinds of attention by `layer_types`, and which each layer has: all see everything without that list, whatever
    /// `sliding_window` is, as in mlx-lm.
    pub(super) fn attention(
        &self,
        full: RopeSpec,
        sliding: RopeSpec,
    ) -> Result<(Vec<LayerAttention>, Vec<usize>), ModelError> {
        let full = LayerAttention {
            window: None,
            rope: Some(full),
        };
        let Some(types) = self.0["layer_types"].as_array() else {
            return Ok((vec![full], vec![0]));
        };
        let mut pattern = Vec::with_capacity(types.len());
        for layer_type in types {
            pattern.push(match layer_type.as_str() {
                Some("full_attention") => 0,
                Some("sliding_attention") => 1,
                _ => {
                    return Err(ModelError::config(format!(
                        "`layer_types` has {layer_type}, supported: \"full_attention\", \"sliding_attention\""
                    )));
                }
            });
        }
        if pattern.len() != self.size("num_hidden_layers")? {
            let message = format!("`layer_types` has {} entries", pattern.len());
            return Err(ModelError::config(message));
        }
        if pattern.iter().all(|&kind| kind == 0) {
            return Ok((vec![full], vec![0]));
        }
        let sliding = LayerAttention {
            window: Some(self.size("sliding_window")?),
            rope: Some(sliding),
        };
        Ok((vec![full, sliding], pattern))
    }

    /// The base of the rotary embedding of layers that see a window, where it is another.
    pub(super) fn local_rope_theta(&self) -> Result<Option<f32>, ModelError> {
        let own = &self.0["rope_parameters"]["sliding_attention"];
        Ok(number_in(own, "rope_theta")?.or(self.number("rope_local_base_freq")?))
    }

    /// The rotary embedding: `rope_parameters` in configurations of transformers 5, `rope_theta` and `rope_scaling`
    /// before.
    pub(super) fn rope(&self) -> Result<RopeSpec, ModelError> {
        let mut parameters = &self.0["rope_parameters"];
        if parameters["full_attention"].is_object() {
            parameters = &parameters["full_attention"];
        }
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

pub(super) fn number_in(object: &Value, key: &str) -> Result<Option<f32>, ModelError> {
    match &object[key] {
        Value::Null => Ok(None),
        value => value
            .as_f64()
            .map(|number| Some(number as f32))
            .ok_or_else(|| ModelError::config(format!("`{key}` is {value}, expected a number"))),
    }
}
