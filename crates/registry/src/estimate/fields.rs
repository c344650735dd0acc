//! Reading a `config.json`: what is there, with the full name of the field in every complaint.

use serde_json::{Map, Value};

use super::EstimateError;

/// A count of weights, bytes or elements.
///
/// Every dimension read is at most [`MAX_DIMENSION`], and no formula here multiplies more than four of them with the
/// number of layers, so that sums and products stay far inside of 128 bits.
pub(super) type Count = u128;

/// Far above every real dimension (the largest are vocabularies and contexts), and small enough for exact sums.
const MAX_DIMENSION: u64 = 1 << 24;

/// An object of the configuration, and its place in the whole.
#[derive(Clone, Debug)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    prefix: String,
}

impl<'a> Fields<'a> {
    pub(super) fn of(value: &'a Value, field: &str) -> Result<Self, EstimateError> {
        let map = value
            .as_object()
            .ok_or_else(|| EstimateError::invalid(field, value, "an object"))?;
        Ok(Self {
            map,
            prefix: String::new(),
        })
    }

    fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// The value, unless it is missing or null.
    pub(super) fn value(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn has(&self, field: &str) -> bool {
        self.value(field).is_some()
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<Self>, EstimateError> {
        let Some(value) = self.value(field) else {
            return Ok(None);
        };
        let name = self.name(field);
        let mut fields = Self::of(value, &name)?;
        fields.prefix = format!("{name}.");
        Ok(Some(fields))
    }

    fn checked(&self, field: &str, value: &Value, min: u64, max: u64) -> Result<u64, EstimateError> {
        value
            .as_u64()
            .filter(|count| (min..=max).contains(count))
            .ok_or_else(|| {
                EstimateError::invalid(
                    &self.name(field),
                    value,
                    format_args!("a whole number from {min} to {max}"),
                )
            })
    }

    /// A whole number in a range.
    pub(super) fn ranged(&self, field: &str, min: u64, max: u64) -> Result<Option<u64>, EstimateError> {
        self.value(field)
            .map(|value| self.checked(field, value, min, max))
            .transpose()
    }

    /// A dimension: at least 1.
    pub(super) fn dimension(&self, field: &str) -> Result<Option<Count>, EstimateError> {
        Ok(self.ranged(field, 1, MAX_DIMENSION)?.map(Count::from))
    }

    /// A number of things that there may be none of.
    pub(super) fn count(&self, field: &str) -> Result<Option<Count>, EstimateError> {
        Ok(self.ranged(field, 0, MAX_DIMENSION)?.map(Count::from))
    }

    /// The first dimension that one of the names gives.
    pub(super) fn any_dimension(&self, names: &[&str]) -> Result<Option<Count>, EstimateError> {
        for name in names {
            if let Some(value) = self.dimension(name)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// The first count that one of the names gives.
    pub(super) fn any_count(&self, names: &[&str]) -> Result<Option<Count>, EstimateError> {
        for name in names {
            if let Some(value) = self.count(name)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    pub(super) fn required(&self, field: &str) -> Result<Count, EstimateError> {
        self.dimension(field)?.ok_or_else(|| self.missing(field))
    }

    pub(super) fn missing(&self, field: &str) -> EstimateError {
        EstimateError::Missing {
            field: self.name(field),
        }
    }

    pub(super) fn invalid(&self, field: &str, allowed: &str) -> EstimateError {
        EstimateError::invalid(
            &self.name(field),
            self.map.get(field).unwrap_or(&Value::Null),
            allowed,
        )
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool, EstimateError> {
        self.value(field).map_or(Ok(default), |value| {
            value
                .as_bool()
                .ok_or_else(|| EstimateError::invalid(&self.name(field), value, "true or false"))
        })
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&'a str>, EstimateError> {
        self.value(field)
            .map(|value| {
                value
                    .as_str()
                    .ok_or_else(|| EstimateError::invalid(&self.name(field), value, "a string"))
            })
            .transpose()
    }

    pub(super) fn texts(&self, field: &str) -> Result<Option<Vec<&'a str>>, EstimateError> {
        let Some(value) = self.value(field) else {
            return Ok(None);
        };
        let texts: Option<Vec<&str>> = value
            .as_array()
            .and_then(|items| items.iter().map(Value::as_str).collect());
        texts
            .map(Some)
            .ok_or_else(|| EstimateError::invalid(&self.name(field), value, "a list of strings"))
    }

    /// A list of indices of layers.
    pub(super) fn indices(&self, field: &str) -> Result<Option<Vec<u64>>, EstimateError> {
        let Some(value) = self.value(field) else {
            return Ok(None);
        };
        let indices: Option<Vec<u64>> = value
            .as_array()
            .and_then(|items| items.iter().map(Value::as_u64).collect());
        indices
            .map(Some)
            .ok_or_else(|| EstimateError::invalid(&self.name(field), value, "a list of whole numbers"))
    }
}
