//! What a `config.json` says about size: parameters, weight bytes, cache and memory.

use std::fmt;

use mlx_engine_core::EngineError;
use serde::{Deserialize, Serialize};
use serde_json::Value;

mod decoder;
mod encoder;
mod family;
mod feed;
mod fields;
mod gemma4;
mod mixers;
mod packing;
mod tensors;

use fields::{Count, Fields};
use mixers::Cached;
use packing::Packing;
use tensors::Tensors;

/// Why a configuration says too little, or nothing that is understood.
///
/// ```
/// use mlx_engine_registry::ModelEstimate;
///
/// let error = ModelEstimate::from_config_text(r#"{"model_type": "llama", "hidden_size": -1}"#).unwrap_err();
/// assert_eq!(error.to_string(), "`hidden_size` is -1, allowed: a whole number from 1 to 16777216");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EstimateError {
    /// The text is not JSON.
    #[error("the configuration is not JSON: {reason}")]
    Syntax {
        /// What the parser says.
        reason: String,
    },

    /// A field that the family needs is not there.
    #[error("the configuration has no `{field}`")]
    Missing {
        /// Its name, with that of the object it belongs to.
        field: String,
    },

    /// A field has a value that it cannot have.
    #[error("`{field}` is {value}, allowed: {allowed}")]
    Invalid {
        /// Its name, with that of the object it belongs to.
        field: String,
        /// What it is, shortened.
        value: String,
        /// What it may be.
        allowed: String,
    },

    /// The family is not known, and a field shows that it cannot be taken for a plain transformer.
    #[error(
        "the layout of model type `{model_type}` is not known: `{field}` shows that it is no plain transformer"
    )]
    Unsupported {
        /// The `model_type`.
        model_type: String,
        /// The field that shows it.
        field: String,
    },
}

impl EstimateError {
    fn invalid(field: &str, value: &Value, allowed: impl fmt::Display) -> Self {
        /// A list of layers says nothing past its beginning.
        const LONGEST: usize = 60;

        let mut value = value.to_string();
        if let Some((end, _)) = value.char_indices().nth(LONGEST) {
            value.truncate(end);
            value.push('…');
        }
        Self::Invalid {
            field: field.to_owned(),
            value,
            allowed: allowed.to_string(),
        }
    }
}

/// A configuration that cannot be estimated is a model that cannot be loaded, as far as this crate can tell.
impl From<EstimateError> for EngineError {
    fn from(error: EstimateError) -> Self {
        Self::model_load("config.json", error)
    }
}

/// What a model keeps of the tokens it has seen, in bytes for one sequence.
///
/// Layers differ: full attention keeps every token, a sliding window the latest ones, a recurrent layer a state of
/// fixed size. The bytes are those of a cache in the type of what is not quantized, 16 bits as a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheShape {
    /// For each token, in the layers that keep all of them.
    pub token_bytes: u64,
    /// How many tokens the layers with a window keep; 0 without such layers.
    #[serde(skip_serializing_if = "is_zero")]
    pub window: u64,
    /// For each token within the window, in the layers that have one.
    #[serde(skip_serializing_if = "is_zero")]
    pub window_token_bytes: u64,
    /// The state of recurrent layers.
    #[serde(skip_serializing_if = "is_zero")]
    pub state_bytes: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl CacheShape {
    /// Caches grow by blocks of this many tokens.
    pub const BLOCK: u64 = 256;

    /// The bytes after so many tokens, prompt and answer together.
    ///
    /// ```
    /// use mlx_engine_registry::CacheShape;
    ///
    /// let cache = CacheShape { token_bytes: 1000, window: 512, window_token_bytes: 10, state_bytes: 7 };
    /// assert_eq!(cache.bytes(0), 7);
    /// assert_eq!(cache.bytes(1), 256_000 + 2_560 + 7, "a block is the least");
    /// assert_eq!(cache.bytes(1024), 1_024_000 + 5_120 + 7, "the window is full");
    /// ```
    pub fn bytes(&self, tokens: u64) -> u64 {
        let tokens = tokens.div_ceil(Self::BLOCK).saturating_mul(Self::BLOCK);
        let windowed = tokens.min(self.window);
        self.token_bytes
            .saturating_mul(tokens)
            .saturating_add(self.window_token_bytes.saturating_mul(windowed))
            .saturating_add(self.state_bytes)
    }
}

/// What a model takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// The weights.
    pub weights: u64,
    /// What one sequence of the length in question keeps.
    pub cache: u64,
    /// Activations, buffers that the allocator holds on to, the tokenizer: a thirty-second of the weights and
    /// 128 MiB. Prefill in chunks keeps it that small whatever the prompt.
    pub working: u64,
}

