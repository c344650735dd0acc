//! What mixes tokens: attention and its recurrent relatives, with the state that each keeps.

use super::EstimateError;
use super::family::{Family, QkNorm, Stack};
use super::fields::{Count, Fields};
use super::tensors::Tensors;

/// Bytes that the layers so far keep of what they have seen.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cached {
    /// For each token.
    pub(super) per_token: Count,
    /// For each token within the window.
    pub(super) per_windowed_token: Count,
    /// Once.
    pub(super) state: Count,
}

/// The dimensions of an attention with grouped heads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    hidden: Count,
    heads: Count,
    kv_heads: Count,
    head_dim: Count,
    qkv_bias: bool,
    out_bias: bool,
}

impl Attention {
    pub(super) fn read(fields: &Fields<'_>, family: &Family) -> Result<Self, EstimateError> {
        let hidden = fields.required("hidden_size")?;
        let gemma3 = matches!(fields.text("model_type")?, Some("gemma3" | "gemma3_text"));
        // Gemma 3's configurations leave out what is the default of its class.
        let (heads, kv_heads, head_dim) = if gemma3 {
            (Some(8), Some(4), Some(256))
        } else {
            (None, None, None)
        };
        let heads = fields
            .dimension("num_attention_heads")?
            .or(heads)
            .ok_or_else(|| fields.missing("num_attention_heads"))?;
        let head_dim = match fields.dimension("head_dim")?.or(head_dim) {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(fields.invalid(
                    "num_attention_heads",
                    "a divisor of `hidden_size`, or `head_dim` beside it",
                ));
            }
        };
        let kv_heads = fields
            .dimension("num_key_value_heads")?
            .or(kv_heads)
            .unwrap_or(heads);
        if kv_heads > heads {
            return Err(fields.invalid("num_key_value_heads", "at most `num_attention_heads`"));
        }
        Ok(Self {
            hidden,
            heads,
            kv_heads,
            head_dim,
            qkv_bias: family.qkv_bias.read(fields)?,
            out_bias: family.out_bias.read(fields)?,
        })
    }

    /// Counts one layer. What a token leaves in the cache comes back.
    pub(super) fn count(&self, tensors: &mut Tensors, layer: &str, family: &Family) -> Count {
        let queries = self.heads * self.head_dim * if family.output_gate { 2 } else { 1 };
        let keys = self.kv_heads * self.head_dim;
        if family.fused_qkv {
            tensors.linear(
                &format!("{layer}.qkv_proj"),
                queries + 2 * keys,
                self.hidden,
                self.qkv_bias,
            );
        } else {
            for (name, rows) in [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)] {
                tensors.linear(&format!("{layer}.{name}"), rows, self.hidden, self.qkv_bias);
            }
        }
        tensors.linear(
            &format!("{layer}.o_proj"),
            self.hidden,
            self.heads * self.head_dim,
            self.out_bias,
        );
        tensors.plain(match family.qk_norm {
            QkNorm::None => 0,
            QkNorm::PerHead => 2 * self.head_dim,
            QkNorm::AllHeads => self.heads * self.head_dim + keys,
        });
        2 * keys * tensors.element_bytes()
    }
}

/// What chooses the tokens that DeepSeek's sparse attention sees. It has keys of its own, one a token.
#[derive(Clone, Copy, Debug)]
struct Indexer {
    heads: Count,
    head_dim: Count,
}

/// DeepSeek's attention, whose cache holds one compressed vector a token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Latent {
    hidden: Count,
    heads: Count,
    query_rank: Option<Count>,
    rank: Count,
    rope: Count,
    nope: Count,
    value: Count,
    bias: bool,
    indexer: Option<Indexer>,
}

impl Latent {
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self, EstimateError> {
        Ok(Self {
            hidden: fields.required("hidden_size")?,
            heads: fields.required("num_attention_heads")?,
            query_rank: fields.dimension("q_lora_rank")?,
            rank: fields.required("kv_lora_rank")?,
            rope: fields.required("qk_rope_head_dim")?,
            nope: fields.required("qk_nope_head_dim")?,
            value: fields.required("v_head_dim")?,
            bias: fields.flag("attention_bias", false)?,
            indexer: match fields.dimension("index_n_heads")? {
                Some(heads) => Some(Indexer {
                    heads,
                    head_dim: fields.required("index_head_dim")?,
                }),
                None => None,
            },
        })
    }

