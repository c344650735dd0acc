//! Writing safetensors tensor by tensor, in shards with an index, as mlx-lm lays a folder out.
//!
//! A header comes before the data and says where each tensor is, so that all shapes are given first; the tensors may then
//! come in any order and none is kept.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use crate::{CheckpointError, Dtype};

/// What a tensor will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorLayout {
    /// The name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The type of the elements.
    pub dtype: Dtype,
    /// The lengths of the axes, row-major.
    pub shape: Vec<usize>,
}

impl TensorLayout {
    /// Bytes of the elements.
    pub fn bytes(&self) -> u64 {
        let elements: u64 = self.shape.iter().map(|&len| len as u64).product();
        elements * self.dtype.to_library().bitsize() as u64 / 8
    }
}

#[derive(Debug)]
struct Shard {
    file: File,
    path: PathBuf,
}

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    shard: usize,
    start: u64,
    bytes: u64,
    written: u64,
}

/// Writes the weights of a folder: `model.safetensors`, or `model-00001-of-0000N.safetensors` where they are larger than a
/// shard, and `model.safetensors.index.json`.
#[derive(Debug)]
pub struct ShardWriter {
    folder: PathBuf,
    shards: Vec<Shard>,
    places: BTreeMap<String, Place>,
    total_bytes: u64,
}

impl ShardWriter {
    /// Bytes of tensors in a shard at most, as mlx-lm has it; a tensor that is larger has one of its own.
    pub const SHARD_BYTES: u64 = 5 << 30;

    /// Makes the files and writes their headers. The tensors are dealt to shards in the order given.
    ///
    /// # Errors
    ///
    /// Where a file cannot be written, or two tensors have one name.
    pub fn create(
        folder: &Path,
        tensors: &[TensorLayout],
        shard_bytes: u64,
    ) -> Result<Self, CheckpointError> {
        let mut names = HashSet::new();
        if let Some(twice) = tensors.iter().find(|tensor| !names.insert(&tensor.name)) {
            return Err(CheckpointError::Layout {
                tensor: twice.name.clone(),
                file: folder.display().to_string(),
                message: "was announced twice".to_owned(),
            });
        }
        let dealt = deal(tensors, shard_bytes);
        let mut shards = Vec::with_capacity(dealt.len());
        let mut places = BTreeMap::new();
        for (number, tensors) in dealt.iter().enumerate() {
            let name = if dealt.len() == 1 {
                "model.safetensors".to_owned()
            } else {
                format!("model-{:05}-of-{:05}.safetensors", number + 1, dealt.len())
            };
            let path = folder.join(&name);
            let sorted = aligned(tensors);
            let header = header(&name, &sorted)?;
            let failed = |source| CheckpointError::Write {
                path: path.clone(),
                source,
            };
            let mut file = File::create_new(&path).map_err(failed)?;
            file.write_all(&header).map_err(failed)?;
            let mut start = header.len() as u64;
            for tensor in sorted {
                let place = Place {
                    shard: number,
                    start,
                    bytes: tensor.bytes(),
                    written: 0,
                };
                start += place.bytes;
                places.insert(tensor.name.clone(), place);
            }
            shards.push(Shard { file, path });
        }
        Ok(Self {
            folder: folder.to_owned(),
            shards,
            places,
            total_bytes: tensors.iter().map(TensorLayout::bytes).sum(),
        })
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Writes a tensor's elements, little-endian, or those that follow what was written of it before.
    ///
    /// # Errors
    ///
    /// Where the tensor was not announced or would be longer than that, and where the file cannot be written.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<(), CheckpointError> {
        let refuse = |message: String| CheckpointError::Layout {
            tensor: name.to_owned(),
            file: self.folder.display().to_string(),
            message,
        };
        let place = self
            .places
            .get_mut(name)
            .ok_or_else(|| refuse("was not announced".to_owned()))?;
        let end = place.written + data.len() as u64;
        if end > place.bytes {
            let announced = place.bytes;
            return Err(refuse(format!(
                "has {end} bytes where {announced} were announced"
            )));
        }
        let shard = &mut self.shards[place.shard];
        let written = shard
            .file
            .seek(SeekFrom::Start(place.start + place.written))
            .and_then(|_| shard.file.write_all(data));
        place.written = end;
        written.map_err(|source| CheckpointError::Write {
            path: shard.path.clone(),
            source,
        })
    }

