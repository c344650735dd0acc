//! From a checkpoint to the weights and the `config.json` of an MLX folder.
//!
//! Nothing of MLX is called: the quantizer is that of `mlx-engine-checkpoint`. Matrices go through some rows at a time, so that
//! memory does not grow with the model.

mod config;
pub(crate) mod matrix;
mod options;

use std::collections::BTreeMap;
use std::path::Path;

use mlx_engine_checkpoint::{
    AffineTensor, CheckpointError, Dtype, FloatType, GgmlType, ShardWriter, TensorLayout,
};
use serde_json::{Map, Value};

pub use options::{Conversion, ConvertOptions, ConvertProgress, Recipe, WeightBits};

use crate::names::Place;
use crate::source::Source;
use crate::spec::NormPlacement;
use crate::weights::{Loader, places};
use crate::{DecoderSpec, ModelError};
use config::TargetConfig;
use matrix::{Block, Matrix, Packing, affine_description, interleaved_row};

/// Elements that are converted at once.
const BLOCK_ELEMENTS: usize = 1 << 21;

/// What was written.
#[derive(Clone, Debug)]
pub struct ConvertedWeights {
    /// The `config.json` that belongs to the weights, with `quantization`.
    pub config: Map<String, Value>,
    /// What became of the tensors, by kind.
    pub conversions: Vec<Conversion>,
    /// The number of weights.
    pub parameters: u64,
    /// Bytes of the weights.
    pub bytes: u64,
    /// The model types of the weights, as `config.json` has them.
    pub model_type: String,
}

/// Writes a checkpoint's weights into a folder in MLX's layout, `model*.safetensors` and their index, and tells `progress` of each
/// block of rows; an error from it gives the conversion up and is returned. What was written so far is left to the caller.
///
/// # Errors
///
/// Where the checkpoint lacks a tensor or has one that the model does not use, where bits and group size are none of MLX's, where a
/// value does not fit the type it should have or is not finite, where `config.json` has no way to say what a GGUF file is, where a
/// file cannot be written, and what `progress` returns.
pub fn convert_weights(
    source: &Source,
    options: &ConvertOptions,
    folder: &Path,
    progress: &mut dyn FnMut(ConvertProgress<'_>) -> Result<(), ModelError>,
) -> Result<ConvertedWeights, ModelError> {
    check_options(options)?;
    let loader = Loader::new(source)?;
    let mut target = TargetConfig::new(source)?;
    let tensors = Reader {
        source,
        loader: &loader,
    }
    .tensors(&target.spec)?;
    let plan = Plan::new(source, options, &tensors, &mut target);
    let layouts: Vec<TensorLayout> = plan.items.iter().flat_map(Item::layouts).collect();
    let mut writer = ShardWriter::create(folder, &layouts, ShardWriter::SHARD_BYTES)?;
    let mut written = Written {
        done: 0,
        total: writer.total_bytes(),
        kinds: BTreeMap::new(),
        loader: &loader,
        progress,
    };
    for item in &plan.items {
        written.write(item, &mut writer)?;
    }
    let parameters = plan.items.iter().map(Item::elements).sum();
    writer.finish(parameters)?;
    Ok(ConvertedWeights {
        model_type: target.spec.model_type.clone(),
        config: target.config,
        conversions: written.conversions(),
        parameters,
        bytes: written.total,
    })
}

fn check_options(options: &ConvertOptions) -> Result<(), ModelError> {
    let (bits, group_size) = match options.bits {
        WeightBits::Uniform { bits, group_size } => (bits, group_size),
        WeightBits::Mixed { recipe, group_size } => (recipe.bits().0, group_size),
        WeightBits::AsTheyAre | WeightBits::Floats => return Ok(()),
    };
    if !AffineTensor::BITS.contains(&bits) {
        return Err(ModelError::config(format!(
            "{bits} bits were asked for, MLX has 2, 3, 4, 5, 6 and 8"
        )));
    }
    if !AffineTensor::GROUP_SIZES.contains(&group_size) {
        return Err(ModelError::config(format!(
            "groups of {group_size} were asked for, MLX has 32, 64 and 128"
        )));
    }
    Ok(())
}

/// A tensor of the source.
enum Tensor<'a> {
    /// A norm's weights or a bias, by its whole name.
    Vector {
        name: String,
        values: Vec<f32>,
        stored: FloatType,
    },
    /// A matrix, by its name without `.weight`.
    Matrix { name: String, matrix: Matrix<'a> },
}

struct Reader<'a> {
    source: &'a Source,
    loader: &'a Loader<'a>,
}