    /// Counts one layer in mlx-lm's layout, where the matrix that expands the keys is stored transposed.
    pub(super) fn count(&self, tensors: &mut Tensors, layer: &str) -> Count {
        let queries = self.heads * (self.nope + self.rope);
        match self.query_rank {
            Some(rank) => {
                tensors.linear(&format!("{layer}.q_a_proj"), rank, self.hidden, self.bias);
                tensors.plain(rank);
                tensors.matrix(&format!("{layer}.q_b_proj"), queries, rank);
            }
            None => tensors.matrix(&format!("{layer}.q_proj"), queries, self.hidden),
        }
        tensors.linear(
            &format!("{layer}.kv_a_proj_with_mqa"),
            self.rank + self.rope,
            self.hidden,
            self.bias,
        );
        tensors.plain(self.rank);
        tensors.matrix(&format!("{layer}.embed_q"), self.heads * self.rank, self.nope);
        tensors.matrix(
            &format!("{layer}.unembed_out"),
            self.heads * self.value,
            self.rank,
        );
        tensors.linear(
            &format!("{layer}.o_proj"),
            self.hidden,
            self.heads * self.value,
            self.bias,
        );
        let indexed = self
            .indexer
            .map_or(0, |indexer| self.count_indexer(indexer, tensors, layer));
        (self.rank + self.rope + indexed) * tensors.element_bytes()
    }

    /// Counts the indexer of a layer. The numbers of a token in its cache come back.
    fn count_indexer(&self, indexer: Indexer, tensors: &mut Tensors, layer: &str) -> Count {
        let Indexer { heads, head_dim } = indexer;
        // It takes the queries where they are compressed.
        let query = self.query_rank.unwrap_or(self.hidden);
        tensors.matrix(&format!("{layer}.indexer.wq_b"), heads * head_dim, query);
        tensors.matrix(&format!("{layer}.indexer.wk"), head_dim, self.hidden);
        tensors.plain(2 * head_dim);
        tensors.matrix(&format!("{layer}.indexer.weights_proj"), heads, self.hidden);
        head_dim
    }
}

/// Mamba 2 (Dao and Gu, 2024).
#[derive(Clone, Copy, Debug)]
pub(super) struct Mamba2 {
    hidden: Count,
    heads: Count,
    head_dim: Count,
    groups: Count,
    state: Count,
    kernel: Count,
    in_bias: bool,
    out_bias: bool,
    kernel_bias: bool,
    norm: bool,
}

impl Mamba2 {
    pub(super) fn read(fields: &Fields<'_>, family: &Family) -> Result<Self, EstimateError> {
        let one_of = |names: &[&str]| -> Result<Count, EstimateError> {
            fields
                .any_dimension(names)?
                .ok_or_else(|| fields.missing(names[0]))
        };
        let parallel = family.stack == Stack::Parallel;
        let own = family.stack == Stack::Mamba2;
        let in_bias = fields.flag(if own { "use_bias" } else { "mamba_proj_bias" }, false)?;
        let (heads, head_dim): (&[&str], &[&str]) = if own {
            (&["num_heads"], &["head_dim"])
        } else {
            (
                &["mamba_n_heads", "mamba_num_heads"],
                &["mamba_d_head", "mamba_head_dim"],
            )
        };
        Ok(Self {
            hidden: fields.required("hidden_size")?,
            heads: one_of(heads)?,
            head_dim: one_of(head_dim)?,
            groups: one_of(&["mamba_n_groups", "n_groups"])?,
            state: one_of(&["mamba_d_state", "ssm_state_size", "state_size"])?,
            kernel: one_of(&["mamba_d_conv", "conv_kernel"])?,
            in_bias,
            out_bias: if parallel {
                fields.flag("projectors_bias", false)?
            } else {
                in_bias
            },
            kernel_bias: fields.flag(
                if fields.has("mamba_conv_bias") {
                    "mamba_conv_bias"
                } else {
                    "use_conv_bias"
                },
                true,
            )?,
            norm: !parallel || fields.flag("mamba_rms_norm", false)?,
        })
    }

    /// Counts one layer. The state, which mlx-lm keeps in float32, and the tail of the convolution come back.
    pub(super) fn count(&self, tensors: &mut Tensors, layer: &str) -> Count {
        let inner = self.heads * self.head_dim;
        let channels = inner + 2 * self.groups * self.state;
        tensors.linear(
            &format!("{layer}.in_proj"),
            inner + channels + self.heads,
            self.hidden,
            self.in_bias,
        );
        tensors.plain(channels * self.kernel + if self.kernel_bias { channels } else { 0 });
        tensors.plain(3 * self.heads + if self.norm { inner } else { 0 });
        tensors.linear(&format!("{layer}.out_proj"), self.hidden, inner, self.out_bias);
        4 * inner * self.state + (self.kernel - 1) * channels * tensors.element_bytes()
    }
}

/// Mamba (Gu and Dao, 2023).
#[derive(Clone, Copy, Debug)]
pub(super) struct Mamba {
    hidden: Count,
    inner: Count,
    state: Count,
    kernel: Count,
    rank: Count,
    bias: bool,
    kernel_bias: bool,
    /// Jamba normalizes the step, B and C.
    norms: bool,
}