impl MemoryEstimate {
    pub(crate) fn new(weights: u64, cache: u64) -> Self {
        Self {
            weights,
            cache,
            working: weights / 32 + (128 << 20),
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights
            .saturating_add(self.cache)
            .saturating_add(self.working)
    }
}

/// What a `config.json` says about the size of a model, without its weights.
///
/// The tensors of a checkpoint follow from the configuration once the family is known, so that they are counted one
/// by one, in the layout and the quantization in which MLX stores them. For a family that is not known, what looks like
/// a Llama is counted as one, and [`is_exact`](Self::is_exact) is false.
///
/// ```
/// use mlx_engine_registry::ModelEstimate;
///
/// let estimate = ModelEstimate::from_config_text(
///     r#"{
///         "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
///         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": false,
///         "quantization": {"group_size": 64, "bits": 4}
///     }"#,
/// )?;
/// assert_eq!(estimate.parameters, 8_030_261_248);
/// assert_eq!(estimate.cache.token_bytes, 2 * 32 * 8 * 128 * 2, "keys and values of 8 heads, in 16 bits");
/// assert_eq!(estimate.memory(8192).cache, 1 << 30);
/// # Ok::<(), mlx_engine_registry::EstimateError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelEstimate {
    /// The `model_type` of the decoder.
    pub model_type: String,
    /// Whether the layout of the family is known.
    pub is_exact: bool,
    /// Number of weights, before quantization, the vision tower included.
    pub parameters: u64,
    /// Weights that take part in one token; all of them, where there are no experts.
    pub active_parameters: u64,
    /// Weights of the vision tower, by a formula that fits most towers to a few percent.
    pub vision_parameters: u64,
    /// The bytes of all tensors.
    pub weight_bytes: u64,
    /// The bytes of weights that one step of decoding reads.
    pub step_bytes: u64,
    /// Bits of most weights where they are quantized.
    pub bits: Option<u32>,
    /// What a sequence keeps.
    pub cache: CacheShape,
    /// The longest sequence, where the configuration says.
    pub context_length: Option<u64>,
}

impl ModelEstimate {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    ///
    /// [`Syntax`](EstimateError::Syntax), or as [`from_config`](Self::from_config).
    pub fn from_config_text(text: &str) -> Result<Self, EstimateError> {
        let value: Value = serde_json::from_str(text)
            .or_else(|error| {
                // What is wrong with it is told in the words of the file as it is.
                serde_json::from_str(&without_constants(text)).map_err(|_| error)
            })
            .map_err(|error| EstimateError::Syntax {
                reason: error.to_string(),
            })?;
        Self::from_config(&value)
    }

    /// Reads a `config.json`, of MLX or of Hugging Face.
    ///
    /// # Errors
    ///
    /// [`Missing`](EstimateError::Missing) and [`Invalid`](EstimateError::Invalid) name the field,
    /// [`Unsupported`](EstimateError::Unsupported) the model type.
    pub fn from_config(config: &Value) -> Result<Self, EstimateError> {
        let config = Fields::of(config, "config.json")?;
        let outer = config.text("model_type")?;
        // What sees and hears keeps the decoder's configuration apart, by one of these names.
        let mut text = None;
        for name in ["text_config", "language_config", "llm_config"] {
            text = match text {
                None => config.object(name)?,
                found => found,
            };
        }
        let text = text.unwrap_or_else(|| config.clone());
        let model_type = text
            .text("model_type")?
            .or(outer)
            .ok_or_else(|| config.missing("model_type"))?;

        let mut tensors = Tensors::new(Packing::read(&config, &text)?);
        let mut is_exact = true;
        let cached = if encoder::is_encoder(model_type) {
            encoder::count(&text, model_type, &mut tensors)?;
            Cached::default()
        } else if matches!(model_type, "gemma4" | "gemma4_text") {
            gemma4::count(&text, &mut tensors)?
        } else {
            let family = family::Family::of(model_type, &text)?;
            is_exact = family.known;
            // Qwen3-VL says it outside alone.
            let says = config.has("tie_word_embeddings");
            let tied_outside = says
                .then(|| config.flag("tie_word_embeddings", false))
                .transpose()?;
            decoder::count(&text, &family, tied_outside, &mut tensors)?
        };
        let vision = match config.object("vision_config")? {
            Some(vision) => encoder::vision_weights(&vision, text.required("hidden_size")?)?,
            None => 0,
        };
        tensors.plain_aside(vision);

        let context_length = text.ranged("max_position_embeddings", 1, u64::from(u32::MAX))?;
        let mut cache = CacheShape {
            token_bytes: clamped(cached.per_token),
            window: 0,
            window_token_bytes: 0,
            state_bytes: clamped(cached.state),
        };
        match decoder::window(&text)? {
            _ if cached.per_windowed_token == 0 => {}
            // A window as long as the context is none: Phi 3 states such a one.
            Some(window) if context_length.is_none_or(|context| window < context) => {
                cache.window = window;
                cache.window_token_bytes = clamped(cached.per_windowed_token);
            }
            _ => cache.token_bytes = clamped(cached.per_token + cached.per_windowed_token),
        }

        Ok(Self {
            model_type: model_type.to_owned(),
            is_exact,
            parameters: clamped(tensors.parameters),
            active_parameters: clamped(tensors.active),
            vision_parameters: clamped(vision),
            weight_bytes: clamped(tensors.bytes()),
            step_bytes: clamped(tensors.step_bytes()),
            bits: tensors.default_bits(),
            cache,
            context_length,
        })
    }

    /// The memory that one sequence of so many tokens takes, prompt and answer together.
    pub fn memory(&self, tokens: u64) -> MemoryEstimate {
        MemoryEstimate::new(self.weight_bytes, self.cache.bytes(tokens))
    }
}

/// The text with `null` in place of `NaN`, `Infinity` and `-Infinity`, which Python writes and JSON does not have: Mamba's
/// configurations bound a step by them. No shape depends on one.
fn without_constants(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let constant = ["-Infinity", "Infinity", "NaN"]
            .into_iter()
            .find(|constant| !in_string && rest.starts_with(constant));
        if let Some(constant) = constant {
            out.push_str("null");
            rest = &rest[constant.len()..];
            continue;
        }
        in_string ^= character == '"' && !escaped;
        escaped = in_string && character == '\\' && !escaped;
        out.push(character);
        rest = &rest[character.len_utf8()..];
    }
    out
}

/// What no real model reaches reads as the most there is.
fn clamped(count: Count) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
