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
    /// The experts that layers have in place of one MLP.
    pub experts: Option<ExpertsSpec>,
    /// Added to the mean square in RMS norm.
    pub norm_eps: f32,
    /// Where a block has its norms.
    pub norms: NormPlacement,
    /// Whether the norms' weights are stored less 1, as Gemma's are in folders.
    pub norms_from_one: bool,
    /// The kinds of attention that layers have.
    pub attention: Vec<LayerAttention>,
    /// Which of them each layer has; from its end it begins again.
    pub attention_pattern: Vec<usize>,
    /// What scores are multiplied by.
    pub attention_scale: f32,
    /// Scores `s` become `cap * tanh(s / cap)`, as in Gemma 2.
    pub attention_softcap: Option<f32>,
    /// Whether the projections to queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the projection out of the attention has one.
    pub output_bias: bool,
    /// Whether the projections of the MLP have them.
    pub mlp_bias: bool,
    /// How queries and keys are normalized before they are rotated.
    pub qk_norm: QkNorm,
    /// The function between the two halves of the MLP.
    pub activation: Activation,
    /// What embeddings are multiplied by.
    pub embedding_scale: f32,
    /// What is multiplied with what attention and MLP add to the residual stream.
    pub residual_scale: f32,
    /// What logits are multiplied by.
    pub logit_scale: f32,
    /// Logits `l` become `cap * tanh(l / cap)`, as in Gemma 2.
    pub logit_softcap: Option<f32>,
    /// Whether the logits use the embedding's matrix.
    pub tied_embeddings: bool,
    /// Tokens that the model was trained for.
    pub context_length: usize,
}

/// A mixture of experts: each token chooses some of many MLPs, and adds up what they give.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertsSpec {
    /// How many there are.
    pub count: usize,
    /// How many of them a token chooses.
    pub active: usize,
    /// Width of each.
    pub intermediate_size: usize,
    /// Whether the weights of those that are chosen are made to add up to 1.
    pub normalized: bool,
    /// Width of an MLP that every token passes besides, weighted by a gate of its own.
    pub shared: Option<usize>,
    /// Whether a layer has experts, for each layer.
    pub layers: Vec<bool>,
}

/// What layers see and how they know positions.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerAttention {
    /// A token sees this many, itself included; all before it where `None`.
    pub window: Option<usize>,
    /// The rotary position embedding; none where `None`.
    pub rope: Option<RopeSpec>,
}

/// Where a block has its norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and MLP.
    Before,
    /// Before attention and MLP, and behind them, before they are added to the residual stream: Gemma.
    Around,
    /// Behind attention and MLP alone: OLMo 2.
    After,
}

impl NormPlacement {
    pub(crate) fn before(self) -> bool {
        self != Self::After
    }

    pub(crate) fn after(self) -> bool {
        self != Self::Before
    }
}

/// How queries and keys are normalized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Each head by itself: Qwen 3, Gemma 3.
    PerHead,
    /// All heads together: OLMo 2.
    AllHeads,
}