impl<'a> Reader<'a> {
    /// The tensors in the order of the model, with the names and in the order of rows that the target has.
    fn tensors(&self, target: &DecoderSpec) -> Result<Vec<Tensor<'a>>, ModelError> {
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

/// What is written.
enum Item<'a> {
    Vector {
        name: &'a str,
        values: &'a [f32],
        from: FloatType,
        to: FloatType,
    },
    Matrix {
        name: &'a str,
        matrix: Matrix<'a>,
        to: Target,
    },
}

/// What a matrix becomes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Floats(FloatType),
    Affine {
        bits: u32,
        group_size: u32,
        stored: FloatType,
    },
}

impl Item<'_> {
    fn layouts(&self) -> Vec<TensorLayout> {
        let layout = |name: String, dtype, shape: &[usize]| TensorLayout {
            name,
            dtype,
            shape: shape.to_vec(),
        };
        match self {
            Self::Vector { name, values, to, .. } => {
                vec![layout((*name).to_owned(), to.dtype(), &[values.len()])]
            }
            Self::Matrix { name, matrix, to } => match *to {
                Target::Floats(float_type) => {
                    let shape = [matrix.rows, matrix.columns];
                    vec![layout(format!("{name}.weight"), float_type.dtype(), &shape)]
                }
                Target::Affine {
                    bits,
                    group_size,
                    stored,
                } => {
                    let packed = [matrix.rows, matrix.columns * bits as usize / 32];
                    let groups = [matrix.rows, matrix.columns / group_size as usize];
                    vec![
                        layout(format!("{name}.weight"), Dtype::U32, &packed),
                        layout(format!("{name}.scales"), stored.dtype(), &groups),
                        layout(format!("{name}.biases"), stored.dtype(), &groups),
                    ]
                }
            },
        }
    }

    fn elements(&self) -> u64 {
        match self {
            Self::Vector { values, .. } => values.len() as u64,
            Self::Matrix { matrix, .. } => matrix.rows as u64 * matrix.columns as u64,
        }
    }
}

struct Plan<'a> {
    items: Vec<Item<'a>>,
}

