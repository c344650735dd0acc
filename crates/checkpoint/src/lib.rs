//! Reads checkpoints of language models, GGUF and safetensors, and writes safetensors, without an array library.
//!
//! Files are mapped, not read: a tensor is a name, a type, a shape and bytes. Everything in a file is checked against
//! the file's own length before it is used, so that a damaged or hostile file is an error and never a panic or a huge
//! allocation. GGUF's blocks are turned into float32 ([`GgmlType::dequantize`]) or, where nothing is lost, into the
//! affine layout that MLX computes with ([`AffineTensor::from_ggml`]). [`AffineTensor::quantize`] makes that layout of any floats,
//! with MLX's own bits, and [`ShardWriter`] writes safetensors tensor by tensor.
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
mod float;
mod ggml;
mod gguf;
mod map;
mod quantize;
mod safetensors;
mod sharded;
mod write;

pub use affine::AffineTensor;
pub use error::CheckpointError;
pub use float::FloatType;
pub use ggml::GgmlType;
pub use gguf::{GgufFile, GgufTensor, GgufValue, Metadata};
pub use safetensors::{Dtype, SafetensorsFile, TensorView};
pub use sharded::ShardedCheckpoint;
pub use write::{ShardWriter, TensorLayout};
