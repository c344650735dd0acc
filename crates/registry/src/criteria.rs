//! Search by text and criteria, ranked and sorted.

use std::cmp::Reverse;

use mlx_engine_core::{ModelType, Quantization};
use serde::{Deserialize, Serialize};

use crate::{Capability, Compatibility, DeviceDescription, ModelEntry, ModelRegistry, relevance};

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    /// Not quantized.
    FloatingPoint,
    /// In so many bits.
    Bits(u8),
}

/// The order of what was found. Ties go by id, so that an order never depends on the order of registration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SortBy {
    /// The best match of the text first, then as [`Parameters`](Self::Parameters).
    #[default]
    Relevance,
    /// The fewest parameters first, then the smallest files.
    Parameters,
    /// The most parameters first.
    ParametersDescending,
    /// The smallest files first.
    Size,
    /// The longest context first.
    Context,
    /// The newest first.
    Released,
    /// By name, whatever the case.
    Name,
}

/// What to look for. Criteria add up, one that is not set allows everything, and a figure that is unknown (0) meets
/// no bound.
///
/// The text is words in any order and case. A word is found in ids, names, aliases, families and, with less weight, in
/// descriptions, licences and languages; from five letters on it may have a typing error, from eight on two. Digits
/// have to be right: `7b` finds neither `27B` nor `8B`.
///
/// ```
/// use mlx_engine_registry::{Capability, ModelRegistry, SearchCriteria};
///
/// let criteria = SearchCriteria {
///     query: "coder qwne".to_owned(),
///     max_parameters: Some(10_000_000_000),
///     limit: Some(1),
///     ..SearchCriteria::default()
/// };
/// let found = ModelRegistry::builtin().search_models(&criteria);
/// assert_eq!(found[0].family, "qwen2");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SearchCriteria {
    /// Words that all have to be found.
    pub query: String,
    /// The family, in any case.
    pub family: Option<String>,
    /// What the model is for.
    pub model_type: Option<ModelType>,
    /// What it can do.
    pub capability: Option<Capability>,
    /// At least so many parameters. A mixture of experts counts with all of them.
    pub min_parameters: Option<u64>,
    /// At most so many parameters.
    pub max_parameters: Option<u64>,
    /// Weight files of at most so many bytes.
    pub max_size_bytes: Option<u64>,
    /// How the weights are stored.
    pub quantization: Option<Weights>,
    /// A context of at least so many tokens.
    pub min_context: Option<u32>,
    /// The licence, in any case.
    pub licence: Option<String>,
    /// It runs in so many bytes of memory that it may take, with 8192 tokens.
    pub fits_memory: Option<u64>,
    /// At most so many results.
    pub limit: Option<usize>,
    /// Their order.
    pub sort: SortBy,
}

impl SearchCriteria {
    /// Whether a model meets all criteria but the text.
    fn allows(&self, model: &ModelEntry) -> bool {
        let known = |value: u64, holds: bool| value != 0 && holds;
        let same = |wanted: &Option<String>, value: &str| {
            wanted
                .as_ref()
                .is_none_or(|wanted| wanted.trim().to_lowercase() == value.to_lowercase())
        };
        let (parameters, size, context) = (model.parameters, model.size_bytes, model.context_length);
        same(&self.family, &model.family)
            && same(&self.licence, &model.licence)
            && self.model_type.is_none_or(|wanted| wanted == model.model_type)
            && self.capability.is_none_or(|wanted| model.can(wanted))
            && self
                .min_parameters
                .is_none_or(|min| known(parameters, parameters >= min))
            && self
                .max_parameters
                .is_none_or(|max| known(parameters, parameters <= max))
            && self.max_size_bytes.is_none_or(|max| known(size, size <= max))
            && self
                .min_context
                .is_none_or(|min| known(context.into(), context >= min))
            && self.quantization.is_none_or(|wanted| {
                let bits = model.quantization.map(Quantization::bits);
                bits == match wanted {
                    Weights::FloatingPoint => None,
                    Weights::Bits(bits) => Some(bits),
                }
            })
            && self.fits_memory.is_none_or(|bytes| {
                let device = DeviceDescription::new(bytes, 0).with_usable_bytes(bytes);
                Compatibility::of(model, &device, 8192).is_possible()
            })
    }
}

impl ModelRegistry {
    /// The models that meet the criteria, in the order that they ask for.
    pub fn search_models(&self, criteria: &SearchCriteria) -> Vec<&ModelEntry> {
        let words = relevance::words(&criteria.query);
        let mut found: Vec<(u32, &ModelEntry)> = self
            .entries()
            .filter(|model| criteria.allows(model))
            .filter_map(|model| Some((relevance::score(&words, model)?, model)))
            .collect();
        found.sort_by_cached_key(|(score, model)| {
            let relevance = match criteria.sort {
                SortBy::Relevance => *score,
                _ => 0,
            };
            // One key for all orders: what an order does not use is the same for every model.
            let (first, second, text) = match criteria.sort {
                SortBy::Relevance | SortBy::Parameters => (model.parameters, model.size_bytes, String::new()),
                SortBy::ParametersDescending => (!model.parameters, !model.size_bytes, String::new()),
                SortBy::Size => (model.size_bytes, model.parameters, String::new()),
                SortBy::Context => (u64::from(!model.context_length), model.parameters, String::new()),
                SortBy::Released => (0, 0, model.released.clone()),
                SortBy::Name => (0, 0, model.name.to_lowercase()),
            };
            let (newest, name) = match criteria.sort {
                SortBy::Released => (Reverse(text), String::new()),
                _ => (Reverse(String::new()), text),
            };
            (
                Reverse(relevance),
                first,
                second,
                newest,
                name,
                model.id.to_lowercase(),
            )
        });
        found
            .into_iter()
            .take(criteria.limit.unwrap_or(usize::MAX))
            .map(|(_, model)| model)
            .collect()
    }
}
