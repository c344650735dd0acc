//! The decoder on a CPU: one node of MLX's graph, computed by our kernels.
//!
//! MLX has neither SIMD nor threads on most CPUs, and a node costs it some microseconds, of which a step of a small model
//! would need a thousand. So the whole step is one host op: token ids go in, logits come out, and sampling is MLX's
//! again. Keys and values live in pages outside MLX.

mod cache;
mod experts;
mod faults;
mod forward;
mod load;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mlx_engine_core::LoadProgress;
pub(crate) use mlx_engine_kernels::PAGE;
pub(crate) use mlx_engine_kernels::Precision;
use mlx_engine_kernels::{Isa, Matrix, Pool, all_finite};
use mlx_rs::{Array, Stream};
use mlx_sys::{HostOp, HostOutput, mlx_dtype__MLX_FLOAT32, mlx_dtype__MLX_UINT32};

pub(crate) use cache::{HostCache, LAYOUT, PagePlan};
use faults::StepFault;
use forward::{Part, Workspace};

use crate::kv::KvPlan;
use crate::memory::Held;
use crate::weights::Loader;
use crate::{DecoderSpec, ModelError};

/// A decoder whose weights are laid out for the kernels.
#[derive(Clone, Debug)]
pub(crate) struct HostDecoder {
    model: Arc<Model>,
    pub(crate) pages: Arc<PagePlan>,
}

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
    /// For each kind of attention, where it rotates: of each pair of a head, in radians.
    wavelengths: Vec<Option<Vec<f32>>>,
    /// One step runs at a time.
    workspace: Mutex<Workspace>,
    weights: Held,
}

#[derive(Debug)]
struct Block {
    /// The norms that the family has where it has them.
    attention_norm: Option<Vec<f32>>,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Norms of queries and keys, where the family has them.
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    attention_output: Linear,
    post_attention_norm: Option<Vec<f32>>,
    mlp_norm: Option<Vec<f32>>,
    feed_forward: FeedForward,
    post_mlp_norm: Option<Vec<f32>>,
}

/// What follows attention in a block.
#[derive(Debug)]
enum FeedForward {
    Mlp(Box<Mlp>),
    Experts(Box<Experts>),
}

/// A gated MLP.
#[derive(Debug)]
struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// MLPs of which each token chooses some.
#[derive(Debug)]
struct Experts {
    /// What scores them.
    router: Matrix,
    /// Gate, up and down of each.
    matrices: Vec<[Matrix; 3]>,
    /// How many a token chooses.
    active: usize,
    /// Whether the weights of those add up to 1.
    normalized: bool,
    /// An MLP that every token passes besides, and what weighs it.
    shared: Option<(Mlp, Matrix)>,
}

impl FeedForward {
    /// Bytes of the weights.
    fn bytes(&self) -> usize {
        let of_mlp = |mlp: &Mlp| {
            [&mlp.gate, &mlp.up, &mlp.down]
                .map(Linear::bytes)
                .iter()
                .sum::<usize>()
        };
        match self {
            Self::Mlp(mlp) => of_mlp(mlp),
            Self::Experts(experts) => {
                let matrices = experts.matrices.iter().flatten().map(Matrix::bytes);
                let shared = experts.shared.as_ref();
                let shared = shared.map_or(0, |(mlp, gate)| of_mlp(mlp) + gate.bytes());
                experts.router.bytes() + matrices.sum::<usize>() + shared
            }
        }
    }
}

/// A projection with an optional bias.
#[derive(Debug)]
struct Linear {
    matrix: Matrix,
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// Bytes of the weights.
    fn bytes(&self) -> usize {
        self.matrix.bytes() + self.bias.as_ref().map_or(0, |bias| size_of_val(&**bias))
    }
}

