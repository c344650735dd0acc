//! What can be wrong with a checkpoint.

use std::path::PathBuf;

/// Why a checkpoint could not be read. Messages name the file and the tensor or key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file or folder could not be opened.
    #[error("failed to open `{}`", path.display())]
    Open {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is none of its kind, or breaks the rules of its format.
    #[error("`{file}` is not a valid {format} file: {message}")]
    Malformed {
        /// The file's name.
        file: String,
        /// `GGUF` or `safetensors`.
        format: &'static str,
        /// What is wrong.
        message: String,
    },
    /// The file ends too early.
    #[error("`{file}` is truncated: {what} needs {needed} bytes, the file has {available}; fetch it again")]
    Truncated {
        /// The file's name.
        file: String,
        /// The part that is cut off.
        what: String,
        /// Length that the file would need to have.
        needed: u64,
        /// Length that it has.
        available: u64,
    },
    /// A tensor has a type that is not read here.
    #[error("tensor `{tensor}` has the type {found}, supported: {supported}")]
    UnsupportedType {
        /// The tensor's name.
        tensor: String,
        /// Its type.
        found: String,
        /// What is supported.
        supported: String,
    },
    /// A key that has to be there is not.
    #[error("metadata `{key}` is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A key has a value of another type.
    #[error("metadata `{key}` is {found}, expected {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// No tensor has the name.
    #[error("tensor `{tensor}` is missing from `{checkpoint}`")]
    MissingTensor {
        /// The tensor's name.
        tensor: String,
        /// The file or folder that was searched.
        checkpoint: String,
    },
    /// A folder holds no weights.
    #[error("`{}` has no `model.safetensors`, no `model.safetensors.index.json` and no `model*.safetensors`", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A matrix cannot be quantized.
    #[error("it cannot be quantized to {bits} bits in groups of {group_size}: {message}")]
    Quantization {
        /// The bits of a number.
        bits: u32,
        /// The numbers of a group.
        group_size: u32,
        /// What does not fit.
        message: String,
    },
    /// A file could not be written.
    #[error("failed to write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What is written is not what was announced.
    #[error("tensor `{tensor}` of `{file}` {message}")]
    Layout {
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
        /// What is wrong.
        message: String,
    },
    /// Bytes do not make up whole blocks of their type.
    #[error("{bytes} bytes are not whole blocks of {ggml_type}, which have {block_bytes} bytes")]
    PartialBlock {
        /// The type.
        ggml_type: &'static str,
        /// The length given.
        bytes: usize,
        /// The length of a block.
        block_bytes: usize,
    },
}
