//! What distinguishes the families of decoders, as far as counting goes.

use super::EstimateError;
use super::fields::Fields;

/// Whether a layer has biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bias {
    Never,
    Always,
    /// Where this field says so.
    Field(&'static str),
}

impl Bias {
    pub(super) fn read(self, fields: &Fields<'_>) -> Result<bool, EstimateError> {
        match self {
            Self::Never => Ok(false),
            Self::Always => Ok(true),
            Self::Field(field) => fields.flag(field, false),
        }
    }
}

/// How queries and keys are normalized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QkNorm {
    None,
    /// One weight for each dimension of a head.
    PerHead,
    /// One weight for each dimension of all heads.
    AllHeads,
}

/// How the output layer relates to the embedding where the configuration does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tied {
    Always,
    Never,
    Default(bool),
}

/// Which layers attend to a window alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Windows {
    /// Those that `layer_types` calls sliding; none without it.
    Listed,
    /// All, where `sliding_window` is there.
    All,
    /// All but each nth, where `layer_types` is missing; `sliding_window_pattern` overrides the number.
    AllBut(u64),
    /// As [`All`](Self::All) from `max_window_layers` on, where `use_sliding_window` says so.
    Switched,
}

/// What of a token is mixed with what came before, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stack {
    /// Attention in each layer.
    Attention,
    /// Attention whose keys and values are compressed: DeepSeek's MLA.
    Latent,
    /// The first generation of Mamba in each layer.
    Mamba,
    /// The second generation of Mamba in each layer.
    Mamba2,
    /// Mamba 2 beside attention in each layer.
    Parallel,
    /// Gated delta nets, and attention in each nth layer.
    DeltaNet,
    /// Short convolutions, and attention in the layers that are listed.
    ShortConvolution,
    /// Mamba 2 or attention, as `layer_types` lists them.
    ListedMamba2,
    /// One of Mamba 2, attention, MLP and experts a layer, as a pattern says.
    Pattern,
    /// Mamba, and attention in each nth layer.
    Jamba,
}

/// A family of decoders.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    pub(super) stack: Stack,
    pub(super) qkv_bias: Bias,
    pub(super) out_bias: Bias,
    pub(super) qk_norm: QkNorm,
    pub(super) windows: Windows,
    /// Norms of the hidden size in each layer.
    pub(super) norms: u8,
    pub(super) norm_bias: bool,
    /// Whether the MLP has a gate beside the up projection.
    pub(super) gated: bool,
    pub(super) mlp_bias: Bias,
    pub(super) expert_bias: bool,
    pub(super) tied: Tied,
    /// The queries bring a gate for the output of the attention.
    pub(super) output_gate: bool,
    /// Q, K and V are one matrix.
    pub(super) fused_qkv: bool,
    /// Gate and up are one matrix.
    pub(super) fused_mlp: bool,
    /// The name of the module with the experts, and of the router.
    pub(super) experts: (&'static str, &'static str),
    /// Whether this is a family whose layout is known, not one that is taken for a Llama.
    pub(super) known: bool,
}

/// A Llama, which most families differ from in a line or two.
const LLAMA: Family = Family {
    stack: Stack::Attention,
    qkv_bias: Bias::Field("attention_bias"),
    out_bias: Bias::Field("attention_bias"),
    qk_norm: QkNorm::None,
    windows: Windows::Listed,
    norms: 2,
    norm_bias: false,
    gated: true,
    mlp_bias: Bias::Field("mlp_bias"),
    expert_bias: false,
    tied: Tied::Default(true),
    output_gate: false,
    fused_qkv: false,
    fused_mlp: false,
    experts: ("mlp.switch_mlp", "mlp.gate"),
    known: true,
};

const QWEN2: Family = Family {
    qkv_bias: Bias::Always,
    out_bias: Bias::Never,
    windows: Windows::Switched,
    ..LLAMA
};

const QWEN3: Family = Family {
    qk_norm: QkNorm::PerHead,
    windows: Windows::Switched,
    ..LLAMA
};