impl Model {
    /// Bytes of the weights.
    fn bytes(&self) -> usize {
        let blocks = self.blocks.iter().map(|block| {
            let linears = [&block.query, &block.key, &block.value, &block.attention_output];
            let norms = [
                &block.attention_norm,
                &block.post_attention_norm,
                &block.mlp_norm,
                &block.post_mlp_norm,
            ];
            let norms = norms.into_iter().flatten().map(|norm| size_of_val(&**norm));
            let linears = linears.into_iter().map(Linear::bytes);
            linears.sum::<usize>() + block.feed_forward.bytes() + norms.sum::<usize>()
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
        threads: Option<usize>,
        kv: KvPlan,
        progress: &mut dyn FnMut(LoadProgress) -> Result<(), ModelError>,
    ) -> Result<Self, ModelError> {
        let pool = Pool::new(threads.unwrap_or_else(Pool::physical_cores));
        let model = Arc::new(load::model(spec, loader, precision, pool, progress)?);
        let pages = Arc::new(PagePlan::new(spec, kv, precision));
        Ok(Self { model, pages })
    }

    /// Keeps keys and values otherwise, of sequences that begin from now on.
    pub(crate) fn keep(&mut self, kv: KvPlan) {
        self.pages = Arc::new(PagePlan::new(&self.model.spec, kv, self.model.precision));
    }

    /// Bytes of keys and values that a token takes, all of which are kept.
    pub(crate) fn kv_bytes_per_token(&self) -> usize {
        self.pages.bytes_per_token()
    }

    /// Feeds `[tokens]` ids, those of one sequence after those of another, and returns the logits of the rows that each
    /// wants, `[wanted, vocab_size]` float32: zeros where the step fails, which the [faults](faults::Faults) of the sequence tell.
    pub(crate) fn forward(
        &self,
        ids: &Array,
        sequences: &mut [HostRows<'_>],
    ) -> Result<Option<Array>, ModelError> {
        let (model, plan) = (Arc::clone(&self.model), Arc::clone(&self.pages));
        let parts: Vec<_> = sequences
            .iter()
            .map(|sequence| {
                let HostRows {
                    position,
                    rows,
                    wanted,
                    prompt,
                    ..
                } = *sequence;
                let faults = sequence.cache.faults.clone();
                (sequence.cache.pages(), faults, [position, rows, wanted], prompt)
            })
            .collect();
        let wanted: usize = sequences.iter().map(|sequence| sequence.wanted).sum();
        let op = HostOp::new(c"decoder", move |inputs, outputs| {
            let (Some(ids), [written, logits]) = (inputs.first(), outputs) else {
                return Err("the decoder takes ids and gives logits".to_owned());
            };
            written.as_mut_slice::<u32>()?.fill(0);
            let (ids, logits) = (ids.as_slice::<u32>()?, logits.as_mut_slice::<f32>()?);
            // Only steps lock caches, and MLX runs one step after the other.
            let mut locked: Vec<_> = parts
                .iter()
                .map(|(pages, ..)| pages.lock().unwrap_or_else(PoisonError::into_inner))
                .collect();
            let mut parts: Vec<Part<'_>> = locked
                .iter_mut()
                .zip(&parts)
                .map(|(pages, (_, faults, [position, rows, wanted], prompt))| Part {
                    pages,
                    faults,
                    position: *position,
                    rows: *rows,
                    wanted: *wanted,
                    prompt: *prompt,
                })
                .collect();
            model.run(&plan, ids, &mut parts, logits);
            Ok(())
        });
        let mut inputs = vec![ids.as_ptr()];
        let before = sequences
            .iter()
            .filter_map(|sequence| sequence.cache.written.as_ref());
        inputs.extend(before.map(Array::as_ptr));
        let shape = [wanted as i32, self.model.spec.vocab_size as i32];
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
        for sequence in sequences {
            sequence.cache.written = Some(written.clone());
        }
        Ok((wanted > 0).then_some(logits))
    }
}

/// Bytes of keys and values that a token of a decoder would take, while all are kept.
pub(crate) fn kv_bytes_per_token(spec: &DecoderSpec, kv: KvPlan, precision: Precision) -> usize {
    PagePlan::new(spec, kv, precision).bytes_per_token()
}

/// The instruction set that the kernels would be chosen for, and the threads that they would run on.
///
/// # Errors
///
/// Where the environment names an instruction set that is not there.
pub fn cpu_kernels() -> Result<(&'static str, usize), ModelError> {
    Ok((Isa::from_environment()?.name(), Pool::physical_cores()))
}

/// What a step feeds to one sequence.
pub(crate) struct HostRows<'a> {
    pub(crate) cache: &'a mut HostCache,
    /// Tokens that the sequence has seen.
    pub(crate) position: usize,
    /// Tokens that it is fed.
    pub(crate) rows: usize,
    /// How many of the last of them give logits.
    pub(crate) wanted: usize,
    /// Whether they are of a prompt. Prompts come behind answers.
    pub(crate) prompt: bool,
}

/// Logits of which a thread looks at so many before another may take some.
const LOGITS: usize = 8192;

impl Model {
    /// Runs a step. What fails is written down for the sequences that it failed for, and for no others: where the step of all
    /// fails, each is run alone. Keys and values have their places, so that nothing is there twice.
    fn run(&self, plan: &PagePlan, ids: &[u32], parts: &mut [Part<'_>], logits: &mut [f32]) {
        // A sequence whose last step failed lacks keys and values.
        let sound = parts.iter().all(Part::is_sound);
        if sound && self.attempt(plan, ids, parts, logits).is_ok() {
            self.check(parts, logits);
            return;
        }
        let (mut ids, mut logits) = (ids, logits);
        for part in parts.chunks_mut(1) {
            let [one] = &*part else { continue };
            let (rows, wanted) = (one.rows, one.wanted * self.spec.vocab_size);
            let Some((own_ids, other_ids)) = ids.split_at_checked(rows) else {
                return;
            };
            let Some((own_logits, other_logits)) = logits.split_at_mut_checked(wanted) else {
                return;
            };
            (ids, logits) = (other_ids, other_logits);
            if !one.is_sound() {
                own_logits.fill(0.0);
                continue;
            }
            match self.attempt(plan, own_ids, part, own_logits) {
                Ok(()) => self.check(part, own_logits),
                Err(fault) => {
                    own_logits.fill(0.0);
                    if let [one] = &*part {
                        one.faults.note(one.position, fault);
                    }
                }
            }
        }
    }

    /// Runs a step of all parts together.
    fn attempt(
        &self,
        plan: &PagePlan,
        ids: &[u32],
        parts: &mut [Part<'_>],
        logits: &mut [f32],
    ) -> Result<(), StepFault> {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let done = catch_unwind(AssertUnwindSafe(|| {
            self.forward(&mut workspace, plan, ids, parts, logits)
        }));
        workspace.count();
        match done {
            Ok(done) => Ok(done?),
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
                Err(StepFault::Panicked(
                    text.unwrap_or_else(|| "no message".to_owned()),
                ))
            }
        }
    }

    /// Looks whether the logits are numbers.
    fn check(&self, parts: &[Part<'_>], mut logits: &mut [f32]) {
        for part in parts {
            let Some((own, others)) = logits.split_at_mut_checked(part.wanted * self.spec.vocab_size) else {
                return;
            };
            logits = others;
            if !self.is_finite(own) {
                own.fill(0.0);
                part.faults.note(part.position, StepFault::NotFinite);
            }
        }
    }

    fn is_finite(&self, logits: &[f32]) -> bool {
        let finite = AtomicBool::new(true);
        let pieces: Vec<&[f32]> = logits.chunks(LOGITS).collect();
        self.pool.split(pieces.len(), |range| {
            if !pieces[range].iter().all(|piece| all_finite(self.isa, piece)) {
                finite.store(false, Ordering::Relaxed);
            }
        });
        finite.into_inner()
    }
}
