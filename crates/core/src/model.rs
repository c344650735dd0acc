//! What a model is, as data: its identity, size and kind.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ParamError;

/// Everything that is known about a model before it is loaded.
///
/// ```
/// use mlx_engine_core::{ModelConfiguration, ModelType, Quantization};
///
/// let model = ModelConfiguration {
///     parameters: 494_000_000,
///     quantization: Some(Quantization::new(4, 64)?),
///     context_length: 32_768,
///     ..ModelConfiguration::new("mlx-community/Qwen2.5-0.5B-Instruct-4bit", ModelType::Chat)
/// };
/// assert_eq!(model.name, "Qwen2.5-0.5B-Instruct-4bit");
/// # Ok::<(), mlx_engine_core::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelConfiguration {
    /// What fetches it: a hub repository (`owner/name`) or a path.
    pub id: String,
    /// The name shown to a person.
    pub name: String,
    /// One sentence on what the model is good for.
    #[serde(default)]
    pub description: String,
    /// The family of architectures it belongs to, such as `qwen2` or `llama`; empty where unknown.
    #[serde(default)]
    pub family: String,
    /// Number of weights, before quantization; 0 where unknown.
    pub parameters: u64,
    /// Weights that take part in one token, for a mixture of experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_parameters: Option<u64>,
    /// How the weights are packed; `None` for floating point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// The longest sequence that the model was trained for, prompt and answer together, in tokens; 0 where unknown.
    pub context_length: u32,
    /// Size of the weight files in bytes; 0 where unknown.
    pub size_bytes: u64,
    /// What the model is for.
    pub model_type: ModelType,
    /// The system prompt to use where a conversation brings none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_system_prompt: Option<String>,
    /// Other names by which a user may ask for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
}

impl ModelConfiguration {
    /// A configuration of which only the id and the type are known. The name is the last segment of the id.
    pub fn new(id: impl Into<String>, model_type: ModelType) -> Self {
        let id = id.into();
        let name = id
            .rsplit('/')
            .find(|segment| !segment.is_empty())
            .unwrap_or(&id)
            .to_owned();
        Self {
            id,
            name,
            description: String::new(),
            family: String::new(),
            parameters: 0,
            active_parameters: None,
            quantization: None,
            context_length: 0,
            size_bytes: 0,
            model_type,
            default_system_prompt: None,
            aliases: Vec::new(),
        }
    }

    /// Whether only a part of the weights takes part in each token.
    pub fn is_mixture_of_experts(&self) -> bool {
        self.active_parameters
            .is_some_and(|active| active < self.parameters)
    }
}

/// What a model is for. A mixture of experts is not a type: see [`ModelConfiguration::active_parameters`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ModelType {
    /// Continues text; no chat template.
    Base,
    /// Tuned to follow instructions in a conversation.
    Chat,
    /// Tuned for source code.
    Code,
    /// Thinks in text before it answers.
    Reasoning,
    /// Takes images beside text.
    VisionLanguage,
    /// Turns text into a vector.
    Embedding,
    /// Scores documents against a query.
    Rerank,
}

impl ModelType {
    /// Whether the model produces text, which is what [`LlmEngine`](crate::LlmEngine) asks of it.
    pub fn generates_text(self) -> bool {
        !matches!(self, Self::Embedding | Self::Rerank)
    }
}

impl fmt::Display for ModelType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Base => "base",
            Self::Chat => "chat",
            Self::Code => "code",
            Self::Reasoning => "reasoning",
            Self::VisionLanguage => "vision_language",
            Self::Embedding => "embedding",
            Self::Rerank => "rerank",
        })
    }
}

/// Affine group quantization as MLX packs it: `bits` a weight, one scale and one bias for `group_size` weights.
///
/// The fields are private and deserializing validates, so a value always names a width that MLX has kernels for.
///
/// ```
/// use mlx_engine_core::Quantization;
///
/// let quantization = Quantization::new(4, 64)?;
/// assert_eq!((quantization.bits(), quantization.group_size()), (4, 64));
/// assert_eq!(Quantization::new(7, 64).unwrap_err().field(), "quantization.bits");
/// # Ok::<(), mlx_engine_core::ParamError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawQuantization")]
pub struct Quantization {
    bits: u8,
    group_size: u32,
}

impl Quantization {
    /// Checks the widths.
    ///
    /// # Errors
    ///
    /// `bits` has to be one of 2, 3, 4, 5, 6, 8 and `group_size` one of 32, 64, 128.
    pub fn new(bits: u8, group_size: u32) -> Result<Self, ParamError> {
        if !matches!(bits, 2..=6 | 8) {
            return Err(ParamError::new(
                "quantization.bits",
                bits,
                "one of 2, 3, 4, 5, 6, 8",
            ));
        }
        if !matches!(group_size, 32 | 64 | 128) {
            return Err(ParamError::new(
                "quantization.group_size",
                group_size,
                "one of 32, 64, 128",
            ));
        }
        Ok(Self { bits, group_size })
    }

