//! The weights of a decoder as arrays.

use mlx_engine_core::LoadProgress;
use mlx_rs::{Array, Dtype, transforms};

use super::GraphDecoder;
use super::block::Block;
use super::gate::Gate;
use super::layers::{Linear, Matrix, Norm, Rope};
use super::mlp::{Experts, FeedForward, Mlp, Stack};
use super::projections::Attention;
use crate::device::DeviceInfo;
use crate::names::{Part, Place, Projection};
use crate::weights::{Loader, RawMatrix, StoredType};
use crate::{DecoderSpec, ModelError};

/// Makes arrays of what the loader reads.
struct Arrays<'a> {
    loader: &'a Loader<'a>,
    dtype: Dtype,
}

impl Arrays<'_> {
    fn vector(&self, place: Place, suffix: &str, len: usize) -> Result<Array, ModelError> {
        self.floats(&self.loader.vector(place, suffix, len)?, &[len])
    }

    fn matrix(&self, place: Place, rows: usize, columns: usize) -> Result<Matrix, ModelError> {
        Ok(match self.loader.matrix(place, rows, columns)? {
            RawMatrix::Dense(values) => Matrix::Dense(self.floats(&values.into_f32(), &[rows, columns])?),
            RawMatrix::Affine(affine) => {
                let groups = [rows, columns / affine.group_size as usize];
                let words = columns * affine.bits as usize / 32;
                Matrix::Quantized {
                    packed: Array::from_slice(&affine.packed, &shape_of(&[rows, words])?),
                    scales: self.floats(&affine.scales, &groups)?,
                    biases: self.floats(&affine.biases, &groups)?,
                    group_size: affine.group_size as i32,
                    bits: affine.bits as i32,
                }
            }
        })
    }

    fn linear(&self, place: Place, rows: usize, columns: usize, bias: bool) -> Result<Linear, ModelError> {
        let bias = bias.then(|| self.vector(place, "bias", rows)).transpose()?;
        Ok(Linear {
            matrix: self.matrix(place, rows, columns)?,
            bias,
        })
    }

    fn feed_forward(&self, spec: &DecoderSpec, layer: usize) -> Result<FeedForward, ModelError> {
        let at = |part| Place::InLayer(layer, part);
        let (hidden, wide) = (spec.hidden_size, spec.intermediate_size);
        let Some(experts) = spec.experts_of(layer) else {
            let linear = |part, rows, columns| self.linear(at(part), rows, columns, spec.mlp_bias);
            return Ok(FeedForward::Mlp(Mlp {
                gate: linear(Part::Gate, wide, hidden)?,
                up: linear(Part::Up, wide, hidden)?,
                down: linear(Part::Down, hidden, wide)?,
            }));
        };
        let wide = experts.intermediate_size;
        let stack = |projection, rows, columns| {
            let places = (0..experts.count).map(|number| at(Part::Expert(number, projection)));
            self.stack(places, rows, columns)
        };
        let shared = experts.shared.map(|wide| {
            let linear = |projection, rows, columns| {
                self.linear(at(Part::SharedExpert(projection)), rows, columns, false)
            };
            let mlp = Mlp {
                gate: linear(Projection::Gate, wide, hidden)?,
                up: linear(Projection::Up, wide, hidden)?,
                down: linear(Projection::Down, hidden, wide)?,
            };
            Ok::<_, ModelError>((mlp, self.matrix(at(Part::SharedGate), 1, hidden)?))
        });
        Ok(FeedForward::Experts(Box::new(Experts {
            router: self.matrix(at(Part::Router), experts.count, hidden)?,
            gate: stack(Projection::Gate, wide, hidden)?,
            up: stack(Projection::Up, wide, hidden)?,
            down: stack(Projection::Down, hidden, wide)?,
            active: experts.active as i32,
            normalized: experts.normalized,
            shared: shared.transpose()?,
        })))
    }

    /// The matrices of these places, one after the other.
    fn stack(
        &self,
        places: impl ExactSizeIterator<Item = Place>,
        rows: usize,
        columns: usize,
    ) -> Result<Stack, ModelError> {
        let count = places.len();
        let (mut dense, mut packed, mut scales, mut biases) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut packing = None;
        for place in places {
            let own = match self.loader.matrix(place, rows, columns)? {
                RawMatrix::Dense(values) => {
                    dense.extend(values.into_f32());
                    None
                }
                RawMatrix::Affine(affine) => {
                    packed.extend(affine.packed);
                    scales.extend(affine.scales);
                    biases.extend(affine.biases);
                    Some((affine.bits, affine.group_size))
                }
            };
            if *packing.get_or_insert(own) != own {
                let message = format!("{place:?} is quantized otherwise than the experts before it");
                return Err(ModelError::config(message));
            }
        }
        let Some((bits, group_size)) = packing.flatten() else {
            return Ok(Stack::Dense(self.floats(&dense, &[count, rows, columns])?));
        };
        let groups = [count, rows, columns / group_size as usize];
        let words = [count, rows, columns * bits as usize / 32];
        Ok(Stack::Quantized {
            packed: Array::from_slice(&packed, &shape_of(&words)?),
            scales: self.floats(&scales, &groups)?,
            biases: self.floats(&biases, &groups)?,
            group_size: group_size as i32,
            bits: bits as i32,
        })
    }

    fn floats(&self, values: &[f32], shape: &[usize]) -> Result<Array, ModelError> {
        let array = Array::from_slice(values, &shape_of(shape)?);
        Ok(if self.dtype == Dtype::Float32 {
            array
        } else {
            array.as_dtype(self.dtype)?
        })
    }
}

