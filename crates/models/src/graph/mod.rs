//! The decoder as a graph of MLX's operations, for every device that MLX has.

mod attention;
mod cache;
mod gate;
mod layers;

use mlx_engine_core::LoadProgress;
use mlx_rs::ops::indexing::{IndexOp, take_axis};
use mlx_rs::{Array, Dtype, ops, transforms};

use attention::{Sight, soft_capped};
pub(crate) use cache::{BLOCK, KvCache, LAYOUT, element};
use gate::Gate;
use layers::{Linear, Matrix, Norm, Rope};

use crate::device::DeviceInfo;
use crate::kv::KvPlan;
use crate::names::{Part, Place};
use crate::spec::QkNorm;
use crate::weights::{Loader, RawMatrix, StoredType};
use crate::{DecoderSpec, ModelError};

/// The blocks and what lies around them, as arrays of MLX.
#[derive(Debug)]
pub(crate) struct GraphDecoder {
    /// The type of activations.
    dtype: Dtype,
    embedding: Matrix,
    blocks: Vec<Block>,
    gate: Gate,
    norm: Norm,
    /// `None` where the logits use the embedding.
    output: Option<Matrix>,
    embedding_scale: f32,
    logit_scale: f32,
    logit_softcap: Option<f32>,
}

#[derive(Debug)]
struct Block {
    /// The norms that the family has where it has them.
    attention_norm: Option<Norm>,
    attention: Attention,
    post_attention_norm: Option<Norm>,
    mlp_norm: Option<Norm>,
    gate: Linear,
    up: Linear,
    down: Linear,
    post_mlp_norm: Option<Norm>,
    residual_scale: f32,
}

#[derive(Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Norms of queries and keys, where the family has them.
    norms: Option<(Norm, Norm)>,
    qk_norm: QkNorm,
    rope: Option<Rope>,
    scale: f32,
    softcap: Option<f32>,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
}

/// What a step feeds to one sequence.
pub(crate) struct GraphRows<'a> {
    /// A cache for each layer.
    pub(crate) layers: &'a mut [KvCache],
    /// Tokens that the sequence has seen.
    pub(crate) position: usize,
    /// Tokens that it is fed.
    pub(crate) rows: usize,
    /// Logits that are wanted, of the last rows.
    pub(crate) wanted: usize,
}

/// Where the rows of a step belong.
struct Batch<'a, 'b> {
    parts: &'a mut [GraphRows<'b>],
    /// What is kept of each layer.
    plan: &'a KvPlan,
    /// The position of each row, `[rows]`, where several sequences are fed one token each.
    positions: Option<Array>,
}

const HEADS_FIRST: [i32; 4] = [0, 2, 1, 3];

impl Attention {
    /// `[1, rows, heads * head_dim]` to `[1, rows, heads, head_dim]`.
    fn split(&self, x: &Array, heads: i32) -> Result<Array, ModelError> {
        Ok(x.reshape(&[1, x.shape()[1], heads, self.head_dim])?)
    }

    /// `[1, rows, heads, head_dim]` to `[1, heads, rows, head_dim]` for each sequence.
    fn per_sequence(x: &Array, batch: &Batch<'_, '_>) -> Result<Vec<Array>, ModelError> {
        let mut first = 0;
        batch
            .parts
            .iter()
            .map(|part| {
                let own = first..first + part.rows as i32;
                first = own.end;
                let own = if batch.parts.len() == 1 {
                    x.clone()
                } else {
                    x.index((.., own, .., ..))
                };
                Ok(own.transpose_axes(&HEADS_FIRST)?)
            })
            .collect()
    }

