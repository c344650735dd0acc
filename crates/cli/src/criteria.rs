//! What models are searched by on the command line.

use clap::ValueEnum;
use mlx_engine::{Capability, ModelType, SortBy};

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

/// What a model is for.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Type {
    /// Conversation
    Chat,
    /// Source code
    Code,
    /// Thinking before it answers
    Reasoning,
    /// Text and images
    VisionLanguage,
    /// Vectors of texts
    Embedding,
    /// Ranking of documents
    Rerank,
}

impl From<Type> for ModelType {
    fn from(kind: Type) -> Self {
        match kind {
            Type::Chat => Self::Chat,
            Type::Code => Self::Code,
            Type::Reasoning => Self::Reasoning,
            Type::VisionLanguage => Self::VisionLanguage,
            Type::Embedding => Self::Embedding,
            Type::Rerank => Self::Rerank,
        }
    }
}

/// What a model can do.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Ability {
    /// Calling tools
    Tools,
    /// Thinking
    Reasoning,
    /// Images
    Vision,
}

impl From<Ability> for Capability {
    fn from(ability: Ability) -> Self {
        match ability {
            Ability::Tools => Self::Tools,
            Ability::Reasoning => Self::Reasoning,
            Ability::Vision => Self::Vision,
        }
    }
}

/// An order of models: those of the registry have the first ones, those of the hub the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Order {
    /// The best match of the words first
    Relevance,
    /// The fewest parameters first
    Parameters,
    /// The most parameters first
    ParametersDescending,
    /// The smallest files first
    Size,
    /// The longest context first
    Context,
    /// The newest first
    Released,
    /// By name
    Name,
    /// The most downloads first, with --hub
    Downloads,
    /// The most likes first, with --hub
    Likes,
    /// The last changed first, with --hub
    Modified,
    /// The last made first, with --hub
    Created,
    /// What is much looked at first, with --hub
    Trending,
}

impl Order {
    /// The order of the registry's models, where it is one.
    pub(crate) fn of_registry(self) -> Result<SortBy, Failure> {
        Ok(match self {
            Self::Relevance => SortBy::Relevance,
            Self::Parameters => SortBy::Parameters,
            Self::ParametersDescending => SortBy::ParametersDescending,
            Self::Size => SortBy::Size,
            Self::Context => SortBy::Context,
            Self::Released => SortBy::Released,
            Self::Name => SortBy::Name,
            _ => {
                return Err(Failure::usage(
                    "this order is the hub's: give --hub, or another order",
                ));
            }
        })
    }

    /// The order of the hub's models, where it is one.
    #[cfg(feature = "hub")]
    pub(crate) fn of_hub(self) -> Result<mlx_engine::hub::HubSort, Failure> {
        use mlx_engine::hub::HubSort;
        Ok(match self {
            Self::Downloads => HubSort::Downloads,
            Self::Likes => HubSort::Likes,
            Self::Modified => HubSort::LastModified,
            Self::Created => HubSort::Created,
            Self::Trending => HubSort::Trending,
            _ => {
                return Err(Failure::usage(
                    "the hub has no such order: downloads, likes, modified, created and trending are its own",
                ));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