fn shape_of(shape: &[usize]) -> Result<Vec<i32>, ModelError> {
    shape
        .iter()
        .map(|&len| {
            i32::try_from(len).map_err(|_| ModelError::config(format!("an axis of {len} is too long")))
        })
        .collect()
}

/// Float32 on a CPU, where MLX emulates the halves.
fn compute_type(device: DeviceInfo, stored: StoredType) -> Dtype {
    match (device.device, stored) {
        (mlx_engine_core::Device::Cpu, _) | (_, StoredType::F32) => Dtype::Float32,
        (_, StoredType::F16) => Dtype::Float16,
        (_, StoredType::Bf16) => Dtype::Bfloat16,
    }
}

impl GraphDecoder {
    /// Reads the weights, layer by layer; `done` is told of each.
    pub(crate) fn load(
        spec: &DecoderSpec,
        loader: &Loader<'_>,
        device: DeviceInfo,
        progress: &mut dyn FnMut(LoadProgress) -> Result<(), ModelError>,
    ) -> Result<Self, ModelError> {
        let dtype = compute_type(device, loader.stored_type());
        let arrays = Arrays { loader, dtype };
        let norm = |place, len| -> Result<Norm, ModelError> {
            Ok(Norm {
                weight: arrays.floats(&loader.norm(place, len)?, &[len])?,
                eps: spec.norm_eps,
            })
        };
        let embedding = arrays.matrix(Place::Embedding, spec.vocab_size, spec.hidden_size)?;
        let output = (!spec.tied_embeddings)
            .then(|| arrays.matrix(Place::Output, spec.vocab_size, spec.hidden_size))
            .transpose()?;
        let final_norm = norm(Place::FinalNorm, spec.hidden_size)?;
        transforms::eval(embedding.arrays())?;
        let mut blocks = Vec::with_capacity(spec.layers);
        for layer in 0..spec.layers {
            progress(LoadProgress::Layers {
                done: layer as u32,
                total: spec.layers as u32,
            })?;
            let at = |part| Place::InLayer(layer, part);
            let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
            let hidden = spec.hidden_size;
            let norms = spec
                .qk_norm_widths()
                .map(|(query, key)| {
                    let norms = (norm(at(Part::QueryNorm), query)?, norm(at(Part::KeyNorm), key)?);
                    Ok::<_, ModelError>(norms)
                })
                .transpose()?;
            let kind = spec.attention_of(layer);
            let before = |part| spec.norms.before().then(|| norm(at(part), hidden)).transpose();
            let after = |part| spec.norms.after().then(|| norm(at(part), hidden)).transpose();
            let block = Block {
                attention_norm: before(Part::AttentionNorm)?,
                attention: Attention {
                    query: arrays.linear(at(Part::Query), q_width, hidden, spec.qkv_bias)?,
                    key: arrays.linear(at(Part::Key), kv_width, hidden, spec.qkv_bias)?,
                    value: arrays.linear(at(Part::Value), kv_width, hidden, spec.qkv_bias)?,
                    output: arrays.linear(at(Part::AttentionOutput), hidden, q_width, spec.output_bias)?,
                    norms,
                    qk_norm: spec.qk_norm,
                    rope: kind.rope.as_ref().map(|rope| Rope {
                        dimensions: spec.head_dim as i32,
                        interleaved: rope.interleaved,
                        theta: rope.theta,
                        scale: rope.scale(),
                        wavelengths: rope
                            .wavelengths(spec.head_dim)
                            .map(|values| Array::from_slice(&values, &[values.len() as i32])),
                    }),
                    scale: spec.attention_scale,
                    softcap: spec.attention_softcap,
                    heads: spec.heads as i32,
                    kv_heads: spec.kv_heads as i32,
                    head_dim: spec.head_dim as i32,
                },
                post_attention_norm: after(Part::PostAttentionNorm)?,
                mlp_norm: before(Part::MlpNorm)?,
                feed_forward: arrays.feed_forward(spec, layer)?,
                post_mlp_norm: after(Part::PostMlpNorm)?,
                residual_scale: spec.residual_scale,
            };
            transforms::eval(block.arrays())?;
            blocks.push(block);
        }
        Ok(Self {
            dtype,
            embedding,
            blocks,
            gate: Gate::new(spec.activation, device.device),
            norm: final_norm,
            output,
            embedding_scale: spec.embedding_scale,
            logit_scale: spec.logit_scale,
            logit_softcap: spec.logit_softcap,
        })
    }
}
