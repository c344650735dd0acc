//! A model as the registry knows it: its configuration, and what helps to choose it.

use std::fmt;
use std::ops::Deref;

use mlx_engine_core::{GenerateParams, ModelConfiguration, ModelType};
use serde::{Deserialize, Serialize};

use crate::CacheShape;

/// What a model can do beside continuing text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Capability {
    /// Its chat template takes tools, and it was trained to call them.
    Tools,
    /// It can think in text before it answers.
    Reasoning,
    /// It takes images.
    Vision,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tools => "tools",
            Self::Reasoning => "reasoning",
            Self::Vision => "vision",
        })
    }
}

/// How the maker recommends to sample. What is `None` stays as the caller has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// As [`GenerateParams::temperature`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// As [`GenerateParams::top_p`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// As [`GenerateParams::top_k`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// As [`GenerateParams::min_p`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// As [`GenerateParams::repetition_penalty`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
}

impl Sampling {
    /// The parameters with what is recommended in place.
    ///
    /// ```
    /// use mlx_engine_core::GenerateParams;
    /// use mlx_engine_registry::ModelRegistry;
    ///
    /// let qwen = ModelRegistry::builtin().entry("qwen3-4b")?;
    /// let params = qwen.sampling.unwrap_or_default().apply(GenerateParams::default().with_max_tokens(64));
    /// assert_eq!((params.temperature, params.top_k, params.max_tokens), (0.6, 20, 64));
    /// # Ok::<(), mlx_engine_registry::RegistryError>(())
    /// ```
    pub fn apply(&self, mut params: GenerateParams) -> GenerateParams {
        params.temperature = self.temperature.unwrap_or(params.temperature);
        params.top_p = self.top_p.unwrap_or(params.top_p);
        params.top_k = self.top_k.unwrap_or(params.top_k);
        params.min_p = self.min_p.unwrap_or(params.min_p);
        params.repetition_penalty = self.repetition_penalty.unwrap_or(params.repetition_penalty);
        params
    }
}

/// A model of the registry. It reads as its [`ModelConfiguration`].
///
/// ```
/// use mlx_engine_registry::{Capability, ModelRegistry};
///
/// let registry = ModelRegistry::builtin();
/// let model = registry.entry("qwen3-4b")?;
/// assert!(model.can(Capability::Tools));
/// // The weights, and the keys and values of 1024 tokens.
/// println!("{}: {:?} + {} bytes", model.name, model.weight_bytes(), model.cache_bytes(1024));
/// # Ok::<(), mlx_engine_registry::RegistryError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelEntry {
    /// What loading it takes.
    #[serde(flatten)]
    pub model: ModelConfiguration,
    /// The licence's SPDX id or, where it has none, the hub's name for it; empty where unknown.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub licence: String,
    /// The month in which the weights were published, as `2025-04`; empty where unknown.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub released: String,
    /// What it can do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<Capability>,
    /// The languages that the maker names, as ISO 639-1 codes, the strongest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub languages: Vec<String>,
    /// How the maker recommends to sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<Sampling>,
    /// What a sequence keeps; `None` where unknown, or where nothing is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheShape>,
}

impl ModelEntry {
    /// Whether it can do this.
    pub fn can(&self, capability: Capability) -> bool {
        self.capabilities.contains(&capability)
    }

    /// Weights that take part in one token.
    pub fn active_parameters(&self) -> u64 {
        self.model.active_parameters.unwrap_or(self.model.parameters)
    }

    /// The bytes of the weights: the size of the files or, without it, what the parameters take; `None` without both.
    pub fn weight_bytes(&self) -> Option<u64> {
        if self.model.size_bytes > 0 {
            return Some(self.model.size_bytes);
        }
        // In eighths of a bit a weight, so that scale and bias of a group count exactly.
        let (bits, group) = self.model.quantization.map_or((16, 0), |packed| {
            (u128::from(packed.bits()), u128::from(packed.group_size()))
        });
        let weights = u128::from(self.model.parameters);
        let bytes = (weights * bits + (weights * 32).checked_div(group).unwrap_or(0)) / 8;
        (weights > 0).then(|| u64::try_from(bytes).unwrap_or(u64::MAX))
    }

    /// The bytes that a sequence of so many tokens keeps. Where the shape of the cache is unknown, what a Llama 3.1
    /// of as many parameters keeps: 128 KiB a token for 8 billion.
    pub fn cache_bytes(&self, tokens: u64) -> u64 {
        match &self.cache {
            Some(cache) => cache.bytes(tokens),
            None if !self.model.model_type.generates_text() => 0,
            None => CacheShape {
                token_bytes: self.model.parameters / 61_035,
                ..CacheShape::default()
            }
            .bytes(tokens),
        }
    }
}

impl Deref for ModelEntry {
    type Target = ModelConfiguration;

    fn deref(&self) -> &ModelConfiguration {
        &self.model
    }
}

/// A model that can think, and one that sees, is known by its type to do so.
impl From<ModelConfiguration> for ModelEntry {
    fn from(model: ModelConfiguration) -> Self {
        let capabilities = match model.model_type {
            ModelType::Reasoning => vec![Capability::Reasoning],
            ModelType::VisionLanguage => vec![Capability::Vision],
            _ => Vec::new(),
        };
        Self {
            model,
            licence: String::new(),
            released: String::new(),
            capabilities,
            languages: Vec::new(),
            sampling: None,
            cache: None,
        }
    }
}
