//! What a decoder looks like.

/// A decoder-only transformer, as far as families differ.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// The family: `model_type` of `config.json` or `general.architecture` of GGUF.
    pub model_type: String,
    /// Tokens of the vocabulary, with padding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Added to the mean square in RMS norm.
    pub norm_eps: f32,
    /// The rotary position embedding.
    pub rope: RopeSpec,
    /// Whether the projections to queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the projection out of the attention has one.
    pub output_bias: bool,
    /// Whether the projections of the MLP have them.
    pub mlp_bias: bool,
    /// Whether each head of queries and keys is normalized before it is rotated.
    pub qk_norm: bool,
    /// Whether the logits use the embedding's matrix.
    pub tied_embeddings: bool,
    /// Tokens that the model was trained for.
    pub context_length: usize,
}

/// The rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// The base of the frequencies.
    pub theta: f32,
    /// Whether neighbours are rotated (GGUF's order of the Llama family) and not halves.
    pub interleaved: bool,
    /// How the frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// How the frequencies of the rotary embedding are changed for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions are divided by a factor.
    Linear(f32),
    /// Llama 3.1's: low frequencies are divided, high ones kept, those between blended.
    Llama3 {
        /// What low frequencies are divided by.
        factor: f32,
        /// Wavelengths above `original_context / low_frequency_factor` are low frequencies.
        low_frequency_factor: f32,
        /// Wavelengths below `original_context / high_frequency_factor` are high ones.
        high_frequency_factor: f32,
        /// Tokens of the context before it was made longer.
        original_context: f32,
    },
    /// Each frequency is divided by a factor of its own, which GGUF keeps as the tensor `rope_freqs.weight`.
    Factors(Vec<f32>),
}

impl RopeSpec {
    /// The wavelengths to hand to MLX, one for each pair, or `None` where the base says it all.
    ///
    /// The formula is that of Llama 3.1's reference code, which mlx-lm follows in `rope_utils.py`.
    pub(crate) fn wavelengths(&self, head_dim: usize) -> Option<Vec<f32>> {
        let base = self.plain_wavelengths(head_dim).into_iter();
        match &self.scaling {
            RopeScaling::None | RopeScaling::Linear(_) => None,
            RopeScaling::Factors(factors) => {
                Some(base.zip(factors).map(|(base, factor)| base * factor).collect())
            }
            &RopeScaling::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_context,
            } => {
                let low = original_context / low_frequency_factor;
                let high = original_context / high_frequency_factor;
                let scaled = base.map(|base| {
                    let wavelength = 2.0 * std::f32::consts::PI * base;
                    if wavelength > low {
                        base * factor
                    } else if wavelength < high {
                        base
                    } else {
                        let smooth = (original_context / wavelength - low_frequency_factor)
                            / (high_frequency_factor - low_frequency_factor);
                        base / ((1.0 - smooth) / factor + smooth)
                    }
                });
                Some(scaled.collect())
            }
        }
    }

    /// The wavelengths that the base alone makes, one for each pair.
    pub(crate) fn plain_wavelengths(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| self.theta.powf(2.0 * i as f32 / head_dim as f32))
            .collect()
    }

    /// What positions are multiplied by.
    pub(crate) fn scale(&self) -> f32 {
        if let RopeScaling::Linear(factor) = self.scaling {
            1.0 / factor
        } else {
            1.0
        }
    }
}

impl DecoderSpec {
    /// Bytes that the keys and values of one token take, with elements of `element_bytes`.
    pub fn kv_bytes_per_token(&self, element_bytes: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * element_bytes
    }

    /// The number of weights.
    pub fn parameters(&self) -> u64 {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let attention = self.hidden_size * (2 * queries + 2 * keys);
        let biases = if self.qkv_bias { queries + 2 * keys } else { 0 };
        let norms = 2 * self.hidden_size + if self.qk_norm { 2 * self.head_dim } else { 0 };
        let block = attention + biases + norms + 3 * self.hidden_size * self.intermediate_size;
        let embeddings = if self.tied_embeddings { 1 } else { 2 } * self.vocab_size * self.hidden_size;
        (self.layers * block + embeddings + self.hidden_size) as u64
    }

    /// Checks what the layers rely on.
    pub(crate) fn validate(self) -> Result<Self, crate::ModelError> {
        let sizes = [
            ("the vocabulary", self.vocab_size),
            ("the hidden size", self.hidden_size),
            ("the number of layers", self.layers),
            ("the number of heads", self.heads),
            ("the number of key and value heads", self.kv_heads),
            ("the head size", self.head_dim),
            ("the intermediate size", self.intermediate_size),
            ("the context length", self.context_length),
        ];
        for (what, size) in sizes {
            // MLX counts in 32 bits.
            if size == 0 || i32::try_from(size).is_err() {
                return Err(crate::ModelError::config(format!("{what} is {size}")));
            }
        }
        let factor = match &self.rope.scaling {
            RopeScaling::Linear(factor) | RopeScaling::Llama3 { factor, .. } => *factor,
            RopeScaling::None | RopeScaling::Factors(_) => 1.0,
        };
        let positive = [
            ("the base of the rotary embedding", self.rope.theta),
            ("the factor of the rotary embedding", factor),
            ("the epsilon of the norms", self.norm_eps),
        ];
        for (what, number) in positive {
            if !(number > 0.0 && number.is_finite()) {
                return Err(crate::ModelError::config(format!(
                    "{what} is {number}, expected a number above 0"
                )));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let message = format!(
                "{} heads cannot share {} key and value heads",
                self.heads, self.kv_heads
            );
            return Err(crate::ModelError::config(message));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(crate::ModelError::config(format!(
                "the head size {} is odd",
                self.head_dim
            )));
        }
        if let RopeScaling::Factors(factors) = &self.rope.scaling
            && factors.len() != self.head_dim / 2
        {
            let message = format!("{} rope factors for heads of {}", factors.len(), self.head_dim);
            return Err(crate::ModelError::config(message));
        }
        Ok(self)
    }
}
