//! From tensors in files to numbers in memory, strictly.

use std::collections::HashSet;

use half::{bf16, f16};
use mlx_engine_checkpoint::{
    AffineTensor, CheckpointError, Dtype as FileType, FloatType, GgmlType, ShardedCheckpoint, TensorView,
};
use mlx_engine_kernels::Precision;
use serde_json::Value;

use crate::convert::matrix::{Matrix, Packing};
use crate::names::{Part, Place, Projection, hugging_face_prefix};
use crate::source::{Source, Weights};
use crate::spec::{NormPlacement, QkNorm};
use crate::{DecoderSpec, ModelError};

/// The tensors that a decoder has, without the `.weight` and `.bias` that end their names.
pub(crate) fn places(spec: &DecoderSpec) -> impl Iterator<Item = (Place, bool)> {
    let (before, after) = (spec.norms.before(), spec.norms.after());
    let parts = [
        (before, Part::AttentionNorm, false),
        (true, Part::Query, spec.qkv_bias),
        (true, Part::Key, spec.qkv_bias),
        (true, Part::Value, spec.qkv_bias),
        (spec.qk_norm != QkNorm::None, Part::QueryNorm, false),
        (spec.qk_norm != QkNorm::None, Part::KeyNorm, false),
        (true, Part::AttentionOutput, spec.output_bias),
        (after, Part::PostAttentionNorm, false),
        (before, Part::MlpNorm, false),
        (after, Part::PostMlpNorm, false),
    ];
    let parts: Vec<_> = parts
        .into_iter()
        .filter(|(there, ..)| *there)
        .map(|(_, part, bias)| (part, bias))
        .collect();
    let layers = (0..spec.layers).flat_map(move |layer| {
        let mlp = mlp_parts(spec, layer);
        let parts = parts.clone().into_iter().chain(mlp);
        parts.map(move |(part, bias)| (Place::InLayer(layer, part), bias))
    });
    let output = (!spec.tied_embeddings).then_some((Place::Output, false));
    [(Place::Embedding, false), (Place::FinalNorm, false)]
        .into_iter()
        .chain(output)
        .chain(layers)
}

/// The matrices of a layer's MLP, or of its experts.
fn mlp_parts(spec: &DecoderSpec, layer: usize) -> Vec<(Part, bool)> {
    let Some(experts) = spec.experts_of(layer) else {
        return [Part::Gate, Part::Up, Part::Down]
            .map(|part| (part, spec.mlp_bias))
            .to_vec();
    };
    let of_experts = (0..experts.count)
        .flat_map(|number| Projection::ALL.map(|projection| Part::Expert(number, projection)));
    let shared = experts.shared.iter().flat_map(|_| {
        let matrices = Projection::ALL.map(Part::SharedExpert).into_iter();
        matrices.chain([Part::SharedGate])
    });
    let parts = [Part::Router].into_iter().chain(of_experts).chain(shared);
    parts.map(|part| (part, false)).collect()
}

/// Makes MLX's layout of ggml's blocks, where it does.
type FromGgml = fn(GgmlType, &[u8], usize, usize) -> Result<Option<AffineTensor>, CheckpointError>;

/// Bytes that a checkpoint's tensors take in memory, where they are computed with by the kernels of a CPU or, where there is no
/// `precision`, by MLX.
pub(crate) fn loaded_bytes(source: &Source, precision: Option<Precision>) -> u64 {
    let Weights::Gguf(file) = &source.weights else {
        // They lie in memory as in the files.
        return source.total_bytes();
    };
    let matrices = file.tensors().filter(|tensor| tensor.shape.len() > 1);
    matrices.fold(source.total_bytes(), |total, tensor| {
        let loaded = loaded_matrix_bytes(tensor.ggml_type, tensor.elements() as u64, precision);
        total
            .saturating_add(loaded)
            .saturating_sub(tensor.data.len() as u64)
    })
}

