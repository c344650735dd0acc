//! What models are searched by on the command line.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
#[cfg(feature = "hub")]
use mlx_engine::hub::HubSort;
use mlx_engine::{Capability, ModelType, SortBy, UseCase};

use crate::failure::Failure;

/// A number with or without a unit: `4GB`, `16GiB`, `7B`, `1.5e9`.
pub(crate) fn amount(text: &str) -> Result<u64, String> {
    let split = text
        .find(|character: char| character.is_ascii_alphabetic() && !"eE".contains(character))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" | "b" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "ki" | "kib" => 1 << 10,
        "mi" | "mib" => 1 << 20,
        "gi" | "gib" => 1 << 30,
        "ti" | "tib" => 1 << 40,
        _ => {
            return Err(format!(
                "`{unit}` is no unit; k, M, G, T, Ki, Mi, Gi and Ti are, with a B or without"
            ));
        }
    };
    if let Ok(whole) = number.trim().parse::<u64>() {
        return whole
            .checked_mul(factor)
            .ok_or_else(|| "it is too large".to_owned());
    }
    let value: f64 = number
        .trim()
        .parse()
        .map_err(|_| "it begins with no number".to_owned())?;
    let value = value * factor as f64;
    if !(0.0..1e18).contains(&value) {
        return Err("it is negative or too large".to_owned());
    }
    Ok(value.round() as u64)
}

/// A name on the command line, the value that it stands for, and what it means.
pub(crate) type Named<T> = (&'static str, T, &'static str);

/// Reads values of a type that knows nothing of a command line, by these names.
pub(crate) fn one_of<T: Copy + Send + Sync + 'static>(
    names: &'static [Named<T>],
) -> impl TypedValueParser<Value = T> {
    let known = names
        .iter()
        .map(|(name, _, help)| PossibleValue::new(name).help(help));
    PossibleValuesParser::new(known).try_map(|given| {
        let found = names.iter().find(|(name, _, _)| *name == given);
        found.map(|(_, value, _)| *value).ok_or("it is none of them")
    })
}

/// What a model is for.
pub(crate) const TYPES: &[Named<ModelType>] = &[
    ("chat", ModelType::Chat, "Conversation"),
    ("code", ModelType::Code, "Source code"),
    ("reasoning", ModelType::Reasoning, "Thinking before it answers"),
    ("vision-language", ModelType::VisionLanguage, "Text and images"),
    ("embedding", ModelType::Embedding, "Vectors of texts"),
    ("rerank", ModelType::Rerank, "Ranking of documents"),
];

/// What a model can do.
pub(crate) const CAPABILITIES: &[Named<Capability>] = &[
    ("tools", Capability::Tools, "Calling tools"),
    ("reasoning", Capability::Reasoning, "Thinking"),
    ("vision", Capability::Vision, "Images"),
];

/// What a model is to be used for.
pub(crate) const USES: &[Named<UseCase>] = &[
    ("on-phone", UseCase::OnPhone, "On a phone, beside other apps"),
    (
        "laptop-chat",
        UseCase::LaptopChat,
        "Conversation beside other programs",
    ),
    ("code", UseCase::Code, "Writing and changing source code"),
    ("reasoning", UseCase::Reasoning, "Problems that take thinking"),
    ("long-documents", UseCase::LongDocuments, "Texts of 64 Ki tokens"),
    ("tool-use", UseCase::ToolUse, "Calling tools"),
    ("vision", UseCase::Vision, "Images"),
    ("embeddings", UseCase::Embeddings, "Vectors of texts"),
    ("lowest-latency", UseCase::LowestLatency, "The fastest answers"),
    ("highest-quality", UseCase::HighestQuality, "The best answers"),
];

/// An order of models: the registry has some, the hub others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Registry(SortBy),
    #[cfg(feature = "hub")]
    Hub(HubSort),
}

pub(crate) const ORDERS: &[Named<Order>] = &[
    (
        "relevance",
        Order::Registry(SortBy::Relevance),
        "The best match of the words first",
    ),
    (
        "parameters",
        Order::Registry(SortBy::Parameters),
        "The fewest parameters first",
    ),
    (
        "parameters-descending",
        Order::Registry(SortBy::ParametersDescending),
        "The most parameters first",
    ),
    ("size", Order::Registry(SortBy::Size), "The smallest files first"),
    (
        "context",
        Order::Registry(SortBy::Context),
        "The longest context first",
    ),
    ("released", Order::Registry(SortBy::Released), "The newest first"),
    ("name", Order::Registry(SortBy::Name), "By name"),
    #[cfg(feature = "hub")]
    (
        "downloads",
        Order::Hub(HubSort::Downloads),
        "The most downloads first, with --hub",
    ),
    #[cfg(feature = "hub")]
    (
        "likes",
        Order::Hub(HubSort::Likes),
        "The most likes first, with --hub",
    ),
    #[cfg(feature = "hub")]
    (
        "modified",
        Order::Hub(HubSort::LastModified),
        "The last changed first, with --hub",
    ),
    #[cfg(feature = "hub")]
    (
        "created",
        Order::Hub(HubSort::Created),
        "The last made first, with --hub",
    ),
    #[cfg(feature = "hub")]
    (
        "trending",
        Order::Hub(HubSort::Trending),
        "What is much looked at first, with --hub",
    ),
];

impl Order {
    /// The order of the registry's models, where it is one.
    pub(crate) fn of_registry(self) -> Result<SortBy, Failure> {
        match self {
            Self::Registry(order) => Ok(order),
            #[cfg(feature = "hub")]
            Self::Hub(_) => Err(Failure::usage(
                "this order is the hub's: give --hub, or another order",
            )),
        }
    }

    /// The order of the hub's models, where it is one.
    #[cfg(feature = "hub")]
    pub(crate) fn of_hub(self) -> Result<HubSort, Failure> {
        match self {
            Self::Hub(order) => Ok(order),
            Self::Registry(_) => Err(Failure::usage(
                "the hub has no such order: downloads, likes, modified, created and trending are its own",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_use_has_a_name() {
        let named: Vec<_> = USES.iter().map(|(_, use_case, _)| *use_case).collect();
        assert_eq!(named, UseCase::ALL);
    }

    #[test]
    fn amounts_have_units_or_none() {
        for (text, expected) in [
            ("0", 0),
            ("16", 16),
            ("4GB", 4_000_000_000),
            ("16GiB", 16 << 30),
            ("1.5 GB", 1_500_000_000),
            ("7B", 7_000_000_000),
            ("135M", 135_000_000),
            ("1e9", 1_000_000_000),
            ("2ki", 2048),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(amount(text), Ok(expected), "{text}");
        }
        for text in ["", "GB", "-1", "4XB", "1e30", "20000000TB", "nan", "4GBs"] {
            assert!(amount(text).is_err(), "{text}");
        }
    }
}
