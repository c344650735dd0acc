//! What follows the mixing of tokens in a layer: an MLP, or experts.

use serde_json::Value;

use super::EstimateError;
use super::family::{Family, Stack};
use super::fields::{Count, Fields};
use super::tensors::{Experts, Tensors};

/// The MLPs of a model.
#[derive(Clone, Debug)]
pub(super) struct FeedForward {
    hidden: Count,
    /// `None` where no layer is dense.
    intermediate: Option<Count>,
    gated: bool,
    bias: bool,
    fused: bool,
    name: &'static str,
    mixture: Option<Mixture>,
}

/// The experts of a model.
#[derive(Clone, Debug)]
struct Mixture {
    experts: Experts,
    intermediate: Count,
    /// What the experts see, where that is not the hidden size.
    latent: Option<Count>,
    /// The intermediate size of the experts that every token passes.
    shared: Count,
    /// Whether a weight for each hidden dimension decides how much the shared expert counts.
    shared_gate: bool,
    bias: bool,
    /// Whether the router is a bare array, with a correction for each expert.
    bare_router: bool,
    names: (&'static str, &'static str),
    layers: SparseLayers,
}

/// Which layers have experts.
#[derive(Clone, Debug)]
struct SparseLayers {
    first: u64,
    listed: Option<Vec<bool>>,
    dense: Vec<u64>,
    period: u64,
    /// What a layer's index leaves, divided by the period.
    offset: u64,
}

impl SparseLayers {
    fn read(fields: &Fields<'_>) -> Result<Self, EstimateError> {
        let mut first = 0;
        for name in [
            "first_k_dense_replace",
            "num_dense_layers",
            "moe_layer_start_index",
        ] {
            first = fields.ranged(name, 0, u64::from(u32::MAX))?.unwrap_or(first);
        }
        let listed = fields
            .value("moe_layer_freq")
            .and_then(Value::as_array)
            .map(|items| {
                items
                    .iter()
                    .map(|item| item.as_u64() != Some(0) && item.as_bool() != Some(false))
                    .collect()
            });
        let every = |name| fields.ranged(name, 1, u64::from(u32::MAX));
        let (mut period, mut offset) = (1, 0);
        for name in ["decoder_sparse_step", "interleave_moe_layer_step"] {
            if let Some(step) = every(name)? {
                (period, offset) = (step, step - 1);
            }
        }
        if let (None, Some(step)) = (
            &listed,
            if listed.is_some() {
                None
            } else {
                every("moe_layer_freq")?
            },
        ) {
            (period, offset) = (step, 0);
        }
        if let Some(step) = every("expert_layer_period")? {
            (period, offset) = (
                step,
                fields.ranged("expert_layer_offset", 0, step - 1)?.unwrap_or(0),
            );
        }
        Ok(Self {
            first,
            listed,
            dense: fields.indices("mlp_only_layers")?.unwrap_or_default(),
            period,
            offset,
        })
    }

    fn contains(&self, layer: u64) -> bool {
        layer >= self.first
            && !self.dense.contains(&layer)
            && layer % self.period == self.offset
            && self.listed.as_ref().is_none_or(|listed| {
                usize::try_from(layer)
                    .ok()
                    .and_then(|layer| listed.get(layer))
                    .copied()
                    .unwrap_or(true)
            })
    }
}

impl Mixture {
    fn read(fields: &Fields<'_>, family: &Family, hidden: Count) -> Result<Option<Self>, EstimateError> {
        let all = fields.any_count(&[
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
        ])?;
        let Some(all) = all.filter(|&all| all > 0) else {
            return Ok(None);
        };
        let names = [
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_topk",
            "moe_k",
            "top_k_experts",
        ];
        let active = fields
            .any_dimension(&names)?
            .ok_or_else(|| fields.missing("num_experts_per_tok"))?;
        if active > all {
            return Err(fields.invalid("num_experts_per_tok", "at most the number of experts"));
        }
        let intermediate = fields
            .any_dimension(&[
                "moe_intermediate_size",
                "expert_intermediate_size",
                "intermediate_size",
            ])?
            .ok_or_else(|| fields.missing("moe_intermediate_size"))?;
        let own_shared = fields.any_count(&[
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
        ])?;
        let shared_experts =
            fields.any_count(&["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"])?;
        // Llama 4 has one shared expert, and no field that says so.
        let llama4 = fields.has("interleave_moe_layer_step");
        let minimax = family.experts.0.starts_with("block_sparse_moe") && family.stack == Stack::Attention;
        let shared = match own_shared {
            Some(_) if minimax && !fields.has("n_routed_experts") => 0,
            Some(shared) => shared,
            None if llama4 => intermediate,
            None => shared_experts.unwrap_or(0) * intermediate,
        };
        Ok(Some(Self {
            experts: Experts { all, active },
            intermediate,
            latent: fields
                .dimension("moe_latent_size")?
                .filter(|&latent| latent != hidden),
            shared,
            shared_gate: fields.has("shared_expert_intermediate_size") && shared > 0,
            bias: family.expert_bias,
            bare_router: fields.has("n_routed_experts"),
            names: family.experts,
            layers: SparseLayers::read(fields)?,
        }))
    }