    /// Bits a weight.
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Weights that share a scale and a bias.
    pub fn group_size(self) -> u32 {
        self.group_size
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-bit (groups of {})", self.bits, self.group_size)
    }
}

#[derive(Deserialize)]
struct RawQuantization {
    bits: u8,
    group_size: u32,
}

impl TryFrom<RawQuantization> for Quantization {
    type Error = ParamError;

    fn try_from(raw: RawQuantization) -> Result<Self, ParamError> {
        Self::new(raw.bits, raw.group_size)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn quantization_takes_what_mlx_packs_and_nothing_else() {
        for bits in 0..=u8::MAX {
            for group_size in [0, 16, 32, 33, 64, 128, 256] {
                let allowed = [2, 3, 4, 5, 6, 8].contains(&bits) && [32, 64, 128].contains(&group_size);
                assert_eq!(
                    Quantization::new(bits, group_size).is_ok(),
                    allowed,
                    "{bits} bits, {group_size}"
                );
            }
        }
    }

    #[test]
    fn quantization_says_what_is_allowed() {
        let message = |bits, group| Quantization::new(bits, group).unwrap_err().to_string();
        assert_eq!(
            message(7, 64),
            "`quantization.bits` is 7, allowed: one of 2, 3, 4, 5, 6, 8"
        );
        assert_eq!(
            message(4, 48),
            "`quantization.group_size` is 48, allowed: one of 32, 64, 128"
        );
    }

    #[test]
    fn quantization_is_validated_when_read() {
        let read = |value| serde_json::from_value::<Quantization>(value);
        assert_eq!(
            read(json!({"bits": 4, "group_size": 64})).unwrap(),
            Quantization::new(4, 64).unwrap()
        );
        let error = read(json!({"bits": 1, "group_size": 64}))
            .unwrap_err()
            .to_string();
        assert!(error.contains("`quantization.bits` is 1"), "{error}");
    }

    #[test]
    fn a_configuration_round_trips_and_omits_what_is_unknown() {
        let model = ModelConfiguration {
            parameters: 30_500_000_000,
            active_parameters: Some(3_300_000_000),
            quantization: Quantization::new(4, 64).ok(),
            aliases: vec!["qwen3-moe".to_owned()],
            ..ModelConfiguration::new("mlx-community/Qwen3-30B-A3B-4bit", ModelType::Reasoning)
        };
        let json = serde_json::to_value(&model).unwrap();
        assert_eq!(json["quantization"], json!({"bits": 4, "group_size": 64}));
        assert_eq!(json["model_type"], "reasoning");
        assert!(json.get("default_system_prompt").is_none());
        assert_eq!(serde_json::from_value::<ModelConfiguration>(json).unwrap(), model);
        assert!(model.is_mixture_of_experts());
    }

    #[test]
    fn the_name_is_the_last_segment_of_the_id() {
        let name = |id: &str| ModelConfiguration::new(id, ModelType::Base).name;
        assert_eq!(name("owner/model"), "model");
        assert_eq!(name("model"), "model");
        assert_eq!(name("models/tiny/"), "tiny");
        assert_eq!(name(""), "");
    }

    #[test]
    fn experts_are_those_that_do_not_all_take_part() {
        let with = |active_parameters| ModelConfiguration {
            parameters: 8,
            active_parameters,
            ..ModelConfiguration::new("m", ModelType::Base)
        };
        assert!(with(Some(7)).is_mixture_of_experts());
        assert!(!with(Some(8)).is_mixture_of_experts() && !with(None).is_mixture_of_experts());
    }

    #[test]
    fn a_quantization_says_its_widths() {
        let packed = Quantization::new(3, 128).unwrap();
        assert_eq!((packed.bits(), packed.group_size()), (3, 128));
        assert_eq!(packed.to_string(), "3-bit (groups of 128)");
    }

    #[test]
    fn vectors_and_scores_are_no_text() {
        let silent = [ModelType::Embedding, ModelType::Rerank];
        let speaks = [
            ModelType::Base,
            ModelType::Chat,
            ModelType::Code,
            ModelType::Reasoning,
            ModelType::VisionLanguage,
        ];
        assert!(!silent.into_iter().any(ModelType::generates_text));
        assert!(speaks.into_iter().all(ModelType::generates_text));
    }

    #[test]
    fn types_are_written_as_they_are_displayed() {
        for model_type in [
            ModelType::Base,
            ModelType::Chat,
            ModelType::Code,
            ModelType::Reasoning,
            ModelType::VisionLanguage,
            ModelType::Embedding,
            ModelType::Rerank,
        ] {
            assert_eq!(serde_json::to_value(model_type).unwrap(), model_type.to_string());
        }
    }
}
