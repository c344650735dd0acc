//! Writing what was planned, some rows at a time.

use std::collections::BTreeMap;

use mlx_engine_checkpoint::{AffineTensor, CheckpointError, FloatType, ShardWriter};

use super::matrix::{Block, Matrix};
use super::options::{Conversion, ConvertProgress};
use super::plan::{Item, Target};
use crate::ModelError;
use crate::weights::Loader;

/// Elements that are converted at once.
const BLOCK_ELEMENTS: usize = 1 << 21;

/// What has been written.
pub(super) struct Written<'a> {
    pub(super) done: u64,
    pub(super) total: u64,
    /// What became of tensors, by what they were and are.
    pub(super) kinds: BTreeMap<(String, String), Conversion>,
    pub(super) loader: &'a Loader<'a>,
    pub(super) progress: &'a mut dyn FnMut(ConvertProgress<'_>) -> Result<(), ModelError>,
}

impl Written<'_> {
    pub(super) fn write(&mut self, item: &Item<'_>, writer: &mut ShardWriter) -> Result<(), ModelError> {
        match item {
            Item::Vector {
                name,
                values,
                from,
                to,
            } => {
                let mut exact = true;
                let bytes = encode(name, values, *to, &mut exact)?;
                self.put(writer, name, &bytes)?;
                self.count(item, from.to_string(), to.to_string(), exact);
            }
            Item::Matrix { name, matrix, to } => {
                let block = (BLOCK_ELEMENTS / matrix.columns.max(1)).max(1);
                let mut exact = true;
                let mut start = 0;
                while start < matrix.rows {
                    let end = (start + block).min(matrix.rows);
                    self.block(writer, name, matrix, *to, start..end, &mut exact)?;
                    start = end;
                    // What was read lies elsewhere now, and the file's pages would count as this process's memory.
                    self.loader.release();
                }
                self.count(item, matrix.description(), to.description(), exact);
            }
        }
        Ok(())
    }

    fn block(
        &mut self,
        writer: &mut ShardWriter,
        name: &str,
        matrix: &Matrix<'_>,
        to: Target,
        range: std::ops::Range<usize>,
        exact: &mut bool,
    ) -> Result<(), ModelError> {
        let weight = format!("{name}.weight");
        let shape = [range.len(), matrix.columns];
        let block = matrix.read(range)?;
        let (bits, group_size, stored) = match to {
            Target::Floats(float_type) => {
                let bytes = encode(&weight, &block.into_floats(), float_type, exact)?;
                return self.put(writer, &weight, &bytes);
            }
            Target::Affine {
                bits,
                group_size,
                stored,
            } => (bits, group_size, stored),
        };
        let affine = match block {
            Block::Affine(affine) if (affine.bits, affine.group_size) == (bits, group_size) => affine,
            block => {
                *exact = false;
                // As mlx-lm, which gives a model its type before it quantizes it.
                let mut values = block.into_floats();
                for value in &mut values {
                    *value = stored.round(*value);
                }
                AffineTensor::quantize(&values, shape, bits, group_size, stored)
                    .map_err(|error| named(&weight, error))?
            }
        };
        let packed: Vec<u8> = affine.packed.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.put(writer, &weight, &packed)?;
        for (part, values) in [("scales", &affine.scales), ("biases", &affine.biases)] {
            let name = format!("{name}.{part}");
            let bytes = encode(&name, values, stored, exact)?;
            self.put(writer, &name, &bytes)?;
        }
        Ok(())
    }

    fn put(&mut self, writer: &mut ShardWriter, name: &str, bytes: &[u8]) -> Result<(), ModelError> {
        writer.write(name, bytes)?;
        self.done += bytes.len() as u64;
        (self.progress)(ConvertProgress {
            done: self.done,
            total: self.total,
            tensor: name,
        })
    }

    fn count(&mut self, item: &Item<'_>, from: String, to: String, exact: bool) {
        let kind = self
            .kinds
            .entry((from.clone(), to.clone()))
            .or_insert(Conversion {
                from,
                to,
                tensors: 0,
                exact: 0,
                elements: 0,
            });
        kind.tensors += 1;
        kind.exact += usize::from(exact);
        kind.elements += item.elements();
    }

    /// The kinds, those with most elements first.
    pub(super) fn conversions(&self) -> Vec<Conversion> {
        let mut conversions: Vec<Conversion> = self.kinds.values().cloned().collect();
        conversions.sort_by_key(|conversion| std::cmp::Reverse(conversion.elements));
        conversions
    }
}

/// Floats in a type. `exact` becomes false where one of them is not in it.
fn encode(
    tensor: &str,
    values: &[f32],
    float_type: FloatType,
    exact: &mut bool,
) -> Result<Vec<u8>, ModelError> {
    if !float_type.holds(values) {
        *exact = false;
        let too_large = |&value: &f32| value.is_finite() && !float_type.round(value).is_finite();
        if let Some(value) = values.iter().copied().find(too_large) {
            return Err(ModelError::Convert {
                tensor: tensor.to_owned(),
                message: format!("{value} is beyond the range of {float_type}"),
            });
        }
    }
    Ok(float_type.encode(values))
}

/// Gives the error of a matrix its name.
fn named(tensor: &str, error: CheckpointError) -> ModelError {
    match error {
        CheckpointError::Quantization {
            bits,
            group_size,
            message,
        } => ModelError::Quantization {
            tensor: tensor.to_owned(),
            bits,
            group_size,
            message,
        },
        error => error.into(),
    }
}
