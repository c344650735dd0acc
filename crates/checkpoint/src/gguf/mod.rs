//! The GGUF format, versions 2 and 3, as llama.cpp's `docs/gguf.md` and `gguf.cpp` have it.

mod metadata;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use crate::map::Bytes;
use crate::{CheckpointError, GgmlType};

pub use metadata::{GgufValue, Metadata};

/// How deep arrays of arrays may nest; files in use have none.
const MAX_NESTING: usize = 4;
/// ggml tensors have at most this many axes.
const MAX_AXES: u32 = 4;

/// A tensor of a GGUF file.
#[derive(Clone, Copy, Debug)]
pub struct GgufTensor<'a> {
    /// The name, such as `blk.0.attn_q.weight`.
    pub name: &'a str,
    /// How the elements are packed.
    pub ggml_type: GgmlType,
    /// The lengths of the axes, row-major: the last axis is the one that is contiguous in memory.
    pub shape: &'a [usize],
    /// The packed elements.
    pub data: &'a [u8],
}

impl GgufTensor<'_> {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements as float32, row-major.
    ///
    /// # Errors
    ///
    /// None for a tensor of a [`GgufFile`], whose length was checked.
    pub fn dequantize(&self) -> Result<Vec<f32>, CheckpointError> {
        self.ggml_type.dequantize(self.data)
    }
}

#[derive(Debug)]
struct Entry {
    name: String,
    ggml_type: GgmlType,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// A GGUF file: its metadata and its tensors.
#[derive(Debug)]
pub struct GgufFile {
    bytes: Bytes,
    metadata: Metadata,
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
}

impl GgufFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    ///
    /// Where the file cannot be opened, is no GGUF file of version 2 or 3, or ends before its last tensor.
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
        let mut reader = Reader {
            file: &bytes.name,
            bytes: &bytes,
            at: 0,
        };
        let (metadata, entries) = reader.file()?;
        let index = entries
            .iter()
            .enumerate()
            .map(|(i, entry)| (entry.name.clone(), i))
            .collect();
        Ok(Self {
            bytes,
            metadata,
            entries,
            index,
        })
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Forgets the metadata whose keys begin so: a vocabulary takes some megabytes.
    pub fn forget(&mut self, prefix: &str) {
        self.metadata.retain(|key| !key.starts_with(prefix));
    }

    /// The tensors, in the file's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = GgufTensor<'_>> {
        self.entries.iter().map(|entry| self.view(entry))
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<GgufTensor<'_>> {
        self.index.get(name).map(|&index| self.view(&self.entries[index]))
    }

    /// Gives the memory that reading tensors took back to the system. The tensors can be read again.
    pub fn release(&self) {
        self.bytes.release();
    }

    /// The file's length in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn view<'a>(&'a self, entry: &'a Entry) -> GgufTensor<'a> {
        GgufTensor {
            name: &entry.name,
            ggml_type: entry.ggml_type,
            shape: &entry.shape,
            data: &self.bytes[entry.range.clone()],
        }
    }
}