const GEMMA3: Family = Family {
    qk_norm: QkNorm::PerHead,
    windows: Windows::AllBut(6),
    norms: 4,
    tied: Tied::Default(true),
    ..LLAMA
};

const DELTA_NET: Family = Family {
    stack: Stack::DeltaNet,
    qk_norm: QkNorm::PerHead,
    output_gate: true,
    tied: Tied::Default(false),
    ..LLAMA
};

const LATENT: Family = Family {
    stack: Stack::Latent,
    qkv_bias: Bias::Field("attention_bias"),
    tied: Tied::Never,
    ..LLAMA
};

const MIXTRAL: Family = Family {
    windows: Windows::All,
    tied: Tied::Default(false),
    experts: ("block_sparse_moe.switch_mlp", "block_sparse_moe.gate"),
    ..LLAMA
};

/// What marks a configuration that is no plain transformer: such a model cannot be taken for a Llama.
const MARKS_OF_OTHERS: [&str; 15] = [
    "altup_num_inputs",
    "block_configs",
    "compress_ratios",
    "conv_kernel",
    "head_size",
    "hidden_size_per_layer_input",
    "index_topk",
    "kv_lora_rank",
    "laurel_rank",
    "linear_attn_config",
    "linear_num_value_heads",
    "lru_width",
    "mamba_d_state",
    "ssm_cfg",
    "state_size",
];

