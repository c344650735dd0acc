//! From a checkpoint to the kernels' layout.

use std::sync::Mutex;

use mlx_engine_core::LoadProgress;
use mlx_engine_kernels::{AffineSource, DenseSource, Isa, KernelError, Matrix, Pool, Precision};

use super::forward::Workspace;
use super::{Block, Experts, FeedForward, Linear, Mlp, Model};
use crate::memory::Held;
use crate::names::{Part, Place, Projection};
use crate::weights::{Floats, Loader, RawMatrix};
use crate::{DecoderSpec, ModelError};

/// Lays out what the loader reads.
struct Layouts<'a> {
    loader: &'a Loader<'a>,
    precision: Precision,
    pool: &'a Pool,
}

impl Layouts<'_> {
    fn matrix(&self, place: Place, rows: usize, columns: usize) -> Result<Matrix, ModelError> {
        let raw = match self.precision {
            Precision::Exact => self.loader.matrix(place, rows, columns)?,
            Precision::Integer => self.loader.rounded_matrix(place, rows, columns)?,
        };
        Ok(match &raw {
            RawMatrix::Dense(Floats::F32(values)) => Matrix::dense(rows, columns, DenseSource::F32(values))?,
            RawMatrix::Dense(Floats::F16(values)) => Matrix::dense(rows, columns, DenseSource::F16(values))?,
            RawMatrix::Dense(Floats::Bf16(values)) => {
                Matrix::dense(rows, columns, DenseSource::Bf16(values))?
            }
            RawMatrix::Affine(affine) => {
                let source = AffineSource {
                    packed: &affine.packed,
                    scales: &affine.scales,
                    biases: &affine.biases,
                    bits: affine.bits,
                    group_size: affine.group_size as usize,
                };
                Matrix::quantized(self.pool, rows, columns, source)?
            }
        })
    }

    fn linear(&self, place: Place, rows: usize, columns: usize, bias: bool) -> Result<Linear, ModelError> {
        let bias = bias
            .then(|| self.loader.vector(place, "bias", rows))
            .transpose()?;
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
            return Ok(FeedForward::Mlp(Box::new(Mlp {
                gate: linear(Part::Gate, wide, hidden)?,
                up: linear(Part::Up, wide, hidden)?,
                down: linear(Part::Down, hidden, wide)?,
            })));
        };
        let wide = experts.intermediate_size;
        let matrices = (0..experts.count).map(|number| {
            let matrix =
                |projection, rows, columns| self.matrix(at(Part::Expert(number, projection)), rows, columns);
            Ok::<_, ModelError>([
                matrix(Projection::Gate, wide, hidden)?,
                matrix(Projection::Up, wide, hidden)?,
                matrix(Projection::Down, hidden, wide)?,
            ])
        });
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
            matrices: matrices.collect::<Result<_, _>>()?,
            active: experts.active,
            normalized: experts.normalized,
            shared: shared.transpose()?,
        })))
    }
}

pub(super) fn model(
    spec: &DecoderSpec,
    loader: &Loader<'_>,
    precision: Precision,
    pool: Pool,
    progress: &mut dyn FnMut(LoadProgress) -> Result<(), ModelError>,
) -> Result<Model, ModelError> {
    let isa = Isa::from_environment()?;
    let layouts = Layouts {
        loader,
        precision,
        pool: &pool,
    };
    let hidden = spec.hidden_size;
    let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let embedding = layouts.matrix(Place::Embedding, spec.vocab_size, hidden)?;
    let output = (!spec.tied_embeddings)
        .then(|| layouts.matrix(Place::Output, spec.vocab_size, hidden))
        .transpose()?;
    let mut blocks = Vec::with_capacity(spec.layers);
    for layer in 0..spec.layers {
        progress(LoadProgress::Layers {
            done: layer as u32,
            total: spec.layers as u32,
        })?;
        let at = |part| Place::InLayer(layer, part);
        let norm = |part, len| loader.norm(at(part), len);
        let before = |part| spec.norms.before().then(|| norm(part, hidden)).transpose();
        let after = |part| spec.norms.after().then(|| norm(part, hidden)).transpose();
        let head_norms = spec
            .qk_norm_widths()
            .map(|(query, key)| {
                Ok::<_, ModelError>((norm(Part::QueryNorm, query)?, norm(Part::KeyNorm, key)?))
            })
            .transpose()?;
        blocks.push(Block {
            attention_norm: before(Part::AttentionNorm)?,
            query: layouts.linear(at(Part::Query), q_width, hidden, spec.qkv_bias)?,
            key: layouts.linear(at(Part::Key), kv_width, hidden, spec.qkv_bias)?,
            value: layouts.linear(at(Part::Value), kv_width, hidden, spec.qkv_bias)?,
            head_norms,
            attention_output: layouts.linear(at(Part::AttentionOutput), hidden, q_width, spec.output_bias)?,
            post_attention_norm: after(Part::PostAttentionNorm)?,
            mlp_norm: before(Part::MlpNorm)?,
            feed_forward: layouts.feed_forward(spec, layer)?,
            post_mlp_norm: after(Part::PostMlpNorm)?,
        });
    }
    let norm = loader.norm(Place::FinalNorm, hidden)?;
    let rotations = spec.attention.iter().map(|attention| {
        let rope = attention.rope.as_ref()?;
        let wavelengths = rope.wavelengths(spec.head_dim);
        Some(wavelengths.unwrap_or_else(|| rope.plain_wavelengths(spec.head_dim)))
    });
    let wavelengths = rotations.collect();
    let mut model = Model {
        spec: spec.clone(),
        isa,
        pool,
        precision,
        embedding,
        blocks,
        norm,
        output,
        wavelengths,
        workspace: Mutex::new(Workspace::default()),
        weights: Held::default(),
    };
    let bytes = model.bytes();
    model.weights.set(bytes);
    Ok(model)
}

impl From<KernelError> for ModelError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}