/// Bytes of a matrix of so many elements.
fn loaded_matrix_bytes(ggml_type: GgmlType, elements: u64, precision: Option<Precision>) -> u64 {
    let form = match precision {
        Some(Precision::Integer) => AffineTensor::rounded_form_of(ggml_type),
        Some(Precision::Exact) | None => AffineTensor::form_of(ggml_type),
    };
    let Some((bits, group_size)) = form else {
        let bytes = match (ggml_type.is_float(), precision) {
            (true, _) => ggml_type.block_bytes() as u64,
            (false, Some(_)) => 4,
            (false, None) => 2,
        };
        return elements.saturating_mul(bytes);
    };
    // Of numbers around zero the kernels need no bias, and of a product of two numbers float16 does not keep all.
    let with_biases = matches!(
        ggml_type,
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K
    );
    let of_product = matches!(ggml_type, GgmlType::Q4_K | GgmlType::Q5_K);
    let scale = match precision {
        Some(Precision::Exact) if of_product => 4,
        _ => 2,
    };
    let biases = u64::from(with_biases || precision.is_none());
    elements.saturating_mul(bits.into()) / 8 + elements / u64::from(group_size) * scale * (1 + biases)
}

/// Reads a checkpoint's tensors for a decoder.
pub(crate) struct Loader<'a> {
    source: &'a Source,
}

/// A matrix as a checkpoint has it, row-major.
pub(crate) enum RawMatrix {
    Dense(Floats),
    Affine(AffineTensor),
}

/// Floats in their own type.
pub(crate) enum Floats {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Floats {
    pub(crate) fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(values) => values,
            Self::F16(values) => values.into_iter().map(f16::to_f32).collect(),
            Self::Bf16(values) => values.into_iter().map(bf16::to_f32).collect(),
        }
    }
}

/// The type that a model was saved in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoredType {
    F32,
    F16,
    Bf16,
}

impl<'a> Loader<'a> {
    /// Compares the names in the checkpoint with those that the decoder needs, before anything is read.
    pub(crate) fn new(source: &'a Source) -> Result<Self, ModelError> {
        let loader = Self { source };
        let found = loader.names();
        // Before a name is made for each tensor of each layer: the number of layers is not to be trusted.
        if source.spec.layers > found.len() {
            return Err(ModelError::config(format!(
                "the configuration has {} layers, and the checkpoint {} tensors",
                source.spec.layers,
                found.len()
            )));
        }
        let mut needed = HashSet::new();
        let mut companions = HashSet::new();
        for (place, bias) in places(&source.spec) {
            let name = loader.name(place);
            needed.insert(format!("{name}.weight"));
            if bias {
                needed.insert(format!("{name}.bias"));
            }
            if loader.is_packed(&format!("{name}.weight")) {
                companions.insert(format!("{name}.scales"));
                companions.insert(format!("{name}.biases"));
            }
        }
        let model_type = source.spec.model_type.clone();
        let mut missing: Vec<String> = needed
            .iter()
            .filter(|name| !found.contains(name.as_str()))
            .cloned()
            .collect();
        if !missing.is_empty() {
            missing.sort();
            return Err(ModelError::Missing {
                model_type,
                tensors: missing,
            });
        }
        let mut unused: Vec<String> = found
            .into_iter()
            .filter(|name| !needed.contains(*name) && !companions.contains(*name) && !loader.is_spare(name))
            .map(str::to_owned)
            .collect();
        if !unused.is_empty() {
            unused.sort();
            return Err(ModelError::Unused {
                model_type,
                tensors: unused,
            });
        }
        Ok(loader)
    }

    fn name(&self, place: Place) -> String {
        match &self.source.weights {
            Weights::Folder(checkpoint, _) => {
                let stacked = place.stacked(&self.source.spec);
                let there = |name: &String| checkpoint.tensor(&format!("{name}.weight")).is_some();
                stacked
                    .filter(there)
                    .unwrap_or_else(|| place.hugging_face(&self.source.spec))
            }
            Weights::Gguf(_) => place.gguf(),
        }
    }

