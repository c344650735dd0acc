//! A matrix of a checkpoint, read some rows at a time, so that the largest takes no more memory than the smallest.

use std::borrow::Cow;
use std::ops::Range;

use mlx_engine_checkpoint::{AffineTensor, CheckpointError, FloatType, GgmlType};

use crate::ModelError;

/// A matrix, and where its rows lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    pub(crate) packing: Packing<'a>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// The width of the heads whose rows GGUF's converter has interleaved.
    pub(crate) interleaved: Option<usize>,
}

/// How the elements are packed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Packing<'a> {
    Floats(FloatType, &'a [u8]),
    Ggml(GgmlType, &'a [u8]),
    Affine {
        packed: &'a [u8],
        scales: (FloatType, &'a [u8]),
        biases: (FloatType, &'a [u8]),
        bits: u32,
        group_size: u32,
    },
}

/// Some rows.
pub(super) enum Block {
    Floats(Vec<f32>),
    Affine(AffineTensor),
}

impl Block {
    pub(super) fn into_floats(self) -> Vec<f32> {
        match self {
            Self::Floats(values) => values,
            Self::Affine(affine) => affine.dequantize(),
        }
    }
}

impl<'a> Matrix<'a> {
    /// The bits and the group size, where the elements have MLX's affine form, if not its layout.
    pub(super) fn affine(&self) -> Option<(u32, u32)> {
        match self.packing {
            Packing::Floats(..) => None,
            Packing::Ggml(ggml_type, _) => AffineTensor::form_of(ggml_type),
            Packing::Affine { bits, group_size, .. } => Some((bits, group_size)),
        }
    }

    /// What the elements are, in words.
    pub(super) fn description(&self) -> String {
        match self.packing {
            Packing::Floats(float_type, _) => float_type.to_string(),
            Packing::Ggml(ggml_type, _) => ggml_type.to_string(),
            Packing::Affine { bits, group_size, .. } => affine_description(bits, group_size),
        }
    }

    /// Reads rows.
    pub(super) fn read(&self, range: Range<usize>) -> Result<Block, ModelError> {
        let (rows, columns) = (range.len(), self.columns);
        let elements = rows * columns;
        Ok(match self.packing {
            Packing::Floats(float_type, data) => {
                Block::Floats(float_type.decode(&self.bytes(data, columns * float_type.bytes(), &range)?))
            }
            Packing::Ggml(ggml_type, data) => {
                let row_bytes = columns / ggml_type.block_len() * ggml_type.block_bytes();
                let bytes = self.bytes(data, row_bytes, &range)?;
                match AffineTensor::from_ggml(ggml_type, &bytes, rows, columns)? {
                    Some(affine) => Block::Affine(affine),
                    None => Block::Floats(ggml_type.dequantize(&bytes)?),
                }
            }
            Packing::Affine {
                packed,
                scales,
                biases,
                bits,
                group_size,
            } => {
                let row_bytes = columns * bits as usize / 8;
                let groups = columns / group_size as usize;
                let floats = |(float_type, data): (FloatType, &'a [u8])| -> Result<Vec<f32>, ModelError> {
                    Ok(float_type.decode(&self.bytes(data, groups * float_type.bytes(), &range)?))
                };
                let packed: Vec<u32> = self
                    .bytes(packed, row_bytes, &range)?
                    .chunks_exact(4)
                    .map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]))
                    .collect();
                let affine = AffineTensor {
                    packed,
                    scales: floats(scales)?,
                    biases: floats(biases)?,
                    bits,
                    group_size,
                    rows,
                    columns,
                };
                debug_assert_eq!(affine.packed.len() * 32, elements * bits as usize);
                Block::Affine(affine)
            }
        })
    }

    /// The bytes of rows, each of which has so many.
    fn bytes(
        &self,
        data: &'a [u8],
        row_bytes: usize,
        range: &Range<usize>,
    ) -> Result<Cow<'a, [u8]>, ModelError> {
        let short = || {
            ModelError::Checkpoint(CheckpointError::Truncated {
                file: "the checkpoint".to_owned(),
                what: format!("row {}", range.end),
                needed: (range.end * row_bytes) as u64,
                available: data.len() as u64,
            })
        };
        let row = |row: usize| data.get(row * row_bytes..(row + 1) * row_bytes).ok_or_else(short);
        let Some(head) = self.interleaved else {
            return data
                .get(range.start * row_bytes..range.end * row_bytes)
                .map(Cow::Borrowed)
                .ok_or_else(short);
        };
        let mut gathered = Vec::with_capacity(range.len() * row_bytes);
        for wanted in range.clone() {
            gathered.extend_from_slice(row(interleaved_row(wanted, head))?);
        }
        Ok(Cow::Owned(gathered))
    }
}

/// Where the row of a head lies that GGUF's converter has interleaved: the first halves of the pairs come first in Hugging
/// Face's order, and beside their second halves in GGUF's.
pub(super) fn interleaved_row(row: usize, head: usize) -> usize {
    let (half, within) = (head / 2, row % head);
    row - within + within % half * 2 + within / half
}

pub(super) fn affine_description(bits: u32, group_size: u32) -> String {
    format!("{bits} bits in groups of {group_size}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_put_back() {
        let order: Vec<usize> = (0..12).map(|row| interleaved_row(row, 6)).collect();
        assert_eq!(order, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }
}
