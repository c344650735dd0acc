//! Which models suit a use on a device.

use std::cmp::Reverse;
use std::fmt;

use mlx_engine_core::{ModelType, Quantization};
use serde::{Deserialize, Serialize};

use crate::{Capability, Compatibility, DeviceDescription, Fit, ModelEntry, ModelRegistry};

/// What a model is to be used for.
///
/// ```
/// use mlx_engine_registry::{DeviceDescription, ModelRegistry, UseCase};
///
/// let phone = DeviceDescription::new(8 << 30, 68_000_000_000);
/// let registry = ModelRegistry::builtin();
/// for pick in registry.recommended_models(UseCase::OnPhone, &phone) {
///     let memory = pick.compatibility.fit().expect("it was reckoned").memory.total();
///     assert!(memory <= 4_000_000_000);
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum UseCase {
    /// Beside other apps: at most half of what a model may take, in no case more than 4 GB, and at least 10 tokens a
    /// second.
    OnPhone,
    /// Conversation beside other programs: at most 70 % of what a model may take, and at least 15 tokens a second.
    LaptopChat,
    /// Writing and changing source code.
    Code,
    /// Problems that take thinking.
    Reasoning,
    /// Texts of 64 Ki tokens.
    LongDocuments,
    /// Calling tools.
    ToolUse,
    /// Images.
    Vision,
    /// Vectors for search.
    Embeddings,
    /// Answers as fast as can be, from models of half a billion weights at least.
    LowestLatency,
    /// The best answers that the device allows, at 3 tokens a second at least.
    HighestQuality,
}

impl UseCase {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::OnPhone,
        Self::LaptopChat,
        Self::Code,
        Self::Reasoning,
        Self::LongDocuments,
        Self::ToolUse,
        Self::Vision,
        Self::Embeddings,
        Self::LowestLatency,
        Self::HighestQuality,
    ];

    /// The tokens to reckon with, prompt and answer together.
    pub fn tokens(self) -> u64 {
        match self {
            Self::OnPhone | Self::LowestLatency => 4096,
            Self::LongDocuments => 65_536,
            Self::Code | Self::Reasoning | Self::ToolUse => 16_384,
            Self::LaptopChat | Self::Vision | Self::Embeddings | Self::HighestQuality => 8192,
        }
    }

    /// What a model has to be.
    fn allows(self, model: &ModelEntry) -> bool {
        let talks = model.model_type.generates_text() && model.model_type != ModelType::Base;
        match self {
            Self::Code => model.model_type == ModelType::Code,
            Self::Reasoning => talks && model.can(Capability::Reasoning),
            Self::LongDocuments => talks && u64::from(model.context_length) >= self.tokens(),
            Self::ToolUse => talks && model.can(Capability::Tools),
            Self::Vision => model.can(Capability::Vision),
            Self::Embeddings => model.model_type == ModelType::Embedding,
            Self::LowestLatency => talks && model.parameters >= 500_000_000,
            Self::OnPhone | Self::LaptopChat | Self::HighestQuality => talks,
        }
    }

    /// The percentage of the usable memory that it may take, and the tokens a second that it has to make.
    fn limits(self) -> (u64, f64) {
        match self {
            Self::OnPhone => (50, 10.0),
            Self::LaptopChat => (70, 15.0),
            Self::Embeddings => (70, 0.0),
            Self::Code | Self::ToolUse | Self::Vision => (100, 8.0),
            Self::Reasoning => (100, 10.0),
            Self::LongDocuments | Self::HighestQuality => (100, 3.0),
            Self::LowestLatency => (100, 0.0),
        }
    }
}

impl fmt::Display for UseCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::OnPhone => "on a phone",
            Self::LaptopChat => "chat on a laptop",
            Self::Code => "code",
            Self::Reasoning => "reasoning",
            Self::LongDocuments => "long documents",
            Self::ToolUse => "tool use",
            Self::Vision => "vision",
            Self::Embeddings => "embeddings",
            Self::LowestLatency => "lowest latency",
            Self::HighestQuality => "highest quality",
        })
    }
}

/// A model that suits, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Recommendation<'a> {
    /// The model.
    pub model: &'a ModelEntry,
    /// How it fits: never too large.
    pub compatibility: Compatibility,
    /// One sentence with the numbers.
    pub reason: String,
}

impl ModelRegistry {
    /// Whether a model fits, with a sequence of 8192 tokens or of its whole context where that is less.
    pub fn compatibility(&self, model: &ModelEntry, device: &DeviceDescription) -> Compatibility {
        Compatibility::of(model, device, UseCase::LaptopChat.tokens())
    }