impl Family {
    /// The family of a `model_type`.
    pub(super) fn of(model_type: &str, fields: &Fields<'_>) -> Result<Self, EstimateError> {
        let base = model_type.strip_suffix("_text").unwrap_or(model_type);
        Ok(match base {
            "llama4" => Self {
                tied: Tied::Default(false),
                ..LLAMA
            },
            "llama" | "mistral" | "ministral" | "ministral3" | "mistral3" | "granite" | "smollm3" => {
                let windows = if matches!(base, "mistral" | "mistral3") {
                    Windows::All
                } else {
                    Windows::Listed
                };
                Self { windows, ..LLAMA }
            }
            "seed_oss" => Self {
                out_bias: Bias::Field("attention_out_bias"),
                ..LLAMA
            },
            "ernie4_5" | "ernie4_5_moe" => Self {
                qkv_bias: Bias::Field("use_bias"),
                out_bias: Bias::Field("use_bias"),
                mlp_bias: Bias::Field("use_bias"),
                ..LLAMA
            },
            "qwen2" | "qwen2_vl" | "qwen2_5_vl" | "mimo" => QWEN2,
            "qwen2_moe" => Self {
                tied: Tied::Default(false),
                ..QWEN2
            },
            "qwen3" | "qwen3_vl" | "hunyuan_v1_dense" => QWEN3,
            "qwen3_moe" | "qwen3_vl_moe" => Self {
                tied: Tied::Default(false),
                ..QWEN3
            },
            "qwen3_next" | "qwen3_5" | "qwen3_5_moe" => DELTA_NET,
            "gemma" => Self {
                tied: Tied::Always,
                ..LLAMA
            },
            "gemma2" => Self {
                windows: Windows::AllBut(2),
                norms: 4,
                tied: Tied::Always,
                ..LLAMA
            },
            "gemma3" => GEMMA3,
            "phi3" => Self {
                windows: Windows::All,
                tied: Tied::Default(false),
                fused_qkv: true,
                fused_mlp: true,
                ..LLAMA
            },
            "phimoe" => Self {
                norm_bias: true,
                tied: Tied::Never,
                experts: ("block_sparse_moe.switch_mlp", "block_sparse_moe.gate"),
                ..LLAMA
            },
            "starcoder2" => Self {
                qkv_bias: Bias::Field("use_bias"),
                out_bias: Bias::Field("use_bias"),
                windows: Windows::All,
                norm_bias: true,
                gated: false,
                mlp_bias: Bias::Field("use_bias"),
                ..LLAMA
            },
            "cohere" => Self {
                norms: 1,
                tied: Tied::Always,
                ..LLAMA
            },
            "cohere2" => Self {
                windows: Windows::AllBut(4),
                norms: 1,
                tied: Tied::Always,
                ..LLAMA
            },
            "olmo2" | "olmo3" | "exaone4" => Self {
                qk_norm: if base == "exaone4" {
                    QkNorm::PerHead
                } else {
                    QkNorm::AllHeads
                },
                windows: if base == "olmo2" {
                    Windows::Listed
                } else {
                    Windows::AllBut(4)
                },
                tied: Tied::Default(false),
                ..LLAMA
            },
            "olmoe" => Self {
                qk_norm: QkNorm::AllHeads,
                tied: Tied::Default(false),
                ..LLAMA
            },
            "glm4" => Self {
                out_bias: Bias::Never,
                norms: 4,
                tied: Tied::Default(false),
                fused_mlp: true,
                ..LLAMA
            },
            "glm4_moe" => Self {
                out_bias: Bias::Never,
                qk_norm: if fields.flag("use_qk_norm", false)? {
                    QkNorm::PerHead
                } else {
                    QkNorm::None
                },
                tied: Tied::Default(false),
                ..LLAMA
            },
            "dots1" => Self {
                qk_norm: QkNorm::PerHead,
                tied: Tied::Default(false),
                ..LLAMA
            },
            "minimax" | "minimax_m2" => Self {
                qk_norm: if fields.flag("use_qk_norm", true)? {
                    QkNorm::AllHeads
                } else {
                    QkNorm::None
                },
                windows: Windows::Listed,
                ..MIXTRAL
            },
            "mixtral" => MIXTRAL,
            "granitemoe" => Self {
                tied: Tied::Default(true),
                windows: Windows::Listed,
                ..MIXTRAL
            },
            "gpt_oss" => Self {
                qkv_bias: Bias::Always,
                out_bias: Bias::Always,
                windows: Windows::AllBut(2),
                expert_bias: true,
                tied: Tied::Never,
                experts: ("mlp.experts", "mlp.router"),
                ..LLAMA
            },
            "deepseek_v2" | "deepseek_v3" | "deepseek_v32" | "glm_moe_dsa" | "kimi_k2" | "glm4_moe_lite" => {
                LATENT
            }
            "mamba" | "falcon_mamba" => Self {
                stack: Stack::Mamba,
                norms: 1,
                ..LLAMA
            },
            "mamba2" => Self {
                stack: Stack::Mamba2,
                norms: 1,
                ..LLAMA
            },
            "falcon_h1" => Self {
                stack: Stack::Parallel,
                ..LLAMA
            },
            "lfm2" | "lfm2_moe" => Self {
                stack: Stack::ShortConvolution,
                qk_norm: QkNorm::PerHead,
                tied: Tied::Always,
                experts: ("feed_forward.switch_mlp", "feed_forward.gate"),
                ..LLAMA
            },
            "granitemoehybrid" => Self {
                stack: Stack::ListedMamba2,
                experts: ("block_sparse_moe.switch_mlp", "block_sparse_moe.router.layer"),
                ..LLAMA
            },
            "nemotron_h" => Self {
                stack: Stack::Pattern,
                norms: 1,
                gated: false,
                tied: Tied::Never,
                experts: ("mixer.switch_mlp", "mixer.gate"),
                ..LLAMA
            },
            "jamba" => Self {
                stack: Stack::Jamba,
                experts: ("feed_forward.switch_mlp", "feed_forward.router"),
                ..LLAMA
            },
            _ => {
                if let Some(mark) = MARKS_OF_OTHERS.into_iter().find(|mark| fields.has(mark)) {
                    return Err(EstimateError::Unsupported {
                        model_type: model_type.to_owned(),
                        field: mark.to_owned(),
                    });
                }
                Self {
                    known: false,
                    tied: Tied::Default(false),
                    ..LLAMA
                }
            }
        })
    }
}
