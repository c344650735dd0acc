//! Whether a model fits a device, and how fast it would decode there.

use serde::Serialize;

use crate::{MemoryEstimate, ModelEntry};

/// A machine, as far as choosing a model asks.
///
/// ```
/// use mlx_engine_registry::DeviceDescription;
///
/// let laptop = DeviceDescription::new(16 << 30, 120_000_000_000);
/// assert!(laptop.usable_bytes < laptop.memory_bytes);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceDescription {
    /// Its memory. On Apple silicon, CPU and GPU share it.
    pub memory_bytes: u64,
    /// What of it a model may take.
    pub usable_bytes: u64,
    /// Bytes that it reads from memory in a second, as the maker states.
    pub bandwidth: u64,
}

impl DeviceDescription {
    /// A machine with unified memory. A model may take what Metal recommends as the working set: two thirds of the
    /// memory up to 36 GiB, three quarters beyond.
    pub fn new(memory_bytes: u64, bandwidth: u64) -> Self {
        let usable_bytes = if memory_bytes <= 36 << 30 {
            memory_bytes / 3 * 2
        } else {
            memory_bytes / 4 * 3
        };
        Self {
            memory_bytes,
            usable_bytes,
            bandwidth,
        }
    }

    /// Sets what a model may take: a card's own memory, or what the system reports.
    pub fn with_usable_bytes(mut self, bytes: u64) -> Self {
        self.usable_bytes = bytes;
        self
    }
}

/// The numbers behind a [`Compatibility`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fit {
    /// Tokens of the sequence that is reckoned with, prompt and answer together.
    pub tokens: u64,
    /// What it takes.
    pub memory: MemoryEstimate,
    /// What the device lets a model take.
    pub usable_bytes: u64,
    /// Tokens that decoding makes in a second, at the full length.
    ///
    /// Decoding one sequence is bound by memory: each step reads the weights that take part and the whole cache.
    /// This is 0.6 of the bandwidth, which kernels reach as a rule, over those bytes. 0 where the bandwidth is 0.
    pub tokens_per_second: f64,
}

/// Whether a model fits a device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Compatibility {
    /// With at least 15 % to spare.
    Fits(Fit),
    /// With less to spare: a longer context or another program may exceed it.
    Tight(Fit),
    /// Not at all.
    TooLarge(Fit),
    /// Neither the parameters nor the size of the model are known.
    Unknown,
}

impl Compatibility {
    /// Reckons with a sequence of so many tokens, or of the model's context where that is less.
    pub(crate) fn of(model: &ModelEntry, device: &DeviceDescription, tokens: u64) -> Self {
        /// What of the bandwidth decoding reaches.
        const EFFICIENCY: f64 = 0.6;

        let Some(weights) = model.weight_bytes() else {
            return Self::Unknown;
        };
        let tokens = match model.context_length {
            0 => tokens,
            context => tokens.min(context.into()),
        };
        let memory = MemoryEstimate::new(weights, model.cache_bytes(tokens));
        let share = if model.parameters > 0 {
            (model.active_parameters() as f64 / model.parameters as f64).min(1.0)
        } else {
            1.0
        };
        let read = weights as f64 * share + memory.cache as f64;
        let fit = Fit {
            tokens,
            memory,
            usable_bytes: device.usable_bytes,
            tokens_per_second: device.bandwidth as f64 * EFFICIENCY / read.max(1.0),
        };
        let total = u128::from(memory.total());
        let usable = u128::from(device.usable_bytes);
        if total > usable {
            Self::TooLarge(fit)
        } else if total * 100 > usable * 85 {
            Self::Tight(fit)
        } else {
            Self::Fits(fit)
        }
    }

    /// The numbers, where there are any.
    pub fn fit(&self) -> Option<&Fit> {
        match self {
            Self::Fits(fit) | Self::Tight(fit) | Self::TooLarge(fit) => Some(fit),
            Self::Unknown => None,
        }
    }

    /// Whether the model runs, with room to spare or without.
    pub fn is_possible(&self) -> bool {
        matches!(self, Self::Fits(_) | Self::Tight(_))
    }
}
