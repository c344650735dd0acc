//! Keys and values of what a sequence has seen.

use std::ops::Range;

use bytemuck::{AnyBitPattern, NoUninit};
use half::{bf16, f16};
use mlx_rs::ops::indexing::{IndexOp, TryIndexMutOp};
use mlx_rs::{Array, Dtype, ops};

use crate::ModelError;
use crate::kv::KvRule;

/// Tokens by which a cache grows. A longer step copies less often and holds more that is not used.
pub(crate) const BLOCK: usize = 256;

/// The keys and values of one layer.
///
/// Rows are written in place, which MLX does where nobody else holds the array. The views that attention reads are
/// gone once a step has been evaluated, so that the next step writes in place again. A clone holds the same arrays, and
/// whoever writes first gets arrays of its own.
#[derive(Clone, Debug, Default)]
pub(crate) struct KvCache {
    /// The first positions, where the window has passed them and they are seen all the same.
    kept: Option<Segment>,
    /// The first position of `floats`.
    base: usize,
    /// Floats, keys and values, from `base` on.
    floats: [Buffer; 2],
    /// Integers with their scales and biases, keys and values, from the position on where they begin.
    integers: [[Buffer; 3]; 2],
}

/// `[1, kv_heads, capacity, width]`, of which the first rows are in use.
#[derive(Clone, Debug, Default)]
struct Buffer(Option<Array>);

/// Keys and values of some positions, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) first: usize,
    pub(super) keys: Rows,
    pub(super) values: Rows,
}

/// `[1, kv_heads, positions, head_dim]`.
#[derive(Clone, Debug)]
pub(super) enum Rows {
    Floats(Array),
    /// MLX's affine quantization: the integers, their scales and their biases.
    Integers {
        parts: [Array; 3],
        bits: i32,
        group_size: i32,
    },
}

impl Rows {
    pub(super) fn positions(&self) -> usize {
        let (Self::Floats(array)
        | Self::Integers {
            parts: [array, ..], ..
        }) = self;
        array.shape()[2] as usize
    }
}

impl KvCache {
    /// Writes the keys and values of new tokens, `[1, kv_heads, new, head_dim]`, behind the first `offset` positions and
    /// returns what is there of all.
    pub(super) fn update(
        &mut self,
        rule: &KvRule,
        offset: usize,
        keys: &Array,
        values: &Array,
    ) -> Result<Vec<Segment>, ModelError> {
        let Some(integers) = rule.integers else {
            return self.update_floats(rule, offset, keys, values);
        };
        let end = offset + keys.shape()[2] as usize;
        let (bits, group_size) = (integers.bits as i32, integers.group_size as i32);
        // What comes before the integers stays floats.
        let floats = integers.from.clamp(offset, end) - offset;
        let mut segments = Vec::new();
        if integers.from > 0 {
            let part = |array: &Array| array.index((.., .., ..floats as i32, ..));
            let at = offset.min(integers.from);
            let mut rows = Vec::new();
            for (buffer, new) in self.floats.iter_mut().zip([keys, values]) {
                rows.push(buffer.write(0, at, &part(new))?);
            }
            if let [keys, values] = &rows[..] {
                segments.push(Segment {
                    first: 0,
                    keys: Rows::Floats(keys.clone()),
                    values: Rows::Floats(values.clone()),
                });
            }
        }
        if end > integers.from {
            let at = (offset + floats) - integers.from;
            let mut rows = Vec::new();
            for (buffers, new) in self.integers.iter_mut().zip([keys, values]) {
                let new = new.index((.., .., floats as i32.., ..));
                let (packed, scales, biases) = ops::quantize(&new, group_size, bits)?;
                let [a, b, c] = buffers;
                rows.push(Rows::Integers {
                    parts: [
                        a.write(0, at, &packed)?,
                        b.write(0, at, &scales)?,
                        c.write(0, at, &biases)?,
                    ],
                    bits,
                    group_size,
                });
            }
            if let [keys, values] = &rows[..] {
                segments.push(Segment {
                    first: integers.from,
                    keys: keys.clone(),
                    values: values.clone(),
                });
            }
        }
        Ok(segments)
    }

