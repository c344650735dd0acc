//! The floating-point types that weights are stored in.

use std::fmt;

use half::{bf16, f16};

use crate::Dtype;

/// A floating-point type that weights are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE's 32 bits.
    F32,
    /// IEEE's 16 bits, up to 65504.
    F16,
    /// The upper half of 32 bits.
    BF16,
}

impl FloatType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// The name in `config.json` and in the options of mlx-lm: `float32`, `float16`, `bfloat16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    /// The type of a [name](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|float_type| float_type.name() == name)
    }

    /// The type in a safetensors file.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
        }
    }

    /// The type of a safetensors tensor, where it is one of these.
    pub fn of(dtype: Dtype) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|float_type| float_type.dtype() == dtype)
    }

    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The nearest number of this type, ties to even; infinite where the type does not reach that far.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::BF16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// Whether every number is one of this type.
    pub fn holds(self, values: &[f32]) -> bool {
        values
            .iter()
            .all(|&value| self.round(value).to_bits() == value.to_bits())
    }

    /// The numbers in this type, little-endian, each [rounded](Self::round).
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::F16 => values
                .iter()
                .flat_map(|&value| f16::from_f32(value).to_le_bytes())
                .collect(),
            Self::BF16 => values
                .iter()
                .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
                .collect(),
        }
    }

    /// The numbers of little-endian bytes; a rest that is no whole number is left out.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let two = || bytes.chunks_exact(2).map(|two| [two[0], two[1]]);
        match self {
            Self::F32 => bytes
                .chunks_exact(4)
                .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
                .collect(),
            Self::F16 => two().map(|two| f16::from_le_bytes(two).to_f32()).collect(),
            Self::BF16 => two().map(|two| bf16::from_le_bytes(two).to_f32()).collect(),
        }
    }
}

impl fmt::Display for FloatType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