    /// For a matrix of an expert that lies among those of all, its number and how many there are.
    fn among(&self, place: Place, shape: &[usize]) -> Option<(usize, usize)> {
        let Place::InLayer(layer, Part::Expert(number, _)) = place else {
            return None;
        };
        let count = self.source.spec.experts_of(layer)?.count;
        // Beside the experts of files that have each by itself there is no third axis.
        (shape.len() == 3).then_some((number, count))
    }

    fn names(&self) -> HashSet<&'a str> {
        match &self.source.weights {
            Weights::Folder(checkpoint, _) => checkpoint.names().collect(),
            Weights::Gguf(file) => file.tensors().map(|tensor| tensor.name).collect(),
        }
    }

    /// Whether a tensor is MLX's packed numbers, which have scales and biases beside them.
    fn is_packed(&self, name: &str) -> bool {
        let Weights::Folder(checkpoint, _) = &self.source.weights else {
            return false;
        };
        checkpoint
            .tensor(name)
            .is_some_and(|tensor| tensor.dtype == FileType::U32)
    }

    /// Tensors that checkpoints carry and nobody computes with: what can be derived, and an output that is tied.
    fn is_spare(&self, name: &str) -> bool {
        let spec = &self.source.spec;
        let prefix = hugging_face_prefix(spec);
        let output = name.strip_prefix(prefix).unwrap_or(name);
        // What a model sees with is not run here.
        let other_part = !prefix.is_empty() && !name.starts_with(prefix);
        let tied_output = spec.tied_embeddings && output.starts_with("lm_head.");
        name.ends_with(".rotary_emb.inv_freq") || name == "rope_freqs.weight" || tied_output || other_part
    }

    /// The type of the norms' weights, which is the type that the model was saved in.
    pub(crate) fn stored_type(&self) -> StoredType {
        match &self.source.weights {
            Weights::Folder(checkpoint, _) => {
                let norm = checkpoint.tensor(&format!("{}.weight", self.name(Place::FinalNorm)));
                match norm.map(|tensor| tensor.dtype) {
                    Some(FileType::F16) => StoredType::F16,
                    Some(FileType::BF16) => StoredType::Bf16,
                    _ => StoredType::F32,
                }
            }
            // GGUF keeps norms in float32 whatever the rest is. Gemma's residual stream is too large for float16.
            Weights::Gguf(_) if self.source.spec.norms == NormPlacement::Around => StoredType::Bf16,
            Weights::Gguf(_) => StoredType::F16,
        }
    }

    /// The weights of a norm.
    pub(crate) fn norm(&self, place: Place, len: usize) -> Result<Vec<f32>, ModelError> {
        let mut weights = self.vector(place, "weight", len)?;
        if self.source.spec.norms_from_one {
            for weight in &mut weights {
                *weight += 1.0;
            }
        }
        Ok(weights)
    }

    /// A vector of weights: a norm's or a bias.
    pub(crate) fn vector(&self, place: Place, suffix: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let name = format!("{}.{suffix}", self.name(place));
        let (values, shape) = match &self.source.weights {
            Weights::Folder(checkpoint, _) => {
                let tensor = checkpoint.tensor(&name).ok_or_else(|| self.missing(&name))?;
                (floats(tensor)?.into_f32(), tensor.shape.to_vec())
            }
            Weights::Gguf(file) => {
                let tensor = file.tensor(&name).ok_or_else(|| self.missing(&name))?;
                (tensor.dequantize()?, tensor.shape.to_vec())
            }
        };
        check_shape(&name, &shape, &[len])?;
        Ok(values)
    }

    /// A matrix of weights.
    pub(crate) fn matrix(&self, place: Place, rows: usize, columns: usize) -> Result<RawMatrix, ModelError> {
        self.released_matrix(place, [rows, columns], AffineTensor::from_ggml)
    }

    /// The same, rounded where it would take much more memory than in the file.
    pub(crate) fn rounded_matrix(
        &self,
        place: Place,
        rows: usize,
        columns: usize,
    ) -> Result<RawMatrix, ModelError> {
        self.released_matrix(place, [rows, columns], AffineTensor::rounded_from_ggml)
    }

    fn released_matrix(
        &self,
        place: Place,
        shape: [usize; 2],
        convert: FromGgml,
    ) -> Result<RawMatrix, ModelError> {
        let raw = self.read_matrix(place, shape, convert);
        // What was read lies elsewhere now, and the file's pages would count as this process's memory.
        self.release();
        raw
    }

    fn read_matrix(
        &self,
        place: Place,
        [rows, columns]: [usize; 2],
        convert: FromGgml,
    ) -> Result<RawMatrix, ModelError> {
        let base = self.name(place);
        let name = format!("{base}.weight");
        match &self.source.weights {
            Weights::Folder(checkpoint, config) => {
                let tensor = checkpoint.tensor(&name).ok_or_else(|| self.missing(&name))?;
                let among = self.among(place, tensor.shape);
                let tensor = one_of(tensor, among)?;
                if tensor.dtype != FileType::U32 {
                    check_shape(&name, tensor.shape, &[rows, columns])?;
                    return Ok(RawMatrix::Dense(floats(tensor)?));
                }
                let (bits, group_size) = quantization(config, &base, &name)?;
                let [scales, biases] = self.companions(checkpoint, &base)?;
                let (scales, biases) = (one_of(scales, among)?, one_of(biases, among)?);
                check_packed(
                    &name,
                    tensor.shape,
                    scales.shape,
                    [rows, columns],
                    bits,
                    group_size,
                )?;
                check_shape(biases.name, biases.shape, scales.shape)?;
                Ok(RawMatrix::Affine(AffineTensor {
                    packed: words(tensor.data),
                    scales: floats(scales)?.into_f32(),
                    biases: floats(biases)?.into_f32(),
                    bits,
                    group_size,
                    rows,
                    columns,
                }))
            }
            Weights::Gguf(file) => {
                let tensor = file.tensor(&name).ok_or_else(|| self.missing(&name))?;
                let among = self.among(place, tensor.shape);
                let (shape, data) = part_of(&name, tensor.shape, tensor.data, among)?;
                check_shape(&name, shape, &[rows, columns])?;
                ggml_matrix(tensor.ggml_type, data, [rows, columns], convert)
            }
        }
    }

    /// The scales and the biases of a quantized matrix.
    fn companions<'t>(
        &self,
        checkpoint: &'t ShardedCheckpoint,
        base: &str,
    ) -> Result<[TensorView<'t>; 2], ModelError> {
        let companion = |suffix: &str| {
            let name = format!("{base}.{suffix}");
            checkpoint.tensor(&name).ok_or_else(|| self.missing(&name))
        };
        Ok([companion("scales")?, companion("biases")?])
    }

    /// A matrix with the shape that it has, to be read by rows.
    pub(crate) fn unread(&self, place: Place) -> Result<Matrix<'a>, ModelError> {
        let base = self.name(place);
        let name = format!("{base}.weight");
        let (packing, rows, columns) = match &self.source.weights {
            Weights::Folder(checkpoint, config) => {
                let tensor = checkpoint.tensor(&name).ok_or_else(|| self.missing(&name))?;
                let [rows, columns] = two_axes(&name, tensor.shape)?;
                if tensor.dtype == FileType::U32 {
                    let (bits, group_size) = quantization(config, &base, &name)?;
                    let [scales, biases] = self.companions(checkpoint, &base)?;
                    let [_, groups] = two_axes(scales.name, scales.shape)?;
                    let columns = groups.saturating_mul(group_size as usize);
                    check_packed(
                        &name,
                        tensor.shape,
                        scales.shape,
                        [rows, columns],
                        bits,
                        group_size,
                    )?;
                    check_shape(biases.name, biases.shape, scales.shape)?;
                    let packing = Packing::Affine {
                        packed: tensor.data,
                        scales: (float_type(scales)?, scales.data),
                        biases: (float_type(biases)?, biases.data),
                        bits,
                        group_size,
                    };
                    (packing, rows, columns)
                } else {
                    (Packing::Floats(float_type(tensor)?, tensor.data), rows, columns)
                }
            }
            Weights::Gguf(file) => {
                let tensor = file.tensor(&name).ok_or_else(|| self.missing(&name))?;
                let [rows, columns] = two_axes(&name, tensor.shape)?;
                let float_type = match tensor.ggml_type {
                    GgmlType::F32 => Some(FloatType::F32),
                    GgmlType::F16 => Some(FloatType::F16),
                    GgmlType::BF16 => Some(FloatType::BF16),
                    _ => None,
                };
                let packing = match float_type {
                    Some(float_type) => Packing::Floats(float_type, tensor.data),
                    None => Packing::Ggml(tensor.ggml_type, tensor.data),
                };
                (packing, rows, columns)
            }
        };
        Ok(Matrix {
            packing,
            rows,
            columns,
            interleaved: None,
        })
    }

    /// A vector of whatever length it has, and the type that it is stored in.
    pub(crate) fn any_vector(&self, place: Place, suffix: &str) -> Result<(Vec<f32>, FloatType), ModelError> {
        let name = format!("{}.{suffix}", self.name(place));
        let (stored, len) = match &self.source.weights {
            Weights::Folder(checkpoint, _) => {
                let tensor = checkpoint.tensor(&name).ok_or_else(|| self.missing(&name))?;
                (float_type(tensor)?, tensor.shape.iter().product())
            }
            Weights::Gguf(file) => {
                let tensor = file.tensor(&name).ok_or_else(|| self.missing(&name))?;
                (FloatType::F32, tensor.elements())
            }
        };
        Ok((self.vector(place, suffix, len)?, stored))
    }

    pub(crate) fn release(&self) {
        match &self.source.weights {
            Weights::Folder(checkpoint, _) => checkpoint.release(),
            Weights::Gguf(file) => file.release(),
        }
    }

    fn missing(&self, name: &str) -> ModelError {
        let model_type = self.source.spec.model_type.clone();
        ModelError::Missing {
            model_type,
            tensors: vec![name.to_owned()],
        }
    }
}

