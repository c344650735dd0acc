//! The names that checkpoints give to a decoder's tensors.

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
    Query,
    Key,
    Value,
    AttentionOutput,
    QueryNorm,
    KeyNorm,
    MlpNorm,
    Gate,
    Up,
    Down,
}

impl Place {
    /// The name in Hugging Face's and MLX's layout, without `.weight`.
    pub(crate) fn hugging_face(self) -> String {
        let (layer, part) = match self {
            Self::Embedding => return "model.embed_tokens".to_owned(),
            Self::FinalNorm => return "model.norm".to_owned(),
            Self::Output => return "lm_head".to_owned(),
            Self::InLayer(layer, part) => {
                let part = match part {
                    Part::AttentionNorm => "input_layernorm",
                    Part::Query => "self_attn.q_proj",
                    Part::Key => "self_attn.k_proj",
                    Part::Value => "self_attn.v_proj",
                    Part::AttentionOutput => "self_attn.o_proj",
                    Part::QueryNorm => "self_attn.q_norm",
                    Part::KeyNorm => "self_attn.k_norm",
                    Part::MlpNorm => "post_attention_layernorm",
                    Part::Gate => "mlp.gate_proj",
                    Part::Up => "mlp.up_proj",
                    Part::Down => "mlp.down_proj",
                };
                (layer, part)
            }
        };
        format!("model.layers.{layer}.{part}")
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
                    Part::MlpNorm => "ffn_norm",
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