impl Mamba {
    pub(super) fn read(fields: &Fields<'_>, family: &Family) -> Result<Self, EstimateError> {
        let hidden = fields.required("hidden_size")?;
        let jamba = family.stack == Stack::Jamba;
        let names = if jamba {
            [
                "mamba_d_state",
                "mamba_d_conv",
                "mamba_dt_rank",
                "mamba_proj_bias",
                "mamba_conv_bias",
            ]
        } else {
            [
                "state_size",
                "conv_kernel",
                "time_step_rank",
                "use_bias",
                "use_conv_bias",
            ]
        };
        let [state, kernel, rank, bias, kernel_bias] = names;
        let inner = if jamba {
            fields.dimension("mamba_expand")?.unwrap_or(2) * hidden
        } else {
            fields.required("intermediate_size")?
        };
        let automatic = fields.value(rank).is_none_or(|value| value == "auto");
        Ok(Self {
            hidden,
            inner,
            state: fields.required(state)?,
            kernel: fields.required(kernel)?,
            rank: if automatic {
                hidden.div_ceil(16)
            } else {
                fields.required(rank)?
            },
            bias: fields.flag(bias, false)?,
            kernel_bias: fields.flag(kernel_bias, true)?,
            norms: jamba,
        })
    }

    /// Counts one layer. The state and the tail of the convolution come back.
    pub(super) fn count(&self, tensors: &mut Tensors, layer: &str) -> Count {
        tensors.linear(
            &format!("{layer}.in_proj"),
            2 * self.inner,
            self.hidden,
            self.bias,
        );
        tensors.plain(self.inner * self.kernel + if self.kernel_bias { self.inner } else { 0 });
        tensors.matrix(&format!("{layer}.x_proj"), self.rank + 2 * self.state, self.inner);
        tensors.linear(&format!("{layer}.dt_proj"), self.inner, self.rank, true);
        tensors.plain(self.inner * self.state + self.inner);
        tensors.plain(if self.norms { self.rank + 2 * self.state } else { 0 });
        tensors.linear(&format!("{layer}.out_proj"), self.hidden, self.inner, self.bias);
        self.inner * (self.state + self.kernel - 1) * tensors.element_bytes()
    }
}

/// The gated delta net (Yang and others, 2024) of Qwen3-Next and Qwen3.5.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeltaNet {
    hidden: Count,
    key_heads: Count,
    value_heads: Count,
    key_dim: Count,
    value_dim: Count,
    kernel: Count,
}

impl DeltaNet {
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self, EstimateError> {
        Ok(Self {
            hidden: fields.required("hidden_size")?,
            key_heads: fields.required("linear_num_key_heads")?,
            value_heads: fields.required("linear_num_value_heads")?,
            key_dim: fields.required("linear_key_head_dim")?,
            value_dim: fields.required("linear_value_head_dim")?,
            kernel: fields.required("linear_conv_kernel_dim")?,
        })
    }

    /// Counts one layer. The state, which mlx-lm keeps in float32, and the tail of the convolution come back.
    pub(super) fn count(&self, tensors: &mut Tensors, layer: &str) -> Count {
        let keys = self.key_heads * self.key_dim;
        let values = self.value_heads * self.value_dim;
        let channels = 2 * keys + values;
        tensors.matrix(&format!("{layer}.in_proj_qkvz"), channels + values, self.hidden);
        tensors.matrix(&format!("{layer}.in_proj_ba"), 2 * self.value_heads, self.hidden);
        tensors.plain(channels * self.kernel + 2 * self.value_heads + self.value_dim);
        tensors.matrix(&format!("{layer}.out_proj"), self.hidden, values);
        4 * values * self.key_dim + (self.kernel - 1) * channels * tensors.element_bytes()
    }
}

/// The short convolution of LFM2.
#[derive(Clone, Copy, Debug)]
pub(super) struct ShortConvolution {
    hidden: Count,
    kernel: Count,
    bias: bool,
}

impl ShortConvolution {
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self, EstimateError> {
        Ok(Self {
            hidden: fields.required("hidden_size")?,
            kernel: fields.required("conv_L_cache")?,
            bias: fields.flag("conv_bias", false)?,
        })
    }

    /// Counts one layer. The tail of the convolution comes back.
    pub(super) fn count(&self, tensors: &mut Tensors, layer: &str) -> Count {
        tensors.linear(
            &format!("{layer}.in_proj"),
            3 * self.hidden,
            self.hidden,
            self.bias,
        );
        tensors.plain(self.hidden * self.kernel + if self.bias { self.hidden } else { 0 });
        tensors.linear(&format!("{layer}.out_proj"), self.hidden, self.hidden, self.bias);
        (self.kernel - 1) * self.hidden * tensors.element_bytes()
    }
}
