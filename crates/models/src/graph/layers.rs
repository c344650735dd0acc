//! The layers that decoders are made of.

use mlx_rs::ops::indexing::take_axis;
use mlx_rs::{Array, Dtype, fast, ops};

use crate::ModelError;

/// A matrix of weights, `[rows, columns]`.
#[derive(Debug)]
pub(crate) enum Matrix {
    /// Floats of the compute type.
    Dense(Array),
    /// MLX's affine quantization.
    Quantized {
        packed: Array,
        scales: Array,
        biases: Array,
        group_size: i32,
        bits: i32,
    },
}

impl Matrix {
    /// `x` times the transposed matrix: `[.., columns]` to `[.., rows]`.
    pub(crate) fn project(&self, x: &Array) -> Result<Array, ModelError> {
        Ok(match self {
            Self::Dense(weight) => ops::matmul(x, weight.t())?,
            Self::Quantized {
                packed,
                scales,
                biases,
                group_size,
                bits,
            } => ops::quantized_matmul(x, packed, scales, biases, true, *group_size, *bits)?,
        })
    }

    /// The rows of these indices: `[..]` to `[.., columns]`, of type `dtype`.
    pub(crate) fn rows(&self, indices: &Array, dtype: Dtype) -> Result<Array, ModelError> {
        let rows = match self {
            Self::Dense(weight) => take_axis(weight, indices, 0)?,
            Self::Quantized {
                packed,
                scales,
                biases,
                group_size,
                bits,
            } => {
                let biases = take_axis(biases, indices, 0)?;
                let (packed, scales) = (take_axis(packed, indices, 0)?, take_axis(scales, indices, 0)?);
                ops::dequantize(packed, scales, &biases, *group_size, *bits)?
            }
        };
        Ok(if rows.dtype() == dtype {
            rows
        } else {
            rows.as_dtype(dtype)?
        })
    }

    pub(crate) fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Dense(weight) => vec![weight],
            Self::Quantized {
                packed,
                scales,
                biases,
                ..
            } => vec![packed, scales, biases],
        }
    }
}

/// A projection with an optional bias.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) matrix: Matrix,
    pub(crate) bias: Option<Array>,
}

impl Linear {
    pub(crate) fn forward(&self, x: &Array) -> Result<Array, ModelError> {
        let y = self.matrix.project(x)?;
        Ok(match &self.bias {
            Some(bias) => ops::add(y, bias)?,
            None => y,
        })
    }

    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.matrix.arrays().into_iter().chain(&self.bias)
    }
}

/// RMS norm over the last axis.
#[derive(Debug)]
pub(crate) struct Norm {
    pub(crate) weight: Array,
    pub(crate) eps: f32,
}

impl Norm {
    pub(crate) fn forward(&self, x: &Array) -> Result<Array, ModelError> {
        Ok(fast::rms_norm(x, Some(&self.weight), self.eps)?)
    }
}

/// The rotary position embedding.
#[derive(Debug)]
pub(crate) struct Rope {
    pub(crate) dimensions: i32,
    pub(crate) interleaved: bool,
    pub(crate) theta: f32,
    pub(crate) scale: f32,
    pub(crate) wavelengths: Option<Array>,
}

impl Rope {
    /// Rotates `[1, heads, tokens, head_dim]`, whose first token is at position `offset`.
    pub(crate) fn forward(&self, x: &Array, offset: usize) -> Result<Array, ModelError> {
        let theta = self.wavelengths.is_none().then_some(self.theta);
        let freqs = self.wavelengths.as_ref();
        Ok(fast::rope(
            x,
            self.dimensions,
            self.interleaved,
            theta,
            self.scale,
            offset as i32,
            freqs,
        )?)
    }

    /// Rotates `[sequences, heads, tokens, head_dim]`, where the first token of each sequence is at the position that
    /// `[sequences]` says.
    pub(crate) fn forward_each(&self, x: &Array, positions: &Array) -> Result<Array, ModelError> {
        let theta = self.wavelengths.is_none().then_some(self.theta);
        let freqs = self.wavelengths.as_ref();
        Ok(fast::rope_dynamic(
            x,
            self.dimensions,
            self.interleaved,
            theta,
            self.scale,
            positions,
            freqs,
        )?)
    }
}