impl<'a> Plan<'a> {
    fn new(
        source: &Source,
        options: &ConvertOptions,
        tensors: &'a [Tensor<'a>],
        target: &mut TargetConfig,
    ) -> Self {
        let layers = source.spec.layers;
        let asked = options.dtype.or_else(|| target.stated_type());
        let matrices = || {
            tensors.iter().filter_map(|tensor| match tensor {
                Tensor::Matrix { name, matrix } => Some((name, matrix)),
                Tensor::Vector { .. } => None,
            })
        };
        let is_gguf = source.gguf().is_some();
        // One type for all that is quantized anew from GGUF, as files in MLX's layout have it.
        let quantizes = matches!(
            options.bits,
            WeightBits::Uniform { .. } | WeightBits::Mixed { .. }
        );
        // The residual stream of Gemma is too large for float16.
        let is_large = source.spec.norms == NormPlacement::Around;
        let common = (is_gguf && quantizes)
            .then(|| widest(matrices().map(|(_, matrix)| matrix.packing.common_type())))
            .map(|common| match common {
                FloatType::F16 if is_large => FloatType::BF16,
                common => common,
            });
        let target_of = |name: &str, matrix: &Matrix<'_>| {
            let wanted = match options.bits {
                WeightBits::AsTheyAre => matrix.affine(),
                WeightBits::Uniform { bits, group_size } => Some((bits, group_size)),
                WeightBits::Mixed { recipe, group_size } => Some((recipe.bits_of(name, layers), group_size)),
                WeightBits::Floats => None,
            };
            // As mlx-lm: a matrix whose rows are no whole groups stays what it is.
            let fits = |&(_, group_size): &(u32, u32)| matrix.columns.is_multiple_of(group_size as usize);
            let wanted = match options.bits {
                WeightBits::Floats => None,
                _ => wanted.filter(fits).or_else(|| matrix.affine()),
            };
            let stored = asked.or(common);
            let stored = stored.unwrap_or_else(|| matrix.packing.float_type());
            wanted.map_or(Target::Floats(stored), |(bits, group_size)| Target::Affine {
                bits,
                group_size,
                stored,
            })
        };
        let targets: Vec<(&str, Target)> = matrices()
            .map(|(name, matrix)| (name.as_str(), target_of(name, matrix)))
            .collect();
        let of_vectors = asked.or(common).or_else(|| {
            let exact = |float_type: FloatType| {
                tensors.iter().all(|tensor| match tensor {
                    Tensor::Vector { values, .. } => float_type.holds(values),
                    Tensor::Matrix { .. } => true,
                })
            };
            is_gguf
                .then(|| widest(targets.iter().map(|(_, target)| target.stored())))
                .filter(|&float_type| !(is_large && float_type == FloatType::F16) && exact(float_type))
        });
        let mut next = targets.iter();
        let items: Vec<Item<'a>> = tensors
            .iter()
            .filter_map(|tensor| {
                Some(match tensor {
                    Tensor::Vector { name, values, stored } => Item::Vector {
                        name,
                        values,
                        from: *stored,
                        to: of_vectors.unwrap_or(*stored),
                    },
                    Tensor::Matrix { name, matrix } => Item::Matrix {
                        name,
                        matrix: *matrix,
                        to: next.next()?.1,
                    },
                })
            })
            .collect();
        let quantized = targets.iter().filter_map(|(name, target)| match *target {
            Target::Affine { bits, group_size, .. } => Some((*name, bits, group_size)),
            Target::Floats(_) => None,
        });
        target.set_quantization(quantized);
        target.set_type(options.dtype.or(of_vectors.filter(|_| is_gguf)));
        Self { items }
    }
}

impl Target {
    fn stored(&self) -> FloatType {
        match *self {
            Self::Floats(float_type) => float_type,
            Self::Affine { stored, .. } => stored,
        }
    }

    fn description(&self) -> String {
        match *self {
            Self::Floats(float_type) => float_type.to_string(),
            Self::Affine {
                bits,
                group_size,
                stored,
            } => format!("{}, scales in {stored}", affine_description(bits, group_size)),
        }
    }
}

impl Packing<'_> {
    /// The type that has the floats without loss: the scales of what is in MLX's affine form, the values of what is not.
    fn float_type(&self) -> FloatType {
        match self {
            Self::Floats(float_type, _) => *float_type,
            Self::Affine { scales, .. } => scales.0,
            Self::Ggml(ggml_type, _) => match ggml_type {
                GgmlType::BF16 => FloatType::BF16,
                GgmlType::F16
                | GgmlType::Q4_0
                | GgmlType::Q4_1
                | GgmlType::Q5_0
                | GgmlType::Q5_1
                | GgmlType::Q8_0 => FloatType::F16,
                // Of the others a scale is a product of a float16 and an integer of 6 bits.
                _ => FloatType::F32,
            },
        }
    }

    /// The type that a model with such a matrix is computed in.
    fn common_type(&self) -> FloatType {
        match self {
            Self::Ggml(ggml_type, _) if !ggml_type.is_float() => FloatType::F16,
            _ => self.float_type(),
        }
    }
}

/// The one type that all have, or float32, which holds any two.
fn widest(mut types: impl Iterator<Item = FloatType>) -> FloatType {
    let Some(first) = types.next() else {
        return FloatType::F32;
    };
    if types.all(|float_type| float_type == first) {
        first
    } else {
        FloatType::F32
    }
}

/// What has been written.
struct Written<'a> {
    done: u64,
    total: u64,
    /// What became of tensors, by what they were and are.
    kinds: BTreeMap<(String, String), Conversion>,
    loader: &'a Loader<'a>,
    progress: &'a mut dyn FnMut(ConvertProgress<'_>) -> Result<(), ModelError>,
}

impl Written<'_> {
    fn write(&mut self, item: &Item<'_>, writer: &mut ShardWriter) -> Result<(), ModelError> {
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
    fn conversions(&self) -> Vec<Conversion> {
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