/// Reads a header front to back. Every length is compared with what is left of the file before it is believed.
struct Reader<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn malformed(&self, message: impl Into<String>) -> CheckpointError {
        CheckpointError::Malformed {
            file: self.file.to_owned(),
            format: "GGUF",
            message: message.into(),
        }
    }

    fn truncated(&self, what: impl Into<String>, needed: u64) -> CheckpointError {
        CheckpointError::Truncated {
            file: self.file.to_owned(),
            what: what.into(),
            needed,
            available: self.bytes.len() as u64,
        }
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], CheckpointError> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            return Err(self.truncated(what, (self.at as u64).saturating_add(len as u64)));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], CheckpointError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32, CheckpointError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, CheckpointError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of items that take at least `item_bytes` each, which bounds it by the rest of the file.
    fn count(&mut self, item_bytes: usize, what: &str) -> Result<usize, CheckpointError> {
        let count = self.u64(what)?;
        let left = self.bytes.len() - self.at;
        usize::try_from(count)
            .ok()
            .filter(|&count| count.checked_mul(item_bytes).is_some_and(|bytes| bytes <= left))
            .ok_or_else(|| {
                let bytes = count.saturating_mul(item_bytes as u64);
                self.truncated(
                    format!("{what} of {count}"),
                    (self.at as u64).saturating_add(bytes),
                )
            })
    }

    fn string(&mut self, what: &str) -> Result<String, CheckpointError> {
        let len = self.count(1, what)?;
        let bytes = self.take(len, what)?;
        // Vocabularies hold bytes that are no UTF-8 in a few published files; llama.cpp takes them as they are.
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn file(&mut self) -> Result<(Metadata, Vec<Entry>), CheckpointError> {
        if self.take(4, "the magic number").ok() != Some(b"GGUF") {
            return Err(self.malformed("it does not begin with `GGUF`"));
        }
        let version = self.u32("the version")?;
        if !(2..=3).contains(&version) {
            let hint = if version.swap_bytes() <= 3 {
                ", which is big-endian"
            } else {
                ""
            };
            return Err(self.malformed(format!(
                "version {version}{hint} is not supported, only 2 and 3 are"
            )));
        }
        // A tensor takes at least a name's length, a count of axes, a type and an offset; an entry of the metadata a
        // key's length, a type and a byte.
        let tensors = self.u64("the number of tensors")?;
        let entries = self.count(13, "the number of metadata entries")?;
        let metadata = self.metadata(entries)?;
        let alignment = metadata.optional_u64("general.alignment")?.unwrap_or(32);
        let alignment = usize::try_from(alignment)
            .ok()
            .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20)
            .ok_or_else(|| {
                self.malformed(format!(
                    "general.alignment is {alignment}, which is no power of two"
                ))
            })?;

        let left = (self.bytes.len() - self.at) as u64;
        if tensors.saturating_mul(24) > left {
            let needed = (self.at as u64).saturating_add(tensors.saturating_mul(24));
            return Err(self.truncated(format!("the list of {tensors} tensors"), needed));
        }
        let mut infos = Vec::with_capacity(tensors as usize);
        for _ in 0..tensors {
            infos.push(self.tensor_info()?);
        }
        let data = self.at.next_multiple_of(alignment);
        let mut names = HashSet::with_capacity(infos.len());
        let mut entries = Vec::with_capacity(infos.len());
        for (name, shape, ggml_type, offset) in infos {
            if !names.insert(name.clone()) {
                return Err(self.malformed(format!("tensor `{name}` is there twice")));
            }
            let size = self.size_of(&name, &shape, ggml_type)?;
            let range = usize::try_from(offset)
                .ok()
                .and_then(|offset| data.checked_add(offset))
                .and_then(|start| Some(start..start.checked_add(size)?));
            let Some(range) = range.filter(|range| range.end <= self.bytes.len()) else {
                let needed = (data as u64).saturating_add(offset).saturating_add(size as u64);
                return Err(self.truncated(format!("tensor `{name}`"), needed));
            };
            if offset % alignment as u64 != 0 {
                return Err(self.malformed(format!(
                    "tensor `{name}` is at offset {offset}, not aligned to {alignment}"
                )));
            }
            entries.push(Entry {
                name,
                ggml_type,
                shape,
                range,
            });
        }
        self.check_overlap(&entries)?;
        Ok((metadata, entries))
    }

    fn check_overlap(&self, entries: &[Entry]) -> Result<(), CheckpointError> {
        let mut sorted: Vec<&Entry> = entries.iter().filter(|entry| !entry.range.is_empty()).collect();
        sorted.sort_by_key(|entry| entry.range.start);
        for pair in sorted.windows(2) {
            if pair[0].range.end > pair[1].range.start {
                let (first, second) = (&pair[0].name, &pair[1].name);
                return Err(self.malformed(format!("tensors `{first}` and `{second}` overlap")));
            }
        }
        Ok(())
    }

    fn metadata(&mut self, count: usize) -> Result<Metadata, CheckpointError> {
        let mut metadata = Metadata::default();
        for _ in 0..count {
            let key = self.string("a metadata key")?;
            let kind = self.u32("a metadata type")?;
            let value = self.value(kind, &key, 0)?;
            if metadata
                .index
                .insert(key.clone(), metadata.entries.len())
                .is_some()
            {
                return Err(self.malformed(format!("metadata `{key}` is there twice")));
            }
            metadata.entries.push((key, value));
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<GgufValue, CheckpointError> {
        Ok(match kind {
            0 => GgufValue::Unsigned(self.array::<1>(key)?[0].into()),
            1 => GgufValue::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => GgufValue::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => GgufValue::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => GgufValue::Unsigned(self.u32(key)?.into()),
            5 => GgufValue::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => GgufValue::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => match self.array::<1>(key)?[0] {
                0 => GgufValue::Bool(false),
                1 => GgufValue::Bool(true),
                other => return Err(self.malformed(format!("metadata `{key}` is a bool of {other}"))),
            },
            8 => GgufValue::String(self.string(key)?),
            9 => {
                if depth == MAX_NESTING {
                    return Err(
                        self.malformed(format!("metadata `{key}` nests more than {MAX_NESTING} arrays"))
                    );
                }
                let kind = self.u32(key)?;
                let item_bytes = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    9 => 12,
                    _ => 8,
                };
                let count = self.count(item_bytes, key)?;
                (0..count)
                    .map(|_| self.value(kind, key, depth + 1))
                    .collect::<Result<_, _>>()
                    .map(GgufValue::Array)?
            }
            10 => GgufValue::Unsigned(self.u64(key)?),
            11 => GgufValue::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => GgufValue::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.malformed(format!("metadata `{key}` has the unknown type {other}"))),
        })
    }

    fn tensor_info(&mut self) -> Result<(String, Vec<usize>, GgmlType, u64), CheckpointError> {
        let name = self.string("a tensor's name")?;
        let axes = self.u32(&name)?;
        if axes > MAX_AXES {
            return Err(self.malformed(format!(
                "tensor `{name}` has {axes} axes, at most {MAX_AXES} are allowed"
            )));
        }
        // The file lists the contiguous axis first.
        let mut shape = Vec::with_capacity(axes as usize);
        for _ in 0..axes {
            let len = self.u64(&name)?;
            let len = usize::try_from(len)
                .map_err(|_| self.malformed(format!("tensor `{name}` has an axis of {len}")))?;
            shape.push(len);
        }
        shape.reverse();
        let number = self.u32(&name)?;
        let ggml_type = GgmlType::from_number(number).ok_or_else(|| CheckpointError::UnsupportedType {
            tensor: name.clone(),
            found: format!("number {number}"),
            supported: GgmlType::names(),
        })?;
        let offset = self.u64(&name)?;
        Ok((name, shape, ggml_type, offset))
    }

    /// Bytes that a tensor takes.
    fn size_of(&self, name: &str, shape: &[usize], ggml_type: GgmlType) -> Result<usize, CheckpointError> {
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(ggml_type.block_len()) {
            return Err(self.malformed(format!(
                "tensor `{name}` has rows of {row}, which are not whole blocks of {} for {ggml_type}",
                ggml_type.block_len()
            )));
        }
        shape
            .iter()
            .try_fold(1_usize, |product, &len| product.checked_mul(len))
            .and_then(|elements| (elements / ggml_type.block_len()).checked_mul(ggml_type.block_bytes()))
            .ok_or_else(|| self.malformed(format!("tensor `{name}` has the impossible shape {shape:?}")))
    }
}
