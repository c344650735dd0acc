//! The decoder as a graph of MLX's operations, for every device that MLX has.

mod cache;
mod layers;

use mlx_engine_core::LoadProgress;
use mlx_rs::fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention};
use mlx_rs::ops::indexing::IndexOp;
use mlx_rs::{Array, Dtype, nn, ops, transforms};

pub(crate) use cache::{KvCache, LAYOUT, element};
use layers::{Linear, Matrix, Norm, Rope};

use crate::decoder::Wanted;
use crate::device::DeviceInfo;
use crate::names::{Part, Place};
use crate::weights::{Loader, RawMatrix, StoredType};
use crate::{DecoderSpec, ModelError};

/// The blocks and what lies around them, as arrays of MLX.
#[derive(Debug)]
pub(crate) struct GraphDecoder {
    /// The type of activations.
    dtype: Dtype,
    embedding: Matrix,
    blocks: Vec<Block>,
    norm: Norm,
    /// `None` where the logits use the embedding.
    output: Option<Matrix>,
}

#[derive(Debug)]
struct Block {
    attention_norm: Norm,
    attention: Attention,
    mlp_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Norms of queries and keys, where the family has them.
    norms: Option<(Norm, Norm)>,
    rope: Rope,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
}

impl Attention {
    /// `[1, tokens, heads * head_dim]` to `[1, heads, tokens, head_dim]`.
    fn split(&self, x: &Array, heads: i32) -> Result<Array, ModelError> {
        let tokens = x.shape()[1];
        Ok(x.reshape(&[1, tokens, heads, self.head_dim])?)
    }

    fn forward(&self, x: &Array, cache: &mut KvCache, offset: usize) -> Result<Array, ModelError> {
        let tokens = x.shape()[1];
        let mut queries = self.split(&self.query.forward(x)?, self.heads)?;
        let mut keys = self.split(&self.key.forward(x)?, self.kv_heads)?;
        let values = self.split(&self.value.forward(x)?, self.kv_heads)?;
        if let Some((query_norm, key_norm)) = &self.norms {
            queries = query_norm.forward(&queries)?;
            keys = key_norm.forward(&keys)?;
        }
        let heads_first = [0, 2, 1, 3];
        let queries = self
            .rope
            .forward(&queries.transpose_axes(&heads_first)?, offset)?;
        let keys = self.rope.forward(&keys.transpose_axes(&heads_first)?, offset)?;
        let (keys, values) = cache.update(offset, &keys, &values.transpose_axes(&heads_first)?)?;
        let scale = (self.head_dim as f32).sqrt().recip();
        let mask = (tokens > 1).then_some(ScaledDotProductAttentionMask::Causal);
        let attended = scaled_dot_product_attention(queries, keys, values, scale, mask, None)?;
        let attended =
            attended
                .transpose_axes(&heads_first)?
                .reshape(&[1, tokens, self.heads * self.head_dim])?;
        self.output.forward(&attended)
    }
}