/// The function between the two halves of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The Gaussian error linear unit in its approximation by `tanh`.
    GeluTanh,
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
    /// More layers than any model has.
    pub(crate) const MOST_LAYERS: usize = 4096;

    /// The kind of attention that a layer has, an index of [`attention`](Self::attention).
    pub fn attention_kind(&self, layer: usize) -> usize {
        self.attention_pattern[layer % self.attention_pattern.len()]
    }

    /// Whether neighbours are rotated where positions are, as in GGUF files of the Llama family.
    pub(crate) fn is_interleaved(&self) -> bool {
        let mut ropes = self.attention.iter().filter_map(|kind| kind.rope.as_ref());
        ropes.any(|rope| rope.interleaved)
    }

    /// The attention of a layer.
    pub fn attention_of(&self, layer: usize) -> &LayerAttention {
        &self.attention[self.attention_kind(layer)]
    }

    /// The number of weights; the largest number where a file says of itself that it has more.
    pub fn parameters(&self) -> u64 {
        // Each size is less than 2^31, so that nothing here reaches 2^128.
        let wide = |size: usize| size as u128;
        let (hidden, head) = (wide(self.hidden_size), wide(self.head_dim));
        let (queries, keys) = (wide(self.heads) * head, wide(self.kv_heads) * head);
        let attention = hidden * (2 * queries + 2 * keys);
        let biases = if self.qkv_bias { queries + 2 * keys } else { 0 };
        let norms = if self.norms == NormPlacement::Around { 4 } else { 2 };
        let widths = self.qk_norm_widths();
        let of_heads = widths.map_or(0, |(query, key)| wide(query) + wide(key));
        let norms = norms * hidden + of_heads;
        let block = attention + biases + norms;
        let mlps: u128 = (0..self.layers).map(|layer| self.mlp_parameters(layer)).sum();
        let embeddings = if self.tied_embeddings { 1 } else { 2 } * wide(self.vocab_size) * hidden;
        let all = wide(self.layers) * block + mlps + embeddings + hidden;
        u64::try_from(all).unwrap_or(u64::MAX)
    }

    /// The number of weights of a layer's MLP, or of its experts and what chooses them.
    fn mlp_parameters(&self, layer: usize) -> u128 {
        let hidden = self.hidden_size as u128;
        let Some(experts) = self.experts_of(layer) else {
            return 3 * hidden * self.intermediate_size as u128;
        };
        let count = experts.count as u128;
        let wide = count * experts.intermediate_size as u128 + experts.shared.unwrap_or(0) as u128;
        hidden * (3 * wide + count + u128::from(experts.shared.is_some()))
    }

    /// The experts of a layer, where it has some.
    pub fn experts_of(&self, layer: usize) -> Option<&ExpertsSpec> {
        let experts = self.experts.as_ref()?;
        experts
            .layers
            .get(layer)
            .is_some_and(|&there| there)
            .then_some(experts)
    }

    /// The lengths of the weights of the norms of queries and keys, where there are any.
    pub(crate) fn qk_norm_widths(&self) -> Option<(usize, usize)> {
        match self.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some((self.head_dim, self.head_dim)),
            QkNorm::AllHeads => Some((self.heads * self.head_dim, self.kv_heads * self.head_dim)),
        }
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
        // Names are made for each, and what holds of a model is summed over them.
        if self.layers > Self::MOST_LAYERS {
            let message = format!("{} layers, supported: up to {}", self.layers, Self::MOST_LAYERS);
            return Err(crate::ModelError::config(message));
        }
        let scales = [
            ("the epsilon of the norms", self.norm_eps),
            ("the scale of the attention", self.attention_scale),
            ("the scale of the embeddings", self.embedding_scale),
            ("the scale of the residuals", self.residual_scale),
            ("the scale of the logits", self.logit_scale),
            ("the cap of the scores", self.attention_softcap.unwrap_or(1.0)),
            ("the cap of the logits", self.logit_softcap.unwrap_or(1.0)),
        ];
        for (what, number) in scales {
            check_positive(what, number)?;
        }
        for attention in &self.attention {
            if attention.window == Some(0) {
                return Err(crate::ModelError::config("the sliding window is 0"));
            }
            if let Some(rope) = &attention.rope {
                rope.validate(self.head_dim)?;
            }
        }
        if let Some(experts) = &self.experts {
            experts.validate(self.layers)?;
        }
        let kinds = self.attention.len();
        if self.attention_pattern.is_empty() || self.attention_pattern.iter().any(|&kind| kind >= kinds) {
            let message = format!(
                "the layers are of the kinds {:?}, of {kinds}",
                self.attention_pattern
            );
            return Err(crate::ModelError::config(message));
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
        Ok(self)
    }
}

impl ExpertsSpec {
    const MOST: usize = 4096;

    fn validate(&self, layers: usize) -> Result<(), crate::ModelError> {
        let sizes = [
            ("the number of experts", self.count),
            ("the number of experts of a token", self.active),
            ("the intermediate size of the experts", self.intermediate_size),
            (
                "the intermediate size of the shared expert",
                self.shared.unwrap_or(1),
            ),
        ];
        for (what, size) in sizes {
            if size == 0 || i32::try_from(size).is_err() {
                return Err(crate::ModelError::config(format!("{what} is {size}")));
            }
        }
        // The largest models have some hundred; names are made for each.
        if self.count > Self::MOST {
            let message = format!("{} experts, supported: up to {}", self.count, Self::MOST);
            return Err(crate::ModelError::config(message));
        }
        if self.active > self.count {
            let message = format!("a token chooses {} of {} experts", self.active, self.count);
            return Err(crate::ModelError::config(message));
        }
        if self.layers.len() != layers {
            let message = format!("experts are known of {} layers of {layers}", self.layers.len());
            return Err(crate::ModelError::config(message));
        }
        Ok(())
    }
}

impl RopeSpec {
    fn validate(&self, head_dim: usize) -> Result<(), crate::ModelError> {
        let factor = match &self.scaling {
            RopeScaling::Linear(factor) | RopeScaling::Llama3 { factor, .. } => *factor,
            RopeScaling::None | RopeScaling::Factors(_) => 1.0,
        };
        check_positive("the base of the rotary embedding", self.theta)?;
        check_positive("the factor of the rotary embedding", factor)?;
        if let RopeScaling::Factors(factors) = &self.scaling
            && factors.len() != head_dim / 2
        {
            let message = format!("{} rope factors for heads of {head_dim}", factors.len());
            return Err(crate::ModelError::config(message));
        }
        Ok(())
    }
}

fn check_positive(what: &str, number: f32) -> Result<(), crate::ModelError> {
    if number > 0.0 && number.is_finite() {
        return Ok(());
    }
    Err(crate::ModelError::config(format!(
        "{what} is {number}, expected a number above 0"
    )))
}