fn ggml_matrix(
    ggml_type: GgmlType,
    data: &[u8],
    [rows, columns]: [usize; 2],
    convert: FromGgml,
) -> Result<RawMatrix, ModelError> {
    if let Some(affine) = convert(ggml_type, data, rows, columns)? {
        return Ok(RawMatrix::Affine(affine));
    }
    let values = ggml_type.dequantize(data)?;
    Ok(RawMatrix::Dense(match ggml_type {
        GgmlType::F16 => Floats::F16(values.into_iter().map(f16::from_f32).collect()),
        GgmlType::BF16 => Floats::Bf16(values.into_iter().map(bf16::from_f32).collect()),
        _ => Floats::F32(values),
    }))
}

/// The bits and the group size of a tensor: its own where the configuration has some, else those of the model.
fn quantization(config: &Value, base: &str, name: &str) -> Result<(u32, u32), ModelError> {
    let all = if config["quantization"].is_object() {
        &config["quantization"]
    } else {
        &config["quantization_config"]
    };
    let own = if all[base].is_object() { &all[base] } else { all };
    let number = |key: &str| own[key].as_u64().and_then(|value| u32::try_from(value).ok());
    if let Some(mode) = own["mode"].as_str().filter(|&mode| mode != "affine") {
        let message = format!("`{name}` is quantized in the mode `{mode}`, supported: affine");
        return Err(ModelError::config(message));
    }
    number("bits").zip(number("group_size")).ok_or_else(|| {
        ModelError::config(format!(
            "`{name}` is quantized, and `quantization` gives no `bits` and `group_size`"
        ))
    })
}