    /// Ends the files and writes the index. `parameters` is the number of weights, which the index states.
    ///
    /// # Errors
    ///
    /// Where an announced tensor was not written, and where a file cannot be.
    pub fn finish(self, parameters: u64) -> Result<(), CheckpointError> {
        if let Some((tensor, place)) = self.places.iter().find(|(_, place)| place.written < place.bytes) {
            return Err(CheckpointError::Layout {
                tensor: tensor.clone(),
                file: self.shards[place.shard].path.display().to_string(),
                message: format!("has {} bytes where {} were announced", place.written, place.bytes),
            });
        }
        for shard in &self.shards {
            shard.file.sync_all().map_err(|source| CheckpointError::Write {
                path: shard.path.clone(),
                source,
            })?;
        }
        let file_of = |place: &Place| {
            let name = self.shards[place.shard].path.file_name().unwrap_or_default();
            name.to_string_lossy().into_owned()
        };
        let map: BTreeMap<&str, String> = self
            .places
            .iter()
            .map(|(name, place)| (name.as_str(), file_of(place)))
            .collect();
        let index = json!({
            "metadata": {"total_size": self.total_bytes, "total_parameters": parameters},
            "weight_map": map,
        });
        let path = self.folder.join("model.safetensors.index.json");
        std::fs::write(&path, format!("{index:#}\n"))
            .map_err(|source| CheckpointError::Write { path, source })
    }
}

/// The tensors of each shard, as `make_shards` of mlx-lm deals them.
fn deal(tensors: &[TensorLayout], shard_bytes: u64) -> Vec<Vec<&TensorLayout>> {
    let mut shards: Vec<Vec<&TensorLayout>> = Vec::new();
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.bytes();
        match shards.last_mut() {
            Some(shard) if filled + bytes <= shard_bytes => shard.push(tensor),
            _ => {
                shards.push(vec![tensor]);
                filled = 0;
            }
        }
        filled += bytes;
    }
    shards
}

/// The widest types first, so that each tensor is aligned.
fn aligned<'a>(tensors: &[&'a TensorLayout]) -> Vec<&'a TensorLayout> {
    let mut sorted = tensors.to_vec();
    sorted.sort_by(|left, right| {
        let (wide, narrow) = (right.dtype.to_library(), left.dtype.to_library());
        wide.cmp(&narrow).then_with(|| left.name.cmp(&right.name))
    });
    sorted
}

/// The beginning of a file that has the tensors in this order.
fn header(file: &str, tensors: &[&TensorLayout]) -> Result<Vec<u8>, CheckpointError> {
    let malformed = |message: String| CheckpointError::Malformed {
        file: file.to_owned(),
        format: "safetensors",
        message,
    };
    let mut end = 0_usize;
    let mut infos = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let start = end;
        end = usize::try_from(tensor.bytes())
            .ok()
            .and_then(|bytes| start.checked_add(bytes))
            .ok_or_else(|| malformed(format!("tensor `{}` is too large", tensor.name)))?;
        infos.push((
            tensor.name.clone(),
            TensorInfo {
                dtype: tensor.dtype.to_library(),
                shape: tensor.shape.clone(),
                data_offsets: (start, end),
            },
        ));
    }
    // mlx-lm marks its files so.
    let about = HashMap::from([("format".to_owned(), "mlx".to_owned())]);
    let metadata = Metadata::new(Some(about), infos).map_err(|error| malformed(error.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| malformed(error.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok(header)
}