impl Block {
    fn forward(&self, x: &Array, cache: &mut KvCache, offset: usize) -> Result<Array, ModelError> {
        let x = ops::add(
            x,
            self.attention
                .forward(&self.attention_norm.forward(x)?, cache, offset)?,
        )?;
        let normed = self.mlp_norm.forward(&x)?;
        let gated = ops::multiply(nn::silu(self.gate.forward(&normed)?)?, self.up.forward(&normed)?)?;
        Ok(ops::add(&x, self.down.forward(&gated)?)?)
    }
}

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
                weight: arrays.vector(place, "weight", len)?,
                eps: spec.norm_eps,
            })
        };
        let embedding = arrays.matrix(Place::Embedding, spec.vocab_size, spec.hidden_size)?;
        let output = (!spec.tied_embeddings)
            .then(|| arrays.matrix(Place::Output, spec.vocab_size, spec.hidden_size))
            .transpose()?;
        let final_norm = norm(Place::FinalNorm, spec.hidden_size)?;
        transforms::eval(embedding.arrays())?;
        let wavelengths = spec
            .rope
            .wavelengths(spec.head_dim)
            .map(|values| Array::from_slice(&values, &[values.len() as i32]));
        let mut blocks = Vec::with_capacity(spec.layers);
        for layer in 0..spec.layers {
            progress(LoadProgress::Layers {
                done: layer as u32,
                total: spec.layers as u32,
            })?;
            let at = |part| Place::InLayer(layer, part);
            let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
            let (hidden, wide) = (spec.hidden_size, spec.intermediate_size);
            let norms = if spec.qk_norm {
                Some((
                    norm(at(Part::QueryNorm), spec.head_dim)?,
                    norm(at(Part::KeyNorm), spec.head_dim)?,
                ))
            } else {
                None
            };
            let block = Block {
                attention_norm: norm(at(Part::AttentionNorm), hidden)?,
                attention: Attention {
                    query: arrays.linear(at(Part::Query), q_width, hidden, spec.qkv_bias)?,
                    key: arrays.linear(at(Part::Key), kv_width, hidden, spec.qkv_bias)?,
                    value: arrays.linear(at(Part::Value), kv_width, hidden, spec.qkv_bias)?,
                    output: arrays.linear(at(Part::AttentionOutput), hidden, q_width, spec.output_bias)?,
                    norms,
                    rope: Rope {
                        dimensions: spec.head_dim as i32,
                        interleaved: spec.rope.interleaved,
                        theta: spec.rope.theta,
                        scale: spec.rope.scale(),
                        wavelengths: wavelengths.clone(),
                    },
                    heads: spec.heads as i32,
                    kv_heads: spec.kv_heads as i32,
                    head_dim: spec.head_dim as i32,
                },
                mlp_norm: norm(at(Part::MlpNorm), hidden)?,
                gate: arrays.linear(at(Part::Gate), wide, hidden, spec.mlp_bias)?,
                up: arrays.linear(at(Part::Up), wide, hidden, spec.mlp_bias)?,
                down: arrays.linear(at(Part::Down), hidden, wide, spec.mlp_bias)?,
            };
            transforms::eval(block.arrays())?;
            blocks.push(block);
        }
        Ok(Self {
            dtype,
            embedding,
            blocks,
            norm: final_norm,
            output,
        })
    }

    /// The type of keys and values.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of an element of keys and values.
    pub(crate) fn kv_element_bytes(&self) -> usize {
        if self.dtype == Dtype::Float32 { 4 } else { 2 }
    }

    /// Feeds `[tokens]` ids behind the first `offset` positions, and returns what `logits` asks for, `[rows,
    /// vocab_size]` float32.
    pub(crate) fn forward(
        &self,
        ids: &Array,
        caches: &mut [KvCache],
        offset: usize,
        logits: Wanted,
    ) -> Result<Option<Array>, ModelError> {
        let ids = ids.reshape(&[1, -1])?;
        let mut x = self.embedding.rows(&ids, self.dtype)?;
        for (block, cache) in self.blocks.iter().zip(caches) {
            x = block.forward(&x, cache, offset)?;
        }
        match logits {
            Wanted::None => Ok(None),
            Wanted::Last => self.logits(&x.index((.., -1, ..))).map(Some),
            Wanted::All => self.logits(&x.index((0, .., ..))).map(Some),
        }
    }

    fn logits(&self, hidden: &Array) -> Result<Array, ModelError> {
        let logits = self
            .output
            .as_ref()
            .unwrap_or(&self.embedding)
            .project(&self.norm.forward(hidden)?)?;
        Ok(if logits.dtype() == Dtype::Float32 {
            logits
        } else {
            logits.as_dtype(Dtype::Float32)?
        })
    }
}

impl Block {
    fn arrays(&self) -> Vec<&Array> {
        let attention = &self.attention;
        let linears = [
            &attention.query,
            &attention.key,
            &attention.value,
            &attention.output,
            &self.gate,
            &self.up,
            &self.down,
        ];
        let mut arrays: Vec<&Array> = linears.iter().flat_map(|linear| linear.matrix.arrays()).collect();
        arrays.extend(linears.iter().filter_map(|linear| linear.bias.as_ref()));
        arrays.extend([&self.attention_norm.weight, &self.mlp_norm.weight]);
        arrays
    }
}
