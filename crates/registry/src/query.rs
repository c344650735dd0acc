//! Search by criteria.

use mlx_engine_core::{ModelConfiguration, ModelType};

/// What a model has to be. Criteria add up; one that is not set allows everything.
///
/// A figure that is unknown (0) meets no bound.
///
/// ```
/// use mlx_engine_registry::{ModelQuery, ModelRegistry};
///
/// let query = ModelQuery::new().with_text("llama instruct").with_max_parameters(10_000_000_000).with_bits(4);
/// let names: Vec<_> = ModelRegistry::builtin().find(&query).into_iter().map(|model| &*model.name).collect();
/// assert_eq!(names, ["Llama 3.2 1B Instruct", "Llama 3.2 3B Instruct", "Llama 3.1 8B Instruct"]);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelQuery {
    words: Vec<String>,
    family: Option<String>,
    model_type: Option<ModelType>,
    min_parameters: Option<u64>,
    max_parameters: Option<u64>,
    max_size_bytes: Option<u64>,
    weights: Option<Weights>,
    min_context: Option<u32>,
}

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weights {
    FloatingPoint,
    Quantized { bits: u8 },
}

impl Weights {
    fn of(model: &ModelConfiguration) -> Self {
        model
            .quantization
            .map_or(Self::FloatingPoint, |quantization| Self::Quantized {
                bits: quantization.bits(),
            })
    }
}

impl ModelQuery {
    /// A query that every model meets.
    pub fn new() -> Self {
        Self::default()
    }

    /// Every word of the text has to be a part of the id, the name, an alias, the family or the description, in any
    /// case.
    pub fn with_text(mut self, text: &str) -> Self {
        self.words = text.split_whitespace().map(str::to_lowercase).collect();
        self
    }

    /// The family has to be this one, in any case: `llama`, `qwen3_moe`.
    pub fn with_family(mut self, family: &str) -> Self {
        self.family = Some(family.to_lowercase());
        self
    }

    /// The model has to be for this.
    pub fn with_type(mut self, model_type: ModelType) -> Self {
        self.model_type = Some(model_type);
        self
    }

    /// At least this many weights.
    pub fn with_min_parameters(mut self, parameters: u64) -> Self {
        self.min_parameters = Some(parameters);
        self
    }

    /// At most this many weights. A mixture of experts counts with all its experts.
    pub fn with_max_parameters(mut self, parameters: u64) -> Self {
        self.max_parameters = Some(parameters);
        self
    }

    /// Weight files of at most this many bytes in all.
    pub fn with_max_size_bytes(mut self, bytes: u64) -> Self {
        self.max_size_bytes = Some(bytes);
        self
    }

    /// Weights quantized to this many bits. Takes the place of [`with_floating_point`](Self::with_floating_point).
    pub fn with_bits(mut self, bits: u8) -> Self {
        self.weights = Some(Weights::Quantized { bits });
        self
    }

    /// Weights that are not quantized. Takes the place of [`with_bits`](Self::with_bits).
    pub fn with_floating_point(mut self) -> Self {
        self.weights = Some(Weights::FloatingPoint);
        self
    }

    /// A context of at least this many tokens.
    pub fn with_min_context(mut self, tokens: u32) -> Self {
        self.min_context = Some(tokens);
        self
    }

    /// Whether the model meets all criteria.
    pub fn matches(&self, model: &ModelConfiguration) -> bool {
        self.has_words(model)
            && self
                .family
                .as_ref()
                .is_none_or(|family| *family == model.family.to_lowercase())
            && self.model_type.is_none_or(|wanted| wanted == model.model_type)
            && self
                .min_parameters
                .is_none_or(|min| at_least(model.parameters, min))
            && self
                .max_parameters
                .is_none_or(|max| at_most(model.parameters, max))
            && self
                .max_size_bytes
                .is_none_or(|max| at_most(model.size_bytes, max))
            && self.weights.is_none_or(|wanted| wanted == Weights::of(model))
            && self
                .min_context
                .is_none_or(|min| at_least(model.context_length.into(), min.into()))
    }

    fn has_words(&self, model: &ModelConfiguration) -> bool {
        if self.words.is_empty() {
            return true;
        }
        let texts: Vec<String> = [&model.id, &model.name, &model.family, &model.description]
            .into_iter()
            .chain(&model.aliases)
            .map(|text| text.to_lowercase())
            .collect();
        self.words
            .iter()
            .all(|word| texts.iter().any(|text| text.contains(word)))
    }
}

fn at_least(value: u64, min: u64) -> bool {
    value != 0 && value >= min
}

fn at_most(value: u64, max: u64) -> bool {
    value != 0 && value <= max
}

#[cfg(test)]
mod tests {
    use mlx_engine_core::Quantization;

    use super::*;

    fn model() -> ModelConfiguration {
        ModelConfiguration {
            description: "Writes prose.".to_owned(),
            family: "llama".to_owned(),
            parameters: 7_000_000_000,
            quantization: Quantization::new(4, 64).ok(),
            context_length: 8192,
            size_bytes: 4_000_000_000,
            aliases: vec!["scribe".to_owned()],
            ..ModelConfiguration::new("owner/Writer-7B", ModelType::Chat)
        }
    }

    #[test]
    fn each_criterion_decides_by_itself() {
        let query = ModelQuery::new;
        for (query, expect) in [
            (query(), true),
            (query().with_text("  "), true),
            (query().with_text("WRITER"), true),
            (query().with_text("prose scribe owner llama"), true),
            (query().with_text("prose verse"), false),
            (query().with_family("Llama"), true),
            (query().with_family("llam"), false),
            (query().with_type(ModelType::Chat), true),
            (query().with_type(ModelType::Code), false),
            (query().with_min_parameters(7_000_000_000), true),
            (query().with_min_parameters(7_000_000_001), false),
            (query().with_max_parameters(7_000_000_000), true),
            (query().with_max_parameters(6_999_999_999), false),
            (query().with_max_size_bytes(4_000_000_000), true),
            (query().with_max_size_bytes(3_999_999_999), false),
            (query().with_bits(4), true),
            (query().with_bits(8), false),
            (query().with_floating_point(), false),
            (query().with_floating_point().with_bits(4), true),
            (query().with_min_context(8192), true),
            (query().with_min_context(8193), false),
            (query().with_type(ModelType::Chat).with_bits(8), false),
        ] {
            assert_eq!(query.matches(&model()), expect, "{query:?}");
        }
    }

    #[test]
    fn what_is_unknown_meets_no_bound() {
        let unknown = ModelConfiguration::new("owner/unknown", ModelType::Base);
        let query = ModelQuery::new;
        for query in [
            query().with_min_parameters(0),
            query().with_max_parameters(u64::MAX),
            query().with_max_size_bytes(u64::MAX),
            query().with_min_context(0),
        ] {
            assert!(!query.matches(&unknown), "{query:?}");
        }
        assert!(query().with_floating_point().matches(&unknown));
    }
}
