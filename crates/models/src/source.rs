//! Where a model's weights come from.

use std::path::{Path, PathBuf};

use mlx_engine_checkpoint::{GgufFile, ShardedCheckpoint};
use serde_json::Value;

use crate::{DecoderSpec, ModelError, spec_from_config, spec_from_gguf};

/// An opened checkpoint: headers are read and checked, weights are not in memory yet.
#[derive(Debug)]
pub struct Source {
    pub(crate) spec: DecoderSpec,
    pub(crate) weights: Weights,
    path: PathBuf,
}

#[derive(Debug)]
pub(crate) enum Weights {
    /// A folder in MLX's or Hugging Face's layout, with its `config.json`.
    Folder(ShardedCheckpoint, Value),
    Gguf(Box<GgufFile>),
}

impl Source {
    /// Opens a model folder or a `.gguf` file.
    ///
    /// # Errors
    ///
    /// Where the path does not exist, the folder has no `config.json`, the architecture is not supported, or the files
    /// are damaged.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let (spec, weights) = if path.is_dir() {
            let config = read_config(path)?;
            let spec = spec_from_config(&config)?;
            (spec, Weights::Folder(ShardedCheckpoint::open(path)?, config))
        } else if path.exists() {
            let file = GgufFile::open(path)?;
            (spec_from_gguf(&file)?, Weights::Gguf(Box::new(file)))
        } else {
            return Err(ModelError::NoSuchPath {
                path: path.to_owned(),
            });
        };
        Ok(Self {
            spec,
            weights,
            path: path.to_owned(),
        })
    }

    /// What the decoder looks like.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The GGUF file, where it is one; its metadata holds the tokenizer.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.weights {
            Weights::Gguf(file) => Some(file),
            Weights::Folder(..) => None,
        }
    }

    /// Forgets the tokenizer that a GGUF file holds, once it has been read.
    pub fn forget_tokenizer(&mut self) {
        if let Weights::Gguf(file) = &mut self.weights {
            file.forget("tokenizer.");
        }
    }

    /// Length of the files of the weights in bytes.
    pub fn total_bytes(&self) -> u64 {
        match &self.weights {
            Weights::Folder(checkpoint, _) => checkpoint.total_bytes(),
            Weights::Gguf(file) => file.total_bytes(),
        }
    }
}

fn read_config(folder: &Path) -> Result<Value, ModelError> {
    let path = folder.join("config.json");
    if !path.is_file() {
        return Err(ModelError::NoConfig {
            path: folder.to_owned(),
        });
    }
    let text =
        std::fs::read(&path).map_err(|error| ModelError::config(format!("{}: {error}", path.display())))?;
    serde_json::from_slice(&text).map_err(|error| ModelError::config(format!("`config.json`: {error}")))
}