/// Checks bits and group size against the shapes: MLX takes them at their word.
fn check_packed(
    name: &str,
    packed: &[usize],
    scales: &[usize],
    [rows, columns]: [usize; 2],
    bits: u32,
    group_size: u32,
) -> Result<(), ModelError> {
    let refuse = |message: String| {
        Err(ModelError::Quantization {
            tensor: name.to_owned(),
            bits,
            group_size,
            message,
        })
    };
    if ![2, 3, 4, 5, 6, 8].contains(&bits) {
        return refuse("bits may be 2, 3, 4, 5, 6 or 8".to_owned());
    }
    if ![32, 64, 128].contains(&group_size) {
        return refuse("groups may be of 32, 64 or 128".to_owned());
    }
    if !columns.is_multiple_of(group_size as usize) {
        return refuse(format!("{columns} columns are not whole groups"));
    }
    let expected = [rows, columns * bits as usize / 32];
    if packed != expected {
        return refuse(format!("its shape is {packed:?} where these make {expected:?}"));
    }
    let expected = [rows, columns / group_size as usize];
    if scales != expected {
        return refuse(format!(
            "its scales have the shape {scales:?} where these make {expected:?}"
        ));
    }
    Ok(())
}

fn check_shape(name: &str, found: &[usize], expected: &[usize]) -> Result<(), ModelError> {
    if found == expected {
        return Ok(());
    }
    Err(ModelError::Shape {
        tensor: name.to_owned(),
        found: found.to_vec(),
        expected: expected.to_vec(),
    })
}

