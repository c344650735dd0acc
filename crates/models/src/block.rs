//! Keys and values as bytes, for a cache that outlives the process.
//!
//! A block is eight bytes that say what it is, the length of a header as a 32-bit number, the header as JSON, the
//! elements, and the CRC-32 of all of that. Numbers are little-endian. The header names everything that the elements
//! depend on, and a block that differs in any of it is refused.

use std::ops::Range;

use mlx_engine_core::KvConfig;
use serde::{Deserialize, Serialize};

use crate::decoder::Body;
use crate::kv::KvRule;
use crate::sequence::Cache;
use crate::{Decoder, ModelError, Sequence, graph, host};

/// What a block begins with; the last byte is the version of the format.
const MAGIC: [u8; 8] = *b"MLXEKV\0\x01";

/// Bytes of the longest header that is read.
const HEADER_LIMIT: usize = 4096;

impl Decoder {
    /// The keys and values of some positions of a sequence as bytes, from which [`import`](Self::import) makes a sequence
    /// again. Waits until they are there. On a CPU a block begins at a multiple of 64.
    ///
    /// Blocks have no names: that one was made from the tokens that it is taken for, and by a model of the same weights, is
    /// for the caller to know.
    ///
    /// # Errors
    ///
    /// For positions that the sequence does not have, a range that is empty or begins elsewhere, and what a step
    /// failed with.
    pub fn export(&self, sequence: &Sequence, range: Range<usize>) -> Result<Vec<u8>, ModelError> {
        self.check_exportable()?;
        let mut header = self.header(range.clone());
        let multiple = match &self.body {
            Body::Graph(_) => 1,
            Body::Host(_) => host::PAGE,
        };
        if range.is_empty() || range.end > sequence.len() || !range.start.is_multiple_of(multiple) {
            return Err(ModelError::BlockRange {
                start: range.start,
                end: range.end,
                len: sequence.len(),
                multiple,
            });
        }
        sequence.wait()?;
        let elements = match &sequence.cache {
            Cache::Graph(layers) => {
                let mut bytes = Vec::new();
                for layer in layers {
                    layer.export(&range, &mut bytes)?;
                }
                bytes
            }
            Cache::Host(cache) => {
                let (pages, bytes) = cache.export(range);
                header.pages = pages;
                bytes
            }
        };
        header.block(&elements)
    }

    /// The sequence whose keys and values these blocks are, in order from position 0. It goes on with the bits with which
    /// the one would that was exported.
    ///
    /// # Errors
    ///
    /// For a block that is damaged, of another model or another [`Compute`](crate::Compute), or not the next one.
    pub fn import<B: AsRef<[u8]>>(
        &self,
        blocks: impl IntoIterator<Item = B>,
    ) -> Result<Sequence, ModelError> {
        self.check_exportable()?;
        let mut sequence = self.sequence();
        for block in blocks {
            let (found, elements) = Header::read(block.as_ref())?;
            let start = sequence.offset;
            let end = found.check(&self.header(start..start), self.spec().context_length)?;
            match (&self.body, &mut sequence.cache) {
                (Body::Graph(graph), Cache::Graph(layers)) => {
                    let per_layer = elements.len() / layers.len();
                    let dtype = graph.dtype();
                    let shape = [1, self.spec().kv_heads, end - start, self.spec().head_dim];
                    let expected = 2 * shape.iter().product::<usize>() * graph.kv_element_bytes();
                    if elements.len() != expected * layers.len() {
                        let found = elements.len();
                        return Err(damaged(format!(
                            "it has {found} bytes of elements, not {expected} a layer"
                        )));
                    }
                    let parts = layers.iter_mut().zip(elements.chunks_exact(per_layer));
                    for (layer, elements) in parts {
                        layer.import(start, shape.map(|len| len as i32), dtype, elements)?;
                    }
                }
                (Body::Host(host), Cache::Host(cache)) => {
                    if !start.is_multiple_of(host::PAGE) {
                        return Err(damaged(format!("one before it ends at {start}, within a page")));
                    }
                    cache
                        .import(&host.pages, start..end, &found.pages, elements)?
                        .ok_or_else(|| damaged("its pages are not those that it tells of"))?;
                }
                _ => return Err(Self::foreign()),
            }
            sequence.offset = end;
        }
        sequence.wait()?;
        if let Cache::Host(cache) = &sequence.cache
            && sequence.offset > 0
        {
            sequence.released = cache.released();
            if !self.plan.can_go_on_at(sequence.offset, &sequence.released) {
                return Err(damaged("what its end sees is not in it"));
            }
        }
        Ok(sequence)
    }

