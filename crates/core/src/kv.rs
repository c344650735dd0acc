//! How keys and values are kept.

use serde::{Deserialize, Serialize};

use crate::ParamError;

/// How the keys and values of what a sequence has seen are kept. The default keeps all of them, as floats.
///
/// ```
/// use mlx_engine_core::KvConfig;
///
/// let config = KvConfig { bits: Some(8), ..KvConfig::default() };
/// config.validate()?;
///
/// let error = KvConfig { bits: Some(7), ..config }.validate().unwrap_err();
/// assert_eq!(error.to_string(), "`kv.bits` is 7, allowed: 4 or 8");
/// # Ok::<(), mlx_engine_core::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvConfig {
    /// Bits of an element, 4 or 8; floats where `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<u32>,
    /// Elements of a head that share a scale and a bias where there are [`bits`](Self::bits): 32, 64 or 128, and whole
    /// groups have to make a head.
    pub group_size: u32,
    /// The first positions stay floats, this many, up to whole 64: what a model looks at throughout is mostly among them.
    pub quantized_from: usize,
    /// Positions that a token sees at most, itself and the kept ones included, 64 at least: the first
    /// [`keep`](Self::keep), and the last. All where `None`. What is no longer seen takes no memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_positions: Option<usize>,
    /// First positions that are always seen where there are [`max_positions`](Self::max_positions), fewer than half of them.
    pub keep: usize,
}

impl Default for KvConfig {
    fn default() -> Self {
        Self {
            bits: None,
            group_size: 64,
            quantized_from: 0,
            max_positions: None,
            keep: 4,
        }
    }
}

impl KvConfig {
    /// Checks every range.
    ///
    /// # Errors
    ///
    /// The first field that is out of its range, with its value and what is allowed.
    pub fn validate(&self) -> Result<(), ParamError> {
        if let Some(bits) = self.bits {
            ParamError::check("kv.bits", bits, [4, 8].contains(&bits), "4 or 8")?;
        }
        let whole = [32, 64, 128].contains(&self.group_size);
        ParamError::check("kv.group_size", self.group_size, whole, "32, 64 or 128")?;
        let Some(most) = self.max_positions else {
            return Ok(());
        };
        ParamError::at_least("kv.max_positions", most, 64)?;
        let allowed = format_args!("less than half of `kv.max_positions`, which is {most}");
        ParamError::check("kv.keep", self.keep, self.keep < most / 2, allowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_range_ends_where_it_says() {
        let check = |config: KvConfig, expect: &str| {
            let told = config.validate().map_err(|error| error.to_string());
            assert_eq!(told.err().as_deref().unwrap_or("valid"), expect, "{config:?}");
        };
        let config = KvConfig::default;
        check(config(), "valid");
        for bits in [4, 8] {
            let bits = Some(bits);
            check(KvConfig { bits, ..config() }, "valid");
        }
        for group_size in [32, 64, 128] {
            check(
                KvConfig {
                    group_size,
                    ..config()
                },
                "valid",
            );
        }
        let group_size = 16;
        check(
            KvConfig {
                group_size,
                ..config()
            },
            "`kv.group_size` is 16, allowed: 32, 64 or 128",
        );
        let window = |most: usize, keep| KvConfig {
            max_positions: Some(most),
            keep,
            ..config()
        };
        check(window(64, 31), "valid");
        check(window(63, 0), "`kv.max_positions` is 63, allowed: 64 or more");
        check(
            window(64, 32),
            "`kv.keep` is 32, allowed: less than half of `kv.max_positions`, which is 64",
        );
        // Where everything is seen, nothing has to be kept.
        let keep = 1000;
        check(KvConfig { keep, ..config() }, "valid");
    }
}