    /// As [`per_sequence`](Self::per_sequence), with the heads rotated by their positions.
    fn rotated(&self, x: &Array, batch: &Batch<'_, '_>) -> Result<Vec<Array>, ModelError> {
        let Some(rope) = &self.rope else {
            return Self::per_sequence(x, batch);
        };
        if let Some(positions) = &batch.positions {
            // One kernel for all: each sequence is a row of a batch with a position of its own.
            let heads = x.shape()[2];
            let rows = x.reshape(&[-1, heads, 1, self.head_dim])?;
            let rotated = rope.forward_each(&rows, positions)?;
            let count = batch.parts.len() as i32;
            return Ok((0..count)
                .map(|row| rotated.index((row..row + 1, .., .., ..)))
                .collect());
        }
        Self::per_sequence(x, batch)?
            .iter()
            .zip(batch.parts.iter())
            .map(|(x, part)| rope.forward(x, part.position))
            .collect()
    }

    /// Queries or keys by head, normalized where the family does.
    fn normed(&self, x: &Array, norm: Option<&Norm>, heads: i32) -> Result<Array, ModelError> {
        match (norm, self.qk_norm) {
            (Some(norm), QkNorm::AllHeads) => self.split(&norm.forward(x)?, heads),
            (Some(norm), _) => norm.forward(&self.split(x, heads)?),
            (None, _) => self.split(x, heads),
        }
    }

    fn forward(&self, x: &Array, batch: &mut Batch<'_, '_>, layer: usize) -> Result<Array, ModelError> {
        let rows = x.shape()[1];
        let (query_norm, key_norm) = self.norms.as_ref().map(|(query, key)| (query, key)).unzip();
        let queries = self.normed(&self.query.forward(x)?, query_norm, self.heads)?;
        let keys = self.normed(&self.key.forward(x)?, key_norm, self.kv_heads)?;
        let values = self.split(&self.value.forward(x)?, self.kv_heads)?;
        let queries = self.rotated(&queries, batch)?;
        let keys = self.rotated(&keys, batch)?;
        let values = Self::per_sequence(&values, batch)?;
        let rule = &batch.plan.rules[batch.plan.places[layer].0];
        let sight = Sight {
            scale: self.scale,
            softcap: self.softcap,
            window: rule.window,
            keep: rule.keep,
        };
        let mut attended = Vec::with_capacity(batch.parts.len());
        for (((part, queries), keys), values) in batch.parts.iter_mut().zip(queries).zip(keys).zip(values) {
            let segments = part.layers[layer].update(rule, part.position, &keys, &values)?;
            let own = sight.attend(&queries, part.position, segments)?;
            attended.push(own.transpose_axes(&HEADS_FIRST)?);
        }
        let attended = match &attended[..] {
            [one] => one.clone(),
            several => ops::concatenate(&several.iter().collect::<Vec<_>>(), 1)?,
        };
        self.output
            .forward(&attended.reshape(&[1, rows, self.heads * self.head_dim])?)
    }
}

impl Block {
    fn forward(
        &self,
        x: &Array,
        batch: &mut Batch<'_, '_>,
        layer: usize,
        gate: &Gate,
    ) -> Result<Array, ModelError> {
        let normed = normalized(self.attention_norm.as_ref(), x)?;
        let attended = self.attention.forward(&normed, batch, layer)?;
        let x = self.add(x, &attended, self.post_attention_norm.as_ref())?;
        let normed = normalized(self.mlp_norm.as_ref(), &x)?;
        let gated = gate.forward(&self.gate.forward(&normed)?, &self.up.forward(&normed)?)?;
        self.add(&x, &self.down.forward(&gated)?, self.post_mlp_norm.as_ref())
    }

    /// Adds what attention or MLP give to the residual stream.
    fn add(&self, x: &Array, branch: &Array, norm: Option<&Norm>) -> Result<Array, ModelError> {
        let branch = normalized(norm, branch)?;
        Ok(ops::add(x, scaled(branch, self.residual_scale)?)?)
    }
}

fn normalized(norm: Option<&Norm>, x: &Array) -> Result<Array, ModelError> {
    norm.map_or_else(|| Ok(x.clone()), |norm| norm.forward(x))
}