    fn header(&self, range: Range<usize>) -> Header {
        let (layout, element) = match &self.body {
            Body::Graph(graph) => (graph::LAYOUT, graph::element(graph.dtype())),
            Body::Host(host) => (host::LAYOUT, host.pages.element()),
        };
        let spec = self.spec();
        Header {
            model_type: spec.model_type.clone(),
            layout: layout.to_owned(),
            element: element.to_owned(),
            layers: spec.layers,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            kv: self.kv.clone(),
            start: range.start,
            end: range.end,
            pages: Vec::new(),
        }
    }

    /// MLX's arrays are exported where they hold everything, as floats.
    fn check_exportable(&self) -> Result<(), ModelError> {
        let plain = |rule: &KvRule| rule.window.is_none() && rule.integers.is_none();
        if matches!(self.body, Body::Host(_)) || self.plan.rules.iter().all(plain) {
            return Ok(());
        }
        let message = "keys and values of a window, or of `kv.bits`, are exported on a CPU alone";
        Err(ModelError::config(message))
    }
}

/// What the elements of a block are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Header {
    pub(crate) model_type: String,
    /// The order of the elements.
    pub(crate) layout: String,
    /// Their type.
    pub(crate) element: String,
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// How keys and values are kept.
    pub(crate) kv: KvConfig,
    /// The first position, and the one behind the last.
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// For each kind of attention which of the pages are there; none are told where all are.
    pub(crate) pages: Vec<Vec<bool>>,
}

impl Header {
    /// The block of these elements.
    pub(crate) fn block(&self, elements: &[u8]) -> Result<Vec<u8>, ModelError> {
        let header = serde_json::to_vec(self).map_err(|error| damaged(error.to_string()))?;
        let mut bytes = Vec::with_capacity(MAGIC.len() + 8 + header.len() + elements.len());
        bytes.extend(MAGIC);
        bytes.extend((header.len() as u32).to_le_bytes());
        bytes.extend(header);
        bytes.extend(elements);
        let check = crc32fast::hash(&bytes);
        bytes.extend(check.to_le_bytes());
        Ok(bytes)
    }

    /// The header and the elements of a block that is whole.
    pub(crate) fn read(block: &[u8]) -> Result<(Self, &[u8]), ModelError> {
        let (magic, rest) = block
            .split_at_checked(MAGIC.len())
            .ok_or_else(|| damaged("it is shorter than its beginning"))?;
        if magic != MAGIC {
            return Err(damaged("it does not begin as a block of this version"));
        }
        let (checked, check) = block
            .split_last_chunk::<4>()
            .ok_or_else(|| damaged("it has no check sum"))?;
        if crc32fast::hash(checked) != u32::from_le_bytes(*check) {
            return Err(damaged("its check sum is another"));
        }
        let rest = &rest[..rest.len().saturating_sub(check.len())];
        let (len, rest) = rest
            .split_first_chunk::<4>()
            .ok_or_else(|| damaged("it has no header"))?;
        let len = u32::from_le_bytes(*len) as usize;
        let (header, elements) = rest
            .split_at_checked(len)
            .filter(|_| len <= HEADER_LIMIT)
            .ok_or_else(|| damaged(format!("its header would have {len} bytes")))?;
        let header = serde_json::from_slice(header).map_err(|error| damaged(error.to_string()))?;
        Ok((header, elements))
    }

    /// Refuses what is not the block that follows `start` positions, but for its end; returns its end.
    pub(crate) fn check(&self, expected: &Self, context_length: usize) -> Result<usize, ModelError> {
        let range = Range {
            start: self.start,
            end: self.end,
        };
        if *self
            != (Self {
                end: self.end,
                pages: self.pages.clone(),
                ..expected.clone()
            })
        {
            return Err(ModelError::ForeignBlock {
                found: format!("{self:?}"),
                expected: format!("{expected:?}"),
            });
        }
        if range.is_empty() || range.end > context_length {
            return Err(damaged(format!("it would hold the positions {range:?}")));
        }
        Ok(range.end)
    }
}

pub(crate) fn damaged(message: impl Into<String>) -> ModelError {
    ModelError::DamagedBlock {
        message: message.into(),
    }
}
