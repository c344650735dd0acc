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

/// The family that has names of its own for experts.
const MIXTRAL: &str = "mixtral";

/// What the names of a layer's experts begin with.
fn experts_prefix(spec: &DecoderSpec, layer: usize) -> String {
    let prefix = hugging_face_prefix(spec);
    let part = if spec.model_type == MIXTRAL {
        "block_sparse_moe"
    } else {
        "mlp"
    };
    format!("{prefix}model.layers.{layer}.{part}")
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
    /// What scores the experts.
    Router,
    /// A matrix of the expert of this number.
    Expert(usize, Projection),
    /// A matrix of the MLP that every token passes besides.
    SharedExpert(Projection),
    /// What weighs that MLP.
    SharedGate,
}

/// A matrix of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Projection {
    Gate,
    Up,
    Down,
}

impl Projection {
    pub(crate) const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    fn hugging_face(self) -> &'static str {
        match self {
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// What Mixtral's first files call it.
    fn numbered(self) -> &'static str {
        match self {
            Self::Gate => "w1",
            Self::Up => "w3",
            Self::Down => "w2",
        }
    }

    fn gguf(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
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
                    Part::SharedGate => "mlp.shared_expert_gate",
                    Part::Router => return format!("{}.gate", experts_prefix(spec, layer)),
                    Part::Expert(number, projection) => {
                        let name = if spec.model_type == MIXTRAL {
                            projection.numbered()
                        } else {
                            projection.hugging_face()
                        };
                        return format!("{}.experts.{number}.{name}", experts_prefix(spec, layer));
                    }
                    Part::SharedExpert(projection) => {
                        let name = projection.hugging_face();
                        return format!("{prefix}model.layers.{layer}.mlp.shared_expert.{name}");
                    }
                };
                (layer, part)
            }
        };
        format!("{prefix}model.layers.{layer}.{part}")
    }

    /// The name that a checkpoint in MLX's layout gives to the same matrices of all experts, one after the other.
    pub(crate) fn stacked(self, spec: &DecoderSpec) -> Option<String> {
        let Self::InLayer(layer, Part::Expert(_, projection)) = self else {
            return None;
        };
        let name = projection.hugging_face();
        Some(format!("{}.switch_mlp.{name}", experts_prefix(spec, layer)))
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
                    Part::Router => "ffn_gate_inp",
                    Part::SharedGate => "ffn_gate_inp_shexp",
                    Part::Expert(_, projection) => {
                        return format!("blk.{layer}.ffn_{}_exps", projection.gguf());
                    }
                    Part::SharedExpert(projection) => {
                        return format!("blk.{layer}.ffn_{}_shexp", projection.gguf());
                    }
                };
                (layer, part)
            }
        };
        format!("blk.{layer}.{part}")
    }
}
