//! What becomes of each tensor: its bits and its type.

use mlx_engine_checkpoint::{Dtype, FloatType, GgmlType, TensorLayout};

use super::config::TargetConfig;
use super::matrix::{Matrix, Packing, affine_description};
use super::options::{ConvertOptions, WeightBits};
use super::read::Tensor;
use crate::source::Source;
use crate::spec::NormPlacement;

/// What is written.
pub(super) enum Item<'a> {
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
pub(super) enum Target {
    Floats(FloatType),
    Affine {
        bits: u32,
        group_size: u32,
        stored: FloatType,
    },
}

impl Item<'_> {
    pub(super) fn layouts(&self) -> Vec<TensorLayout> {
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

    pub(super) fn elements(&self) -> u64 {
        match self {
            Self::Vector { values, .. } => values.len() as u64,
            Self::Matrix { matrix, .. } => matrix.rows as u64 * matrix.columns as u64,
        }
    }
}

/// Decides what each tensor becomes, and says so in the configuration.
pub(super) fn plan<'a>(
    source: &Source,
    options: &ConvertOptions,
    tensors: &'a [Tensor<'a>],
    target: &mut TargetConfig,
) -> Vec<Item<'a>> {
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
    items
}

impl Target {
    fn stored(&self) -> FloatType {
        match *self {
            Self::Floats(float_type) => float_type,
            Self::Affine { stored, .. } => stored,
        }
    }

    pub(super) fn description(&self) -> String {
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
