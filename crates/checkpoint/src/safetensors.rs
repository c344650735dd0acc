//! One safetensors file.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::SafeTensors;

use crate::CheckpointError;
use crate::map::Bytes;

/// The type of a safetensors tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are those of the format")]
pub enum Dtype {
    F32,
    F16,
    BF16,
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    Bool,
}

impl Dtype {
    fn of(dtype: safetensors::Dtype) -> Option<Self> {
        Some(match dtype {
            safetensors::Dtype::F32 => Self::F32,
            safetensors::Dtype::F16 => Self::F16,
            safetensors::Dtype::BF16 => Self::BF16,
            safetensors::Dtype::U8 => Self::U8,
            safetensors::Dtype::U16 => Self::U16,
            safetensors::Dtype::U32 => Self::U32,
            safetensors::Dtype::U64 => Self::U64,
            safetensors::Dtype::I8 => Self::I8,
            safetensors::Dtype::I16 => Self::I16,
            safetensors::Dtype::I32 => Self::I32,
            safetensors::Dtype::I64 => Self::I64,
            safetensors::Dtype::BOOL => Self::Bool,
            _ => return None,
        })
    }

    pub(crate) fn to_library(self) -> safetensors::Dtype {
        match self {
            Self::F32 => safetensors::Dtype::F32,
            Self::F16 => safetensors::Dtype::F16,
            Self::BF16 => safetensors::Dtype::BF16,
            Self::U8 => safetensors::Dtype::U8,
            Self::U16 => safetensors::Dtype::U16,
            Self::U32 => safetensors::Dtype::U32,
            Self::U64 => safetensors::Dtype::U64,
            Self::I8 => safetensors::Dtype::I8,
            Self::I16 => safetensors::Dtype::I16,
            Self::I32 => safetensors::Dtype::I32,
            Self::I64 => safetensors::Dtype::I64,
            Self::Bool => safetensors::Dtype::BOOL,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A tensor of a safetensors file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// The name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: &'a str,
    /// The type of the elements.
    pub dtype: Dtype,
    /// The lengths of the axes, row-major.
    pub shape: &'a [usize],
    /// The elements, little-endian.
    pub data: &'a [u8],
}

#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// A safetensors file, mapped.
#[derive(Debug)]
pub struct SafetensorsFile {
    bytes: Bytes,
    entries: BTreeMap<String, Entry>,
}

impl SafetensorsFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    ///
    /// Where the file cannot be opened, its header is damaged, it ends before its last tensor, or a tensor has a type
    /// that is not read here.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::parse(Bytes::open(path)?)
    }

    /// Reads a file that is in memory; `name` stands for it in errors.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self, CheckpointError> {
        Self::parse(Bytes::owned(name, bytes))
    }

    fn parse(bytes: Bytes) -> Result<Self, CheckpointError> {
        let malformed = |message: String| CheckpointError::Malformed {
            file: bytes.name.clone(),
            format: "safetensors",
            message,
        };
        // The library's own words for a file that is cut off do not give the lengths.
        let header = bytes
            .first_chunk::<8>()
            .map(|len| u64::from_le_bytes(*len).saturating_add(8));
        let truncated = |what: &str, needed: u64| CheckpointError::Truncated {
            file: bytes.name.clone(),
            what: what.to_owned(),
            needed,
            available: bytes.len() as u64,
        };
        let header = header.ok_or_else(|| truncated("the header's length", 8))?;
        if header > bytes.len() as u64 {
            return Err(truncated("the header", header));
        }
        let (_, metadata) = match SafeTensors::read_metadata(&bytes) {
            Ok(read) => read,
            Err(safetensors::SafeTensorError::MetadataIncompleteBuffer) => {
                return Err(match end_of_data(&bytes, header) {
                    Some(end) if end > bytes.len() as u64 => truncated("the last tensor", end),
                    _ => malformed("its tensors do not fill it exactly".to_owned()),
                });
            }
            Err(error) => return Err(malformed(error.to_string())),
        };
        let mut entries = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let dtype = Dtype::of(info.dtype).ok_or_else(|| CheckpointError::UnsupportedType {
                tensor: name.clone(),
                found: format!("{:?}", info.dtype),
                supported: "F32, F16, BF16, integers and BOOL".to_owned(),
            })?;
            let start = header as usize;
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            if bytes.get(range.clone()).is_none() {
                return Err(truncated(&format!("tensor `{name}`"), range.end as u64));
            }
            entries.insert(
                name,
                Entry {
                    dtype,
                    shape: info.shape.clone(),
                    range,
                },
            );
        }
        Ok(Self { bytes, entries })
    }

    /// The names of the tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.entries.get_key_value(name)?;
        Some(TensorView {
            name,
            dtype: entry.dtype,
            shape: &entry.shape,
            data: &self.bytes[entry.range.clone()],
        })
    }

    /// Gives the memory that reading tensors took back to the system. The tensors can be read again.
    pub fn release(&self) {
        self.bytes.release();
    }

    /// The file's length in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// Where the data would end by the header's own account.
fn end_of_data(bytes: &[u8], header: u64) -> Option<u64> {
    let json: serde_json::Value =
        serde_json::from_slice(bytes.get(8..usize::try_from(header).ok()?)?).ok()?;
    let ends = json
        .as_object()?
        .values()
        .filter_map(|tensor| tensor["data_offsets"][1].as_u64());
    ends.max().map(|end| end.saturating_add(header))
}
