//! What is said of a parameter that is out of its range, and the checks of ranges.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// A parameter that is out of its range.
///
/// ```
/// use mlx_engine_core::ParamError;
///
/// struct Limits {
///     workers: u32,
///     share: f64,
/// }
///
/// impl Limits {
///     fn validate(&self) -> Result<(), ParamError> {
///         ParamError::between("workers", self.workers, 1..=64)?;
///         ParamError::check("share", self.share, self.share > 0.0, "above 0")
///     }
/// }
///
/// let error = Limits { workers: 65, share: 0.5 }.validate().unwrap_err();
/// assert_eq!((error.field(), error.value(), error.allowed()), ("workers", "65", "1 to 64"));
/// assert_eq!(error.to_string(), "`workers` is 65, allowed: 1 to 64");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("`{field}` is {value}, allowed: {allowed}")]
pub struct ParamError {
    field: String,
    value: String,
    allowed: String,
}

impl ParamError {
    /// Says that `field` has `value` where only `allowed` would do.
    pub fn new(field: impl Display, value: impl Display, allowed: impl Display) -> Self {
        Self {
            field: field.to_string(),
            value: value.to_string(),
            allowed: allowed.to_string(),
        }
    }

    /// Holds a value to a range, both ends of which are in it. NaN is in none.
    ///
    /// # Errors
    ///
    /// The value is not in the range.
    pub fn between<T: PartialOrd + Display>(
        field: impl Display,
        value: T,
        range: RangeInclusive<T>,
    ) -> Result<(), Self> {
        let within = range.contains(&value);
        let allowed = format_args!("{} to {}", range.start(), range.end());
        Self::check(field, value, within, allowed)
    }

    /// Holds a value to be no less than `least`. NaN is less than everything here.
    ///
    /// # Errors
    ///
    /// The value is less.
    pub fn at_least<T: PartialOrd + Display + Copy>(
        field: impl Display,
        value: T,
        least: T,
    ) -> Result<(), Self> {
        let within = value >= least;
        Self::check(field, value, within, format_args!("{least} or more"))
    }

    /// Says that only `allowed` would do, unless the value is `within` that.
    ///
    /// # Errors
    ///
    /// The value is not within what is allowed.
    pub fn check(
        field: impl Display,
        value: impl Display,
        within: bool,
        allowed: impl Display,
    ) -> Result<(), Self> {
        if within {
            Ok(())
        } else {
            Err(Self::new(field, value, allowed))
        }
    }

    /// The field, as it is spelled in requests: `temperature`, `logit_bias[42]`.
    pub fn field(&self) -> &str {
        &self.field
    }

    /// The value that was refused.
    pub fn value(&self) -> &str {
        &self.value
    }

    /// What the field may be.
    pub fn allowed(&self) -> &str {
        &self.allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_both_its_ends() {
        for value in [1, 5, 9] {
            assert_eq!(ParamError::between("n", value, 1..=9), Ok(()));
        }
        for value in [0, 10] {
            let error = ParamError::between("n", value, 1..=9).unwrap_err();
            assert_eq!(error, ParamError::new("n", value, "1 to 9"));
        }
        assert_eq!(ParamError::at_least("n", 64, 64), Ok(()));
        let error = ParamError::at_least("n", 63, 64).unwrap_err();
        assert_eq!(error.to_string(), "`n` is 63, allowed: 64 or more");
    }

    #[test]
    fn no_number_is_in_no_range() {
        assert!(ParamError::between("x", f64::NAN, f64::NEG_INFINITY..=f64::INFINITY).is_err());
        assert!(ParamError::at_least("x", f32::NAN, f32::NEG_INFINITY).is_err());
    }
}
