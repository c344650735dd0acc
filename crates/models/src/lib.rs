//! Language models on MLX.
//!
//! A model is data: [`DecoderSpec`] says what a decoder looks like, read from `config.json` or from GGUF metadata, and
//! [`Decoder`] is the one implementation of all of them. Weights come from an MLX or Hugging Face folder or from a
//! GGUF file, strictly: a missing, unused or misshapen tensor is an error that names it.
//!
//! Everything here belongs to one thread, the one that loads the model. There are no requests and no text: token ids
//! go in, token ids and log-probabilities come out.
//!
//! On a CPU a decoder is one node of MLX's graph, computed by the kernels of `mlx-engine-kernels`; on a GPU it is a graph of
//! MLX's operations, in the type of the checkpoint. [`Compute`] chooses.
//!
//! ```no_run
//! use mlx_engine_models::{Compute, Decoder, History, Sampler, Source};
//! use mlx_engine_core::GenerateParams;
//!
//! let source = Source::open("model.gguf".as_ref())?;
//! let decoder = Decoder::load(&source, Compute::Fastest, &mut |_progress| Ok(()))?;
//! let mut sequence = decoder.sequence();
//! let sampler = Sampler::new(&GenerateParams::default().with_temperature(0.0), 0);
//! let logits = decoder.forward(&[1, 2, 3], &mut sequence)?;
//! let history = History { tokens: &[1, 2, 3], prompt_len: 3, ..History::default() };
//! let step = sampler.start(&logits, 0, &history)?;
//! println!("{}", step.read(&sampler, &[1, 2, 3], 3, &mut |_| {})?.token);
//! # Ok::<(), mlx_engine_models::ModelError>(())
//! ```

mod block;
mod convert;
mod decoder;
mod device;
mod error;
mod family;
mod faulty;
mod graph;
mod host;
mod kv;
mod memory;
mod names;
mod sampling;
mod sequence;
mod source;
mod spec;
mod weights;

pub use convert::{
    Conversion, ConvertOptions, ConvertProgress, ConvertedWeights, Recipe, WeightBits, convert_weights,
};
pub use decoder::{
    Compute, Decoder, DecoderBytes, Feed, FeedTokens, KvWindow, LoadOptions, NextToken, Wanted,
};
pub use device::{DeviceInfo, detect, rebuild_stream};
pub use error::ModelError;
pub use family::{spec_from_config, spec_from_gguf, supported_model_types};
#[doc(hidden)]
pub use faulty::fail_in_a_node;
pub use host::cpu_kernels;
pub use kv::TAKEN_BACK;
pub use memory::{
    active_memory, cache_memory, clear_cache, limit_memory, peak_memory, reset_peak_memory, set_memory_limit,
};
pub use sampling::{History, Logits, Sampled, Sampler, Step, log_softmax, row};
pub use sequence::Sequence;
pub use source::Source;
pub use spec::{
    Activation, DecoderSpec, ExpertsSpec, LayerAttention, NormPlacement, QkNorm, RopeScaling, RopeSpec,
};