    fn update_floats(
        &mut self,
        rule: &KvRule,
        offset: usize,
        keys: &Array,
        values: &Array,
    ) -> Result<Vec<Segment>, ModelError> {
        let end = offset + keys.shape()[2] as usize;
        if offset == 0 {
            (self.kept, self.base) = (None, 0);
        }
        // Where the buffers grow, what is no longer seen is left behind.
        let grows = end - self.base > self.floats[0].capacity();
        let released = rule.released(offset);
        let base = if grows && released > rule.keep {
            released.max(self.base)
        } else {
            self.base
        };
        if base > 0 && self.kept.is_none() && rule.keep > 0 {
            let first = |buffer: &Buffer| buffer.rows(..rule.keep as i32);
            if let [Some(keys), Some(values)] = self.floats.each_ref().map(first) {
                self.kept = Some(Segment {
                    first: 0,
                    keys: Rows::Floats(keys.contiguous()?),
                    values: Rows::Floats(values.contiguous()?),
                });
            }
        }
        let (gone, at) = (base - self.base, offset - self.base);
        let [key_buffer, value_buffer] = &mut self.floats;
        let keys = key_buffer.write(gone, at, keys)?;
        let values = value_buffer.write(gone, at, values)?;
        self.base = base;
        let rows = Segment {
            first: base,
            keys: Rows::Floats(keys),
            values: Rows::Floats(values),
        };
        Ok(self.kept.iter().cloned().chain([rows]).collect())
    }

    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        let kept = self.kept.iter().flat_map(|kept| [&kept.keys, &kept.values]);
        let kept = kept.filter_map(|rows| match rows {
            Rows::Floats(array) => Some(array),
            Rows::Integers { .. } => None,
        });
        let buffers = self.floats.iter().chain(self.integers.iter().flatten());
        kept.chain(buffers.filter_map(|buffer| buffer.0.as_ref()))
    }
}

impl Buffer {
    fn capacity(&self) -> usize {
        self.0.as_ref().map_or(0, |array| array.shape()[2] as usize)
    }

    fn rows(&self, range: std::ops::RangeTo<i32>) -> Option<Array> {
        self.0.as_ref().map(|array| array.index((.., .., range, ..)))
    }

    /// Writes rows behind the first `offset`, after the first `gone` have been given up where the buffer has to grow, and
    /// returns those that are in use.
    fn write(&mut self, gone: usize, offset: usize, new: &Array) -> Result<Array, ModelError> {
        let shape = new.shape();
        let (start, end) = (offset - gone, offset - gone + shape[2] as usize);
        if gone > 0 || end > self.capacity() {
            let grown = end.next_multiple_of(BLOCK);
            let rest = [shape[0], shape[1], (grown - start) as i32, shape[3]];
            let rest = ops::zeros_dtype(&rest, new.dtype())?;
            self.0 = Some(match self.0.take().filter(|_| start > 0) {
                // What lies behind the offset was given up and is not copied.
                Some(old) => {
                    let own = old.index((.., .., gone as i32..offset as i32, ..));
                    ops::concatenate(&[own, rest], 2)?
                }
                None => rest,
            });
        }
        let buffer = self.0.get_or_insert_with(|| new.clone());
        if end > start {
            buffer.try_index_mut((.., .., start as i32..end as i32, ..), new)?;
        }
        Ok(buffer.index((.., .., ..end as i32, ..)))
    }
}

/// The order of the elements of the blocks, as they name it: layer by layer keys and then values, `[heads, positions,
/// head_dim]` each.
pub(crate) const LAYOUT: &str = "heads-first";

/// The name of an element's type.
pub(crate) fn element(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Float16 => "f16",
        Dtype::Bfloat16 => "bf16",
        _ => "f32",
    }
}

impl KvCache {
    /// The elements of these positions, keys and then values; of a cache that keeps all of them as floats.
    pub(crate) fn export(&self, range: &Range<usize>, bytes: &mut Vec<u8>) -> Result<(), ModelError> {
        fn of<E: NoUninit>(elements: &[E], bytes: &mut Vec<u8>) {
            bytes.extend_from_slice(bytemuck::cast_slice(elements));
        }
        for array in self.floats.iter().filter_map(|buffer| buffer.0.as_ref()) {
            let rows = array.index((.., .., range.start as i32..range.end as i32, ..));
            let rows = rows.contiguous()?;
            rows.eval()?;
            match rows.dtype() {
                Dtype::Float16 => of(rows.try_as_slice::<f16>()?, bytes),
                Dtype::Bfloat16 => of(rows.try_as_slice::<bf16>()?, bytes),
                _ => of(rows.try_as_slice::<f32>()?, bytes),
            }
        }
        Ok(())
    }

    /// Writes elements of `positions` behind the first `offset` rows: keys and then values, each `[1, kv_heads,
    /// positions, head_dim]`.
    pub(crate) fn import(
        &mut self,
        offset: usize,
        shape: [i32; 4],
        dtype: Dtype,
        elements: &[u8],
    ) -> Result<(), ModelError> {
        fn of<E: AnyBitPattern>(bytes: &[u8]) -> Vec<E> {
            let elements = bytes.chunks_exact(size_of::<E>());
            elements.map(bytemuck::pod_read_unaligned).collect()
        }
        let (keys, values) = elements.split_at(elements.len() / 2);
        for (buffer, bytes) in self.floats.iter_mut().zip([keys, values]) {
            let new = match dtype {
                Dtype::Float16 => Array::from_slice(&of::<f16>(bytes), &shape),
                Dtype::Bfloat16 => Array::from_slice(&of::<bf16>(bytes), &shape),
                _ => Array::from_slice(&of::<f32>(bytes), &shape),
            };
            buffer.write(0, offset, &new)?;
        }
        Ok(())
    }
}
