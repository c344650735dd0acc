//! The decoder on a CPU: one node of MLX's graph, computed by our kernels.
//!
//! MLX has neither SIMD nor threads on most CPUs, and a node costs it some microseconds, of which a step of a small model
//! would need a thousand. So the whole step is one host op: token ids go in, logits come out, and sampling is MLX's
//! again. Keys and values live in pages outside MLX.

mod cache;
mod forward;
mod load;

use std::sync::{Arc, Mutex, PoisonError};

use mlx_engine_core::LoadProgress;
pub(crate) use mlx_engine_kernels::Precision;
use mlx_engine_kernels::{Isa, Matrix, PAGE, Pool};
use mlx_rs::{Array, Stream};
use mlx_sys::{HostOp, HostOutput, mlx_dtype__MLX_FLOAT32, mlx_dtype__MLX_UINT32};

pub(crate) use cache::HostCache;
use cache::{Page, Pages};
use forward::{Part, Workspace};

use crate::decoder::Logits;
use crate::memory::Held;
use crate::weights::Loader;
use crate::{DecoderSpec, ModelError};

/// A decoder whose weights are laid out for the kernels.
#[derive(Clone, Debug)]
pub(crate) struct HostDecoder(Arc<Model>);

/// What the op computes with.
#[derive(Debug)]
struct Model {
    spec: DecoderSpec,
    isa: Isa,
    pool: Pool,
    precision: Precision,
    embedding: Matrix,
    blocks: Vec<Block>,
    norm: Vec<f32>,
    /// `None` where the logits use the embedding.
    output: Option<Matrix>,
    /// Of each pair of a head, in radians.
    wavelengths: Vec<f32>,
    /// One step runs at a time.
    workspace: Mutex<Workspace>,
    weights: Held,
}

#[derive(Debug)]
struct Block {
    attention_norm: Vec<f32>,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Norms of queries and keys, where the family has them.
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    attention_output: Linear,
    mlp_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// A projection with an optional bias.
#[derive(Debug)]
struct Linear {
    matrix: Matrix,
    bias: Option<Vec<f32>>,
}

impl Model {
    /// Bytes of the weights.
    fn bytes(&self) -> usize {
        let linear = |linear: &Linear| {
            linear.matrix.bytes() + linear.bias.as_ref().map_or(0, |bias| size_of_val(&**bias))
        };
        let blocks = self.blocks.iter().map(|block| {
            let linears = [
                &block.query,
                &block.key,
                &block.value,
                &block.attention_output,
                &block.gate,
                &block.up,
                &block.down,
            ];
            linears.into_iter().map(linear).sum::<usize>() + 2 * size_of_val(&*block.attention_norm)
        });
        self.embedding.bytes() + self.output.as_ref().map_or(0, Matrix::bytes) + blocks.sum::<usize>()
    }
}

impl HostDecoder {
    /// Reads the weights, layer by layer; `progress` is told of each.
    pub(crate) fn load(
        spec: &DecoderSpec,
        loader: &Loader<'_>,
        precision: Precision,
        progress: &mut dyn FnMut(LoadProgress) -> Result<(), ModelError>,
    ) -> Result<Self, ModelError> {
        Ok(Self(Arc::new(load::model(spec, loader, precision, progress)?)))
    }

    pub(crate) fn cache(&self) -> HostCache {
        HostCache::new(self.0.precision)
    }

    /// Bytes of keys and values that a token takes.
    pub(crate) fn kv_bytes_per_token(&self) -> usize {
        let element = match self.0.precision {
            Precision::Exact => size_of::<f32>(),
            Precision::Integer => size_of::<half::f16>(),
        };
        self.0.spec.layers * cache::layout(&self.0.spec).page_len() / PAGE * element
    }

    /// Feeds `[tokens]` ids behind the first `offset` positions of a cache, and returns what `logits` asks for, `[rows,
    /// vocab_size]` float32. Without logits it is one number, there once the cache is written.
    pub(crate) fn forward(
        &self,
        ids: &Array,
        cache: &mut HostCache,
        offset: usize,
        logits: Logits,
    ) -> Result<Array, ModelError> {
        let rows = match logits {
            Logits::None => 0,
            Logits::Last => 1,
            Logits::All => ids.size(),
        };
        let (model, pages) = (Arc::clone(&self.0), cache.pages());
        let op = HostOp::new(c"decoder", move |inputs, outputs| {
            let (Some(ids), [written, logits]) = (inputs.first(), outputs) else {
                return Err("the decoder takes ids and gives logits".to_owned());
            };
            written.as_mut_slice::<u32>()?.fill(0);
            let (ids, logits) = (ids.as_slice::<u32>()?, logits.as_mut_slice::<f32>()?);
            let mut pages = pages.lock().unwrap_or_else(PoisonError::into_inner);
            match &mut *pages {
                Pages::F32(pages) => model.run(ids, pages, offset, rows, logits),
                Pages::F16(pages) => model.run(ids, pages, offset, rows, logits),
            }
        });
        let mut inputs = vec![ids.as_ptr()];
        inputs.extend(cache.written.as_ref().map(Array::as_ptr));
        let shape = [rows as i32, self.0.spec.vocab_size as i32];
        let outputs = [
            HostOutput::new(&[1], mlx_dtype__MLX_UINT32),
            HostOutput::new(&shape, mlx_dtype__MLX_FLOAT32),
        ];
        let stream = Stream::cpu();
        #[expect(unsafe_code, reason = "the graph is built through MLX's C interface")]
        // SAFETY: the handles of the arrays and of the stream are alive; the results are owned, and each is taken once.
        let mut results = unsafe {
            op.call(&inputs, &outputs, stream.as_ptr())
                .map_err(ModelError::Mlx)?
                .into_iter()
                .map(|array| Array::from_ptr(array))
        };
        let (Some(written), Some(logits)) = (results.next(), results.next()) else {
            return Err(ModelError::Mlx("the decoder gave no arrays".to_owned()));
        };
        cache.written = Some(written.clone());
        Ok(if rows == 0 { written } else { logits })
    }
}

impl Model {
    /// Checks the ids, which may have been chosen on the way, and runs a step of one sequence.
    fn run<E: mlx_engine_kernels::KvElement>(
        &self,
        ids: &[u32],
        pages: &mut Vec<Page<E>>,
        position: usize,
        rows: usize,
        logits: &mut [f32],
    ) -> Result<(), String> {
        let part = Part {
            pages,
            position,
            rows: ids.len(),
        };
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let done = self.forward(&mut workspace, ids, &mut [part], rows, logits);
        workspace.count();
        done.map_err(|error| error.to_string())
    }
}
