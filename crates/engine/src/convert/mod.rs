//! From a model folder or a GGUF file to a folder in MLX's layout, which mlx-lm loads too.
//!
//! It is here that weights and text meet: `mlx-engine-models` writes the weights and the configuration, `mlx-engine-text` the
//! tokenizer of a GGUF file. What is there when all is written gets its name by one rename.

mod card;
mod staging;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use mlx_engine_checkpoint::GgufFile;
use mlx_engine_core::EngineError;
use mlx_engine_models::{
    Conversion, ConvertOptions, ConvertProgress, ConvertedWeights, ModelError, Source, convert_weights,
};
use mlx_engine_text::{TextError, Tokenizer};
use serde_json::{Map, Value, json};

use crate::mlx::vocabulary;
use staging::{Staging, failed};

/// Files that are taken over from a folder as they are, where it has them.
const KEPT: [&str; 13] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
];

/// Where a model is from, for the card.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The hub id.
    pub base_model: Option<String>,
    /// The licence, as the hub spells it.
    pub licence: Option<String>,
}

/// What a conversion did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertReport {
    /// The folder.
    pub path: PathBuf,
    /// The `model_type` of its configuration.
    pub model_type: String,
    /// What became of the tensors, by kind, those with most weights first.
    pub conversions: Vec<Conversion>,
    /// The number of weights.
    pub parameters: u64,
    /// Bytes of the weights.
    pub bytes: u64,
    /// Whether the folder has a tokenizer. One without is for programs that bring their own.
    pub has_tokenizer: bool,
    /// Where the model is from, as far as known.
    pub origin: Origin,
}

impl ConvertReport {
    /// Whether every tensor has the values that it had.
    pub fn is_exact(&self) -> bool {
        self.conversions.iter().all(|kind| kind.exact == kind.tensors)
    }
}

/// Why a model could not be converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The folder to write cannot be made.
    #[error("`{}` {reason}", path.display())]
    Destination {
        /// The folder.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// Another conversion writes the same folder.
    #[error("another conversion is writing `{}`", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// A file or folder failed.
    #[error("failed to {action} `{}`", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The model was not found.
    #[error(transparent)]
    NotFound(#[from] EngineError),
    /// The model could not be read, or its weights not be written.
    #[error(transparent)]
    Model(ModelError),
    /// The tokenizer of a GGUF file cannot be written as files.
    #[error("the tokenizer cannot be converted")]
    Tokenizer(#[from] TextError),
    /// It was given up.
    #[error("the conversion was cancelled")]
    Cancelled,
}

impl ConvertError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NotFound(error) => return error.hint(),
            Self::Destination { .. } => "give a folder that is not there yet or is empty",
            Self::Busy { .. } => "wait for it, or give another folder",
            Self::Model(ModelError::Convert { .. }) => "choose the type float32, which holds every value",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

impl From<ModelError> for ConvertError {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Cancelled => Self::Cancelled,
            error => Self::Model(error),
        }
    }
}

/// Converts the model folder or `.gguf` file at `path` into the new folder `target`. It works on the calling thread, needs no MLX
/// and no more memory than a few rows of the largest matrix. [`ControlFlow::Break`] from `progress` gives it up.
///
/// # Errors
///
/// Where `target` is there and not empty, where the model cannot be read, has values that do not fit what is asked for, or cannot
/// be written. `target` is not there then, and neither is it where the process is killed.
pub fn convert_model(
    path: &Path,
    target: &Path,
    options: &ConvertOptions,
    origin: &Origin,
    progress: &mut dyn FnMut(ConvertProgress<'_>) -> ControlFlow<()>,
) -> Result<ConvertReport, ConvertError> {
    let source = Source::open(path)?;
    let staging = Staging::new(target)?;
    let weights = convert_weights(
        &source,
        options,
        staging.folder(),
        &mut |stage| match progress(stage) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ModelError::Cancelled),
        },
    )?;
    let ConvertedWeights {
        mut config,
        conversions,
        parameters,
        bytes,
        model_type,
    } = weights;
    let (has_tokenizer, origin) = match source.gguf() {
        Some(file) => (
            write_tokenizer(file, &staging, &mut config)?,
            card::origin_of_gguf(origin, file.metadata()),
        ),
        None => (copy_files(path, &staging)?, card::origin_of_folder(origin, path)),
    };
    // Sorted, as mlx-lm writes it.
    let config: BTreeMap<String, Value> = config.into_iter().collect();
    staging.write("config.json", &format!("{:#}\n", json!(config)))?;
    let report = ConvertReport {
        path: target.to_owned(),
        model_type,
        conversions,
        parameters,
        bytes,
        has_tokenizer,
        origin,
    };
    staging.write("README.md", &card::card(&report))?;
    staging.finish()?;
    Ok(report)
}

/// Writes the tokenizer that a GGUF file has, and the tokens that end an answer into the configuration, where mlx-lm looks for
/// them. Tells whether there is one.
fn write_tokenizer(
    file: &GgufFile,
    staging: &Staging,
    config: &mut Map<String, Value>,
) -> Result<bool, ConvertError> {
    let metadata = file.metadata();
    if metadata.get("tokenizer.ggml.model").is_none() {
        return Ok(false);
    }
    let vocabulary = vocabulary(metadata).map_err(ModelError::from)?;
    let files = vocabulary.export()?;
    staging.write("tokenizer.json", &files.tokenizer)?;
    staging.write("tokenizer_config.json", &files.config)?;
    if let Some(bos) = vocabulary.bos {
        config.insert("bos_token_id".to_owned(), json!(bos));
    }
    let tokenizer = Tokenizer::from_vocabulary(vocabulary)?;
    let ends = tokenizer.eos_ids();
    if !ends.is_empty() {
        config.insert("eos_token_id".to_owned(), json!(ends));
    }
    Ok(true)
}

/// Copies the tokenizer and what else belongs to a model; tells whether there is a tokenizer.
fn copy_files(folder: &Path, staging: &Staging) -> Result<bool, ConvertError> {
    for name in KEPT {
        let from = folder.join(name);
        if from.is_file() {
            // Links are followed: the hub's cache is made of them.
            fs::copy(&from, staging.folder().join(name)).map_err(failed("copy", &from))?;
        }
    }
    Ok(folder.join("tokenizer.json").is_file())
}
