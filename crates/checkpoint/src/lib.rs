//! Reads checkpoints of language models, GGUF and safetensors, without an array library.
//!
//! Files are mapped, not read: a tensor is a name, a type, a shape and bytes. Everything in a file is checked against
//! the file's own length before it is used, so that a damaged or hostile file is an error and never a panic or a huge
//! allocation. GGUF's blocks are turned into float32 ([`GgmlType::dequantize`]) or, where nothing is lost, into the
//! affine layout that MLX computes with ([`AffineTensor::from_ggml`]).
//!
//! ```no_run
//! use mlx_engine_checkpoint::GgufFile;
//!
//! let file = GgufFile::open("model.gguf".as_ref())?;
//! println!("{}", file.metadata().string("general.architecture")?);
//! for tensor in file.tensors() {
//!     println!("{} {} {:?}", tensor.name, tensor.ggml_type, tensor.shape);
//! }
//! # Ok::<(), mlx_engine_checkpoint::CheckpointError>(())
//! ```

mod affine;
mod error;
mod ggml;
mod gguf;
mod map;
mod safetensors;
mod sharded;

pub use affine::AffineTensor;
pub use error::CheckpointError;
pub use ggml::GgmlType;
pub use gguf::{GgufFile, GgufTensor, GgufValue, Metadata};
pub use safetensors::{Dtype, SafetensorsFile, TensorView};
pub use sharded::ShardedCheckpoint;
