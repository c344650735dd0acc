//! The keys and values that a GGUF file has beside its tensors.

use std::collections::HashMap;

use crate::CheckpointError;

/// A value of a GGUF file's metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// `uint8` to `uint64`.
    Unsigned(u64),
    /// `int8` to `int64`.
    Signed(i64),
    /// `float32` and `float64`.
    Float(f64),
    /// `bool`.
    Bool(bool),
    /// A string.
    String(String),
    /// An array, whose items have one type.
    Array(Vec<GgufValue>),
}

impl GgufValue {
    fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a bool",
            Self::String(_) => "a string",
            Self::Array(_) => "an array",
        }
    }

    /// The value as an integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(value) => Some(value),
            Self::Signed(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// The value as an integer.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::Unsigned(value) => value.try_into().ok(),
            Self::Signed(value) => Some(value),
            _ => None,
        }
    }

    /// The value as a number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::Float(value) => Some(value),
            Self::Unsigned(value) => Some(value as f64),
            Self::Signed(value) => Some(value as f64),
            _ => None,
        }
    }

    /// The value as a bool.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = *self {
            Some(value)
        } else {
            None
        }
    }

    /// The value as a string.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(value) = self {
            Some(value)
        } else {
            None
        }
    }

    /// The value as an array.
    pub fn as_array(&self) -> Option<&[GgufValue]> {
        if let Self::Array(values) = self {
            Some(values)
        } else {
            None
        }
    }
}

/// The metadata of a GGUF file.
///
/// Each getter comes in two forms: `optional_*` is `None` where the key is absent, the other is an error then. A key
/// with a value of another type is an error in both.
#[derive(Debug, Default)]
pub struct Metadata {
    pub(super) entries: Vec<(String, GgufValue)>,
    pub(super) index: HashMap<String, usize>,
}

impl Metadata {
    /// Keeps the entries whose keys `wanted` says.
    pub(super) fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.entries.retain(|(key, _)| wanted(key));
        let keys = self.entries.iter().enumerate();
        self.index = keys.map(|(index, (key, _))| (key.clone(), index)).collect();
    }

    /// All keys and values, in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &GgufValue)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.index.get(key).map(|&index| &self.entries[index].1)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a GgufValue) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        convert(value)
            .map(Some)
            .ok_or_else(|| CheckpointError::WrongType {
                key: key.to_owned(),
                found: value.kind().to_owned(),
                expected,
            })
    }

    /// An integer of any width that is not negative.
    pub fn optional_u64(&self, key: &str) -> Result<Option<u64>, CheckpointError> {
        self.typed(key, "an integer that is not negative", GgufValue::as_u64)
    }

    /// An integer of any width that is not negative.
    pub fn u64(&self, key: &str) -> Result<u64, CheckpointError> {
        required(key, self.optional_u64(key))
    }

    /// An integer from 0 to 2^32 - 1, as token ids are.
    pub fn optional_u32(&self, key: &str) -> Result<Option<u32>, CheckpointError> {
        self.typed(key, "an integer of 32 bits", |value| {
            value.as_u64()?.try_into().ok()
        })
    }

    /// A number.
    pub fn optional_f64(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.typed(key, "a number", GgufValue::as_f64)
    }

    /// A bool.
    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.typed(key, "a bool", GgufValue::as_bool)
    }

    /// A string.
    pub fn optional_string(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        self.typed(key, "a string", GgufValue::as_str)
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<&str, CheckpointError> {
        required(key, self.optional_string(key))
    }

    /// An array of strings.
    pub fn optional_strings(&self, key: &str) -> Result<Option<Vec<String>>, CheckpointError> {
        self.typed(key, "an array of strings", |value| {
            value
                .as_array()?
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect()
        })
    }

    /// An array of numbers.
    pub fn optional_f32s(&self, key: &str) -> Result<Option<Vec<f32>>, CheckpointError> {
        self.typed(key, "an array of numbers", |value| {
            value
                .as_array()?
                .iter()
                .map(|item| item.as_f64().map(|number| number as f32))
                .collect()
        })
    }

    /// An array of integers of 32 bits.
    pub fn optional_i32s(&self, key: &str) -> Result<Option<Vec<i32>>, CheckpointError> {
        self.typed(key, "an array of integers of 32 bits", |value| {
            value
                .as_array()?
                .iter()
                .map(|item| item.as_i64()?.try_into().ok())
                .collect()
        })
    }
}

fn required<T>(key: &str, value: Result<Option<T>, CheckpointError>) -> Result<T, CheckpointError> {
    value?.ok_or_else(|| CheckpointError::MissingKey { key: key.to_owned() })
}
