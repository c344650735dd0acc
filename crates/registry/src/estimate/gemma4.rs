//! Gemma 4, which differs from other decoders in too many ways to be a family: two sizes of head, keys that serve as
//! values, layers that share them, an embedding for each layer, experts beside the MLP.

use super::EstimateError;
use super::decoder::{MAX_LAYERS, window};
use super::fields::{Count, Fields};
use super::mixers::Cached;
use super::tensors::{Experts, Tensors};

/// Counts the tensors of the decoder. What the layers cache comes back.
pub(super) fn count(fields: &Fields<'_>, tensors: &mut Tensors) -> Result<Cached, EstimateError> {
    let hidden = fields.required("hidden_size")?;
    let layers = fields
        .ranged("num_hidden_layers", 1, MAX_LAYERS)?
        .ok_or_else(|| fields.missing("num_hidden_layers"))?;
    let shared = fields.ranged("num_kv_shared_layers", 0, layers)?.unwrap_or(0);
    let width = fields.required("intermediate_size")?;
    let heads = fields.required("num_attention_heads")?;
    let head_dim = fields.required("head_dim")?;
    let global_dim = fields.dimension("global_head_dim")?.unwrap_or(head_dim);
    let kv_heads = fields.required("num_key_value_heads")?;
    let keys_are_values = fields.flag("attention_k_eq_v", false)?;
    let global_kv_heads = match fields.dimension("num_global_key_value_heads")? {
        Some(global) if keys_are_values => global,
        _ => kv_heads,
    };
    let types = fields.texts("layer_types")?;
    if types.as_ref().is_some_and(|types| types.len() as u64 != layers) {
        return Err(fields.invalid("layer_types", "one entry for each of `num_hidden_layers`"));
    }
    let period = fields
        .ranged("sliding_window_pattern", 1, MAX_LAYERS)?
        .unwrap_or(5);
    let doubled = fields.flag("use_double_wide_mlp", true)?;
    let side = fields.count("hidden_size_per_layer_input")?.unwrap_or(0);
    let experts = Mixture::read(fields)?;
    let windowed = window(fields)?.is_some();

    count_ends(fields, tensors, hidden, layers, side)?;
    let mut cached = Cached::default();
    for index in 0..layers {
        let path = format!("layers.{index}");
        let is_global = match &types {
            Some(types) => types.get(index as usize) == Some(&"full_attention"),
            None => (index + 1).is_multiple_of(period),
        };
        let (dim, kv) = if is_global {
            (global_dim, global_kv_heads)
        } else {
            (head_dim, kv_heads)
        };
        tensors.matrix(&format!("{path}.self_attn.q_proj"), heads * dim, hidden);
        tensors.matrix(&format!("{path}.self_attn.o_proj"), hidden, heads * dim);
        tensors.plain(dim);
        let shares = index >= layers - shared;
        if !shares {
            tensors.matrix(&format!("{path}.self_attn.k_proj"), kv * dim, hidden);
            if !(keys_are_values && is_global) {
                tensors.matrix(&format!("{path}.self_attn.v_proj"), kv * dim, hidden);
            }
            tensors.plain(dim);
            let per_token = 2 * kv * dim * tensors.element_bytes();
            if is_global || !windowed {
                cached.per_token += per_token;
            } else {
                cached.per_windowed_token += per_token;
            }
        }
        let width = if doubled && shares && shared < layers {
            2 * width
        } else {
            width
        };
        tensors.matrix(&format!("{path}.mlp.gate_proj"), width, hidden);
        tensors.matrix(&format!("{path}.mlp.up_proj"), width, hidden);
        tensors.matrix(&format!("{path}.mlp.down_proj"), hidden, width);
        // Four norms and the scalar of the layer.
        tensors.plain(4 * hidden + 1);
        if let Some(experts) = &experts {
            experts.count(tensors, &path, hidden);
        }
        if side > 0 {
            tensors.matrix(&format!("{path}.per_layer_input_gate"), side, hidden);
            tensors.matrix(&format!("{path}.per_layer_projection"), hidden, side);
            tensors.plain(hidden);
        }
    }
    tensors.plain(hidden);
    Ok(cached)
}

fn count_ends(
    fields: &Fields<'_>,
    tensors: &mut Tensors,
    hidden: Count,
    layers: u64,
    side: Count,
) -> Result<(), EstimateError> {
    let vocabulary = fields.required("vocab_size")?;
    if fields.flag("tie_word_embeddings", true)? {
        tensors.matrix("embed_tokens", vocabulary, hidden);
    } else {
        tensors.table("embed_tokens", vocabulary, hidden);
        tensors.matrix("lm_head", vocabulary, hidden);
    }
    if side > 0 {
        let rows = fields
            .dimension("vocab_size_per_layer_input")?
            .unwrap_or(vocabulary);
        let all = Count::from(layers) * side;
        tensors.table("embed_tokens_per_layer", rows, all);
        tensors.matrix("per_layer_model_projection", all, hidden);
        tensors.plain(side);
    }
    Ok(())
}

/// The experts beside each MLP.
struct Mixture {
    experts: Experts,
    width: Count,
}

impl Mixture {
    fn read(fields: &Fields<'_>) -> Result<Option<Self>, EstimateError> {
        if !fields.flag("enable_moe_block", false)? {
            return Ok(None);
        }
        let all = fields.required("num_experts")?;
        let active = fields.required("top_k_experts")?;
        if active > all {
            return Err(fields.invalid("top_k_experts", "at most `num_experts`"));
        }
        Ok(Some(Self {
            experts: Experts { all, active },
            width: fields.required("moe_intermediate_size")?,
        }))
    }

    fn count(&self, tensors: &mut Tensors, layer: &str, hidden: Count) {
        for (name, rows, columns) in [
            ("gate_proj", self.width, hidden),
            ("up_proj", self.width, hidden),
            ("down_proj", hidden, self.width),
        ] {
            tensors.experts(
                &format!("{layer}.experts.switch_glu.{name}"),
                self.experts,
                rows,
                columns,
                false,
            );
        }
        tensors.matrix(&format!("{layer}.router.proj"), self.experts.all, hidden);
        // Three more norms, and the scales of the router.
        tensors.plain(3 * hidden + hidden + self.experts.all);
    }
}