    /// The models that suit a use on a device, the best first. None is too large for it.
    ///
    /// A use asks for a kind of model, and sets a share of the memory and a least speed, with sequences of
    /// [`UseCase::tokens`]; [`Fit::tokens_per_second`] says how speed is estimated. Of what is left, models that fit
    /// with room come before those that fit tightly, then the better before the worse or, for
    /// [`UseCase::LowestLatency`], the faster before the slower.
    ///
    /// Better is a rule of thumb, not a measurement. What a model of experts knows is taken for that of a dense one
    /// with the geometric mean of its parameters and its active ones; twice the weights count as much as being nine
    /// months newer; fewer than 4 bits a weight cost half as much, and 8 and more gain a twentieth.
    ///
    /// ```
    /// use mlx_engine_registry::{DeviceDescription, ModelRegistry, UseCase};
    ///
    /// let macbook = DeviceDescription::new(16 << 30, 120_000_000_000);
    /// for pick in ModelRegistry::builtin().recommended_models(UseCase::Code, &macbook).iter().take(3) {
    ///     println!("{}: {}", pick.model.name, pick.reason);
    /// }
    /// ```
    pub fn recommended_models(
        &self,
        use_case: UseCase,
        device: &DeviceDescription,
    ) -> Vec<Recommendation<'_>> {
        let (percent, least_speed) = use_case.limits();
        let allowed = u128::from(device.usable_bytes) * u128::from(percent) / 100;
        let allowed = match use_case {
            UseCase::OnPhone => allowed.min(4_000_000_000),
            _ => allowed,
        };
        let mut picks: Vec<Recommendation<'_>> = self
            .entries()
            .filter(|model| use_case.allows(model))
            .filter_map(|model| {
                let compatibility = Compatibility::of(model, device, use_case.tokens());
                let fit = compatibility.fit().filter(|_| compatibility.is_possible())?;
                // A device whose bandwidth nobody stated has no speed to judge by.
                let quick = device.bandwidth == 0 || fit.tokens_per_second >= least_speed;
                (quick && u128::from(fit.memory.total()) <= allowed).then(|| Recommendation {
                    model,
                    compatibility,
                    reason: reason(use_case, model, fit, &compatibility),
                })
            })
            .collect();
        picks.sort_by_cached_key(|pick| {
            let rank = match (use_case, pick.compatibility.fit()) {
                // Milliseconds for a thousand tokens; the faster has fewer.
                (UseCase::LowestLatency, Some(fit)) if device.bandwidth > 0 => {
                    (1e6 / fit.tokens_per_second) as i64
                }
                (UseCase::LowestLatency, _) => {
                    i64::try_from(pick.model.active_parameters()).unwrap_or(i64::MAX)
                }
                _ => -quality(pick.model),
            };
            let is_tight = matches!(pick.compatibility, Compatibility::Tight(_));
            (
                is_tight,
                rank,
                Reverse(pick.model.size_bytes),
                pick.model.id.clone(),
            )
        });
        picks
    }

    /// The best model for conversation that the device runs: the first for [`UseCase::LaptopChat`] or, where none is
    /// quick enough for that, for [`UseCase::HighestQuality`] or [`UseCase::LowestLatency`].
    pub fn best_fit(&self, device: &DeviceDescription) -> Option<Recommendation<'_>> {
        [
            UseCase::LaptopChat,
            UseCase::HighestQuality,
            UseCase::LowestLatency,
        ]
        .into_iter()
        .find_map(|use_case| self.recommended_models(use_case, device).into_iter().next())
    }
}

/// The rule of thumb of [`ModelRegistry::recommended_models`], in thousandths of a doubling.
fn quality(model: &ModelEntry) -> i64 {
    let parameters = model.parameters.max(1) as f64;
    // The logarithm of the geometric mean.
    let size = f64::midpoint(
        parameters.log2(),
        (model.active_parameters().max(1) as f64).log2(),
    );
    let bits = match model.quantization.map(Quantization::bits) {
        Some(..4) => -0.5,
        Some(4..8) => 0.0,
        Some(8..) | None => 0.05,
    };
    ((size + months(&model.released) / 9.0 + bits) * 1000.0) as i64
}

/// Months since January 2023, which is what an unknown month counts as.
fn months(released: &str) -> f64 {
    let parse = || {
        let (year, month) = released.split_once('-')?;
        Some((year.parse::<i16>().ok()?, month.parse::<i16>().ok()?))
    };
    parse().map_or(0.0, |(year, month)| {
        (f64::from(year) - 2023.0) * 12.0 + f64::from(month) - 1.0
    })
}

fn reason(use_case: UseCase, model: &ModelEntry, fit: &Fit, compatibility: &Compatibility) -> String {
    let count = |parameters: u64| match parameters {
        1_000_000_000.. => format!("{:.1}B", parameters as f64 / 1e9),
        _ => format!("{:.0}M", parameters as f64 / 1e6),
    };
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let memory = format!(
        "{:.1} of {:.1} GB with {} tokens",
        gigabytes(fit.memory.total()),
        gigabytes(fit.usable_bytes),
        fit.tokens
    );
    let decodes = fit.tokens_per_second > 0.0 && model.model_type.generates_text();
    let speed = decodes.then(|| format!("about {:.0} tokens a second", fit.tokens_per_second));
    let size = match model.model.active_parameters {
        Some(active) => format!(
            "{} parameters, {} at work",
            count(model.parameters),
            count(active)
        ),
        None => format!("{} parameters", count(model.parameters)),
    };
    let context =
        (use_case == UseCase::LongDocuments).then(|| format!("a context of {} tokens", model.context_length));
    let tight = matches!(compatibility, Compatibility::Tight(_)).then(|| "tight".to_owned());
    let parts: Vec<String> = [Some(memory), speed, Some(size), context, tight]
        .into_iter()
        .flatten()
        .collect();
    parts.join("; ")
}
