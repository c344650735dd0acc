//! How many bits a weight takes in the files.

use std::collections::BTreeMap;

use serde_json::Value;

use super::EstimateError;
use super::fields::{Count, Fields};

/// How the matrices of a checkpoint are stored.
#[derive(Clone, Debug)]
pub(super) struct Packing {
    /// Bits of a weight that is not quantized: 32 for `float32`, else 16.
    plain_bits: Count,
    default: Option<Format>,
    /// What single modules have instead, by the [`key`] of their path; `None` for those that stay in floating point.
    overrides: BTreeMap<String, Option<Format>>,
    /// Whether the default is for the experts alone.
    experts_only: bool,
}

/// A format of blocks: `bits` a weight, and `block_bits` for each group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    pub(super) bits: Count,
    group_size: Count,
    block_bits: Count,
}

/// What a matrix is, as far as packing asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Part of each step, or a table to look up in.
    Common,
    /// Part of an expert.
    Expert,
}

impl Packing {
    /// Reads MLX's `quantization` or, for a checkpoint that MLX did not convert, `quantization_config`.
    pub(super) fn read(config: &Fields<'_>, text: &Fields<'_>) -> Result<Self, EstimateError> {
        let dtype = [config, text]
            .into_iter()
            .flat_map(|fields| [fields.value("torch_dtype"), fields.value("dtype")])
            .flatten()
            .find_map(Value::as_str);
        let mut packing = Self {
            plain_bits: if dtype == Some("float32") { 32 } else { 16 },
            default: None,
            overrides: BTreeMap::new(),
            experts_only: false,
        };
        let mlx = config.object("quantization")?;
        let other = match &mlx {
            Some(_) => None,
            None => config
                .object("quantization_config")?
                .or(text.object("quantization_config")?),
        };
        if let Some(fields) = mlx {
            packing.read_mlx(&fields)?;
        } else if let Some(fields) = other {
            match fields.text("quant_method")? {
                None if fields.has("bits") => packing.read_mlx(&fields)?,
                // NVIDIA's ModelOpt names what it does elsewhere, and others nothing.
                None | Some("modelopt") => match fields.text("quant_algo")? {
                    Some("FP8") => packing.read_foreign("fp8", &fields)?,
                    Some(_) => return Err(fields.invalid("quant_algo", "FP8")),
                    None => return Err(fields.missing("quant_method")),
                },
                Some(method) => packing.read_foreign(method, &fields)?,
            }
        }
        Ok(packing)
    }

    fn read_mlx(&mut self, fields: &Fields<'_>) -> Result<(), EstimateError> {
        self.default = Some(Format::read(fields)?);
        for (path, value) in fields.entries() {
            let format = match value {
                Value::Object(_) => match fields.object(path)? {
                    Some(own) => Some(Format::read(&own)?),
                    None => continue,
                },
                Value::Bool(false) => None,
                // `true` is the default, anything else a setting of the whole.
                _ => continue,
            };
            self.overrides.insert(key(path).to_owned(), format);
        }
        Ok(())
    }

    fn read_foreign(&mut self, method: &str, fields: &Fields<'_>) -> Result<(), EstimateError> {
        self.default = Some(match method {
            "mxfp4" => {
                self.experts_only = true;
                Format::new("mxfp4", 4, 32)
            }
            // One 32-bit scale for a block of 128 by 128, or for all: two in ten thousand at most.
            "fp8" | "fbgemm_fp8" => Format {
                bits: 8,
                group_size: 1,
                block_bits: 0,
            },
            "awq" | "gptq" => {
                let bits = fields.dimension("bits")?.ok_or_else(|| fields.missing("bits"))?;
                let group_size = fields.dimension("group_size")?.unwrap_or(128);
                Format {
                    bits,
                    group_size,
                    block_bits: 16 + bits,
                }
            }
            _ => return Err(fields.invalid("quant_method", "one of mxfp4, fp8, fbgemm_fp8, awq, gptq")),
        });
        // None of them touches the two ends, and each leaves out what it names.
        for path in ["embed_tokens", "lm_head"] {
            self.overrides.insert(path.to_owned(), None);
        }
        for name in ["modules_to_not_convert", "ignore"] {
            for path in fields.texts(name)?.unwrap_or_default() {
                self.overrides.insert(key(path).to_owned(), None);
            }
        }
        Ok(())
    }

    pub(super) fn plain_bits(&self) -> Count {
        self.plain_bits
    }

    /// The bits of most weights, where there is one format for them.
    pub(super) fn default_bits(&self) -> Option<u32> {
        self.default
            .map(|format| u32::try_from(format.bits).unwrap_or(u32::MAX))
    }

    /// The bits of a whole matrix, whose rows have `columns` weights. Rows that are no whole number of groups stay in
    /// floating point, as MLX leaves them.
    pub(super) fn bits_of(&self, role: Role, path: &str, rows: Count, columns: Count) -> Count {
        let default = match role {
            Role::Common if self.experts_only => None,
            Role::Common | Role::Expert => self.default,
        };
        let format = match self.overrides.get(key(path)) {
            Some(own) => *own,
            None => default,
        };
        let weights = rows * columns;
        match format {
            Some(format) if columns.is_multiple_of(format.group_size) => {
                weights * format.bits + weights / format.group_size * format.block_bits
            }
            _ => weights * self.plain_bits,
        }
    }
}

impl Format {
    fn read(fields: &Fields<'_>) -> Result<Self, EstimateError> {
        let mode = fields.text("mode")?.unwrap_or("affine");
        let (bits, group_size) = match mode {
            "affine" => (4, 64),
            "mxfp4" => (4, 32),
            "nvfp4" => (4, 16),
            "mxfp8" => (8, 32),
            _ => return Err(fields.invalid("mode", "one of affine, mxfp4, nvfp4, mxfp8")),
        };
        let bits = fields.ranged("bits", 1, 16)?.map_or(bits, Count::from);
        let group_size = fields
            .ranged("group_size", 1, 1024)?
            .map_or(group_size, Count::from);
        Ok(Self::new(mode, bits, group_size))
    }

    fn new(mode: &str, bits: Count, group_size: Count) -> Self {
        Self {
            bits,
            group_size,
            // Affine: a scale and a bias of 16 bits. The others: a scale of 8.
            block_bits: if mode == "affine" { 32 } else { 8 },
        }
    }
}

/// The part of a module's path that does not depend on what wraps the decoder: from `layers.` on, else the last name.
fn key(path: &str) -> &str {
    match path.find("layers.") {
        Some(start) => &path[start..],
        None => path.rsplit('.').next().unwrap_or(path),
    }
}