/// One of the tensors that lie in one, which is said by its number and how many there are.
fn one_of(tensor: TensorView<'_>, among: Option<(usize, usize)>) -> Result<TensorView<'_>, ModelError> {
    let (shape, data) = part_of(tensor.name, tensor.shape, tensor.data, among)?;
    Ok(TensorView {
        shape,
        data,
        ..tensor
    })
}

fn part_of<'a>(
    name: &str,
    shape: &'a [usize],
    data: &'a [u8],
    among: Option<(usize, usize)>,
) -> Result<(&'a [usize], &'a [u8]), ModelError> {
    let Some((number, count)) = among else {
        return Ok((shape, data));
    };
    let (&[found, ..], [_, inner @ ..]) = (shape, shape) else {
        return Ok((shape, data));
    };
    let len = data.len() / count;
    if found != count || len * count != data.len() {
        return Err(ModelError::Shape {
            tensor: name.to_owned(),
            found: shape.to_vec(),
            expected: [&[count], inner].concat(),
        });
    }
    Ok((inner, &data[number * len..][..len]))
}

fn two_axes(name: &str, shape: &[usize]) -> Result<[usize; 2], ModelError> {
    shape.try_into().map_err(|_| ModelError::Convert {
        tensor: name.to_owned(),
        message: format!("its shape {shape:?} is that of no matrix"),
    })
}

/// The type of a tensor of floats.
fn float_type(tensor: TensorView<'_>) -> Result<FloatType, ModelError> {
    FloatType::of(tensor.dtype).ok_or_else(|| no_floats(tensor))
}

fn no_floats(tensor: TensorView<'_>) -> ModelError {
    ModelError::Checkpoint(CheckpointError::UnsupportedType {
        tensor: tensor.name.to_owned(),
        found: tensor.dtype.to_string(),
        supported: "F32, F16, BF16".to_owned(),
    })
}

/// A tensor of floats.
fn floats(tensor: TensorView<'_>) -> Result<Floats, ModelError> {
    let two = || tensor.data.chunks_exact(2).map(|two| [two[0], two[1]]);
    Ok(match tensor.dtype {
        FileType::F32 => Floats::F32(
            tensor
                .data
                .chunks_exact(4)
                .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
                .collect(),
        ),
        FileType::F16 => Floats::F16(two().map(f16::from_le_bytes).collect()),
        FileType::BF16 => Floats::Bf16(two().map(bf16::from_le_bytes).collect()),
        _ => return Err(no_floats(tensor)),
    })
}

/// Packed numbers as 32-bit words.
fn words(data: &[u8]) -> Vec<u32> {
    data.chunks_exact(4)
        .map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]))
        .collect()
}
