//! A folder of safetensors files in Hugging Face's layout.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{CheckpointError, SafetensorsFile, TensorView};

/// The weights of a folder: one `model.safetensors`, the shards that `model.safetensors.index.json` names, or all
/// `model*.safetensors`, which is what mlx-lm reads.
#[derive(Debug)]
pub struct ShardedCheckpoint {
    folder: PathBuf,
    files: Vec<SafetensorsFile>,
    /// The file of each tensor.
    index: BTreeMap<String, usize>,
}

impl ShardedCheckpoint {
    /// Opens every file of the folder and reads the headers.
    ///
    /// # Errors
    ///
    /// Where the folder has no weights, a shard is missing or damaged, a tensor is in two shards, or the index names a
    /// tensor that its shard lacks.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let index_path = folder.join("model.safetensors.index.json");
        let (names, expected) = if index_path.is_file() {
            let map = read_index(&index_path)?;
            let mut names: Vec<String> = map.values().cloned().collect();
            names.sort();
            names.dedup();
            (names, map)
        } else {
            (find(folder)?, BTreeMap::new())
        };
        if names.is_empty() {
            return Err(CheckpointError::NoWeights {
                path: folder.to_owned(),
            });
        }
        let mut files = Vec::with_capacity(names.len());
        let mut index = BTreeMap::new();
        for (number, name) in names.iter().enumerate() {
            let file = SafetensorsFile::open(&folder.join(name))?;
            for tensor in file.names() {
                if let Some(other) = index.insert(tensor.to_owned(), number) {
                    return Err(CheckpointError::Malformed {
                        file: name.clone(),
                        format: "safetensors",
                        message: format!("tensor `{tensor}` is in `{}` too", names[other]),
                    });
                }
            }
            files.push(file);
        }
        for (tensor, file) in expected {
            if index.get(&tensor).is_none_or(|&number| names[number] != file) {
                return Err(CheckpointError::MissingTensor {
                    tensor,
                    checkpoint: file,
                });
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            files,
            index,
        })
    }

    /// The names of the tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.files[*self.index.get(name)?].tensor(name)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Gives the memory that reading tensors took back to the system. The tensors can be read again.
    pub fn release(&self) {
        self.files.iter().for_each(SafetensorsFile::release);
    }

    /// The length of all files in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(SafetensorsFile::total_bytes).sum()
    }
}

/// The shard of each tensor.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let malformed = |message: String| CheckpointError::Malformed {
        file: name.clone(),
        format: "safetensors index",
        message,
    };
    let text = std::fs::read(path).map_err(|source| CheckpointError::Open {
        path: path.to_owned(),
        source,
    })?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
    let map = json["weight_map"]
        .as_object()
        .ok_or_else(|| malformed("it has no object `weight_map`".to_owned()))?;
    map.iter()
        .map(|(tensor, file)| {
            let file = file
                .as_str()
                .ok_or_else(|| malformed(format!("the file of `{tensor}` is {file}")))?;
            // A plain name: an index must not reach out of its folder.
            if Path::new(file).file_name().is_none_or(|name| name != file) {
                return Err(malformed(format!(
                    "the file of `{tensor}` is `{file}`, which is no plain file name"
                )));
            }
            Ok((tensor.clone(), file.to_owned()))
        })
        .collect()
}

/// The names of `model*.safetensors`, sorted; `model.safetensors` alone where it is there.
fn find(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let failed = |source| CheckpointError::Open {
        path: folder.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        if name == "model.safetensors" {
            return Ok(vec![name]);
        }
        if name.starts_with("model")
            && Path::new(&name)
                .extension()
                .is_some_and(|found| found == "safetensors")
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
