//! From tensors in files to arrays on the device, strictly.

use std::collections::HashSet;

use half::{bf16, f16};
use mlx_engine_checkpoint::{AffineTensor, CheckpointError, Dtype as FileType, GgmlType, TensorView};
use mlx_rs::{Array, Dtype};
use serde_json::Value;

use crate::device::DeviceInfo;
use crate::layers::{Linear, Matrix};
use crate::names::{Part, Place};
use crate::source::{Source, Weights};
use crate::{DecoderSpec, ModelError};

/// The tensors that a decoder has, without the `.weight` and `.bias` that end their names.
fn places(spec: &DecoderSpec) -> impl Iterator<Item = (Place, bool)> {
    let (attention, output, mlp, qk_norm) = (spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm);
    let parts = [
        (Part::AttentionNorm, false),
        (Part::Query, attention),
        (Part::Key, attention),
        (Part::Value, attention),
        (Part::AttentionOutput, output),
        (Part::MlpNorm, false),
        (Part::Gate, mlp),
        (Part::Up, mlp),
        (Part::Down, mlp),
    ];
    let norms = [(Part::QueryNorm, false), (Part::KeyNorm, false)]
        .into_iter()
        .take(if qk_norm { 2 } else { 0 });
    let parts: Vec<_> = parts.into_iter().chain(norms).collect();
    let layers = (0..spec.layers).flat_map(move |layer| {
        parts
            .clone()
            .into_iter()
            .map(move |(part, bias)| (Place::InLayer(layer, part), bias))
    });
    let output = (!spec.tied_embeddings).then_some((Place::Output, false));
    [(Place::Embedding, false), (Place::FinalNorm, false)]
        .into_iter()
        .chain(output)
        .chain(layers)
}

/// Reads a checkpoint's tensors for a decoder.
pub(crate) struct Loader<'a> {
    source: &'a Source,
    device: DeviceInfo,
    /// The type of activations.
    pub(crate) dtype: Dtype,
}

impl<'a> Loader<'a> {
    /// Compares the names in the checkpoint with those that the decoder needs, before anything is read.
    pub(crate) fn new(source: &'a Source, device: DeviceInfo) -> Result<Self, ModelError> {
        let mut loader = Self {
            source,
            device,
            dtype: Dtype::Float32,
        };
        let mut needed = HashSet::new();
        let mut companions = HashSet::new();
        for (place, bias) in places(&source.spec) {
            let name = loader.name(place);
            needed.insert(format!("{name}.weight"));
            if bias {
                needed.insert(format!("{name}.bias"));
            }
            companions.insert(format!("{name}.scales"));
            companions.insert(format!("{name}.biases"));
        }
        let found = loader.names();
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
        loader.dtype = device.compute_type(loader.stored_type());
        Ok(loader)
    }

    fn name(&self, place: Place) -> String {
        match self.source.weights {
            Weights::Folder(..) => place.hugging_face(),
            Weights::Gguf(_) => place.gguf(),
        }
    }