    fn count(&self, tensors: &mut Tensors, layer: &str, hidden: Count, gated: bool) {
        let (experts, router) = self.names;
        let width = self.latent.unwrap_or(hidden);
        let (ups, down): (&[&str], &str) = if gated {
            (&["gate_proj", "up_proj"], "down_proj")
        } else {
            (&["fc1"], "fc2")
        };
        for up in ups {
            let path = format!("{layer}.{experts}.{up}");
            tensors.experts(&path, self.experts, self.intermediate, width, self.bias);
        }
        let path = format!("{layer}.{experts}.{down}");
        tensors.experts(&path, self.experts, width, self.intermediate, self.bias);
        if let Some(latent) = self.latent {
            tensors.matrix(&format!("{layer}.mixer.fc1_latent_proj"), latent, hidden);
            tensors.matrix(&format!("{layer}.mixer.fc2_latent_proj"), hidden, latent);
        }
        if self.bare_router {
            tensors.plain(self.experts.all * (hidden + 1));
        } else {
            tensors.linear(&format!("{layer}.{router}"), self.experts.all, hidden, self.bias);
        }
        let matrices = if gated { 3 } else { 2 };
        for _ in 0..matrices - 1 {
            tensors.matrix(&format!("{layer}.mlp.shared_expert"), self.shared, hidden);
        }
        tensors.matrix(&format!("{layer}.mlp.shared_expert"), hidden, self.shared);
        if self.shared_gate {
            tensors.matrix(&format!("{layer}.mlp.shared_expert_gate"), 1, hidden);
        }
    }
}

impl FeedForward {
    pub(super) fn read(fields: &Fields<'_>, family: &Family) -> Result<Self, EstimateError> {
        let hidden = fields.required("hidden_size")?;
        let intermediate = if family.stack == Stack::ShortConvolution {
            short_convolution_width(fields)?
        } else {
            fields.any_dimension(&["intermediate_size_mlp", "intermediate_size", "ffn_hidden_size"])?
        };
        Ok(Self {
            hidden,
            intermediate,
            gated: family.gated,
            bias: family.mlp_bias.read(fields)?,
            fused: family.fused_mlp,
            name: match family.stack {
                Stack::ShortConvolution | Stack::Jamba | Stack::Parallel => "feed_forward",
                Stack::Pattern => "mixer",
                _ => "mlp",
            },
            mixture: Mixture::read(fields, family, hidden)?,
        })
    }

    /// Counts what the layer with this index has.
    pub(super) fn count(
        &self,
        tensors: &mut Tensors,
        layer: &str,
        index: u64,
        fields: &Fields<'_>,
    ) -> Result<(), EstimateError> {
        match &self.mixture {
            Some(mixture) if mixture.layers.contains(index) => {
                mixture.count(tensors, layer, self.hidden, self.gated);
                Ok(())
            }
            _ => self.count_dense(tensors, layer, fields),
        }
    }

    /// Counts an MLP.
    pub(super) fn count_dense(
        &self,
        tensors: &mut Tensors,
        layer: &str,
        fields: &Fields<'_>,
    ) -> Result<(), EstimateError> {
        let width = self
            .intermediate
            .ok_or_else(|| fields.missing("intermediate_size"))?;
        let name = self.name;
        match (self.gated, self.fused) {
            (true, true) => {
                tensors.linear(
                    &format!("{layer}.{name}.gate_up_proj"),
                    2 * width,
                    self.hidden,
                    self.bias,
                );
            }
            (true, false) => {
                tensors.linear(
                    &format!("{layer}.{name}.gate_proj"),
                    width,
                    self.hidden,
                    self.bias,
                );
                tensors.linear(&format!("{layer}.{name}.up_proj"), width, self.hidden, self.bias);
            }
            (false, _) => tensors.linear(&format!("{layer}.{name}.up_proj"), width, self.hidden, self.bias),
        }
        tensors.linear(
            &format!("{layer}.{name}.down_proj"),
            self.hidden,
            width,
            self.bias,
        );
        Ok(())
    }

    /// Counts experts where the layer has nothing else.
    pub(super) fn count_sparse(
        &self,
        tensors: &mut Tensors,
        layer: &str,
        fields: &Fields<'_>,
    ) -> Result<(), EstimateError> {
        let mixture = self
            .mixture
            .as_ref()
            .ok_or_else(|| fields.missing("n_routed_experts"))?;
        mixture.count(tensors, layer, self.hidden, self.gated);
        Ok(())
    }
}

/// LFM2 states the width before it is scaled and rounded, unless it states the width itself.
fn short_convolution_width(fields: &Fields<'_>) -> Result<Option<Count>, EstimateError> {
    let Some(width) = fields.any_dimension(&["block_ff_dim", "intermediate_size"])? else {
        return Ok(None);
    };
    if !fields.flag("block_auto_adjust_ff_dim", false)? {
        return Ok(Some(width));
    }
    let scaled = match fields.value("block_ffn_dim_multiplier").and_then(Value::as_f64) {
        Some(factor) if (0.0..=1024.0).contains(&factor) => (factor * (2 * width / 3) as f64) as Count,
        Some(_) => return Err(fields.invalid("block_ffn_dim_multiplier", "a number from 0 to 1024")),
        None => 2 * width / 3,
    };
    let multiple = fields.dimension("block_multiple_of")?.unwrap_or(256);
    Ok(Some(scaled.div_ceil(multiple) * multiple))
}
