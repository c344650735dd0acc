//! The names that checkpoints give to a decoder's tensors.

use crate::DecoderSpec;
use crate::spec::NormPlacement;

/// What the names in Hugging Face's layout begin with, where a text model is a part of another.
pub(crate) fn hugging_face_prefix(spec: &DecoderSpec) -> &'static str {
    if spec.model_type == "gemma3" {
        "language_model."
    } else {
        ""
    }
}

/// A tensor's place in a decoder. Layers count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Embedding,
    FinalNorm,
    Output,
    InLayer(usize, Part),
}

/// A tensor's place in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    AttentionNorm,
    PostAttentionNorm,
    Query,
    Key,
    Value,
    AttentionOutput,
    QueryNorm,
    KeyNorm,
    MlpNorm,
    PostMlpNorm,
    Gate,
    Up,
    Down,
}

impl Place {
    /// Whether the tensor is a norm's, which is a vector and no matrix.
    pub(crate) fn is_norm(self) -> bool {
        match self {
            Self::FinalNorm => true,
            Self::Embedding | Self::Output => false,
            Self::InLayer(_, part) => matches!(
                part,
                Part::AttentionNorm
                    | Part::PostAttentionNorm
                    | Part::QueryNorm
                    | Part::KeyNorm
                    | Part::MlpNorm
                    | Part::PostMlpNorm
            ),
        }
    }

    /// Whether what the matrix makes is rotated by position.
    pub(crate) fn is_rotated(self) -> bool {
        matches!(self, Self::InLayer(_, Part::Query | Part::Key))
    }

    /// The name in Hugging Face's and MLX's layout, without `.weight`.
    pub(crate) fn hugging_face(self, spec: &DecoderSpec) -> String {
        let prefix = hugging_face_prefix(spec);
        let (layer, part) = match self {
            Self::Embedding => return format!("{prefix}model.embed_tokens"),
            Self::FinalNorm => return format!("{prefix}model.norm"),
            Self::Output => return format!("{prefix}lm_head"),
            Self::InLayer(layer, part) => {
                let part = match part {
                    Part::AttentionNorm => "input_layernorm",
                    Part::Query => "self_attn.q_proj",
                    Part::Key => "self_attn.k_proj",
                    Part::Value => "self_attn.v_proj",
                    Part::AttentionOutput => "self_attn.o_proj",
                    Part::QueryNorm => "self_attn.q_norm",
                    Part::KeyNorm => "self_attn.k_norm",
                    // The norm that others have before the MLP lends its name to the one that lies where it says.
                    Part::MlpNorm if spec.norms == NormPlacement::Around => "pre_feedforward_layernorm",
                    Part::PostAttentionNorm | Part::MlpNorm => "post_attention_layernorm",
                    Part::PostMlpNorm => "post_feedforward_layernorm",
                    Part::Gate => "mlp.gate_proj",
                    Part::Up => "mlp.up_proj",
                    Part::Down => "mlp.down_proj",
                };
                (layer, part)
            }
        };
        format!("{prefix}model.layers.{layer}.{part}")
    }

    /// The name in GGUF files, without `.weight`.
    pub(crate) fn gguf(self) -> String {
        let (layer, part) = match self {
            Self::Embedding => return "token_embd".to_owned(),
            Self::FinalNorm => return "output_norm".to_owned(),
            Self::Output => return "output".to_owned(),
            Self::InLayer(layer, part) => {
                let part = match part {
                    Part::AttentionNorm => "attn_norm",
                    Part::Query => "attn_q",
                    Part::Key => "attn_k",
                    Part::Value => "attn_v",
                    Part::AttentionOutput => "attn_output",
                    Part::QueryNorm => "attn_q_norm",
                    Part::KeyNorm => "attn_k_norm",
                    Part::PostAttentionNorm => "post_attention_norm",
                    Part::MlpNorm => "ffn_norm",
                    Part::PostMlpNorm => "post_ffw_norm",
                    Part::Gate => "ffn_gate",
                    Part::Up => "ffn_up",
                    Part::Down => "ffn_down",
                };
                (layer, part)
            }
        };
        format!("blk.{layer}.{part}")
    }
}
