//! The tensors of a checkpoint, under the names and in the order of rows that an MLX folder has.

use mlx_engine_checkpoint::FloatType;

use super::matrix::{Matrix, interleaved_row};
use crate::names::Place;
use crate::source::Source;
use crate::weights::{Loader, places};
use crate::{DecoderSpec, ModelError};

/// A tensor of the source.
pub(super) enum Tensor<'a> {
    /// A norm's weights or a bias, by its whole name.
    Vector {
        name: String,
        values: Vec<f32>,
        stored: FloatType,
    },
    /// A matrix, by its name without `.weight`.
    Matrix { name: String, matrix: Matrix<'a> },
}

pub(super) struct Reader<'a> {
    pub(super) source: &'a Source,
    pub(super) loader: &'a Loader<'a>,
}

impl<'a> Reader<'a> {
    /// The tensors in the order of the model, with the names and in the order of rows that the target has.
    pub(super) fn tensors(&self, target: &DecoderSpec) -> Result<Vec<Tensor<'a>>, ModelError> {
        let mut tensors = Vec::new();
        for (place, bias) in places(&self.source.spec) {
            let name = place.hugging_face(target);
            let interleaved = self.interleaved(place, target);
            if place.is_norm() {
                tensors.push(self.vector(place, "weight", target)?);
            } else {
                let matrix = Matrix {
                    interleaved,
                    ..self.loader.unread(place)?
                };
                tensors.push(Tensor::Matrix { name, matrix });
            }
            if bias {
                tensors.push(self.vector(place, "bias", target)?);
            }
        }
        Ok(tensors)
    }

    fn vector(&self, place: Place, suffix: &str, target: &DecoderSpec) -> Result<Tensor<'a>, ModelError> {
        let (mut values, stored) = self.loader.any_vector(place, suffix)?;
        if let Some(head) = self.interleaved(place, target)
            && values.len().is_multiple_of(head)
        {
            values = (0..values.len())
                .map(|row| values[interleaved_row(row, head)])
                .collect();
        }
        // GGUF has the factors that Gemma's folders have less 1.
        if place.is_norm() && target.norms_from_one && !self.source.spec.norms_from_one {
            for value in &mut values {
                *value -= 1.0;
            }
        }
        Ok(Tensor::Vector {
            name: format!("{}.{suffix}", place.hugging_face(target)),
            values,
            stored,
        })
    }

    /// The width of a head where the rows of the place are interleaved in the source and not in the target.
    fn interleaved(&self, place: Place, target: &DecoderSpec) -> Option<usize> {
        let spec = &self.source.spec;
        let turned = spec.is_interleaved() && !target.is_interleaved();
        (turned && place.is_rotated()).then_some(spec.head_dim)
    }
}