/// In the type of `x`.
fn scaled(x: Array, scale: f32) -> Result<Array, ModelError> {
    if scale == 1.0 {
        return Ok(x);
    }
    let scale = Array::from_f32(scale).as_dtype(x.dtype())?;
    Ok(ops::multiply(x, scale)?)
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
            let (hidden, wide) = (spec.hidden_size, spec.intermediate_size);
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
                gate: arrays.linear(at(Part::Gate), wide, hidden, spec.mlp_bias)?,
                up: arrays.linear(at(Part::Up), wide, hidden, spec.mlp_bias)?,
                down: arrays.linear(at(Part::Down), hidden, wide, spec.mlp_bias)?,
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

    /// The type of keys and values.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of an element of keys and values.
    pub(crate) fn kv_element_bytes(&self) -> usize {
        if self.dtype == Dtype::Float32 { 4 } else { 2 }
    }

    /// Feeds `[rows]` ids, those of one sequence after those of another, and returns the logits that the sequences want,
    /// `[wanted, vocab_size]` float32.
    pub(crate) fn forward(
        &self,
        ids: &Array,
        plan: &KvPlan,
        parts: &mut [GraphRows<'_>],
    ) -> Result<Option<Array>, ModelError> {
        let ids = ids.reshape(&[1, -1])?;
        let one_each = parts.len() > 1 && parts.iter().all(|part| part.rows == 1);
        let positions = one_each.then(|| {
            let positions: Vec<i32> = parts.iter().map(|part| part.position as i32).collect();
            Array::from_slice(&positions, &[positions.len() as i32])
        });
        let wanted = Wanted::of(parts);
        let mut batch = Batch {
            parts,
            plan,
            positions,
        };
        let mut x = scaled(self.embedding.rows(&ids, self.dtype)?, self.embedding_scale)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &mut batch, layer, &self.gate)?;
        }
        let hidden = match wanted {
            Wanted::None => return Ok(None),
            Wanted::All => x.index((0, .., ..)),
            Wanted::From(row) => x.index((0, row.., ..)),
            Wanted::Some(rows) => {
                take_axis(&x, Array::from_slice(&rows, &[rows.len() as i32]), 1)?.index((0, .., ..))
            }
        };
        self.logits(&hidden).map(Some)
    }

    fn logits(&self, hidden: &Array) -> Result<Array, ModelError> {
        let logits = self
            .output
            .as_ref()
            .unwrap_or(&self.embedding)
            .project(&self.norm.forward(hidden)?)?;
        let logits = if logits.dtype() == Dtype::Float32 {
            logits
        } else {
            logits.as_dtype(Dtype::Float32)?
        };
        soft_capped(scaled(logits, self.logit_scale)?, self.logit_softcap)
    }
}

/// The rows of a step whose logits are wanted.
enum Wanted {
    None,
    All,
    /// This one and all behind it.
    From(i32),
    Some(Vec<i32>),
}

impl Wanted {
    fn of(parts: &[GraphRows<'_>]) -> Self {
        let (mut first, mut rows) = (0, Vec::new());
        for part in parts {
            let end = first + part.rows;
            rows.extend((end - part.wanted..end).map(|row| row as i32));
            first = end;
        }
        match (rows.first(), rows.last()) {
            (Some(0), _) if rows.len() == first => Self::All,
            (Some(&from), Some(&last))
                if (last - from + 1) as usize == rows.len() && last as usize + 1 == first =>
            {
                Self::From(from)
            }
            (Some(_), _) => Self::Some(rows),
            (None, _) => Self::None,
        }
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
        let norms = [
            &self.attention_norm,
            &self.post_attention_norm,
            &self.mlp_norm,
            &self.post_mlp_norm,
        ];
        arrays.extend(norms.into_iter().flatten().map(|norm| &norm.weight));
        arrays
    }
}
