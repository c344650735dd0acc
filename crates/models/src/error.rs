//! What can go wrong with a model.

use std::path::PathBuf;

use mlx_engine_checkpoint::CheckpointError;
use mlx_engine_kernels::KernelError;

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The path is neither a folder nor a file.
    #[error("`{}` does not exist", path.display())]
    NoSuchPath {
        /// The path.
        path: PathBuf,
    },
    /// The folder has no configuration.
    #[error("`{}` has no `config.json`, which a model folder needs", path.display())]
    NoConfig {
        /// The folder.
        path: PathBuf,
    },
    /// The configuration could not be read or lacks something.
    #[error("configuration of the model is invalid: {message}")]
    Config {
        /// What is wrong, with the key.
        message: String,
    },
    /// No architecture here runs the model.
    #[error("model type `{model_type}` is not supported, supported are: {}", supported.join(", "))]
    Unsupported {
        /// `model_type` of the configuration, or `general.architecture` of the GGUF file.
        model_type: String,
        /// What is supported.
        supported: Vec<&'static str>,
    },
    /// The files of the weights are damaged.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Tensors that the model needs are not there.
    #[error("the checkpoint lacks {} tensors that a {model_type} model needs: {}", tensors.len(), some(tensors))]
    Missing {
        /// The architecture.
        model_type: String,
        /// The names.
        tensors: Vec<String>,
    },
    /// Tensors that the model has no use for, which says that it is another model.
    #[error("the checkpoint has {} tensors that a {model_type} model does not use: {}", tensors.len(), some(tensors))]
    Unused {
        /// The architecture.
        model_type: String,
        /// The names.
        tensors: Vec<String>,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("tensor `{tensor}` has the shape {found:?}, the configuration asks for {expected:?}")]
    Shape {
        /// The name.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A quantized tensor does not fit its bits or its group size.
    #[error("tensor `{tensor}` cannot be quantized to {bits} bits in groups of {group_size}: {message}")]
    Quantization {
        /// The name.
        tensor: String,
        /// Bits of the configuration.
        bits: u32,
        /// Group size of the configuration.
        group_size: u32,
        /// What does not fit.
        message: String,
    },
    /// A tensor cannot be converted to what was asked for.
    #[error("tensor `{tensor}` cannot be converted: {message}")]
    Convert {
        /// The name.
        tensor: String,
        /// Why.
        message: String,
    },
    /// A token id is not in the vocabulary.
    #[error("token {token} is not in the vocabulary of {vocabulary}")]
    Token {
        /// The id.
        token: u32,
        /// The size of the vocabulary.
        vocabulary: usize,
    },
    /// The sequence would be longer than the context.
    #[error("{tokens} tokens do not fit the context of {context_length}")]
    ContextExceeded {
        /// The length.
        tokens: usize,
        /// The most it may be.
        context_length: usize,
    },
    /// A block of keys and values is not what was written.
    #[error("the block of keys and values is damaged: {message}")]
    DamagedBlock {
        /// What is wrong with it.
        message: String,
    },
    /// A block of keys and values is of another model, of another kind of computing or of other positions.
    #[error("the block of keys and values is {found}, and {expected} was asked for")]
    ForeignBlock {
        /// What the block says of itself.
        found: String,
        /// What would do.
        expected: String,
    },
    /// Positions of which keys and values cannot be taken out.
    #[error(
        "positions {start} to {end} cannot be exported: the sequence has {len}, and a block begins at a multiple of {multiple}"
    )]
    BlockRange {
        /// The first.
        start: usize,
        /// The one behind the last.
        end: usize,
        /// Positions of the sequence.
        len: usize,
        /// What the first has to be a multiple of.
        multiple: usize,
    },
    /// What the last of some tokens sees is gone, as a window has passed it.
    #[error("the keys and values that {len} tokens end with are gone: the window has passed them")]
    Forgotten {
        /// The number of tokens.
        len: usize,
    },
    /// There was nothing to feed.
    #[error("no tokens were given")]
    NoTokens,
    /// The kernels of the CPU refused.
    #[error(transparent)]
    Kernel(KernelError),
    /// A step gave logits that are no numbers.
    #[error("the logits are not finite: the checkpoint is damaged, or a number overflowed")]
    NotFinite,
    /// A step panicked.
    #[error("a step panicked: {message}")]
    StepPanicked {
        /// What it said.
        message: String,
    },
    /// The load was given up by the caller.
    #[error("loading was cancelled")]
    Cancelled,
    /// MLX failed.
    #[error("mlx failed: {0}")]
    Mlx(String),
}

impl From<mlx_rs::error::Exception> for ModelError {
    fn from(error: mlx_rs::error::Exception) -> Self {
        Self::Mlx(error.what().to_owned())
    }
}

impl From<mlx_rs::error::AsSliceError> for ModelError {
    fn from(error: mlx_rs::error::AsSliceError) -> Self {
        Self::Mlx(error.to_string())
    }
}

impl ModelError {
    /// Whether the device had no memory for an allocation.
    ///
    /// MLX says so in the text of an exception and nowhere else; its allocators begin with these words.
    pub fn is_out_of_memory(&self) -> bool {
        let text = match self {
            Self::Kernel(KernelError::OutOfMemory { .. }) => return true,
            Self::Mlx(text) => text,
            _ => return false,
        };
        [
            "[malloc",
            "[metal::malloc]",
            "Unable to allocate",
            "out of memory",
            "bad_alloc",
        ]
        .iter()
        .any(|words| text.contains(words))
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::Config {
            message: message.into(),
        }
    }
}

/// The first names of a list that may be long.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let text = names
        .iter()
        .take(SHOWN)
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => text,
        Some(more) => format!("{text} and {more} more"),
    }
}