    fn names(&self) -> HashSet<&'a str> {
        match &self.source.weights {
            Weights::Folder(checkpoint, _) => checkpoint.names().collect(),
            Weights::Gguf(file) => file.tensors().map(|tensor| tensor.name).collect(),
        }
    }

    /// Tensors that checkpoints carry and nobody computes with: what can be derived, and an output that is tied.
    fn is_spare(&self, name: &str) -> bool {
        let tied_output = self.source.spec.tied_embeddings && name.starts_with("lm_head.");
        name.ends_with(".rotary_emb.inv_freq") || name == "rope_freqs.weight" || tied_output
    }

    /// The type of the norms' weights, which is the type that the model was saved in.
    fn stored_type(&self) -> Dtype {
        match &self.source.weights {
            Weights::Folder(checkpoint, _) => {
                let norm = checkpoint.tensor(&format!("{}.weight", Place::FinalNorm.hugging_face()));
                match norm.map(|tensor| tensor.dtype) {
                    Some(FileType::F16) => Dtype::Float16,
                    Some(FileType::BF16) => Dtype::Bfloat16,
                    _ => Dtype::Float32,
                }
            }
            // GGUF keeps norms in float32 whatever the rest is.
            Weights::Gguf(_) => Dtype::Float16,
        }
    }

    /// A vector of weights: a norm's or a bias.
    pub(crate) fn vector(&self, place: Place, suffix: &str, len: usize) -> Result<Array, ModelError> {
        let name = format!("{}.{suffix}", self.name(place));
        let (values, shape) = match &self.source.weights {
            Weights::Folder(checkpoint, _) => {
                let tensor = checkpoint.tensor(&name).ok_or_else(|| self.missing(&name))?;
                (floats(tensor)?, tensor.shape.to_vec())
            }
            Weights::Gguf(file) => {
                let tensor = file.tensor(&name).ok_or_else(|| self.missing(&name))?;
                (tensor.dequantize()?, tensor.shape.to_vec())
            }
        };
        check_shape(&name, &shape, &[len])?;
        self.float_array(&values, &[len])
    }

    /// A projection from `columns` to `rows`.
    pub(crate) fn linear(
        &self,
        place: Place,
        rows: usize,
        columns: usize,
        bias: bool,
    ) -> Result<Linear, ModelError> {
        let bias = bias.then(|| self.vector(place, "bias", rows)).transpose()?;
        Ok(Linear {
            matrix: self.matrix(place, rows, columns)?,
            bias,
        })
    }

    /// A matrix of weights.
    pub(crate) fn matrix(&self, place: Place, rows: usize, columns: usize) -> Result<Matrix, ModelError> {
        let base = self.name(place);
        let name = format!("{base}.weight");
        match &self.source.weights {
            Weights::Folder(checkpoint, config) => {
                let tensor = checkpoint.tensor(&name).ok_or_else(|| self.missing(&name))?;
                if tensor.dtype != FileType::U32 {
                    check_shape(&name, tensor.shape, &[rows, columns])?;
                    return Ok(Matrix::Dense(
                        self.float_array(&floats(tensor)?, &[rows, columns])?,
                    ));
                }
                let (bits, group_size) = quantization(config, &base, &name)?;
                let companion = |suffix: &str| {
                    let name = format!("{base}.{suffix}");
                    checkpoint.tensor(&name).ok_or_else(|| self.missing(&name))
                };
                let (scales, biases) = (companion("scales")?, companion("biases")?);
                check_packed(
                    &name,
                    tensor.shape,
                    scales.shape,
                    [rows, columns],
                    bits,
                    group_size,
                )?;
                check_shape(biases.name, biases.shape, scales.shape)?;
                let groups = [rows, columns / group_size as usize];
                Ok(Matrix::Quantized {
                    packed: words(tensor.data, &[rows, columns * bits as usize / 32])?,
                    scales: self.float_array(&floats(scales)?, &groups)?,
                    biases: self.float_array(&floats(biases)?, &groups)?,
                    group_size: group_size as i32,
                    bits: bits as i32,
                })
            }
            Weights::Gguf(file) => {
                let tensor = file.tensor(&name).ok_or_else(|| self.missing(&name))?;
                check_shape(&name, tensor.shape, &[rows, columns])?;
                self.ggml_matrix(tensor.ggml_type, tensor.data, rows, columns)
            }
        }
    }

    fn ggml_matrix(
        &self,
        ggml_type: GgmlType,
        data: &[u8],
        rows: usize,
        columns: usize,
    ) -> Result<Matrix, ModelError> {
        let Some(affine) = AffineTensor::from_ggml(ggml_type, data, rows, columns)? else {
            return Ok(Matrix::Dense(
                self.float_array(&ggml_type.dequantize(data)?, &[rows, columns])?,
            ));
        };
        let groups = [rows, columns / affine.group_size as usize];
        Ok(Matrix::Quantized {
            packed: Array::from_slice(
                &affine.packed,
                &shape_of(&[rows, columns * affine.bits as usize / 32])?,
            ),
            scales: self.float_array(&affine.scales, &groups)?,
            biases: self.float_array(&affine.biases, &groups)?,
            group_size: affine.group_size as i32,
            bits: affine.bits as i32,
        })
    }

    fn float_array(&self, values: &[f32], shape: &[usize]) -> Result<Array, ModelError> {
        let array = Array::from_slice(values, &shape_of(shape)?);
        Ok(if self.dtype == Dtype::Float32 {
            array
        } else {
            array.as_dtype(self.dtype)?
        })
    }

    fn missing(&self, name: &str) -> ModelError {
        let model_type = self.source.spec.model_type.clone();
        ModelError::Missing {
            model_type,
            tensors: vec![name.to_owned()],
        }
    }

    pub(crate) fn device(&self) -> DeviceInfo {
        self.device
    }
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

fn shape_of(shape: &[usize]) -> Result<Vec<i32>, ModelError> {
    shape
        .iter()
        .map(|&len| {
            i32::try_from(len).map_err(|_| ModelError::config(format!("an axis of {len} is too long")))
        })
        .collect()
}

/// A tensor of floats as float32.
fn floats(tensor: TensorView<'_>) -> Result<Vec<f32>, ModelError> {
    let two = || tensor.data.chunks_exact(2).map(|two| [two[0], two[1]]);
    Ok(match tensor.dtype {
        FileType::F32 => tensor
            .data
            .chunks_exact(4)
            .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
            .collect(),
        FileType::F16 => two().map(|bytes| f16::from_le_bytes(bytes).to_f32()).collect(),
        FileType::BF16 => two().map(|bytes| bf16::from_le_bytes(bytes).to_f32()).collect(),
        other => {
            return Err(ModelError::Checkpoint(CheckpointError::UnsupportedType {
                tensor: tensor.name.to_owned(),
                found: other.to_string(),
                supported: "F32, F16, BF16".to_owned(),
            }));
        }
    })
}

/// Packed numbers as an array of 32-bit words.
fn words(data: &[u8], shape: &[usize]) -> Result<Array, ModelError> {
    let words: Vec<u32> = data
        .chunks_exact(4)
        .map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]))
        .collect();
    Ok(Array::from_slice(&words, &shape_of(shape)?))
}
