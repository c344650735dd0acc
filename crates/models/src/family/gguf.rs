//! A GGUF file as families read it.

use mlx_engine_checkpoint::{GgufFile, Metadata};

use crate::spec::{Activation, NormPlacement, QkNorm};
use crate::{DecoderSpec, LayerAttention, ModelError, RopeScaling, RopeSpec};

/// The keys of an architecture.
pub(super) struct Keys<'a> {
    file: &'a GgufFile,
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    pub(super) fn new(file: &'a GgufFile) -> Result<Self, ModelError> {
        let metadata = file.metadata();
        Ok(Self {
            file,
            metadata,
            architecture: metadata.string("general.architecture")?,
        })
    }

    pub(super) fn architecture(&self) -> &'a str {
        self.architecture
    }

    /// Whether the file has a tensor of this name.
    pub(super) fn has(&self, tensor: &str) -> bool {
        self.file.tensor(tensor).is_some()
    }

    /// The decoder of the family of Llama with these numbers, from which other families differ in some points.
    pub(super) fn llama(&self) -> Result<DecoderSpec, ModelError> {
        let hidden_size = self.size("embedding_length")?;
        let heads = self.size("attention.head_count")?;
        let embedding = self.file.tensor("token_embd.weight");
        let head_dim = self
            .optional_size("attention.key_length")?
            .unwrap_or(hidden_size.checked_div(heads).unwrap_or(0));
        Ok(DecoderSpec {
            model_type: self.architecture.to_owned(),
            // The tensor decides: the metadata of some files leaves padding out.
            vocab_size: embedding
                .and_then(|tensor| tensor.shape.first().copied())
                .unwrap_or(0),
            hidden_size,
            layers: self.size("block_count")?,
            heads,
            kv_heads: self.optional_size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            intermediate_size: self.size("feed_forward_length")?,
            experts: None,
            norm_eps: self.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
            norms: NormPlacement::Before,
            norms_from_one: false,
            attention: vec![LayerAttention {
                window: None,
                rope: Some(self.rope()?),
            }],
            attention_pattern: vec![0],
            attention_scale: (head_dim as f32).sqrt().recip(),
            attention_softcap: None,
            qkv_bias: self.has("blk.0.attn_q.bias"),
            output_bias: self.has("blk.0.attn_output.bias"),
            mlp_bias: self.has("blk.0.ffn_gate.bias"),
            qk_norm: if self.has("blk.0.attn_q_norm.weight") {
                QkNorm::PerHead
            } else {
                QkNorm::None
            },
            activation: Activation::Silu,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_softcap: None,
            tied_embeddings: !self.has("output.weight"),
            context_length: self.size("context_length")?,
        })
    }

    /// The rotary embedding of layers that see everything.
    pub(super) fn rope(&self) -> Result<RopeSpec, ModelError> {
        let factors = self
            .file
            .tensor("rope_freqs.weight")
            .map(|tensor| tensor.dequantize())
            .transpose()?;
        Ok(RopeSpec {
            theta: self.number("rope.freq_base")?.unwrap_or(10_000.0),
            // The converter permutes the rows of the Llama family's queries and keys.
            interleaved: self.architecture == "llama",
            scaling: self.rope_scaling(factors)?,
        })
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let value = self
            .metadata
            .optional_u64(&format!("{}.{key}", self.architecture))?;
        Ok(value.and_then(|size| usize::try_from(size).ok()))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, ModelError> {
        let value = self.metadata.u64(&format!("{}.{key}", self.architecture))?;
        usize::try_from(value).map_err(|_| ModelError::config(format!("`{key}` is {value}")))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
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
